"""The gateway: one OpenAI-compatible address in front of several engines, on several chips. No torch.

`fleet`, `prefixes` and `canary` are policy; `admission`, `health`, `forwarding` and `server` do it; `watch` looks
whether what the engines say is still what the certificate says they say.
"""
