"""The exam of the software."""
