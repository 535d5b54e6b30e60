"""What a hook has to know of the transformer's current call: its denoising step, its tokens."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from harvest.models import unwrapped
from steer.config import LAST, Steps


class CallState:
    """The transformer's current call: its step, and where its tokens are.

    Attributes:
        unread: sites whose module no call has called so far; None before the first call.
        text: length of the text, in tokens.
        places: long [image tokens, 3], (image, y, x) of each image token, or None if the call did
            not give them.
    """

    def __init__(self, pipe: Any, sites: Iterable[str]) -> None:
        """Start empty, before the first call."""
        self._sites = sites
        self._pipe = pipe
        self._signature = inspect.signature(unwrapped(pipe.transformer).forward)
        self._timestep: Tensor | None = None
        self._step: int | None = None
        self.unread: set[str] | None = None
        self.text = 0
        self.places: Tensor | None = None

    def read(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Take in a call, as forward pre-hook of the transformer."""
        call = self._signature.bind_partial(*args, **kwargs).arguments
        self.unread = set(self._sites) if self.unread is None else self.unread
        self._timestep, self._step = call.get("timestep"), None
        text, places = call.get("encoder_hidden_states"), call.get("img_ids")
        self.text = 0 if text is None else text.shape[1]
        if places is not None:
            self.places = (places[0] if places.ndim == 3 else places).round().long()

    @property
    def step(self) -> int:
        """The denoising step, counted from 0 at the first step that the pipeline runs.

        It is the place of the call's `timestep` in the scheduler's list, less the place where the
        pipeline began: image to image at strength 0.5 begins in the middle of the list. Where
        several timesteps are one number in the call's precision, the pipeline says which it is at.

        Raises:
            RuntimeError: the call has no timestep, or the scheduler no list to find it in.
        """
        if self._step is None:
            self._step = self._find_step()
        return self._step

    def _find_step(self) -> int:
        scheduler = getattr(self._pipe, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None or self._timestep is None:
            raise RuntimeError(
                "expected a scheduler with timesteps to tell denoising steps apart, found none; "
                "run the pipeline, or leave out the edit's steps"
            )
        given, timesteps = self._timestep.detach().flatten()[0].cpu(), timesteps.cpu()
        handed = timesteps.to(given.dtype) / 1000  # as pipelines round it
        distance = (handed.double() - given.double()).abs()
        nearest = (distance == distance.min()).nonzero().flatten()
        current = getattr(self._pipe, "current_timestep", None)
        if len(nearest) > 1 and current is not None:
            nearest = nearest[(timesteps[nearest] - torch.as_tensor(current).cpu()).abs().argsort()]
        return int(nearest[0]) - (getattr(scheduler, "begin_index", None) or 0)


class StepWatch:
    """Warns of ranges of steps none of which came in a call of the pipeline.

    Args:
        spans: what acts at these steps, in words, and the steps.
    """

    def __init__(self, spans: Sequence[tuple[str, Steps]]) -> None:
        """Start before the first call."""
        self._spans = spans
        self._seen: set[int] = set()
        self._last = -1

    def see(self, step: int) -> None:
        """Take in a step; one before the last belongs to another call."""
        if step < self._last:
            self.end()
        self._last = step
        self._seen.add(step)

    def end(self) -> None:
        """End a call: warn of each range without a step in it."""
        for what, (start, stop) in self._spans if self._seen else ():
            if not any(start <= step < stop for step in self._seen):
                warnings.warn(
                    f"{what} acted in no step: expected some of steps {span_words(start, stop)}, "
                    f"but the picture was made in steps {min(self._seen)} to {max(self._seen)}, "
                    "counted from 0; give other steps, or more of them to the pipeline",
                    stacklevel=4,
                )
        self._seen.clear()
        self._last = -1


def span_words(start: int, stop: int) -> str:
    """A range of steps as flags write it, such as "4:8" or "4:"."""
    return f"{start}:" if stop == LAST else f"{start}:{stop}"
