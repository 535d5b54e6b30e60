"""`jaxdict eval` against NumPy on the same held-out rows."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from harvest.store import StoreSpec, create_store, open_store
from jaxdict import cli
from jaxdict.dictionary import coder
from jaxdict.dictionary.arrays import Dictionary
from jaxdict.dictionary.files import save_dictionary
from jaxdict.evaluate.config import EvalConfig
from jaxdict.evaluate.evaluate import evaluate
from jaxdict.rows.source import floats, source_of
from tests.jaxdict.planted import SITE, write_planted_store
from tests.reference import pursuit as slow_pursuit
from tests.reference import sae as reference

TXT, OTHER, WIDE = "double.2.txt", "single.1.img", "double.2.img.mlp"
TOKENS = {SITE: 16, TXT: 5, OTHER: 16, WIDE: 16}


def random_dictionary(kind, d, site=SITE, *, k=3, d_out=None, **card):
    rng = np.random.default_rng(0)
    atoms = rng.normal(size=(20, d_out or d)).astype(np.float32)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    shared = {"typical": np.ones(20, np.float32), "card": {"site": site, **card}}
    if kind != "itda":
        zero, bias = np.zeros(20, np.float32), np.ones(d_out or d, np.float32)
        encoder = rng.normal(size=(20, d)).astype(np.float32) if d_out else atoms
        return Dictionary(kind, k, 1.5 * atoms, bias, encoder, zero, **shared)
    scale = np.full(d, 0.5, np.float32)
    mean = rng.normal(size=d).astype(np.float32)
    return Dictionary("itda", k, atoms, mean=mean, transform=scale, inverse=1 / scale, **shared)


def held_rows(store, site=SITE, split="validation"):
    source = source_of(open_store(store), site, split=split)
    return floats(source.read(source.images)).astype(np.float64)


def step_of(x, site=SITE):
    return np.arange(len(x)) // TOKENS[site] % 2


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_planted_store(tmp_path_factory.mktemp("eval") / "store")


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    """Four sites, of two streams and two widths, with different means and scales."""
    rng = np.random.default_rng(1)
    spec = StoreSpec(
        sites={site: (tokens, 24 if site == WIDE else 16) for site, tokens in TOKENS.items()},
        images=10,
        steps=2,
        prompts=[f"prompt {i}" for i in range(10)],
        seeds=list(range(10)),
        split=[int(i % 3 == 0) for i in range(10)],
        sigmas=[1.0, 0.5],
        timesteps=[1000.0, 500.0],
        grid=(4, 4),
        images_per_shard=10,
        attrs={"model": {"id": "sites"}},
    )
    path = tmp_path_factory.mktemp("sites") / "store"
    writer = create_store(path, spec)
    rows = {}
    for number, (site, (tokens, d)) in enumerate(spec.sites.items()):
        x = rng.normal(size=(10, 2, tokens, d)) * np.exp(rng.normal(size=d))
        rows[site] = (1 + number) * x.astype(np.float32) + 3 * number
    rows[OTHER][:, 1] = rows[OTHER][:1, :1, :1]  # every row of the second step is the same
    writer.write(0, rows)
    return path


def run(dictionary, store, folder, **settings):
    """The evaluation, and its JSON file read back strictly."""
    path = save_dictionary(dictionary, folder / "dictionary")
    settings = {"plots": False, "batch": 100, **settings}
    config = EvalConfig(dictionary=path, store=store, out=folder / "eval.json", **settings)
    result = evaluate(config)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(config.out.read_text(), parse_constant=refuse) == result
    return result


def check(numbers, x, x_hat, step):
    """The numbers that every way to rebuild rows has."""
    std = x.std(0)
    z, z_hat = x / std, x_hat / std
    assert numbers["rows"] == len(x)
    assert numbers["fvu"] == pytest.approx(reference.fvu(x, x_hat), rel=1e-3)
    assert numbers["fvu_standardized"] == pytest.approx(reference.fvu(z, z_hat), rel=1e-3)
    for name in (0, 1):
        own = step == name
        raw, standardized = reference.fvu(x[own], x_hat[own]), reference.fvu(z[own], z_hat[own])
        assert numbers["fvu_per_step"][str(name)] == pytest.approx(raw, rel=1e-3)
        found = numbers["fvu_standardized_per_step"][str(name)]
        assert found == pytest.approx(standardized, rel=1e-3)
    assert numbers["cosine"] == pytest.approx(cosines(x, x_hat).mean(), abs=1e-5)


def cosines(x, x_hat):
    return np.sum(x * x_hat, 1) / np.linalg.norm(x, axis=1) / np.linalg.norm(x_hat, axis=1)


@pytest.mark.parametrize("kind", ["topk", "itda"])
def test_numbers_are_numpys(store, tmp_path, kind):
    dictionary = random_dictionary(kind, 16)
    result = run(dictionary, store, tmp_path)
    x = held_rows(store)
    codes = coder.encode(dictionary, x)
    x_hat = np.asarray(coder.decode(dictionary, codes), np.float64)
    active = np.asarray(codes.dense(20)) != 0
    numbers = result["metrics"]
    check(numbers, x, x_hat, step_of(x))
    assert numbers["ve"] == pytest.approx(reference.ve(x, x_hat), rel=1e-3)
    assert numbers["l0"] == pytest.approx(active.sum(1).mean())
    assert numbers["dead_share"] == pytest.approx(1 - active.any(0).mean())
    for q in (0.05, 0.5, 0.95):
        low = np.quantile(active.sum(1), q, method="inverted_cdf")
        assert numbers["l0_quantiles"][str(q)] == low
        wanted = np.quantile(cosines(x, x_hat), q, method="inverted_cdf")
        assert numbers["cosine_quantiles"][str(q)] == pytest.approx(wanted, abs=1e-3)
    assert sum(numbers["l0_histogram"]["rows"]) == len(x)
    share = active.mean(0)
    density = numbers["density"]
    assert density["never"] == (share == 0).sum()
    wanted, _ = np.histogram(np.log10(share[share > 0]), density["log10_edges"])
    assert density["features"] == wanted.tolist() and sum(wanted) + density["never"] == 20

    error, variance = np.square(x - x_hat).sum(0), np.square(x - x.mean(0)).sum(0)
    order = np.argsort(-error / variance)
    worst = numbers["per_dimension"]["worst"]
    assert [one["dimension"] for one in worst] == order[:10].tolist()
    for one in worst:
        i = one["dimension"]
        assert one["fvu"] == pytest.approx(error[i] / variance[i], rel=1e-3)
        assert one["variance_share"] == pytest.approx(variance[i] / variance.sum(), rel=1e-3)
        assert one["error_share"] == pytest.approx(error[i] / error.sum(), rel=1e-3)
    median = numbers["per_dimension"]["quantiles"]["0.5"]
    assert median == pytest.approx(np.median(error / variance), rel=1e-3)
    assert result["per_site"][SITE]["metrics"] == result["per_stream"]["img"]["metrics"] == numbers
    assert result["site"] == SITE and result["target"] is None and "pursuit" not in result


def test_baselines_are_numpys_on_the_same_rows(store, tmp_path):
    result = run(random_dictionary("topk", 16), store, tmp_path, seed=5)
    x, t = held_rows(store), held_rows(store, split="train")
    mean, std, step = t.mean(0), t.std(0), step_of(x)
    simple = result["baselines"]
    check(simple["mean"], x, np.broadcast_to(mean, x.shape), step)
    assert simple["mean"]["ve"] == pytest.approx(0, abs=1e-6)

    _, _, vectors = np.linalg.svd(t - mean, full_matrices=False)
    pca = (x - mean) @ vectors[:3].T @ vectors[:3] + mean
    assert simple["pca"]["components"] == 3
    check(simple["pca"], x, pca, step)
    assert simple["pca"]["ve"] == pytest.approx(reference.ve(x, pca), rel=1e-3)

    atoms = np.random.default_rng(5).standard_normal((20, 16), np.float32).astype(np.float64)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    z = (x - mean) / std
    codes = np.stack([slow_pursuit.gradient_pursuit(row, atoms, 3)[0] for row in z])
    check(simple["random"], x, codes @ atoms * std + mean, step)
    assert simple["random"]["atoms"] == 20 and simple["random"]["seed"] == 5
    assert simple["random"]["l0"] == pytest.approx((codes > 0).sum(1).mean(), rel=1e-3)


@pytest.mark.parametrize("space", ["raw", "standardized"])
def test_pursuit_takes_the_place_of_the_encoder(store, tmp_path, capsys, space):
    facts = {"normalization": {"kind": "standardize"}} if space == "standardized" else {}
    dictionary = random_dictionary("topk", 16, **facts)
    result = run(dictionary, store, tmp_path, encoder="pursuit", random=False, memory_mb=1)
    x, t = held_rows(store), held_rows(store, split="train")
    std = t.std(0) if space == "standardized" else np.ones(16)
    target, atoms = (x - dictionary.bias) / std, dictionary.atoms.astype(np.float64) / std
    norms = np.linalg.norm(atoms, axis=1, keepdims=True)
    codes = [slow_pursuit.gradient_pursuit(row, atoms / norms, 3)[0] for row in target]
    x_hat = (np.stack(codes) / norms.T) @ dictionary.atoms + dictionary.bias
    assert result["pursuit_space"] == space and "random" not in result["baselines"]
    check(result["pursuit"], x, x_hat, step_of(x))
    name = "fvu" if space == "raw" else "fvu_standardized"
    assert result["pursuit"][name] < result["metrics"][name]
    lines = capsys.readouterr().out.splitlines()
    for label, part in (("own encoder", "metrics"), ("pursuit", "pursuit")):
        (line,) = [line for line in lines if line.startswith(f"  topk, {label}")]
        assert f"{result[part]['fvu']:.4g}" in line


def test_pursuit_is_itdas_own_encoder(store, tmp_path, capsys):
    result = run(random_dictionary("itda", 16), store, tmp_path, encoder="pursuit", random=False)
    assert result["pursuit"] == result["metrics"] and result["pursuit_space"] == "own"
    assert "own encoder: both are the same" in capsys.readouterr().out


def test_where_k_is_only_a_limit_rivals_get_as_many_atoms_as_are_used(store, tmp_path):
    dictionary = random_dictionary("relu", 16, k=20)
    result = run(dictionary, store, tmp_path, encoder="pursuit")
    l0 = (np.asarray(coder.encode(dictionary, held_rows(store)).values) > 0).sum(1).mean()
    assert result["k"] == 20 and result["active"] == round(l0) < 16
    assert result["baselines"]["pca"]["components"] == round(l0)
    assert result["pursuit"]["l0"] <= round(l0) and result["baselines"]["random"]["l0"] <= round(l0)


def test_several_sites_each_around_its_own_mean(sites, tmp_path, capsys):
    dictionary = random_dictionary("topk", 16)
    asked = ("*.*.txt", f"{OTHER},double.2.img")
    result = run(dictionary, sites, tmp_path, site=asked, encoder="pursuit", plots=True)
    names = [SITE, TXT, OTHER]
    note = f"note: the dictionary was trained at {SITE}; at {TXT}, {OTHER} it says how far"
    told = capsys.readouterr()
    assert note in told.err and result["trained_site"] == SITE
    assert list(result["per_site"]) == names and result["site"] == ", ".join(names)
    assert result["per_stream"]["img"]["sites"] == [SITE, OTHER] and result["stream"] == "img, txt"

    rows = {site: held_rows(sites, site) for site in names}
    hats = {site: np.asarray(dictionary_pass(dictionary, x), float) for site, x in rows.items()}
    error = {site: np.square(rows[site] - hats[site]).sum(0) for site in names}
    spread = {site: np.square(x - x.mean(0)).sum(0) for site, x in rows.items()}
    groups = {"img": [SITE, OTHER], "txt": [TXT], "": names} | {site: [site] for site in names}
    for name, members in groups.items():
        part = result if not name else result[f"per_{'site' if '.' in name else 'stream'}"][name]
        numbers = part["metrics"]
        assert numbers["rows"] == sum(len(rows[site]) for site in members)
        raw = sum(error[s].sum() for s in members) / sum(spread[s].sum() for s in members)
        assert numbers["fvu"] == pytest.approx(raw, rel=1e-3)
        each = np.stack([error[s] / spread[s] for s in members])
        weights = [len(rows[s]) for s in members]
        by_dimension = np.average(each, axis=0, weights=weights)
        assert numbers["fvu_standardized"] == pytest.approx(by_dimension.mean(), rel=1e-3)
        assert numbers["per_dimension"]["worst"][0]["dimension"] == np.argmax(by_dimension)
        total = np.concatenate([cosines(rows[s], hats[s]) for s in members])
        assert numbers["cosine"] == pytest.approx(total.mean(), abs=1e-5)
        assert set(part["baselines"]) == {"mean", "pca", "random"} and "pursuit" in part
    assert result["per_site"][OTHER]["metrics"]["fvu_per_step"]["1"] is None, "no variance there"
    pictures = ["eval.png", "eval-img.png", "eval-txt.png", "eval-sites.png"]
    assert result["plots"] == [str(tmp_path / name) for name in pictures]
    assert all((tmp_path / name).stat().st_size for name in pictures)
    assert all(told.out.count(f"\n  {site} ") == 2 for site in names), "a table for each encoder"


def dictionary_pass(dictionary, x):
    return coder.decode(dictionary, coder.encode(dictionary, x))


def test_a_transcoder_is_measured_on_the_rows_it_predicts(sites, tmp_path):
    dictionary = random_dictionary("topk", 16, d_out=24, target=WIDE)
    result = run(dictionary, sites, tmp_path)
    x, y = held_rows(sites), held_rows(sites, WIDE)
    check(result["metrics"], y, np.asarray(dictionary_pass(dictionary, x), float), step_of(y))
    t = held_rows(sites, WIDE, "train")
    _, _, vectors = np.linalg.svd(t - t.mean(0), full_matrices=False)
    pca = (y - t.mean(0)) @ vectors[:3].T @ vectors[:3] + t.mean(0)
    assert set(result["baselines"]) == {"mean", "pca"}
    check(result["baselines"]["pca"], y, pca, step_of(y))
    assert result["site"] == SITE and result["target"] == WIDE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": "pursuit"}, f"--encoder: expected own for a transcoder.* rows of {WIDE}"),
        ({"site": (SITE, OTHER)}, "--site: expected one site for a transcoder"),
        ({"site": (TXT,)}, rf"stream of {TXT} \(5 tokens\), got {WIDE} \(16\)"),
    ],
)
def test_what_a_transcoder_cannot_have_is_one_line(sites, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        run(random_dictionary("topk", 16, d_out=24, target=WIDE), sites, tmp_path, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("target", "message"),
    [("single.9.img", "harvest both sites"), (TXT, "stream of"), (OTHER, "24 .* got 16")],
)
def test_a_transcoders_target_has_to_be_there(sites, tmp_path, target, message):
    with pytest.raises(ValueError, match=message):
        run(random_dictionary("topk", 16, d_out=24, target=target), sites, tmp_path)


def test_rows_limit_split_and_site(store, tmp_path):
    dictionary = random_dictionary("topk", 16, site="single.9.img")
    result = run(dictionary, store, tmp_path, site=(SITE,), split="train", rows=96)
    assert result["metrics"]["rows"] == 96
    with pytest.raises(ValueError, match=r"got 'single\.9\.img'"):
        run(dictionary, store, tmp_path)
    with pytest.raises(ValueError, match=r"--site: expected sites of .* got 'double\.\*\.txt'"):
        run(dictionary, store, tmp_path, site=("double.*.txt",))


def test_a_batch_that_no_machine_has_room_for_is_refused_by_its_flag(store, tmp_path):
    said = f"^--batch: expected what fits .* would take .*, got {10**12}; lower --batch"
    with pytest.raises(ValueError, match=said):
        run(random_dictionary("topk", 16), store, tmp_path, batch=10**12)
    assert not (tmp_path / "eval.json").exists()


def test_wrong_width_is_named(store, sites, tmp_path):
    with pytest.raises(ValueError, match="width 12 as in the dictionary, got 16"):
        run(random_dictionary("topk", 12), store, tmp_path)
    with pytest.raises(ValueError, match=r"sites of width 16 .* got double\.2\.img\.mlp \(24\)"):
        run(random_dictionary("topk", 16), sites, tmp_path, site=("*.*.*", "*.*.*.mlp"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("site", SITE), ("site", ("",)), ("encoder", "other"), ("split", "test")),
        *(("memory_mb", 0), ("batch", 0), ("seed", -1), ("rows", -1), ("out", "eval.png")),
    ],
)
def test_a_wrong_setting_names_its_flag(tmp_path, field, value):
    settings = {"dictionary": tmp_path, "store": tmp_path, "out": tmp_path / "eval.json"}
    value = tmp_path / value if field == "out" else value
    with pytest.raises(ValueError, match=f"--{field.replace('_', '-')}: expected"):
        EvalConfig(**settings | {field: value})


def test_from_the_command_line_and_without_matplotlib(store, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    path = save_dictionary(random_dictionary("topk", 16), tmp_path / "dictionary")
    words = [str(path), "--store", str(store), "--out", str(tmp_path / "eval.json"), "--no-random"]
    result = cli.call(["eval", *words, "--site", "double.*.img", "double.2.*"])
    assert result["plots"] == [] and not list(tmp_path.glob("*.png"))
    assert list(result["per_site"]) == [SITE]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "no plots: matplotlib is not installed (pip install 'jaxdict[interp]')"
