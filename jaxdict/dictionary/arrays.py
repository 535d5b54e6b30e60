"""A dictionary in memory: its arrays, and the checks that make them one dictionary.

It acts on **raw** activations x [n, d] and rebuilds y [n, d_out]: of the same rows, or, in a
transcoder, of the rows at another site. Every kind with an encoder means

    e = TopK_k(where(pre > threshold, ReLU(pre), 0)),   pre = encoder x + encoder_bias
    x_hat = sum_j e_j atoms_j + bias

| kind | threshold | k |
|---|---|---|
| topk | none | active atoms a row |
| batchtopk, matryoshka | one number, the same for every atom | slots a row: few rows need more |
| jumprelu | one number for each atom | the same |
| relu | none | the same |

Kind `itda` has no linear encoder: its codes are gradient pursuit on unit atoms (see `jaxdict.dictionary.files`).
With a target, pursuit runs on the unit rows `encoder`, and `atoms` are what these stand for at the
other site, where `inverse` and `bias` (in place of `mean`) lead back to raw rows.

Imports NumPy alone, so that steer and interp can use it without JAX.

Sources: topk, Gao et al. 2024 (arXiv 2406.04093); batchtopk, Bussmann et al. 2024 (arXiv
2412.06410); jumprelu, Rajamanoharan et al. 2024 (arXiv 2407.14435); matryoshka, Bussmann et al.
2025 (arXiv 2503.17547); transcoders, Dunefsky et al. 2024 (arXiv 2406.11944); itda, arXiv
2505.17769. Deviation: batchtopk, jumprelu, matryoshka and relu keep at most k slots a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np


class EncoderKind(NamedTuple):
    """What is fixed of a kind with an encoder.

    Attributes:
        threshold: what a pre-activation must exceed: none, one number for all atoms, or one for each atom.
        keeps: what it keeps of a row, in words, for `--help`.
    """

    threshold: Literal["none", "one", "each"]
    keeps: str


# A further kind is one more line here, and its class in `jaxdict.sae.kinds`.
ENCODER_KINDS: dict[str, EncoderKind] = {
    "topk": EncoderKind("none", "the k largest activations"),
    "batchtopk": EncoderKind("one", "the largest of a batch, k a row on average"),
    "jumprelu": EncoderKind("each", "what is above a threshold that each atom learns"),
    "matryoshka": EncoderKind("one", "as batchtopk, nested dictionaries"),
    "relu": EncoderKind("none", "what is positive, with an L1 penalty"),
}


def kinds() -> tuple[str, ...]:
    """Every kind of dictionary: those with an encoder, and itda."""
    return (*ENCODER_KINDS, "itda")


# name -> (dtype, shapes it may have); m atoms, d width of the rows, out width of what is rebuilt
TENSORS: dict[str, tuple[type[np.generic], tuple[str, ...]]] = {
    "atoms": (np.float32, ("m out",)),
    "bias": (np.float32, ("out",)),
    "encoder": (np.float32, ("m d",)),
    "encoder_bias": (np.float32, ("m",)),
    "threshold": (np.float32, ("m",)),
    "mean": (np.float32, ("d",)),
    "transform": (np.float32, ("d", "d d")),
    "inverse": (np.float32, ("out", "out out")),
    "typical": (np.float32, ("m",)),
    "source": (np.int32, ("m 3",)),
}

_BLOCK = 1024
"""Rows that are checked at a time."""


@dataclass(frozen=True, eq=False)
class Dictionary:
    """A trained dictionary as plain numpy arrays; every shape and dtype is checked when it is made.

    Attributes:
        kind: one of `kinds()`.
        k: slots kept a row: active atoms, at most.
        atoms: float32 [m, d_out], decoder rows in the dictionary's own space (unit norm for itda
            without a target).
        bias: float32 [d_out] decoder bias, or None.
        encoder: float32 [m, d]; None for itda, but with a target the unit atoms that pursuit uses.
        encoder_bias: float32 [m], or None (itda).
        threshold: float32 [m], 0 or more, which a pre-activation must exceed, or None for a kind
            without one (see `ENCODER_KINDS`).
        mean: float32 [d] subtracted from raw rows (itda), or None.
        transform: float32 [d] or [d, d], raw (minus mean) to own space (itda), or None.
        inverse: float32 [d_out] or [d_out, d_out], own space to raw (minus mean), or None.
        typical: float32 [m], mean value of a feature where it is active; 0 if never.
        source: int32 [m, 3], the (image, step, token) each atom came from (itda), or None; see
            `jaxdict.itda.labels`.
        card: JSON-able facts: model, site, stream, store_fingerprint, metrics, config, versions; in
            a transcoder also `target`, the site it rebuilds.

    Raises:
        ValueError: a shape, dtype, value or combination that no encoder could use; the message
            names the field, what was expected and what came.
    """

    kind: str
    k: int
    atoms: np.ndarray
    bias: np.ndarray | None = None
    encoder: np.ndarray | None = None
    encoder_bias: np.ndarray | None = None
    threshold: np.ndarray | None = None
    mean: np.ndarray | None = None
    transform: np.ndarray | None = None
    inverse: np.ndarray | None = None
    typical: np.ndarray | None = None
    source: np.ndarray | None = None
    card: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every field against the others."""
        check(self)

    @property
    def m(self) -> int:
        """Number of atoms."""
        return int(self.atoms.shape[0])

    @property
    def d(self) -> int:
        """Width of a raw row that is encoded."""
        return int(self.pursued.shape[1])

    @property
    def d_out(self) -> int:
        """Width of a row that is rebuilt: d, except in a transcoder."""
        return int(self.atoms.shape[1])

    @property
    def padding(self) -> str:
        """Whether rows of the text that are padding were left out of its training: drop or keep."""
        return str(self.card.get("padding", "keep"))

    @property
    def transcoder(self) -> bool:
        """Whether it rebuilds the rows of another site (`card["target"]`) than it reads."""
        return bool(self.card.get("target"))

    @property
    def pursued(self) -> np.ndarray:
        """Float32 [m, d]: the rows that pursuit chooses among, in the own space of what is read (itda)."""
        return self.atoms if self.encoder is None else self.encoder

    @property
    def raw_atoms(self) -> np.ndarray:
        """Float32 [m, d_out]: what one unit of each feature adds to the rebuilt raw activation."""
        if self.inverse is None:
            return self.atoms
        return self.atoms * self.inverse if self.inverse.ndim == 1 else self.atoms @ self.inverse


def check(x: Dictionary) -> None:
    """Raise ValueError, naming the field, unless every field fits the kind and each other."""
    if x.kind not in kinds():
        raise ValueError(f"kind: expected one of {', '.join(kinds())}, got {x.kind!r}")
    for name, (dtype, _) in TENSORS.items():
        value = getattr(x, name)
        if value is None:
            continue
        if not isinstance(value, np.ndarray):
            raise ValueError(f"{name}: expected a numpy array, got {type(value).__name__}")
        if value.dtype != dtype:
            raise ValueError(f"{name}: expected {np.dtype(dtype).name}, got {value.dtype.name}")
        if value.dtype == np.float32 and not _finite(value):
            raise ValueError(f"{name}: expected finite numbers, found NaN or infinity")
    if not isinstance(x.atoms, np.ndarray) or x.atoms.ndim != 2 or 0 in x.atoms.shape:
        got = "none" if x.atoms is None else list(x.atoms.shape)
        raise ValueError(f"atoms: expected a shape [m, d] with m, d >= 1, got {got}")
    _check_target(x)
    _check_shapes(x)
    if isinstance(x.k, bool) or not isinstance(x.k, int | np.integer) or x.k < 1:
        raise ValueError(f"k: expected an integer of at least 1, got {x.k!r}")
    if x.typical is None:
        raise ValueError("typical: expected a float32 array [m], got none; use zeros if unknown")
    if (x.transform is None) != (x.inverse is None):
        raise ValueError("transform and inverse: expected both or neither, got one")
    if x.transform is not None and x.inverse is not None and x.transform.ndim != x.inverse.ndim:
        wanted, found = list(x.transform.shape), list(x.inverse.shape)
        raise ValueError(f"inverse: expected the shape of transform {wanted}, got {found}")
    _check_kind(x)


def _finite(value: np.ndarray) -> bool:
    """Whether all numbers are finite; a few rows at a time, so that it takes no memory to speak of."""
    return all(bool(np.isfinite(value[i : i + _BLOCK]).all()) for i in range(0, len(value), _BLOCK))


def _check_target(x: Dictionary) -> None:
    """Raise ValueError unless the card's target is a name."""
    target = x.card.get("target")
    if target is not None and not isinstance(target, str):
        raise ValueError(
            f"card: expected target to be the name of the site that is rebuilt, got {target!r}; "
            "leave it out unless this is a transcoder"
        )


def _check_shapes(x: Dictionary) -> None:
    """Raise ValueError unless all shapes fit the atoms' (and in a transcoder the encoder's)."""
    m, out = x.atoms.shape
    d = out
    if x.transcoder and x.encoder is not None and x.encoder.ndim == 2:
        d = max(1, x.encoder.shape[1])
    sizes = {"m": m, "d": d, "out": out, "3": 3}
    for name, (_, shapes) in TENSORS.items():
        value = getattr(x, name)
        allowed = [tuple(sizes[letter] for letter in shape.split()) for shape in shapes]
        if value is not None and value.shape not in allowed:
            wanted = " or ".join(str(list(shape)) for shape in allowed)
            found = list(value.shape)
            hint = ""
            if name == "encoder" and not x.transcoder and value.ndim == 2 and len(value) == m:
                hint = "; a transcoder names the site that it rebuilds as the card's target"
            raise ValueError(
                f"{name}: expected {wanted} beside atoms [{m}, {out}], got {found}{hint}"
            )


def _check_unit(x: Dictionary) -> None:
    """Raise ValueError unless the rows that pursuit chooses among are of unit norm."""
    name = "encoder" if x.transcoder else "atoms"
    rows = x.pursued
    blocks = [rows[i : i + _BLOCK] for i in range(0, len(rows), _BLOCK)]
    norms = np.concatenate([np.linalg.norm(block, axis=1) for block in blocks])
    worst = int(np.argmax(np.abs(norms - 1)))
    if abs(norms[worst] - 1) > 1e-3:
        raise ValueError(
            f"{name}: expected unit norm for itda, got {norms[worst]:.4g} at atom {worst}"
        )


def _check_kind(x: Dictionary) -> None:
    """Raise ValueError where a field does not belong to the kind."""
    form = "none"
    if x.kind in ENCODER_KINDS:
        form = ENCODER_KINDS[x.kind].threshold
        needed, foreign = ("encoder", "encoder_bias"), ("mean", "transform", "inverse")
        if x.k > x.m:
            raise ValueError(f"k: expected at most m = {x.m}, got {x.k}")
    else:
        needed, foreign = (), ("encoder", "encoder_bias", "bias")
        if x.transcoder:
            needed, foreign = ("encoder", "bias"), ("encoder_bias",)
    if form == "none":
        foreign += ("threshold",)
    else:
        needed += ("threshold",)
    for name in needed:
        if getattr(x, name) is None:
            raise ValueError(f"{name}: expected an array for kind {x.kind}, got none")
    for name in foreign:
        if getattr(x, name) is not None:
            raise ValueError(f"{name}: expected none for kind {x.kind}, got an array")
    if x.kind not in ENCODER_KINDS:
        _check_unit(x)
    if x.threshold is None:
        return
    low, high = float(x.threshold.min()), float(x.threshold.max())
    if low < 0:
        raise ValueError(
            f"threshold: expected 0 or more, got {low:.4g} at atom {int(x.threshold.argmin())}"
        )
    if form == "one" and low != high:
        others = " or ".join(name for name, one in ENCODER_KINDS.items() if one.threshold == "each")
        raise ValueError(
            f"threshold: expected the same number for every atom of kind {x.kind}, got {low:.4g} "
            f"to {high:.4g}; a threshold for each atom is kind {others}"
        )
