"""Stores that keep a sample of the tokens: where an atom comes from is still told; heat maps are refused."""

import numpy as np
import pytest

from harvest.store import create_store, open_store
from jaxdict.itda.labels import sources
from tests.harvest.synthetic import content, make_spec, write


@pytest.fixture
def store(tmp_path):
    where = np.stack([np.sort(np.random.default_rng(i).permutation(12)[:5]) for i in range(11)])
    spec = make_spec(
        sites={"double.2.img": (5, 8)},
        denoising_steps=9,
        step_numbers=(0, 4, 8),
        positions={"img": where},
    )
    activations, pictures = content(spec)
    writer = create_store(tmp_path / "store", spec)
    for shard in writer.pending():
        write(writer, shard, activations, pictures)
    return open_store(tmp_path / "store")


def test_sources_tell_step_and_position_in_the_stream(store):
    source = np.array([[7, 1, 4], [2, 0, 0], [7, 2, 1]], np.int32)
    told = sources(store, "double.2.img", source)
    where = store.positions("double.2.img")
    assert told["position"] == [where[7, 4], where[2, 0], where[7, 1]]
    assert told["denoising_step"] == [0, 4, 8]
    assert told["prompts"] == {str(image): store.prompts[image] for image in (2, 7)}


def test_heat_maps_of_a_sample_are_refused(store, tmp_path):
    pytest.importorskip("torch")
    from interp.config import IndexConfig
    from interp.index.encode import select
    from jaxdict.dictionary.arrays import Dictionary
    from steer.coder import Coder

    atoms = np.eye(8, dtype=np.float32)
    coder = Coder(
        Dictionary("itda", 2, atoms, typical=np.ones(8, np.float32), card={"site": "double.2.img"})
    )
    config = IndexConfig(dictionary=tmp_path, store=store.path, out=tmp_path / "index")
    with pytest.raises(ValueError, match="keeps a sample: heat maps need them all"):
        select(config, coder, store)
