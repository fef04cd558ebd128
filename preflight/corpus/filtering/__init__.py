"""Which documents are dropped, by published rules, thresholds and copies."""
