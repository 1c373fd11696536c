"""Record a golden bundle on the chip that trained the model, once, while that chip is at hand."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import crosschip
from crosschip.checkpoints import complete_checkpoints
from crosschip.chips import Chip, fingerprint
from crosschip.errors import GoldenError, ModelError
from crosschip.golden.bundle import write_bundle
from crosschip.golden.comparison import CurveDistance
from crosschip.golden.config_fields import special_tokens
from crosschip.golden.files import fields_of
from crosschip.golden.inputs import ModelShape, Row, ladder_rows, rows_of_ids, text_rows
from crosschip.golden.noise_floor import OtherRun, noise_floor
from crosschip.golden.observing import SKETCH_WIDTH, TOP_K, Arrays, Observing, observe, points_of
from crosschip.golden.plan import BATCH_PLACE, BATCH_SIZE, MAX_BYTES, RecordPlan
from crosschip.golden.reordering import reorder
from crosschip.golden.training_curve import Curve, train_curve
from crosschip.golden.transformers_record import CausalLMRecorder, shape_of_causal_lm
from crosschip.golden.views import curve_distance
from crosschip.golden.weights import records_of
from crosschip.model import ModelConfig, Transformer, load_multiplied_out, read_config
from crosschip.model.weights import is_training_checkpoint
from crosschip.recipe import parse_recipe
from crosschip.rundir import RunDirectory, read_json

__all__ = ["BATCH_PLACE", "BATCH_SIZE", "MAX_BYTES", "RecordPlan", "model_directory_of", "record", "route_of"]

_STAGES = ("rl", "sft", "pretrain")  # the last one first
_TEXT_SHARE = 0.25  # of the tokens
_LOGITS_BYTES = 2 << 30  # of one batch of rows, the most that is computed at once


def record(
    source: Path,
    chip: Chip,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    texts: Sequence[str] = (),
    token_rows: Sequence[Sequence[int]] = (),
    plan: RecordPlan | None = None,
    for_handoff: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Record the model in `source` (a model directory or a run directory) on `chip`; write the bundle `out`.

    Args:
        source: a run's newest checkpoint of its last stage is taken.
        chip: where it is recorded.
        out: the bundle's directory; an older bundle there is replaced.
        dtype: of the arithmetic; None takes the weights' own.
        texts: real text beside the made-up rows, read with the tokenizer of `source`.
        token_rows: real text that is token ids already, such as a run's validation data.
        plan: how much is recorded; None for the usual.
        for_handoff: that a handoff found none and records it, so that nobody takes this chip for the one that trained.
        tell: gets a line whenever something begins.

    Returns:
        The manifest.

    Raises:
        GoldenError: the source holds no complete model, the chip does not run it, a text's token is not in the model's
            vocabulary, or the bundle would be larger than `plan.max_bytes`.
    """
    plan = plan or RecordPlan()
    directory, tokenizer = model_directory_of(source)
    route = route_of(directory)
    shape = shape_of_causal_lm(directory) if route == "transformers" else _shape_of(read_config(directory)[0])
    tell("hashing the weights")
    weights = {name: each.document() for name, each in records_of(directory).items()}
    rows, left_out = _rows(shape, tokenizer, texts, token_rows, plan)
    ids = [row.ids for row in rows]
    with _refusals_told(directory, chip):
        recorder = (CausalLMRecorder if route == "transformers" else _Recorder)(directory, chip, dtype, ids, plan, tell)
        arrays = recorder.reference()
        floor = recorder.noise_floor(arrays)
    arrays |= {
        "input_ids": np.concatenate([np.array(row, dtype=np.int32) for row in ids]),
        "lengths": np.array([len(row) for row in ids], dtype=np.int32),
    }
    manifest = {
        "crosschip": crosschip.__version__,
        "recorded_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "recorded_on": chip.name,
        "for_handoff": for_handoff,
        "compute_dtype": recorder.dtype_name,
        "weights_dtype": str(recorder.weights_dtype).removeprefix("torch."),
        "source": str(source.resolve()),
        "rows": [{"length": len(row.ids), "origin": row.origin} for row in rows],
        "lengths_left_out": left_out,
        "route": route,
        "points": shape.points,
        "sketch_width": SKETCH_WIDTH,
        "top_k": min(TOP_K, shape.vocab_size),
        "seed": plan.seed,
        "config": fields_of(directory, route),
        "special_tokens": special_tokens(read_json(directory / "config.json")),
        "vocab_size": shape.vocab_size,
        "num_nextn_predict_layers": shape.num_nextn_predict_layers,
        "curve_plan": asdict(recorder.curve_plan),
        "curve": asdict(recorder.curve) if recorder.curve else None,
        "noise_floor": floor,
        "weights": weights,
        "fingerprint": fingerprint(chip),
    }
    chosen = {**manifest, "weights": {}}  # of the tensors nobody can choose fewer
    size = sum(array.nbytes for array in arrays.values()) + len(json.dumps(chosen, indent=2))
    if size > plan.max_bytes:
        raise GoldenError(f"the bundle would be {size} B, more than {plan.max_bytes}", "record fewer tokens or texts")
    return write_bundle(out, manifest, arrays)


@contextmanager
def _refusals_told(directory: Path, chip: Chip) -> Iterator[None]:
    """The end of a chip's memory, or an operator or dtype that it has not got, is no fault of ours."""
    try:
        yield
    except (RuntimeError, TypeError) as error:
        raise GoldenError(
            f"{directory} cannot be recorded on {chip.name}: {type(error).__name__}: {error}",
            "examine the chip with `crosschip qualify`, or record on another one; where memory ended, on a larger one",
        ) from error


def model_directory_of(source: Path) -> tuple[Path, Path]:
    """The model directory that `source` means, and where its tokenizer is.

    Raises:
        GoldenError: it is neither a model directory nor a run with a complete checkpoint.
    """
    if (source / "config.json").is_file():
        return source, source / "tokenizer.json"
    run = RunDirectory(source)
    for stage in _stages_of(run):
        if complete := complete_checkpoints(run.stage(stage)):
            return complete[-1], run.tokenizer / "tokenizer.json"
    raise GoldenError(
        f"{source} is neither a model directory (config.json) nor a run with a complete checkpoint",
        "give a run directory after training, or a directory in the published layout",
    )


def _stages_of(run: RunDirectory) -> Sequence[str]:
    """The stages of a run, the last one first."""
    if not run.resolved_recipe.is_file():
        return _STAGES
    recipe = parse_recipe(read_json(run.resolved_recipe), str(run.resolved_recipe))
    return [name for name, _ in reversed(recipe.stages)]


def route_of(directory: Path) -> str:
    """What can run a model directory: our own model, which shows most, else `transformers`.

    Raises:
        ModelError: neither can, since there is no config.json.
    """
    if is_training_checkpoint(directory) or not (directory / "config.json").is_file():
        return "model"
    try:
        read_config(directory)
    except ModelError:
        return "transformers"
    return "model"


def _shape_of(config: ModelConfig) -> ModelShape:
    return ModelShape(
        config.vocab_size,
        config.max_position_embeddings,
        bytes_per_position(config),
        points_of(config),
        config.num_nextn_predict_layers,
    )


def _rows(
    shape: ModelShape,
    tokenizer: Path,
    texts: Sequence[str],
    token_rows: Sequence[Sequence[int]],
    plan: RecordPlan,
) -> tuple[list[Row], list[int]]:
    """The rows that fit, made-up ones first, and the lengths of the ladder that do not."""
    longest, vocab_size = shape.longest, shape.vocab_size
    room = min(int(0.95 * plan.max_bytes / shape.bytes_per_position), plan.max_tokens)
    if room < 64:
        problem = f"{plan.max_bytes} B leave room for {room} tokens"
        raise GoldenError(problem, "allow a larger bundle")
    for_text = int(_TEXT_SHARE * room) if texts or token_rows else 0
    widest = max(1, _LOGITS_BYTES // (4 * vocab_size * BATCH_SIZE))
    rows, left_out = ladder_rows(vocab_size, min(longest, widest), room - for_text, plan.seed)
    left_out += [longest] if widest < longest else []
    given = rows_of_ids(token_rows, min(longest, widest), for_text)
    if texts:
        given += text_rows(texts, tokenizer, min(longest, widest), for_text - sum(len(row.ids) for row in given))
    strange = next((token for row in given for token in row.ids if not 0 <= token < vocab_size), None)
    if strange is not None:
        raise GoldenError(
            f"the text holds token {strange}, the model's vocabulary ends at {vocab_size - 1}",
            f"leave the text out, or put the model's own tokenizer in the place of {tokenizer}",
        )
    return rows + given, left_out


def bytes_per_position(config: ModelConfig) -> int:
    """What one token costs in a bundle."""
    routers = sum(map(config.is_moe_layer, range(config.num_hidden_layers)))
    of_points = len(points_of(config)) * 4 * (SKETCH_WIDTH + 1)
    return of_points + routers * (2 * config.num_experts_per_tok + 4) + 8 * TOP_K + 16


class _Recorder:
    """Runs the model as the bundle wants it; `curve` is there after `reference`."""

    def __init__(
        self,
        directory: Path,
        chip: Chip,
        dtype: torch.dtype | None,
        rows: Sequence[Sequence[int]],
        plan: RecordPlan,
        tell: Callable[[str], None],
    ) -> None:
        self._directory, self._chip, self._rows, self._plan, self._tell = directory, chip, rows, plan, tell
        self._wanted = dtype
        model = self._load(chip.device)
        self.weights_dtype = model.embed_tokens.weight.dtype
        self._dtype = dtype or self.weights_dtype
        self.curve: Curve | None = None
        least = model.config.num_nextn_predict_layers + 2
        self.curve_plan = replace(
            plan.curve, length=max(least, min(plan.curve.length, model.config.max_position_embeddings - 1))
        )

    def _load(self, device: torch.device) -> Transformer:
        return load_multiplied_out(self._directory, self._wanted, device)

    @property
    def dtype_name(self) -> str:
        return str(self._dtype).removeprefix("torch.")

    def reference(self) -> Arrays:
        """The rows alone, and the training curve."""
        self._tell(f"recording {len(self._rows)} rows, {sum(map(len, self._rows))} tokens, on {self._chip.name}")
        model = self._load(self._chip.device)
        arrays = observe(model, self._rows, self._chip, self._how())
        if self.curve_plan.num_steps:
            self._tell(f"training for {self.curve_plan.num_steps} steps")
            self.curve = train_curve(model, self._chip, self._dtype, self.curve_plan)
        return arrays

    def noise_floor(self, reference: Arrays) -> dict[str, Any]:
        """What other batch sizes and other orders of the sums change on this chip."""
        rows = np.repeat(np.arange(len(self._rows)), [len(row) for row in self._rows])
        self._tell(f"the noise floor: batches of {BATCH_SIZE}")
        how = replace(self._how(), batch_size=BATCH_SIZE, place=BATCH_PLACE)
        model = self._load(self._chip.device)
        found = observe(model, self._rows, self._chip, how, reference["topk_ids"])
        runs = [OtherRun(f"in a batch of {BATCH_SIZE}", found)]
        for number in range(self._plan.reorderings):
            self._tell(f"the noise floor: another order of every sum ({number + 1} of {self._plan.reorderings})")
            model = self._load(torch.device("cpu"))
            order = reorder(model, self._plan.seed + number + 1)
            model.to(self._chip.device)
            how = replace(self._how(), unpermute=order)
            found = observe(model, self._rows, self._chip, how, reference["topk_ids"])
            runs.append(OtherRun(f"sums in order {number + 1}", found, self._other_curve(model, self._dtype)))
        if self._dtype != torch.float32:
            runs.append(self._without_rounding(reference))
        return noise_floor(reference, runs, rows, self.dtype_name)

    def _without_rounding(self, reference: Arrays) -> OtherRun:
        """The same weights, as rounded as they are used, in fp32 arithmetic.

        Another order of a sum that is made in fp32 mostly rounds to the same 16 bits, so orders alone say too little.
        """
        self._tell("the noise floor: arithmetic in fp32")
        model = self._load(self._chip.device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1 and not name.endswith(".gate.weight"):  # the router's scores are fp32 anyway
                    parameter.copy_(parameter.to(self._dtype))
        how = replace(self._how(), compute_dtype=torch.float32)
        found = observe(model, self._rows, self._chip, how, reference["topk_ids"])
        return OtherRun("without rounding", found, self._other_curve(model, torch.float32), 2**0.5)

    def _other_curve(self, model: Transformer, dtype: torch.dtype) -> CurveDistance | None:
        """The same training by a model that computes otherwise, which it changes; None where none was recorded."""
        if self.curve is None:
            return None
        other = train_curve(model, self._chip, dtype, self.curve_plan)
        return curve_distance((self.curve.loss, self.curve.gradient_norm), (other.loss, other.gradient_norm))

    def _how(self) -> Observing:
        return Observing(self._dtype, self._plan.seed)
