"""The verb `interp report`: a feature index as web pages that need neither network nor server."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jinja2
from tqdm import tqdm

from harvest.atomic import whole_folder, write_json
from harvest.store import Store, expect_from, open_store, print_growth
from interp.config import ReportConfig
from interp.index import FeatureIndex, load_index
from interp.overwrite import check_overwrite
from interp.report import charts
from interp.report.gallery import Gallery
from interp.report.pages import describe, kind_name, overview

FORMAT = "jaxdict-report"
VERSION = 1
MARKER = "report.json"
_NAMES = (MARKER, "index.html", "features", "assets")
_NEUTRAL = {
    **{"red": "#dc2828", "orange": "#f28c1e", "yellow": "#f0cf32", "green": "#2da046"},
    **{"cyan": "#3cc8d7", "blue": "#2d50d7", "purple": "#8c3cb4", "pink": "#f5bccd"},
    **{"white": "#f6f5f2", "gray": "#84868a", "black": "#161619", "cream": "#eed8aa"},
    **{"navy": "#1b2a52", "brown": "#7a4a28"},
}
"""Tag values that are colours, and the swatches that are shown beside them."""


def write_report(config: ReportConfig) -> dict[str, Any]:
    """Write the overview and the pages of the clearest features as a folder of static files.

    Args:
        config: the index, and what to draw of it.

    Returns:
        {"report": path of index.html, "pages": number of feature pages, "features": of all features}.

    Raises:
        FileNotFoundError: the index does not exist.
        FileExistsError: `config.out` holds something other than a report.
        ValueError: the index is damaged, or the store is not the one that was indexed.
    """
    check_overwrite(config.out, marker=MARKER, names=_NAMES)
    index = load_index(config.index, verify=config.verify)
    store = _store(config, index)
    features = choose_features(index, config.features)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": charts.number, "percent": charts.percent, "swatch": _swatch}
    with whole_folder(config.out) as folder:
        (folder / "features").mkdir()
        gallery = Gallery(index, store, folder, size=config.size, soft=config.heat == "soft")
        gallery.load(_images(index, features))
        shared = {
            "site": index.facts["site"],
            "kind": kind_name(index.facts["kind"]),
            "facts": index.facts,
        }
        page = environment.get_template("feature.html")
        for place, feature in enumerate(tqdm(features, desc="pages", unit="page")):
            near = {
                "previous": features[place - 1] if place else None,
                "next": features[place + 1] if place + 1 < len(features) else None,
                "place": place + 1,
                "pages": len(features),
            }
            text = page.render(shared | near | describe(gallery, feature))
            (folder / "features" / f"{feature}.html").write_text(text, encoding="utf-8")
        text = environment.get_template("overview.html").render(
            shared | overview(gallery, features)
        )
        (folder / "index.html").write_text(text, encoding="utf-8")
        marker = {"format": FORMAT, "version": VERSION, "pages": len(features)}
        marker["config"] = {"verb": "interp report", **dataclasses.asdict(config)}
        write_json(folder / MARKER, marker)
    print(f"report with {len(features)} feature pages: {config.out / 'index.html'}")
    return {
        "report": str(config.out / "index.html"),
        "pages": len(features),
        "features": index.m,
    }


def choose_features(index: FeatureIndex, limit: int) -> list[int]:
    """Choose the features that get a page, clearest first.

    Args:
        index: the feature index.
        limit: most pages; 0 means every live feature. The best feature of each tag has precedence over clearer ones.
    """
    alive = [int(feature) for feature in index.order if index.alive[feature]]
    if not limit or len(alive) <= limit:
        return alive
    first = {int(feature) for feature in index.tag_feature}
    ranked = [f for f in alive if f in first] + [f for f in alive if f not in first]
    chosen = set(ranked[:limit])
    return [feature for feature in alive if feature in chosen]


def _store(config: ReportConfig, index: FeatureIndex) -> Store:
    """The store that was indexed, or what it grew to, at its place relative to the index or where the config says."""
    known = index.facts["store"]
    path = config.store or (config.index / known["path"])
    try:
        store = open_store(path)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(
            f"--store: expected the indexed activation store at {path}: {error}"
        ) from None
    of = f"the index {config.index}"
    print_growth(store, expect_from(store, known["fingerprint"], of), of)
    return store


def _images(index: FeatureIndex, features: list[int]) -> set[int]:
    """All images that the pages show."""
    images = set(index.example_image[features].reshape(-1).tolist())
    if index.facts["store"]["trained_on"]:
        images |= set(index.source[features, 0].tolist())
    return images - {-1}


def _swatch(value: str) -> str:
    """The CSS colour of a tag value; empty if it is no colour."""
    return _NEUTRAL.get(value.lower(), "")
