"""Quantizing a FLUX pipeline's transformer and T5 by bitsandbytes, on a GPU and on a CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

QUANTIZATIONS = ("none", "nf4", "int8")
KEPT_WHOLE = {"transformer": ("x_embedder", "context_embedder", "proj_out"), "text_encoder_2": ()}
"""Layers of each quantized part that keep their precision: the transformer's first and last."""


def quantization_config(parts: Mapping[str, str], dtype: torch.dtype) -> dict[str, Any]:
    """Settings with which diffusers and transformers quantize parts of a pipeline while they load them.

    Args:
        parts: `transformer` and `text_encoder_2`, or one of them, to `nf4` or `int8`.
        dtype: precision of the computation.
    """
    from diffusers import BitsAndBytesConfig
    from transformers import BitsAndBytesConfig as TextConfig

    kinds = {"transformer": BitsAndBytesConfig, "text_encoder_2": TextConfig}

    def settings(part: str, quantize: str) -> Any:
        kept = list(KEPT_WHOLE[part]) or None
        if quantize == "int8":
            return kinds[part](load_in_8bit=True, llm_int8_skip_modules=kept)
        return kinds[part](
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=kept,
        )

    return {part: settings(part, quantize) for part, quantize in parts.items()}


def to_nf4(
    model: nn.Module, kept: Sequence[str], dtype: torch.dtype, *, place: str = "cpu"
) -> None:
    """Replace a model's linear layers by 4-bit ones on a CPU, where diffusers cannot.

    Left as they are: the layers in `kept`, and T5's `wo`, whose dtype transformers reads.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    for path, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or path in kept or path.endswith(".wo"):
            continue
        bias = linear.bias is not None
        small: Any = Linear4bit(
            linear.in_features, linear.out_features, bias, compute_dtype=dtype, quant_type="nf4"
        )
        weight: Any = Params4bit  # its arguments are those of __new__, which pyright does not see
        small.weight = weight(linear.weight.data, requires_grad=False, quant_type="nf4")
        small.bias = linear.bias
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, small.to(place).requires_grad_(False))
