"""Loading a FLUX pipeline: the embedded one, a folder's or a hub's, quantized if asked."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harvest.quantize import KEPT_WHOLE, QUANTIZATIONS, quantization_config, to_nf4

EMBEDDED = Path(__file__).parent / "shapes" / "weights"
"""Folder of the embedded model."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_WHOLE_FILE = 256 * 2**20
_SAMPLE = 2**20
_SAMPLES = 64


@dataclass(frozen=True)
class LoadedModel:
    """A pipeline and what a harvest has to know of it.

    Args:
        pipe: A ``diffusers.FluxPipeline``.
        name: What it was asked for by; ``load_model(name)`` gives it again.
        info: Name, revision, quantization, dtype, device, sha256, blocks; JSON-able.
        steps: Denoising steps by default.
        size: (height, width) of a picture by default, in pixels.
        max_sequence_length: Length of the text by default, in T5 tokens.
        guidance: Guidance scale by default.
        judge: Reads a picture's true attributes back (uint8 [H, W, 3] to
            ``harvest.shapes.check.Reading``); None but for the embedded model.
    """

    pipe: Any
    name: str
    info: dict[str, Any]
    steps: int
    size: tuple[int, int]
    max_sequence_length: int
    guidance: float
    judge: Callable[[np.ndarray], Any] | None

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        size: tuple[int, int] | None = None,
        max_sequence_length: int | None = None,
        guidance: float | None = None,
    ) -> np.ndarray:
        """Make one picture for each prompt, in one batch.

        Args:
            prompts: Texts.
            seeds: Seed of each picture's noise, which depends on nothing else.
            steps: Denoising steps; None for the model's own, as in what follows.
            size: (height, width) in pixels.
            max_sequence_length: Length of the text in T5 tokens.
            guidance: Guidance scale.

        Returns:
            uint8 [n, height, width, 3].

        Raises:
            ValueError: If there are not as many seeds as prompts.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"expected a seed a prompt, got {len(prompts)} and {len(seeds)}")
        height, width = size or self.size
        made = self.pipe(
            list(prompts),
            height=height,
            width=width,
            num_inference_steps=steps or self.steps,
            guidance_scale=self.guidance if guidance is None else guidance,
            max_sequence_length=max_sequence_length or self.max_sequence_length,
            generator=[torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds],
            output_type="np",
        ).images
        shades = np.nan_to_num(np.asarray(made, np.float32) * 255, nan=0.0)  # NaN would be noise
        return np.rint(shades).astype(np.uint8)

    def grid(self, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Image tokens of a picture as (h, w): a token is 2 x 2 latents.

        Raises:
            ValueError: If a side is not a whole number of tokens.
        """
        height, width = size or self.size
        side = self.pipe.vae_scale_factor * 2
        if height % side or width % side or not height or not width:
            raise ValueError(
                f"expected a height and width in multiples of {side} pixels, got {height}x{width}"
            )
        return height // side, width // side

    def schedule(
        self, steps: int | None = None, size: tuple[int, int] | None = None
    ) -> tuple[list[float], list[float]]:
        """What the pipeline's scheduler will do.

        Args:
            steps: Denoising steps.
            size: (height, width) in pixels; FLUX.1-dev shifts its noise levels by it.

        Returns:
            Noise level (sigma, in [0, 1]) and timestep at the start of each step.
        """
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

        scheduler, steps = self.pipe.scheduler, steps or self.steps
        config = scheduler.config
        height, width = self.grid(size)
        shift = calculate_shift(
            height * width,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        sigmas = None if config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)
        if sigmas is None:
            retrieve_timesteps(scheduler, steps, "cpu", mu=shift)
        else:
            retrieve_timesteps(scheduler, steps, "cpu", sigmas=sigmas.tolist(), mu=shift)
        return scheduler.sigmas[:-1].tolist(), scheduler.timesteps.tolist()

    def words(
        self, prompts: Sequence[str], max_sequence_length: int | None = None
    ) -> list[list[str]]:
        """Text tokens of each prompt as T5 pieces, cut or padded to the length of the text."""
        tokenizer = self.pipe.tokenizer_2
        batch = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=max_sequence_length or self.max_sequence_length,
            truncation=True,
        )
        return [tokenizer.convert_ids_to_tokens(ids) for ids in batch.input_ids]


def load_model(
    name: str,
    *,
    quantize: str = "none",
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
) -> LoadedModel:
    """Load a FLUX pipeline.

    Args:
        name: ``shapes`` (the embedded model, never from the network), a folder, or a hub id such as
            ``black-forest-labs/FLUX.1-schnell``.
        quantize: ``none``, ``nf4`` or ``int8``: the transformer and T5 by bitsandbytes; int8 needs
            a GPU.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None (or ``auto``) is bfloat16 on a GPU and
            float32 on a CPU.
        device: Torch device; None (or ``auto``) is a GPU where there is one.

    Returns:
        The pipeline, ready to run, without progress bars.

    Raises:
        ValueError: If the model is not there, is no FLUX pipeline, or cannot be quantized here.
    """
    place = _device(device)
    precision = _dtype(dtype, place)
    if quantize not in QUANTIZATIONS:
        raise ValueError(f"expected quantize to be one of {QUANTIZATIONS}, got {quantize!r}")
    if quantize == "int8" and place.type != "cuda":
        raise ValueError(
            f"expected a GPU for int8, got device {place}; use nf4, or no quantization"
        )
    with _quiet(everything=name == "shapes"):
        folder, shown, revision = _find(name)
        pipe = _load(folder, shown, quantize, precision, place)
    pipe.set_progress_bar_config(disable=True)

    vae, config = pipe.vae.config, pipe.transformer.config
    pipe.default_sample_size = vae.sample_size // pipe.vae_scale_factor
    embedded = folder.samefile(EMBEDDED)
    distilled = bool(config.guidance_embeds)
    info = {
        "name": shown,
        "revision": revision,
        "sha256": content_hash(folder),
        "quantization": quantize,
        "dtype": str(precision).removeprefix("torch."),
        "device": place.type,
        "double": config.num_layers,
        "single": config.num_single_layers,
        "guided": distilled,
    }
    return LoadedModel(
        pipe=pipe,
        name=shown,
        info=info,
        steps=8 if embedded else 28 if distilled else 4,
        size=(vae.sample_size, vae.sample_size),
        max_sequence_length=32 if embedded else 512 if distilled else 256,
        guidance=3.5 if distilled else 0.0,
        judge=_judge if embedded else None,
    )


def content_hash(folder: str | Path) -> str:
    """Digest of a pipeline's weights and configuration.

    Every ``.safetensors`` and ``.json`` file counts, by its path and content. Of a file over
    256 MiB, its size and 64 evenly spread blocks of 1 MiB count, which takes well under a second.

    Args:
        folder: Where the pipeline lies.

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


def _judge(picture: np.ndarray) -> Any:
    from harvest.shapes.check import read_picture

    return read_picture(picture)


def _device(name: str | None) -> torch.device:
    if name in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"expected a torch device such as cpu or cuda:0, got {name!r}") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"expected a GPU for device {name}, but torch finds none; use --device cpu"
        )
    return place


def _dtype(name: str | torch.dtype | None, place: torch.device) -> torch.dtype:
    if isinstance(name, torch.dtype):
        return name
    if name in (None, "auto"):
        return torch.bfloat16 if place.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"expected dtype to be one of {tuple(DTYPES)}, got {name!r}")
    return DTYPES[name]


def _find(name: str) -> tuple[Path, str, str | None]:
    """Folder, name to show and revision of a model; fetches it if it is on a hub."""
    if name == "shapes":
        if not (EMBEDDED / "model_index.json").is_file():
            raise ValueError(f"expected the embedded model in {EMBEDDED}; install jaxdict again")
        return EMBEDDED, name, None
    path = Path(name).expanduser()
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

    try:
        fetched = Path(FluxPipeline.download(name))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"expected a model at the hub id {name!r}, but it cannot be fetched ({reason}); check "
            "the name and the network, and log in if the model asks for it"
        ) from error
    return fetched, name, fetched.name


def _load(folder: Path, name: str, quantize: str, dtype: torch.dtype, place: torch.device) -> Any:
    from diffusers import FluxPipeline, __version__

    kind = json.loads((folder / "model_index.json").read_text()).get("_class_name")
    if kind != "FluxPipeline":
        raise ValueError(f"expected a FluxPipeline at {name}, got a {kind}; only FLUX.1 is read")
    key = "torch_dtype" if __version__.startswith("0.") else "dtype"
    options: dict[str, Any] = {key: dtype, "local_files_only": True}
    if quantize != "none" and place.type == "cuda":
        options["quantization_config"] = quantization_config(quantize, dtype)
    try:
        pipe = FluxPipeline.from_pretrained(str(folder), **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"expected a whole FLUX pipeline at {name}, got: {reason}") from error
    if quantize == "nf4" and place.type != "cuda":
        for part, kept in KEPT_WHOLE.items():
            to_nf4(getattr(pipe, part), kept, dtype)
    return pipe.to(place)


@contextmanager
def _quiet(*, everything: bool) -> Iterator[None]:
    """Silence what a loader says that a user can do nothing about; its bars too, if `everything`.

    (A missing torchvision is of no matter here; ``torch_dtype`` works in all of diffusers 0.x.)
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    both = (diffusers_logging, transformers_logging)
    levels = [log.get_verbosity() for log in both]
    bars = [log.is_progress_bar_enabled() for log in both]
    try:
        for log in both:
            log.set_verbosity_error()
            if everything:
                log.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            yield
    finally:
        for log, level, bar in zip(both, levels, bars, strict=True):
            log.set_verbosity(level)
            if bar:
                log.enable_progress_bar()
