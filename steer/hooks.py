"""Steering: forward hooks on a FLUX transformer that add to activations while a picture is made.

`intervening` is what the others build on: it finds a site's module, hands the rows of the site's
stream to a function, and adds what comes back. `steering` does so with `Edit`s. Every hook is
removed when the context ends, whatever is raised inside.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harvest.models import uncompiled, unwrapped
from harvest.sites import Site, expand_sites, parse_site
from steer.call_state import CallState, StepWatch
from steer.coder import Coder
from steer.edits import Edit

Intervention = Callable[[Tensor, CallState], Tensor | None]
"""(rows [batch, token, d] of a stream, state) -> float32 of that shape to add, None for nothing."""


@contextmanager
def intervening(pipe: Any, interventions: Mapping[str, Intervention]) -> Iterator[None]:
    """Add to the activations at sites while the context lasts.

    The sum is made in float32 and returned in the block's dtype; where an intervention returns
    None, the block's output is passed on untouched. A compiled transformer runs uncompiled meanwhile,
    as compiled code would not call the hooks.

    Args:
        pipe: a FLUX pipeline (its `transformer` and `scheduler` are used), called any number of
            times inside.
        interventions: site name -> intervention.

    Raises:
        ValueError: the model has no such site.
        TypeError: `pipe` is not a FLUX pipeline.
    """
    compiled: Any = getattr(pipe, "transformer", None)
    transformer = unwrapped(compiled)
    if not isinstance(transformer, nn.Module) or not hasattr(transformer, "transformer_blocks"):
        raise TypeError(
            f"expected a FLUX pipeline with a transformer, got {type(pipe).__name__}; "
            "of a loaded model give model.pipe"
        )
    state = CallState(pipe, interventions)
    with ExitStack() as stack:

        def attach(handle: Any) -> None:
            stack.callback(handle.remove)

        stack.enter_context(uncompiled(compiled))
        attach(transformer.register_forward_pre_hook(state.read, with_kwargs=True))
        for name, intervention in interventions.items():
            site, module = find_module(transformer, name)
            hook = _hook(site, intervention, state)
            attach(module.register_forward_hook(hook, with_kwargs=True))
        yield
    if state.unread:
        warnings.warn(
            f"nothing was changed at {', '.join(sorted(state.unread))}, as the transformer did not call "
            "its block as a module; run it as diffusers made it",
            stacklevel=5,
        )


@contextmanager
def steering(
    pipe: Any,
    coder: Coder,
    edits: Edit | Iterable[Edit],
    *,
    site: str | None = None,
    directions: Mapping[int, Tensor] | None = None,
) -> Iterator[None]:
    """Steer every picture made while the context lasts.

        x' = x + sum_f (new_f - old_f) raw_atom(f)

    Edits of one feature act in the order given, each on what the one before left.

    Args:
        pipe: a FLUX pipeline, called any number of times inside; steps are counted anew in each
            call, from the first one that it runs. A compiled transformer runs uncompiled meanwhile.
        coder: the dictionary.
        edits: one or several; without any, every picture stays as it is, to the bit.
        site: where; None for the site in the dictionary's card.
        directions: feature -> raw direction [d] that replaces its atom, as a control with random
            directions needs.

    Raises:
        ValueError: a feature, site or unit does not exist; the dictionary is a transcoder; or, while
            a picture is made, a region does not fit its tokens, or its activations have another
            width than the dictionary's.

    Warns:
        UserWarning: an edit acted in no step of a call, or acts at a site that the dictionary was
            not trained on.
    """
    edits = (edits,) if isinstance(edits, Edit) else tuple(edits)
    groups = group_edits(coder, edits, site)
    warn_of_other_sites(coder, groups)
    watch = StepWatch(
        [(f"the edit of feature {one.feature}", one.steps) for one in edits if one.steps]
    )
    interventions = {
        name: _intervention(coder, some, directions or {}, watch=watch)
        for name, some in groups.items()
    }
    with intervening(pipe, interventions) if interventions else ExitStack():
        yield
    watch.end()


def group_edits(
    coder: Coder, edits: Iterable[Edit], site: str | None = None
) -> dict[str, list[Edit]]:
    """Group edits by the site they act at: the card's or `site`, in the stream of each edit.

    Raises:
        ValueError: a feature, unit or site does not exist, an edit has a region on text tokens, or
            the dictionary is a transcoder.
    """
    where = parse_site(editing_site(coder, site))
    groups: dict[str, list[Edit]] = {}
    for edit in edits:
        coder.check_feature(edit.feature)
        edit.unit(float(coder.typical[edit.feature]))
        stream = edit.stream or where.stream
        if stream == "txt" and edit.region is not None:
            raise ValueError(
                f"region: expected none at {where}, as text tokens have no place in the picture; "
                "leave the region out, or steer a site of the img stream"
            )
        groups.setdefault(str(Site(where.block, where.index, stream, where.kind)), []).append(edit)
    return groups


def find_module(transformer: nn.Module, name: str) -> tuple[Site, nn.Module]:
    """The module whose output holds a site's rows.

    Args:
        transformer: a `FluxTransformer2DModel`.
        name: the site's name.

    Raises:
        ValueError: the model has no such site; the message names the nearest ones.
    """
    doubles, singles = transformer.transformer_blocks, transformer.single_transformer_blocks
    assert isinstance(doubles, nn.ModuleList) and isinstance(singles, nn.ModuleList)
    site = parse_site(name)
    expand_sites([name], double=len(doubles), single=len(singles))
    block: Any = unwrapped((doubles if site.block == "double" else singles)[site.index])
    if site.kind == "attn":
        return site, block.attn
    if site.kind != "mlp":
        return site, block
    if site.block == "single":
        return site, block.act_mlp
    return site, (block.ff if site.stream == "img" else block.ff_context).net[0]


def _hook(site: Site, intervention: Intervention, state: CallState) -> Callable[..., Any]:
    """Forward hook that takes a site's rows out of a module's output and puts changed ones back.

    A module returns (text, image), or (image, text, ...) if it is the attention of a double block,
    or one tensor [batch, text + image, d] in a single block, or the rows of one stream.
    """
    slot = int(site.stream == "img") if site.kind != "attn" else int(site.stream == "txt")

    def take(output: Any) -> Tensor:
        if isinstance(output, tuple):
            return output[slot]
        if site.block == "double":
            return output
        return output[:, state.text :] if site.stream == "img" else output[:, : state.text]

    def put(output: Any, rows: Tensor) -> Any:
        if isinstance(output, tuple):
            return (*output[:slot], rows, *output[slot + 1 :])
        if site.block == "double":
            return rows
        text, image = output[:, : state.text], output[:, state.text :]
        return torch.cat([text, rows] if site.stream == "img" else [rows, image], dim=1)

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if state.unread:
            state.unread.discard(str(site))
        rows = take(output)
        seen = rows
        if site.kind == "update":
            given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
            text, image = given.get("encoder_hidden_states"), given["hidden_states"]
            before = take(image if text is None else (text, image))
            seen = rows.float() - before.float()
        delta = intervention(seen, state)
        if delta is None:
            return None
        return put(output, (rows.float() + delta).to(rows.dtype))

    return hook


def _intervention(
    coder: Coder, edits: list[Edit], directions: Mapping[int, Tensor], *, watch: StepWatch
) -> Intervention:
    """The intervention that carries out edits at one site."""
    features = sorted({edit.feature for edit in edits})
    units = [edit.unit(float(coder.typical[edit.feature])) for edit in edits]
    timed = any(edit.steps is not None for edit in edits)

    def intervene(rows: Tensor, state: CallState) -> Tensor | None:
        nonlocal coder
        step = state.step if timed else None
        if step is not None:
            watch.see(step)
        acting = [
            (edit, unit) for edit, unit in zip(edits, units, strict=True) if edit.acts_at(step)
        ]
        if not acting:
            return None
        check_width(coder, rows)
        coder = coder.to(rows.device)
        masks = [_cover(edit.region, rows, state) for edit, _ in acting]
        old = {feature: rows.new_zeros(rows.shape[:2], dtype=torch.float32) for feature in features}
        read = [mask for (edit, _), mask in zip(acting, masks, strict=True) if edit.reads]
        if read:
            union = torch.stack(read).any(0)
            codes = coder.encode(rows[union])
            for feature in {edit.feature for edit, _ in acting if edit.reads}:
                value = torch.where(codes.indices == feature, codes.values, 0).sum(-1)
                old[feature][union] = value.float()
        new = dict(old)
        for (edit, unit), mask in zip(acting, masks, strict=True):
            new[edit.feature] = torch.where(
                mask, edit.new(new[edit.feature], unit), new[edit.feature]
            )
        atoms = torch.stack(
            [
                torch.as_tensor(directions.get(feature, coder.raw_atom(feature))).to(
                    rows.device, torch.float32
                )
                for feature in features
            ]
        )
        return torch.stack([new[f] - old[f] for f in features], dim=-1) @ atoms

    return intervene


def check_width(coder: Coder, rows: Tensor) -> None:
    """Check that rows are as wide as the dictionary.

    Raises:
        ValueError: they have another width.
    """
    if rows.shape[-1] != coder.d:
        raise ValueError(
            f"expected activations of width d = {coder.d}, as the dictionary was trained on, "
            f"got {rows.shape[-1]}; steer at its own site and model "
            f"({coder.dictionary.card.get('site', 'unknown')})"
        )


def _cover(region: Any, rows: Tensor, state: CallState) -> Tensor:
    """The tokens that a region covers, bool [batch, token]."""
    batch, tokens = rows.shape[:2]
    if region is None:
        return torch.ones(batch, tokens, dtype=torch.bool, device=rows.device)
    if state.places is None or len(state.places) != tokens:
        raise ValueError(
            f"region: expected the pipeline to give the place of each of {tokens} image tokens "
            "(img_ids), found none; leave the region out"
        )
    image, y, x = state.places.to(rows.device).unbind(-1)
    own = image == 0  # the others belong to pictures given as context
    h, w = int(y[own].max()) + 1, int(x[own].max()) + 1
    if isinstance(region, tuple):
        y0, x0, y1, x1 = region
        if y1 > h or x1 > w:
            raise ValueError(
                f"region: expected (y0, x0, y1, x1) within the picture's {h} by {w} tokens, "
                f"got {region}"
            )
        cover = own & (y >= y0) & (y < y1) & (x >= x0) & (x < x1)
        return cover.expand(batch, tokens)
    if region.shape[-2:] != (h, w) or (region.ndim == 3 and len(region) != batch):
        wanted = [h, w] if region.ndim == 2 else [batch, h, w]
        raise ValueError(f"region: expected a mask {wanted}, got {list(region.shape)}")
    mask = torch.as_tensor(np.ascontiguousarray(region), device=rows.device)
    return (mask[..., y.clamp(max=h - 1), x.clamp(max=w - 1)] & own).expand(batch, tokens)


def editing_site(coder: Coder, site: str | None = None) -> str:
    """The site where activations are changed: `site`, or else the one in the dictionary's card.

    Raises:
        ValueError: neither names a site; or the dictionary is a transcoder, whose codes rebuild
            another site than they are read from: x + decode(edited codes) - decode(codes) would
            mean nothing.
    """
    card = coder.dictionary.card
    if coder.dictionary.transcoder:
        raise ValueError(
            "expected a dictionary that rebuilds the site it reads, got a transcoder from "
            f"{card.get('site', 'unknown')} to {card['target']}, whose decoded codes belong to "
            "another site than the activation they were read from; steer and splice with an SAE or "
            "an ITDA dictionary of the site"
        )
    site = site or card.get("site")
    if not site:
        raise ValueError("expected a site in the dictionary's card, found none; give site=...")
    return site


def warn_of_other_sites(coder: Coder, sites: Iterable[str]) -> None:
    """Warn if activations are changed at sites that the dictionary was not trained on."""
    trained, others = coder.dictionary.card.get("site"), set(sites)
    if trained and (others := sorted(others - {trained})):
        warnings.warn(
            f"the dictionary was trained at {trained}, but acts at {', '.join(others)}, where its "
            f"atoms and typical values stand for nothing it has seen; leave out the site and stream, "
            "or take a dictionary of that site",
            stacklevel=4,
        )
