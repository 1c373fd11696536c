"""Which calls a subject makes, and those calls made again."""
