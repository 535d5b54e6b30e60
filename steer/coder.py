"""A dictionary in torch: the same encode and decode as `jaxdict.dictionary.coder`, on raw activations.

`itda`: gradient pursuit on unit atoms in the normalized space. Every other kind: a linear encoder,
ReLU above a threshold, the k largest kept. All compute in blocks of rows and decode with a
gather-and-add kernel, so that neither [n, m] for all rows nor [n, k, d] is ever held.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from jaxdict.dictionary import ENCODER_KINDS, Dictionary, load_dictionary
from steer.pursuit import combine, gradient_pursuit

_BLOCK = 2**26
"""Numbers in the largest [rows, m] matrix held at once: 256 MiB in float32."""


class Codes(NamedTuple):
    """Sparse codes of rows, largest value first; an empty slot is index 0, value 0.

    Attributes:
        indices: int64 [..., k], which atom each slot holds.
        values: [..., k], its coefficient.
    """

    indices: Tensor
    values: Tensor

    @property
    def l0(self) -> Tensor:
        """Active features a row, int64 [...]."""
        return (self.values != 0).sum(-1)

    def dense(self, m: int) -> Tensor:
        """All m values a row, [..., m]."""
        out = self.values.new_zeros(*self.values.shape[:-1], m)
        return out.scatter_add_(-1, self.indices, self.values)


class Coder:
    """Encodes raw activations x [..., d] to codes, and decodes these to activations [..., d_out].

    d_out = d, and what is decoded is x again; except in a transcoder, which decodes to the
    activations of its target site.

    Args:
        dictionary: what `jaxdict.dictionary.load_dictionary` returns.
        device: where the tensors live.
        dtype: what encode and decode compute in.

    Attributes:
        dictionary: the dictionary as it came.
        m, d, d_out, k: its sizes.
        typical: [m], mean value of each feature where it is active.

    Raises:
        ValueError: a dictionary of this kind cannot be encoded with in torch.
    """

    def __init__(
        self,
        dictionary: Dictionary,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Copy the dictionary's tensors to the device."""
        if dictionary.kind not in (*ENCODER_KINDS, *_WITHOUT_ENCODER):
            known = " or ".join((*ENCODER_KINDS, *_WITHOUT_ENCODER))
            raise ValueError(
                f"expected a dictionary of kind {known}, got {dictionary.kind!r}; "
                "install a newer jaxdict"
            )
        self.dictionary = dictionary
        self.device, self.dtype = torch.device(device), dtype
        self.m, self.k = dictionary.m, int(dictionary.k)
        self.d, self.d_out = dictionary.d, dictionary.d_out
        self.atoms = torch.tensor(dictionary.atoms, device=self.device, dtype=self.dtype)
        self.bias = self._tensor(dictionary.bias)
        self.encoder = self._tensor(dictionary.encoder)
        self.encoder_bias = self._tensor(dictionary.encoder_bias)
        self.threshold = self._tensor(dictionary.threshold)
        self.mean = self._tensor(dictionary.mean)
        self.transform = self._tensor(dictionary.transform)
        self.inverse = self._tensor(dictionary.inverse)
        assert dictionary.typical is not None  # Dictionary holds this
        self.typical = torch.tensor(dictionary.typical, device=self.device, dtype=self.dtype)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        verify: bool = True,
    ) -> Coder:
        """Load a dictionary folder, as `jaxdict export` writes it.

        Args:
            path: the folder.
            device: where the tensors live.
            dtype: what encode and decode compute in.
            verify: whether the folder has to have the hashes that were written into it.

        Raises:
            FileNotFoundError: the folder does not exist.
            ValueError: it is not a dictionary, damaged, or of a newer version.
        """
        return cls(load_dictionary(path, verify=verify), device=device, dtype=dtype)

    def to(self, device: str | torch.device) -> Coder:
        """This coder on a device; itself if it is there already."""
        device = torch.device(device)
        if device == self.device or (device.type == self.device.type and device.index is None):
            return self
        return Coder(self.dictionary, device=device, dtype=self.dtype)

    def encode(self, x: Tensor) -> Codes:
        """Codes of raw activations.

            itda:   gradient pursuit of (x - mean) transform on the atoms (a transcoder: on its
                    encoder), k steps, non-negative
            others: TopK_k(where(pre > threshold, ReLU(pre), 0)),  pre = encoder x + encoder_bias

        Args:
            x: [..., d] of any dtype, raw activations.

        Returns:
            Codes with [..., k] slots in the coder's dtype, on the coder's device.

        Raises:
            ValueError: the last dimension of x is not d.

        Source: see `jaxdict.dictionary.arrays`; Blumensath & Davies 2008 (gradient pursuit). Equal to
        `jaxdict.dictionary.coder.encode`.
        """
        if x.shape[-1:] != (self.d,):
            raise ValueError(
                f"expected rows of width d = {self.d}, as the dictionary was trained on, got a "
                f"tensor of shape {list(x.shape)}; read the activations at its site, "
                f"{self.dictionary.card.get('site', 'unknown')}"
            )
        rows = x.reshape(-1, self.d).to(self.device, self.dtype)
        encode = _WITHOUT_ENCODER.get(self.dictionary.kind, _encode_linear)
        blocks = [encode(self, block) for block in rows.split(max(1, _BLOCK // self.m))]
        indices = torch.cat([block.indices for block in blocks])
        values = torch.cat([block.values for block in blocks])
        shape = (*x.shape[:-1], self.k)
        return Codes(indices.reshape(shape), values.reshape(shape))

    def decode(self, codes: Codes) -> Tensor:
        """The reconstruction x_hat [..., d_out] of codes [..., k], in raw activations.

        itda:  (sum_j e_j atoms_j) inverse + mean (a transcoder: + bias);
        others:  sum_j e_j atoms_j + bias
        """
        shape = codes.values.shape
        flat = combine(
            codes.indices.reshape(-1, shape[-1]), codes.values.reshape(-1, shape[-1]), self.atoms
        )
        flat = _apply(flat, self.inverse)
        offset = self.mean if self.bias is None else self.bias
        if offset is not None:
            flat = flat + offset
        return flat.reshape(*shape[:-1], self.d_out)

    def activation(self, x: Tensor, feature: int) -> Tensor:
        """The value of one feature in the codes of x: [..., d] -> [...], 0 where not active."""
        self.check_feature(feature)
        codes = self.encode(x)
        return torch.where(codes.indices == feature, codes.values, 0).sum(-1)

    def raw_atom(self, feature: int) -> Tensor:
        """What one unit of a feature adds to the raw activation that is decoded, [d_out]."""
        self.check_feature(feature)
        return _apply(self.atoms[feature], self.inverse)

    def check_feature(self, feature: int) -> None:
        """Check that the dictionary has this feature.

        Raises:
            ValueError: it has not.
        """
        if not 0 <= feature < self.m:
            raise ValueError(
                f"expected a feature from 0 to {self.m - 1}, as the dictionary has {self.m} atoms, "
                f"got {feature}"
            )

    def _tensor(self, array: np.ndarray | None) -> Tensor | None:
        return None if array is None else torch.tensor(array, device=self.device, dtype=self.dtype)


def _encode_linear(coder: Coder, x: Tensor) -> Codes:
    assert coder.encoder is not None  # Dictionary holds this for every kind with an encoder
    pre = F.linear(x, coder.encoder, coder.encoder_bias)
    # A threshold is never below 0: what exceeds it is its own ReLU.
    low = coder.threshold
    active = pre.relu_() if low is None else pre.masked_fill_(~(pre > low), 0)
    values, indices = active.topk(coder.k, dim=-1, sorted=True)
    return Codes(torch.where(values > 0, indices, 0), values)


def _encode_itda(coder: Coder, x: Tensor) -> Codes:
    z = x if coder.mean is None else x - coder.mean
    atoms = coder.atoms if coder.encoder is None else coder.encoder
    return Codes(*gradient_pursuit(_apply(z, coder.transform), atoms, coder.k))


_WITHOUT_ENCODER: dict[str, Callable[[Coder, Tensor], Codes]] = {"itda": _encode_itda}


def _apply(z: Tensor, matrix: Tensor | None) -> Tensor:
    """A diagonal [d] or full [d, d] transform of rows; None is the identity."""
    if matrix is None:
        return z
    return z * matrix if matrix.ndim == 1 else z @ matrix
