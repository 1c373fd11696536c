"""TRL's GRPO trainer on the same model and problems; `benchmarks/rl.py` runs it in the environment `make engines` made.

Writes one JSON line a step (seconds since training began, saves not counted) and a model directory every so many steps.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("problems", type=Path, help="JSONL of question and answer")
    parser.add_argument("out", type=Path)
    for name in ("steps", "prompts", "samples", "max-new-tokens", "save-every", "threads", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("temperature", "learning-rate"):
        parser.add_argument(f"--{name}", type=float, required=True)
    return parser.parse_args()


def reward_of(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1 where reasoning was opened and closed once and the number behind it is the expected one."""

    def judged(completion: Any, expected: str) -> float:
        text = completion[-1]["content"] if isinstance(completion, list) else completion
        _, close, said = text.partition("</think>")
        numbers = re.findall(r"-?\d+", said)
        formed = text.startswith("<think>") and text.count("<think>") == text.count("</think>") == 1
        return float(bool(close) and formed and bool(numbers) and numbers[-1] == expected)

    return [judged(*pair) for pair in zip(completions, answer, strict=True)]


class Recorder(TrainerCallback):
    """Times the steps and saves the model now and then, outside of the time."""

    def __init__(self, out: Path, save_every: int) -> None:
        self.out, self.save_every = out, save_every
        self.log = (out / "steps.jsonl").open("w", encoding="utf-8")
        self.began = time.monotonic()
        self.saving_s = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Training begins."""
        self.began = time.monotonic()

    def on_step_end(self, _args: Any, state: Any, _control: Any, model: Any = None, **__: Any) -> None:
        """A step was taken."""
        now = time.monotonic()
        self.log.write(json.dumps({"step": state.global_step, "seconds": now - self.began - self.saving_s}) + "\n")
        self.log.flush()
        if state.global_step % self.save_every == 0:
            model.save_pretrained(self.out / f"step-{state.global_step:05d}")
            self.saving_s += time.monotonic() - now


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in options.problems.read_text(encoding="utf-8").splitlines()]
    data = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": row["question"]}], "answer": row["answer"]} for row in rows]
    )
    config = GRPOConfig(
        output_dir=str(options.out / "trainer"),
        use_cpu=True,
        bf16=False,
        seed=options.seed,
        max_steps=options.steps,
        per_device_train_batch_size=options.prompts * options.samples,
        gradient_accumulation_steps=1,
        num_generations=options.samples,
        max_completion_length=options.max_new_tokens,
        temperature=options.temperature,
        beta=0.0,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=2,
        adam_beta2=0.95,
        weight_decay=0.0,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        gradient_checkpointing=False,
        dataloader_num_workers=0,
    )
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
        reward_funcs=reward_of,
        args=config,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[Recorder(options.out, options.save_every)],
    )
    trainer.train()


if __name__ == "__main__":
    main()
