"""One group of `thin_links.py`: a small model trained on a made language, with other groups or alone.

`python benchmarks/thin_links_group.py OPTIONS_JSON` prints one line of JSON at the end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crosschip.chips import find_chip
from crosschip.model import ModelConfig, Transformer, init_weights
from crosschip.recipe import GroupSettings
from crosschip.thin_links import Choice
from crosschip.train.outer.diloco import DiLoCo
from crosschip.train.outer.errors import StepNotCommitted
from crosschip.train.outer.messages import Member
from crosschip.train.outer.opening import open_groups
from crosschip.train.outer.training_state import TrainingState

SUCCESSORS = 4
SHARES = (0.6, 0.2, 0.1, 0.1)  # of a token's four successors: 1.09 nats that nobody can predict
VALIDATION_START = 1 << 40  # sequences that no training reaches


@dataclass
class Options:
    """`choice` holds the fields of a `Choice`; `groups` those of `GroupSettings`."""

    group: int
    num_groups: int
    lighthouse: str
    log: str
    num_steps: int
    choice: dict[str, Any]
    groups: dict[str, Any] = field(default_factory=dict)
    hidden_size: int = 128
    num_layers: int = 2
    batch_size: int = 16
    seq_len: int = 128
    learning_rate: float = 2e-3
    chip: str = "cpu"
    vocabulary: int = 512
    contexts: int = 8  # the two tokens before decide through the first of them and this many classes of the other

    def command(self) -> list[str]:
        """The command line of a process with these options."""
        return [sys.executable, __file__, json.dumps(asdict(self))]


@dataclass
class Position:
    """How far the training is."""

    step: int = 0
    sequences: int = 0
    tokens: int = 0


def new_model(options: Options) -> Transformer:
    width = options.hidden_size
    model = Transformer(
        ModelConfig(
            vocab_size=options.vocabulary,
            hidden_size=width,
            intermediate_size=3 * width,
            moe_intermediate_size=width,
            num_hidden_layers=options.num_layers,
            num_attention_heads=4,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_shared_experts=1,
            first_k_dense_replace=1,
            kv_lora_rank=width // 2,
            qk_rope_head_dim=16,
            qk_nope_head_dim=16,
            v_head_dim=16,
            max_position_embeddings=options.seq_len,
        )
    )
    init_weights(model, seed=1)
    return model


class Language:
    """Sequences in which two tokens decide on four that may follow; a function of their numbers."""

    def __init__(self, options: Options, device: torch.device) -> None:
        self.device = device  # of the model
        self.vocabulary, self.contexts, self.seq_len = options.vocabulary, options.contexts, options.seq_len
        size = (self.vocabulary, self.contexts, SUCCESSORS)
        self.table = np.random.default_rng(7).integers(0, self.vocabulary, size)

    def sequences(self, start: int, count: int) -> torch.Tensor:
        """[count, seq_len + 1]"""
        length = self.seq_len + 1
        tokens = np.empty((count, length), dtype=np.int64)
        draws = np.stack([np.random.default_rng(number).random(length) for number in range(start, start + count)])
        tokens[:, 0] = tokens[:, 1] = (draws[:, 0] * self.vocabulary).astype(np.int64)
        chosen = np.searchsorted(np.cumsum(SHARES), draws, side="right").clip(max=SUCCESSORS - 1)
        for place in range(2, length):
            context = tokens[:, place - 2] % self.contexts
            tokens[:, place] = self.table[tokens[:, place - 1], context, chosen[:, place]]
        return torch.from_numpy(tokens)


def wire_bytes() -> int | None:
    """What has left over the interface that gloo uses, with all headers; None without one to name."""
    counter = Path(f"/sys/class/net/{os.environ.get('GLOO_SOCKET_IFNAME', '')}/statistics/tx_bytes")
    return int(counter.read_text()) if counter.is_file() else None


def main() -> None:
    options = Options(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # tensor cores where there are some; a CPU computes in fp32 all the same
    chip = find_chip(options.chip)
    language = Language(options, chip.device)
    model = new_model(options).to(chip.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), fused=True)
    position = Position()
    groups = open_groups(
        GroupSettings(num_groups=options.num_groups, **options.groups),
        Choice(**options.choice),
        Member(options.group, options.num_groups, options.num_groups, options.lighthouse),
        TrainingState(model, optimizer, position),
        options.batch_size,
        Path(options.log),
    )
    if isinstance(groups, DiLoCo):
        groups.join()
    groups.before_step()
    first_byte, started, computing_s = wire_bytes(), time.perf_counter(), 0.0
    waits_s: list[float] = []
    while position.step < options.num_steps:
        began = time.perf_counter()
        computed_s = one_step(options, language, groups, model, optimizer, position)
        computing_s += computed_s
        waits_s.append(time.perf_counter() - began - computed_s)
    began = time.perf_counter()
    groups.finish()
    waits_s.append(time.perf_counter() - began)
    wall_s, last_byte = time.perf_counter() - started, wire_bytes()
    groups.close()
    print(
        json.dumps(
            {
                "computing_s": computing_s,
                "wall_s": wall_s,
                "waits_s": waits_s,  # of each step, and of the end
                "wire_bytes": None if first_byte is None or last_byte is None else last_byte - first_byte,
                "sent_bytes": groups.traffic.num_bytes_sent,
                "waited_s": groups.traffic.waited_s,
                "num_parameters": sum(each.numel() for each in model.parameters()),
                "validation_loss": validation_loss(model, language),
            }
        )
    )


def one_step(
    options: Options,
    language: Language,
    groups: Any,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    position: Position,
) -> float:
    """One step; returns the seconds spent computing."""
    part = groups.before_step().slice(position.sequences, options.batch_size)
    started = time.perf_counter()
    ids = language.sequences(part.start, part.count).to(language.device)
    optimizer.zero_grad(set_to_none=True)
    found = model.loss(ids[:, :-1], ids[:, 1:])
    num_tokens = int(found.num_tokens)
    (found.loss_sum / num_tokens).backward()
    computing_s = time.perf_counter() - started
    try:
        sums = groups.average_gradients(num_tokens, found.expert_load_LE.flatten().tolist())
    except StepNotCommitted:
        return 0.0
    started = time.perf_counter()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = options.learning_rate * min(1.0, (position.step + 1) / 20)
    optimizer.step()
    load = torch.tensor(sums.numbers, device=language.device).view(found.expert_load_LE.shape)
    model.update_router_bias(load, 1e-3)
    computing_s += time.perf_counter() - started
    position.step += 1
    position.sequences += part.taken_by_all
    position.tokens += part.taken_by_all * options.seq_len
    groups.after_update(num_tokens)
    return computing_s


@torch.no_grad()
def validation_loss(model: Transformer, language: Language) -> float:
    loss_sum, num_tokens = 0.0, 0
    for start in range(VALIDATION_START, VALIDATION_START + 128, 16):
        ids = language.sequences(start, 16).to(language.device)
        found = model.loss(ids[:, :-1], ids[:, 1:])
        loss_sum, num_tokens = loss_sum + float(found.loss_sum), num_tokens + int(found.num_tokens)
    return loss_sum / num_tokens


if __name__ == "__main__":
    main()
