"""The verb `steer-eval`: end to end on the embedded model, with a feature that is known to work."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from harvest.models.pipelines import load_model
from harvest.shapes import draw
from jaxdict.dictionary.arrays import Dictionary
from jaxdict.dictionary.files import save_dictionary
from steer.coder import Coder
from steer.config import SteerEvalConfig
from steer.control import random_directions
from steer.evaluate import evaluate_steering, read_records
from steer.hooks import intervening
from steer.pictures import token_mask

SITE, STEPS = "double.2.img", 4


@pytest.fixture(scope="module")
def model():
    return load_model("shapes")


def scenes(count, colour, rng):
    """Captions of single objects of a colour; the same ones but for the colour from equal generators."""
    drawn = [draw.sample_scene(rng, objects=1) for _ in range(count)]
    painted = [replace(scene, things=(replace(scene.things[0], colour=colour),)) for scene in drawn]
    return [draw.caption(scene) for scene in painted]


def mean_row(model, prompts):
    """Mean activation at the tokens of the objects, over all steps."""
    rows = []
    with intervening(model.pipe, {SITE: lambda x, state: rows.append(x.clone())}):
        pictures = model.generate(prompts, range(len(prompts)), steps=STEPS)
    masks = []
    for picture in pictures:
        things = model.judge(picture).objects
        mask = things[0].mask if things else np.ones(picture.shape[:2], bool)
        masks.append(token_mask(mask, model.grid(), 0.5).ravel())
    return torch.stack(rows).mean(0)[torch.from_numpy(np.stack(masks))].mean(0).numpy()


@pytest.fixture(scope="module")
def dictionary(model, tmp_path_factory):
    """Feature 0 adds the difference of cyan and red objects; feature 1 is a small random atom."""
    rng = np.random.default_rng(0)
    red, cyan = (
        mean_row(model, scenes(16, colour, np.random.default_rng(0))) for colour in ("red", "cyan")
    )
    noise = rng.standard_normal(red.shape) * 0.01 * np.linalg.norm(cyan - red) / len(red) ** 0.5
    atoms = np.stack([cyan - red, noise]).astype(np.float32)
    made = Dictionary(
        "topk",
        1,
        atoms,
        np.zeros(len(red), np.float32),
        atoms,
        np.zeros(2, np.float32),
        typical=np.ones(2, np.float32),
        card={"site": SITE, "model": "shapes"},
    )
    return save_dictionary(made, tmp_path_factory.mktemp("dictionary") / "difference")


@pytest.fixture
def prompts(tmp_path):
    texts = scenes(14, "red", np.random.default_rng(1))
    file = tmp_path / "prompts.jsonl"
    records = [{"prompt": text, "seed": 100 + i} for i, text in enumerate(texts)]
    file.write_text("\n".join(map(json.dumps, records)))
    return file


@pytest.fixture
def config(dictionary, prompts, tmp_path):
    def make(**fields):
        base = {"dictionary": dictionary, "prompts": prompts, "out": tmp_path / "out"}
        base |= {"feature": (0,), "value": (1.0,), "wanted": "colour=cyan", "num_steps": STEPS}
        base |= {"images": 8, "selection": 4, "batch": 4}
        return SteerEvalConfig(**(base | fields))

    return make


def test_the_best_candidate_works_on_pictures_it_was_not_chosen_on(config, capsys):
    made = config(feature=(1, 0), value=(1.5,))
    summary = evaluate_steering(made)
    assert (summary["feature"], summary["value"]) == (0, 1.5)
    assert len(summary["selection"]) == 2 and summary["selection_images"] == 4
    steered, random = summary["steered"], summary["random"]
    assert steered["images"] == random["images"] == 8
    assert steered["success"] >= 0.5
    assert random["success"] <= steered["success"] - 0.4
    assert json.loads((made.out / "summary.json").read_text())["steered"] == json.loads(
        json.dumps(steered)
    )
    verdicts = [json.loads(line) for line in (made.out / "verdicts.jsonl").read_text().splitlines()]
    assert np.mean([row["steered"]["success"] for row in verdicts]) == steered["success"]
    assert all(row["before"]["colour"] != "cyan" for row in verdicts)
    # The prompts reported on come after those that were used to choose.
    order = [record[0] for record in read_records(str(made.prompts))]
    first = min(order.index(row["prompt"]) for row in verdicts)
    assert first >= summary["selection_images"]
    sheet = np.asarray(Image.open(made.out / "sheet.png"))
    assert sheet.shape[1] > 8 * 128
    assert str(made.out / "summary.json") in capsys.readouterr().out
    assert json.loads((made.out / "config.json").read_text())["feature"] == [1, 0]


def test_a_candidate_whose_pictures_are_not_finite_is_refused(config):
    made = config(
        value=(1.0, 70000.0), dtype="float16", num_steps=1, images=2, selection=2, batch=2
    )
    with pytest.raises(
        ValueError, match=r"got NaN in \d of 2 .* steer by less than feature 0 \+ 70000"
    ):
        evaluate_steering(made)
    assert not made.out.exists()


def test_results_do_not_depend_on_the_batch(config, tmp_path):
    one = evaluate_steering(config(images=3, batch=3, num_steps=2))
    two = evaluate_steering(config(images=3, batch=2, num_steps=2, out=tmp_path / "two"))
    assert one["steered"] == two["steered"]


def test_what_cannot_be_measured_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match=r"found none; give more prompts"):
        evaluate_steering(config(source="texture=none", num_steps=1))
    with pytest.raises(ValueError, match=r"feature from 0 to 1, .* got 7"):
        evaluate_steering(config(feature=(7,)))
    with pytest.raises(ValueError, match="nothing is there"):
        evaluate_steering(config(prompts=tmp_path / "missing.jsonl"))
    for fields, flag in [({"feature": ()}, "--feature"), ({"wanted": "cyan"}, "--wanted")]:
        with pytest.raises(ValueError, match=flag):
            config(**fields)


def test_fewer_pictures_than_asked_for_are_said(config, capsys):
    summary = evaluate_steering(config(images=500, num_steps=1))
    assert summary["steered"]["images"] <= 14
    assert "of 500 pictures to report on" in capsys.readouterr().err


def test_prompts_are_those_of_harvest_with_their_seeds_and_repeats(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a", "seed": 7}\n\n{"prompt": "b"}\n{"prompt": "a", "seed": 8}\n')
    assert read_records(str(file), seed=10) == [("a", 7), ("b", 11), ("a", 8)]
    (tmp_path / "p.json").write_text('[{"prompt": "a"}, "b"]')
    assert read_records(str(tmp_path / "p.json")) == [("a", 0), ("b", 1)]
    (tmp_path / "p.txt").write_bytes("a cafe\u0301\r\na\u2028b".encode("utf-16"))
    assert read_records(str(tmp_path / "p.txt")) == [("a cafe\u0301", 0), ("a\u2028b", 1)]


def test_random_directions_keep_every_norm_and_angle(random_dictionary):
    coder = Coder(random_dictionary("itda", transform="full"))
    features = [5, 2, 9, 2]
    atoms = torch.stack([coder.raw_atom(f) for f in (2, 5, 9)])
    drawn = random_directions(coder, features, seed=0)
    assert sorted(drawn) == [2, 5, 9]
    directions = torch.stack([drawn[f] for f in (2, 5, 9)])
    torch.testing.assert_close(directions @ directions.T, atoms @ atoms.T, rtol=1e-3, atol=1e-3)
    again, other = (random_directions(coder, features, seed=seed) for seed in (0, 1))
    assert torch.equal(again[2], drawn[2]) and not torch.allclose(other[2], drawn[2])
    # Drawn at random: nearly orthogonal to the atoms on average over seeds.
    cosines = [
        float(torch.cosine_similarity(random_directions(coder, [2], seed=s)[2], atoms[0], dim=0))
        for s in range(200)
    ]
    assert abs(np.mean(cosines)) < 0.06
    assert np.std(cosines) == pytest.approx(32**-0.5, rel=0.2)
