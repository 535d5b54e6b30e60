"""`jaxdict eval`: how well an exported dictionary rebuilds held-out rows, beside baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from harvest.atomic import write_json
from harvest.flags import in_memory
from harvest.store import before, open_store, print_growth, print_split, stream_of
from jaxdict.dictionary import Dictionary, load_dictionary
from jaxdict.evaluate import baselines
from jaxdict.evaluate import plots as eval_plots
from jaxdict.evaluate.config import EvalConfig
from jaxdict.evaluate.rows import EvalRows, choose_rows
from jaxdict.metrics import Measurement, Quality, measure_dictionary, pursuit_encoder, quality_of
from jaxdict.plots import MISSING
from jaxdict.rows import print_padding
from jaxdict.runs import plain
from jaxdict.sae import kinds
from jaxdict.tables import number, percent, print_table


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Measure an exported dictionary; write JSON and plots.

    Args:
        config: settings.

    Returns:
        What the JSON file holds. `metrics` (see `jaxdict.metrics.quality.Quality.numbers`), `pursuit` (the same
        with --encoder pursuit) and `baselines` (mean, pca and random, see `Quality.brief`) are over
        the rows of all sites; `per_stream` and `per_site` hold the same three by stream and site.
        `active` says how many atoms a row pursuit and the baselines may use, `pursuit_space` in
        which space pursuit minimized the error. A transcoder is not compared with a random
        dictionary; an itda dictionary's own encoder is pursuit, so that `pursuit` repeats its `metrics`.

    Raises:
        ValueError: dictionary and store do not fit each other.
        FileNotFoundError: there is no such dictionary.
    """
    dictionary = load_dictionary(config.dictionary, verify=config.verify)
    in_memory(["batch"], config.batch, 4 * config.batch * dictionary.d, "a batch of rows")
    store = open_store(config.store)
    held = before(store, str(dictionary.card.get("store_fingerprint")))
    if held is not None:
        print_growth(store, held, str(config.dictionary))
    rows = choose_rows(dictionary, store, config)
    print_split(config.split, max(len(one.source.images) for one in rows.values()))
    print_padding([one.source for one in rows.values()])
    options: dict[str, Any] = {"batch": config.batch, "memory_mb": config.memory_mb}
    own = {
        site: measure_dictionary(dictionary, one.source, name=f"{site}, own encoder", **options)
        for site, one in rows.items()
    }
    active = _active(dictionary, quality_of(list(own.values())))
    found = {
        site: {"own": own[site], **_rivals(dictionary, one, active, config)}
        for site, one in rows.items()
    }

    streams: dict[str, list[str]] = {}
    for site in rows:
        streams.setdefault(stream_of(site), []).append(site)
    whole = _together(found, list(rows))
    by_stream = {stream: _together(found, sites) for stream, sites in streams.items()}
    by_site = {site: _together(found, [site]) for site in rows}
    target = next(iter(rows.values())).target
    numbers = partial(_numbers, active=active, config=config)
    result = {
        "dictionary": str(config.dictionary),
        "kind": dictionary.kind,
        "d": dictionary.d,
        "m": dictionary.m,
        "k": int(dictionary.k),
        "store": str(config.store),
        "store_fingerprint": store.fingerprint,
        "same_store": held is not None,
        "newer_images": None if held is None else store.images - held.images,
        "site": ", ".join(rows),
        "trained_site": dictionary.card.get("site"),
        "stream": ", ".join(streams),
        "target": None if target is None else target.site,
        "split": config.split,
        "padding": dictionary.padding if config.padding == "same" else config.padding,
        "steps": [
            {"step": int(store.step_numbers[i]), "captured": i, "sigma": float(store.sigmas[i])}
            for i in range(store.steps)
        ],
        "encoder": config.encoder,
        "pursuit_space": _pursuit_space(dictionary) if config.encoder == "pursuit" else None,
        "active": active,
        **numbers(whole),
        "per_stream": {
            stream: {"sites": streams[stream], **numbers(one)} for stream, one in by_stream.items()
        },
        "per_site": {
            site: {"stream": stream_of(site), **numbers(one)} for site, one in by_site.items()
        },
        "config": plain(config),
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    labels = _labels(dictionary, whole, active)
    title = _title(config, result)
    _show(labels, whole, by_site, title)
    if result["pursuit_space"] == "own":
        print("gradient pursuit is an itda dictionary's own encoder: both are the same")
    groups = {"": whole, **(by_stream if len(streams) > 1 else {})}
    plots: list[Path] | None = []
    if config.plots:
        captions = eval_plots.Captions(title, labels, result["steps"])
        plots = eval_plots.draw(config.out, captions, groups=groups, by_site=by_site)
    result["plots"] = [str(path) for path in plots or ()]
    write_json(config.out, result)
    print(f"evaluation: {config.out}")
    if plots is None:
        print(f"no plots: {MISSING}")
    elif plots:
        print("plots: " + ", ".join(result["plots"]))
    return result


def _pursuit_space(dictionary: Dictionary) -> str:
    """The space in which pursuit minimizes the error: raw, standardized if the atoms were learned there, or own.

    In raw space the widest dimensions alone would choose the atoms.
    """
    if dictionary.kind == "itda":
        return "own"
    normalization = dictionary.card.get("normalization") or {}
    return "standardized" if normalization.get("kind") in ("standardize", "whiten") else "raw"


def _rivals(
    dictionary: Dictionary, rows: EvalRows, active: int, config: EvalConfig
) -> dict[str, Measurement]:
    """Pursuit if asked for, and the baselines, on the rows of one site."""
    site = rows.source.site
    options: dict[str, Any] = {"batch": config.batch, "memory_mb": config.memory_mb}
    fitted = baselines.fit_baselines(rows.train)
    found = {}
    if config.encoder == "pursuit" and dictionary.kind != "itda":
        std = None if _pursuit_space(dictionary) == "raw" else fitted.std
        encode = pursuit_encoder(dictionary, active, std=std, memory_mb=config.memory_mb)
        found["pursuit"] = measure_dictionary(
            dictionary, rows.source, encode=encode, name=f"{site}, pursuit", **options
        )
    if config.random and rows.target is None:
        drawn = baselines.random_dictionary(fitted, m=dictionary.m, k=active, seed=config.seed)
        name = f"{site}, random dictionary"
        found["random"] = measure_dictionary(drawn, rows.source, name=name, **options)
    found["pca"] = baselines.measure_pca(fitted, rows.rebuilt, active, batch=config.batch)
    found["mean"] = baselines.measure_pca(fitted, rows.rebuilt, 0, batch=config.batch)
    return found


def _active(dictionary: Dictionary, own: Quality) -> int:
    """Atoms a row that pursuit and the baselines may use: as many as the dictionary's own encoder does.

    That is k for a kind that always fills k slots. For the others k is only an upper limit, so the
    measured mean is taken.
    """
    if dictionary.kind == "itda" or kinds.REGISTRY[dictionary.kind].fixed_slots:
        return int(dictionary.k)
    return max(1, round(own.l0))


def _together(
    found: Mapping[str, Mapping[str, Measurement]], sites: Sequence[str]
) -> dict[str, Quality]:
    """The numbers of each way to rebuild rows, over the rows of some sites."""
    return {name: quality_of([found[site][name] for site in sites]) for name in found[sites[0]]}


def _numbers(whole: Mapping[str, Quality], *, active: int, config: EvalConfig) -> dict[str, Any]:
    """`metrics`, `pursuit` and `baselines`, as in the JSON file."""
    numbers: dict[str, Any] = {"metrics": whole["own"].numbers()}
    if config.encoder == "pursuit":
        numbers["pursuit"] = whole.get("pursuit", whole["own"]).numbers()
    simple = {name: whole[name].brief() for name in ("mean", "pca", "random") if name in whole}
    simple["pca"]["components"] = _components(whole, active)
    if "random" in simple:
        one = whole["random"]
        simple["random"] |= {"atoms": len(one.fired), "l0": one.l0, "seed": config.seed}
    return {**numbers, "baselines": simple}


def _components(whole: Mapping[str, Quality], active: int) -> int:
    return min(active, len(whole["pca"].raw.error))


def _labels(dictionary: Dictionary, whole: Mapping[str, Quality], active: int) -> dict[str, str]:
    """Names of the ways to rebuild rows, for tables and plots."""
    own = ", own encoder" if "pursuit" in whole else ""
    words = {
        "own": dictionary.kind + own,
        "pursuit": f"{dictionary.kind}, pursuit",
        "random": "random dictionary",
        "pca": f"PCA-{_components(whole, active)}",
        "mean": "training mean",
    }
    return {name: words[name] for name in whole}


def _title(config: EvalConfig, result: Mapping[str, Any]) -> str:
    sites = list(result["per_site"])
    where = sites[0] if len(sites) == 1 else f"{len(sites)} sites"
    if result["target"]:
        where += f" -> {result['target']}"
    rows = result["metrics"]["rows"]
    return (
        f"{result['kind']} of {result['m']:,} atoms, {result['active']} active, on "
        f"{rows:,} {config.split} rows of {where}"
    ).replace(" all rows", " rows")


def _show(
    labels: Mapping[str, str],
    whole: Mapping[str, Quality],
    by_site: Mapping[str, Mapping[str, Quality]],
    title: str,
) -> None:
    """Print tables: every way to rebuild rows, and every site if there are several."""
    head = ("FVU raw", "standardized", "VE", "cosine", "L0", "dead")

    def cells(one: Quality) -> list[str]:
        brief = one.brief()
        fidelity = [number(brief[key]) for key in ("fvu", "fvu_standardized", "ve", "cosine")]
        sparse = [f"{one.l0:.2f}", percent(one.dead_share)] if one.active.size else ["", ""]
        return [*fidelity, *sparse]

    print_table(("", *head), [(labels[name], *cells(one)) for name, one in whole.items()], title)
    for name in ("own", "pursuit"):
        if name in whole and len(by_site) > 1:
            lines = [(site, *cells(one[name])) for site, one in by_site.items()]
            print_table((labels[name], *head), lines)
    print()
