"""Paired tests: the same problems answered by A and by B. Pure statistics, known to all rooms: no torch, no I/O."""
