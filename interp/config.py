"""Settings of `interp index` and `interp report`: one frozen dataclass a verb, checked when it is made.

Imports neither torch nor NumPy, so that `--help` is quick.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from harvest.flags import at_least, captured_steps, expand_home, expect, one_of

SPLITS = ("validation", "train", "all")
DEVICES = ("auto", "cpu", "cuda")
HEATS = ("soft", "grid")


@dataclass(frozen=True)
class IndexConfig:
    """Find out when each feature of a dictionary fires: pictures, words, steps, and what it tells about them."""

    EXAMPLE: ClassVar[str] = (
        "jaxdict interp index --dictionary runs/sae/dictionary --store runs/store --out runs/index"
    )

    dictionary: Path
    """Exported dictionary (a folder with dictionary.safetensors and card.json)."""
    store: Path
    """Activation store with pictures to read the features on."""
    out: Path
    """Folder to write: the index, its summary and this config."""
    site: str = ""
    """Site in the store; empty means the site of the dictionary's card."""
    split: Literal["validation", "train", "all"] = "validation"
    """Images to read; validation prompts never trained the dictionary."""
    images: int = 2000
    """Images to read at most, drawn at random from the split; 0 means all of it."""
    steps: tuple[int, ...] = ()
    """Captured steps to read, by index: 1 is the second one of the store, whichever denoising step that is
    (both are printed); empty means all."""
    padding: Literal["same", "drop", "keep"] = "same"
    """Rows of the text that are padding: drop leaves them out, keep takes them; same does as the dictionary's
    training did."""
    top: int = 12
    """Top images kept for each feature; an image counts once, with its strongest token."""
    quantiles: int = 4
    """Images kept from further down each feature's range, evenly spread over its weaker images."""
    bins: int = 32
    """Bins of each feature's histogram of positive activations, equal in width from 0 to its maximum."""
    words: int = 8
    """Words kept for each feature, at most."""
    batch: int = 8192
    """Rows encoded at a time (whole images, at least one)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where rows are encoded; auto means the GPU when there is one."""
    seed: int = 0
    """Seed of the image sample and of the two halves that choose and report a feature."""
    verify: bool = True
    """Whether the dictionary has to have the hashes written with it; --no-verify reads it as it is."""

    def __post_init__(self) -> None:
        """Check every field that can be checked without the store."""
        expand_home(self)
        one_of(self, "split", SPLITS)
        one_of(self, "padding", ("same", "drop", "keep"))
        one_of(self, "device", DEVICES)
        at_least(self, 0, ("images", "quantiles", "words", "seed"), "a whole number of at least 0")
        at_least(self, 1, ("top", "batch"), "a whole number of at least 1")
        at_least(self, 2, ["bins"], "at least 2")
        captured_steps(self)


@dataclass(frozen=True)
class ReportConfig:
    """Write a feature index as web pages: an overview and one page a feature, readable without a network."""

    EXAMPLE: ClassVar[str] = "jaxdict interp report --index runs/index --out runs/report"

    index: Path
    """Feature index (a folder written by `jaxdict interp index`)."""
    out: Path
    """Folder to write; open its index.html in a browser."""
    store: Path | None = None
    """Activation store with the pictures, when it is no longer where it was beside the index."""
    features: int = 200
    """Pages to write at most, the clearest features first; 0 means every feature that fires."""
    size: int = 192
    """Longer side of a picture with its heat map, in pixels."""
    heat: Literal["soft", "grid"] = "soft"
    """How token heat is drawn over pixels: soft (bicubic) or grid (one square a token)."""
    verify: bool = True
    """Whether the index has to have the hashes written with it; --no-verify reads it as it is."""

    def __post_init__(self) -> None:
        """Check every field that can be checked without the index."""
        expand_home(self)
        expect(
            self.features >= 0, "features", "a number of at least 0", self.features, "use 0 for all"
        )
        expect(32 <= self.size <= 1024, "size", "32 to 1024 pixels", self.size, "use 192 or so")
        one_of(self, "heat", HEATS)
