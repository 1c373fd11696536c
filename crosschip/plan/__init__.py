"""`plan`: what a run needs, how fast it is, how often it breaks, and when it ends. No torch."""
