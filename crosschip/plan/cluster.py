"""A cluster: which chips, how many, in which nodes, at what price. A TOML file, read strictly.

Figures of the chip come from the shipped table by its name; what the file gives counts more, each number with where it
comes from. A chip without figures is asked for.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from crosschip.errors import RecipeError
from crosschip.plan.calendar_tables import RecoveryTable, ScheduleTable, SeenTable
from crosschip.plan.figures import Figure
from crosschip.plan.hardware import (
    CHIP_FIGURES,
    EAGER_CALL_S,
    EAGER_CALLS,
    POD_FIGURES,
    Hardware,
    kind_named,
    names_of_kind,
    usual_host,
)
from crosschip.plan.strict_table import StrictTable

__all__ = ["KERNELS_SHARE", "Cluster", "ClusterFile", "GivenFigure", "PriceTable", "parse_cluster", "read_cluster"]

_FIELDS = {
    "bf16_tflops": ("bf16_flops", 1e12),
    "fp8_tflops": ("fp8_flops", 1e12),
    "memory_gb": ("memory_bytes", 1e9),
    "memory_gb_s": ("memory_bytes_s", 1e9),
    "link_gb_s": ("link_bytes_s", 1e9),
    "network_gb_s": ("network_bytes_s", 1e9),
    "product_share": ("efficiency", 1.0),
}
_UNITS = {**CHIP_FIGURES, **POD_FIGURES}
_OPTIONAL = {"fp8_tflops", "product_share", "host_chips"}
# Kernels other than one large product, and everything around them: about what published runs reach of their largest
# product. Assumed, and rounded.
KERNELS_SHARE = 0.8


class GivenFigure(StrictTable):
    """One number of the file."""

    value: Annotated[float, Field(gt=0.0)]
    origin: Literal["measured", "published", "assumed", "given"]
    source: Annotated[str, Field(min_length=1)]


class PriceTable(StrictTable):
    """`[price]`: in one currency; `chip_kw` holds host and cooling. What is left out is not counted."""

    currency: str = "USD"
    per_chip_hour: Annotated[float, Field(ge=0.0)] | None = None
    chip_kw: Annotated[float, Field(ge=0.0)] | None = None
    per_kwh: Annotated[float, Field(ge=0.0)] | None = None

    @property
    def hourly(self) -> float | None:
        """What an hour of a chip costs, with its energy where that has a price; None where neither has one."""
        energy = None if self.chip_kw is None or self.per_kwh is None else self.chip_kw * self.per_kwh
        return None if self.per_chip_hour is None and energy is None else (self.per_chip_hour or 0.0) + (energy or 0.0)


class ClusterFile(StrictTable):
    """The whole file."""

    name: Annotated[str, Field(min_length=1)]
    chip: Annotated[str, Field(min_length=1)]
    num_chips: Annotated[int, Field(gt=0)]
    node_size: Annotated[int, Field(gt=0)] | None = None
    note: str = ""
    figures: dict[str, GivenFigure] = Field(default_factory=dict)
    price: PriceTable = PriceTable()
    schedule: ScheduleTable = ScheduleTable()
    recovery: RecoveryTable = RecoveryTable()
    seen: Annotated[tuple[SeenTable, ...], Field(strict=False)] = ()


@dataclass(frozen=True)
class Cluster:
    """A cluster ready to plan on. `figures` has every number of the chip with its source.

    `matches` are regular expressions for the names under which a report speaks of this chip. `fixed_bytes` is what a
    process takes before it trains, `allocator_factor` what the allocator holds over the activations that are there.
    `fp32_rate`: its rate of products was measured in fp32. `file` is what its file says, without what a report and the
    command line add; None of this machine.
    """

    name: str
    hardware: Hardware
    num_chips: int
    price: PriceTable = field(default_factory=PriceTable)
    note: str = ""
    fixed_bytes: float = 3e9
    allocator_factor: float = 1.0
    schedule: ScheduleTable = field(default_factory=ScheduleTable)
    recovery: RecoveryTable = field(default_factory=RecoveryTable)
    seen: tuple[SeenTable, ...] = ()
    matches: tuple[str, ...] = ()
    fp32_rate: bool = False
    file: ClusterFile | None = None

    @property
    def figures(self) -> dict[str, Figure]:
        """The chip's numbers by key."""
        return dict(self.hardware.sources)


def read_cluster(path: Path) -> Cluster:
    """Read a cluster's file.

    Raises:
        RecipeError: no file, no TOML, an unknown key, a value that cannot be, or figures that nobody has given.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise RecipeError(f"no cluster at {path}", "check the path; shipped ones are in clusters/") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"{path} is not TOML: {error}", "mend that line") from None
    return parse_cluster(document, str(path))


def parse_cluster(document: dict[str, Any], origin: str) -> Cluster:
    """Check a cluster that is already a dictionary; `origin` is named in errors."""
    try:
        file = ClusterFile.model_validate(document)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, each['loc']))}: {each['msg'].lower()}" for each in error.errors()]
        keys = ", ".join(ClusterFile.model_fields)
        raise RecipeError(f"{origin}: {'; '.join(faults)}", f"the keys are {keys}; see clusters/*.toml") from None
    unknown = [key for key in file.figures if key not in _UNITS]
    if unknown:
        raise RecipeError(f"{origin}: figures.{unknown[0]} is no figure", f"these are: {', '.join(_UNITS)}")
    if "product_share" in file.figures and (share := file.figures["product_share"].value) > 1.0:
        raise RecipeError(
            f"{origin}: figures.product_share = {share:g} is no share of the datasheet's rate", "give 0 to 1, as 0.8"
        )
    call = Figure(EAGER_CALL_S * 1e6, "µs for a call of torch", "assumed", "as measured on the host of one H100")
    hardware = _hardware(file, origin)
    _refuse_spares_beyond_hosts(file, hardware, origin)
    hardware = replace(hardware, call_s=EAGER_CALLS * EAGER_CALL_S, sources=(*hardware.sources, ("call_us", call)))
    return Cluster(
        file.name, hardware, file.num_chips, file.price, file.note,
        schedule=file.schedule, recovery=file.recovery, seen=file.seen, matches=names_of_kind(file.chip), file=file,
    )  # fmt: skip


def _refuse_spares_beyond_hosts(file: ClusterFile, hardware: Hardware, origin: str) -> None:
    num_hosts, num_spares = math.ceil(file.num_chips / hardware.host_size), file.recovery.num_spares
    if num_spares is not None and num_spares > num_hosts:
        raise RecipeError(
            f"{origin}: recovery.num_spares = {num_spares}, and of hosts with {hardware.host_size} chips "
            f"the cluster has {num_hosts}",
            f"let 0 to {num_hosts} stand by",
        )


def _hardware(file: ClusterFile, origin: str) -> Hardware:
    base = kind_named(file.chip)
    given = {key: Figure(each.value, _UNITS[key], each.origin, each.source) for key, each in file.figures.items()}
    figures = {**(dict(base.sources) if base is not None else {}), **given}
    missing = [key for key in CHIP_FIGURES if key not in figures and key not in _OPTIONAL]
    if missing:
        raise RecipeError(
            f"{origin}: no figures are known for {file.chip}: {', '.join(missing)}",
            "measure them (`crosschip qualify`) or take them from the vendor, as in "
            f'`[figures.{missing[0]}]` with `value`, `origin` ("measured", "published" or "assumed") and `source`',
        )
    if base is None and file.node_size is None:
        raise RecipeError(
            f"{origin}: how many of {file.chip} share fast links is not known: node_size is not given",
            "write it above the tables, as in `node_size = 8`",
        )
    figures.setdefault("product_share", Figure(0.7, CHIP_FIGURES["product_share"], "assumed", "as other chips"))
    node_size = file.node_size or (base.node_size if base is not None else 0)
    figures["host_chips"] = _host(file, figures.get("host_chips"), node_size, origin)
    values: dict[str, Any] = {
        _FIELDS[key][0]: figure.value * _FIELDS[key][1] for key, figure in figures.items() if key in _FIELDS
    }
    values["host_size"] = round(figures["host_chips"].value)
    values["efficiency"] *= KERNELS_SHARE
    values |= _pods(figures, node_size, origin)
    sources = tuple((key, figures[key]) for key in _UNITS if key in figures)
    if base is None:
        assert file.node_size is not None
        values.setdefault("fp8_flops", None)
        return Hardware(kind=file.chip, node_size=file.node_size, sources=sources, **values)
    return replace(base, node_size=node_size, sources=sources, **values)


def _pods(figures: dict[str, Figure], node_size: int, origin: str) -> dict[str, Any]:
    """The third level of the network: both of its figures, or neither."""
    given = [key for key in POD_FIGURES if key in figures]
    if not given:
        return {}
    if len(given) == 1:
        (other,) = (key for key in POD_FIGURES if key not in figures)
        raise RecipeError(
            f"{origin}: figures.{given[0]} is given and figures.{other} is not",
            f"give `[figures.{other}]` as well ({POD_FIGURES[other]}), or neither",
        )
    size, spine, network = (figures[key].value for key in ("pod_chips", "spine_gb_s", "network_gb_s"))
    if size % node_size:
        nearest = max(1, round(size / node_size)) * node_size
        raise RecipeError(
            f"{origin}: figures.pod_chips = {size:g} is no multiple of a node of {node_size} chips",
            f"give whole nodes, for example {nearest}",
        )
    if spine > network:
        raise RecipeError(
            f"{origin}: figures.spine_gb_s = {spine:g} is more than figures.network_gb_s = {network:g}",
            "give what of the network each chip has between pods, or leave both figures of pods out",
        )
    return {"pod_size": round(size), "spine_bytes_s": spine * 1e9}


def _host(file: ClusterFile, known: Figure | None, node_size: int, origin: str) -> Figure:
    """The chips of a host: as given or known, as long as a node holds it."""
    if "host_chips" in file.figures:
        given = file.figures["host_chips"].value
        if given != round(given) or given > node_size:
            raise RecipeError(
                f"{origin}: figures.host_chips = {given:g} is no whole number of chips of a node of {node_size}",
                f"give 1 to {node_size} chips that a repair takes away together",
            )
    return usual_host(node_size) if known is None or known.value > node_size else known
