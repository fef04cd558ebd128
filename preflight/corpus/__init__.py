"""Text to verified shards: sources, documents, blocks, the build."""
