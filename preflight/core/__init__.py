"""What everything rests on: errors, logging, durable files, locks, JSON, signals. No torch."""
