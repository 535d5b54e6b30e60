"""What the report's pages show, as plain values for the templates."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from interp.index import POOLINGS, FeatureIndex
from interp.report import charts
from interp.report.gallery import Gallery

_SPELLED = {
    "topk": "TopK",
    "batchtopk": "BatchTopK",
    "jumprelu": "JumpReLU",
    "matryoshka": "Matryoshka",
    "relu": "ReLU",
}


def kind_name(kind: str) -> str:
    """A dictionary's kind in words."""
    if kind == "itda":
        return "ITDA dictionary"
    return f"{_SPELLED.get(kind, kind)} sparse autoencoder"


def describe(gallery: Gallery, feature: int) -> dict[str, Any]:
    """Everything that a feature's page shows; also writes its pictures."""
    index = gallery.index
    facts = index.facts
    strip = gallery.heat(feature)
    examples = _examples(gallery, feature)
    top = sum(1 for column in index.examples(feature) if column < facts["top"])
    maximum = float(index.maximum[feature])
    return {
        "feature": feature,
        "strip": strip,
        "top_examples": examples[:top],
        "weaker_examples": examples[top:],
        "density": float(index.density[feature]),
        "image_count": int(index.image_count[feature]),
        "mean": float(index.mean[feature]),
        "maximum": maximum,
        "ratio": f"{gallery.size[1]} / {gallery.size[0]}",
        "best": _best(index, feature),
        "words": _words(index, feature),
        "strong_count": int(index.strong_count[feature]),
        "attributes": _attributes(index, feature),
        "histogram": charts.histogram(index.histogram[feature], maximum),
        "by_step": charts.by_step(
            index.step_mean[feature], index.step_density[feature], facts["steps"], facts["sigmas"]
        ),
        "source": _source(gallery, feature),
        "fires_on": _fires_on(gallery, feature),
    }


def overview(gallery: Gallery, features: list[int]) -> dict[str, Any]:
    """Everything that the overview shows of the features that have a page."""
    index = gallery.index
    facts, pages = index.facts, set(features)
    cards = [_card(gallery, feature) for feature in features]
    by_id = {card["id"]: card for card in cards}
    clearest = [entry["feature"] for entry in facts["summary"]["clearest"]]
    attributes = []
    for name, attribute in facts["summary"]["attributes"].items():
        tags = [
            entry | {"value": value, "page": entry["feature"] in pages}
            for value, entry in attribute["tags"].items()
        ]
        tags.sort(key=lambda tag: -tag["auroc"])
        attributes.append({"name": name, "median": attribute["median_auroc"], "tags": tags})
    return {
        "cards": cards,
        "clearest": [by_id[feature] for feature in clearest if feature in by_id],
        "attributes": attributes,
        "alive": int(index.alive.sum()),
        "densities": charts.densities(index.density),
        "ratio": f"{gallery.size[1]} / {gallery.size[0]}",
        "details": _details(index),
        "has_pictures": gallery.has_pictures,
    }


def _best(index: FeatureIndex, feature: int) -> dict[str, Any] | None:
    """The tag that a feature tells best, chosen on one half of the images and measured on the other."""
    place = int(index.best_tag[feature])
    if place < 0:
        return None
    attribute, value = index.facts["tags"][place]
    return {
        "attribute": attribute,
        "value": value,
        "auroc": float(index.auroc[feature, place]),
        "selected": float(index.auroc_selected[feature, place]),
    }


def _words(index: FeatureIndex, feature: int) -> list[dict[str, Any]]:
    strong = int(index.strong_count[feature])
    others = len(index.facts["images"]) - strong
    return [
        {
            "word": index.facts["words"][int(index.word[feature, place])],
            "inside": int(index.word_with[feature, place]),
            "strong": strong,
            "outside": int(index.word_without[feature, place]),
            "others": others,
            "share": int(index.word_with[feature, place]) / max(1, strong),
            "other_share": int(index.word_without[feature, place]) / max(1, others),
            "log_odds": float(index.word_log_odds[feature, place]),
        }
        for place in np.flatnonzero(index.word[feature] >= 0)
    ]


def _attributes(index: FeatureIndex, feature: int) -> list[dict[str, Any]]:
    """AUROC of a feature for every tag, grouped by attribute."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for place, (attribute, value) in enumerate(index.facts["tags"]):
        entry = {
            "value": value,
            "auroc": float(index.auroc[feature, place]),
            "selected": float(index.auroc_selected[feature, place]),
            "pooling": POOLINGS[index.pooling[feature, place]],
            "best": place == int(index.best_tag[feature]),
        }
        groups.setdefault(attribute, []).append(entry)
    return [{"name": name, "tags": tags} for name, tags in groups.items()]


def _examples(gallery: Gallery, feature: int) -> list[dict[str, Any]]:
    """A feature's examples; `position` is that of their tile in the strip, in percent of the way down."""
    columns = gallery.index.examples(feature)
    facts, last = gallery.index.facts, len(columns) - 1
    images = {int(image): place for place, image in enumerate(facts["images"])}
    examples = []
    for place, column in enumerate(columns):
        example = _example(gallery, feature, int(column))
        known = images[example["image"]]
        examples.append(
            example
            | {
                "prompt": facts["prompts"][known],
                "seed": facts["seeds"][known],
                "position": round(100 * place / last, 4) if last else 0,
            }
        )
    return examples


def _example(gallery: Gallery, feature: int, column: int) -> dict[str, Any]:
    """One example: its image, step, value, and where in the image the feature fires."""
    index = gallery.index
    facts = index.facts
    image = int(index.example_image[feature, column])
    token = int(index.example_token[feature, column])
    step = int(index.example_step[feature, column])
    value = float(index.example_value[feature, column])
    maximum = max(float(index.maximum[feature]), 1e-30)
    example = {
        "image": image,
        "step": step,
        "sigma": facts["sigmas"][facts["steps"].index(step)],
        "value": value,
        "share": value / maximum,
        "picture": gallery.picture(image),
        "tokens": [],
    }
    if facts["stream"] == "img":
        y, x = divmod(token, facts["grid"][1])
        return example | {"where": f"row {y + 1}, column {x + 1}"}
    words = gallery.store.words[image]
    heat = index.heat(feature, column) / maximum
    # Padding after the prompt says nothing where the feature is quiet: one token of it is enough.
    last = len(words)
    while last > 1 and words[last - 1] == words[last - 2] and heat[last - 1] == 0:
        last -= 1
    shown = [(words[place], float(heat[place])) for place in range(last)]
    where = repr(words[token]) if words else f"text token {token}"
    return example | {"where": where, "tokens": shown}


def _source(gallery: Gallery, feature: int) -> dict[str, Any] | None:
    """Where an ITDA atom came from; None for other kinds."""
    index = gallery.index
    image, step, token = (int(value) for value in index.source[feature])
    if image < 0:
        return None
    prompts = index.facts.get("source_prompts") or []
    where = f"text token {token}"
    if index.facts["stream"] == "img":
        y, x = divmod(token, index.facts["grid"][1])
        where = f"row {y + 1}, column {x + 1}"
    return {
        "image": image,
        "step": step,
        "where": where,
        "prompt": prompts[feature] if prompts else None,
        "picture": gallery.source(feature),
    }


def _fires_on(gallery: Gallery, feature: int) -> list[tuple[str, int]]:
    """In the text stream, the tokens at which examples are strongest, most frequent first, with counts."""
    index = gallery.index
    if index.facts["stream"] != "txt":
        return []
    found: Counter[str] = Counter()
    for column in index.examples(feature):
        words = gallery.store.words[int(index.example_image[feature, column])]
        if words:
            found[words[int(index.example_token[feature, column])]] += 1
    return found.most_common(8)


def _card(gallery: Gallery, feature: int) -> dict[str, Any]:
    """What the overview shows of a feature."""
    index = gallery.index
    words = [word["word"] for word in _words(index, feature)]
    fires_on = [token for token, _ in _fires_on(gallery, feature)]
    best = _best(index, feature)
    told = f"{best['attribute']} {best['value']}" if best else ""
    return {
        "id": feature,
        "picture": gallery.card(feature),
        "best": best,
        "words": (fires_on or words)[:4],
        "density": float(index.density[feature]),
        "maximum": float(index.maximum[feature]),
        "image_count": int(index.image_count[feature]),
        "search": " ".join([str(feature), told, *words, *fires_on]).lower(),
    }


def _details(index: FeatureIndex) -> list[tuple[str, str]]:
    """The facts in the overview's header: what the dictionary is, and how well it does on these images."""
    facts = index.facts
    model = facts["store"]["model"]
    if isinstance(model, dict):
        model = next(
            (model[key] for key in ("name", "id", "model_id") if model.get(key)), "unknown"
        )
    alive = int(index.alive.sum())
    details = [
        ("model", str(model)),
        ("site", facts["site"]),
        ("atoms m", f"{index.m:,}"),
        ("width d", f"{facts['d']:,}"),
        ("active k", str(facts["k"])),
        ("L0", charts.number(facts["l0"])),
        ("FVU", "none" if facts["fvu"] is None else charts.number(facts["fvu"])),
        ("dead", charts.percent(1 - alive / index.m)),
        (
            "images",
            f"{len(facts['images']):,} {'held out' if facts['split'] == 'validation' else facts['split']}",
        ),
        ("rows", f"{facts['rows']:,}"),
    ]
    return details
