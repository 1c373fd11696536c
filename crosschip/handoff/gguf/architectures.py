"""Which of llama.cpp's architectures a model is written as, and the whole declaration of each."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from crosschip.errors import HandoffError
from crosschip.handoff.conversion.layout import Layout
from crosschip.handoff.conversion.operators import Operator
from crosschip.handoff.gguf import deepseek2, llama
from crosschip.handoff.gguf.metadata import Metadata, refuse
from crosschip.handoff.gguf.rotary import ROPE_FIELDS, fields_of_rope

__all__ = ["Architecture", "architecture_named", "architecture_of"]


@dataclass(frozen=True)
class Architecture:
    """One architecture: what it does not express, its keys, and its tensors."""

    name: str
    reasons_against: Callable[[dict[str, Any]], list[str]]
    metadata_of: Callable[[dict[str, Any]], Metadata]
    fields: Callable[[Metadata], dict[str, Any]]
    operators_of: Callable[[dict[str, Any], Collection[str]], tuple[Operator, ...]]
    left_out: Callable[[dict[str, Any], Collection[str]], tuple[list[str], list[str]]]

    def check(self, config: dict[str, Any]) -> None:
        """Refuse a configuration that llama.cpp would compute otherwise.

        Raises:
            HandoffError: the fields, by name, or one that is missing.
        """
        try:
            refuse(self.name, self.reasons_against(config))
            self.metadata_of(config)
        except KeyError as error:
            raise HandoffError(f"config.json has no field {error}", "complete the file") from None
        except (TypeError, ValueError, OverflowError) as error:
            raise HandoffError(f"config.json has a field of the wrong kind: {error}", "mend the file") from None

    def layout(self, config: dict[str, Any], names: Collection[str]) -> Layout:
        """From the published layout to the file's; of `names` those that `left_out` tells are not taken."""
        return Layout(f"gguf {self.name}", self.operators_of(config, names))

    def fields_of(self, metadata: Metadata) -> dict[str, Any]:
        """config.json as the file's keys mean it.

        Raises:
            HandoffError: a key is missing.
        """
        own = {key.removeprefix(f"{self.name}."): value for key, value in metadata.items()}
        try:
            rope = fields_of_rope(own, log_multiplier=self.name == deepseek2.NAME)
            return {**rope, **self.fields(metadata)}
        except KeyError as error:
            raise HandoffError(f"the file has no key {error} of {self.name}", "convert the model again") from None

    def spelled_like(self, config: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        """`config`, which `fields_of` read, in the words of `other` where both mean the same keys of a file.

        Rotary positions have two spellings (transformers 4 and 5), and a `config.json` may be silent where its reader
        assumes a value. A field that means something else stays as it was read.
        """
        spelled = self._unless_it_means_more(config, {field: other.get(field) for field in ROPE_FIELDS})
        for field in [each for each in spelled if other.get(each) is None]:
            is_tied = field == "tie_word_embeddings" and bool(spelled[field])  # no key tells it, silence denies it
            spelled = spelled if is_tied else self._unless_it_means_more(spelled, {field: None})
        return spelled

    def _unless_it_means_more(self, config: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
        """The configuration with other fields (None takes one away), if a file's keys are the same; else itself."""
        merged = {**config, **fields}
        candidate = {field: value for field, value in merged.items() if value is not None or field not in fields}
        try:
            same = not self.reasons_against(candidate) and self.metadata_of(candidate) == self.metadata_of(config)
        except (HandoffError, KeyError, TypeError, ValueError):
            return config
        return candidate if same else config


def _declared(name: str, module: Any) -> Architecture:
    return Architecture(
        name,
        module.reasons_against,
        module.metadata_of,
        module.fields_of,
        module.operators_of,
        module.left_out,
    )


_BY_MODEL_TYPE = {
    **dict.fromkeys(deepseek2.MODEL_TYPES, _declared(deepseek2.NAME, deepseek2)),
    **{kind: _declared(kind, llama) for kind in llama.MODEL_TYPES},
}
_BY_NAME = {each.name: each for each in _BY_MODEL_TYPE.values()}


def architecture_of(config: dict[str, Any]) -> Architecture:
    """The architecture for a config.json.

    Raises:
        HandoffError: none is known for its model_type.
    """
    kind = config.get("model_type")
    if kind not in _BY_MODEL_TYPE:
        raise HandoffError(
            f"model_type {kind!r} is not written as GGUF here",
            f"{', '.join(_BY_MODEL_TYPE)} are; for others use llama.cpp's own convert_hf_to_gguf.py, or the target hf",
        )
    return _BY_MODEL_TYPE[str(kind)]


def architecture_named(name: str) -> Architecture:
    """The architecture that a file names.

    Raises:
        HandoffError: it is none of those that are read here.
    """
    if name not in _BY_NAME:
        raise HandoffError(f"a GGUF file of the architecture {name!r} is not read here", f"{', '.join(_BY_NAME)} are")
    return _BY_NAME[name]
