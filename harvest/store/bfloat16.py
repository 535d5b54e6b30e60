"""bfloat16 as its bits in uint16, the form in which a store keeps activations."""

from __future__ import annotations

import ml_dtypes
import numpy as np

_NAN, _NEGATIVE_NAN = 0x7FC0, 0xFFC0
_EXPONENT = 0x7F80


def to_bits(values: np.ndarray) -> np.ndarray:
    """Round to bfloat16, to nearest and ties to even, and give the bits.

    Args:
        values: any floats; uint16 is taken to be bits already.

    Returns:
        uint16 of the same shape. Every NaN becomes the same one.
    """
    if values.dtype == np.uint16:
        return values
    wide = np.ascontiguousarray(values, dtype=np.float32)
    with np.errstate(invalid="ignore", over="ignore"):  # whoever stores them looks for both
        bits = wide.astype(ml_dtypes.bfloat16).view(np.uint16)
    bits[bits == _NEGATIVE_NAN] = _NAN
    return bits


def from_bits(bits: np.ndarray) -> np.ndarray:
    """Give the float32 values of bfloat16 bits; exact.

    Args:
        bits: uint16.

    Returns:
        float32 of the same shape.
    """
    return bits.view(ml_dtypes.bfloat16).astype(np.float32)


def finite(bits: np.ndarray) -> np.ndarray:
    """Which values are finite.

    Args:
        bits: uint16.

    Returns:
        bool of the same shape.
    """
    return (bits & _EXPONENT) != _EXPONENT
