"""crosschip: train a reasoning model on one vendor's chips, serve it on another's, and prove every step."""

__version__ = "0.1.0"
