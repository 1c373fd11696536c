"""The architecture's numbers, under the field names of DeepSeek-V3's `config.json`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from crosschip.errors import BrokenConfigError, ModelError

if TYPE_CHECKING:
    from crosschip.recipe import ModelSettings

__all__ = ["ModelConfig", "config_from_settings"]

# The one value of each field that this code computes; another one changes numbers, so it is refused by name.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
    "attention_dropout": (0, 0.0, None),
}


# What shapes the weights: published files and those of transformers always say it, and a file that is silent is cut.
_NEEDED = (
    *("vocab_size", "num_attention_heads", "hidden_size", "intermediate_size", "num_hidden_layers", "kv_lora_rank"),
    *("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "max_position_embeddings"),
)
_NEEDED_OF_EXPERTS = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
_AT_LEAST_ONE = (
    *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "kv_lora_rank"),
    *("q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "max_position_embeddings"),
)
_AT_LEAST_ZERO = ("num_nextn_predict_layers", "n_shared_experts", "first_k_dense_replace")
_YARN_OPTIONAL = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor")


@dataclass(frozen=True)
class ModelConfig:
    """DeepSeek-V3 architecture; the defaults are small. See the fields' meaning in arXiv 2412.19437, section 2.1."""

    vocab_size: int
    hidden_size: int = 256
    intermediate_size: int = 768
    moe_intermediate_size: int = 256
    num_hidden_layers: int = 4
    num_nextn_predict_layers: int = 0
    num_attention_heads: int = 4
    n_shared_experts: int = 1
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    first_k_dense_replace: int = 1
    kv_lora_rank: int = 64
    q_lora_rank: int | None = None
    qk_rope_head_dim: int = 32
    qk_nope_head_dim: int = 32
    v_head_dim: int = 32
    max_position_embeddings: int = 1024
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None  # YaRN's fields, `type` or `rope_type` = "yarn"
    rope_interleave: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head: the part without position and the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Numbers cached per token and layer: the latent and the shared rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """Layers with routed experts, the multi-token-prediction modules included."""
        return sum(map(self.is_moe_layer, range(self.num_hidden_layers + self.num_nextn_predict_layers)))

    @property
    def num_main_moe_layers(self) -> int:
        """Layers with routed experts, without those of the multi-token-prediction modules."""
        return sum(map(self.is_moe_layer, range(self.num_hidden_layers)))

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` has routed experts; the multi-token-prediction modules follow the last layer."""
        return layer >= self.first_k_dense_replace

    @classmethod
    def from_hf(cls, document: dict[str, Any]) -> ModelConfig:
        """Read a `config.json`, of transformers 4 or 5 or as published; refuse what this code does not compute."""
        if not isinstance(document, dict):
            raise BrokenConfigError(f"config.json holds a {type(document).__name__}, no object", "mend config.json")
        _refuse_others(document)
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in document.items() if key in known and value is not None}
        values["q_lora_rank"] = document.get("q_lora_rank")
        try:
            values["rope_theta"], values["rope_scaling"] = _read_rope(document)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise BrokenConfigError(
                f"the config fields of rotary embeddings make no sense: {type(error).__name__}: {error}",
                "mend rope_theta, rope_scaling or rope_parameters in config.json",
            ) from None
        values["n_shared_experts"] = document.get("n_shared_experts") or 0
        if isinstance(document.get("eos_token_id"), list):
            values["eos_token_id"] = tuple(document["eos_token_id"])
        _check_types(values)
        config = cls(**{**_PUBLISHED_DEFAULTS, **values})
        if config.num_moe_layers:
            _refuse_gaps(document, _NEEDED_OF_EXPERTS)
        _check_relations(config)
        return config

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """The complete `config.json`: what transformers reads and the fields that only other engines ask for.

        vLLM drops the router bias without `topk_method` and `scoring_func`, and ignores tied embeddings for this
        architecture, so the output matrix is always written out and `tie_word_embeddings` is false.
        """
        document = asdict(self)
        if isinstance(self.eos_token_id, tuple):
            document["eos_token_id"] = list(self.eos_token_id)
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            **document,
            "tie_word_embeddings": False,
            "num_key_value_heads": self.num_attention_heads,
            "rope_parameters": {"rope_type": "default", **(self.rope_scaling or {}), "rope_theta": self.rope_theta},
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "moe_layer_freq": 1,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "use_cache": True,
            "torch_dtype": dtype,
        }


def _refuse_others(document: dict[str, Any]) -> None:
    """Refuse another architecture, a variant that is not computed here, and a file without its first fields."""
    if document.get("model_type", "deepseek_v3") != "deepseek_v3":
        raise ModelError(
            f"model_type is {document['model_type']!r}, this engine runs 'deepseek_v3'",
            "use a model of the DeepSeek-V3 architecture, or another engine for this one",
        )
    for field, allowed in _ONLY.items():
        if field in document and document[field] not in allowed:
            raise ModelError(
                f"config field {field} = {document[field]!r}; only {allowed[0]!r} is computed here",
                "use another engine for this model",
            )
    _refuse_gaps(document, _NEEDED)
    if document.get("num_key_value_heads") not in (document["num_attention_heads"], None):
        raise ModelError(
            f"num_key_value_heads = {document['num_key_value_heads']} differs from "
            f"num_attention_heads = {document['num_attention_heads']}",
            "latent attention has one key per query head; check config.json",
        )


def _refuse_gaps(document: dict[str, Any], needed: tuple[str, ...]) -> None:
    missing = [name for name in needed if document.get(name) is None]
    if missing:
        raise BrokenConfigError(f"config.json has no field {missing[0]!r}, or null in it", "complete the file")


@cache
def _kinds() -> dict[str, tuple[Any, TypeAdapter[Any]]]:
    """Each field's annotation and what checks a value against it, which takes its time to be made."""
    return {name: (hint, TypeAdapter(hint)) for name, hint in get_type_hints(ModelConfig).items()}


def _check_types(values: dict[str, Any]) -> None:
    """Refuse what a `config.json` written by hand may hold, such as a number in quotes, by its field."""
    kinds = _kinds()
    for name, value in values.items():
        hint, kind = kinds[name]
        try:
            kind.validate_python(value, strict=True)
        except ValidationError:
            wanted = str(hint).removeprefix("<class '").removesuffix("'>")
            raise BrokenConfigError(f"config field {name} = {value!r} is no {wanted}", "mend config.json") from None
        least = 1 if name in _AT_LEAST_ONE else 0 if name in _AT_LEAST_ZERO else None
        if least is not None and value is not None and value < least:
            raise BrokenConfigError(f"config field {name} = {value!r} is below {least}", "mend config.json")


def _check_relations(config: ModelConfig) -> None:
    """Refuse fields that contradict one another; those of experts only where a layer has some."""
    experts, groups = config.n_routed_experts, config.n_group
    if config.qk_rope_head_dim % 2:
        wrong = f"qk_rope_head_dim = {config.qk_rope_head_dim} is odd, and rotations turn pairs"
    elif not config.num_moe_layers:
        return
    elif config.topk_group > groups:
        wrong = f"topk_group = {config.topk_group} is more than n_group = {groups}"
    elif config.num_experts_per_tok > experts:
        wrong = f"num_experts_per_tok = {config.num_experts_per_tok} is more than n_routed_experts = {experts}"
    elif experts % groups:
        wrong = f"n_group = {groups} does not divide n_routed_experts = {experts}"
    elif groups > 1 and experts < 2 * groups:
        wrong = f"n_group = {groups} leaves one expert a group, and groups are ranked by their two best"
    elif config.num_experts_per_tok > experts // groups * config.topk_group:
        held = f"the {experts // groups * config.topk_group} experts of topk_group groups"
        wrong = f"num_experts_per_tok = {config.num_experts_per_tok} is more than {held}"
    else:
        return
    raise BrokenConfigError(f"config field {wrong}", "mend config.json")


# What transformers and the published code assume where config.json is silent.
_PUBLISHED_DEFAULTS: dict[str, Any] = {"n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-6, "first_k_dense_replace": 0}


def _read_rope(document: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """theta and the YaRN fields, from `rope_theta` + `rope_scaling` (4) or `rope_parameters` (5)."""
    parameters = dict(document.get("rope_parameters") or {})
    scaling = dict(document.get("rope_scaling") or {})
    theta = _read_theta(document, parameters.pop("rope_theta", None), scaling.pop("rope_theta", None))
    chosen = scaling or parameters
    kind = chosen.pop("rope_type", None) or chosen.pop("type", None) or "default"
    chosen.pop("type", None)
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise ModelError(f"rope type {kind!r} is not known here", "default and yarn are; use another engine")
    place, length = "rope_scaling" if scaling else "rope_parameters", "original_max_position_embeddings"
    chosen.setdefault(length, document.get("max_position_embeddings"))
    _check_number(f"{place}.{length}", chosen[length], can_be_zero=False)
    if "factor" not in chosen:
        chosen["factor"] = document["max_position_embeddings"] / chosen[length]
    _check_number(f"{place}.factor", chosen["factor"], can_be_zero=False)
    for name in _YARN_OPTIONAL:
        if chosen.get(name) is not None:
            _check_number(f"{place}.{name}", chosen[name])
    return theta, {"type": "yarn", "rope_type": "yarn", **chosen}


def _read_theta(document: dict[str, Any], of_parameters: Any, of_scaling: Any) -> float:
    """The base of the rotations, from wherever it stands; 10,000 where it stands nowhere."""
    nested = {"rope_parameters.rope_theta": of_parameters, "rope_scaling.rope_theta": of_scaling}
    given = {name: value for name, value in nested.items() if value is not None}
    if "rope_theta" in document:
        given["rope_theta"] = document["rope_theta"]
    for name, value in given.items():
        _check_number(name, value, can_be_zero=False)
    theta = next(iter(given.values()), 10000.0)
    if given.get("rope_theta", theta) != theta:
        raise ModelError(
            f"rope_theta = {given['rope_theta']} but rope_parameters says {theta}",
            "make the two fields of config.json agree",
        )
    return float(theta)


def _check_number(name: str, value: Any, can_be_zero: bool = True) -> None:
    """Refuse a rotary field that is no finite number above 0, or from 0 on."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value < math.inf or (value == 0 and not can_be_zero):
        wanted = "number from 0 on" if can_be_zero else "number above 0"
        raise BrokenConfigError(
            f"config field {name} = {value!r} of the rotary embeddings is no {wanted}", "write one, without quotes"
        )


def config_from_settings(
    settings: ModelSettings,
    vocab_size: int,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> ModelConfig:
    """The configuration that a recipe's `[model]` table describes."""
    values = settings.model_dump(exclude={"directory"})
    if values["rope_scaling"] is not None:
        _, values["rope_scaling"] = _read_rope(values)
    return ModelConfig(
        vocab_size=vocab_size, bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id, **values
    )
