"""One rank of one group that trains a small model with others; a process of its own. Not a test itself.

`python group_process.py OPTIONS_JSON`; a line of JSON per step goes to `out`. See `Options`.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crosschip.recipe import GroupSettings
from crosschip.thin_links import Choice
from crosschip.train.outer.diloco import DiLoCo
from crosschip.train.outer.errors import GroupsError, StepNotCommitted
from crosschip.train.outer.messages import Member
from crosschip.train.outer.opening import open_groups
from crosschip.train.outer.placement import Slice
from crosschip.train.outer.training_state import TrainingState

WIDTH, HIDDEN, CLASSES = 16, 64, 8


@dataclass
class Options:
    out: str
    group: int
    lighthouse: str
    steps: int
    num_groups: int = 2
    batch_size: int = 12
    mode: str = "every-step"
    sync_every: int = 1
    fragments: int = 1
    overlap_steps: int = 0
    compression: str = "none"
    chip: str = "cpu"
    seed: int = 0
    learning_rate: float = 1e-2
    pause_s: float = 0.0  # added to each step, so that there is time to kill somebody
    rank: int = 0
    size: int = 1
    rendezvous: str = ""  # a file by which the ranks of one group find each other
    poisoned_step: int = 0  # after it, this group's parameters hold a NaN
    digest: str = "same"
    stage: str = ""  # where it goes on after step `resumed_at`
    resumed_at: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> list[str]:
        return [sys.executable, __file__, json.dumps(asdict(self))]


@dataclass
class Position:
    step: int = 0
    sequences: int = 0
    tokens: int = 0


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, HIDDEN)
        self.second = nn.Linear(HIDDEN, CLASSES)
        self.register_buffer("bias", torch.zeros(CLASSES))  # moved without a gradient, as a router's bias is

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x))) + self.bias


def new_model(seed: int) -> Model:
    torch.manual_seed(seed)
    return Model()


def sequences(start: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, classes and the tokens that each sequence stands for: a function of its number."""
    inputs, classes = [], []
    teacher = torch.randn(WIDTH, CLASSES, generator=torch.Generator().manual_seed(99))
    for number in range(start, start + count):
        x = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1000 + number))
        inputs.append(x)
        classes.append(int((x @ teacher).argmax()))
    tokens = torch.tensor([1.0 + number % 3 for number in range(start, start + count)])
    return torch.stack(inputs), torch.tensor(classes), tokens


def backward(model: nn.Module, part: Slice, device: torch.device) -> tuple[int, float]:
    """The gradient of the mean loss over the tokens of a slice; returns tokens and the loss summed over them."""
    inputs, classes, tokens = (each.to(device) for each in sequences(part.start, part.count))
    losses = nn.functional.cross_entropy(model(inputs), classes, reduction="none") * tokens
    (losses.sum() / tokens.sum()).backward()
    return int(tokens.sum()), float(losses.detach().sum())


def checksum(model: nn.Module) -> int:
    found = 0
    for tensor in [*model.parameters(), *model.buffers()]:
        local = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        found = zlib.crc32(memoryview(local.detach().cpu().contiguous().numpy()), found)
    return found


def gradient_checksum(model: nn.Module) -> int:
    return zlib.crc32(
        b"".join(each.grad.cpu().numpy().tobytes() for each in model.parameters() if each.grad is not None)
    )


def share_store_over(options: Options) -> Any:
    import torch.distributed as dist

    store = dist.FileStore(options.rendezvous, options.size)
    dist.init_process_group("gloo", store=store, rank=options.rank, world_size=options.size)

    def share(text: str | None) -> str:
        box = [text]
        dist.broadcast_object_list(box, src=0)
        assert box[0] is not None
        return box[0]

    return share


def build(options: Options) -> tuple[nn.Module, torch.optim.Optimizer, torch.device, Any]:
    device, share = torch.device("cpu"), None
    if options.chip != "cpu":
        from crosschip.chips import find_chip

        device = find_chip(options.chip).device
    model: nn.Module = new_model(options.seed).to(device)
    if options.size > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        share = share_store_over(options)
        fully_shard(model, mesh=init_device_mesh("cpu", (options.size,)))
    return model, torch.optim.AdamW(model.parameters(), lr=options.learning_rate), device, share


def main() -> int:
    options = Options(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    model, optimizer, device, share = build(options)
    position = Position(options.resumed_at)
    choice = Choice(options.mode, options.compression, "", options.sync_every, options.fragments, options.overlap_steps)  # type: ignore[arg-type]
    groups = open_groups(
        GroupSettings(num_groups=options.num_groups, **options.settings),
        choice,
        Member(options.group, options.num_groups, 1, options.lighthouse, options.rank, options.size),
        TrainingState(model, optimizer, position),
        options.batch_size,
        Path(options.out).with_suffix(".log"),
        recipe_digest=options.digest,
        share_store=share,
    )
    with Path(options.out).open("a") as out:

        def note(**what: object) -> None:
            out.write(json.dumps({"time": time.time(), **what}) + "\n")
            out.flush()

        note(sidecar=groups.handle.pid)
        try:
            if options.stage:
                groups.resume(Path(options.stage), options.resumed_at)
            elif isinstance(groups, DiLoCo):
                groups.join()
            train(options, groups, model, optimizer, position, device, note)
            groups.finish()
            note(finished=position.step, checksum=checksum(model), traffic=asdict(groups.traffic))
        except GroupsError as error:
            note(error=type(error).__name__, problem=error.problem)
            return 2
        finally:
            for event in groups.new_events():
                note(event=event.event, detail=event.detail, action=event.action)
    groups.close()
    return 0


def train(
    options: Options,
    groups: Any,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    position: Position,
    device: torch.device,
    note: Any,
) -> None:
    while position.step < options.steps:
        place = groups.before_step()
        part = place.slice(position.sequences, options.batch_size)
        optimizer.zero_grad(set_to_none=True)
        tokens, loss_sum = backward(model, part, device)
        try:
            sums = groups.average_gradients(tokens, [loss_sum])
        except StepNotCommitted as reason:
            note(repeated=position.step + 1, reason=str(reason))
            continue
        gradient = gradient_checksum(model) if options.size == 1 else 0
        optimizer.step()
        with torch.no_grad():
            model.bias += 1e-3 * (1 + options.group if isinstance(groups, DiLoCo) else 1)  # type: ignore[operator]
            if options.poisoned_step == position.step + 1:
                next(model.parameters()).view(-1)[0] = float("nan")
        position.step += 1
        position.sequences += part.taken_by_all
        position.tokens += sums.num_tokens
        step = position.step
        groups.after_update(tokens)
        note(
            step=step,
            now_at=position.step,
            sequences=position.sequences,
            first=part.start,
            count=part.count,
            loss=sums.numbers[0] / sums.num_tokens,
            participants=place.num_participants,
            commits=groups.outer.commits if isinstance(groups, DiLoCo) else step,
            checksum=checksum(model),
            gradient=gradient,
        )
        for event in groups.new_events():
            note(event=event.event, detail=event.detail, action=event.action)
        time.sleep(options.pause_s)


if __name__ == "__main__":
    sys.exit(main())
