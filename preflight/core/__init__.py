"""What every other package uses: errors, logging, durable files, locks, JSON, signals. No torch."""
