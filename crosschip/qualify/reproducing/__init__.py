"""Failures as files that need only torch."""
