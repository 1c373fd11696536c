"""Changes of layout: invertible operators, the layouts declared with them, and a writer that streams."""
