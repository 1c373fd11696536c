"""The fields of a model's configuration that change numbers, and where two configurations differ in them. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = [
    "OTHER_ENGINES_READ",
    "TIED",
    "FieldDifference",
    "compare_fields",
    "fields_of_document",
    "numeric_fields",
    "special_tokens",
]

_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
TIED = "tie_word_embeddings"
# Names of tokens, room for positions, what only training reads; and tied embeddings, which are always written out, so
# that the field changes numbers only where the tensors differ (`crosschip.golden.files.field_differences`).
_WITHOUT_EFFECT = {
    *(*_SPECIAL_TOKENS, "initializer_range", "max_position_embeddings"),
    *(TIED, "num_nextn_predict_layers", "vocab_size"),
}
# Of any architecture: names, dtypes and forms of storage, and what only training or generation reads.
_ANYWHERE_WITHOUT_EFFECT = {
    *("architectures", "transformers_version", "_name_or_path", "torch_dtype", "dtype", "quantization_config"),
    *(*_SPECIAL_TOKENS, "initializer_range", "max_position_embeddings", "use_cache"),
    *("attention_dropout", "output_attentions", "output_hidden_states", "return_dict", "vocab_size", "auto_map"),
    *("output_router_logits", "router_aux_loss_coef", "pretraining_tp", "id2label", "label2id", "problem_type"),
}
# What other engines read from config.json as well, and drop numbers without; our model computes these values alone, so
# a file of its architecture that is silent, as transformers writes them, means them.
OTHER_ENGINES_READ = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "hidden_act": "silu", "moe_layer_freq": 1}


@dataclass(frozen=True)
class FieldDifference:
    """One field of the configuration with two values."""

    field: str
    recorded: Any
    found: Any

    @property
    def words(self) -> str:
        """The field and both values."""
        return f"{self.field} = {self.found!r}, recorded {self.recorded!r}"


def numeric_fields(config: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """The fields that change numbers, from the configuration as it is understood and from `config.json` as it lies.

    The order of a table's keys is dropped; tuples become lists, as in JSON.
    """
    fields = {key: value for key, value in config.items() if key not in _WITHOUT_EFFECT}
    fields |= {key: document.get(key) for key in OTHER_ENGINES_READ}
    return {key: _plain(value) for key, value in fields.items()}


def fields_of_document(document: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `config.json` of whatever architecture, but for those that are known to change no number.

    Here nobody knows what a field means, so every other one counts, also inside of nested tables.
    """
    return {
        key: fields_of_document(value) if isinstance(value, dict) else _plain(value)
        for key, value in sorted(document.items())
        if key not in _ANYWHERE_WITHOUT_EFFECT
    }


def special_tokens(document: Any) -> dict[str, Any]:
    """The tokens that begin, end and fill up texts, as a `config.json` names them; a list of one is the one.

    They change no number of a replay, and all where an answer ends.
    """
    fields = document if isinstance(document, dict) else {}
    found = {name: _plain(fields.get(name)) for name in _SPECIAL_TOKENS}
    return {name: value[0] if isinstance(value, list) and len(value) == 1 else value for name, value in found.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in sorted(value.items())}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def compare_fields(recorded: dict[str, Any], found: dict[str, Any]) -> list[FieldDifference]:
    """Every field whose value is not the recorded one.

    What a recorded configuration of our own architecture leaves out may be written out, and not the other way round:
    vLLM drops the router's bias where `topk_method` is missing.
    """
    names = [*recorded, *(name for name in found if name not in recorded)]
    pairs = [FieldDifference(name, recorded.get(name), found.get(name)) for name in names]
    return [each for each in pairs if each.recorded != each.found and not _is_written_out(each, recorded)]


def _is_written_out(each: FieldDifference, recorded: dict[str, Any]) -> bool:
    is_silent = each.field in recorded and each.recorded is None
    return is_silent and each.found is not None and each.found == OTHER_ENGINES_READ.get(each.field)
