"""An engine in this process, asked over standard input: `python serve_offline.py ENGINE MODEL SLOTS`.

Runs in the environment of each engine that `serve.py` compares offline. A line in is `{"prompts": [[ids]], "new": n}`,
a line out `{"seconds": s, "answers": [[ids]]}`; the first line out says `ready`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Answerer = Callable[[list[list[int]], int], list[list[int]]]


def native(model: str, slots: int) -> Answerer:
    """Ours."""
    from pathlib import Path

    import torch

    from crosschip.serve import load_engine
    from crosschip.serve.engine.request import SamplingParams

    engine = load_engine(Path(model), max_batch_size=slots, device="cpu", dtype=torch.float32)

    def answer(prompts: list[list[int]], new: int) -> list[list[int]]:
        handles = [engine.submit(prompt, SamplingParams(max_tokens=new, temperature=0.0)) for prompt in prompts]
        return [[event.token_id for event in handle if event.token_id is not None] for handle in handles]

    return answer


def transformers(model: str, slots: int) -> Answerer:
    """One `generate` for all prompts, which are of one length."""
    import torch
    from transformers import AutoModelForCausalLM

    theirs: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False).eval()

    @torch.inference_mode()
    def answer(prompts: list[list[int]], new: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        mask = torch.ones_like(ids)
        # Without this an end token would end a row early; it is never chosen, by all sides alike.
        out = theirs.generate(
            ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        return [list(map(int, row)) for row in out[:, ids.shape[1] :]]

    return answer


def vllm(model: str, slots: int) -> Answerer:
    """vLLM's own batching."""
    from vllm import LLM, SamplingParams

    engine = LLM(model=model, dtype="float32", max_model_len=128, max_num_seqs=slots, disable_log_stats=True)

    def answer(prompts: list[list[int]], new: int) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(each.outputs[0].token_ids) for each in engine.generate(asked, params, use_tqdm=False)]

    return answer


def main() -> None:
    """Answer until the input ends."""
    # Engines print to standard output; only this program's own lines may come out there.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engine, model, slots = sys.argv[1:4]
    answer = {"native": native, "transformers": transformers, "vllm": vllm}[engine](model, int(slots))
    out.write("ready\n")
    for line in sys.stdin:
        asked = json.loads(line)
        begun = time.perf_counter()
        answers = answer(asked["prompts"], asked["new"])
        seconds = time.perf_counter() - begun
        out.write(json.dumps({"seconds": seconds, "answers": answers}) + "\n")


if __name__ == "__main__":
    main()
