"""Model directories in the published layout, made once per session, and a real server over them in its own process."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from crosschip.data import ChatTokenizer, Message, train_tokenizer
from crosschip.model import ModelConfig, Transformer, init_weights, save_model
from crosschip.rundir import write_json

TEXTS = [
    "What is 12 + 30? Let me add the tens and the ones. 2 + 0 = 2 and 1 + 3 = 4, so it is 42.",
    "Der Fluß fließt über die Brücke. Ça va très bien, señor. Привет, мир! 你好,世界。 🙂🚀",
    "The quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs.",
]

REASONING = "The ones: 2 + 0 = 2.\nThe tens: 1 + 3 = 4.\nTogether that is 42."
CONVERSATIONS = [
    ("What is 12 + 30?", REASONING, "12 + 30 = **42**\n\nCheck: `42 - 30 = 12`."),
    ("Say hello.", "A greeting is wanted.", "Grüß Gott, 你好 🙂 and hello!"),
    ("Count.", None, " ".join(str(number) for number in range(1, 41))),
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def tiny_config(vocab_size: int, **changes: object) -> ModelConfig:
    fields: dict[str, object] = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "max_position_embeddings": 2048,
    }
    return ModelConfig(**(fields | changes))  # type: ignore[arg-type]


def make_model(config: ModelConfig, seed: int) -> Transformer:
    model = Transformer(config)
    init_weights(model, seed)
    return model


@pytest.fixture(scope="session")
def tokenizer() -> ChatTokenizer:
    spoken = [text for turns in CONVERSATIONS for text in turns if text]
    return train_tokenizer((TEXTS + spoken) * 4, 400)


@pytest.fixture(scope="session")
def random_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: ChatTokenizer) -> Path:
    """Random weights: answers that never end by themselves, as far as anyone can tell."""
    directory = tmp_path_factory.mktemp("models") / "random-tiny"
    model = make_model(tiny_config(tokenizer.vocab_size, eos_token_id=tokenizer.eos_id, initializer_range=0.2), seed=5)
    save_model(model, directory, torch.float32)
    tokenizer.save(directory)
    return directory


@pytest.fixture(scope="session")
def bare_dir(random_dir: Path) -> Path:
    """The same weights without a tokenizer."""
    directory = random_dir.parent / "bare-tiny"
    directory.mkdir()
    for file in random_dir.iterdir():
        if file.name == "config.json" or file.suffix == ".safetensors" or file.name.endswith(".index.json"):
            shutil.copy(file, directory)
    return directory


@pytest.fixture(scope="session")
def taught_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: ChatTokenizer) -> Path:
    """A tiny model that learned three conversations by heart, with reasoning, UTF-8 and one long answer."""
    directory = tmp_path_factory.mktemp("models") / "taught-tiny"
    torch.set_num_threads(1)
    config = tiny_config(tokenizer.vocab_size, eos_token_id=tokenizer.eos_id, num_hidden_layers=2, hidden_size=96)
    model = make_model(config, seed=1)
    teach(model, tokenizer)
    save_model(model, directory, torch.float32)
    tokenizer.save(directory)
    write_json(directory / "generation_config.json", {"eos_token_id": [tokenizer.eos_id], "do_sample": False})
    return directory


def teach(model: Transformer, tokenizer: ChatTokenizer) -> None:
    examples = []
    for question, reasoning, answer in CONVERSATIONS:
        messages = [Message("user", question), Message("assistant", answer, reasoning)]
        examples.append(tokenizer.encode_example(messages))
    teach_by_heart(model, examples, tokenizer.pad_id)


def teach_by_heart(model: Transformer, examples: Sequence[tuple[list[int], list[bool]]], pad_id: int) -> None:
    """Train until each example's answer (its ids that are marked) is what the model says for sure."""
    longest = max(len(ids) for ids, _ in examples)
    inputs = torch.full((len(examples), longest - 1), pad_id)
    labels = torch.full((len(examples), longest - 1), -100)
    for row, (ids, answered) in enumerate(examples):
        inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        labels[row, : len(ids) - 1] = torch.where(torch.tensor(answered[1:]), torch.tensor(ids[1:]), -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(600):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1.0, (step + 1) / 20) * min(1.0, (650 - step) / 400)
        parts = model.loss(inputs, labels, torch.float32)
        loss = parts.loss_sum / parts.num_tokens
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if loss.item() < 0.02 and _is_sure(model, inputs, labels):
            return
    raise AssertionError(f"the tiny model did not learn its conversations: loss {loss.item():.3f}")


@torch.no_grad()
def _is_sure(model: Transformer, inputs: torch.Tensor, labels: torch.Tensor) -> bool:
    """Whether every token of every answer has a probability above 0.9: then no rounding can turn a greedy choice."""
    probabilities = model(inputs).softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return bool((probabilities[labels != -100] > 0.9).all())


@dataclass
class RunningServer:
    """A server process; what it prints goes to a file, which never fills up as a pipe does that nobody reads."""

    url: str
    process: subprocess.Popen[bytes]
    log_path: Path

    @property
    def log(self) -> list[str]:
        """The lines that it printed so far."""
        return self.log_path.read_text(errors="replace").splitlines(keepends=True)

    def end(self, signal_number: int = signal.SIGTERM) -> int:
        self.process.send_signal(signal_number)
        return self.process.wait(timeout=30)


class Expression(str):
    """An option of `running_server` that is written into the program of the server as it is."""

    def __repr__(self) -> str:
        return str(self)


@contextmanager
def running_server(directory: Path, **options: object) -> Iterator[RunningServer]:
    """`serve()` in a process of its own, on a port the system chose."""
    arguments = ", ".join([f"{str(directory)!r}", *(f"{name}={value!r}" for name, value in options.items())])
    program = (
        "import pathlib, torch; torch.set_num_threads(1)\n"
        "from crosschip.serve import serve\n"
        "def run(directory, **options): serve(pathlib.Path(directory), port=0, device='cpu', **options)\n"
        f"run({arguments})\n"
    )
    with logged_process([sys.executable, "-c", program], r"chat: (http://\S+)") as server:
        yield server


@contextmanager
def logged_process(command: list[str], says_url: str) -> Iterator[RunningServer]:
    """A program whose output goes to a file, once it has printed its address (the group of the pattern)."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryDirectory(prefix="crosschip-server-") as place:
        log_path = Path(place) / "log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        server = RunningServer("", process, log_path)
        try:
            while (found := re.search(says_url, "".join(server.log))) is None and process.poll() is None:
                time.sleep(0.02)
            assert found is not None, f"the server did not start:\n{''.join(server.log)}"
            server.url = found[1]
            yield server
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


ServerFactory = Callable[..., AbstractContextManager[RunningServer]]


@pytest.fixture(scope="session")
def random_server(random_dir: Path) -> Iterator[RunningServer]:
    with running_server(random_dir, max_batch_size=8) as server:
        yield server


@pytest.fixture(scope="session")
def bare_server(bare_dir: Path) -> Iterator[RunningServer]:
    with running_server(bare_dir, max_batch_size=4) as server:
        yield server


@pytest.fixture(scope="session")
def taught_server(taught_dir: Path) -> Iterator[RunningServer]:
    with running_server(taught_dir, max_batch_size=4) as server:
        yield server
