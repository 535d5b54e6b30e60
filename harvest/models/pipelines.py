"""Loading a FLUX pipeline: the embedded one, a folder's or a hub's, quantized on request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harvest.models.files import (
    EMBEDDED,
    LoadOptions,
    content_hash,
    find_files,
    load_pipeline,
    read_config,
)
from harvest.models.quantize import QUANTIZATIONS
from harvest.models.quiet import logged, quiet

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class NotFiniteError(ValueError):
    """A picture came out as NaN or infinity: its activations outgrew the model's precision."""


@dataclass(frozen=True)
class LoadedModel:
    """A pipeline and what a harvest needs to know about it.

    Attributes:
        pipe: a `diffusers.FluxPipeline`.
        name: what `load_model` loads it by.
        info: name, revision, quantization, dtype, device, sha256, blocks; JSON-able.
        steps: denoising steps by default.
        size: (height, width) of a picture by default, in pixels.
        max_sequence_length: length of the text by default, in T5 tokens.
        guidance: guidance scale by default.
        judge: reads a picture's true attributes back (uint8 [H, W, 3] to
            `harvest.shapes.check.Reading`); None except for the embedded model.
        folder: where its files lie.
        place: device it computes on.
    """

    pipe: Any
    name: str
    info: dict[str, Any]
    steps: int
    size: tuple[int, int]
    max_sequence_length: int
    guidance: float
    judge: Callable[[np.ndarray], Any] | None
    folder: Path
    place: torch.device

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        size: tuple[int, int] | None = None,
        max_sequence_length: int | None = None,
        guidance: float | None = None,
        text: Mapping[str, torch.Tensor] | None = None,
    ) -> np.ndarray:
        """Make one picture for each prompt, in one batch.

        Args:
            prompts: texts.
            seeds: seed of each picture's noise, which depends on nothing else.
            steps: denoising steps; None for the model's own, as for the options below.
            size: (height, width) in pixels.
            max_sequence_length: length of the text in T5 tokens.
            guidance: guidance scale.
            text: the prompts as `encode` gave them; None to encode them now.

        Returns:
            uint8 [n, height, width, 3].

        Raises:
            ValueError: there are not as many seeds as prompts.
            NotFiniteError: a picture is not finite, so that there is nothing to see in it.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"expected a seed a prompt, got {len(prompts)} and {len(seeds)}")
        height, width = size or self.size
        encoded = {name: value.to(self.place, self.dtype) for name, value in (text or {}).items()}
        with logged():
            made = self.pipe(
                None if encoded else list(prompts),
                **encoded,
                height=height,
                width=width,
                num_inference_steps=steps or self.steps,
                guidance_scale=self.guidance if guidance is None else guidance,
                max_sequence_length=max_sequence_length or self.max_sequence_length,
                generator=[torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds],
                output_type="np",
            ).images
        made = np.asarray(made, np.float32)
        self._check_finite(made, prompts, seeds)
        return np.rint(made * 255).astype(np.uint8)

    def _check_finite(
        self, pictures: np.ndarray, prompts: Sequence[str], seeds: Sequence[int]
    ) -> None:
        bad = np.flatnonzero(~np.isfinite(pictures).all((1, 2, 3)))
        if not len(bad):
            return
        precision = self.info["dtype"]
        remedy = "check the model's files"
        if precision == "float16":
            remedy = "float16 ends at 65,504: give --dtype bfloat16 or float32"
        raise NotFiniteError(
            f"expected pictures of finite numbers, got NaN in {len(bad)} of {len(pictures)} made in "
            f"{precision}, the first of seed {seeds[bad[0]]} and prompt {prompts[bad[0]]!r}; {remedy}"
        )

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], max_sequence_length: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Run the text encoders.

        Args:
            prompts: texts.
            max_sequence_length: length of the text in T5 tokens; None for the model's own.

        Returns:
            `prompt_embeds` [n, length, width of T5] and `pooled_prompt_embeds` [n, width of CLIP],
            on the model's device.
        """
        with logged():
            states, pooled, _ = self.pipe.encode_prompt(
                list(prompts),
                prompt_2=None,
                device=self.place,
                max_sequence_length=max_sequence_length or self.max_sequence_length,
            )
        return {"prompt_embeds": states, "pooled_prompt_embeds": pooled}

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the computation."""
        return DTYPES[self.info["dtype"]]

    def grid(self, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Image tokens of a picture as (h, w): a token is 2 x 2 latents.

        Raises:
            ValueError: a side is not a whole number of tokens.
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
            steps: denoising steps.
            size: (height, width) in pixels; FLUX.1-dev shifts its noise levels by it.

        Returns:
            noise level (sigma, in [0, 1]) and timestep at the start of each step.
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
    quantize_text: str = "same",
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    offload: str = "none",
    parts: str = "all",
) -> LoadedModel:
    """Load a FLUX pipeline.

    Args:
        name: `shapes` (the embedded model, never from the network), a folder, or a hub id such as
            `black-forest-labs/FLUX.1-schnell`.
        quantize: `none`, `nf4` or `int8`: how bitsandbytes quantizes the transformer; int8 needs a GPU.
        quantize_text: the same for T5; `same` means as `quantize`.
        dtype: `float32`, `bfloat16` or `float16`; None (or `auto`) is bfloat16 on a GPU and
            float32 on a CPU.
        device: torch device; None (or `auto`) is a GPU where there is one.
        offload: `model` or `sequential`: diffusers moves to the GPU only the part that runs.
        parts: `all`; `text` for the text encoders alone, `image` for everything else, `none` for
            tokenizers, scheduler and settings. A transformer that is not loaded is on torch's meta
            device, so that its shapes are known.

    Returns:
        the pipeline, ready to run, without progress bars.

    Raises:
        ValueError: the model cannot be found, is no FLUX pipeline, or cannot be quantized here.
    """
    place = _device(device)
    precision = _dtype(dtype, place)
    text = quantize if quantize_text == "same" else quantize_text
    for asked in (quantize, text):
        if asked not in QUANTIZATIONS:
            raise ValueError(f"expected quantize to be one of {QUANTIZATIONS}, got {asked!r}")
        if asked == "int8" and place.type != "cuda":
            raise ValueError(
                f"expected a GPU for int8, got device {place}; use nf4, or no quantization"
            )
    if offload in ("model", "sequential") and place.type != "cuda":
        raise ValueError(
            f"expected a GPU for --offload {offload}, got device {place}; use --offload text or none"
        )
    with quiet(bars=name != "shapes" and parts != "none"):  # what is fetched may take long
        folder, shown, revision = find_files(name, weights=parts != "none")
    with quiet():
        chosen = {"transformer": quantize, "text_encoder_2": text}
        options = LoadOptions(chosen, precision, place, offload, parts)
        pipe = load_pipeline(folder, shown, options)
    pipe.set_progress_bar_config(disable=True)

    vae, config = read_config(folder, "vae"), pipe.transformer.config
    side = int(vae["sample_size"])
    pipe.vae_scale_factor = 2 ** (len(vae["block_out_channels"]) - 1)
    pipe.default_sample_size = side // pipe.vae_scale_factor
    embedded = folder.samefile(EMBEDDED)
    distilled = bool(config.guidance_embeds)
    info = {
        "name": shown,
        "revision": revision,
        "sha256": content_hash(folder),
        "quantization": quantize,
        "text_quantization": text,
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
        size=(side, side),
        max_sequence_length=32 if embedded else 512 if distilled else 256,
        guidance=3.5 if distilled else 0.0,
        judge=_judge if embedded else None,
        folder=folder,
        place=place,
    )


def _judge(picture: np.ndarray) -> Any:
    from harvest.shapes import read_picture

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
