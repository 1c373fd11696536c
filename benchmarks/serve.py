"""Serving: ours beside transformers' `generate`, vLLM and llama.cpp, on a CPU, with the same weights in fp32.

    python benchmarks/serve.py                                  # all engines that `make engines` made, and ours
    python benchmarks/serve.py --engines native vllm --repeats 3

Two tables that are not mixed: over HTTP (ours, vLLM, llama.cpp) and offline in one process each (ours, transformers,
vLLM). In each of the rounds every engine runs once, in turn; the others are stopped (SIGSTOP) meanwhile, so that the
spinning threads of an idle engine cost nobody anything. Medians of the rounds, ratios within one run. Writes
docs/results/serve.json and docs/results/serve.md. The machine must be quiet.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peer import CONFIG
from serve_sides import HTTP, OFFLINE, Side, left_out, started_sides

from crosschip.chips import Chip, find_chip, fingerprint, product_rate
from crosschip.data import train_tokenizer
from crosschip.model import ModelConfig, Transformer, init_weights, save_model
from crosschip.rundir import write_json, write_text
from crosschip.train.flops import train_flops_per_token

OUT = Path(__file__).parent.parent / "docs" / "results" / "serve"
PROMPT, NEW = 32, 64
# llama.cpp knows DeepSeek-V3 with compressed queries alone. A wider start than 0.02, so that near-ties are rare and
# engines that round otherwise still say the same.
MODEL = replace(CONFIG, q_lora_rank=128, initializer_range=0.1, bos_token_id=0, eos_token_id=1)
MATRIX = 8192  # rows and columns of the fp32 matrix that memory is measured with: 256 MiB, beyond any cache

Measured = dict[str, float]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engines", nargs="*", choices=sorted({*HTTP, *OFFLINE}), default=sorted({*HTTP, *OFFLINE}))
    parser.add_argument("--modes", nargs="*", choices=("http", "offline"), default=["http", "offline"])
    parser.add_argument("--concurrency", nargs="*", type=int, default=[1, 16, 64])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args()


def save_serving_model(directory: Path) -> None:
    """Random weights in the published layout, with a tokenizer, which llama.cpp's file must hold."""
    letters = random.Random(1)
    words = ("".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=letters.randint(3, 8))) for _ in range(8000))
    tokenizer = train_tokenizer([" ".join(words)], MODEL.vocab_size)
    assert tokenizer.vocab_size == MODEL.vocab_size, "llama.cpp takes its vocabulary from the tokenizer"
    model = Transformer(MODEL)
    init_weights(model, seed=1)
    save_model(model, directory, torch.float32)
    tokenizer.save(directory)


def memory_rate(repeats: int = 9) -> float:
    """Bytes/s that a matrix is read with in a product with a vector, which is what decoding does; the best of some."""
    matrix, vector = torch.ones(MATRIX, MATRIX), torch.ones(MATRIX)
    best = float("inf")
    for _ in range(repeats):
        begun = time.perf_counter()
        torch.mv(matrix, vector)
        best = min(best, time.perf_counter() - begun)
    return matrix.numel() * matrix.element_size() / best


def decoding_limit(config: ModelConfig, batch: int, bytes_per_s: float, flop_per_s: float) -> dict[str, Any]:
    """Tokens/s that this machine could decode at most, and what bounds them: reading weights and cache, or products.

    The weights of an expert count as often as it is expected to be chosen at all. Prompts are not counted.
    """
    model = Transformer(config)
    num_experts = sum(p.numel() for name, p in model.named_parameters() if "experts" in name and "shared" not in name)
    num_all = sum(p.numel() for p in model.parameters())
    num_embedding = config.vocab_size * config.hidden_size
    missed = (1 - config.num_experts_per_tok / config.n_routed_experts) ** batch
    num_read = num_all - num_embedding - num_experts * missed
    length = PROMPT + NEW // 2
    num_read += batch * length * config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim)
    flops = train_flops_per_token(config, PROMPT + NEW) / 3  # a forward pass is a third of a training step
    reading_s, computing_s = 4 * num_read / bytes_per_s, batch * flops / flop_per_s
    bound = "memory" if reading_s > computing_s else "products"
    return {"tokens_per_s": batch / max(reading_s, computing_s), "bound": bound, "megabytes_per_step": 4e-6 * num_read}


def prompts_of(round_: int, count: int) -> list[list[int]]:
    """Other prompts in each round, the same for all sides: no cache of prefixes helps anyone."""
    generator = torch.Generator().manual_seed(1000 * round_ + count)
    ids = torch.randint(16, MODEL.vocab_size, (count, PROMPT), generator=generator)
    return [list(map(int, row)) for row in ids]


def measure(sides: Sequence[Side], concurrency: int, repeats: int) -> dict[str, Any]:
    """Every side once a round, after a round that does not count."""
    count = 2 * max(4, 2 * concurrency) if sides[0].mode == "http" else concurrency  # half of them streamed
    found: dict[str, list[Measured]] = {side.engine: [] for side in sides}
    answers: dict[str, list[Any]] = {}
    for round_ in range(repeats + 1):
        prompts = prompts_of(round_, count)
        for side in sides:
            with side.running_alone():
                measured, said = side.run(prompts, NEW, concurrency)
            if round_ > 0:
                found[side.engine].append(measured)
            answers[side.engine] = said
            print(f"{side.mode} {concurrency:3d} {side.engine:12s} round {round_}: {_told(measured)}", flush=True)
    rows = {engine: _row(measured) for engine, measured in found.items()}
    own = answers.get("native")
    for engine, row in rows.items():
        if own is not None:
            row["same_answers_as_ours"] = sum(map(lambda a, b: a == b, own, answers[engine])) / len(own)
    return rows


def _row(measured: Sequence[Measured]) -> dict[str, Any]:
    """Medians, and the throughput of each round, which shows the spread."""
    row: dict[str, Any] = {name: statistics.median(each[name] for each in measured) for name in measured[0]}
    return row | {"rounds_tokens_per_s": [round(each["tokens_per_s"], 1) for each in measured]}


def _told(measured: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in measured.items())


def run_mode(mode: str, model: Path, options: argparse.Namespace, limit: Callable[[int], dict[str, Any]]) -> Any:
    """One table."""
    wanted = [engine for engine in (HTTP if mode == "http" else OFFLINE) if engine in options.engines]
    missing = left_out(wanted)
    with started_sides(mode, [each for each in wanted if each not in missing], model, options.threads) as (up, failed):
        rows = []
        for concurrency in options.concurrency if up else []:
            bound = limit(concurrency)
            engines = measure(up, concurrency, options.repeats)
            for row in engines.values():
                row["share_of_limit"] = row["tokens_per_s"] / bound["tokens_per_s"]
                if "native" in engines:
                    row["ours_is_times"] = engines["native"]["tokens_per_s"] / row["tokens_per_s"]
            rows.append({"concurrency": concurrency, "limit": bound, "engines": engines})
        described = {side.engine: side.description for side in up}
    return {"rows": rows, "left_out": missing | failed, "sides": described}


def table(document: dict[str, Any]) -> str:
    """The document as Markdown."""
    machine = document["fingerprint"]
    lines = [
        "# Serving",
        "",
        f"{document['num_parameters'] / 1e6:.1f} M parameters in fp32, {PROMPT}-token prompts, {NEW} new tokens, "
        f"greedy, on {machine['host']['cpu']} ({document['threads']} threads). Medians of {document['repeats']} rounds "
        "in which the engines take turns. *Ours*: our throughput over the engine's. *Limit*: what memory or products "
        f"would allow when decoding alone; memory was read with {document['memory_gb_per_s']:.1f} GB/s from a matrix "
        "beyond the cache, so a model that fits into the cache can pass it.",
        "",
    ]
    for mode, title in (("http", "Over HTTP"), ("offline", "Offline, in one process")):
        if mode in document:
            lines += [f"## {title}", "", *_lines(document[mode]), ""]
    return "\n".join([*lines, f"`{document['command']}`", ""])


def _lines(part: dict[str, Any]) -> list[str]:
    head = "| at once | engine | tokens/s | ours | first token, ms | per token, ms | of the limit | same answers |"
    lines = [head, "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for row in part["rows"]:
        for engine, found in row["engines"].items():
            cells = [
                str(row["concurrency"]),
                engine,
                f"{found['tokens_per_s']:.0f}",
                f"{found['ours_is_times']:.2f}" if "ours_is_times" in found else "-",
                *(f"{1000 * found[name]:.1f}" if name in found else "-" for name in ("first_token_s", "per_token_s")),
                f"{100 * found['share_of_limit']:.0f} % ({row['limit']['bound']})",
                f"{100 * found['same_answers_as_ours']:.0f} %" if "same_answers_as_ours" in found else "-",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines + [f"\nLeft out: {engine}: {why}." for engine, why in part["left_out"].items()]


def main() -> None:
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no stopped engine is left behind
    torch.set_num_threads(options.threads)
    chip: Chip = find_chip("cpu")
    bytes_per_s, flop_per_s = memory_rate(), product_rate(chip, torch.float32)
    document: dict[str, Any] = {
        "benchmark": "serve",
        "command": " ".join(["python", "benchmarks/serve.py", *sys.argv[1:]]),
        "prompt": PROMPT,
        "new_tokens": NEW,
        "dtype": "float32",
        "threads": options.threads,
        "repeats": options.repeats,
        "num_parameters": sum(p.numel() for p in Transformer(MODEL).parameters()),
        "memory_gb_per_s": bytes_per_s / 1e9,
        "product_gflop_per_s": flop_per_s / 1e9,
        "fingerprint": fingerprint(chip),
    }
    with tempfile.TemporaryDirectory(prefix="crosschip-serve-") as place:
        model = Path(place) / "model"
        save_serving_model(model)
        for mode in options.modes:
            document[mode] = run_mode(
                mode, model, options, lambda batch: decoding_limit(MODEL, batch, bytes_per_s, flop_per_s)
            )
            write_json(options.out.with_suffix(".json"), document)
            write_text(options.out.with_suffix(".md"), table(document))
    print(table(document))


if __name__ == "__main__":
    main()
