"""Hooks act on a compiled transformer, whichever way it was compiled, before or after its first picture."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from harvest.capture import Capture
from steer.coder import Coder
from steer.edits import Edit
from steer.hooks import steering
from steer.splice import splicing

SITE = "single.0.img"


def whole(transformer, **options):
    return torch.compile(transformer, **options)


def in_place(transformer, **options):
    transformer.compile(**options)
    return transformer


def forward(transformer, **options):
    transformer.forward = torch.compile(transformer.forward, **options)
    return transformer


def each_block(transformer, **options):
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.compile(**options)
    return transformer


def each_wrapped_block(transformer, **options):
    for blocks in (transformer.transformer_blocks, transformer.single_transformer_blocks):
        for number, block in enumerate(blocks):
            blocks[number] = torch.compile(block, **options)
    return transformer


@pytest.fixture
def coder(random_dictionary):
    return Coder(random_dictionary("topk", site=SITE))


@pytest.fixture
def runs():
    """Runs of compiled code so far, in a list."""
    return []


@pytest.fixture
def backend(runs):
    """A backend for `torch.compile` that runs the traced graph as it is, and counts."""

    def compile_graph(graph, inputs):
        def run(*args):
            runs.append(1)
            return graph.forward(*args)

        return run

    return compile_graph


def results(pipe, draw, coder):
    """What is captured, and the latents, while every kind of hook is set on the transformer."""
    edits = [Edit(3, value=4.0, steps=(0, 1)), Edit(5, "ablate", region=(0, 0, 2, 2))]
    with (
        steering(pipe, coder, edits),
        splicing(pipe, coder, steps=(1, 2)),
        Capture(pipe.transformer, [SITE, "double.1.txt.mlp"], steps=2) as capture,
    ):
        latents = draw(steps=2)
        return [latents, *(rows.clone() for rows in capture.take().values())]


@pytest.mark.parametrize(
    ("compiled", "warm", "fullgraph"),
    [
        (whole, False, False),
        (whole, True, True),
        (in_place, False, True),
        (in_place, True, False),
        (forward, False, False),
        (each_block, True, True),
        (each_wrapped_block, False, False),
    ],
)
def test_hooks_act_as_on_the_plain_transformer(
    pipe, draw, coder, monkeypatch, backend, runs, compiled, warm, fullgraph
):
    before, expected = draw(steps=2), results(pipe, draw, coder)
    assert not torch.equal(expected[0], before)
    torch.compiler.reset()
    own = compiled(deepcopy(pipe.transformer), backend=backend, fullgraph=fullgraph)
    monkeypatch.setitem(pipe._internal_dict, "transformer", pipe._internal_dict["transformer"])
    monkeypatch.setattr(pipe, "transformer", own)
    if warm:
        draw(steps=2)
        assert runs
        runs.clear()
    for got, want in zip(results(pipe, draw, coder), expected, strict=True):
        assert torch.equal(got, want)
    assert not runs
    if warm:  # afterwards it is as it was
        assert torch.equal(draw(steps=2), before)
        assert runs
