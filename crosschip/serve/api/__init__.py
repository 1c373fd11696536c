"""The OpenAI-compatible HTTP face of the engine, and the chat page's files."""
