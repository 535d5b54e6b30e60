"""Loading the models of a pipeline one by one, and refusing one whose files lack weights."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from harvest.models.quantize import quantization_config

MODELS = ("text_encoder", "text_encoder_2", "transformer", "vae")
"""Parts of a FLUX pipeline that have weights."""


def load_parts(
    folder: Path,
    names: Iterable[str],
    *,
    dtype: torch.dtype,
    quantize: Mapping[str, str],
    bar: str | None = None,
) -> dict[str, Any]:
    """Load some of a pipeline's models.

    Args:
        folder: the pipeline's files.
        names: which of `MODELS`.
        dtype: precision of the computation.
        quantize: parts that bitsandbytes quantizes while they load, to `nf4` or `int8`.
        bar: name of a progress bar over the parts, shown on a terminal; None for no bar.

    Returns:
        part -> model; a part that the pipeline's `model_index.json` does not name is left out.

    Raises:
        ValueError: a part's files lack weights or have them in other shapes.
        OSError: a part's files are missing.
    """
    index = json.loads((folder / "model_index.json").read_text())
    there = [name for name in names if all(index.get(name) or [None])]
    settings = quantization_config(quantize, dtype) if quantize else {}
    loaded = {}
    hidden = True if bar is None else None  # None: hidden where there is no terminal
    for name in tqdm(there, desc=bar, unit="part", disable=hidden, leave=False):
        library, kind = index[name]
        keywords: dict[str, Any] = {_dtype_key(library): dtype, "local_files_only": True}
        if name in settings:
            keywords["quantization_config"] = settings[name]
        loader = getattr(importlib.import_module(library), kind)
        loaded[name] = _load(loader, folder / name, keywords)
    return loaded


def _load(loader: Any, folder: Path, keywords: dict[str, Any]) -> Any:
    try:
        model, info = loader.from_pretrained(str(folder), output_loading_info=True, **keywords)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"weights of {folder.name} in {folder} have other shapes than its config.json says; "
            "fetch or save the model again"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(
            f"{len(missing)} weights of {folder.name} are not in its files in {folder} ({some}) and "
            "would be random; fetch or save the model again, or install the versions it was saved with"
        )
    return model


def _dtype_key(library: str) -> str:
    """What a library calls the precision."""
    from diffusers import __version__

    return "torch_dtype" if library == "diffusers" and __version__.startswith("0.") else "dtype"
