"""What a request says so that an engine draws from the model's own distribution.

Servers take defaults from the model's generation_config.json where a request is silent. `temperature` is the caller's.
"""

from __future__ import annotations

__all__ = ["OF_OPENAI", "OF_VLLM"]

OF_OPENAI = {"top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}

OF_VLLM = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""Beyond OpenAI's API, for engines that know these fields, as ours does; -1 is all."""
