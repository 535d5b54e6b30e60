"""Plots of an evaluation: which pictures are made, and that they show the numbers, odd ones too."""

from __future__ import annotations

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdict.codes.codes import Codes
from jaxdict.evaluate import plots
from jaxdict.metrics.distributions import row_sums
from jaxdict.metrics.fidelity import BatchReport, Measurement, batch_sums, fired
from jaxdict.metrics.quality import quality_of

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")

LABELS = {"own": "topk", "pursuit": "topk, pursuit", "random": "random dictionary"}
LABELS |= {"pca": "PCA-4", "mean": "training mean"}


def measured(noise, *, steps=2, n=60, d=24, m=40, slots=4, active=None, seed=0):
    """A real measurement of random rows and noisy reconstructions, with `active` atoms a row."""
    rng = np.random.default_rng(seed)
    found = Measurement()
    for step in range(steps):
        x = rng.normal(size=(n, d)) * np.exp(rng.normal(size=d)) + 1
        x_hat = x + noise * rng.normal(size=(n, d))
        used = np.full(n, slots) if active is None else rng.integers(*active, n)
        values = (np.arange(slots) < used[:, None]).astype(np.float32)
        spread = np.floor(m * rng.random((n, slots)) ** 4).astype(np.int32)
        codes = Codes(jnp.asarray(spread), jnp.asarray(values))
        a, b, weight = jnp.asarray(x), jnp.asarray(x_hat), jnp.ones(n)
        found.add(step, report(codes, a, b, weight, m))
    return quality_of([found])


@partial(jax.jit, static_argnames="m")
def report(codes, x, x_hat, weight, m):
    sums = batch_sums(x, x_hat, weight, jnp.ones(x.shape[1]))
    counts = row_sums(codes, x, x_hat, weight)
    return BatchReport(sums, None, fired(codes, m, weight), counts)


def ways(own=0.1, names=tuple(LABELS), **settings):
    noise = {"own": own, "pursuit": 0.05, "random": 0.5, "pca": 0.7, "mean": 1.5}
    return {name: measured(noise[name], **settings) for name in names}


def steps(count):
    return [{"step": i, "captured": i, "sigma": 1 - i / count} for i in range(count)]


def draw(folder, groups, sites=None, count=4):
    sites = sites or {"double.2.img": groups[""]}
    captions = plots.Captions("title", LABELS, steps(count))
    return plots.draw(folder / "eval.json", captions, groups=groups, by_site=sites)


def colours(path):
    """Saturated colours of a picture, which only what stands for numbers has."""
    flat = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3).astype(int)
    return {f"#{r:02x}{g:02x}{b:02x}" for r, g, b in flat[np.ptp(flat, axis=1) > 60]}


def test_one_sheet_with_the_colour_of_every_way(tmp_path):
    (path,) = draw(tmp_path, {"": ways()})
    assert path == tmp_path / "eval.png"
    assert set(plots.COLOURS.values()) - {plots.COLOURS["mean"]} <= colours(path)
    assert [file.name for file in tmp_path.iterdir()] == ["eval.png"], "no draft is left behind"
    first = path.read_bytes()
    draw(tmp_path, {"": ways(own=0.3)})
    assert path.read_bytes() != first
    draw(tmp_path, {"": ways(names=("own", "pca", "mean"))})
    assert not colours(path) & {plots.COLOURS["random"], plots.COLOURS["pursuit"]}


def test_streams_have_sheets_and_sites_of_a_stream_a_comparison(tmp_path):
    some = ways(names=("own", "pca", "mean"), steps=2)
    groups = {"": some, "img": some, "txt": some}
    sites = {f"double.{i}.{stream}": some for i in range(7) for stream in ("img", "txt")}
    made = draw(tmp_path, groups, sites, 2)
    names = ["eval.png", "eval-img.png", "eval-txt.png", "eval-sites.png"]
    assert [path.name for path in made] == names
    one_each = {site: some for site in ("double.0.img", "double.0.txt")}
    assert draw(tmp_path, {"": some}, one_each, 2) == [tmp_path / names[0]]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 1, "d": 1},
        {"steps": 30, "own": 0.0},  # a FVU of 0 has no place on a logarithmic axis
        {"slots": 200, "m": 5000, "active": (20, 180)},
        {"slots": 1, "active": (0, 1)},  # no feature is ever active
    ],
)
def test_odd_numbers_are_drawn_without_a_complaint(tmp_path, settings):
    (path,) = draw(tmp_path, {"": ways(**settings)}, count=30)
    assert len(colours(path)) > 10


def test_without_matplotlib_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert draw(tmp_path, {"": ways(steps=1)}) is None and not list(tmp_path.iterdir())
