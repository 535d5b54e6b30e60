"""Settings of `jaxdict harvest`, checked when they are made. Imports neither torch nor jax."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from harvest.flags import Place, expand_home, expect, pictures_in_memory


@dataclass(frozen=True)
class HarvestConfig:
    """Run a FLUX pipeline over prompts and keep the activations of chosen sites in a store.

    The same command on the same --out goes on with a run that was cut off. Larger --images, or other --sites, add to a store
    that is finished.
    """

    EXAMPLE: ClassVar[str] = (
        "jaxdict harvest --model shapes --sites double.2.img double.2.txt --images 1500 --steps 4 "
        "--out runs/store"
    )

    out: Path
    """Folder of the store, or its URL such as s3://bucket/prefix; an unfinished harvest with the same settings is resumed, a finished one takes more images and sites."""
    model: Place = "shapes"
    """The embedded model (shapes), a folder with a FLUX pipeline, or a hub id."""
    sites: tuple[str, ...] = ("double.2.img",)
    """Sites to read, names or globs: double.2.img, 'single.*.txt', double.0.img.mlp (also .attn, .update). Those that the store lacks are added to it."""
    capture_steps: str = "all"
    """Denoising steps whose activations are kept, numbered from 0: all, or for instance 0,2."""
    tokens_per_image: int = 0
    """Tokens of each stream that are kept of an image, drawn anew for each image from the seed. 0 means all."""
    prompts: Place = "shapes"
    """Where prompts come from: shapes (captions of the embedded world), a .txt, .jsonl, .csv, .tsv, .parquet or .json file (a list, or COCO's captions), or a data set of the hub (hf:owner/name)."""
    prompt_column: str = "prompt"
    """Field or column that holds the prompt in a .jsonl, .csv, .tsv, .json or .parquet file or a data set."""
    images: int = 0
    """Images to make; prompts of a file are used in order and repeated as needed. More than the store holds are added to it. 0 means each prompt of the file once, or 1000 captions, or as many as the store holds."""
    steps: int = 0
    """Denoising steps of each image. 0 means the model's own number (8 for shapes)."""
    seed: int = 0
    """Seed of the captions and of the noise; the noise of an image depends on this and its number only."""
    batch: int = 0
    """Images in one forward pass. 0 means 16, or fewer for large pictures."""
    images_per_shard: int = 0
    """Images written, and resumed, together. 0 means up to 16 batches, as fit in 64 MiB."""
    validation: float = 0.2
    """Share of the prompts that is held out, in [0, 1); a prompt is never in both splits."""
    max_sequence_length: int = 0
    """Length of the text in T5 tokens. 0 means the model's own (32 for shapes, 256 for schnell, 512 for dev)."""
    height: int = 0
    """Height of the pictures in pixels. 0 means the model's own."""
    width: int = 0
    """Width of the pictures in pixels. 0 means the model's own."""
    guidance: float | None = None
    """Guidance scale. None means the model's own (0 for shapes and schnell, 3.5 for dev)."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """Quantize the transformer by bitsandbytes while loading (int8 needs a GPU)."""
    quantize_text: Literal["same", "none", "nf4", "int8"] = "same"
    """Quantize T5; same means as the transformer."""
    offload: Literal["none", "text", "model", "sequential"] = "none"
    """Save GPU memory: text encodes all prompts first and frees the text encoders before the transformer loads; model and sequential are diffusers' own ways to keep on the GPU only the part that runs (a GPU is needed)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the computation; auto is bfloat16 on a GPU and float32 on a CPU. Activations are always kept as bfloat16."""
    device: str = "auto"
    """Torch device, such as cpu or cuda:0; auto is a GPU where there is one."""
    pictures: bool = True
    """Keep the final pictures in the store. Without them each image ends after the last site that is asked for."""
    compress: Literal["none", "zstd"] = "none"
    """Compress activations: none, or zstd (0.7 of the size on the embedded model; slower to write and read)."""
    chunk_mb: float = 1.5
    """Size of an inner chunk aimed at, in MB: what a reader fetches at least."""
    buffer_mb: float = 2048.0
    """Memory for activations that are not written yet, in MB; batches and shards are made to fit."""
    dry_run: bool = False
    """Print rows, bytes and about how much memory and time it takes (of a store that is there: what would be added), and stop; no weights are loaded or fetched."""

    def __post_init__(self) -> None:
        """Check every field that can be checked without the model."""
        expand_home(self)
        whole = ("images", "steps", "seed", "batch", "images_per_shard", "height", "width")
        for name in (*whole, "tokens_per_image"):
            expect(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        expect(bool(Path(self.out).name), "out", "a folder's name or a URL", str(self.out))
        expect(self.seed < 2**63, "seed", "less than 2**63", self.seed)
        length = self.max_sequence_length
        expect(0 <= length <= 512, "max_sequence_length", "0 to 512 tokens", length)
        pictures_in_memory(self, steps="steps")
        expect(0 <= self.validation < 1, "validation", "a share in [0, 1)", self.validation)
        expect(any(self.sites), "sites", "at least one site such as double.2.img", self.sites)
        expect(bool(self.model), "model", "shapes, a folder or a hub id", self.model)
        for name in ("chunk_mb", "buffer_mb"):
            expect(getattr(self, name) > 0, name, "more than 0 MB", getattr(self, name))
        chosen = self.capture_steps
        listed = re.fullmatch(r"\d+(\s*,\s*\d+)*", chosen) is not None
        expect(chosen == "all" or listed, "capture_steps", "all, or numbers such as 0,2", chosen)
        guidance = self.guidance
        expect(guidance is None or guidance >= 0, "guidance", "0 or more", guidance)

    def numbers(self, steps: int) -> tuple[int, ...]:
        """The captured ones of so many denoising steps, ascending.

        Raises:
            ValueError: one of them is not among the steps.
        """
        if self.capture_steps == "all":
            return tuple(range(steps))
        numbers = tuple(sorted({int(text) for text in self.capture_steps.split(",")}))
        last = numbers[-1]
        expect(last < steps, "capture_steps", f"numbers from 0 to {steps - 1}", last)
        return numbers
