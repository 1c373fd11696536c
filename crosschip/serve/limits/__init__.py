"""Limits of a server: who may ask, how often, how much at a time, how long. ASGI middleware for engine and gateway."""

from crosschip.serve.limits.keys import ApiKey, KeyRing, hash_key, load_keys, new_key
from crosschip.serve.limits.layer import LimitsLayer, Paths
from crosschip.serve.limits.settings import Limits

__all__ = ["ApiKey", "KeyRing", "Limits", "LimitsLayer", "Paths", "hash_key", "load_keys", "new_key"]
