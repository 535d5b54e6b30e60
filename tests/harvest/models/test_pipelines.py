"""Loading: the embedded model without a network, folders, the hub's cache, quantization, bad requests."""

import json
import shutil
import socket

import numpy as np
import pytest
import torch
from torch import nn

from harvest.models.files import EMBEDDED, content_hash
from harvest.models.pipelines import load_model
from harvest.shapes.check import Reading

PROMPTS = ["a large red striped circle on the left, white background", "a blue star"]


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something reached for the network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_the_embedded_model_needs_no_network(no_network):
    model = load_model("shapes", device="cpu")
    assert model.name == model.info["name"] == "shapes" and model.info["revision"] is None
    assert (model.size, model.grid(), model.steps) == ((64, 64), (8, 8), 8)
    assert model.info["sha256"] == content_hash(EMBEDDED) and len(model.info["sha256"]) == 64
    assert json.loads(json.dumps(model.info)) == model.info
    assert model.pipe.transformer.dtype == torch.float32
    pictures = model.generate(PROMPTS, [1, 2], steps=1)
    assert pictures.shape == (2, 64, 64, 3) and pictures.dtype == np.uint8
    assert isinstance(model.judge(pictures[0]), Reading)


def test_a_folder_is_a_model(random_model, random_folder, embedded):
    assert random_model.name == str(random_folder)
    assert random_model.judge is None
    assert random_model.info["sha256"] != embedded.info["sha256"]
    assert load_model(str(EMBEDDED), device="cpu").name == "shapes"


def test_guided_models_have_the_defaults_of_dev(random_model, embedded):
    assert random_model.info["guided"] and not embedded.info["guided"]
    assert (random_model.steps, random_model.guidance) == (28, 3.5)
    assert (random_model.max_sequence_length, embedded.guidance) == (512, 0.0)


def test_guidance_reaches_the_transformer(random_model):
    weak = random_model.generate(PROMPTS[:1], [0], steps=1, max_sequence_length=16, guidance=1.0)
    strong = random_model.generate(PROMPTS[:1], [0], steps=1, max_sequence_length=16, guidance=30.0)
    own = random_model.generate(PROMPTS[:1], [0], steps=1, max_sequence_length=16)
    same = random_model.generate(PROMPTS[:1], [0], steps=1, max_sequence_length=16, guidance=3.5)
    assert (weak != strong).any() and (own == same).all()


@pytest.mark.parametrize(("steps", "size"), [(1, (64, 64)), (4, (64, 64)), (5, (96, 32))])
def test_the_schedule_is_what_the_pipeline_does(embedded, random_model, steps, size):
    for model in (embedded, random_model):
        sigmas, timesteps = model.schedule(steps, size)
        picture = model.generate(["a"], [0], steps=steps, size=size, max_sequence_length=16)
        assert picture.shape == (1, *size, 3)
        assert sigmas == model.pipe.scheduler.sigmas[:-1].tolist()
        assert timesteps == model.pipe.scheduler.timesteps.tolist()
        assert len(sigmas) == steps and sigmas[0] == 1.0


def test_a_shifted_schedule_depends_on_the_size(random_model):
    small, large = random_model.schedule(4, (64, 64)), random_model.schedule(4, (1024, 1024))
    assert small[0][1] < large[0][1]


def test_noise_depends_on_the_seed_alone(random_model):
    text, options = PROMPTS[0], {"steps": 1, "max_sequence_length": 16}
    many = random_model.generate([text] * 3, [5, 6, 7], **options).astype(int)
    alone = random_model.generate([text], [6], **options).astype(int)
    assert np.abs(many[1] - alone[0]).max() <= 1  # sums may differ in their last bit
    assert np.abs(many[0] - alone[0]).mean() > 1
    again = random_model.generate([text] * 3, [5, 6, 7], **options)
    np.testing.assert_array_equal(again, many)


def test_words_are_the_tokens_of_the_text_stream(embedded):
    words = embedded.words(PROMPTS, 16)
    assert [len(row) for row in words] == [16, 16]
    assert words[0][:5] == ["▁a", "▁large", "▁red", "▁striped", "▁circle"]
    assert words[1][3:] == ["</s>", *["<pad>"] * 12]
    assert len(embedded.words(PROMPTS)[0]) == embedded.max_sequence_length


def test_nf4_on_a_cpu_keeps_the_outer_layers_and_the_picture(random_folder, random_model):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    small = load_model(str(random_folder), quantize="nf4", device="cpu")
    transformer, text = small.pipe.transformer, small.pipe.text_encoder_2
    four = bitsandbytes.nn.Linear4bit
    whole = [n for n, m in transformer.named_modules() if type(m) is nn.Linear]
    assert sorted(whole) == ["context_embedder", "proj_out", "x_embedder"]
    for part in (transformer, text):
        quantized = [m for m in part.modules() if isinstance(m, four)]
        assert quantized and all(m.weight.dtype == torch.uint8 for m in quantized)
        assert all(m.weight.quant_state.quant_type == "nf4" for m in quantized)
    assert all(n.endswith(".wo") for n, m in text.named_modules() if type(m) is nn.Linear)
    assert small.info["quantization"] == "nf4"
    options = {"steps": 2, "max_sequence_length": 16}
    exact = random_model.generate(PROMPTS, [1, 2], **options).astype(float)
    close = small.generate(PROMPTS, [1, 2], **options).astype(float)
    error, spread = np.abs(close - exact).mean(), exact.std()
    assert 0 < error < 0.5 * spread


def test_precision_is_as_asked(random_folder):
    model = load_model(str(random_folder), dtype="bfloat16", device="cpu")
    assert model.info["dtype"] == "bfloat16"
    assert model.pipe.transformer.dtype == model.pipe.text_encoder_2.dtype == torch.bfloat16
    assert model.generate(["a"], [0], steps=1, max_sequence_length=16).shape == (1, 64, 64, 3)


def test_a_model_of_the_hub_is_told_by_its_revision(
    tmp_path, monkeypatch, random_folder, no_network
):
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny-flux"
    shutil.copytree(random_folder, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.HF_HUB_OFFLINE", True, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = load_model("someone/tiny-flux", device="cpu")
    assert (model.name, model.info["revision"]) == ("someone/tiny-flux", revision)
    assert model.info["sha256"] == content_hash(random_folder)
    with pytest.raises(ValueError, match="'someone/else', but it cannot be fetched") as error:
        load_model("someone/else", device="cpu")
    assert "\n" not in str(error.value)


def test_the_hash_sees_weights_and_settings(random_folder, tmp_path):
    folder = shutil.copytree(random_folder, tmp_path / "model")
    before = content_hash(folder)
    assert before == content_hash(random_folder)
    settings = folder / "scheduler" / "scheduler_config.json"
    text = settings.read_text()
    settings.write_text(text.replace("3.0", "2.0"))
    assert content_hash(folder) != before
    settings.write_text(text)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert content_hash(folder) != before


def test_the_hash_of_a_very_large_file_samples_it(tmp_path):
    path = tmp_path / "large.safetensors"
    hashes = set()
    for place, size in (
        (0, 2**28 + 9),
        (2**28 + 8, 2**28 + 9),
        (None, 2**28 + 9),
        (None, 2**28 + 8),
    ):
        with path.open("wb") as file:
            file.truncate(size)
            if place is not None:
                file.seek(place)
                file.write(b"x")
        hashes.add(content_hash(tmp_path))
    assert len(hashes) == 4


def copy_with(folder, tmp_path, change):
    copy = shutil.copytree(folder, tmp_path / "model")
    change(copy)
    return str(copy)


def other_pipeline(folder):
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("FluxPipeline", "StableDiffusionPipeline"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_pipeline, "expected a FluxPipeline at .*, got a StableDiffusionPipeline"),
        (lambda f: shutil.rmtree(f / "vae"), "expected a whole FLUX pipeline"),
        (lambda f: (f / "model_index.json").unlink(), "a model_index.json"),
    ],
)
def test_a_folder_without_a_whole_flux_is_refused(random_folder, tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as error:
        load_model(copy_with(random_folder, tmp_path, change), device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "no-such-folder"}, "a pipeline's folder or a hub id"),
        ({"name": "./no/such"}, "a pipeline's folder or a hub id"),
        ({"name": "/no/such"}, "a pipeline's folder or a hub id"),
        ({"quantize": "int8"}, "expected a GPU for int8, got device cpu"),
        ({"quantize": "nf3"}, "expected quantize to be one of"),
        ({"dtype": "float8"}, "expected dtype to be one of"),
        ({"device": "tpu3000"}, "expected a torch device"),
    ],
)
def test_a_bad_request_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load_model(**{"name": "shapes", "device": "cpu", **options})


def test_a_size_that_is_no_whole_number_of_tokens_is_refused(embedded):
    with pytest.raises(ValueError, match="multiples of 8 pixels, got 60x64"):
        embedded.grid((60, 64))
    with pytest.raises(ValueError, match="expected a seed a prompt, got 2 and 1"):
        embedded.generate(PROMPTS, [1])
