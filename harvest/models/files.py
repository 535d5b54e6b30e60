"""Finding a FLUX pipeline's files, in the package, in a folder or on a hub, and loading some of its parts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from harvest.models.parts import MODELS, load_parts
from harvest.models.quantize import KEPT_WHOLE, to_nf4
from harvest.store import first_line

EMBEDDED = Path(__file__).parents[1] / "shapes" / "weights"
"""Folder of the embedded model."""

_SETTINGS = ("*.json", "*.txt", "*.model")
"""Files of a pipeline that are not weights: configurations and tokenizers."""
_WHOLE_FILE = 256 * 2**20
_SAMPLE = 2**20
_SAMPLES = 64


def content_hash(folder: str | Path) -> str:
    """Digest of a pipeline's weights and configuration.

    Every `.safetensors` and `.json` file counts, by its path and content. Of a file over
    256 MiB, its size and 64 evenly spread blocks of 1 MiB count, so that hashing stays fast.

    Args:
        folder: where the pipeline lies.

    Returns:
        SHA-256 in hex.
    """
    folder = Path(folder)
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".json")):
        own, size = hashlib.sha256(), path.stat().st_size
        with path.open("rb") as file:
            if size <= _WHOLE_FILE:
                own.update(file.read())
            else:
                own.update(str(size).encode())
                for i in range(_SAMPLES):
                    file.seek((size - _SAMPLE) * i // (_SAMPLES - 1))
                    own.update(file.read(_SAMPLE))
        total.update(f"{path.relative_to(folder).as_posix()}\0{own.hexdigest()}\n".encode())
    return total.hexdigest()


def find_files(name: str, *, weights: bool = True) -> tuple[Path, str, str | None]:
    """Find a model's folder, display name and revision; fetch it if it is on a hub.

    Args:
        name: as in `harvest.models.load_model`.
        weights: fetch everything; otherwise only settings and tokenizers, a few MB.

    Raises:
        ValueError: there is no such model.
    """
    if name == "shapes":
        if not (EMBEDDED / "model_index.json").is_file():
            raise ValueError(f"expected the embedded model in {EMBEDDED}; install jaxdict again")
        return EMBEDDED, name, None
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ValueError(
                f"expected a pipeline with a model_index.json in {path}, got none; "
                "save one there with pipe.save_pretrained"
            )
        return path, "shapes" if path.samefile(EMBEDDED) else str(path.resolve()), None
    if name.count("/") != 1 or name[0] in "./~":
        raise ValueError(
            f"expected shapes, a pipeline's folder or a hub id (owner/name), got {name!r}"
        )
    from diffusers import FluxPipeline
    from huggingface_hub import snapshot_download

    try:
        fetched = Path(
            FluxPipeline.download(name)
            if weights
            else snapshot_download(name, allow_patterns=list(_SETTINGS))
        )
    except (OSError, ValueError) as error:
        reason = first_line(error.__cause__ or error)  # diffusers hides the hub's own message
        raise ValueError(
            f"expected a model at the hub id {name!r}, but it cannot be fetched ({reason}); check "
            "the name and the network, and log in if the model asks for it"
        ) from error
    return fetched, name, fetched.name


class LoadOptions(NamedTuple):
    """How a pipeline is loaded.

    Attributes:
        quantize: `transformer` and `text_encoder_2` to `none`, `nf4` or `int8`.
        dtype: precision of the computation.
        place: device it computes on.
        offload: as in `harvest.models.load_model`.
        parts: as in `harvest.models.load_model`.
    """

    quantize: Mapping[str, str]
    dtype: torch.dtype
    place: torch.device
    offload: str
    parts: str


def load_pipeline(folder: Path, name: str, options: LoadOptions) -> Any:
    """Load parts of a pipeline and move them to the device.

    Args:
        folder: its files.
        name: what to call it in errors.
        options: which parts, in which precision, and where.

    Returns:
        a `FluxPipeline`; a transformer that is not loaded is on torch's meta device.

    Raises:
        ValueError: this is no FLUX pipeline, or it is incomplete.
    """
    from diffusers import FluxPipeline, FluxTransformer2DModel

    kind = json.loads((folder / "model_index.json").read_text()).get("_class_name")
    if kind != "FluxPipeline":
        raise ValueError(f"expected a FluxPipeline at {name}, got a {kind}; only FLUX.1 is read")
    quantize, dtype, place, offload, parts = options
    left_out = {
        "all": (),
        "text": ("transformer", "vae"),
        "image": ("text_encoder", "text_encoder_2"),
        "none": MODELS,
    }[parts]
    wanted = {part: how for part, how in quantize.items() if part not in left_out and how != "none"}
    try:
        models = load_parts(
            folder,
            [part for part in MODELS if part not in left_out],
            dtype=dtype,
            quantize=wanted if place.type == "cuda" else {},
            bar=None if folder.samefile(EMBEDDED) or parts == "none" else f"loading {name}",
        )
        keywords: dict[str, Any] = dict.fromkeys(left_out) | models
        pipe = FluxPipeline.from_pretrained(str(folder), local_files_only=True, **keywords)
        if "transformer" in left_out:
            config = read_config(folder, "transformer")
            with torch.device("meta"):
                pipe.transformer = FluxTransformer2DModel.from_config(config)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"expected a whole FLUX pipeline at {name}, got: {first_line(error)}"
        ) from error
    if place.type != "cuda":
        for part in wanted:
            to_nf4(getattr(pipe, part), KEPT_WHOLE[part], dtype)
    if offload == "model":
        pipe.enable_model_cpu_offload(device=place)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=place)
    elif "transformer" in left_out:
        for part in ("text_encoder", "text_encoder_2"):
            if getattr(pipe, part) is not None:
                getattr(pipe, part).to(place)
    else:
        pipe.to(place)
    return pipe


def read_config(folder: Path, part: str) -> dict[str, Any]:
    """Settings of a part of the pipeline, from its `config.json`."""
    try:
        return json.loads((folder / part / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"expected settings in {folder / part / 'config.json'}: {error}"
        ) from error
