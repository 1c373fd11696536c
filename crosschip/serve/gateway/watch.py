"""The parity watch: draws live requests, has a reference engine score them again, and tells when they drift apart."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from crosschip.errors import CrosschipError
from crosschip.golden.scoring_engine import EngineBrokeError, Scorer, open_scorer
from crosschip.serve.gateway.drift import Bound, DriftWindow, Said, Scored, compare
from crosschip.serve.gateway.fleet import EngineState, Weights
from crosschip.serve.gateway.metrics import GatewayMetrics
from crosschip.serve.gateway.settings import ParityTable
from crosschip.serve.gateway.watched import WatchedCall, why_not

__all__ = ["ParityWatch"]

logger = logging.getLogger("crosschip.serve.gateway")

_SILENCE_S = 120.0  # a reference that says nothing for so long did not score


class ParityWatch:
    """The watch over the engines of one model. Prompts are held in memory until they were scored, and nowhere else."""

    def __init__(self, table: ParityTable, bound: Bound, metrics: GatewayMetrics, seed: int | None = None) -> None:
        self.table, self.bound = table, bound
        self._metrics = metrics
        self._draw = random.Random(seed)
        self._due: asyncio.Queue[tuple[EngineState, Weights, Said]] = asyncio.Queue(table.max_waiting)
        self._windows: dict[str, tuple[Weights, DriftWindow]] = {}
        self._uncovered: dict[str, dict[str, int]] = {}
        self._alarmed: set[str] = set()
        self._scorer: Scorer | None = None

    def draw(self, engine: EngineState, document: dict[str, Any]) -> WatchedCall | None:
        """Whether this request on this engine is watched, by lot; if so, how it is asked."""
        groups = self.table.groups
        if (groups and engine.table.group not in groups) or self._draw.random() >= self.table.share:
            return None
        reason = why_not(document, engine.table.kind)
        if reason is not None:
            self._leave_out(engine.name, reason)
            return None
        return WatchedCall(document, self.table.top_logprobs)

    def hand_in(self, engine: EngineState, call: WatchedCall, weights: Weights) -> None:
        """An answer of these weights that came to its end, to be scored when there is time; never waits."""
        said = call.said()
        if said is None:
            self._leave_out(engine.name, call.problem or "form")
            return
        try:
            self._due.put_nowait((engine, weights, said))
        except asyncio.QueueFull:
            self._leave_out(engine.name, "busy")

    async def run(self) -> None:
        """Score until cancelled, one answer at a time: the reference may be a chip that others need."""
        while True:
            engine, weights, said = await self._due.get()
            try:
                scored = await self._scored(said)
            except (CrosschipError, EngineBrokeError) as error:
                # The words of a refusal may hold parts of the prompt, so only their kind is told.
                logger.warning("parity: the reference %s did not score: %s", self.table.reference, type(error).__name__)
                self._leave_out(engine.name, "reference")
            except Exception as error:  # whatever a reference sends, the watch goes on
                logger.warning("parity: scores of another form from the reference: %s", type(error).__name__)
                self._leave_out(engine.name, "reference")
            else:
                self._note(engine, weights, scored)
            finally:
                self._due.task_done()

    async def settle(self) -> None:
        """Wait until all that was handed in was scored."""
        await self._due.join()

    def close(self) -> None:
        """Close the connection to the reference."""
        if self._scorer is not None:
            self._scorer.close()

    @property
    def alarms(self) -> list[str]:
        """The engines that drift: from an alarm until the verdict is ok, as too few tokens end none."""
        return sorted(self._alarmed)

    def describe(self) -> dict[str, Any]:
        """For `/parity`."""
        names = sorted({*self._windows, *self._uncovered})
        return {
            "model": self.table.model,
            "reference": self.table.reference,
            "share": self.table.share,
            "limit": {
                "mean_kl": self.bound.mean_kl,
                "logprob": self.bound.logprob,
                "source": self.bound.source,
            },
            "alarms": self.alarms,
            "engines": [self._describe_engine(name) for name in names],
        }

    def _describe_engine(self, name: str) -> dict[str, Any]:
        weights, window = self._windows.get(name, (Weights(), None))
        figures = window.figures() if window else {"verdict": "undecided", "tokens": 0, "answers": 0}
        # Of numbers JSON takes finite ones alone.
        told = {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in figures.items()}
        not_covered = self._uncovered.get(name, {})
        return {"engine": name, "weights_version": weights.version or None, **told, "not_covered": not_covered}

    async def _scored(self, said: Said) -> Scored:
        """In a thread that does not keep the process: a reference may say nothing for minutes."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Scored] = loop.create_future()

        def tell(act: Callable[[Any], None], value: Any) -> None:
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(lambda: None if future.done() else act(value))

        def score() -> None:
            try:
                scored = self._score(said)
            except Exception as error:
                tell(future.set_exception, error)
            else:
                tell(future.set_result, scored)

        threading.Thread(target=score, name="crosschip-parity", daemon=True).start()
        return await future

    def _score(self, said: Said) -> Scored:
        key = self.table.reference_api_key_env
        if self._scorer is None:
            api_key = os.environ.get(key) if key else None
            self._scorer = open_scorer(self.table.reference, api_key=api_key, silence_s=_SILENCE_S)
        predictions = self._scorer.score(said.prompt_ids + said.ids, self.table.top_logprobs)
        return compare(said, predictions)

    def _note(self, engine: EngineState, weights: Weights, scored: Scored) -> None:
        if len(scored.kl) == 0:
            self._leave_out(engine.name, "no_tokens")
            return
        known = self._windows.get(engine.name)
        if known is None or known[0] != weights:  # what other weights said tells nothing about these
            known = (weights, DriftWindow(self.bound, self.table.window_tokens, self.table.least_tokens))
            self._windows[engine.name] = known
        known[1].add(scored)
        figures = known[1].figures()
        self._show(engine.name, figures, len(scored.kl))

    def _show(self, name: str, figures: dict[str, Any], num_new: int) -> None:
        metrics, verdict = self._metrics, figures["verdict"]
        metrics.parity_tokens.labels(name).inc(num_new)
        metrics.parity_kl.labels(name).set(figures["mean_kl"])
        metrics.parity_kl_limit.labels(name).set(self.bound.mean_kl)
        metrics.parity_dlogp.labels(name).set(figures["mean_abs_dlogp"])
        if verdict == "alarm" and name not in self._alarmed:
            self._alarmed.add(name)
            logger.error(
                "PARITY ALARM: engine %s: mean KL %.2e nats over %d tokens, limit %.2e; largest |dlogp| %.2e",
                name,
                figures["mean_kl"],
                figures["tokens"],
                self.bound.mean_kl,
                figures["max_abs_dlogp"],
            )
        elif verdict == "ok" and name in self._alarmed:
            self._alarmed.discard(name)
            logger.warning("parity: engine %s is within the bound again", name)
        metrics.parity_alarm.labels(name).set(name in self._alarmed)

    def _leave_out(self, name: str, reason: str) -> None:
        counts = self._uncovered.setdefault(name, {})
        counts[reason] = counts.get(reason, 0) + 1
        self._metrics.parity_uncovered.labels(name, reason).inc()
