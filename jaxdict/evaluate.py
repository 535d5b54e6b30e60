"""`jaxdict eval`: how well an exported dictionary rebuilds held-out rows, beside baselines."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from harvest.store import open_store
from jaxdict import coder, metrics, normalize, runs
from jaxdict.config import EvalConfig
from jaxdict.data import Source, floats, image_rows, source_of, stream_of, watched
from jaxdict.export import Dictionary, load_dictionary


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Measure an exported dictionary and write JSON.

    Args:
        config: settings.

    Returns:
        What was written: `metrics` (rows, fvu, ve, fvu_standardized, l0, dead_share, fvu_per_step)
        and `baselines` (the same fvu and ve for the training mean and for PCA with k components).

    Raises:
        ValueError: dictionary and store do not fit each other.
        FileNotFoundError: there is no such dictionary.
    """
    dictionary = load_dictionary(config.dictionary)
    store = open_store(config.store)
    site = config.site or str(dictionary.card.get("site", ""))
    source = source_of(store, site, split=config.split).spread(config.rows)
    check_width(dictionary, source)
    train = source_of(store, site, split="train").spread(config.fit_rows)

    measured = measure_dictionary(dictionary, source, batch=config.batch)
    result = {
        "dictionary": str(config.dictionary),
        "kind": dictionary.kind,
        "d": dictionary.d,
        "m": dictionary.m,
        "k": int(dictionary.k),
        "store": str(config.store),
        "store_fingerprint": store.fingerprint,
        "same_store": store.fingerprint == dictionary.card.get("store_fingerprint"),
        "site": site,
        "stream": stream_of(site),
        "split": config.split,
        "metrics": measured.summary(),
        "baselines": baselines(source, train, int(dictionary.k), batch=config.batch),
        "config": runs.plain(config),
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    runs.write_json(config.out, result)
    numbers, simple = result["metrics"], result["baselines"]
    pca = simple["pca"]
    print(
        f"{config.split} ({numbers['rows']:,} rows): FVU {numbers['fvu']:.4f} raw, VE "
        f"{numbers['ve']:.4f}, L0 {numbers['l0']:.2f}, dead {numbers['dead_share']:.1%}; "
        f"PCA-{pca['components']} {pca['fvu']:.4f}, mean {simple['mean']['fvu']:.4f}"
    )
    print(f"evaluation: {config.out}")
    return result


def check_width(dictionary: Dictionary, source: Source) -> None:
    """ValueError when a dictionary does not fit a site's width."""
    if dictionary.d != source.d:
        raise ValueError(
            f"expected rows of width {dictionary.d} as in the dictionary, got {source.d} at "
            f"{source.site}; name the site it was trained on with --site"
        )


def measure_dictionary(
    dictionary: Dictionary, source: Source, *, batch: int = 4096, name: str = "eval"
) -> metrics.Measurement:
    """Encode and decode rows with the exported dictionary and measure.

    Args:
        dictionary: acts on raw rows.
        source: which rows.
        batch: rows at a time.
        name: of the progress bar.

    Returns:
        The measurement; only raw space, the dictionary knows no other.
    """
    shift = _shift(source)

    def report(bits: np.ndarray, weight: np.ndarray) -> metrics.BatchReport:
        x = jnp.asarray(floats(bits))
        codes = coder.encode(dictionary, x)
        x_hat = coder.decode(dictionary, codes)
        return _report(codes, x, x_hat, jnp.asarray(weight), shift, m=dictionary.m)

    return metrics.measure(watched(source, name), source.steps, report, batch=batch)


@partial(jax.jit, static_argnames="m")
def _report(
    codes: Any, x: Array, x_hat: Array, weight: Array, shift: Array, *, m: int
) -> metrics.BatchReport:
    sums = metrics.batch_sums(x, x_hat, weight, shift)
    return metrics.BatchReport(sums, None, metrics.fired(codes, m, weight))


def _shift(source: Source) -> Array:
    """About the mean of the rows: the first image's."""
    first = floats(source.read(source.images[:1]))
    return jnp.asarray(first.mean(0, dtype=np.float64), jnp.float32)


def baselines(source: Source, train: Source, k: int, *, batch: int) -> dict[str, Any]:
    """What the training mean and PCA with k components reach on the same rows.

    Args:
        source: rows to measure on.
        train: rows that fit mean and PCA, in float64.
        k: components, as many as a row has active atoms.
        batch: rows at a time.

    Returns:
        `mean` and `pca`, each with fvu and ve, raw.
    """

    fitted = normalize.fit(lambda: image_rows(train.blocks()), "whiten", floor=1e-12)
    components = min(k, source.d)
    mean = jnp.asarray(fitted.mean, jnp.float32)
    vectors = fitted.transform[:, :components]
    vectors = jnp.asarray(vectors / np.linalg.norm(vectors, axis=0), jnp.float32)
    results: dict[str, Any] = {}

    def measure(project: Any) -> dict[str, float]:
        @jax.jit
        def report(x: Array, weight: Array) -> metrics.BatchReport:
            sums = metrics.batch_sums(x, project(x), weight, mean)
            return metrics.BatchReport(sums, None, jnp.zeros(1))

        measured = metrics.measure(
            source.blocks(),
            source.steps,
            lambda bits, weight: report(jnp.asarray(floats(bits)), jnp.asarray(weight)),
            batch=batch,
        )
        return {"fvu": measured.raw.fvu, "ve": measured.raw.ve}

    results["mean"] = measure(lambda x: jnp.broadcast_to(mean, x.shape))
    results["pca"] = measure(lambda x: (x - mean) @ vectors @ vectors.T + mean)
    results["pca"]["components"] = components
    return results
