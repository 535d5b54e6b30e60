"""Globs of sites mean the same to `train sae --site`, `eval --site` and `inspect --sites` as to `harvest`."""

import numpy as np
import pytest

from harvest.sites import KINDS, all_sites, expand_sites
from harvest.store import StoreSpec, create_store, open_store
from jaxdict.dictionary.arrays import Dictionary
from jaxdict.evaluate.config import EvalConfig
from jaxdict.evaluate.rows import choose_rows
from jaxdict.inspect.config import InspectConfig
from jaxdict.inspect.inspect import inspect
from jaxdict.sae.config import TrainSAEConfig
from jaxdict.training.sweep import sites_of

SITES = all_sites(3, 1, KINDS)
D = 4


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    spec = StoreSpec(
        sites=dict.fromkeys(SITES, (1, D)),
        images=2,
        steps=1,
        prompts=["a", "b"],
        seeds=[0, 1],
        split=[0, 1],
        sigmas=[1.0],
        timesteps=[1000.0],
        grid=(1, 1),
        images_per_shard=2,
    )
    path = tmp_path_factory.mktemp("globs") / "store"
    create_store(path, spec).write(0, dict.fromkeys(SITES, np.ones((2, 1, 1, D), np.float32)))
    return path


def trained(store, *patterns):
    config = TrainSAEConfig.of(store=store, site=",".join(patterns), out=store / "run")
    return sites_of(config, open_store(store))


def evaluated(store, *patterns):
    eye, zeros = np.eye(D, dtype=np.float32), np.zeros(D, np.float32)
    dictionary = Dictionary("topk", 1, eye, zeros, encoder=eye, encoder_bias=zeros, typical=zeros)
    config = EvalConfig(dictionary=store, store=store, site=patterns, out=store / "eval.json")
    return list(choose_rows(dictionary, open_store(store), config))


def inspected(store, *patterns):
    return list(inspect(InspectConfig(str(store), sites=patterns))["sites"])


ALL = pytest.mark.parametrize("verb", [trained, evaluated, inspected])


@ALL
@pytest.mark.parametrize(
    ("patterns", "count"),
    [
        (["double.*.img"], 3),
        (["double.2.*"], 2),
        (["double.2.*.*"], 6),
        (["single.0.txt", "double.[01].img.mlp"], 3),
        (["*.*.txt , double.0.img"], 5),
        (["double.2.img,,"], 1),
        (["double.2.im*"], 1),  # a star is any text, but no dot
    ],
)
def test_a_glob_is_matched_part_by_part(store, verb, patterns, count):
    found = verb(store, *patterns)
    assert tuple(found) == expand_sites(patterns, double=3, single=1) and len(found) == count


@ALL
@pytest.mark.parametrize(
    ("patterns", "missing"),
    [
        (["double.*"], "double.*"),
        (["double.2.img", "*"], "*"),
        (["double.*.img,double.2.img.*.*", "x"], "double.2.img.*.*"),
        ([","], ","),
    ],
)
def test_what_matches_no_site_is_told_in_one_line_with_those_that_there_are(
    store, verb, patterns, missing
):
    with pytest.raises(ValueError, match=r"--sites?: ") as error:
        verb(store, *patterns)
    text = str(error.value)
    assert repr(missing) in text and ", ".join(SITES) in text and "\n" not in text
