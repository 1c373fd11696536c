"""Qualify: examine whether a chip can train or serve a subject, by measurement."""
