"""The server: the engine that batches requests, the HTTP application, the chat page."""
