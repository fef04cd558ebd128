"""Markup to text. Each cleaner is a function of one document, called in worker processes."""
