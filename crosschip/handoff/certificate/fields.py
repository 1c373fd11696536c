"""The fields of the configuration that change numbers, one by one."""

from __future__ import annotations

from typing import Any

from crosschip.errors import CrosschipError
from crosschip.golden.bundle import Bundle
from crosschip.golden.config_fields import FieldDifference
from crosschip.golden.files import field_differences
from crosschip.handoff.certificate.gate import Gate, Measure

__all__ = ["fields_gate"]

_NAME = "configuration fields"


def fields_gate(
    bundle: Bundle, config: dict[str, Any], is_translated: bool = False
) -> tuple[Gate, list[FieldDifference]]:
    """Compare a `config.json` with the recorded fields; also returns those that differ.

    `is_translated`: the configuration was read out of a GGUF file, which has one spelling for what `config.json` has
    several for, and says nothing about fields that only readers of `config.json` need; a field that it does not have is
    reported and not judged.
    """
    recorded = bundle.manifest["config"]
    if is_translated:
        config = _spelled_like(config, recorded)
    try:
        differences = field_differences(bundle, config)
    except CrosschipError as error:
        gate = Gate(_NAME, "FAIL", f"the configuration cannot be read: {error.problem}", "config.json")
        return gate, [FieldDifference("config.json", "readable", error.problem)]
    silent = [each for each in differences if is_translated and each.found is None]
    differences = [each for each in differences if each not in silent]
    unseen = [f"{', '.join(each.field for each in silent)}: this form does not say"] if silent else []
    measures = [Measure("fields that differ", len(differences), 0, f"one by one, {len(recorded)} fields")]
    if not differences:
        words = f"all {len(recorded) - len(silent)} fields that change numbers are the recorded ones"
        return Gate(_NAME, "PASS", words, None, measures, unseen), []
    words = "; ".join(each.words for each in differences)
    return Gate(_NAME, "FAIL", words, differences[0].field, measures, unseen), differences


def _spelled_like(config: dict[str, Any], recorded: dict[str, Any]) -> dict[str, Any]:
    from crosschip.handoff.gguf.architectures import architecture_of  # the package gguf is optional

    return architecture_of(config).spelled_like(config, recorded)
