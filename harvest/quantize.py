"""Quantizing a FLUX pipeline's transformer and T5 by bitsandbytes, on a GPU and on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

QUANTIZATIONS = ("none", "nf4", "int8")
KEPT_WHOLE = {"transformer": ("x_embedder", "context_embedder", "proj_out"), "text_encoder_2": ()}
"""Layers of each quantized part that keep their precision: the transformer's first and last."""


def quantization_config(quantize: str, dtype: torch.dtype) -> Any:
    """Settings with which diffusers quantizes the transformer and T5 while it loads them."""
    from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig
    from transformers import BitsAndBytesConfig as TextConfig

    def settings(kind: Any, part: str) -> Any:
        kept = list(KEPT_WHOLE[part]) or None
        if quantize == "int8":
            return kind(load_in_8bit=True, llm_int8_skip_modules=kept)
        return kind(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=kept,
        )

    return PipelineQuantizationConfig(
        quant_mapping={
            "transformer": settings(BitsAndBytesConfig, "transformer"),
            "text_encoder_2": settings(TextConfig, "text_encoder_2"),
        }
    )


def to_nf4(model: nn.Module, kept: Sequence[str], dtype: torch.dtype) -> None:
    """Put 4-bit linears in the place of a model's own, on a CPU, where diffusers cannot.

    Left as they are: the layers in `kept`, and T5's ``wo``, whose dtype transformers reads.
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
        setattr(model.get_submodule(parent), leaf, small.to("cpu").requires_grad_(False))
