"""What an activation store holds: sites, sizes, statistics, norms by step, spectrum, differences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from harvest.sites import match_sites
from harvest.store import (
    Difference,
    Norms,
    Store,
    check_alike,
    compare_site,
    open_store,
    verify_store,
)
from harvest.units import size
from jaxdict.inspect.config import InspectConfig
from jaxdict.inspect.spectrum import Spectrum, spectrum
from jaxdict.rows import print_padding, source_of
from jaxdict.tables import number, numbers, percent, print_table, print_title, some

_MOST_STEPS = 8
"""Steps that a table has columns for; JSON and plots have all."""


def inspect_store(config: InspectConfig, path: str) -> dict[str, Any]:
    """Print what a store holds.

    Args:
        config: what is to be shown.
        path: its folder or URL.

    Returns:
        what was printed, as JSON-able values.

    Raises:
        ValueError: it is no store or damaged, a site is unknown, nothing is finished where
            activations are needed, or the other store is not alike.
        OSError: a folder for plots or JSON cannot be made.
    """
    store = open_store(path)
    sites = _chosen(store, config.sites)
    other = open_store(config.compare) if config.compare else None
    # A folder that cannot be made should not cost the time of reading a store.
    for flag, folder in (("plot", config.plot), ("out", config.out and config.out.parent)):
        if folder is not None:
            make_folder(folder, flag)
    verified = {}
    # Verified first: all else is read from data that may be damaged.
    if config.verify:
        verified["problems"] = verify_store(store)
        _show_problems(verified["problems"], store)
        if verified["problems"]:
            return {"what": "store", "path": path, **verified}
    if other is not None:
        check_alike(store, other, sites, _chosen(other, config.sites))
    done = int(store.done.sum())
    if not done and (config.spectrum or config.plot):
        raise ValueError(f"{path} holds no finished image yet; run its harvest again")

    facts = _facts(store, done)
    print_title(f"{path}: activation store", facts)
    norms = {site: store.norms(site) for site in sites} if done else {}
    table = {site: _site(store, site, norms.get(site), done) for site in sites}
    _show_sites(table)
    if done:
        _show_norms(store, table)
    if done < store.images:
        print("\n  unfinished: run the same harvest command again to go on")
    numbered = {"denoising steps": store.step_numbers.tolist()}  # of each list "by step"
    result = {"what": "store", "path": path, "done": done, **facts, **numbered, **verified}
    result["sites"] = table

    if config.spectrum or config.plot:
        print_padding(
            [source_of(store, site, split="all", padding=config.padding) for site in sites]
        )
        spectra = _spectra(store, sites, config)
        for site, one in spectra.items():
            table[site]["spectrum"] = {"rows": one.rows, "shares": _shares(one)}
        _show_spectra(spectra)
        if config.plot is not None:
            from jaxdict.inspect.plots import plot_norms, plot_spectrum

            means = {site: table[site]["mean norm by step"] for site in sites}
            pictures = plot_norms(config.plot, store, means)
            pictures += plot_spectrum(config.plot, store, spectra)
            result["plots"] = [str(picture) for picture in pictures]
            print("\n  plots: " + ", ".join(result["plots"]))
    if other is not None:
        result["compare"] = _compare(store, other, sites, config)
    return result


def make_folder(folder: Path, flag: str) -> None:
    """Make a folder for what a flag asks for.

    Raises:
        OSError: it cannot be made, naming the flag.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--{flag}: the folder {folder} cannot be made: {error}") from error


def _chosen(store: Store, patterns: Sequence[str]) -> list[str]:
    """The sites that names or globs select; all of them without any."""
    found, missing = match_sites(store.sites, patterns)
    if missing:
        raise ValueError(
            f"--sites: {store.path} holds no site {missing[0]!r}; it holds {', '.join(store.sites)}"
        )
    return found if patterns else list(store.sites)


def _facts(store: Store, done: int) -> dict[str, Any]:
    own, model = store.attrs, store.attrs.get("model", {})
    counts = {name: len(store.indices(name)) for name in ("train", "validation")}
    whole = own.get("denoising_steps") or store.steps
    of = f" of {whole} ({numbers(store.step_numbers)})" if whole != store.steps else ""
    quantization = model.get("quantization")
    if quantization == "none":
        quantization = None
    named = (model.get("name"), model.get("dtype"), quantization)
    return {
        "model": ", ".join(str(part) for part in named if part),
        "images": f"{done} of {store.images} done"
        + (f" ({counts['train']} train, {counts['validation']} validation)" if done else ""),
        "steps": f"{store.steps}{of}, sigma {numbers(store.sigmas)}",
        "tokens": f"{store.grid[0]} x {store.grid[1]} image"
        + (f", {own['words']} text" if own.get("words") else "")
        + ("; a sample is kept of each image" if store.sampled else ""),
        "pictures": "none" if own["picture"] is None else "{} x {} pixels".format(*own["picture"]),
        "compression": own.get("compress"),
        "guidance": own.get("guidance"),
        "seed": own.get("config", {}).get("seed"),
        "fingerprint": store.fingerprint[:16],
    }


def _site(store: Store, site: str, norms: Norms | None, done: int) -> dict[str, Any]:
    """Facts of one site, from its header and statistics."""
    shape = store.shape(site)
    _, steps, tokens, d = shape
    rows = done * steps * tokens
    facts: dict[str, Any] = {"shape": list(shape), "rows": rows, "bytes": rows * d * 2}
    array: Any = store.group[f"sites/{site}"]
    facts["disk"] = int(array.nbytes_stored())
    if norms is None:
        return facts | dict.fromkeys(("mean norm", "rms norm", "max", "massive"))
    statistics = store.statistics(site)
    by_step = [mean_norm(norms, step) for step in range(steps)]
    return facts | {
        "mean norm": mean_norm(norms),
        "rms norm": statistics.norm,
        "max": statistics.largest,
        "massive": norms.massive(),
        "mean norm by step": by_step,
        "massive by step": [norms.massive(step) for step in range(steps)],
    }


def mean_norm(norms: Norms, step: int | None = None) -> float:
    """Mean norm of the rows, each taken to lie in the (geometric) middle of its bin.

    Args:
        norms: counts of rows by norm.
        step: place on the axis of captured steps, or None for all.

    Returns:
        the mean, in units of the activation; 0 if there is no row.
    """
    counts = norms.counts.sum(0) if step is None else norms.counts[step]
    low, high = norms.edges[:-1], norms.edges[1:].copy()
    high[-1] = low[-1]  # the last bin has no end
    middle = np.sqrt(low * high)
    return float(counts @ middle / max(int(counts.sum()), 1))


def _show_sites(table: dict[str, dict[str, Any]]) -> None:
    head = ("site", "image x step x token x d", "rows", "size", "on disk")
    print_table(
        (*head, "mean norm", "rms norm", "max |x|", "massive"),
        [
            (
                site,
                " x ".join(map(str, fact["shape"])),
                f"{fact['rows']:,}",
                size(fact["bytes"]),
                size(fact["disk"]),
                number(fact["mean norm"]),
                number(fact["rms norm"]),
                number(fact["max"]),
                percent(fact["massive"]),
            )
            for site, fact in table.items()
        ],
    )


def _show_norms(store: Store, table: dict[str, dict[str, Any]]) -> None:
    chosen = some(store.steps, _MOST_STEPS)
    print_table(
        ("site", *_step_names(store, chosen)),
        [
            (site, *(number(fact["mean norm by step"][step]) for step in chosen))
            for site, fact in table.items()
        ],
        "mean norm by step (sigma)",
    )


def _step_names(store: Store, chosen: Sequence[int]) -> list[str]:
    return [f"step {store.step_numbers[i]} ({store.sigmas[i]:.3g})" for i in chosen]


def _spectra(store: Store, sites: Sequence[str], config: InspectConfig) -> dict[str, Spectrum]:
    """Take the spectrum of each site."""
    found = {}
    with tqdm(sites, desc="spectrum", unit="site", leave=False) as bar:
        for site in bar:
            found[site] = spectrum(store, site, rows=config.rows, padding=config.padding)
    return found


def _shares(one: Spectrum) -> dict[str, float]:
    return {str(count): one.share(count) for count in one.powers}


def _show_spectra(spectra: dict[str, Spectrum]) -> None:
    longest = max(spectra.values(), key=lambda one: len(one.powers)).powers
    print_table(
        ("site", "rows", *map(str, longest), "for 90%"),
        [
            (
                site,
                f"{one.rows:,}",
                *(percent(one.share(n)) if n in one.powers else "" for n in longest),
                f"{one.components(0.9)} of {len(one.variances)}",
            )
            for site, one in spectra.items()
        ],
        "share of variance of the first principal components",
    )


def _compare(
    store: Store, other: Store, sites: Sequence[str], config: InspectConfig
) -> dict[str, Any]:
    common = np.intersect1d(store.indices(), other.indices())
    if not len(common):
        raise ValueError(
            f"{store.path} and {other.path} have no finished image in common; run their harvest again"
        )
    images = common[some(len(common), config.images or len(common))]
    row_bytes = sum(int(np.prod(store.shape(site)[1:])) * 2 for site in sites)
    found: dict[str, Difference] = {}
    with tqdm(
        total=2 * row_bytes * len(images), unit="B", unit_scale=True, desc="compare", leave=False
    ) as bar:
        for site in sites:
            found[site] = compare_site(store, other, site, images, on_read=bar.update)
    print(
        f"\n  compared with {other.path}, on {len(images)} images finished in both: "
        "||a - b|| / ||a||, and the mean cosine of a and b over rows"
    )
    chosen = some(store.steps, _MOST_STEPS)
    print_table(
        ("site", "rows", "rel. error", "cosine"),
        [
            (site, f"{int(one.rows.sum()):,}", number(one.error()), f"{one.cosine():.6f}")
            for site, one in found.items()
        ],
    )
    for title, cell in (
        ("relative error by step (sigma)", lambda one, step: number(one.error(step))),
        ("cosine by step (sigma)", lambda one, step: f"{one.cosine(step):.6f}"),
    ):
        lines = [(site, *(cell(one, step) for step in chosen)) for site, one in found.items()]
        print_table(("site", *_step_names(store, chosen)), lines, title)
    steps = range(store.steps)
    return {
        "other": str(other.path),
        "images": len(images),
        "sites": {
            site: {
                "rows": int(one.rows.sum()),
                "relative error": one.error(),
                "cosine": one.cosine(),
                "relative error by step": [one.error(step) for step in steps],
                "cosine by step": [one.cosine(step) for step in steps],
            }
            for site, one in found.items()
        },
    }


def _show_problems(problems: Sequence[str], store: Store) -> None:
    if not problems:
        print(f"{store.path}: every chunk is sound")
        return
    print(f"{store.path}: {len(problems)} problems")
    for problem in problems:
        print(f"  {problem}")
    print(
        "to make a damaged shard again, delete its file images/done/c/<shard> "
        "and run the same harvest command"
    )
