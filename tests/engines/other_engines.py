"""One model served by any of the engines that `make engines` made, for the tests that are marked `engines`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from crosschip.engines import RunningEngine, engine_command, engine_python, running_engine
from crosschip.handoff.source import open_source
from crosschip.handoff.targets.gguf import GGUF

START_S = 400.0
# Head sizes that vLLM's attention on CPUs takes; llama.cpp wants a q_lora_rank and groups of 32 for its formats.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "n_routed_experts": 8,
    "kv_lora_rank": 64,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}


def skip_without(*kinds: str) -> None:
    """Skip the test where one of these engines has no environment here."""
    for kind in kinds:
        if kind != "native" and engine_python(kind) is None:
            pytest.skip(f"`make engines` has not made {kind}")


@contextmanager
def started_engine(kind: str, directory: Path, place: Path, length: int) -> Iterator[RunningEngine]:
    """The engine over `directory`, in the form that it reads, in fp32; its files and log lie in `place`."""
    command = engine_command(kind, max_length=length, dtype="float32", chip="cpu")
    files = _files_for(kind, directory, place)
    with running_engine(command, files, place / f"{kind}.log", START_S, {"OMP_NUM_THREADS": "1"}) as running:
        assert running.is_up, running.read_log()[-3000:]
        yield running


def _files_for(kind: str, directory: Path, place: Path) -> Path:
    if kind != "llamacpp":
        return directory
    files = place / "gguf"
    files.mkdir()
    GGUF.export(open_source(directory), files, "float32", lambda line: None)
    return files
