"""The whole journey on the embedded model, as a chain of the same verbs a person would type.

Prompts -> activations -> SAE and ITDA dictionary -> export -> feature index -> report -> steered pictures, and a
summary in numbers (summary.json), in words (on the terminal) and in one picture (sheet.png).
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import time
from pathlib import Path
from typing import Any, ClassVar

from harvest.atomic import write_json
from harvest.flags import at_least
from harvest.store import open_store
from jaxdict import cli
from jaxdict.demo.sheet import draw_sheet

SITE = "double.2.img"
"""The site that is learned: the image stream after the last double block."""
STRENGTHS = (1.0, 2.0, 3.0, 4.0, 6.0)
"""Strengths tried on the selection pictures, in units of the feature's typical activation."""


@dataclasses.dataclass(frozen=True)
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
        learning = ("atoms", "itda_atoms", "k", "rows", "itda_rows")
        at_least(self, 1, ("images", "steps", *learning, "pages", "steered"), "at least 1")


class _Journey:
    """Runs stages once: a stage that is finished with the same command is read back from its record."""

    def __init__(self, out: Path, stages: int) -> None:
        self.out = out
        self.stages = stages
        self.seconds: dict[str, float] = {}

    def go(
        self, name: str, title: str, verb: str, *positional: object, **flags: object
    ) -> dict[str, Any]:
        """Runs a verb as the command line does, and returns its summary."""
        command = _command(verb, *positional, **flags)
        print(f"\n[{len(self.seconds) + 1}/{self.stages}] {title}")
        print(f"      jaxdict {shlex.join(command)}", flush=True)
        record = self.out / "stages" / f"{name}.json"
        if record.is_file():
            kept = json.loads(record.read_text())
            if kept["command"] == command:
                print("      finished before; kept")
                self.seconds[name] = kept["seconds"]
                return kept["summary"]
        started = time.perf_counter()
        summary = cli.call(_resumable(command))
        self.seconds[name] = round(time.perf_counter() - started, 1)
        record.parent.mkdir(exist_ok=True)
        write_json(record, {"command": command, "seconds": self.seconds[name], "summary": summary})
        return json.loads(record.read_text())["summary"]


def demo(config: DemoConfig) -> dict[str, Any]:
    """Runs every stage and writes summary.json and sheet.png.

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
    if config.fresh and out.exists():
        if not (out / "stages").is_dir():
            raise ValueError(
                f"--fresh: expected the folder of an earlier demo, got {out}; remove it by hand"
            )
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    store, seed = out / "store", config.seed
    journey = _Journey(out, stages=12)
    journey.go(
        "harvest",
        "Pictures are made and activations kept",
        "harvest",
        model="shapes",
        sites=(SITE, SITE.replace("img", "txt")),
        images=config.images,
        steps=config.steps,
        seed=seed,
        out=store,
    )
    training = {
        "sae": {"kind": "topk", "atoms": config.atoms, "rows": config.rows},
        "itda": {"atoms": config.itda_atoms, "rows": config.itda_rows},
    }
    titles = {
        "sae": "A sparse autoencoder learns the activations",
        "itda": "ITDA picks activations as atoms",
    }
    measured: dict[str, dict[str, Any]] = {}
    for kind, settings in training.items():
        run, name = out / kind, kind.upper()
        journey.go(
            f"train-{kind}",
            titles[kind],
            f"train {kind}",
            store=store,
            site=SITE,
            k=config.k,
            seed=seed,
            out=run,
            **settings,
        )
        dictionary = run / "dictionary"
        journey.go(
            f"export-{kind}",
            f"The {name} becomes a dictionary of raw activations",
            "export",
            run,
            out=dictionary,
        )
        measured[kind] = journey.go(
            f"eval-{kind}",
            f"The {name} is measured on held-out pictures",
            "eval",
            dictionary,
            store=store,
            out=run / "eval.json",
        )
        measured[kind]["index"] = journey.go(
            f"index-{kind}",
            f"What makes each {name} feature fire",
            "interp index",
            dictionary=dictionary,
            store=store,
            out=run / "index",
        )
        journey.go(
            f"report-{kind}",
            f"Pages to browse the {name} features",
            "interp report",
            index=run / "index",
            features=config.pages,
            out=out / f"report-{kind}",
        )
    steered = _steer(config, journey, measured["sae"]["index"])
    summary = _summary(config, journey, measured, steered)
    write_json(out / "summary.json", summary)
    sheet = draw_sheet(out, summary)
    print(in_words(summary, out, sheet))
    return summary


def _steer(config: DemoConfig, journey: _Journey, index: dict[str, Any]) -> dict[str, Any]:
    """Steers held-out pictures by the SAE's clearest colour features.

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
    prompts = out / "held_out.jsonl"
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    summary = journey.go(
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
    return {"colour": colour, **summary}


def _summary(
    config: DemoConfig,
    journey: _Journey,
    measured: dict[str, dict[str, Any]],
    steered: dict[str, Any],
) -> dict[str, Any]:
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
    summary["seconds"] = journey.seconds | {"all": round(sum(journey.seconds.values()), 1)}
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


def _command(verb: str, *positional: object, **flags: object) -> list[str]:
    words = [*verb.split(), *map(str, positional)]
    for name, value in flags.items():
        values = value if isinstance(value, tuple) else (value,)
        words += ["--" + name.replace("_", "-"), *map(str, values)]
    return words


def _resumable(command: list[str]) -> list[str]:
    """The command, told to go on when an earlier run was cut off."""
    if command[0] != "train":
        return command
    run = Path(command[command.index("--out") + 1])
    return [*command, "--resume"] if run.is_dir() and any(run.iterdir()) else command
