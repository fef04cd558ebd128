"""Models from and for other tools: what is read is bounded, what is written proves itself."""
