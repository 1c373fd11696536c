"""The native server's figures for Prometheus. They hold counts and times, never what was asked."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from crosschip.serve.api.generation import Generation
from crosschip.serve.api.served import ServedModel

__all__ = ["ServerMetrics"]

_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_PER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class ServerMetrics:
    """Counted as answers end; the engine's state is read when it is asked for."""

    def __init__(self, served: ServedModel) -> None:
        self.registry = registry = CollectorRegistry()
        registry.register(_EngineState(served))
        self._answers = Counter("crosschip_answers", "Answers, by their end.", ["outcome"], registry=registry)
        self._tokens = Counter("crosschip_tokens", "Tokens of prompts and of answers.", ["kind"], registry=registry)
        self._first_token = Histogram(
            "crosschip_time_to_first_token_seconds",
            "From the request to its first token.",
            buckets=_FIRST_TOKEN_S,
            registry=registry,
        )
        self._per_token = Histogram(
            "crosschip_time_per_output_token_seconds",
            "Mean of a request, from its first token to its last.",
            buckets=_PER_TOKEN_S,
            registry=registry,
        )

    def note(self, generation: Generation) -> None:
        """Count a request's tokens and times, once, when it has ended."""
        usage = generation.usage
        self._answers.labels("ended" if generation.is_complete else "broken_off").inc()
        self._tokens.labels("prompt").inc(usage.prompt_tokens)
        self._tokens.labels("completion").inc(usage.completion_tokens)
        self._tokens.labels("reasoning").inc(usage.reasoning_tokens)
        if usage.first_token_at_s is not None:
            self._first_token.observe(usage.first_token_at_s - generation.begun_at_s)
            if usage.completion_tokens > 1:
                self._per_token.observe(usage.decode_s / (usage.completion_tokens - 1))

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)


class _EngineState(Collector):
    """The engine as of its last step."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served

    def collect(self) -> Iterator[Metric]:
        """The engine's gauges and counters (prometheus_client)."""
        load, info = self._served.engine.load, self._served.engine.info
        gauges = {
            "crosschip_engine_running": ("Requests in the batch.", load.running),
            "crosschip_engine_waiting": ("Requests in the queue.", load.waiting),
            "crosschip_engine_alive": ("1: the engine computes.", load.alive),
            "crosschip_cache_blocks": ("Blocks of the cache.", load.num_blocks),
            "crosschip_cache_free_blocks": ("Blocks that no request holds.", load.free_blocks),
            "crosschip_cache_known_blocks": ("Blocks whose tokens can be found again.", load.known_blocks),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=float(value))
        counters = {
            "crosschip_prefix_tokens_asked": ("Prompt tokens that were looked for.", load.prefix_tokens_asked),
            "crosschip_prefix_tokens_found": ("Those that need not be computed.", load.prefix_tokens_found),
            "crosschip_preemptions": ("Requests that were put back for want of cache.", load.preemptions),
            "crosschip_drafts": ("Tokens that were drafted.", load.drafts),
            "crosschip_drafts_right": ("Those that were taken.", load.drafts_right),
        }
        for name, (text, number) in counters.items():
            yield CounterMetricFamily(name, text, value=float(number))
        labels = {
            "model": self._served.name,
            "chip": info.chip,
            "dtype": info.dtype,
            "weights_version": info.weights_version,
            "certificate": info.certificate.word,
        }
        about = GaugeMetricFamily("crosschip_engine_info", "What answers here.", labels=list(labels))
        about.add_metric(list(labels.values()), 1.0)
        yield about
