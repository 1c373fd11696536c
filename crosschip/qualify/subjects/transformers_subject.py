"""Any architecture that transformers knows as a subject, from its configuration with random weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from crosschip.errors import QualifyError
from crosschip.qualify.finding import Role
from crosschip.qualify.subjects.causal_lm import CausalLMWorkload
from crosschip.qualify.subjects.config_cuts import (
    SPECIAL_TOKENS,
    cut_document,
    cuts_to_fit,
    differences,
    small_cuts,
)
from crosschip.qualify.subjects.fitting import BYTES_PER_PARAMETER, most_bytes_to_train
from crosschip.qualify.subjects.made_tokens import random_tokens
from crosschip.qualify.subjects.module_workload import ModuleWorkload
from crosschip.qualify.subjects.subject import DtypeSetting, Workload

__all__ = ["TransformersSubject", "load_transformers_subject"]


@dataclass(frozen=True)
class TransformersSubject:
    """An architecture of transformers; `document` is its config.json."""

    name: str
    origin: str
    document: dict[str, Any]
    dtype: DtypeSetting
    notes: list[str] = field(default_factory=list)

    def dtype_setting(self, role: Role) -> DtypeSetting:
        """The published dtype for serving, for training what the chip is fast in."""
        return self.dtype if role == "serve" else "auto"

    def workload(self, device: torch.device, dtype: torch.dtype, seed: int = 0, small: bool = False) -> Workload:
        """The model on a device; weights are in the compute dtype, as transformers' own modules do not cast them.

        Raises:
            QualifyError: transformers cannot build it, or it does not fit.
        """
        config, notes = self._small_config if small else self._fitted_config()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _build(config, self.origin)
        if _is_causal_lm(config):
            return CausalLMWorkload(model, device, dtype, seed, self.origin, small, [*self.notes, *notes])
        inputs = _inputs(config, model, 4 if small else 8, seed, self.origin)
        workload = ModuleWorkload(model, inputs, device, dtype, self.origin, small)
        workload.notes = [*self.notes, *notes, *workload.notes]
        return workload

    def _fitted_config(self) -> tuple[Any, list[str]]:
        """The configuration with as many layers and experts as the host's memory can train."""
        limit = most_bytes_to_train()
        changed: dict[str, Any] = {}
        for cut in cuts_to_fit(self.document, _own_names(self.document)):
            try:
                config = _config(cut_document(self.document, changed | cut), self.origin)
                num_parameters = _num_parameters(config, self.origin)
            except QualifyError:
                continue  # parts that do not match then; uncut it was built before
            changed |= cut
            if BYTES_PER_PARAMETER * num_parameters <= limit:
                return config, differences(self.document, changed)
        raise QualifyError(
            f"one layer of {self.origin} still needs more than {limit / 2**30:.1f} GiB to train, which is what qualify "
            "uses of this machine's memory",
            "use a machine with more memory, or a config.json with smaller widths",
        )

    @cached_property
    def _small_config(self) -> tuple[Any, list[str]]:
        """Two layers, narrow where that gives a model that transformers can build and that runs."""
        for changed in small_cuts(self.document, _own_names(self.document)):
            try:
                config = _config(cut_document(self.document, changed), self.origin)
                _run_once(config, self.origin)
            except Exception:  # whatever an architecture's own code raises where its parts do not match
                continue
            return config, differences(self.document, changed)
        return self._fitted_config()


def load_transformers_subject(
    path: Path, origin: str, document: dict[str, Any], dtype: DtypeSetting
) -> TransformersSubject:
    """A subject for a configuration that transformers knows; built once on paper, so that mistakes show at once.

    Raises:
        QualifyError: transformers does not know it, or it needs code of its own.
    """
    kept = {name: value for name, value in document.items() if name not in ("quantization_config", "auto_map")}
    notes = ["computed without the quantisation that config.json names"] if "quantization_config" in document else []
    if any(file.suffix in (".safetensors", ".bin") for file in path.iterdir()):
        notes.append("weights are random: those that lie in the directory are not read")
    config = _config(kept, origin)
    _num_parameters(config, origin)
    # An architecture has special tokens of its own, which may lie beyond a vocabulary that is cut.
    tokens = {name: getattr(config, name) for name in SPECIAL_TOKENS if getattr(config, name, None) is not None}
    return TransformersSubject(path.resolve().name, origin, tokens | kept, dtype, notes)


def _own_names(document: dict[str, Any]) -> dict[str, str]:
    """What the architecture calls the fields that most share."""
    from transformers import CONFIG_MAPPING

    return dict(CONFIG_MAPPING[document["model_type"]].attribute_map)


def _config(document: dict[str, Any], origin: str) -> Any:
    from transformers import CONFIG_MAPPING

    kind = str(document.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise QualifyError(
            f"transformers does not know the model_type {kind!r} of {origin}, and code beside a model is never run",
            "install a transformers that knows it, or give package.module:function that returns the module",
        )
    try:
        config = CONFIG_MAPPING[kind].from_dict(dict(document))
        for name, value in vars(config).items():
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)  # chips draw other random numbers
        # One expert after the other, as on the CPU: the grouped product has kernels on few chips.
        config._experts_implementation = "eager"
        return config
    except Exception as error:  # whatever a configuration's own checks raise
        raise QualifyError(
            f"transformers refuses config.json of {origin}: {type(error).__name__}: {error}", "mend config.json"
        ) from error


def _is_causal_lm(config: Any) -> bool:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, ""))
    known = {kind} if kind.endswith("LMHeadModel") else set()  # as GPT-2's is called
    named = getattr(config, "architectures", None) or []
    return (
        type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        and all(name.endswith("ForCausalLM") or name in known for name in named)
        and not getattr(config, "is_encoder_decoder", False)
    )


def _build(config: Any, origin: str) -> torch.nn.Module:
    """The model in fp32 on the current default device."""
    from transformers import AutoModel, AutoModelForCausalLM

    kind = AutoModelForCausalLM if _is_causal_lm(config) else AutoModel
    try:
        model: torch.nn.Module = kind.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    except Exception as error:  # whatever an architecture's own code raises
        raise QualifyError(
            f"transformers cannot build the model of {origin}: {type(error).__name__}: {error}",
            "mend config.json, or give package.module:function that returns the module",
        ) from error
    return model


def _num_parameters(config: Any, origin: str) -> int:
    with torch.device("meta"):
        model = _build(config, origin)
    return sum(parameter.numel() for parameter in model.parameters())


def _run_once(config: Any, origin: str) -> None:
    """One forward of the model on few inputs, for what it raises."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = _build(config, origin).eval()
        if _is_causal_lm(config):
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64))
        else:
            model(**_inputs(config, model, 1, 0, origin))


def _inputs(config: Any, model: torch.nn.Module, rows: int, seed: int, origin: str) -> dict[str, torch.Tensor]:
    """Made inputs for a model that is no causal language model: token ids or pictures."""
    wanted = getattr(model, "main_input_name", None)
    if wanted == "input_ids" and hasattr(config, "vocab_size"):
        length = min(128, int(getattr(config, "max_position_embeddings", 128) or 128) - 2)
        inputs = {"input_ids": random_tokens(config.vocab_size, rows, length, seed)}
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = random_tokens(config.vocab_size, rows, length, seed + 1)
        return inputs
    size = getattr(config, "image_size", None)
    if wanted == "pixel_values" and size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        generator = torch.Generator().manual_seed(seed)
        shape = rows, getattr(config, "num_channels", 3), height, width
        return {"pixel_values": torch.randn(shape, generator=generator)}
    raise QualifyError(
        f"nobody here can make inputs for {type(config).__name__} of {origin} (its main input is {wanted!r})",
        "give package.module:function that returns the module and its inputs",
    )
