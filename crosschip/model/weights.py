"""Weights in Hugging Face names, in and out, from one declaration.

`published_views` says, for every tensor of the published layout, which part of which of our parameters it is. Read
from left to right it exports, from right to left it imports: importing copies each tensor into its place, so a
directory loads shard by shard without a second copy of the model in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from crosschip.errors import ModelError
from crosschip.model.config import ModelConfig
from crosschip.model.quantised import (
    FP8_DTYPES,
    QUANTISED_DTYPES,
    Block,
    check_dialect,
    dequantise,
    quantisation_of,
    scale_name,
)
from crosschip.model.transformer import Transformer
from crosschip.rundir import read_json

__all__ = [
    "ADAPTERS",
    "DCP_DIRECTORY",
    "MODEL_PREFIX",
    "TensorView",
    "checkpoint_dtype",
    "exported_tensor",
    "exported_tensors",
    "has_weights",
    "is_training_checkpoint",
    "load_model",
    "load_multiplied_out",
    "own_tensors",
    "published_views",
    "read_config",
]

DCP_DIRECTORY = "dcp"  # of a training checkpoint: its tensors, in our own names, as crosschip.model.dcp reads them
ADAPTERS = "adapters."  # names of `train.adapters` within a model
MODEL_PREFIX = "model."  # there, before the name of a parameter or buffer
_EMBEDDING = "model.embed_tokens.weight"
_SCALES = ("_scale_inv", "_scale")  # after the name of a weight in 8 bits


@dataclass(frozen=True)
class TensorView:
    """Tensor `published` is `ours[index]`; `shared` marks a copy, for other engines, of what stands elsewhere."""

    published: str
    ours: str
    index: tuple[int | slice, ...] = ()
    shared: bool = False


def published_views(config: ModelConfig) -> Iterator[TensorView]:
    """Every tensor of the published layout of this architecture."""
    yield TensorView(_EMBEDDING, "embed_tokens.weight")
    for layer in range(config.num_hidden_layers):
        yield from _block_views(config, layer, f"layers.{layer}")
    for index in range(config.num_nextn_predict_layers):
        layer = config.num_hidden_layers + index
        ours, theirs = f"mtp.{index}", f"model.layers.{layer}"
        for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm"):
            yield TensorView(f"{theirs}.{name}.weight", f"{ours}.{name}.weight")
        yield from _block_views(config, layer, ours)
        yield TensorView(f"{theirs}.embed_tokens.weight", "embed_tokens.weight", shared=True)
        yield TensorView(f"{theirs}.shared_head.head.weight", "lm_head.weight", shared=True)
    yield TensorView("model.norm.weight", "norm.weight")
    yield TensorView("lm_head.weight", "lm_head.weight", shared=config.tie_word_embeddings)


def _block_views(config: ModelConfig, layer: int, ours: str) -> Iterator[TensorView]:
    theirs = f"model.layers.{layer}"
    names = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    query = ("q_proj",) if config.q_lora_rank is None else ("q_a_proj", "q_a_layernorm", "q_b_proj")
    attention = (*query, "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
    names += [f"self_attn.{name}.weight" for name in attention]
    if config.attention_bias:
        biased = {"q_a_proj", "kv_a_proj_with_mqa", "o_proj"} & set(attention)
        names += [f"self_attn.{name}.bias" for name in sorted(biased)]
    if not config.is_moe_layer(layer):
        names += [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    else:
        names += ["mlp.gate.weight", "mlp.gate.e_score_correction_bias"]
        if config.n_shared_experts:
            names += [f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")]
        inner = config.moe_intermediate_size
        for expert in range(config.n_routed_experts):
            prefix, stack = f"{theirs}.mlp.experts.{expert}", f"{ours}.mlp.experts"
            yield TensorView(f"{prefix}.gate_proj.weight", f"{stack}.gate_up_proj", (expert, slice(0, inner)))
            yield TensorView(f"{prefix}.up_proj.weight", f"{stack}.gate_up_proj", (expert, slice(inner, None)))
            yield TensorView(f"{prefix}.down_proj.weight", f"{stack}.down_proj", (expert,))
    for name in names:
        yield TensorView(f"{theirs}.{name}", f"{ours}.{name}")


def read_config(directory: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The configuration in `directory`, parsed, and as the document it was."""
    if not (directory / "config.json").is_file():
        raise ModelError(
            f"{directory} has no config.json",
            "give a model directory in Hugging Face layout (config.json and *.safetensors)",
        )
    document = read_json(directory / "config.json")
    try:
        return ModelConfig.from_hf(document), document
    except ModelError as error:
        raise type(error)(f"{directory}: {error.problem}", error.remedy) from None


def is_training_checkpoint(directory: Path) -> bool:
    """Whether a model directory holds its weights as training saves them; else they are safetensors."""
    return (directory / DCP_DIRECTORY).is_dir()


def has_weights(directory: Path) -> bool:
    """Whether a model directory holds weights that `load_model` reads, and not a configuration alone."""
    return is_training_checkpoint(directory) or any(directory.glob("*.safetensors"))


def own_tensors(model: Transformer) -> dict[str, Tensor]:
    """The model's parameters and buffers under our own names, each once: a tied output matrix is the embedding.

    Adapters are left out: the weights hold what they have learnt.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen and not name.startswith(ADAPTERS):
            seen.add(id(tensor))
            found[name] = tensor.detach()
    return found


class _Shards:
    """The safetensors files of a directory, read tensor by tensor. Few are open at once: an open file stays mapped."""

    _MOST_OPEN = 2  # an FP8 weight and its scales may lie in two files

    def __init__(self, directory: Path) -> None:
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{directory} has no *.safetensors file", "convert the weights to safetensors first")
        self.names_of: dict[Path, list[str]] = {}
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        self.used_scales: set[str] = set()
        for file in files:
            self.names_of[file] = list(self._opened(file).keys())
            for name in self.names_of[file]:
                if name in self._file_of:
                    raise ModelError(
                        f"{name} is in both {self._file_of[name].name} and {file.name} of {directory}",
                        "remove the files of the other conversion",
                    )
                self._file_of[name] = file

    def _opened(self, file: Path) -> Any:
        if file not in self._open:
            try:
                opened = safe_open(file, framework="pt")
            except Exception as error:  # safetensors raises its own type for a cut or damaged header
                raise ModelError(
                    f"{file} cannot be read as safetensors: {error}", "copy or download it again"
                ) from None
            while len(self._open) >= self._MOST_OPEN:
                del self._open[next(iter(self._open))]
            self._open[file] = opened
        return self._open[file]

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def get(self, name: str) -> Tensor:
        tensor: Tensor = self._opened(self._file_of[name]).get_tensor(name)
        return tensor

    def weight(self, name: str, block: Block) -> Tensor:
        """The tensor, weights in 8 bits multiplied out with their scales."""
        tensor = self.get(name)
        if tensor.dtype not in QUANTISED_DTYPES:
            return tensor
        scale = scale_name(name, tensor.dtype)
        if scale not in self:
            raise ModelError(
                f"{name} is {tensor.dtype} but {scale} is missing",
                "without its scales the weight means nothing: convert the model again",
            )
        self.used_scales.add(scale)
        if tensor.dtype in FP8_DTYPES:
            check_dialect(name, tensor)
        return dequantise(name, tensor, self.get(scale), block)


def checkpoint_dtype(directory: Path) -> torch.dtype:
    """The dtype in which `load_model` leaves a directory unless told: its embedding's, whatever the other weights are
    stored in; bf16 where the embedding is in 8 bits itself.

    Raises:
        ModelError: the files cannot be read, or hold no embedding.
    """
    return torch.float32 if is_training_checkpoint(directory) else _embedding_dtype(_open_shards(directory))


def _open_shards(directory: Path) -> _Shards:
    shards = _Shards(directory)
    if _EMBEDDING not in shards:
        raise ModelError(f"{directory} has no tensor {_EMBEDDING}", "this is not a complete model of this architecture")
    return shards


def _embedding_dtype(shards: _Shards) -> torch.dtype:
    dtype = shards.get(_EMBEDDING).dtype
    return torch.bfloat16 if dtype in QUANTISED_DTYPES else dtype if dtype.is_floating_point else torch.float32


def load_model(directory: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Transformer:
    """Load a published directory of this architecture, or one of ours; `dtype` None keeps the checkpoint's.

    Peak memory is the model and one tensor. Missing, surplus, doubled or misshapen tensors are a `ModelError`.
    """
    config, document = read_config(directory)
    if is_training_checkpoint(directory):
        return _load_training_checkpoint(directory, config, dtype or torch.float32, device)
    shards = _open_shards(directory)
    with torch.device("meta"):
        model = Transformer(config)
    quantisation = quantisation_of(document)
    _materialise(model, dtype or _embedding_dtype(shards), device)
    _fill(model, shards, quantisation.block if quantisation else (128, 128), directory)
    return model


def load_multiplied_out(directory: Path, dtype: torch.dtype | None, device: torch.device | str = "cpu") -> Transformer:
    """As `load_model` in the files' own dtype, but weights in 8 bits are multiplied out into `dtype` unless it is None.

    In the embedding's dtype, mostly bf16, the products with the scales would be rounded once more.
    """
    _, document = read_config(directory)
    return load_model(directory, dtype if quantisation_of(document) else None, device)


def _load_training_checkpoint(
    directory: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device | str
) -> Transformer:
    from crosschip.model.dcp import read_index, read_into  # takes a second, and most directories are not of this kind

    with torch.device("meta"):
        model = Transformer(config)
    _materialise(model, dtype, device)
    wanted = {f"{MODEL_PREFIX}{name}": tensor for name, tensor in own_tensors(model).items()}
    found = {name: entry for name, entry in read_index(directory).items() if name.startswith(MODEL_PREFIX)}
    if differing := sorted(wanted.keys() ^ found.keys()):
        raise ModelError(
            f"{directory}: the tensors are not those that config.json means; the first: {differing[0]}",
            "config.json is another model's; take another checkpoint of the run",
        )
    for name, tensor in wanted.items():
        if found[name].size != tensor.shape:
            raise ModelError(
                f"{directory}: {name} has shape {tuple(found[name].size)}, config.json means {tuple(tensor.shape)}",
                "config.json and weights are not of one model",
            )
    read_into(directory, wanted)
    return model


def _materialise(model: Transformer, dtype: torch.dtype, device: torch.device | str) -> None:
    """Give the parameters of a model on the meta device uninitialised memory; router biases stay fp32."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=dtype, device=device)
                module._parameters[name] = torch.nn.Parameter(empty)
    for router in model.routers():
        router.e_score_correction_bias = torch.empty(
            router.e_score_correction_bias.shape, dtype=torch.float32, device=device
        )
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight


@torch.no_grad()
def _fill(model: Transformer, shards: _Shards, block: Block, directory: Path) -> None:
    views = {view.published: view for view in published_views(model.config)}
    missing = [name for name, view in views.items() if name not in shards and not view.shared]
    if missing:
        raise ModelError(
            f"{directory} lacks {len(missing)} tensors, the first: {', '.join(missing[:4])}",
            "the conversion or download is incomplete, or config.json is another model's",
        )
    state = model.state_dict(keep_vars=True)
    for name in _known_names(shards, views, model.config, directory):
        view, tensor = views[name], shards.weight(name, block)
        place = state[view.ours].detach()[view.index]
        if tensor.shape != place.shape:
            raise ModelError(
                f"{directory}: {name} has shape {tuple(tensor.shape)}, config.json means {tuple(place.shape)}",
                "config.json and weights are not of one model",
            )
        if not view.shared:
            place.copy_(tensor)
    for name, view in views.items():
        if view.shared and name in shards:
            _check_shared(name, shards.weight(name, block), state[view.ours].detach(), directory)
    _check_scales(shards, views, directory)


def _check_shared(name: str, copy: Tensor, original: Tensor, directory: Path) -> None:
    if not torch.equal(copy.to(original.device, original.dtype), original):
        raise ModelError(
            f"{directory}: {name} differs from the tensor it should be a copy of",
            "this engine shares the two; use another engine for this model",
        )


def _check_scales(shards: _Shards, views: dict[str, TensorView], directory: Path) -> None:
    """A scale that was not used belongs to a weight that is in 8 bits no longer: nobody knows whether it counts."""
    for name in (name for names in shards.names_of.values() for name in names):
        weight = next((name.removesuffix(end) for end in _SCALES if name.endswith(end)), None)
        if weight in views and name not in shards.used_scales:
            raise ModelError(
                f"{directory} holds {name}, and {weight} is not in 8 bits",
                "the files are of two conversions: convert the model again",
            )


def _known_names(shards: _Shards, views: dict[str, TensorView], config: ModelConfig, directory: Path) -> Iterator[str]:
    """The names to load, file by file; a name that means nothing here is an error."""
    past_the_end = f"model.layers.{config.num_hidden_layers}."
    for names in shards.names_of.values():
        for name in names:
            if name in views:
                yield name
            elif name.endswith("rotary_emb.inv_freq"):
                continue
            elif name.endswith(_SCALES) and name.rpartition("_scale")[0] in shards:
                continue  # read with its weight
            elif name.startswith(past_the_end) and not config.num_nextn_predict_layers:
                continue  # a multi-token-prediction module that config.json switches off
            else:
                raise ModelError(
                    f"{directory} holds {name}, which this architecture does not have",
                    "config.json is another model's, or the conversion left something over",
                )


def exported_tensors(model: Transformer, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Tensor]]:
    """What `save_model` writes, tensor by tensor, without a file."""
    state = model.state_dict(keep_vars=True)
    for view in published_views(model.config):
        yield view.published, exported_tensor(state, view, dtype)


def exported_tensor(state: dict[str, Any], view: TensorView, dtype: torch.dtype) -> Tensor:
    """The published tensor of a view, cut out of a model's `state`; router biases are always fp32."""
    tensor: Tensor = state[view.ours].detach()[view.index]
    kept = torch.float32 if view.ours.endswith("e_score_correction_bias") else dtype
    return tensor.to("cpu", kept).clone(memory_format=torch.contiguous_format)
