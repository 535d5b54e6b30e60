"""Reading activations: forward hooks on the blocks of a FLUX transformer, several sites in one pass."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harvest.models import uncompiled, unwrapped
from harvest.sites import Site, parse_site

_LISTS = {"double": "transformer_blocks", "single": "single_transformer_blocks"}


class Enough(Exception):
    """Raised inside a forward pass when nothing after this point is needed; see `Capture`."""


class Capture:
    """Keeps the activations of chosen sites while a pipeline runs.

    A context manager: it sets its hooks on entry and removes them on exit, whatever is raised. Only
    the requested stream of each site is copied, as bfloat16, once a step. A compiled transformer runs
    uncompiled meanwhile, as compiled code would not call the hooks.

    Args:
        transformer: a `FluxTransformer2DModel`, compiled or not. Single blocks may return `(text, image)`, as in
            current diffusers, or one joined tensor, as in older ones.
        sites: site names.
        steps: forward passes that make one image.
        numbers: which of them are kept, ascending; None for all.
        stop: raise `Enough` once the last site of the last kept pass has been read. The caller catches
            it, which saves the rest of the work.

    Raises:
        ValueError: the transformer lacks a site.
    """

    def __init__(
        self,
        transformer: nn.Module,
        sites: Sequence[str],
        *,
        steps: int,
        numbers: Sequence[int] | None = None,
        stop: bool = False,
    ) -> None:
        """Find the modules; no hook is set yet."""
        self._compiled, self._transformer = transformer, unwrapped(transformer)
        self._steps = steps
        kept = range(steps) if numbers is None else numbers
        self._slots = {number: slot for slot, number in enumerate(kept)}
        self._last = max(self._slots)
        self._stop = stop
        self._missing = set(sites)
        self._picked: dict[str, Tensor] = {}
        self._signature = inspect.signature(self._transformer.forward)
        self._sites = {name: parse_site(name) for name in sites}
        self._modules = {
            name: _module(self._transformer, site) for name, site in self._sites.items()
        }
        self._hooks = ExitStack()
        self._buffers: dict[str, Tensor] = {}
        self._spare: dict[str, Tensor] = {}
        self._text = 0
        self._step = -1

    def __enter__(self) -> Capture:
        """Set the hooks."""
        self._step = -1
        with ExitStack() as hooks:
            hooks.enter_context(uncompiled(self._compiled))
            before = self._transformer.register_forward_pre_hook(self._before, with_kwargs=True)
            hooks.callback(before.remove)
            for name, module in self._modules.items():
                keep = _Keep(self, name, self._sites[name], module)
                hook = module.register_forward_hook(keep, with_kwargs=True)
                hooks.callback(hook.remove)
            self._hooks = hooks.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the hooks."""
        self._hooks.close()

    def pick(self, positions: Mapping[str, np.ndarray]) -> None:
        """Keep only some tokens of the images that come next.

        Args:
            positions: stream -> positions [image, token] in that stream; other streams are kept
                whole.
        """
        self._picked = {name: torch.from_numpy(where).long() for name, where in positions.items()}

    def take(self) -> dict[str, Tensor]:
        """Hand over the activations of the last images, and start anew.

        Returns:
            site -> bfloat16 [image, step, token, d] on the CPU. The memory is reused
            two calls later: copy what must outlive that.

        Raises:
            RuntimeError: the last kept forward pass has not happened yet, or left a site out.
        """
        if self._step < self._last or (not self._stop and self._step + 1 != self._steps):
            raise RuntimeError(
                f"expected {self._steps} forward passes, got {self._step + 1}; run a whole image"
            )
        if self._missing:
            raise RuntimeError(
                f"expected the transformer to call the block of {min(self._missing)} as a module, but it did not; "
                "run it as diffusers made it"
            )
        self.reset()
        if any(buffer.is_pinned() for buffer in self._buffers.values()):
            torch.cuda.current_stream().synchronize()
        taken = {name: self._buffers[name].transpose(0, 1) for name in self._sites}
        self._buffers, self._spare = self._spare, self._buffers
        return taken

    def reset(self) -> None:
        """Forget a half-made image, after an error inside the pipeline."""
        self._step = -1
        self._missing = set(self._sites)

    def keep(self, name: str, value: Tensor) -> None:
        """Copy the rows of a site at the current step, [image, token, d]."""
        picked = self._picked.get(self._sites[name].stream)
        if picked is not None:
            value = value.gather(
                1, picked.to(value.device)[..., None].expand(-1, -1, value.shape[-1])
            )
        shape = (len(self._slots), *value.shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != shape:
            pin = value.device.type == "cuda"
            buffer = torch.empty(shape, dtype=torch.bfloat16, pin_memory=pin)
            self._buffers[name] = buffer
        buffer[self._slots[self._step]].copy_(value.detach(), non_blocking=True)
        if self._step == self._last:
            self._missing.discard(name)
            if self._stop and not self._missing:
                raise Enough

    @property
    def wanted(self) -> bool:
        """Whether the current forward pass is one that is kept."""
        return self._step in self._slots

    @property
    def text(self) -> int:
        """Length of the text in the current forward pass, in tokens."""
        return self._text

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call = self._signature.bind_partial(*args, **kwargs).arguments
        self._text = call["encoder_hidden_states"].shape[1]
        self._step += 1
        if self._step >= self._steps:
            raise RuntimeError(
                f"expected {self._steps} forward passes an image, got more; call take() after each"
            )


class _Keep:
    """The hook of one site: picks its stream from the input and output of a module."""

    def __init__(self, capture: Capture, name: str, site: Site, module: nn.Module) -> None:
        self._capture, self._name, self._site = capture, name, site
        self._signature = inspect.signature(module.forward)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not self._capture.wanted:
            return
        value = self._pick(output)
        if self._site.kind == "update":
            before = self._input(self._signature.bind_partial(*args, **kwargs).arguments, output)
            value = value.float() - before.float()
        self._capture.keep(self._name, value)

    def _pick(self, output: Any) -> Tensor:
        """The site's stream from an output that is one stream, a pair, or both joined (text first)."""
        image = self._site.stream == "img"
        if isinstance(output, tuple):
            # Blocks return (text, image), attention the reverse.
            text_first = self._site.kind != "attn"
            return output[int(image) if text_first else int(not image)]
        if self._site.block == "double":
            return output
        return self._joined(output)

    def _joined(self, tensor: Tensor) -> Tensor:
        text = self._capture.text
        return tensor[:, text:] if self._site.stream == "img" else tensor[:, :text]

    def _input(self, call: dict[str, Any], output: Any) -> Tensor:
        if isinstance(output, tuple):
            image = self._site.stream == "img"
            return call["hidden_states" if image else "encoder_hidden_states"]
        return self._joined(call["hidden_states"])


def site_shape(
    transformer: Any, site: str, *, image_tokens: int, text_tokens: int
) -> tuple[int, int]:
    """Shape of a site's rows for one image and step.

    Args:
        transformer: a `FluxTransformer2DModel`.
        site: its name.
        image_tokens: tokens of the image stream.
        text_tokens: tokens of the text stream.

    Returns:
        (tokens, d).

    Raises:
        ValueError: the transformer lacks the site.
    """
    place = parse_site(site)
    tokens = image_tokens if place.stream == "img" else text_tokens
    module = _module(transformer, place)
    if place.kind != "mlp":
        config = transformer.config
        return tokens, config.num_attention_heads * config.attention_head_dim
    if place.block == "double":
        linear: Any = module.get_submodule("proj")
    else:
        linear = transformer.single_transformer_blocks[place.index].proj_mlp
    return tokens, int(linear.out_features)


def _module(transformer: nn.Module, site: Site) -> nn.Module:
    """The module whose output holds a site."""
    blocks = getattr(transformer, _LISTS[site.block], ())
    path = {
        "": "",
        "update": "",
        "attn": "attn",
        "mlp": "act_mlp" if site.block == "single" else "ff.net.0",
    }[site.kind]
    if site.kind == "mlp" and site.block == "double" and site.stream == "txt":
        path = "ff_context.net.0"
    try:
        return unwrapped(blocks[site.index]).get_submodule(path)
    except (IndexError, AttributeError) as error:
        raise ValueError(
            f"the model has no site {site}: it has {len(blocks)} {site.block} blocks"
            + (f", and no {path} in them" if len(blocks) > site.index else "")
        ) from error
