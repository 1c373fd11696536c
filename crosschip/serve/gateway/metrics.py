"""The gateway's figures for Prometheus, in a registry of their own. They hold names of engines, never of prompts."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from crosschip.serve.gateway.fleet import EngineState

__all__ = ["GatewayMetrics"]

_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_PER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class GatewayMetrics:
    """Counters and gauges, by engine unless told otherwise."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        name = "crosschip_gateway_"

        def counter(what: str, text: str, labels: list[str]) -> Counter:
            return Counter(name + what, text, labels, registry=registry)

        def gauge(what: str, text: str, labels: list[str]) -> Gauge:
            return Gauge(name + what, text, labels, registry=registry)

        self.waiting = gauge("waiting_requests", "Requests that wait for a place on an engine.", ["model"])
        self.in_flight = gauge("engine_in_flight", "Requests on the engine.", ["engine"])
        self.queue = gauge("engine_queue", "Requests that wait inside the engine, where it tells.", ["engine"])
        self.healthy = gauge("engine_healthy", "1: the engine answers its health checks.", ["engine"])
        self.draining = gauge("engine_draining", "1: the engine gets no new requests.", ["engine"])
        labels = ["engine", "model", "chip", "kind", "group", "weights_version", "certificate"]
        self.info = gauge("engine_info", "What answers there.", labels)
        self.requests = counter("requests", "Requests by how they ended.", ["engine", "outcome"])
        self.retries = counter("retries", "Attempts that failed before the first token.", ["engine", "reason"])
        self.tokens = counter("tokens", "Tokens by the engine's usage; else parts of answers.", ["engine", "kind"])
        self.refused = counter("refused_requests", "Requests that got no place.", ["reason"])
        self.first_token = Histogram(
            name + "time_to_first_token_seconds",
            "From the request's arrival to the first token; a whole answer counts as one.",
            ["engine"],
            buckets=_FIRST_TOKEN_S,
            registry=registry,
        )
        self.per_token = Histogram(
            name + "time_per_output_token_seconds",
            "Mean of a stream: from its first part to its last, by its tokens less one.",
            ["engine"],
            buckets=_PER_TOKEN_S,
            registry=registry,
        )
        self.parity_alarm = gauge("parity_alarm", "1: what the engine says drifts beyond the bound.", ["engine"])
        self.parity_kl = gauge("parity_mean_kl_nats", "Mean KL to the reference over the window.", ["engine"])
        self.parity_kl_limit = gauge("parity_mean_kl_limit_nats", "The bound.", ["engine"])
        self.parity_dlogp = gauge("parity_mean_abs_dlogp_nats", "Mean |dlogp| of the tokens said.", ["engine"])
        self.parity_tokens = counter("parity_tokens", "Tokens that were scored again.", ["engine"])
        self.parity_uncovered = counter("parity_uncovered", "Drawn, not scored again.", ["engine", "reason"])

    def show_engine(self, engine: EngineState) -> None:
        """Set the gauges of an engine."""
        self.in_flight.labels(engine.name).set(engine.in_flight)
        self.healthy.labels(engine.name).set(engine.problem is None)
        self.draining.labels(engine.name).set(engine.draining)
        if engine.queue is not None:
            self.queue.labels(engine.name).set(engine.queue)

    def show_info(self, engines: list[EngineState]) -> None:
        """Set anew what answers where: an old version must not stay beside the new one."""
        self.info.clear()
        for engine in engines:
            table = engine.table
            word = engine.certificate.word
            values = (table.name, table.model, table.chip, table.kind, table.group, engine.weights_version, word)
            self.info.labels(*values).set(1)

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)
