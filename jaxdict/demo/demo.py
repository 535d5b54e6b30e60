"""`jaxdict demo`: everything once on the embedded model, as a chain of the verbs that a person would type.

Prompts -> activations -> SAE and ITDA dictionary -> export -> feature index -> report -> steered pictures, and a
summary in numbers (summary.json), in words (on the terminal) and in one picture (sheet.png).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from harvest.atomic import write_json, write_text
from harvest.store import open_store
from jaxdict.demo.config import DemoConfig
from jaxdict.demo.sheet import draw_sheet
from jaxdict.demo.stages import Stages

SITE = "double.2.img"
"""The site that is learned: the image stream after the last double block."""
STRENGTHS = (1.0, 2.0, 3.0, 4.0, 6.0)
"""Strengths tried on the selection pictures, in units of the feature's typical activation."""
_LEARNED = {
    "sae": "A sparse autoencoder learns the activations",
    "itda": "ITDA picks activations as atoms",
}


def demo(config: DemoConfig) -> dict[str, Any]:
    """Run every stage and write summary.json and sheet.png.

    Args:
        config: see `DemoConfig`.

    Returns:
        The summary: rows, FVU and L0 of both dictionaries, dead share, the clearest features with
        attribute and AUROC, steering success by pixels with its random-direction control, seconds
        per stage.

    Raises:
        ValueError: `--fresh` on a folder that is not a demo's.
    """
    out = config.out
    records = out / "stages"
    if config.fresh and out.exists():
        if not records.is_dir():
            raise ValueError(
                f"--fresh: expected the folder of an earlier demo, got {out}; remove it by hand"
            )
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    stages = Stages(records, count=12)
    stages.run(
        "harvest",
        "Pictures are made and activations kept",
        "harvest",
        model="shapes",
        sites=(SITE, SITE.replace("img", "txt")),
        images=config.images,
        steps=config.steps,
        seed=config.seed,
        out=out / "store",
    )
    measured = {kind: _learn(kind, config, stages) for kind in _LEARNED}
    steered = _steer(config, stages, measured["sae"]["index"])
    summary = _summary(config, measured, steered)
    summary["seconds"] = stages.seconds | {"all": round(sum(stages.seconds.values()), 1)}
    write_json(out / "summary.json", summary)
    sheet = draw_sheet(out, summary)
    print(in_words(summary, out, sheet))
    return summary


def _learn(kind: str, config: DemoConfig, stages: Stages) -> dict[str, Any]:
    """Train a dictionary, measure it, and see what its features fire on.

    Returns:
        What `jaxdict eval` found, and under `index` what `jaxdict interp index` found.
    """
    store, run, name = config.out / "store", config.out / kind, kind.upper()
    settings = {
        "sae": {"kind": "topk", "atoms": config.atoms, "rows": config.rows},
        "itda": {"atoms": config.itda_atoms, "rows": config.itda_rows},
    }[kind]
    stages.run(
        f"train-{kind}",
        _LEARNED[kind],
        f"train {kind}",
        store=store,
        site=SITE,
        k=config.k,
        seed=config.seed,
        out=run,
        **settings,
    )
    dictionary = run / "dictionary"
    stages.run(
        f"export-{kind}",
        f"The {name} becomes a dictionary of raw activations",
        "export",
        run,
        out=dictionary,
    )
    measured = stages.run(
        f"eval-{kind}",
        f"The {name} is measured on held-out pictures",
        "eval",
        dictionary,
        store=store,
        out=run / "eval.json",
    )
    measured["index"] = stages.run(
        f"index-{kind}",
        f"What makes each {name} feature fire",
        "interp index",
        dictionary=dictionary,
        store=store,
        out=run / "index",
    )
    stages.run(
        f"report-{kind}",
        f"Pages to browse the {name} features",
        "interp report",
        index=run / "index",
        features=config.pages,
        out=config.out / f"report-{kind}",
    )
    return measured


def _steer(config: DemoConfig, stages: Stages, index: dict[str, Any]) -> dict[str, Any]:
    """Steer held-out pictures by the SAE's clearest colour features.

    Colours are ranked by the AUROC of their feature on the half of the images that chooses; feature
    and strength are chosen on selection pictures, and the result is reported on others.
    """
    out = config.out
    store = open_store(out / "store")
    tags = index["attributes"]["colour"]["tags"]
    colour = max(tags, key=lambda value: tags[value]["auroc_selected"])
    records = [
        {"prompt": store.prompts[image], "seed": int(store.seeds[image])}
        for image in store.indices("validation")
        if store.labels[image].get("objects") == ["1"]
        and colour not in store.labels[image]["colour"]
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    prompts = write_text(out / "held_out.jsonl", lines)
    return stages.run(
        "steer",
        f"Held-out objects are steered to {colour} by one feature",
        "steer-eval",
        dictionary=out / "sae" / "dictionary",
        feature=tags[colour]["feature"],
        value=STRENGTHS,
        prompts=prompts,
        wanted=f"colour={colour}",
        num_steps=config.steps,
        images=config.steered,
        seed=config.seed,
        out=out / "steered",
    )


def _summary(
    config: DemoConfig,
    measured: dict[str, dict[str, Any]],
    steered: dict[str, Any],
) -> dict[str, Any]:
    """What the stages found, in few numbers."""
    store = open_store(config.out / "store")
    images, steps, tokens, width = store.shape(SITE)
    summary: dict[str, Any] = {
        "site": SITE,
        "store": {
            "images": images,
            "held_out_images": len(store.indices("validation")),
            "rows": images * steps * tokens,
            "d": width,
        },
    }
    for kind, result in measured.items():
        metrics, index = result["metrics"], result["index"]
        summary[kind] = {
            "atoms": index["features"],
            "k": config.k,
            "fvu": metrics["fvu"],
            "l0": metrics["l0"],
            "dead_share": index["dead_share"],
            "median_auroc": {
                name: attribute["median_auroc"] for name, attribute in index["attributes"].items()
            },
            "clearest": index["clearest"],
        }
    summary["steering"] = {
        "wanted": steered["wanted"],
        "feature": steered["feature"],
        "value": steered["value"],
        "steered": steered["steered"],
        "random_direction": steered["random"],
    }
    return summary


def in_words(summary: dict[str, Any], out: Path, sheet: Path) -> str:
    """The summary as a person would tell it."""
    store, steering = summary["store"], summary["steering"]
    success, control = steering["steered"], steering["random_direction"]
    lines = [
        "",
        f"{store['images']} pictures gave {store['rows']:,} activations of width {store['d']} at {SITE}.",
    ]
    for kind, words in (("sae", "The sparse autoencoder"), ("itda", "The ITDA dictionary")):
        part = summary[kind]
        lines.append(
            f"{words} ({part['atoms']} atoms, {part['l0']:.1f} active) leaves {part['fvu']:.1%} of the "
            f"variance of held-out rows unexplained; {part['dead_share']:.1%} of its features never fired there."
        )
    told = ", ".join(
        f"{row['attribute']} {row['value']} by feature {row['feature']} ({row['auroc']:.3f})"
        for row in summary["sae"]["clearest"]
    )
    lines += [
        f"Clearest features (AUROC on pictures they were not chosen on): {told}.",
        f"Adding feature {steering['feature']} at strength {steering['value']:g} made {success['success']:.0%} of "
        f"{success['images']} held-out objects {steering['wanted'].split('=')[1]} with the background kept; "
        f"a random direction as long, {control['success']:.0%}.",
        f"All of it took {summary['seconds']['all']:.0f} seconds.",
        "",
        f"  at a glance  {sheet}",
        f"  SAE pages    {out / 'report-sae' / 'index.html'}",
        f"  ITDA pages   {out / 'report-itda' / 'index.html'}",
        f"  numbers      {out / 'summary.json'}",
    ]
    return "\n".join(lines)
