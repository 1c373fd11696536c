"""The exam of the operators."""
