"""The engine: requests of token ids in, token events out, computed together on one chip.

Policy knows no torch: `request`, `blocks`, `holdings`, `scheduler`, `engine` with `engine_info`, `refusals` and
`overwrite`. Tensors are in `runner` with `sampling`, `penalties`, `speculation`, `row_independence` and `cache_size`.
`loading` joins them.
"""
