"""Settings of `jaxdict demo`. Imports neither torch nor jax, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from harvest.flags import at_least, expand_home


@dataclass(frozen=True)
class DemoConfig:
    """Walk the whole road on the embedded model: prompts to activations to dictionaries to steered pictures."""

    EXAMPLE: ClassVar[str] = "jaxdict demo --out runs/demo"

    out: Path = Path("runs/demo")
    """Folder for everything the demo makes."""
    images: int = 1500
    """Pictures to harvest; a fifth of the prompts is held out."""
    steps: int = 4
    """Denoising steps of each harvested picture."""
    atoms: int = 1024
    """Features of the sparse autoencoder."""
    itda_atoms: int = 1024
    """Atoms of the ITDA dictionary."""
    k: int = 16
    """Active features a row."""
    rows: int = 3_000_000
    """Rows the sparse autoencoder is trained on."""
    itda_rows: int = 100_000
    """Rows the ITDA dictionary is built from."""
    pages: int = 120
    """Feature pages in each report."""
    steered: int = 32
    """Held-out pictures that are steered to measure success."""
    seed: int = 0
    """Seed of prompts, noise, weights and order."""
    fresh: bool = False
    """Remove what an earlier demo left in --out and start over; else finished stages are kept."""

    def __post_init__(self) -> None:
        """Check the sizes."""
        expand_home(self)
        learning = ("atoms", "itda_atoms", "k", "rows", "itda_rows")
        at_least(self, 1, ("images", "steps", *learning, "pages", "steered"), "at least 1")
