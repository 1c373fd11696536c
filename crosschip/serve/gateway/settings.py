"""GATEWAY.toml: the engines, how requests are split among them, what is watched, what is allowed."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Literal

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from crosschip.errors import ServeError
from crosschip.serve.limits import Limits

__all__ = [
    "CertifiedTable",
    "EngineKind",
    "EngineTable",
    "ForwardingTable",
    "GatewaySettings",
    "HealthTable",
    "ParityTable",
    "SplitTable",
    "load_settings",
]

EngineKind = Literal["native", "vllm", "llamacpp", "openai"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,64}$")]
Seconds = Annotated[float, Field(gt=0, le=86_400)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


def _checked_url(url: str) -> str:
    try:
        parsed = httpx.URL(url)
        is_address = parsed.scheme in ("http", "https") and parsed.host != "" and 0 < (parsed.port or 80) < 2**16
        problem = "" if is_address and not parsed.query and not parsed.fragment else "no address"
    except httpx.InvalidURL as error:
        problem = f"no address ({error})"
    if problem:
        raise ValueError(f"{problem}; give one like http://127.0.0.1:8001")
    return url.rstrip("/").removesuffix("/v1")


class CertifiedTable(_Strict):
    """What an engine that knows of no certificates serves: the handed-off directory, on which chip, in which dtype.

    `chip_kind` and `dtype` are as the certificate's replay has them.
    """

    directory: Path
    chip_kind: str
    dtype: str


class EngineTable(_Strict):
    """One engine. `model` is what clients ask for, `upstream_model` what the engine calls it, if otherwise.

    `weight` is its share of load beside its like: twice the weight, twice the requests. `group` is what a split names.
    """

    name: Name
    url: str
    model: Annotated[str, Field(min_length=1)]
    kind: EngineKind = "openai"
    chip: str = "unknown"
    upstream_model: str | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0
    group: Name = "main"
    max_in_flight: Annotated[int, Field(ge=1)] = 64
    api_key_env: str | None = None
    certified: CertifiedTable | None = None

    _check_url = field_validator("url")(_checked_url)


class SplitTable(_Strict):
    """How the conversations with one model are split among groups of engines: a canary. Shares need not add up to 1."""

    model: str
    shares: Annotated[dict[str, Annotated[float, Field(ge=0)]], Field(min_length=1)]

    @field_validator("shares")
    @classmethod
    def _some_share(cls, shares: dict[str, float]) -> dict[str, float]:
        if not sum(shares.values()) > 0:
            raise ValueError("all shares are 0")
        return shares


class ParityTable(_Strict):
    """A share of the live requests is scored again, teacher-forced, by a reference engine.

    The bound is a certificate's (`certificate`, the handed-off directory) or stated here (`mean_kl`, and `logprob` for
    a single log-prob, in nats). `groups` names the engines that are watched; empty: all of the model.
    """

    model: str
    reference: str
    reference_api_key_env: str | None = None
    share: Annotated[float, Field(gt=0, le=1)] = 0.01
    groups: list[str] = []
    certificate: Path | None = None
    mean_kl: Annotated[float, Field(gt=0)] | None = None
    logprob: Annotated[float, Field(gt=0)] | None = None
    top_logprobs: Annotated[int, Field(ge=1, le=20)] = 20
    window_tokens: Annotated[int, Field(ge=16)] = 4096
    least_tokens: Annotated[int, Field(ge=2)] = 128
    max_waiting: Annotated[int, Field(ge=1)] = 64

    _check_url = field_validator("reference")(_checked_url)

    @model_validator(mode="after")
    def _one_bound(self) -> ParityTable:
        if (self.certificate is None) == (self.mean_kl is None):
            raise ValueError("give either `certificate` or `mean_kl` as the bound")
        if self.least_tokens > self.window_tokens:
            raise ValueError("least_tokens is more than window_tokens")
        return self


class HealthTable(_Strict):
    """An engine that fails `failures` checks in a row gets no requests until it answers one."""

    interval_s: Seconds = 2.0
    timeout_s: Seconds = 5.0
    failures: Annotated[int, Field(ge=1)] = 2


class ForwardingTable(_Strict):
    """How requests go through. `retries` counts attempts after one that an engine had taken and then failed; attempts
    that reached no engine cost none."""

    retries: Annotated[int, Field(ge=0, le=10)] = 1
    max_waiting: Annotated[int, Field(ge=0)] = 256
    max_wait_s: Seconds = 30.0
    connect_s: Seconds = 2.0
    first_token_s: Seconds = 120.0
    stall_s: Seconds = 60.0
    answer_s: Seconds = 600.0
    slow_client_s: Seconds = 30.0
    drain_s: Seconds = 30.0
    affinity_slack: Annotated[float, Field(ge=0)] = 4.0


class GatewaySettings(_Strict):
    """The whole file."""

    engines: Annotated[list[EngineTable], Field(min_length=1)]
    splits: list[SplitTable] = []
    parity: list[ParityTable] = []
    health: HealthTable = HealthTable()
    forwarding: ForwardingTable = ForwardingTable()
    limits: Limits = Limits()
    cors_origins: list[str] = []

    @model_validator(mode="after")
    def _fits_together(self) -> GatewaySettings:
        names = [engine.name for engine in self.engines]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two engines are called {name!r}")
        groups = {(engine.model, engine.group) for engine in self.engines}
        models = {model for model, _ in groups}
        for table, tables in (("splits", self.splits), ("parity", self.parity)):
            for each in tables:
                if each.model not in models:
                    raise ValueError(f"{table}: no engine serves the model {each.model!r}")
                named = each.shares if isinstance(each, SplitTable) else each.groups
                missing = [group for group in named if (each.model, group) not in groups]
                if missing:
                    raise ValueError(f"{table}: no engine of {each.model!r} is in the group {missing[0]!r}")
                left_out = sorted(group for model, group in groups if model == each.model and group not in named)
                if isinstance(each, SplitTable) and left_out:
                    raise ValueError(f"splits: the group {left_out[0]!r} of {each.model!r} has no share; 0 is one")
                if sum(other.model == each.model for other in tables) > 1:
                    raise ValueError(f"{table}: the model {each.model!r} stands there twice")
        return self


def load_settings(path: Path) -> GatewaySettings:
    """Read GATEWAY.toml. Paths in it are relative to where it lies.

    Raises:
        ServeError: it cannot be read; a key is unknown, a value wrong, tables do not fit together, or a variable that
            shall hold a key is not set.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        settings = GatewaySettings.model_validate(document)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ServeError(f"{path} cannot be read: {error}", "give a TOML file as docs/gateway.md shows it") from None
    except ValidationError as error:
        raise ServeError(f"{path}: {_first_fault(error)}", "mend it; docs/gateway.md lists the keys") from None
    for variable in _variables(settings):
        if not os.environ.get(variable):
            raise ServeError(f"{path} takes a key from ${variable}, which is not set", f"export {variable}=...")
    return _rooted(settings, path.parent)


def _first_fault(error: ValidationError) -> str:
    fault = error.errors()[0]
    place = ".".join(str(part) for part in fault["loc"])
    given = fault.get("input")
    shown = f" = {given!r}" if isinstance(given, str | int | float) and fault["type"] != "extra_forbidden" else ""
    message = "unknown key" if fault["type"] == "extra_forbidden" else fault["msg"].removeprefix("Value error, ")
    return f"{place}{shown}: {message}" if place else message


def _variables(settings: GatewaySettings) -> list[str]:
    named = [engine.api_key_env for engine in settings.engines]
    named += [parity.reference_api_key_env for parity in settings.parity]
    return [each for each in named if each]


def _rooted(settings: GatewaySettings, root: Path) -> GatewaySettings:
    engines = [
        engine.model_copy(
            update={"certified": engine.certified.model_copy(update={"directory": root / engine.certified.directory})}
        )
        if engine.certified
        else engine
        for engine in settings.engines
    ]
    parity = [
        each.model_copy(update={"certificate": root / each.certificate}) if each.certificate else each
        for each in settings.parity
    ]
    limits = settings.limits
    if limits.api_keys:
        limits = limits.model_copy(update={"api_keys": root / limits.api_keys})
    return settings.model_copy(update={"engines": engines, "parity": parity, "limits": limits})
