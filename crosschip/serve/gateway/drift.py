"""How far what an engine said lies from what a reference says of the same tokens. Numbers alone, no I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from crosschip.certificate import Certificate, read_certificate
from crosschip.certificate.document import PASSED
from crosschip.certificate.signing import signature_problem
from crosschip.errors import HandoffError, ServeError
from crosschip.golden.distance import kl_of_lists, mean_with_bound
from crosschip.golden.scoring_engine import Prediction
from crosschip.serve.gateway.settings import ParityTable

__all__ = ["Bound", "DriftWindow", "Said", "Scored", "Verdict", "bound_of", "compare"]

Verdict = Literal["ok", "alarm", "undecided"]

_MEAN_KL = "upper 95 % bound of the mean KL, in nats"  # as replays in a certificate name it
_LOGPROB = "largest difference of one log-prob, in nats"
_NEARLY_ALL = 0.995  # of a replay's positions; below it a certificate tells how many were excused


@dataclass(frozen=True)
class Bound:
    """What drift is held to, in nats. `logprob` None: a single log-prob is not judged."""

    mean_kl: float
    logprob: float | None
    source: str


@dataclass(frozen=True)
class Said:
    """An answer as its engine gave it: each token's log-prob, and the most likely tokens with theirs, best first."""

    prompt_ids: list[int]
    ids: list[int]
    logprobs: list[float]
    tops: list[dict[int, float]]


@dataclass(frozen=True)
class Scored:
    """An answer against the reference, by its tokens: KL(reference || said) and |dlogp|, in nats."""

    kl: NDArray[np.float64]
    abs_dlogp: NDArray[np.float64]


def bound_of(table: ParityTable, public_key: bytes | None = None) -> Bound:
    """The bound that GATEWAY.toml states, or the strictest that an engine behind an address kept in the certificate.

    With `public_key` (32 bytes) only a certificate that this key signed is believed.

    Raises:
        ServeError: a certificate that cannot be read, was altered, is not that key's, did not pass, or holds no limit
            that the watch can use.
    """
    if table.certificate is None:
        assert table.mean_kl is not None
        return Bound(table.mean_kl, table.logprob, "stated in GATEWAY.toml")
    try:
        certificate = read_certificate(table.certificate)
    except HandoffError as error:
        raise ServeError(f"parity of {table.model!r}: {error.problem}", error.remedy) from None
    if wrong := signature_problem(certificate.document, public_key):
        remedy = "name a directory whose certificate that key signed, or state `mean_kl`"
        raise ServeError(f"parity of {table.model!r}: {certificate.path}: {wrong}", remedy)
    source = f"the certificate in {table.certificate}"
    if certificate.verdict not in PASSED:
        words = f"parity of {table.model!r}: {source} says {certificate.verdict}"
        raise ServeError(words, "hand the model off again, or state `mean_kl`")
    views = _comparable_views(certificate)
    mean_kl = _limits(views, _MEAN_KL)
    if not mean_kl:
        raise ServeError(
            f"parity of {table.model!r}: {source} has no golden replay that passed through an engine behind an address "
            f"and judged {_NEARLY_ALL:.1%} of its positions, as the watch judges every token",
            "state `mean_kl`, or hand the model off with `--engine native` where no near-ties of routers are excused",
        )
    of_every_token = _limits([view for view in views if _share_judged(view) == 1], _LOGPROB)
    return Bound(min(mean_kl), table.logprob or min(of_every_token, default=None), source)


def _comparable_views(certificate: Certificate) -> list[dict[str, Any]]:
    """The views of passed replays that were judged as the watch judges.

    A replay in process is shown the router's choices, and excuses those that fell otherwise; over HTTP near-ties are
    excused. The watch sees neither.
    """
    over_http = [each for each in certificate.replays if each["verdict"] in PASSED and each.get("route") == "http"]
    return [view for replay in over_http for view in replay["views"] if _share_judged(view) >= _NEARLY_ALL]


def _share_judged(view: dict[str, Any]) -> float:
    share = view.get("share_judged")
    return float(share) if isinstance(share, int | float) else 0.0


def _limits(views: list[dict[str, Any]], what: str) -> list[float]:
    measures = [measure for view in views for measure in view["measures"] if measure["what"] == what]
    return [float(m["limit"]) for m in measures if isinstance(m["limit"], int | float)]


def compare(said: Said, predictions: Sequence[Prediction | None]) -> Scored:
    """Hold an answer against what the reference says follows each position of prompt and answer.

    A token that was drawn though it is not among the most likely ones stands in both lists beside those.
    """
    first = len(said.prompt_ids) - 1
    ours: list[dict[int, float]] = []
    theirs: list[dict[int, float]] = []
    least: list[tuple[float, float]] = []
    differences: list[float] = []
    for place, (token, logprob, top) in enumerate(zip(said.ids, said.logprobs, said.tops, strict=True)):
        prediction = predictions[first + place]
        if prediction is None or not top or not prediction.top:
            continue
        reference = prediction.target if prediction.target is not None else prediction.top.get(token)
        if reference is None:  # the last token, where the reference lists its most likely ones only
            continue
        listed = {
            id_: value for id_, value in prediction.top.items() if id_ != token or len(prediction.top) <= len(top)
        }
        least.append((min(listed.values()), min(top.values())))
        theirs.append(prediction.top | {token: reference})
        ours.append(top | {token: logprob})
        differences.append(abs(reference - logprob))
    return Scored(kl_of_lists(theirs, ours, least), np.array(differences, dtype=np.float64))


class DriftWindow:
    """The latest answers of one engine on one version of its weights."""

    def __init__(self, bound: Bound, window_tokens: int, least_tokens: int) -> None:
        self._bound = bound
        self._window_tokens = window_tokens
        self._least_tokens = least_tokens
        self._answers: deque[Scored] = deque()
        self.num_answers = 0

    def add(self, scored: Scored) -> None:
        """One more answer; the oldest leave when their tokens are more than the window's."""
        if len(scored.kl) == 0:
            return
        self.num_answers += 1
        self._answers.append(scored)
        while sum(len(each.kl) for each in list(self._answers)[1:]) >= self._window_tokens:
            self._answers.popleft()

    def figures(self) -> dict[str, Any]:
        """The verdict with its numbers.

        An alarm: the lower 95 % bound of the mean KL is above the limit, so that few tokens raise none by chance; or a
        single log-prob is further off than the limit allows; or one is no number. ok: the upper bound is below.
        """
        if not self._answers:
            return {"verdict": "undecided", "tokens": 0, "answers": 0}
        kl = mean_with_bound(np.concatenate([each.kl for each in self._answers]))
        dlogp = np.concatenate([each.abs_dlogp for each in self._answers])
        largest = float(dlogp.max()) if np.isfinite(dlogp).all() else float("inf")
        return {
            "verdict": self._verdict(kl.lower_95, kl.upper_95, kl.num_positions, largest),
            "tokens": kl.num_positions,
            "answers": self.num_answers,
            "mean_kl": kl.mean,
            "mean_kl_lower_95": kl.lower_95,
            "mean_kl_upper_95": kl.upper_95,
            "mean_abs_dlogp": float(dlogp.mean()),
            "max_abs_dlogp": largest,
        }

    def _verdict(self, lower: float, upper: float, num_tokens: int, largest: float) -> Verdict:
        if not np.isfinite(largest) or not np.isfinite(upper):
            return "alarm"
        if self._bound.logprob is not None and largest > self._bound.logprob:
            return "alarm"
        if num_tokens < self._least_tokens:
            return "undecided"
        if lower > self._bound.mean_kl:
            return "alarm"
        return "ok" if upper < self._bound.mean_kl else "undecided"
