"""The pictures of a report: each written once, small, under a name that all feature pages share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from harvest.store import Store
from interp.index import FeatureIndex
from interp.report.heat_maps import (
    enlarge,
    fit_size,
    outlined,
    overlay,
    save_picture,
    save_sheet,
    save_strip,
)

_CARD_TILES = 4
_CARD_SIDE = 144
_READ_BYTES = 2**26


class Gallery:
    """Draws and writes the pictures of a report's features under `folder/assets`.

    Args:
        index: the feature index.
        store: the store with the pictures; without any, flat gray ones are drawn.
        folder: the report.
        size: longer side of a picture, in pixels.
        soft: see `interp.report.heat_maps.heat_field`.
    """

    def __init__(
        self, index: FeatureIndex, store: Store, folder: Path, *, size: int, soft: bool
    ) -> None:
        """Make the folders."""
        self.index, self.store, self.folder = index, store, folder
        self.grid = (index.facts["grid"][0], index.facts["grid"][1])
        self.longest, self.soft = size, soft
        self.has_pictures = store.attrs.get("picture") is not None
        height, width = store.attrs["picture"] if self.has_pictures else self.grid
        self.size = fit_size(int(height), int(width), size)
        self._pictures: dict[int, np.ndarray] = {}
        for name in ("pictures", "heat", "cards", "sources"):
            (folder / "assets" / name).mkdir(parents=True, exist_ok=True)

    def load(self, images: Iterable[int]) -> None:
        """Read these images' pictures, resize them, and write each to a file of its own."""
        wanted = np.unique(np.fromiter(images, np.int64))
        if not self.has_pictures:
            gray = np.full((*self.size, 3), 150, np.uint8)
            self._pictures = {int(image): gray for image in wanted}
        else:
            height, width = self.store.attrs["picture"]
            chunk = max(1, _READ_BYTES // (3 * int(height) * int(width)))
            for low in range(0, len(wanted), chunk):
                part = wanted[low : low + chunk]
                for image, picture in zip(part, self.store.pictures(part), strict=True):
                    self._pictures[int(image)] = enlarge(picture, self.size)
        for image, picture in self._pictures.items():
            save_picture(picture, self.folder / self.picture(image))

    def picture(self, image: int) -> str:
        """Path of an image's picture in the report."""
        return f"assets/pictures/{image}.webp"

    def heat(self, feature: int) -> str | None:
        """Write the heat maps of a feature's examples as one vertical strip, and its card.

        Returns:
            Path of the strip in the report; None if tokens are not places in the picture (text stream) or there
            is no example.
        """
        examples = self.index.examples(feature)
        if not len(examples):
            return None
        images = [int(self.index.example_image[feature, example]) for example in examples]
        tiles = [self._pictures[image] for image in images]
        on_image = self.index.facts["stream"] == "img"
        if on_image:
            scale = 1 / max(float(self.index.maximum[feature]), 1e-30)
            maps = [self.index.heat(feature, example).reshape(self.grid) for example in examples]
            tiles = [
                overlay(tile, heat * scale, soft=self.soft)
                for tile, heat in zip(tiles, maps, strict=True)
            ]
            save_strip(tiles, self.folder / f"assets/heat/{feature}.webp")
        side = fit_size(*self.size, min(_CARD_SIDE, self.longest))
        small = [enlarge(tile, side) for tile in tiles[: min(_CARD_TILES, self.index.facts["top"])]]
        save_sheet(small, self.folder / self.card(feature), places=_CARD_TILES)
        return f"assets/heat/{feature}.webp" if on_image else None

    def card(self, feature: int) -> str:
        """Path of a feature's card in the report: its four strongest pictures as one."""
        return f"assets/cards/{feature}.webp"

    def source(self, feature: int) -> str | None:
        """Write the picture that an atom came from, its patch outlined.

        Returns:
            Its path in the report; None if the picture is not known.
        """
        image, _, token = (int(value) for value in self.index.source[feature])
        if image not in self._pictures or not self.index.facts["store"]["trained_on"]:
            return None
        picture = self._pictures[image]
        if self.index.facts["stream"] == "img":
            picture = outlined(picture, token, self.grid)
        place = f"assets/sources/{feature}.webp"
        save_picture(picture, self.folder / place)
        return place
