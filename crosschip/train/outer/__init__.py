"""Between replica groups: membership and healing by torchft in a sidecar process, averaging each step or DiLoCo.

`choice`, `placement` and `time_limits` decide and import no torch. The trainer's side is `every_step`, `diloco`,
`under_way` and `handle`; the sidecar's is `sidecar`, `membership`, `exchange` and `outer_state`. docs/groups.md is for
the user.
"""
