"""The texts of the reproducers. They run where there is no crosschip: nothing of it is imported in them."""

from __future__ import annotations

__all__ = ["FIELD", "FILES", "REPLAY", "ROUNDED", "SURPLUS", "TENSOR"]

TENSOR = '''\
"""One tensor of a handed-off model is not the recorded one: python THIS_FILE [MODEL_DIR] (torch and safetensors)."""

import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open

SEEN = @WORDS@
RECORDED = json.loads(@ABOUT@)


def read(directory):
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            if RECORDED["name"] in opened.keys():
                return file, opened.get_tensor(RECORDED["name"])
    return None, None


def weighed(norms):
    places = torch.arange(1, len(norms) + 1, dtype=torch.float64)
    return float((norms * (1.5 + torch.sin(places * places))).sum())


def sha256(tensor):
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def main():
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    print(f"seen: {SEEN}")
    file, tensor = read(directory)
    if tensor is None:
        print(f"{RECORDED['name']}: expected in {directory}, got no such tensor")
        return 1
    if RECORDED["dtype"] == "float16" and torch.equal(tensor.half().to(tensor.dtype), tensor):
        tensor = tensor.half()
    matrix = tensor.double().reshape(tensor.shape[0], -1) if tensor.dim() > 1 else tensor.double().reshape(-1, 1)
    found = {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "sha256": sha256(tensor),
        "sha256_bf16": sha256(tensor.to(torch.bfloat16)) if tensor.dtype.is_floating_point else "",
        "sum_squares": float(matrix.square().sum()),
        "rows": weighed(matrix.norm(dim=1)),
        "columns": weighed(matrix.norm(dim=0)),
        "sorted_rows": weighed(matrix.norm(dim=1).sort().values),
        "sorted_columns": weighed(matrix.norm(dim=0).sort().values),
    }
    print(f"{RECORDED['name']} in {file}")
    for key, got in found.items():
        print(f"  {key}: expected {RECORDED[key]}, got {got}")
    dtypes = {found["dtype"], RECORDED["dtype"]}
    key = "sha256_bf16" if len(dtypes) == 2 and "bfloat16" in dtypes else "sha256"
    same = found["shape"] == list(RECORDED["shape"]) and found[key] == RECORDED[key]
    print("the same tensor" if same else "another tensor")
    return 0 if same else 1


sys.exit(main())
'''

FIELD = '''\
"""A field of config.json that changes numbers is not the recorded one: python THIS_FILE [MODEL_DIR], Python alone."""

import json
import sys
from pathlib import Path

SEEN = @WORDS@
ABOUT = json.loads(@ABOUT@)


def main():
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    print(f"seen: {SEEN}")
    found = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    field, expected = ABOUT["field"], ABOUT["expected"]
    if field not in found and ABOUT["may_be_silent"]:
        print(f"{field}: not in the file, which means {expected[0]!r}")
        return 0
    where = "" if field in found else " (not in the file)"
    print(f"{field}: expected {expected[0]!r}, got {found.get(field)!r}{where}")
    return 0 if field in found and found[field] in expected else 1


sys.exit(main())
'''

FILES = '''\
"""Files of a handed-off model are not those that were written: python THIS_FILE [MODEL_DIR], Python alone."""

import hashlib
import json
import sys
from pathlib import Path

SEEN = @WORDS@
EXPECTED = json.loads(@ABOUT@)  # name: SHA-256, or null for a file that was not there


def sha256(path):
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main():
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    print(f"seen: {SEEN}")
    wrong = 0
    for name, expected in EXPECTED.items():
        got = sha256(directory / name)
        print(f"{name}: expected {expected or 'no such file'}, got {got or 'no such file'}")
        wrong += got != expected
    print(f"{wrong} files differ" if wrong else "all are the files that were written")
    return 1 if wrong else 0


sys.exit(main())
'''

SURPLUS = '''\
"""A handed-off model holds a tensor that was not recorded: python THIS_FILE [MODEL_DIR] (safetensors)."""

import json
import sys
from pathlib import Path

from safetensors import safe_open

SEEN = @WORDS@
NAME = json.loads(@ABOUT@)


def main():
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    print(f"seen: {SEEN}")
    holding = []
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="np") as opened:
            if NAME in opened.keys():
                holding.append(file.name)
    print(f"{NAME}: expected in no file, got it in {', '.join(holding) or 'none'}")
    return 1 if holding else 0


sys.exit(main())
'''

ROUNDED = '''\
"""A tensor of a model in 8 bits is off by more than rounding: python THIS_FILE [MODEL_DIR] (torch and safetensors)."""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open

SEEN = @WORDS@
ABOUT = json.loads(@ABOUT@)


def read(directory):
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for end in ("", "_scale", "_scale_inv"):
                if ABOUT["name"] + end in opened.keys():
                    found[end] = opened.get_tensor(ABOUT["name"] + end)
    return found


def multiplied_out(directory, found):
    codes = found[""].float()
    if "_scale" in found:
        return codes * found["_scale"].float().reshape(-1, 1)
    if "_scale_inv" not in found:
        return codes
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    rows, columns = config.get("quantization_config", {}).get("weight_block_size") or (128, 128)
    scales = found["_scale_inv"].float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return codes * scales[: codes.shape[0], : codes.shape[1]]


def main():
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    print(f"seen: {SEEN}")
    found = read(directory)
    if "" not in found:
        print(f"{ABOUT['name']}: expected in {directory}, got no such tensor")
        return 1
    if list(found[""].shape) != ABOUT["shape"]:
        print(f"{ABOUT['name']}: expected shape {ABOUT['shape']}, got {list(found[''].shape)}")
        return 1
    tensor = multiplied_out(directory, found)
    norm = float(tensor.double().norm())
    wrong = not abs(norm - ABOUT["norm"]) <= ABOUT["most"] * ABOUT["norm"]
    print(f"norm: expected {ABOUT['norm']:.7g} within {ABOUT['most']:.2%}, got {norm:.7g}")
    for place, expected, bound in ABOUT["numbers"]:
        got = float(tensor[tuple(place)])
        print(f"{place}: expected {expected:.7g} within {bound:.2g}, got {got:.7g}")
        wrong = wrong or not abs(got - expected) <= bound
    print("off by more than rounding" if wrong else "within rounding of the recorded tensor")
    return 1 if wrong else 0


sys.exit(main())
'''

REPLAY = '''\
"""A handed-off model answers otherwise than it was recorded: one row of token ids, its log-probs expected and got.

Needs torch and transformers: python THIS_FILE [--model MODEL_DIR] [--url http://HOST:PORT] [--dtype float32]
Without --url the files are run in transformers on the CPU: if they agree, the engine is to blame, not the files.
With --url the engine there is asked (OpenAI's /v1/completions with echo and logprobs).
"""

import argparse
import json
import math
import sys
import urllib.request
from pathlib import Path

SEEN = @WORDS@
ABOUT = json.loads(@ABOUT@)


def from_files(directory, dtype):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([ABOUT["ids"]])).logits[0].double().log_softmax(-1)
    return [{token: float(logits[place, token]) for token, _ in top} for place, top in enumerate(ABOUT["expected"])]


def from_engine(url):
    with urllib.request.urlopen(f"{url}/v1/models") as answer:
        model = json.load(answer)["data"][0]["id"]
    body = {"model": model, "prompt": ABOUT["ids"], "max_tokens": 1, "temperature": 0, "echo": True}
    body |= {"logprobs": len(ABOUT["expected"][0]), "return_tokens_as_token_ids": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        tops = json.load(answer)["choices"][0]["logprobs"]["top_logprobs"][1:]
    return [{int(name.removeprefix("token_id:")): value for name, value in top.items()} for top in tops]


def kl(expected, got):
    """KL over the tokens that both list, and one bucket for all others."""
    both = [(p, got[token]) for token, p in expected if token in got and got[token] is not None]
    rest = [max(1 - sum(math.exp(pair[side]) for pair in both), 2.0**-24) for side in (0, 1)]
    return sum(math.exp(p) * (p - q) for p, q in both) + rest[0] * math.log(rest[0] / rest[1])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=str(Path(__file__).resolve().parent.parent))
    parser.add_argument("--url")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    print(f"seen: {SEEN} (recorded on {ABOUT['recorded_on']})")
    try:
        got = from_engine(options.url.rstrip("/")) if options.url else from_files(options.model, options.dtype)
    except Exception as error:  # of a library or an engine: nothing is shown then, for or against the files
        print(f"not shown: {type(error).__name__}: {error}\\nfiles that transformers does not read: give --url")
        return 2
    values = []
    for place, expected in enumerate(ABOUT["expected"]):
        values.append(kl(expected, got[place]))
        token, value = expected[0]
        print(f"position {place}: token {token} expected {value:.5f}, got {got[place].get(token)}, KL {values[-1]:.2e}")
    mean = sum(values) / len(values)
    print(f"mean KL of this row {mean:.2e} nats, limit {ABOUT['limit']:.2e}")
    return 0 if mean <= ABOUT["limit"] else 1


sys.exit(main())
'''
