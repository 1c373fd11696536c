"""The DeepSeek-V3 architecture in plain PyTorch."""

from crosschip.model.config import ModelConfig, config_from_settings
from crosschip.model.decoder import Decoder, LatentCache, generate
from crosschip.model.saving import save_model
from crosschip.model.transformer import LossParts, TokenLogprobs, Transformer, init_weights
from crosschip.model.weights import checkpoint_dtype, load_model, load_multiplied_out, read_config

__all__ = [
    "Decoder",
    "LatentCache",
    "LossParts",
    "ModelConfig",
    "TokenLogprobs",
    "Transformer",
    "checkpoint_dtype",
    "config_from_settings",
    "generate",
    "init_weights",
    "load_model",
    "load_multiplied_out",
    "read_config",
    "save_model",
]
