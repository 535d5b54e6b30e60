"""The embedded model, one like it whose weights are random and all in use, and a small store without a model."""

import json
import shutil

import pytest
import torch

from harvest.store import create_store, from_bits, open_store, to_bits
from tests.harvest.synthetic import content, make_spec, write


@pytest.fixture(scope="session")
def embedded():
    from harvest.models.pipelines import load_model

    return load_model("shapes", device="cpu")


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory):
    """A guided pipeline with random weights and a shifted schedule, as FLUX.1-dev has."""
    from diffusers import FluxTransformer2DModel

    from harvest.models.files import EMBEDDED

    folder = tmp_path_factory.mktemp("model") / "random"
    shutil.copytree(EMBEDDED, folder)
    config = dict(FluxTransformer2DModel.load_config(str(EMBEDDED / "transformer")))
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel.from_config(config | {"guidance_embeds": True})
    shutil.rmtree(folder / "transformer")
    transformer.save_pretrained(folder / "transformer")
    path = folder / "scheduler" / "scheduler_config.json"
    schedule = json.loads(path.read_text()) | {"use_dynamic_shifting": True, "shift": 3.0}
    path.write_text(json.dumps(schedule))
    return folder


@pytest.fixture(scope="session")
def random_model(random_folder):
    from harvest.models.pipelines import load_model

    return load_model(str(random_folder), device="cpu")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A finished store, its spec, and the activations and pictures that it must give back."""
    path = tmp_path_factory.mktemp("store") / "store"
    spec = make_spec()
    activations, pictures = content(spec)
    writer = create_store(path, spec)
    for shard in writer.pending():
        write(writer, shard, activations, pictures)
    rounded = {site: from_bits(to_bits(a)) for site, a in activations.items()}
    return open_store(path), spec, rounded, pictures
