"""Statistics that turn errors into verdicts."""
