"""The precision of matrix products whose rounding would change a result."""

from __future__ import annotations

from jax import lax

# On a GPU or TPU the default may round inputs to TF32 or bfloat16, and the choice of an atom is an
# argmax over nearly equal numbers.
FULL_PRECISION = lax.Precision.HIGHEST
