"""The exam of stability."""
