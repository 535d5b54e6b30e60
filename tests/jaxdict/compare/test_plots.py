"""The heat maps of `jaxdict compare`, by the colours of their cells."""

from __future__ import annotations

import numpy as np
from PIL import Image

from jaxdict.compare import plots
from jaxdict.compare.comparison import Comparison
from jaxdict.compare.groups import Groups
from jaxdict.compare.source_sets import SourceSets
from jaxdict.compare.sources import ComparedDictionary


def cell_colours(path) -> set[tuple[int, ...]]:
    """Colours that cover at least 3% of a picture, white aside."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    large = {tuple(c) for c in colours[counts > 0.03 * len(pixels)].tolist()}
    return large - {(255, 255, 255)}


def test_cells_of_different_values_have_different_colours(tmp_path):
    for values in (
        [[1, 0.1], [0.1, 1]],  # nothing beside the diagonal to tell apart
        [[1, 0.0], [0.0, 1]],
        [[1, 0.3, 0.1], [0.3, 1, 0.2], [0.1, 0.2, 1]],
    ):
        names = [f"double.{i}.img" for i in range(len(values))]
        source, card = np.zeros((1, 3), np.int32), {"store_fingerprint": "one"}
        dictionaries = [ComparedDictionary(tmp_path, card | {"site": n}, source) for n in names]
        found = Comparison(
            names=names,
            sources=SourceSets(dictionaries, ["image"], {}),
            groups=Groups("", [""], np.zeros(len(values), int)),
            measures={"jaccard": np.asarray(values, float)},
            matching=[],
            between={},
        )
        plots.draw(tmp_path, found, titles={"jaccard": "Jaccard"})
        # The diagonal is above the scale where it would hide what the others differ in.
        different = len(set(np.ravel(values)))
        wanted = different if different < 3 else different - 1
        assert len(cell_colours(tmp_path / "similarity.png")) == wanted, values
