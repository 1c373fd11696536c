"""The engine: requests of token ids in, token events out, computed together on one chip.

`request`, `scheduler` and `engine` are policy and know no torch; `sampling` and `runner` are tensors; `loading` joins
them.
"""
