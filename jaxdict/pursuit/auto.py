"""The rule behind `method="auto"`: which form is cheaper, and whether the Gram matrix may be kept."""

from __future__ import annotations

import os

import jax

# What reading one number of a Gram row costs, in multiply-adds of a matrix product in float32. The
# CPU's is measured (docs/pursuit.md), the others' follow from data sheets: bandwidth over rate.
GRAM_READ = {"cpu": 12.0, "gpu": 40.0, "tpu": 80.0}
GRAM_SHARE = 1 / 8
"""Of a device's memory, the most that the Gram matrix may take."""
FINEST = 1e-3
"""A `tol` below this is finer than the Gram form can see in float32."""


def choose_method(
    n: int,
    d: int,
    m: int,
    k: int,
    *,
    tol: float = 0.0,
    itemsize: int = 4,
    reads: float | None = None,
    parts: int = 1,
    memory: int | None = None,
    platform: str | None = None,
) -> str:
    """The cheaper form by a count of work, in multiply-adds of a matrix product.

    A step of a row costs d m in the residual form, and in the Gram form k / 2 Gram rows of m
    numbers to read (`reads` where it is not k / 2), GRAM_READ each; the Gram form also pays
    (n + m) d m once:

        residual  n k d m          gram  (n + m) d m + n k (k / 2) m GRAM_READ

    The residual form is taken besides when the Gram matrix takes more than GRAM_SHARE of the
    memory, and when tol is finer than the Gram form can see in float32 (1e-3).

    Args:
        n: rows.
        d: width.
        m: atoms.
        k: steps.
        tol: stopping residual norm, relative to the row's.
        itemsize: bytes of a number.
        reads: rows of m numbers read or written a step, k / 2 by default; 3 in matching pursuit.
        parts: devices that share the atoms.
        memory: of one device, in bytes; asked of the device by default.
        platform: "cpu", "gpu" or "tpu"; JAX's default one by default.

    Returns:
        "residual" or "gram".
    """
    memory = device_memory() if memory is None else memory
    if m * m * itemsize > GRAM_SHARE * memory * parts or (0 < tol < FINEST and itemsize < 8):
        return "residual"
    price = GRAM_READ.get(platform or jax.default_backend(), GRAM_READ["gpu"])
    read = n * k * price * (k / 2 if reads is None else reads)
    return "gram" if (n + m) * d + read < n * k * d else "residual"


def device_memory() -> int:
    """Bytes of the first device; on a CPU, of the machine."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and stats.get("bytes_limit"):
        return int(stats["bytes_limit"])
    if device.platform == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 8 << 30
