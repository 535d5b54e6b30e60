"""Plots of a store: one picture a kind of site, a line a step, panels for the streams that are there."""

import warnings

import numpy as np
import pytest

from harvest.store import StoreSpec, create_store, open_store
from jaxdict.inspect.plots import _block, _ticks, plot_norms, plot_spectrum
from jaxdict.inspect.spectrum import Spectrum

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")


def make(path, sites, steps):
    sigmas = np.linspace(1, 0.1, steps)
    spec = StoreSpec(
        sites={site: (4, 6) for site in sites},
        images=2,
        steps=steps,
        prompts=["a", "b"],
        seeds=[1, 2],
        split=[0, 1],
        sigmas=sigmas,
        timesteps=1000 * sigmas,
        grid=(2, 2),
        attrs={"model": {"name": "toy", "double": 2, "single": 2}},
    )
    writer = create_store(path, spec)
    rng = np.random.default_rng(0)
    writer.write(0, {site: rng.normal(size=(2, steps, 4, 6)) for site in sites})
    return open_store(path)


RESIDUAL = [
    f"{block}.{i}.{s}" for block in ("double", "single") for i in (0, 1) for s in ("img", "txt")
]


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def colours(path):
    """Saturated colours of a picture, which lines alone have."""
    flat = pixels(path).reshape(-1, 3).astype(int)
    return {tuple(c) for c in flat[np.ptp(flat, axis=1) > 70]}


@pytest.mark.parametrize("steps", [1, 12])
def test_norms(tmp_path, steps):
    store = make(tmp_path / "s", RESIDUAL, steps)
    means = {site: list(1.0 + np.arange(steps) + i) for i, site in enumerate(RESIDUAL)}
    (path,) = plot_norms(tmp_path, store, means)
    assert path == tmp_path / "norms.png" and len(colours(path)) >= steps
    assert not list(tmp_path.glob(".*.tmp"))
    first = path.read_bytes()
    plot_norms(tmp_path, store, {site: [2 * x**2 for x in line] for site, line in means.items()})
    assert path.read_bytes() != first


def test_each_kind_has_a_picture_and_each_stream_a_panel(tmp_path):
    sites = [
        "double.0.img",
        "double.1.img",
        "double.0.img.mlp",
        "double.0.txt.mlp",
        "single.1.txt.attn",
    ]
    store = make(tmp_path / "s", sites, 2)
    made = plot_norms(tmp_path, store, {site: [1.0, 10.0] for site in sites})
    assert [path.name for path in made] == ["norms.png", "norms-mlp.png", "norms-attn.png"]
    widths = [pixels(path).shape[1] for path in made]
    assert widths[1] > 1.5 * widths[0] and widths[2] == widths[0]


def test_norms_that_are_all_zero_or_lie_close_together_are_drawn_without_a_warning(tmp_path):
    sites = ["double.1.img", "single.0.img", "single.1.txt"]
    store = make(tmp_path / "s", sites, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for level in (0.0, 100.0):
            means = {site: [level, 1.1 * level] for site in sites}
            (path,) = plot_norms(tmp_path, store, means)
            assert len(colours(path)) >= 1


def test_many_blocks_get_a_tick_each_fifth_and_none_beside_the_first_single_one():
    ticks = _ticks(0, 56, 19)
    assert [_block(depth, 19) for depth in ticks[:6]] == ["d0", "d5", "d10", "d15", "s0", "s5"]
    assert _block(ticks[-1], 19) == "s35"
    assert "d20" not in [_block(depth, 21) for depth in _ticks(0, 40, 21)]
    assert _ticks(0, 5, 3) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("count", [1, 12])
def test_spectra(tmp_path, count):
    rng = np.random.default_rng(0)
    found = {
        f"{block}.{i}.{stream}": Spectrum(50, np.sort(rng.exponential(size=20))[::-1])
        for block in ("double", "single")
        for i in range(count)
        for stream in ("img", "txt")
    }
    store = make(tmp_path / "s", ["double.0.img"], 1)
    (path,) = plot_spectrum(tmp_path, store, found)
    assert path == tmp_path / "spectrum.png" and len(colours(path)) >= 2 * count
    (one,) = plot_spectrum(tmp_path, store, {k: v for k, v in found.items() if k.endswith("img")})
    assert pixels(one).shape[1] < 1000
    neurons = {f"{site}.mlp": values for site, values in found.items()}
    both = plot_spectrum(tmp_path, store, {**found, **neurons})
    assert [path.name for path in both] == ["spectrum.png", "spectrum-mlp.png"]
