"""What a dictionary loses, made visible: pictures with its reconstruction for the activation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from steer.call_state import CallState, StepWatch
from steer.coder import Coder
from steer.edits import check_steps
from steer.hooks import check_width, editing_site, intervening, warn_of_other_sites


@contextmanager
def splicing(
    pipe: Any,
    coder: Coder,
    *,
    site: str | None = None,
    steps: tuple[int, int] | None = None,
) -> Iterator[None]:
    """Replace x by decode(encode(x)) at a site while the context lasts.

    Args:
        pipe: a FLUX pipeline; a compiled transformer runs uncompiled meanwhile.
        coder: the dictionary.
        site: where; None for the site in the dictionary's card.
        steps: (start, stop) denoising steps, counted from the first one that the pipeline runs;
            None for all.

    Raises:
        ValueError: the model has no such site, its activations have another width than the
            dictionary's, or the dictionary is a transcoder, which rebuilds another site than it
            reads.

    Warns:
        UserWarning: no step of a call was among `steps`, or the site is not the dictionary's.
    """
    where = editing_site(coder, site)
    warn_of_other_sites(coder, [where])
    span = None if steps is None else check_steps(steps)
    watch = StepWatch([] if span is None else [("splicing", span)])

    def intervene(rows: Tensor, state: CallState) -> Tensor | None:
        nonlocal coder
        if span is not None:
            watch.see(state.step)
            if not span[0] <= state.step < span[1]:
                return None
        check_width(coder, rows)
        coder = coder.to(rows.device)
        return coder.decode(coder.encode(rows)).float() - rows.float()

    with intervening(pipe, {where: intervene}):
        yield
    watch.end()
