"""The exam of special values."""
