"""What several verbs' settings have in common. Imports neither torch nor jax, so that `--help` is quick."""

from __future__ import annotations

from typing import Any

from harvest.flags import expect

NORMALIZATIONS = ("none", "rms", "standardize", "whiten")
"""Fixed maps before a dictionary, by name; see `jaxdict.rows.fit`."""


def captured_steps(config: Any) -> None:
    """Check that the field `steps` could be indices into the captured steps of a store."""
    steps = config.steps
    expect(
        all(step >= 0 for step in steps) and len(set(steps)) == len(steps),
        "steps",
        "different indices of at least 0",
        steps,
        "see `jaxdict inspect STORE` for the captured steps",
    )
