"""The guard: what is watched while a stage trains, what is done about it, and the supervisor that restarts it."""
