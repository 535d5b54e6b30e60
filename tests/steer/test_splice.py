"""The picture with the dictionary's reconstruction in place of the activation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jaxdict.dictionary.arrays import Dictionary
from steer.coder import Coder
from steer.hooks import intervening
from steer.splice import splicing

SITE, D = "double.1.img", 32


@pytest.fixture
def perfect():
    """A dictionary that loses nothing: every direction and its opposite."""
    both = np.concatenate([np.eye(D), -np.eye(D)]).astype(np.float32)
    zeros = np.zeros(2 * D, np.float32)
    bias = np.zeros(D, np.float32)
    return Coder(Dictionary("topk", D, both, bias, both, zeros, typical=zeros, card={"site": SITE}))


def test_a_perfect_dictionary_gives_the_same_picture(pipe, draw, perfect):
    plain = draw()
    with splicing(pipe, perfect):
        torch.testing.assert_close(draw(), plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["topk", "itda"])
def test_the_site_holds_the_reconstruction_on_the_asked_steps(
    pipe, draw, random_dictionary, hook_count, kind
):
    coder = Coder(random_dictionary(kind, site=SITE))
    rows = []

    def watch(x, state):
        rows.append(x.clone())

    with (
        intervening(pipe, {SITE: watch}),
        splicing(pipe, coder, steps=(1, 3)),
        intervening(pipe, {SITE: watch}),
    ):
        draw()
    for step, (before, after) in enumerate(zip(rows[::2], rows[1::2], strict=True)):
        if step in (1, 2):
            torch.testing.assert_close(
                after, coder.decode(coder.encode(before)), atol=1e-4, rtol=1e-4
            )
            assert not torch.allclose(after, before, atol=1e-2)
        else:
            assert torch.equal(after, before)
    assert hook_count() == 0


@pytest.mark.parametrize("site", [None, SITE, "double.1.img.update"])
def test_a_transcoder_is_refused(pipe, random_dictionary, hook_count, site):
    coder = Coder(random_dictionary("topk", site=SITE, target="double.1.img.update"))
    refused = pytest.raises(ValueError, match=r"got a transcoder from double\.1\.img to .*update")
    with refused, splicing(pipe, coder, site=site):
        pass
    assert hook_count() == 0
