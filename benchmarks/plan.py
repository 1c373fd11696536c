"""The planner against this machine: predicted and measured step time and memory of the default recipe.

python benchmarks/plan.py --json docs/results/plan.json

The planner is given what this machine reaches at the same moment (products, streams, the cost of one more operator),
as a report of `qualify` would; the training is a real one through the command line.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peer import arguments
from torch.distributed.fsdp import fully_shard

from crosschip.chips import choose_compute_dtype, find_chip, fingerprint, keep_freed_memory
from crosschip.plan.hardware import EAGER_CALLS, Hardware
from crosschip.plan.host import host_cluster
from crosschip.plan.planning import plan_run
from crosschip.recipe import load_recipe

RECIPE = Path(__file__).parent.parent / "recipes" / "first.toml"
STEPS = 40
# Rows, columns and depth of the recipe's commonest product, not of a cube: small products are slow on a CPU.
PRODUCT = (4096, 384, 128)
STATES = (4096, 128)
NUM_STATES = 64
COLLECTIVE_BYTES, SHORT_BYTES = 1 << 20, 1 << 12  # the first is about what a layer of the recipe has
ROW = 128


def shortest_s(work: Any, repeats: int = 20) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def passes_bytes_s(dtype: torch.dtype) -> float:
    """Bytes a second of the passes that a layer makes, weighed by what a traced step of the recipe moves in each.

    Each pass has states of its own that no cache holds any more, as in a step, whose activations are many.
    """
    wide = torch.randn(NUM_STATES, *STATES)
    narrow, rows, each = wide.to(dtype), torch.randint(STATES[0], STATES[:1]), NUM_STATES * STATES[0] * STATES[1]
    passes = [
        (0.60, lambda: [state * state for state in wide], 12),
        (0.20, lambda: [state.float() for state in narrow], narrow.element_size() + 4),
        (0.13, lambda: [state[rows] for state in narrow], 2 * narrow.element_size()),
        (0.07, lambda: [torch.nn.functional.silu(state) for state in narrow], 2 * narrow.element_size()),
    ]
    return 1.0 / sum(share * shortest_s(work, 5) / (num_bytes * each) for share, work, num_bytes in passes)


def _measure(rank: int, num_processes: int, dtype: torch.dtype, directory: str) -> None:
    """All processes measure the same at the same time: they share caches and memory, as in training."""
    dist.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=num_processes)
    keep_freed_memory()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_processes))
    m, n, k = PRODUCT
    left, right, grad = (torch.randn(shape).to(dtype) for shape in ((m, k), (k, n), (m, n)))
    small = torch.randn(16)
    # The three products of a layer's matrix: its output, and both gradients.
    products = (lambda: left @ right, lambda: grad @ right.T, lambda: left.T @ grad)
    measured: dict[str, Callable[[], float]] = {
        "product_flops": lambda: 3 * 2.0 * m * n * k / sum(map(shortest_s, products)),
        "passes_bytes_s": lambda: passes_bytes_s(dtype),
        "call_s": lambda: shortest_s(lambda: [small * small for _ in range(100)]) / 100,
    }
    if num_processes > 1:
        measured |= {"short_s": lambda: sharded_s(SHORT_BYTES), "long_s": lambda: sharded_s(COLLECTIVE_BYTES)}
    found = {}
    for name, work in measured.items():
        dist.barrier()
        found[name] = work()
    dist.barrier()  # neither leaves while the other has a collective to end
    if rank == 0:
        Path(directory, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def sharded_s(num_bytes: int) -> float:
    """Seconds of a collective of the trainer's sharding (FSDP2), its copies included: what a matrix of this size takes
    longer when it is sharded. Forward and backward there are two gathers and a sum."""
    row = torch.randn(1, ROW)
    plain, sharded = (torch.nn.Linear(ROW, num_bytes // (4 * ROW), bias=False) for _ in range(2))
    fully_shard(sharded)
    whole_s, parts_s = (shortest_s(lambda each=each: each(row).sum().backward(), 200) for each in (plain, sharded))
    return (parts_s - whole_s) / 3


def measured_hardware(hardware: Hardware, dtype: torch.dtype, num_processes: int) -> Hardware:
    """This machine as each of `num_processes` processes sees it beside the others: rates of torch and of gloo."""
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(_measure, (num_processes, dtype, directory), nprocs=num_processes)
        found = json.loads(Path(directory, "found.json").read_text())
    link, latency = hardware.link_bytes_s, hardware.link_latency_s
    if num_processes > 1:
        latency = found["short_s"]
        link = (COLLECTIVE_BYTES - SHORT_BYTES) / 2 / max(found["long_s"] - latency, 1e-9)
    return replace(
        hardware, bf16_flops=found["product_flops"], efficiency=1.0, memory_bytes_s=found["passes_bytes_s"],
        memory_share=1.0, launch_s=EAGER_CALLS * found["call_s"], tile=1, node_size=num_processes, link_bytes_s=link,
        link_latency_s=latency,
    )  # fmt: skip


def children_peak_bytes(command: list[str]) -> int:
    """The largest resident size of any process that the command starts, itself included."""
    code = (
        "import resource, subprocess, sys; ended = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024); sys.exit(ended.returncode)"
    )
    ended = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {ended.returncode}:\n{ended.stderr[-2000:]}")
    return int(ended.stdout.split()[-1])


def trained(num_processes: int, **more: int) -> tuple[float, int]:
    """Median seconds of a step without the first ones, and the peak memory of a process."""
    with tempfile.TemporaryDirectory() as directory:
        out, recipe = Path(directory) / "run", Path(directory) / "recipe.toml"
        recipe.write_text(RECIPE.read_text().split("\n[sft]")[0])  # what follows has other steps, and engines beside it
        settings = {
            "train.steps": STEPS, "train.warmup_steps": 2, "train.validate_every": 1000, "train.sample_every": 1000,
            "train.checkpoint_every": 1000, "train.verify_checkpoints": "off",
        } | {f"train.{key}": value for key, value in more.items()}  # fmt: skip
        command = [sys.executable, "-m", "crosschip", "train", str(recipe), "--out", str(out)]
        command += ["--nproc", str(num_processes)]
        command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        peak = children_peak_bytes(command)
        (path,) = out.glob("train/*/metrics.jsonl")
        seconds = [json.loads(line).get("seconds") for line in path.read_text().splitlines()]
        return statistics.median([each for each in seconds if each is not None][4:]), peak


def main() -> None:
    args = arguments(__doc__ or "")
    keep_freed_memory()
    chip = find_chip("cpu")
    dtype, _ = choose_compute_dtype(chip, "auto")
    recipe, result = load_recipe(RECIPE), []
    for num_processes in (1, 2):
        before = os.getloadavg()[0]
        # What a process holds before it trains: torch, data, tokenizer, the arenas' padding. A run of next to nothing.
        _, empty = trained(num_processes, batch_size=num_processes, seq_len=8)
        cluster = host_cluster(num_processes)
        hardware = measured_hardware(cluster.hardware, dtype, num_processes)
        cluster = replace(cluster, hardware=hardware, fixed_bytes=float(empty))
        fixed = {"data": num_processes, "tensor": 1, "pipeline": 1, "zero": 3 if num_processes > 1 else 0, "expert": 1}
        micro = (recipe.train.batch_size if recipe.train else 1) // num_processes
        best = plan_run(recipe, cluster, fixed={**fixed, "micro_batch": micro, "recompute": "none"}).best
        step_s, peak = trained(num_processes)
        result.append(
            {
                "processes": num_processes,
                "step_s": {"predicted": best.step_s, "measured": step_s, "error": best.step_s / step_s - 1},
                "memory_bytes": {
                    "predicted": best.memory_bytes, "measured": peak, "error": best.memory_bytes / peak - 1,
                },
                "parts_s": best.parts,
                "load_before": before,
            }
        )  # fmt: skip
        print(json.dumps(result[-1], indent=2), flush=True)
    document = {"benchmark": "plan", "dtype": str(dtype), "runs": result, "fingerprint": fingerprint(chip)}
    if args.json:
        args.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
