"""The verb `steer-eval`: how often steering works, by pixels, beside a random direction.

Pictures come in threes from the same noise: unsteered, steered, and steered along a random
direction of the same norm. Candidates (features times values) are compared on pictures of other
prompts than those the result is reported on.
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
from harvest.models import LoadedModel
from steer.coder import Coder
from steer.config import SteerEvalConfig, parse_region, parse_tag
from steer.control import random_directions
from steer.generate import (
    check_edits,
    describe,
    make_edits,
    open_model,
    paint,
    picture_size,
)
from steer.hooks import steering
from steer.judge import Verdict, attributes, choose_object, compare, summarize, token_mask
from steer.sheet import Cell, contact_sheet, save_picture


class Case(NamedTuple):
    """One unsteered picture, its reading, and the object to steer."""

    prompt: str
    seed: int
    picture: np.ndarray
    reading: Any
    target: Any


def measure(config: SteerEvalConfig) -> dict[str, Any]:
    """Steer held-out pictures and read the outcome back from the pixels.

    Args:
        config: see `SteerEvalConfig`.

    Returns:
        The summary that is also written: the chosen feature and value, `steered` and `random`
        (shares changed, kept, success, see `steer.judge.summarize`), and each candidate's figures
        on the selection pictures.

    Raises:
        FileNotFoundError: no dictionary or prompts there.
        ValueError: a model whose pictures cannot be read back; a feature that does not exist; too
            few prompts.
    """
    records = read_prompts(config.prompts, seed=config.seed)
    coder = Coder.from_pretrained(config.dictionary)
    candidates = list(itertools.product(config.feature, config.value))
    if config.op == "ablate":
        candidates = [(feature, config.value[0]) for feature in config.feature]
    for feature, value in candidates:
        check_edits(config, coder, feature, value)
    model = open_model(config, coder)
    if (judge := model.judge) is None:
        raise ValueError(
            f"--model: expected one whose pictures can be read back (shapes), got {model.name}; "
            "look at single pictures with `jaxdict steer`"
        )
    run = _Run(config, model, coder, judge)
    found = run.find_cases(records)
    best, selection, chosen_on = candidates[0], [], set()
    if len(candidates) > 1:
        pool = _take(found, config.selection, "to select on", config)
        chosen_on = {case.prompt for case in pool}
        selection = run.compare_candidates(pool, candidates)
        # Ties go to the gentler edit.
        top = max(selection, key=lambda row: (row["success"], row["changed"], -abs(row["value"])))
        best = (top["feature"], top["value"])
    unseen = (case for case in found if case.prompt not in chosen_on)
    cases = _take(unseen, config.images, "to report on", config)
    steered = run.steer(cases, *best, label="steered")
    random = run.steer(cases, *best, label="random direction", control=True)
    summary = {
        "feature": best[0],
        "value": best[1],
        "edit": describe(config, *best),
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
    _save_verdicts(cases, steered, random, config.out / "verdicts.jsonl")
    sheet = save_picture(
        _draw(summary, cases, steered, random, config.shown), config.out / "sheet.png"
    )
    print(_words(summary))
    print(f"  summary    {config.out / 'summary.json'}\n  sheet      {sheet}")
    return summary


def read_prompts(path: Path, *, seed: int = 0) -> list[tuple[str, int]]:
    """Prompts and seeds of a JSONL file, or a JSON list, of {"prompt", "seed"} records or plain
    strings.

    Args:
        path: the file.
        seed: a record without a seed gets this plus its number.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not such a record, by number; or none at all.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        whole = json.loads(text)
        rows = whole if isinstance(whole, list) else [whole]
    except json.JSONDecodeError:
        rows = [line for line in text.splitlines() if line.strip()]
    records = []
    for number, row in enumerate(rows):
        try:
            value = (
                json.loads(row) if isinstance(row, str) and row.lstrip().startswith("{") else row
            )
            value = {"prompt": value} if isinstance(value, str) else value
            prompt, noise = value["prompt"], value.get("seed", seed + number)
            if not isinstance(prompt, str) or not isinstance(noise, int):
                raise TypeError
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError):
            raise ValueError(
                f'{path}: expected records such as {{"prompt": "a red circle", "seed": 3}}, '
                f"got {str(row)[:80]!r} as record {number}"
            ) from None
        records.append((prompt, noise))
    if not records:
        raise ValueError(f"{path}: expected at least one prompt, found none")
    return records


class Outcome(NamedTuple):
    """One steered picture and what became of it."""

    verdict: Verdict
    picture: np.ndarray


class _Run:
    """One model, dictionary and config at work."""

    def __init__(
        self,
        config: SteerEvalConfig,
        model: LoadedModel,
        coder: Coder,
        judge: Callable[[np.ndarray], Any],
    ) -> None:
        self.config, self.model, self.judge = config, model, judge
        self.coder = coder.to(model.pipe.transformer.device)
        self.wanted = parse_tag(config.wanted, "--wanted")
        self.source = parse_tag(config.source, "--source") if config.source else None
        self.region = parse_region(config.region)

    def find_cases(self, records: Sequence[tuple[str, int]]) -> Iterator[Case]:
        """Unsteered pictures with an object to steer, made in batches as they are asked for."""
        for batch in _batched(records, self.config.batch):
            prompts, seeds = zip(*batch, strict=True)
            pictures = paint(self.model, self.config, prompts, seeds)
            for (prompt, seed), picture in zip(batch, pictures, strict=True):
                reading = self.judge(picture)
                target = choose_object(reading, self.wanted, self.source)
                if target is not None:
                    yield Case(prompt, seed, picture, reading, target)

    def compare_candidates(
        self, pool: Sequence[Case], candidates: Sequence[tuple[int, float]]
    ) -> list[dict[str, Any]]:
        """Figures of each (feature, value) on the selection pictures."""
        rows = []
        for feature, value in candidates:
            results = self.steer(pool, feature, value, label=f"feature {feature} at {value:g}")
            figures = summarize([verdict for verdict, _ in results])
            rows.append({"feature": feature, "value": value, **figures})
        return rows

    def steer(
        self,
        cases: Sequence[Case],
        feature: int,
        value: float,
        *,
        label: str,
        control: bool = False,
    ) -> list[Outcome]:
        """Verdict and picture of each case, steered by the feature or, for a control, at random."""
        results = []
        bar = tqdm(total=len(cases), desc=label, unit="picture")
        for number, batch in enumerate(_batched(cases, self.config.batch)):
            region: Any = None if self.region == "all" else self.region
            if region == "object":
                grid = self.model.grid(picture_size(self.model, self.config))
                region = np.stack(
                    [token_mask(case.target.mask, grid, self.config.coverage) for case in batch]
                )
            edits = make_edits(self.config, feature, value, region)
            # A fresh direction for each batch: one draw could be lucky.
            features = [edit.feature for edit in edits]
            seed = self.config.seed + number
            directions = random_directions(self.coder, features, seed) if control else None
            with steering(
                self.model.pipe, self.coder, edits, site=self.config.site, directions=directions
            ):
                pictures = paint(
                    self.model,
                    self.config,
                    [case.prompt for case in batch],
                    [case.seed for case in batch],
                )
            for case, picture in zip(batch, pictures, strict=True):
                after = self.judge(picture)
                verdict = compare(case.reading, case.target, after, self.wanted)
                results.append(Outcome(verdict, picture))
            bar.update(len(batch))
        bar.close()
        return results


def _batched(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _take(cases: Iterator[Case], count: int, purpose: str, config: SteerEvalConfig) -> list[Case]:
    """The first cases; says when there are fewer than asked for, and refuses when there is none."""
    taken = list(itertools.islice(cases, count))
    source = f" that is {config.source}" if config.source else ""
    lack = f"pictures {purpose}, with an object{source} and not yet {config.wanted}"
    if not taken:
        raise ValueError(
            f"{config.prompts}: expected {count} {lack}, found none; give more prompts"
        )
    if len(taken) < count:
        print(f"note: found only {len(taken)} of {count} {lack}", file=sys.stderr)
    return taken


def _save_verdicts(
    cases: Sequence[Case], steered: Sequence[Outcome], random: Sequence[Outcome], path: Path
) -> None:
    """One line a picture: prompt, seed, and what was read before and after."""
    lines = [
        json.dumps(
            {
                "prompt": case.prompt,
                "seed": case.seed,
                "before": attributes(case.reading, case.target),
                "steered": {**one.verdict.after, "success": one.verdict.success},
                "random": {**two.verdict.after, "success": two.verdict.success},
            }
        )
        for case, one, two in zip(cases, steered, random, strict=True)
    ]
    write_text(path, "\n".join(lines) + "\n")


def _draw(
    summary: dict[str, Any],
    cases: Sequence[Case],
    steered: Sequence[Outcome],
    random: Sequence[Outcome],
    shown: int,
) -> Image:
    """The sheet: unsteered, steered and random rows, with what was read below each picture."""
    attribute = summary["wanted"].split("=")[0]
    names = ("background",) if attribute == "background" else (attribute, "shape")

    def words(values: dict[str, str]) -> str:
        return " ".join(values[name] for name in dict.fromkeys(names)).strip() or "no object"

    rows = [
        (
            "before",
            [Cell(case.picture, words(attributes(case.reading, case.target))) for case in cases],
        ),
        *(
            (
                label,
                [
                    Cell(one.picture, words(one.verdict.after), one.verdict.success)
                    for one in outcomes
                ],
            )
            for label, outcomes in (("steered", steered), ("random", random))
        ),
    ]
    goal = summary["wanted"].replace("=", " ")
    return contact_sheet(
        [(label, cells[:shown]) for label, cells in rows],
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
