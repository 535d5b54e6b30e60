"""The summary of an index: how many features are alive, and what the clearest of them tell."""

from __future__ import annotations

from typing import Any

import numpy as np

from interp.index import ground_truth
from interp.index.postings import CodeStatistics


def summarize(
    statistics: CodeStatistics,
    scores: ground_truth.Scores,
    tags: list[tuple[str, str]],
    *,
    fvu: float | None,
) -> dict[str, Any]:
    """The numbers of summary.json: what the index found, in short."""
    alive = int((statistics.maximum > 0).sum())
    attributes: dict[str, dict[str, Any]] = {}
    for place, (attribute, value) in enumerate(tags):
        feature = int(scores.tag_feature[place])
        entry = {
            "feature": feature,
            "auroc_selected": float(scores.selected[feature, place]),
            "auroc": float(scores.reported[feature, place]),
            "pooling": ground_truth.POOLINGS[scores.pooling[feature, place]],
            "images": scores.counts[place].tolist(),
        }
        attributes.setdefault(attribute, {"median_auroc": 0.0, "tags": {}})["tags"][value] = entry
    for attribute in attributes.values():
        found = [entry["auroc"] for entry in attribute["tags"].values()]
        attribute["median_auroc"] = float(np.median(found))
    return {
        "features": statistics.m,
        "alive": alive,
        "dead_share": 1 - alive / statistics.m,
        "images": statistics.images,
        "rows": statistics.rows,
        "fvu": fvu,
        "l0": float(statistics.active.sum() / max(1, statistics.rows)),
        "attributes": attributes,
        "clearest": _clearest(scores, tags),
    }


def _clearest(
    scores: ground_truth.Scores, tags: list[tuple[str, str]], count: int = 5
) -> list[Any]:
    """The clearest features on the half that chooses, no two of them for one tag."""
    result, seen = [], set()
    for feature in scores.order:
        place = int(scores.best_tag[feature])
        if place < 0 or place in seen:
            continue
        seen.add(place)
        attribute, value = tags[place]
        result.append(
            {
                "feature": int(feature),
                "attribute": attribute,
                "value": value,
                "auroc_selected": float(scores.selected[feature, place]),
                "auroc": float(scores.reported[feature, place]),
            }
        )
        if len(result) == count:
            break
    return result
