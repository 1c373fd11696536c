"""The steps of our own transformer: what `train` and the serving engine run, on made tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from crosschip.data import Batch
from crosschip.model import Decoder, LatentCache, ModelConfig, Transformer, init_weights, load_model
from crosschip.qualify.subjects.made_tokens import random_tokens, ruled_tokens
from crosschip.qualify.subjects.subject import StepMeasure
from crosschip.recipe import ParallelSettings, StageSettings
from crosschip.serve.engine.request import Request, SamplingParams
from crosschip.serve.engine.runner import Runner
from crosschip.serve.engine.scheduler import PrefillChunk, Step
from crosschip.train.group.sharding import shard_model
from crosschip.train.group.world import ALONE, World
from crosschip.train.optimizer import build_optimizer
from crosschip.train.step import NonFiniteError, train_step

__all__ = ["NUM_ROWS", "TransformerPlan", "TransformerWorkload"]

NUM_ROWS = 8  # prompts that are served together


@dataclass(frozen=True)
class TransformerPlan:
    """What is built and how much of it runs: the architecture, the stage with its batch, the prompts' length."""

    config: ModelConfig
    stage: StageSettings
    prompt_len: int
    new_tokens: int = 4
    ruled: bool = False  # train on sequences that can be learned
    weights: Path | None = None  # a model directory to read; None: new weights from the seed
    notes: list[str] = field(default_factory=list)


class TransformerWorkload:
    """A transformer with its optimizer and, once it serves, its decoder and cache, on one device."""

    def __init__(self, plan: TransformerPlan, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.phase = "forward"
        self.notes = plan.notes
        self._plan, self._device, self._dtype, self._seed = plan, device, dtype, seed
        self.module: torch.nn.Module
        if plan.weights is not None:
            self._model = load_model(plan.weights, dtype=torch.float32, device=device)
        else:
            self._model = Transformer(plan.config)
            init_weights(self._model, seed)
            self._model = self._model.to(device)
        self.module = self._model
        self._optimizer: torch.optim.Optimizer | None = None
        self._serving: _Serving | None = None
        self._world: World = ALONE

    def shard(self, world: World) -> None:
        """Spread the model over ranks as `train` does, before the first step; each trains its share of a batch."""
        shard_model(self._model, world, ParallelSettings())
        self._world = world

    def train_step(self, index: int) -> StepMeasure:
        """One step of `train` on batch `index`."""
        stage = self._plan.stage
        if self._optimizer is None:
            self._optimizer = build_optimizer(self._model, stage)
        self._serving = None  # the decoder's prepared weights are stale after this
        learning_rate = stage.learning_rate * (_warm_then_cool(index) if self._plan.ruled else 1.0)
        batch = self._batch(index)
        try:
            found = train_step(
                self._model, self._optimizer, batch, stage, self._dtype, index + 1, learning_rate, self._world
            )
        except NonFiniteError:
            return StepMeasure(math.nan, math.nan)
        return StepMeasure(found.loss, found.gradient_norm)

    def serve_step(self) -> torch.Tensor:
        """Prompts whole, in chunks and padded, then decoded together and alone, chosen from in each of the ways."""
        return self._server().step(self)

    def serve_rows(self, rows: list[int]) -> torch.Tensor:
        """Logits after these prompts, [rows, vocabulary]."""
        return self._server().rows(rows)

    def _batch(self, index: int) -> Batch:
        stage, vocab_size = self._plan.stage, self._plan.config.vocab_size
        shape = stage.batch_size, stage.seq_len + 1
        if self._plan.ruled:
            tokens = ruled_tokens(vocab_size, *shape, self._seed, index)
        else:
            tokens = random_tokens(vocab_size, *shape, self._seed * 1_000_003 + index)
        tokens = tokens.tensor_split(self._world.size)[self._world.rank]
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def _server(self) -> _Serving:
        if self._serving is None:
            decoder = _WatchedDecoder(self._model, self._dtype, self)
            self._serving = _Serving(decoder, self._plan, self._device, self._seed)
        return self._serving


class _WatchedDecoder(Decoder):
    """A decoder that tells its workload the phase and keeps the logits it gives."""

    def __init__(self, model: Transformer, dtype: torch.dtype, workload: TransformerWorkload) -> None:
        super().__init__(model, dtype=dtype)
        self._workload = workload
        self.given: list[torch.Tensor] = []

    def extend(
        self, tokens_BT: torch.Tensor, start_B: torch.Tensor, slots_B: torch.Tensor, cache: LatentCache
    ) -> torch.Tensor:
        self._workload.phase = "decode" if tokens_BT.shape[1] == 1 else "prefill"
        return super().extend(tokens_BT, start_B, slots_B, cache)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        made = super().logits(hidden)
        self.given.append(made)
        self._workload.phase = "sampling"
        return made


class _Serving:
    """The engine's runner and the requests of one serving step."""

    def __init__(self, decoder: _WatchedDecoder, plan: TransformerPlan, device: torch.device, seed: int) -> None:
        self._decoder, self._plan = decoder, plan
        max_len = plan.prompt_len + plan.new_tokens
        self._runner = Runner(decoder, NUM_ROWS, max_len, device)
        self._cache = decoder.new_cache(NUM_ROWS, max_len)
        self._prompts = random_tokens(plan.config.vocab_size, NUM_ROWS, plan.prompt_len, seed).tolist()
        self._forced = random_tokens(plan.config.vocab_size, NUM_ROWS, plan.new_tokens, seed + 1).tolist()

    def step(self, workload: TransformerWorkload) -> torch.Tensor:
        """All logits of one serving step, fp32 on the CPU."""
        self._decoder.given = []
        *together, chunked = requests = self._requests()
        half = len(chunked.prompt_ids) // 2
        self._run(Step([[_whole(request) for request in together]], ()), together)
        self._run(Step([[PrefillChunk(chunked, 0, half)]], ()), [])
        self._run(Step([[PrefillChunk(chunked, half, len(chunked.prompt_ids) - half)]], tuple(together)), requests)
        self._run(Step([], tuple(requests)), requests)
        self._run(Step([], (chunked,)), [chunked])
        workload.phase = "sampling"
        return torch.cat([logits.cpu() for logits in self._decoder.given])

    def rows(self, rows: list[int]) -> torch.Tensor:
        tokens_BT = torch.tensor([self._prompts[row] for row in rows])
        slots = torch.arange(len(rows))
        hidden_BTD = self._decoder.extend(tokens_BT, torch.zeros_like(slots), slots, self._cache)
        return self._decoder.logits(hidden_BTD[:, -1]).cpu()

    def _run(self, step: Step, answered: list[Request]) -> None:
        """Compute one step and go on with the given token, whatever was chosen."""
        self._runner.run(step)
        for request in answered:
            request.num_computed = len(request.prompt_ids) + len(request.output_ids)
            request.output_ids.append(self._forced[request.slot][len(request.output_ids)])

    def _requests(self) -> list[Request]:
        """Requests that choose in each of the ways; all but the last have prompts of nearly one length."""
        made = []
        for slot, prompt in enumerate(self._prompts):
            length = len(prompt) - (slot % 3 if slot < NUM_ROWS - 1 else 0)
            request = Request(prompt[: max(2, length)], _WAYS[slot % len(_WAYS)])
            request.slot = slot
            made.append(request)
        return sorted(made, key=lambda request: (request.slot == NUM_ROWS - 1, -len(request.prompt_ids)))


def _warm_then_cool(index: int) -> float:
    """The learning rate's share at a step: ten steps up, a cosine down to a tenth at step 100.

    At a constant rate rounding errors grow from step to step, and then any two chips end far apart.
    """
    return min(1.0, (index + 1) / 10) * (0.55 + 0.45 * math.cos(math.pi * min(1.0, index / 100)))


_WAYS = [
    SamplingParams(max_tokens=8, temperature=0.0, num_logprobs=2),
    SamplingParams(max_tokens=8, temperature=0.8, seed=1),
    SamplingParams(max_tokens=8, temperature=1.0, top_p=0.9, seed=2),
    SamplingParams(max_tokens=8, temperature=0.7, top_k=20, seed=3),
]


def _whole(request: Request) -> PrefillChunk:
    return PrefillChunk(request, 0, len(request.prompt_ids))
