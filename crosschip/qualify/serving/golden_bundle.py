"""The engine against a golden bundle, as a part of the serving exam.

Engines that score prompts are asked for every position of every row (`crosschip.golden.engine_replay`, which places the
blame as well). Others are asked for the token after each row: one position a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from crosschip.errors import GoldenError
from crosschip.golden.bundle import Bundle, load_bundle
from crosschip.golden.comparison import Comparison, View
from crosschip.golden.distance import kl_of_lists
from crosschip.golden.engine_replay import replay_over_http
from crosschip.golden.files import FileCheck, check_files
from crosschip.golden.judge import Judgement, judge
from crosschip.golden.limits import limit_for, target_of
from crosschip.golden.replay import replay_dtype
from crosschip.golden.views import LogProbs, near_ties, view_of_log_probs
from crosschip.qualify.finding import LEAST_COVERAGE, Coverage
from crosschip.qualify.serving.answers import Token
from crosschip.qualify.serving.reproducer import Reproduction
from crosschip.qualify.serving.shown import recorded_row_is_answered
from crosschip.qualify.serving.sitting import COMPLETIONS, Sitting

__all__ = ["GoldenReplay", "open_replay"]

_LONGEST_SHOWN = 600  # tokens of a row that a reproducer carries
_LEAST = -1e4  # a log-prob of nothing, in JSON
_ROWS = "rows of the golden bundle"
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class GoldenReplay:
    """A bundle that was found whole, and the directory of the files that the engine serves, where it is known."""

    bundle: Bundle
    model: Path | None = None
    files: FileCheck | None = None
    api_key: str | None = None

    def examine(self, sitting: Sitting) -> None:
        """Replay, judge, and report where the engine differs and why."""
        try:
            comparison = self._replay(sitting)
        except GoldenError as error:  # the engine went away or refuses what it took when it was asked who it is
            sitting.record.not_covered.append(f"the golden bundle: {error.problem}")
            sitting.record.ended = "not run"
            return
        judgement = judge(comparison)
        sitting.record.not_covered += judgement.not_covered
        for view in comparison.views:
            sitting.checked("golden log-probs", sum(row.length for row in view.rows))
            sitting.measured(
                what="golden",
                view=view.name,
                positions=sum(row.length for row in view.rows),
                mean_kl=view.kl.mean,
                upper_95=view.kl.upper_95,
                limit=comparison.limit.mean_kl,
                largest_logprob_difference=view.largest_logprob_difference,
                top1=view.top1,
            )
        if judgement.findings:
            _report(sitting, judgement, self.bundle, comparison)

    def _replay(self, sitting: Sitting) -> Comparison:
        dtype = sitting.identity.dtype if sitting.identity.dtype in _DTYPES else None
        if sitting.identity.scores_prompts:
            return self._replay_every_position(sitting, dtype)
        name = replay_dtype(self.bundle, dtype, self.files.dtype if self.files else None, None)
        target, coarser = target_of(self.bundle.dtype, name)
        floor = {**self.bundle.floor, **self.bundle.floor["without_choices"]}
        limit = limit_for(target, coarser, floor["mean_kl"])
        comparison = Comparison("http", sitting.identity.chip, name, limit, floor, files_checked=self.files is not None)
        if self.files is not None:
            comparison.fields, comparison.weights = self.files.fields, self.files.weights
        _ask_last_positions(sitting, self.bundle, comparison)
        return comparison

    def _replay_every_position(self, sitting: Sitting, dtype: str | None) -> Comparison:
        budget_s, client = sitting.remaining_s, sitting.client
        comparison = replay_over_http(
            self.bundle,
            client.url,
            files=self.model,
            check=self.files,
            dtype=dtype,
            api_key=self.api_key,
            has_time=lambda share: sitting.remaining_s > (1 - share) * budget_s,
            total_s=client.total_s,
            deadline=client.deadline,
        )
        if comparison.broke is None:
            # What the engine takes no rows of is said elsewhere: this is of those for which there could have been time.
            fitting = sum(length <= sitting.max_length for length in self.bundle.lengths)
            made = comparison.rows_made
            sitting.record.coverage[_ROWS] = Coverage(made, max(made, fitting), LEAST_COVERAGE)
        return comparison


def open_replay(path: Path, model: Path | None, api_key: str | None = None) -> GoldenReplay:
    """Read the bundle, and hold it against the files in `model`, if their directory is known.

    Raises:
        GoldenError: the bundle was cut, altered, or made for other weights.
    """
    bundle = load_bundle(path)
    return GoldenReplay(bundle, model, None if model is None else check_files(bundle, model), api_key)


def _ask_last_positions(sitting: Sitting, bundle: Bundle, comparison: Comparison) -> None:
    lengths = bundle.lengths
    answered: dict[int, dict[int, float]] = {}
    for row in range(len(lengths)):
        if lengths[row] < sitting.max_length:
            sitting.part(f"golden row of {lengths[row]} tokens", partial(_ask_next, sitting, bundle, row, answered))
    comparison.rows_planned, comparison.rows_made = len(lengths), len(answered)
    comparison.not_covered.append("all but the last position of each golden row: the engine does not score prompts")
    if answered:
        rows = sorted(answered)
        comparison.views.append(_view(bundle, rows, [answered[row] for row in rows], comparison))


def _ask_next(sitting: Sitting, bundle: Bundle, row: int, answered: dict[int, dict[int, float]]) -> None:
    width = int(bundle.manifest["top_k"])
    tokens = sitting.ask(sitting.generation_body(bundle.rows[row], 1, logprobs=width)).tokens[:1]
    top = _top(tokens[0], width) if tokens else {}
    if top:
        answered[row] = top
    else:
        sitting.record.not_covered.append(
            f"golden row of {bundle.lengths[row]} tokens: no top tokens by their ids came"
        )


def _top(token: Token, width: int) -> dict[int, float]:
    """The most likely tokens by id. Engines add the token itself to them, whatever its rank."""
    named = [(Token(name, None).token_id, value) for name, value in token.top.items()]
    best = sorted(((each, value) for each, value in named if each is not None), key=lambda pair: -pair[1])
    return dict(best[:width])


def _view(bundle: Bundle, rows: list[int], tops: list[dict[int, float]], comparison: Comparison) -> View:
    places = np.cumsum(bundle.lengths)[rows] - 1
    arrays = {key: array[places] for key, array in bundle.arrays.items() if key != "lengths"}
    nothing = np.full(len(rows), np.nan)  # no token follows the last of a row
    recorded = arrays["topk_logprobs"].astype(np.float64)
    compared = LogProbs(
        kl=kl_of_lists([_recorded_top(bundle, int(place)) for place in places], tops),
        reference_target=nothing,
        found_target=nothing,
        reference_top1=arrays["top1_id"].astype(np.int64),
        found_top1=np.array([next(iter(top)) for top in tops], dtype=np.int64),
        top1_margin=recorded[:, 0] - recorded[:, 1] if recorded.shape[1] > 1 else np.full(len(rows), np.inf),
    )
    clean = ~near_ties(bundle.arrays, comparison.limit.router_score(comparison.floor["router_margin"]))[places]
    return view_of_log_probs("last positions", compared, np.arange(len(rows)), clean)


def _recorded_top(bundle: Bundle, place: int) -> dict[int, float]:
    ids, values = bundle.arrays["topk_ids"][place].tolist(), bundle.arrays["topk_logprobs"][place].tolist()
    return dict(zip(ids, values, strict=True))


def _report(sitting: Sitting, judgement: Judgement, bundle: Bundle, comparison: Comparison) -> None:
    blame = _blame(comparison)
    for each in judgement.findings:
        view = next((view for view in comparison.views if each["check"].endswith(f", {view.name}")), None)
        sitting.found(
            each["verdict"],
            each["subject"],
            each["check"],
            each["message"] if "transformers" in each["message"] else each["message"] + blame,
            measured=each["measured"],
            limit=each["limit"],
            limit_source=each["limit_source"],
            reproduction=None if view is None else _worst_row(sitting, bundle, view, comparison.limit.mean_kl),
            details=each["details"],
            severity=each["severity"],
        )


def _blame(comparison: Comparison) -> str:
    """What transformers makes of the same files, where it was asked."""
    if comparison.transformers is None:
        return ""
    kl, most = comparison.transformers.kl.mean, comparison.limit.mean_kl
    if kl <= most:
        return f". The same files agree with the bundle in transformers (mean KL {kl:.1e}): the engine is to blame"
    return f". The same files differ from the bundle in transformers, too (mean KL {kl:.1e}): they are to blame"


def _worst_row(sitting: Sitting, bundle: Bundle, view: View, most: float) -> Reproduction | None:
    """The row that is furthest off, among those that fit into a file."""
    fitting = [row for row in view.rows if row.length <= _LONGEST_SHOWN]
    if not fitting or not sitting.identity.scores_prompts:
        return None
    worst = max(fitting, key=lambda row: row.kl.mean).row
    start = sum(bundle.lengths[:worst])
    tops = [_recorded_top(bundle, start + place) for place in range(bundle.lengths[worst])]
    lists = [[[f"token_id:{each}", round(max(value, _LEAST), 7)] for each, value in top.items()] for top in tops]
    body = sitting.score_body(bundle.rows[worst], 1, logprobs=int(bundle.manifest["top_k"]))
    return Reproduction(recorded_row_is_answered, {"path": COMPLETIONS, "body": body, "recorded": lists, "most": most})
