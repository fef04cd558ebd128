"""Chats from files to a verified data folder of ids and masks."""
