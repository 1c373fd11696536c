"""One training stage as the page shows it: a row of figures, plots, samples along the way, events."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from crosschip.report.curves import MAX_POINTS, Series, last_value, series, thin
from crosschip.report.documents import Document, StageDocuments
from crosschip.report.figures import count, decimals, duration
from crosschip.report.plots import Plot, draw

__all__ = ["Figure", "SampleGroup", "StageView", "view_stage"]

TITLES = {"pretrain": "Pre-training", "sft": "Fine-tuning", "rl": "Reinforcement learning"}
LAST_STEPS = 20  # a single step's loss is noisy; the table shows the mean of the last ones
MAX_SAMPLE_STEPS = 6
MAX_SAMPLE_PROMPTS = 4
MAX_SAMPLE_CHARACTERS = 1200
MAX_EVENTS = 30
LOG_FROM = 100  # highest over lowest value from which a logarithmic axis shows more


@dataclass(frozen=True)
class Figure:
    """A plot with its heading. `keys` are (CSS class, what it stands for)."""

    title: str
    svg: str
    keys: list[tuple[str, str]]


@dataclass(frozen=True)
class SampleGroup:
    """What the model wrote after one prompt as it was trained: (step, text) pairs."""

    prompt: str
    texts: list[tuple[str, str]]


@dataclass(frozen=True)
class StageView:
    """Everything the template needs about one stage; `row` is (column, text) in the stage table's order."""

    name: str
    title: str
    state: str
    started: bool
    row: list[tuple[str, str]]
    figures: list[Figure]
    figures_note: str
    samples: list[SampleGroup]
    samples_left_out: str
    events: list[Document]
    events_left_out: int
    notes: list[str]


def _state(stage: StageDocuments, last_step: int | None) -> str:
    planned = stage.settings.get("steps")
    if last_step is None:
        return "not started"
    if planned is None:
        return f"{count(last_step)} steps; how many were planned is unknown"
    return "finished" if stage.finished else f"step {count(last_step)} of {count(planned)}"


def _row(stage: StageDocuments, title: str, state: str) -> list[tuple[str, str]]:
    rows = stage.metrics.rows
    loss, tokens, seconds = series(rows, "loss"), series(rows, "tokens"), series(rows, "seconds")
    rate = series(rows, "tokens_per_s")
    tail = loss.values[-LAST_STEPS:]
    return [
        ("stage", title),
        ("state", state),
        ("steps", count(loss.steps[-1]) if loss.steps else "–"),
        ("tokens", count(sum(tokens.values)) if tokens.values else "–"),
        ("time", duration(sum(seconds.values)) if seconds.values else "–"),
        ("tokens/s", count(median(rate.values)) if rate.values else "–"),
        ("loss", decimals(sum(tail) / len(tail) if tail else None)),
        ("validation loss", decimals(last_value(stage.validation.rows, "validation_loss"))),
        ("bits per byte", decimals(last_value(stage.validation.rows, "bits_per_byte"))),
    ]


def _describe(what: str, values: Series) -> str:
    first, last = values.values[0], values.values[-1]
    return (
        f"{what} over {count(len(values.steps))} steps: from {first:.4g} at step {values.steps[0]} "
        f"to {last:.4g} at step {values.steps[-1]}; lowest {min(values.values):.4g}, highest {max(values.values):.4g}."
    )


@dataclass(frozen=True)
class _SmallPlot:
    key: str  # in metrics.jsonl
    title: str
    log_scale: bool = False
    from_zero: bool = False


_MISMATCH = _SmallPlot("mismatch_k3", "KL from engine to trainer in nats per token", log_scale=True, from_zero=True)
SMALL_PLOTS = (
    _SmallPlot("gradient_norm", "Gradient norm before clipping", log_scale=True, from_zero=True),
    _SmallPlot("learning_rate", "Learning rate", from_zero=True),
    _SmallPlot("tokens_per_s", "Tokens per second", from_zero=True),
    _SmallPlot("mtp_loss", "Multi-token prediction loss"),
    _SmallPlot("router_imbalance", "Router imbalance"),
    _SmallPlot("answer_tokens", "Tokens per sampled answer", from_zero=True),
    _SmallPlot("entropy", "Entropy of the policy in nats", from_zero=True),
    _MISMATCH,
    _SmallPlot("truncated_share", "Share of tokens with a truncated weight", from_zero=True),
    _SmallPlot("both_work_share", "Share of time in which engines and trainer work", from_zero=True),
)


def _figures(stage: StageDocuments, title: str) -> list[Figure]:
    figures = [_reward_figure(stage, title)] if series(stage.metrics.rows, "reward").steps else []
    figures += [_loss_figure(stage, title)] if series(stage.metrics.rows, "loss").steps else []
    for small in (*SMALL_PLOTS, *_plots_of_engines(stage)):
        figures += _small_figure(stage, title, small)
    return figures


def _plots_of_engines(stage: StageDocuments) -> list[_SmallPlot]:
    """The mismatch of each engine, where several answered; of one alone it is the overall one."""
    keys = sorted({key for row in stage.metrics.rows for key in row if key.endswith(f" {_MISMATCH.key}")})
    if len(keys) < 2:
        return []
    return [replace(_MISMATCH, key=key, title=f"{_MISMATCH.title}: {key.rpartition(' ')[0]}") for key in keys]


def _small_figure(stage: StageDocuments, title: str, small: _SmallPlot) -> list[Figure]:
    values = series(stage.metrics.rows, small.key)
    if not values.steps:
        return []
    lowest = min(values.values)
    log_scale = small.log_scale and lowest > 0 and max(values.values) > LOG_FROM * lowest
    plot = Plot(
        name=re.sub(r"[^\w-]+", "-", f"{stage.name}-{small.key}"),  # an engine's address has more in it
        title=f"{title}: {small.title.lower()}",
        description=_describe(small.title, values),
        curve=thin(values),
        log_scale=log_scale,
        from_zero=small.from_zero,
    )
    return [Figure(small.title, draw(plot), [("", "logarithmic")] if log_scale else [])]


def _loss_figure(stage: StageDocuments, title: str) -> Figure:
    loss = series(stage.metrics.rows, "loss")
    validation = series(stage.validation.rows, "validation_loss")
    keys = [("key key-line", "training")]
    description = _describe("Training loss", loss)
    if validation.steps:
        keys.append(("key key-mark", "validation"))
        description += " " + _describe("Validation loss", validation)
    svg = draw(Plot(f"{stage.name}-loss", f"{title}: loss per token in nats", description, thin(loss), validation))
    return Figure("Loss", svg, keys)


def _reward_figure(stage: StageDocuments, title: str) -> Figure:
    reward, score = series(stage.metrics.rows, "reward"), series(stage.validation.rows, "score")
    keys, description = [("key key-line", "mean reward of the sampled answers")], _describe("Mean reward", reward)
    if score.steps:
        keys.append(("key key-mark", "share of held-out problems answered right, greedily"))
        description += " " + _describe("Held-out score", score)
    plot = Plot(f"{stage.name}-reward", f"{title}: reward and score", description, thin(reward), score, from_zero=True)
    return Figure("Reward and score", draw(plot), keys)


def _figures_note(num_steps: int) -> str:
    """What a point stands for when a long run was thinned."""
    stride = max(1, -(-num_steps // MAX_POINTS))
    if stride == 1:
        return ""
    return (
        f"Each point of a line is the mean of {count(stride)} steps; the band behind it reaches from lowest to highest."
    )


def _cut(text: Any) -> str:
    whole = str(text)
    if len(whole) <= MAX_SAMPLE_CHARACTERS:
        return whole
    return f"{whole[:MAX_SAMPLE_CHARACTERS]} … ({count(len(whole) - MAX_SAMPLE_CHARACTERS)} more characters)"


def _samples(rows: list[Document]) -> tuple[list[SampleGroup], str]:
    """Samples by prompt, at steps evenly spread with both ends, and a sentence about what is left out."""
    by_prompt: dict[str, dict[int, str]] = {}
    for row in rows:
        if isinstance(row.get("step"), int):
            by_prompt.setdefault(_cut(row.get("prompt", "")), {})[row["step"]] = _cut(row.get("text", ""))
    steps = sorted({step for texts in by_prompt.values() for step in texts})
    shown = _spread(steps, MAX_SAMPLE_STEPS)
    groups = [
        SampleGroup(prompt, [(count(step), texts[step]) for step in shown if step in texts])
        for prompt, texts in list(by_prompt.items())[:MAX_SAMPLE_PROMPTS]
    ]
    hidden_steps, hidden_prompts = len(steps) - len(shown), len(by_prompt) - len(groups)
    left_out = f"{count(hidden_prompts)} more prompts and {count(hidden_steps)} more steps"
    return groups, left_out if hidden_steps or hidden_prompts else ""


def _spread(steps: list[int], limit: int) -> list[int]:
    """At most `limit` of the steps, evenly spread, both ends included."""
    if len(steps) <= limit:
        return steps
    return [steps[round(place * (len(steps) - 1) / (limit - 1))] for place in range(limit)]


def _notes(stage: StageDocuments, title: str, started: bool) -> list[str]:
    if not started:
        return []
    notes = []
    for key in ("loss", "gradient_norm"):
        num_bad = series(stage.metrics.rows, key).num_bad
        if num_bad:
            notes.append(f"{title}: {key} was not a finite number at {count(num_bad)} steps; the plots leave them out")
    if not stage.validation.rows:
        notes.append(f"{title}: no validation loss was measured")
    if not stage.samples.rows:
        notes.append(f"{title}: no samples were written")
    return notes


def view_stage(stage: StageDocuments) -> StageView:
    """Work out what the page says about `stage`, and draw its plots."""
    title = TITLES.get(stage.name, stage.name)
    loss = series(stage.metrics.rows, "loss")
    started = bool(stage.metrics.rows)
    state = _state(stage, loss.steps[-1] if loss.steps else None)
    samples, left_out = _samples(stage.samples.rows)
    return StageView(
        name=stage.name,
        title=title,
        state=state,
        started=started,
        row=_row(stage, title, state),
        figures=_figures(stage, title),
        figures_note=_figures_note(len(loss.steps)),
        samples=samples,
        samples_left_out=left_out,
        events=stage.events.rows[-MAX_EVENTS:],
        events_left_out=max(0, len(stage.events.rows) - MAX_EVENTS),
        notes=_notes(stage, title, started),
    )
