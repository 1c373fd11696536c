"""The steps of a causal language model of transformers: next-token loss, and prefill and decoding with its cache."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from crosschip.qualify.subjects.generic_step import GenericTrainer, narrow_states_note, placed, switch_dropout_off
from crosschip.qualify.subjects.made_tokens import random_tokens, ruled_tokens
from crosschip.qualify.subjects.subject import StepMeasure
from crosschip.serve.engine.request import Request, SamplingParams
from crosschip.serve.engine.sampling import choose_tokens, plan_sampling

__all__ = ["CausalLMWorkload"]

_NUM_ROWS = 8
_NUM_DECODED = 4
_MOST_FLOPS = 1e11  # for one train step: a second or two on two cores
_STATES = ("past_key_values", "cache", "cache_params", "state")  # what architectures call what a decoding goes on from
_NO_STATE = "the model gives no cache: each token is decoded with all before it"
_MOST_LOGITS = 1 << 25  # the whole batch's stand in memory several times
_WAYS = (
    SamplingParams(max_tokens=8, temperature=0.0),
    SamplingParams(max_tokens=8, temperature=0.8, seed=1),
    SamplingParams(max_tokens=8, temperature=1.0, top_p=0.9, seed=2),
    SamplingParams(max_tokens=8, temperature=0.7, top_k=20, seed=3),
)


class CausalLMWorkload:
    """A model of transformers on one device, on made tokens."""

    def __init__(
        self,
        model: torch.nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        origin: str,
        small: bool,
        notes: list[str],
    ) -> None:
        self.phase = "prefill"
        narrow = narrow_states_note(dtype) + switch_dropout_off(model)
        self.module = placed(model, device, dtype)
        self._device, self._seed, self._small = device, seed, small
        config: Any = model.config
        self._vocab_size = int(config.vocab_size)
        longest = int(getattr(config, "max_position_embeddings", None) or 4096)
        self._batch, self._length = (4, min(32, longest)) if small else _batch_shape(model, self._vocab_size, longest)
        self.notes = [*notes, *narrow, f"a train step has {self._batch} x {self._length} made tokens"]
        self._prompt_len = max(2, min(24 if small else 128, self._length, longest - _NUM_DECODED))
        self._takes = inspect.signature(model.forward).parameters
        self._trainer = GenericTrainer(self.module, origin)

    def train_step(self, index: int) -> StepMeasure:
        """The mean next-token loss of one batch, its gradient, AdamW."""
        self.module.train()
        shape = self._vocab_size, self._batch, self._length
        if self._small:
            tokens = ruled_tokens(*shape, self._seed, index)
        else:
            tokens = random_tokens(*shape, self._seed * 1_000_003 + index)
        ids = tokens.to(self._device)
        return self._trainer.step(lambda: self.module(input_ids=ids, labels=ids, use_cache=False))

    @torch.inference_mode()
    def serve_step(self) -> torch.Tensor:
        """Eight prompts together, then a few given tokens each with the cache; a choice after every call."""
        self.module.eval()
        tokens = random_tokens(self._vocab_size, _NUM_ROWS, self._prompt_len + _NUM_DECODED, self._seed)
        self.phase = "prefill"
        output = self.module(input_ids=tokens[:, : self._prompt_len].to(self._device), use_cache=True)
        found = [self._chosen_from(output)]
        for place in range(self._prompt_len, tokens.shape[1]):
            self.phase = "decode"
            state = self._state_of(output)
            ids = tokens[:, place : place + 1] if state else tokens[:, : place + 1]
            output = self.module(input_ids=ids.to(self._device), **state, use_cache=True)
            found.append(self._chosen_from(output))
        return torch.cat([logits.cpu().float() for logits in found])

    @torch.inference_mode()
    def serve_rows(self, rows: list[int]) -> torch.Tensor:
        """Logits after these prompts, [rows, vocabulary]."""
        self.module.eval()
        tokens = random_tokens(self._vocab_size, _NUM_ROWS, self._prompt_len, self._seed)[rows]
        logits: torch.Tensor = self.module(input_ids=tokens.to(self._device), use_cache=False).logits
        return logits[:, -1].cpu().float()

    def _state_of(self, output: Any) -> dict[str, Any]:
        """What the next call goes on from, under the name that the architecture takes it; nothing where it has none."""
        for name in _STATES:
            if name in self._takes and getattr(output, name, None) is not None:
                return {name: getattr(output, name)}
        if _NO_STATE not in self.notes:
            self.notes.append(_NO_STATE)
        return {}

    def _chosen_from(self, output: Any) -> torch.Tensor:
        """The last position's logits, after a token was chosen from them in each of the ways."""
        logits: torch.Tensor = output.logits[:, -1].float()
        self.phase = "sampling"
        requests = [Request([0], _WAYS[row % len(_WAYS)]) for row in range(logits.shape[0])]
        choose_tokens(logits, plan_sampling(requests, logits.device))[0].cpu()
        return logits


def _batch_shape(model: torch.nn.Module, vocab_size: int, longest: int) -> tuple[int, int]:
    """Sequences and tokens of a train step that a CPU computes in seconds."""
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens = int(min(_MOST_FLOPS / (6 * num_parameters), _MOST_LOGITS / vocab_size, 4096))
    length = max(8, min(256, longest, tokens))
    return max(1, min(16, tokens // length)), length
