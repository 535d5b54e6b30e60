"""One picture that shows a demo at a glance: what was drawn, what was learned, what steering does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harvest.atomic import whole_file
from harvest.store import open_store

WIDTH = 1600
_MARGIN = 40
_INK, _SOFT, _PAPER = (28, 32, 40), (104, 112, 124), (255, 255, 255)


def draw_sheet(out: Path, summary: dict[str, Any]) -> Path:
    """Draw sheet.png from what a demo left in its folder.

    Args:
        out: the demo's folder (store, report-sae, report-itda, steered).
        summary: the demo's summary.

    Returns:
        Path of the picture.
    """
    from PIL import Image

    panels = [
        _title(summary),
        _drawn(out),
        *(_features(out, kind, summary[kind]) for kind in ("sae", "itda")),
        _steered(out, summary),
    ]
    height = sum(panel.height for panel in panels) + _MARGIN * (len(panels) + 1)
    sheet = Image.new("RGB", (WIDTH, height), _PAPER)
    top = _MARGIN
    for panel in panels:
        sheet.paste(panel, (_MARGIN, top))
        top += panel.height + _MARGIN
    path = out / "sheet.png"
    with whole_file(path) as draft:
        sheet.save(draft, format="PNG", optimize=True)
    return path


def _title(summary: dict[str, Any]) -> Any:
    sae, itda, store = summary["sae"], summary["itda"], summary["store"]
    lines = [
        f"{store['images']} pictures, {store['rows']:,} activations of width {store['d']} at {summary['site']}",
        f"SAE: {sae['atoms']} features, {sae['k']} active, {sae['fvu']:.1%} of held-out variance unexplained.   "
        f"ITDA: {itda['atoms']} atoms, {itda['fvu']:.1%}.",
    ]
    panel = _blank(52 + 28 * len(lines))
    _write(panel, (0, 0), "jaxdict demo", 38)
    for row, line in enumerate(lines):
        _write(panel, (0, 54 + 28 * row), line, 20, _SOFT)
    return panel


def _drawn(out: Path) -> Any:
    """Held-out pictures as the embedded model drew them."""
    store = open_store(out / "store")
    images = store.indices("validation")[:24]
    side, gap = 116, 11
    panel = _blank(40 + 2 * (side + gap))
    _write(panel, (0, 0), "Drawn by the embedded FLUX pipeline from held-out prompts", 22)
    for place, picture in enumerate(store.pictures(images)):
        y, x = divmod(place, 12)
        panel.paste(_enlarge(picture, side), (x * (side + gap), 40 + y * (side + gap)))
    return panel


def _features(out: Path, kind: str, part: dict[str, Any]) -> Any:
    """The clearest features: their top pictures with heat, the attribute each tells, and how well."""
    from PIL import Image

    rows = part["clearest"][:5]
    side, gap = 290, 17
    panel = _blank(40 + side + 34)
    name = {"sae": "SAE features", "itda": "ITDA atoms"}[kind]
    _write(panel, (0, 0), f"{name}: top pictures of the clearest, lit where the feature fires", 22)
    for place, row in enumerate(rows):
        card = _card(out / f"report-{kind}", row["feature"])
        left = place * (side + gap)
        if card is not None:
            flat = Image.new("RGBA", card.size, (*_PAPER, 255))
            flat.alpha_composite(card)
            panel.paste(
                flat.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), (left, 40)
            )
        text = f"{row['feature']}: {row['attribute']} {row['value']}, AUROC {row['auroc']:.3f}"
        _write(panel, (left, 40 + side + 8), text, 17)
    return panel


def _steered(out: Path, summary: dict[str, Any]) -> Any:
    """The sheet of steered pictures, with the result in words."""
    from PIL import Image

    steering = summary["steering"]
    success, control = steering["steered"], steering["random_direction"]
    with Image.open(out / "steered" / "sheet.png") as picture:
        picture = picture.convert("RGB")
    width = WIDTH - 2 * _MARGIN
    scale = min(1.0, width / picture.width)
    size = (round(picture.width * scale), round(picture.height * scale))
    panel = _blank(40 + size[1])
    text = (
        f"Steered to {steering['wanted'].replace('=', ' ')} by feature {steering['feature']}: "
        f"{success['success']:.0%} of {success['images']} held-out pictures; "
        f"a random direction as long: {control['success']:.0%}"
    )
    _write(panel, (0, 0), text, 22)
    panel.paste(picture.resize(size, Image.Resampling.LANCZOS), (0, 40))
    return panel


def _card(report: Path, feature: int) -> Any:
    from PIL import Image

    file = report / "assets" / "cards" / f"{feature}.webp"
    if not file.is_file():
        return None
    with Image.open(file) as picture:
        return picture.convert("RGBA")


def _blank(height: int) -> Any:
    from PIL import Image

    return Image.new("RGB", (WIDTH - 2 * _MARGIN, height), _PAPER)


def _enlarge(picture: np.ndarray, side: int) -> Any:
    from PIL import Image

    return Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS)


def _write(
    panel: Any, place: tuple[int, int], text: str, size: int, ink: Sequence[int] = _INK
) -> None:
    from PIL import ImageDraw, ImageFont

    ImageDraw.Draw(panel).text(place, text, fill=tuple(ink), font=ImageFont.load_default(size))
