"""The verb `steer-eval`: how often steering works, by pixels, beside a random direction.

Three pictures are made from the same noise: unsteered, steered, and steered along a random
direction of the same norm. Candidates (features times values) are compared on pictures whose
prompts differ from those that the result is reported on.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL.Image import Image
from tqdm import tqdm

from harvest.atomic import write_json, write_text
from harvest.models import LoadedModel, tell_cut_prompts
from harvest.prompts import canonical, read_prompts
from steer.coder import Coder
from steer.config import SteerEvalConfig, parse_region, parse_tag
from steer.control import random_directions
from steer.hooks import steering
from steer.pictures import (
    check_edits,
    describe_edits,
    generate_pictures,
    make_edits,
    open_model,
    picture_size,
    save_picture,
    token_mask,
)
from steer.sheet import Cell, contact_sheet
from steer.verdict import (
    DetectedObject,
    SceneReading,
    Verdict,
    attributes,
    choose_object,
    compare,
    summarize,
)


class UnsteeredPicture(NamedTuple):
    """A picture as the model makes it, and what can be steered in it.

    Attributes:
        prompt: its prompt.
        seed: seed of its noise.
        picture: uint8 [H, W, 3].
        reading: what the model's `judge` reads from it.
        target: the object of the reading that is steered.
    """

    prompt: str
    seed: int
    picture: np.ndarray
    reading: SceneReading
    target: DetectedObject


class SteeredPicture(NamedTuple):
    """A steered picture, uint8 [H, W, 3], and what became of the unsteered one."""

    verdict: Verdict
    picture: np.ndarray


class _Results(NamedTuple):
    """The pictures that the result is reported on, one of each a prompt."""

    unsteered: list[UnsteeredPicture]
    steered: list[SteeredPicture]
    random: list[SteeredPicture]


def evaluate_steering(config: SteerEvalConfig) -> dict[str, Any]:
    """Steer held-out pictures and read from the pixels what became of them.

    Args:
        config: see `SteerEvalConfig`.

    Returns:
        The summary that is also written: the chosen feature and value, `steered` and `random`
        (shares changed, kept, success: see `steer.verdict.summarize`), and the same figures of each
        candidate on the selection pictures.

    Raises:
        FileNotFoundError: the dictionary does not exist.
        ValueError: the prompts or the model's pictures cannot be read, a feature does not exist, or there are
            too few prompts.
    """
    records = read_records(str(config.prompts), seed=config.seed)
    coder = Coder.from_pretrained(config.dictionary, verify=config.verify)
    candidates = list(itertools.product(config.feature, config.value))
    if config.op == "ablate":
        candidates = [(feature, config.value[0]) for feature in config.feature]
    for feature, value in candidates:
        check_edits(config, coder, feature=feature, value=value)
    model = open_model(config, coder)
    if (judge := model.judge) is None:
        raise ValueError(
            f"--model: expected one whose pictures can be read back (shapes), got {model.name}; "
            "look at single pictures with `jaxdict steer`"
        )
    tell_cut_prompts(model, [prompt for prompt, _ in records], config.max_sequence_length)
    evaluator = _Evaluator(config, model, coder, judge)
    found = evaluator.find_pictures(records)
    best, selection, chosen_on = candidates[0], [], set()
    if len(candidates) > 1:
        pool = _take(found, config.selection, config, purpose="to select on")
        chosen_on = {canonical(unsteered.prompt) for unsteered in pool}
        selection = evaluator.compare_candidates(pool, candidates)
        # Ties go to the gentler edit.
        top = max(selection, key=lambda row: (row["success"], row["changed"], -abs(row["value"])))
        best = (top["feature"], top["value"])
    feature, value = best
    unseen = (unsteered for unsteered in found if canonical(unsteered.prompt) not in chosen_on)
    taken = _take(unseen, config.images, config, purpose="to report on")
    steered = evaluator.steer(taken, feature, value, label="steered")
    random = evaluator.steer(taken, feature, value, label="random direction", control=True)
    results = _Results(taken, steered, random)
    summary = {
        "feature": feature,
        "value": value,
        "edit": describe_edits(config, feature=feature, value=value),
        "site": config.site or coder.dictionary.card.get("site"),
        "wanted": config.wanted,
        "source": config.source,
        "steered": summarize([verdict for verdict, _ in steered]),
        "random": summarize([verdict for verdict, _ in random]),
        "selection": selection,
        "selection_images": config.selection if selection else 0,
    }
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / "config.json", dataclasses.asdict(config))
    write_json(config.out / "summary.json", summary)
    _save_verdicts(results, config.out / "verdicts.jsonl")
    sheet = save_picture(_draw(results, summary, shown=config.shown), config.out / "sheet.png")
    print(_words(summary))
    print(f"  summary    {config.out / 'summary.json'}\n  sheet      {sheet}")
    return summary


def read_records(source: str, *, seed: int = 0) -> list[tuple[str, int]]:
    """Prompts and their seeds, as `harvest.prompts.read_prompts` reads them, equal prompts included.

    Args:
        source: a file, a data set, or shapes.
        seed: plus its number, the seed of a prompt that has none.

    Raises:
        ValueError: the source cannot be read, or holds no prompt.
    """
    found = read_prompts(source, seed=seed, repeats=True).prompts
    return [
        (prompt.text, seed + number if prompt.seed is None else prompt.seed)
        for number, prompt in enumerate(found)
    ]


class _Evaluator:
    """Makes and judges the pictures of one config, with its model and dictionary."""

    def __init__(
        self,
        config: SteerEvalConfig,
        model: LoadedModel,
        coder: Coder,
        judge: Callable[[np.ndarray], SceneReading],
    ) -> None:
        self.config, self.model, self.judge = config, model, judge
        self.coder = coder.to(model.pipe.transformer.device)
        self.wanted = parse_tag(config.wanted, "--wanted")
        self.source = parse_tag(config.source, "--source") if config.source else None
        self.region = parse_region(config.region)

    def find_pictures(self, records: Sequence[tuple[str, int]]) -> Iterator[UnsteeredPicture]:
        """Unsteered pictures with an object to steer, made in batches as they are asked for."""
        for batch in _batched(records, self.config.batch):
            prompts, seeds = zip(*batch, strict=True)
            pictures = generate_pictures(self.model, self.config, prompts=prompts, seeds=seeds)
            for (prompt, seed), picture in zip(batch, pictures, strict=True):
                reading = self.judge(picture)
                target = choose_object(reading, self.wanted, self.source)
                if target is not None:
                    yield UnsteeredPicture(prompt, seed, picture, reading, target)

    def compare_candidates(
        self, pool: Sequence[UnsteeredPicture], candidates: Sequence[tuple[int, float]]
    ) -> list[dict[str, Any]]:
        """Figures of each (feature, value) on the selection pictures."""
        rows = []
        for feature, value in candidates:
            steered = self.steer(pool, feature, value, label=f"feature {feature} at {value:g}")
            figures = summarize([verdict for verdict, _ in steered])
            rows.append({"feature": feature, "value": value, **figures})
        return rows

    def steer(
        self,
        unsteered: Sequence[UnsteeredPicture],
        feature: int,
        value: float,
        *,
        label: str,
        control: bool = False,
    ) -> list[SteeredPicture]:
        """Each picture again, steered by the feature or, as a control, along random directions."""
        results = []
        bar = tqdm(total=len(unsteered), desc=label, unit="picture")
        for number, batch in enumerate(_batched(unsteered, self.config.batch)):
            region: Any = None if self.region == "all" else self.region
            if region == "object":
                grid = self.model.grid(picture_size(self.model, self.config))
                region = np.stack(
                    [token_mask(one.target.mask, grid, self.config.coverage) for one in batch]
                )
            edits = make_edits(self.config, feature=feature, value=value, region=region)
            # A fresh direction for each batch: one draw could be lucky.
            features = [edit.feature for edit in edits]
            seed = self.config.seed + number
            directions = random_directions(self.coder, features, seed) if control else None
            with steering(
                self.model.pipe, self.coder, edits, site=self.config.site, directions=directions
            ):
                pictures = generate_pictures(
                    self.model,
                    self.config,
                    prompts=[one.prompt for one in batch],
                    seeds=[one.seed for one in batch],
                    edit=describe_edits(self.config, feature=feature, value=value),
                )
            for one, picture in zip(batch, pictures, strict=True):
                verdict = compare(one.reading, one.target, self.judge(picture), self.wanted)
                results.append(SteeredPicture(verdict, picture))
            bar.update(len(batch))
        bar.close()
        return results


def _batched(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _take(
    found: Iterator[UnsteeredPicture], count: int, config: SteerEvalConfig, *, purpose: str
) -> list[UnsteeredPicture]:
    """The first pictures; says so if there are fewer than asked for, and refuses if there are none."""
    taken = list(itertools.islice(found, count))
    source = f" that is {config.source}" if config.source else ""
    lack = f"pictures {purpose}, with an object{source} and not yet {config.wanted}"
    if not taken:
        raise ValueError(
            f"{config.prompts}: expected {count} {lack}, found none; give more prompts"
        )
    if len(taken) < count:
        print(f"note: found only {len(taken)} of {count} {lack}", file=sys.stderr)
    return taken


def _save_verdicts(results: _Results, path: Path) -> None:
    """One line a picture: prompt, seed, and what was read before and after."""
    lines = [
        json.dumps(
            {
                "prompt": before.prompt,
                "seed": before.seed,
                "before": attributes(before.reading, before.target),
                "steered": {**steered.verdict.after, "success": steered.verdict.success},
                "random": {**random.verdict.after, "success": random.verdict.success},
            }
        )
        for before, steered, random in zip(*results, strict=True)
    ]
    write_text(path, "\n".join(lines) + "\n")


def _draw(results: _Results, summary: dict[str, Any], *, shown: int) -> Image:
    """The sheet: unsteered, steered and random rows, with what was read below each picture."""
    attribute = summary["wanted"].split("=")[0]
    names = ("background",) if attribute == "background" else (attribute, "shape")

    def words(values: dict[str, str]) -> str:
        return " ".join(values[name] for name in dict.fromkeys(names)).strip() or "no object"

    def row(pictures: list[SteeredPicture]) -> list[Cell]:
        return [
            Cell(one.picture, words(one.verdict.after), one.verdict.success)
            for one in pictures[:shown]
        ]

    before = [
        Cell(one.picture, words(attributes(one.reading, one.target)))
        for one in results.unsteered[:shown]
    ]
    goal = summary["wanted"].replace("=", " ")
    return contact_sheet(
        [("before", before), ("steered", row(results.steered)), ("random", row(results.random))],
        title=f"Steering to {goal}: {_share(summary['steered'])}, "
        f"a random direction {_share(summary['random'])}",
        subtitle=f"{summary['edit']}, at {summary['site']}. Green frame: {goal}, with the "
        "background and other objects as before. Same noise in each column.",
        columns=8,
    )


def _share(figures: dict[str, Any]) -> str:
    return f"{round(figures['success'] * figures['images'])} of {figures['images']}"


def _words(summary: dict[str, Any]) -> str:
    steered, random = summary["steered"], summary["random"]
    low, high = steered["success_interval"]
    kept = ", ".join(f"{name} {share:.0%}" for name, share in steered["kept"].items())
    return (
        f"steered to {summary['wanted']} with the rest kept in {_share(steered)} pictures "
        f"(95% interval {low:.0%} to {high:.0%}), by a random direction in {_share(random)}\n"
        f"  {summary['edit']}\n"
        f"  kept: {kept}"
    )
