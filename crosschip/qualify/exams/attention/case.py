"""One question to a chip's attention, whose right answer is known without statistics. Imports torch only.

Masked keys are made to win: each query points at a key that it may not see, and a value that no query may see is huge.
So a mask that is ignored, shifted or read with a wrong shape moves the answer far, whatever the chip's rounding. Each
query also points at one key that it sees, so that the answer is that key's value and not a small average. What
rounding itself may do is bounded from the inputs. The source of this module goes into reproducers.

B batch, H heads, T queries, S keys, X head size of queries and keys, V head size of values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

__all__ = [
    "AttentionCase",
    "AttentionInputs",
    "Comparison",
    "attend",
    "attend_on",
    "attention_inputs",
    "attention_is_wrong",
    "compare",
    "golden",
    "kept_keys",
    "raw_inputs",
    "unit_of",
]

POISON = 1e4  # the value at keys that nobody may see; fits fp16


@dataclass(frozen=True)
class AttentionCase:
    """What is asked. `way` is `fused` (scaled_dot_product_attention) or `plain` (product, mask, softmax, product).

    `mask_shape` names the mask's dimensions, such as `B1TS`, 1 where it is broadcast, `none` without a mask. `pattern`
    says which keys are hidden; `causal` is torch's flag, which aligns query 0 with key 0 whatever the lengths.
    `values` is what the tensors hold: see
    `attention_inputs`.
    """

    way: str
    dtype: str
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    queries: int = 16
    keys: int = 16
    head_size: int = 16
    value_size: int = 16
    mask_shape: str = "none"
    mask_kind: str = "none"  # boolean, -inf, large negative
    pattern: str = "random"  # random, padding, causal, sliding, some rows empty
    causal: bool = False
    scale: float | None = None
    layout: str = "contiguous"  # contiguous, transposed, sliced, expanded
    values: str = "aimed"  # aimed, aimed past, equal keys, one hot, constant values, large, normal
    seed: int = 0


@dataclass(frozen=True)
class AttentionInputs:
    """Tensors on the CPU: query [B, H, T, X], key [B, H', S, X], value [B, H', S, V], mask or None."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True)
class Comparison:
    """How far an answer is off: the largest error over what rounding may do, right up to 1, and how many are wrong.

    `is_nobodys` says that only finite results of queries that may see no key are wrong.
    """

    ratio: float
    places: int
    expected: str
    got: str
    is_nobodys: bool = False


def unit_of(dtype: torch.dtype) -> float:
    """The unit roundoff, no finer than that of products with 10 mantissa bits, whose precision is judged elsewhere."""
    return max(torch.finfo(dtype).eps / 2, 2.0**-11)


def _mask_size(case: AttentionCase) -> list[int]:
    sizes = {"B": case.batch, "H": case.heads, "T": case.queries, "S": case.keys, "1": 1}
    return [sizes[letter] for letter in case.mask_shape]


def _kept_by_mask(case: AttentionCase, generator: torch.Generator) -> torch.Tensor:
    """True where a key may be seen, in the mask's own shape. Every row sees a key; the last key is mostly hidden."""
    size = _mask_size(case)
    rows, keys = torch.arange(size[-2] if len(size) > 1 else 1)[:, None], torch.arange(case.keys)
    if case.pattern == "causal":
        kept = (keys <= rows).expand(size).clone()
    elif case.pattern == "sliding":
        kept = ((keys <= rows + case.keys // 2) & (keys > rows + case.keys // 2 - max(1, case.keys // 4))).expand(size)
        kept = kept.clone()
    elif case.pattern == "padding":
        lengths = torch.randint(1, max(2, case.keys), [*size[:-2], 1, 1] if len(size) > 1 else [1], generator=generator)
        kept = (keys < lengths).expand(size).clone()
    else:
        kept = torch.rand(size, generator=generator) < 0.7
        kept[..., -1] = False
    empty = ~kept.any(-1)
    kept[..., 0] |= empty
    if case.pattern == "some rows empty":
        kept[..., 3::4, :] = False
    return kept


def kept_keys(case: AttentionCase, mask: torch.Tensor | None) -> torch.Tensor:
    """True where a query may see a key, [B, H, T, S]."""
    kept = torch.ones(case.queries, case.keys, dtype=torch.bool)
    if case.causal:
        kept = kept.tril()
    if mask is not None:
        kept = kept & (mask if mask.dtype == torch.bool else mask > -1000)
    return kept.expand(case.batch, case.heads, case.queries, case.keys)


def raw_inputs(case: AttentionCase) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Query, key and value in fp32 before poisoning, and the mask in its dtype."""
    generator = torch.Generator().manual_seed(case.seed)
    shared = 1 if case.layout == "expanded" else case.kv_heads
    query = torch.randn(case.batch, case.heads, case.queries, case.head_size, generator=generator)
    key = torch.randn(case.batch, shared, case.keys, case.head_size, generator=generator)
    value = torch.randn(case.batch, shared, case.keys, case.value_size, generator=generator)
    key, value = (x.expand(-1, case.kv_heads, -1, -1).contiguous() for x in (key, value))
    if case.scale is not None:  # logits of the usual size, whatever the scale
        query = query / (abs(case.scale) * math.sqrt(case.head_size))
    if case.mask_shape == "none":
        return query, key, value, None
    kept = _kept_by_mask(case, generator)
    if case.mask_kind == "boolean":
        return query, key, value, kept
    dtype = getattr(torch, case.dtype)
    hidden = -math.inf if case.mask_kind == "-inf" else torch.finfo(dtype).min
    return query, key, value, torch.zeros(kept.shape, dtype=dtype).masked_fill(~kept, hidden)


def attention_inputs(case: AttentionCase) -> AttentionInputs:
    """The tensors of a case, made from its seed.

    `values`: queries `aimed` at a visible and a hidden key, `aimed past` the visible ones (for gradients), `equal keys`
    (a plain average), `one hot` (a plain copy), `constant values` (weights add up to one), `large` scores, `normal`.
    """
    query, key, value, mask = raw_inputs(case)
    kept = kept_keys(case, mask)
    if case.values in ("aimed", "aimed past"):
        query = query + _aim(case, key, kept)
    elif case.values == "large":
        query = query * 30
    elif case.values == "equal keys":
        key = key[:, :, :1].expand_as(key)
    elif case.values == "constant values":
        value = value[:, :, :1].expand_as(value)
    elif case.values == "one hot":
        query, key = _one_hot(case, query, key, kept)
    group = case.heads // case.kv_heads
    seen = kept.unflatten(1, (case.kv_heads, group)).any(2).any(2)  # [B, H', S]
    if case.layout == "expanded":
        seen = seen.any(1, keepdim=True)
    if case.values != "constant values":
        value = torch.where(seen[..., None], value, POISON * value.sign())
    dtype = getattr(torch, case.dtype)
    return AttentionInputs(query.to(dtype), key.to(dtype), value.to(dtype), mask)


def _aim(case: AttentionCase, key: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """What to add to each query so that one key that it sees wins, and a hidden one would win if it were seen.

    The hidden one is the last, one beside a visible key, or any. Gradients want no winner among the visible keys.
    """
    generator = torch.Generator().manual_seed(case.seed + 1)
    beside = F.pad(kept, (1, 0))[..., :-1] | F.pad(kept, (0, 1))[..., 1:]
    chance = torch.rand(kept.shape, generator=generator)
    last = torch.arange(case.keys).expand(kept.shape) + 1.0
    turn = torch.arange(case.queries)[:, None] % 3
    wish = torch.where(turn == 0, last, torch.where((turn == 1) & beside, chance + 1, chance))
    aim = _toward(case, key, ~kept, wish)
    if case.values == "aimed":
        aim = aim + _toward(case, key, kept, torch.where(turn == 1, last, chance))
    return aim


def _toward(case: AttentionCase, key: torch.Tensor, among: torch.Tensor, wish: torch.Tensor) -> torch.Tensor:
    """For each query the strongest wish among some keys, as a direction; nothing where there are none."""
    target = torch.where(among, wish, torch.tensor(-1.0)).argmax(-1, keepdim=True)  # [B, H, T, 1]
    per_head = key.repeat_interleave(case.heads // case.kv_heads, dim=1)
    aimed = per_head.gather(2, target.expand(-1, -1, -1, case.head_size))
    strength = max(2.0, 8 / math.sqrt(case.head_size))
    if case.scale is not None:
        strength /= abs(case.scale) * math.sqrt(case.head_size)
    return aimed * strength * among.any(-1, keepdim=True)


def _one_hot(
    case: AttentionCase, query: torch.Tensor, key: torch.Tensor, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every query sees one key that stands 128 or more above the others; keys that nobody may see stand higher."""
    scale = case.scale if case.scale is not None else 1 / math.sqrt(case.head_size)
    strength = 2.0 ** math.ceil(math.log2(256 / (16 * case.head_size * abs(scale))))
    query = torch.full_like(query, math.copysign(strength, scale))
    always = kept.unflatten(1, (case.kv_heads, -1)).all(2).all(2)  # [B, H', S]: seen by every query
    target = (always * torch.arange(case.keys).add(1).roll(case.seed % case.keys)).argmax(-1)
    seen = kept.unflatten(1, (case.kv_heads, -1)).any(2).any(2)
    level = torch.where(seen, -16.0, 32.0).scatter(2, target[..., None], 16.0)
    return query, level[..., None].expand_as(key)


def golden(case: AttentionCase, inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The right answer in fp64 and, for each of its numbers, twice what honest rounding may do to it.

    Rounding of scaled queries, scores, weights and the answer to the dtype, and accumulation in fp32 in any order. The
    factor two is for chips that round twice as coarsely. Scores that are off by at most d change each weight by a
    factor of at most exp(2 d), and the answer by at most (exp(2 d) - 1) times the weighted spread of the values. Where
    the answer is a copy or a constant, no error of the scores counts.
    """
    group = case.heads // case.kv_heads
    query = inputs.query.double()
    key, value = (x.double().repeat_interleave(group, dim=1) for x in (inputs.key, inputs.value))
    scale = case.scale if case.scale is not None else 1 / math.sqrt(case.head_size)
    kept = kept_keys(case, inputs.mask)
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~kept, -math.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    answer = weights @ value
    unit, fine = unit_of(inputs.query.dtype), 2.0**-24
    if case.values == "large":  # rounding of such scores may choose another key: only the hull of the values is known
        return answer, _hull_slack(value, kept, answer, unit)
    slack = (3 * unit + case.keys * fine) * (weights @ value.abs()) + unit * answer.abs()
    if case.values not in ("one hot", "constant values"):
        sizes = (query.abs() @ key.abs().transpose(-1, -2) * abs(scale)).masked_fill(~kept, 0.0)
        off = sizes * (2 * unit + case.head_size * fine) + scores.masked_fill(~kept, 0.0).abs() * unit
        spread = (weights @ value.square() - answer.square()).clamp(min=0.0).sqrt()
        slack = slack + torch.expm1(2 * off.amax(-1, keepdim=True)) * spread
    return answer, 2 * slack + 1e-30


def _hull_slack(value: torch.Tensor, kept: torch.Tensor, answer: torch.Tensor, unit: float) -> torch.Tensor:
    """How far an answer may be off and still lie between the smallest and the largest value that a query sees."""
    seen = kept.any(2)[..., None]
    low = value.masked_fill(~seen, math.inf).amin(2, keepdim=True)
    high = value.masked_fill(~seen, -math.inf).amax(2, keepdim=True)
    room = torch.maximum(answer - low, high - answer)
    return room + 8 * unit * torch.maximum(low.abs(), high.abs())


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers with other strides; made on the tensor's own device."""
    if layout == "transposed":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":
        return torch.cat((tensor, tensor), dim=-1)[..., : tensor.shape[-1]]
    if layout == "expanded":
        return tensor[:, :1].expand(-1, tensor.shape[1], -1, -1)
    return tensor


def attend(
    way: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """Attention as a fused operator or as a chain of plain ones, [B, H, T, V]."""
    grouped = query.shape[1] != key.shape[1]
    if way == "fused":
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    if grouped:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = torch.matmul(query * (scale if scale is not None else query.shape[-1] ** -0.5), key.transpose(-1, -2))
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask
    return torch.matmul(scores.softmax(-1).to(value.dtype), value)


def attend_on(device: str | torch.device, case: AttentionCase, inputs: AttentionInputs) -> torch.Tensor:
    """The device's answer to a case, on the CPU, [B, H, T, V]."""
    query, key, value = (x.to(device) for x in (inputs.query, inputs.key, inputs.value))
    query = laid_out(query, "contiguous" if case.layout == "expanded" else case.layout)
    key, value = laid_out(key, case.layout), laid_out(value, case.layout)
    mask = None if inputs.mask is None else inputs.mask.to(device)
    with torch.no_grad():
        return attend(case.way, query, key, value, mask, case.causal, case.scale).cpu()


def compare(case: AttentionCase, inputs: AttentionInputs, answer: torch.Tensor) -> Comparison:
    """Hold an answer against fp64. A row that sees nothing may be 0 or NaN."""
    shape = (case.batch, case.heads, case.queries, case.value_size)
    if tuple(answer.shape) != shape or answer.dtype != inputs.query.dtype:
        got = f"{answer.dtype} {list(answer.shape)}"
        return Comparison(math.inf, answer.numel(), f"{inputs.query.dtype} {list(shape)}", got)
    right, slack = golden(case, inputs)
    off = (answer.double() - right).abs() / slack
    off = torch.where(answer.isfinite(), off, torch.tensor(math.inf, dtype=off.dtype))
    empty = ~kept_keys(case, inputs.mask).any(-1, keepdim=True)
    off = torch.where(empty & ((answer == 0) | answer.isnan()), torch.tensor(0.0, dtype=off.dtype), off)
    if not off.numel():
        return Comparison(0.0, 0, "", "")
    worst = int(off.argmax())
    b, h, t, d = (int(i) for i in torch.unravel_index(torch.tensor(worst), shape))
    place = f"batch {b}, head {h}, query {t}, dimension {d}"
    expected = f"{float(right[b, h, t, d]):.6g} within {float(slack[b, h, t, d]):.3g} at {place}"
    is_nobodys = bool(answer.isfinite().all()) and not bool((~empty & (off > 1)).any())
    got = f"{float(answer[b, h, t, d]):.6g}"
    return Comparison(float(off.flatten()[worst]), int((off > 1).sum()), expected, got, is_nobodys)


def attention_is_wrong(device: str, **parameters: object) -> tuple[bool, str, str]:
    """Ask a device one case; whether it is wrong, what was expected, what it gave."""
    case = AttentionCase(**parameters)  # type: ignore[arg-type]
    inputs = attention_inputs(case)
    found = compare(case, inputs, attend_on(device, case, inputs))
    return found.ratio > 1, found.expected, f"{found.got} ({found.places} numbers are wrong)"
