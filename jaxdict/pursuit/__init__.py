"""Pursuits: sparse codes of rows on given atoms, without a trained encoder.

    result = gradient_pursuit(x, atoms, k=32)        # x [n, d], atoms [m, d]
    result.indices, result.values                    # [n, 32] each, largest value first
    result.status                                    # [n], see STATUS for what each one says

`matching_pursuit` and `orthogonal_matching_pursuit` are called alike; docs/pursuit.md compares
them. Each is a file that says how values move, run in one of two forms, a file each: `residual`
and `gram` give the same answer at different prices, `method="auto"` picks the cheaper one.
`prepare_atoms` keeps what depends on the atoms alone, for use on many rows.
"""

from __future__ import annotations

from jaxdict.pursuit.atoms import PreparedAtoms, prepare_atoms, unit_rows
from jaxdict.pursuit.auto import choose_method
from jaxdict.pursuit.solve import PursuitResult
from jaxdict.pursuit.step import STATUS, Status
from jaxdict.pursuit.verbs import (
    gradient_pursuit,
    matching_pursuit,
    orthogonal_matching_pursuit,
)

__all__ = [
    "STATUS",
    "PreparedAtoms",
    "PursuitResult",
    "Status",
    "choose_method",
    "gradient_pursuit",
    "matching_pursuit",
    "orthogonal_matching_pursuit",
    "prepare_atoms",
    "unit_rows",
]
