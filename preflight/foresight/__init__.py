"""What a run will need, take and learn, before it starts."""
