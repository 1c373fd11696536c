"""The exam of determinism."""
