"""llama.cpp's file format: a model written as GGUF, and read back."""

from crosschip.handoff.gguf.export import differing_keys, export_gguf, plan_gguf
from crosschip.handoff.gguf.reading import GgufSource, imported

__all__ = ["GgufSource", "differing_keys", "export_gguf", "imported", "plan_gguf"]
