"""The exam of attention."""
