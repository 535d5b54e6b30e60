"""The shipped weights: a true FluxPipeline, loaded offline, that draws what its prompts say."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

import harvest.shapes
from harvest.shapes import quality
from harvest.shapes.training import build

WEIGHTS = Path(harvest.shapes.__file__).parent / "weights"


@pytest.fixture(scope="module")
def pipe():
    return FluxPipeline.from_pretrained(WEIGHTS, torch_dtype=torch.float32, local_files_only=True)


@pytest.fixture(scope="module")
def recorded():
    """Shares by case as `python -m harvest.shapes.quality --out` wrote them for these weights."""
    return json.loads((WEIGHTS.parent / "quality.json").read_text())


def test_the_folder_is_small_and_in_bfloat16():
    from safetensors import safe_open

    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 20e6
    for path in WEIGHTS.rglob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            names = list(tensors.keys())
            kinds = {tensors.get_slice(name).get_dtype() for name in names}
        assert kinds == {"BF16"}, path.name


def test_parts_are_the_true_classes(pipe):
    names = json.loads((WEIGHTS / "model_index.json").read_text())
    assert names["_class_name"] == "FluxPipeline"
    kinds = {key: value[1] for key, value in names.items() if isinstance(value, list)}
    assert kinds["transformer"] == "FluxTransformer2DModel"
    assert kinds["vae"] == "AutoencoderKL"
    assert kinds["text_encoder"] == "CLIPTextModel"
    assert kinds["text_encoder_2"] == "T5EncoderModel"
    assert kinds["scheduler"] == "FlowMatchEulerDiscreteScheduler"


def test_words_are_one_token_each(pipe):
    text = "a large red striped circle on the left, white background"
    assert len(pipe.tokenizer(text)["input_ids"]) == 13
    assert len(pipe.tokenizer_2(text)["input_ids"]) == 12
    assert pipe.tokenizer(text)["input_ids"][-1] == pipe.text_encoder.config.eos_token_id


def test_the_tokenizers_are_made_the_same_each_time():
    texts = {build.clip_tokenizer().backend_tokenizer.to_str() for _ in range(3)}
    assert len(texts) == 1
    texts = {build.t5_tokenizer().backend_tokenizer.to_str() for _ in range(3)}
    assert len(texts) == 1


@pytest.mark.parametrize("case", ["one object", "two objects"])
def test_pictures_show_their_prompts(pipe, recorded, case):
    """A small sample, so within three standard errors of what is recorded."""
    objects = 1 if case == "one object" else 2
    shares = quality.measure(pipe, objects=objects, prompts=40)
    assert shares["background"] >= 0.9
    for name, share in recorded[case].items():
        assert shares[name] >= share - 3 * np.sqrt(0.25 / 40), (name, shares)


def test_the_recorded_quality_is_what_the_model_is_held_to(recorded):
    """`make slow` measures the record again."""
    one = dict.fromkeys(("background", "colour", "shape", "size", "position"), 0.97)
    for name, aim in (one | {"texture": 0.9}).items():
        assert recorded["one object"][name] >= aim, name
    assert recorded["two objects"]["all"] >= 0.7
    for objects in ("one object", "two objects"):
        assert min(recorded[f"checker, {objects}"].values()) >= 0.99


def test_seeds_make_different_pictures(pipe):
    prompt = "a large red solid circle on the left, white background"
    pictures = quality.generate(pipe, [prompt, prompt], 0, steps=4).astype(int)
    assert np.abs(pictures[0] - pictures[1]).mean() > 0.5
    again = quality.generate(pipe, [prompt, prompt], 0, steps=4).astype(int)
    assert np.array_equal(pictures, again)


@pytest.mark.slow
def test_the_recorded_quality_is_true(pipe, recorded):
    report = quality.full_report(pipe, prompts=500)
    assert report.keys() == recorded.keys()
    for case, shares in report.items():
        for name, share in shares.items():
            assert share == pytest.approx(recorded[case][name], abs=0.03), (case, name)
    for objects in ("one object", "two objects"):
        assert min(report[f"checker, {objects}"].values()) >= 0.99
