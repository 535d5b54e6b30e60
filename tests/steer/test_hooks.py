"""Steering on a true FLUX pipeline: what reaches the block, where, when, and that nothing stays
behind."""

from __future__ import annotations

from contextlib import contextmanager
from copy import deepcopy

import numpy as np
import pytest
import torch

from steer.coder import Coder
from steer.edits import OPS, Edit
from steer.hooks import find_module, intervening, steering
from steer.splice import splicing

D, TEXT, GRID = 32, 5, (4, 6)
"""Of the pipeline in conftest.py: width, text tokens, image tokens."""
TOKENS = GRID[0] * GRID[1]


@pytest.fixture
def coder(random_dictionary):
    return Coder(random_dictionary("topk"))


@contextmanager
def watching(pipe, *sites):
    """Collect the rows at sites, one tensor a step, as float32."""
    seen = {site: [] for site in sites}

    def watch(site):
        return lambda rows, state: seen[site].append(rows.float().clone())

    with intervening(pipe, {site: watch(site) for site in sites}):
        yield seen


def rows_at(pipe, draw, site, coder=None, edits=(), **options):
    """Rows at a site, [step, batch, token, d], while edits act."""
    with steering(pipe, coder, edits) if edits else watching(pipe), watching(pipe, site) as seen:
        draw(**options)
    return torch.stack(seen[site])


def test_add_moves_the_site_by_value_times_typical_times_atom(pipe, draw, coder):
    site = "double.1.img"
    before = rows_at(pipe, draw, site)
    after = rows_at(pipe, draw, site, coder, [Edit(3, value=2.0, steps=(0, 1))])
    move = 2.0 * coder.typical[3] * coder.raw_atom(3)
    torch.testing.assert_close(after[0] - before[0], move.expand(1, TOKENS, D), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("op", "new"),
    [
        ("set", lambda old: 1.5 + 0 * old),
        ("scale", lambda old: 1.5 * old),
        ("ablate", lambda old: 0 * old),
    ],
)
@pytest.mark.parametrize(("kind", "transform"), [("topk", "none"), ("itda", "full")])
def test_the_error_term_is_kept(pipe, draw, kind, transform, op, new, random_dictionary):
    coder = Coder(random_dictionary(kind, transform=transform))
    before = rows_at(pipe, draw, "double.1.img")[0]
    codes = coder.encode(before)
    feature = int(codes.indices[codes.values > 0].mode().values)
    old = coder.activation(before, feature)
    assert (old > 0).any() and (old == 0).any()
    edit = Edit(feature, op, 1.5, units="raw", steps=(0, 1))
    after = rows_at(pipe, draw, "double.1.img", coder, [edit])[0]
    # x + decode(edited codes) - decode(codes), with the codes edited densely.
    dense = codes.dense(coder.m)
    edited = dense.clone()
    edited[..., feature] = new(old)
    raw = torch.from_numpy(coder.dictionary.raw_atoms)
    torch.testing.assert_close(after, before + (edited - dense) @ raw, atol=2e-4, rtol=1e-4)


def test_several_edits_act_in_order(pipe, draw, coder):
    before = rows_at(pipe, draw, "double.1.img")[0]
    first = (0, 1)
    edits = [
        Edit(3, "ablate", steps=first),
        Edit(3, value=2.0, units="raw", steps=first),
        Edit(5, value=-1.0, units="raw", steps=first, region=(0, 0, 1, 1)),
    ]
    after = rows_at(pipe, draw, "double.1.img", coder, edits)[0]
    three = 2.0 - coder.activation(before, 3)
    five = torch.zeros(1, TOKENS)
    five[0, 0] = -1.0
    expected = before + three[..., None] * coder.raw_atom(3) + five[..., None] * coder.raw_atom(5)
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)


def moved_tokens(pipe, draw, coder, region, batch=1):
    """Which image tokens a region edit moves, bool [batch, h, w]."""
    site = "double.1.img"
    before = rows_at(pipe, draw, site, batch=batch)[0]
    edit = Edit(3, region=region, steps=(0, 1))
    after = rows_at(pipe, draw, site, coder, [edit], batch=batch)[0]
    return (after != before).any(-1).reshape(batch, *GRID).numpy()


def test_rectangle_and_masks_cover_their_tokens(pipe, draw, coder):
    expected = np.zeros((1, *GRID), bool)
    expected[:, 1:3, 2:6] = True
    np.testing.assert_array_equal(moved_tokens(pipe, draw, coder, (1, 2, 3, 6)), expected)
    mask = np.random.default_rng(0).random((2, *GRID)) < 0.5
    np.testing.assert_array_equal(moved_tokens(pipe, draw, coder, mask[0]), mask[:1])
    np.testing.assert_array_equal(moved_tokens(pipe, draw, coder, mask, batch=2), mask)
    assert not moved_tokens(pipe, draw, coder, np.zeros(GRID, bool)).any()


def test_steps_in_every_call_of_the_pipeline(pipe, draw, coder):
    site = "double.1.img"
    move = coder.typical[3] * coder.raw_atom(3)
    acted = []

    def watch(rows, state):
        last.append(rows.clone())

    for steps in (4, 7):
        # Input and output of the hook in one run: steered and unsteered runs part after step 1.
        last: list[torch.Tensor] = []
        with (
            intervening(pipe, {site: watch}),
            steering(pipe, coder, Edit(3, steps=(1, 3))),
            intervening(pipe, {site: watch}),
        ):
            for _ in range(2):
                draw(steps=steps)
        for before, after in zip(last[::2], last[1::2], strict=True):
            acted.append(torch.allclose(after - before, move.expand_as(before), atol=1e-5))
    wanted = [False, True, True, False] * 2 + [False, True, True, False, False, False, False] * 2
    assert acted == wanted


def test_steps_count_the_same_under_true_guidance_in_bfloat16_and_many_steps(pipe, draw):
    steps = []
    transformer = pipe.transformer
    transformer.to(torch.bfloat16)
    try:
        with intervening(pipe, {"single.0.img": lambda rows, state: steps.append(state.step)}):
            draw(
                steps=50,
                true_cfg_scale=2.0,
                negative_prompt_embeds=torch.zeros(1, TEXT, 24, dtype=torch.bfloat16),
                negative_pooled_prompt_embeds=torch.zeros(1, 8, dtype=torch.bfloat16),
                dtype=torch.bfloat16,
            )
    finally:
        transformer.to(torch.float32)
    assert steps == [step for step in range(50) for _ in range(2)]


@pytest.mark.parametrize("kind", ["", ".mlp", ".attn", ".update"])
@pytest.mark.parametrize("block", ["double.0", "single.0"])
@pytest.mark.parametrize("stream", ["img", "txt"])
def test_every_kind_of_site_is_edited_where_it_is_read(
    pipe, draw, block, stream, kind, random_dictionary
):
    site = f"{block}.{stream}{kind}"
    other = f"{block}.{'txt' if stream == 'img' else 'img'}{kind}"
    width = 4 * D if kind == ".mlp" else D
    coder = Coder(random_dictionary("topk", d=width, site=site))
    edit = Edit(1, value=3.0, units="raw", steps=(0, 1))
    with watching(pipe, site, other) as before:
        plain = draw(text=7)
    with steering(pipe, coder, edit), watching(pipe, site, other) as after:
        steered = draw(text=7)
    assert before[site][0].shape[1] == (TOKENS if stream == "img" else 7)
    move = (3 * coder.raw_atom(1)).expand_as(before[site][0])
    torch.testing.assert_close(after[site][0] - before[site][0], move, atol=1e-5, rtol=0)
    torch.testing.assert_close(after[other][0], before[other][0])
    assert not torch.equal(plain, steered)


def test_joined_output_of_older_single_blocks(pipe, draw, random_dictionary, hook_count):
    """Older diffusers pass text and image through single blocks as one tensor and return one."""
    site, _ = find_module(pipe.transformer, "single.0.img")
    calls = {"text": TEXT}
    coder = Coder(random_dictionary("topk", site=str(site)))
    seen = []

    class Old(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
            text, image = hidden_states[:, : calls["text"]], hidden_states[:, calls["text"] :]
            return torch.cat(self.block(image, text, temb, image_rotary_emb), dim=1)

    class Bridge(torch.nn.ModuleList):
        """Calls the old block the old way from the present transformer."""

        def __iter__(self):
            for block in super().__iter__():
                yield lambda hidden_states, encoder_hidden_states, block=block, **rest: _split(
                    block(
                        hidden_states=torch.cat([encoder_hidden_states, hidden_states], 1), **rest
                    ),
                    seen,
                )

    def _split(joined, seen):
        seen.append(joined)
        return joined[:, :TEXT], joined[:, TEXT:]

    transformer = pipe.transformer
    modern = transformer.single_transformer_blocks
    plain = draw(steps=1)
    transformer.single_transformer_blocks = Bridge([Old(block) for block in modern])
    try:
        assert torch.equal(draw(steps=1), plain)
        for name in ("single.0.img", "single.0.img.update"):
            seen.clear()
            draw(steps=1)
            before = seen[0]
            seen.clear()
            with steering(pipe, coder, Edit(2, units="raw"), site=name):
                draw(steps=1)
            moved = seen[0] - before
            assert not moved[:, :TEXT].any()
            atom = coder.raw_atom(2).expand(1, TOKENS, D)
            torch.testing.assert_close(moved[:, TEXT:], atom, atol=1e-5, rtol=0)
    finally:
        transformer.single_transformer_blocks = modern
    assert hook_count() == 0


def test_nothing_edited_is_the_same_picture_to_the_bit(pipe, draw, coder):
    plain = draw()
    untouched = [(), Edit(3, value=0.0), Edit(3, "scale", 1.0)]
    for edits in untouched:
        with steering(pipe, coder, edits):
            assert torch.equal(draw(), plain)
    late = Edit(3, steps=(50, 60))
    with pytest.warns(UserWarning, match="acted in no step"), steering(pipe, coder, late):
        assert torch.equal(draw(), plain)
    assert torch.equal(draw(), plain)


def test_a_site_that_the_dictionary_was_not_trained_on_is_warned_of(pipe, draw, coder, recwarn):
    with steering(pipe, coder, Edit(3)), steering(pipe, coder, [Edit(3, stream="img")]):
        pass
    with splicing(pipe, coder), splicing(pipe, coder, site="double.1.img"):
        pass
    assert not [one for one in recwarn if issubclass(one.category, UserWarning)]
    other = r"trained at double\.1\.img, but acts at {}, "
    for site, context in (
        (r"double\.0\.img", lambda: steering(pipe, coder, Edit(3), site="double.0.img")),
        (r"double\.1\.txt", lambda: steering(pipe, coder, [Edit(3), Edit(3, stream="txt")])),
        (r"single\.0\.img", lambda: splicing(pipe, coder, site="single.0.img")),
    ):
        with pytest.warns(UserWarning, match=other.format(site)) as told, context():
            draw(steps=1)
        assert told[0].filename == __file__


def test_a_block_that_is_not_called_is_warned_of(pipe, draw, coder):
    blocks = pipe.transformer.transformer_blocks
    other = deepcopy(blocks[1])
    told = pytest.warns(UserWarning, match=r"nothing was changed at double\.1\.img, as")
    with told, steering(pipe, coder, Edit(3)), watching(pipe, "double.0.img"):
        hooked, blocks[1] = blocks[1], other
        try:
            draw(steps=1)
        finally:
            blocks[1] = hooked


def test_no_hook_stays_behind(pipe, draw, coder, hook_count):
    with pytest.raises(KeyboardInterrupt), steering(pipe, coder, Edit(3)):
        draw()
        assert hook_count() == 2
        raise KeyboardInterrupt
    assert hook_count() == 0
    with (
        pytest.raises(ValueError, match="4 by 6 tokens"),
        steering(pipe, coder, Edit(3, region=(0, 0, 5, 2))),
    ):
        draw()
    with (
        pytest.raises(ValueError, match=r"double\.1"),
        intervening(pipe, {"double.0.img": None, "double.2.img": None}),
    ):
        pass
    assert hook_count() == 0


def test_the_block_keeps_its_dtype_and_the_sum_is_float32(pipe, coder):
    block = pipe.transformer.transformer_blocks[1]
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, TOKENS, D, generator=generator).bfloat16(),
        "encoder_hidden_states": torch.randn(1, TEXT, D, generator=generator).bfloat16(),
        "temb": torch.randn(1, D, generator=generator).bfloat16(),
    }
    pipe.transformer.to(torch.bfloat16)
    try:
        with torch.no_grad():
            plain = block(**inputs)[1]
            with steering(pipe, coder, Edit(3, value=0.3, units="raw")):
                steered = block(**inputs)[1]
    finally:
        pipe.transformer.to(torch.float32)
    assert steered.dtype == torch.bfloat16
    expected = (plain.float() + 0.3 * coder.raw_atom(3)).bfloat16()
    assert torch.equal(steered, expected)


def test_a_control_direction_takes_the_place_of_the_atom(pipe, draw, coder):
    direction = torch.ones(D)
    edit = Edit(3, units="raw", steps=(0, 1))
    with (
        steering(pipe, coder, edit, directions={3: direction}),
        watching(pipe, "double.1.img") as after,
    ):
        draw()
    before = rows_at(pipe, draw, "double.1.img")[0]
    torch.testing.assert_close(
        after["double.1.img"][0] - before, torch.ones(1, TOKENS, D), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("site", [None, "double.1.img", "double.1.img.update"])
def test_a_transcoder_is_refused(pipe, random_dictionary, hook_count, site):
    """Even one of equal widths, at either of its sites, and by every op."""
    coder = Coder(random_dictionary("jumprelu", target="double.1.img.update"))
    for op in OPS:
        refused = pytest.raises(
            ValueError, match=r"got a transcoder from double\.1\.img to double\.1\.img\.update"
        )
        with refused, steering(pipe, coder, Edit(3, op), site=site):
            pass
    assert hook_count() == 0


def test_mistakes_are_named(pipe, draw, coder, random_dictionary, hook_count):
    with pytest.raises(TypeError, match=r"model\.pipe"), steering(object(), coder, Edit(3)):
        pass
    with pytest.raises(ValueError, match="feature from 0 to 47"), steering(pipe, coder, Edit(48)):
        pass
    with (
        pytest.raises(ValueError, match="nearest"),
        steering(pipe, coder, Edit(3), site="double.9.img"),
    ):
        pass
    corner, masks = (0, 0, 1, 1), np.ones((3, *GRID), bool)
    refused = pytest.raises(ValueError, match="no place in the picture")
    with refused, steering(pipe, coder, Edit(3, region=corner), site="double.1.txt"):
        pass
    refused = pytest.raises(ValueError, match=r"width d = 32.*got 128")
    with refused, steering(pipe, coder, Edit(3), site="double.1.img.mlp"):
        draw()
    refused = pytest.raises(ValueError, match=r"mask \[2, 4, 6\], got \[3, 4, 6\]")
    with refused, steering(pipe, coder, Edit(3, region=masks)):
        draw(batch=2)
    dead = random_dictionary("topk")
    dead.typical[3] = 0
    with pytest.raises(ValueError, match="never active"), steering(pipe, Coder(dead), Edit(3)):
        pass
    bare = random_dictionary("topk")
    bare.card.clear()
    with pytest.raises(ValueError, match="site"), steering(pipe, Coder(bare), Edit(3)):
        pass
    assert hook_count() == 0
