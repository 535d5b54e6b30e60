"""Capture: every kind of site against the tensors that neighbouring modules really saw, in both layouts."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock

from harvest.capture import Capture, site_shape
from harvest.sites import KINDS, all_sites

TEXT, IMAGE, WIDTH = 5, 6, 32
EVERY = all_sites(2, 2, KINDS)


class OldSingleBlock(FluxSingleTransformerBlock):
    """A single block as older diffusers had it: one joined tensor in, one out."""

    def forward(self, hidden_states, temb, image_rotary_emb=None):
        normed, gate = self.norm(hidden_states, emb=temb)
        mlp = self.act_mlp(self.proj_mlp(normed))
        attention = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb)
        joined = torch.cat([attention, mlp], dim=2)
        return hidden_states + gate.unsqueeze(1) * self.proj_out(joined)


class OldTransformer(FluxTransformer2DModel):
    """The transformer around them: it joins the streams once, before the single blocks."""

    def forward(
        self, hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids
    ):
        image = self.x_embedder(hidden_states)
        text = self.context_embedder(encoder_hidden_states)
        temb = self.time_text_embed(timestep * 1000, pooled_projections)
        rope = self.pos_embed(torch.cat([txt_ids, img_ids]))
        for block in self.transformer_blocks:
            text, image = block(image, text, temb, rope)
        joined = torch.cat([text, image], dim=1)
        for block in self.single_transformer_blocks:
            joined = block(joined, temb, rope)
        return (self.proj_out(self.norm_out(joined[:, text.shape[1] :], temb)),)


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 6, 6),
    ).requires_grad_(False)


@pytest.fixture(scope="module")
def old(transformer):
    model = OldTransformer(**transformer.config)
    for i, block in enumerate(model.single_transformer_blocks):
        model.single_transformer_blocks[i] = OldSingleBlock(WIDTH, 2, 16)
        assert type(block) is FluxSingleTransformerBlock
    model.load_state_dict(transformer.state_dict())
    return model.requires_grad_(False)


def call(model, *, images=3, seed=0, text=TEXT):
    generator = torch.Generator().manual_seed(seed)
    return model(
        hidden_states=torch.randn(images, IMAGE, 8, generator=generator),
        encoder_hidden_states=torch.randn(images, text, 12, generator=generator),
        pooled_projections=torch.randn(images, 10, generator=generator),
        timestep=torch.full((images,), 0.5),
        img_ids=torch.arange(IMAGE * 3).reshape(IMAGE, 3).float(),
        txt_ids=torch.zeros(text, 3),
    )[0]


def captured(model, sites, **options):
    with Capture(model, sites, steps=1) as capture:
        call(model, **options)
        return {name: value[:, 0].clone() for name, value in capture.take().items()}


def seen(model, watch):
    """What modules were really given or gave, by plain hooks: {name: tensor}."""
    found, handles = {}, []
    for name, (module, keep) in watch.items():
        hook = lambda _m, args, kwargs, out, name=name, keep=keep: found.update(  # noqa: E731
            {name: keep(args, kwargs, out)}
        )
        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    call(model)
    for handle in handles:
        handle.remove()
    return found


def check(got, expected):
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected.to(torch.bfloat16), rtol=0, atol=0)


def test_residual_streams_are_what_the_next_block_is_given(transformer):
    double, single = transformer.transformer_blocks, transformer.single_transformer_blocks
    image = lambda args, kwargs, out: kwargs["hidden_states"]  # noqa: E731
    text = lambda args, kwargs, out: kwargs["encoder_hidden_states"]  # noqa: E731
    real = seen(
        transformer,
        {
            "double.0.img": (double[1], image),
            "double.0.txt": (double[1], text),
            "double.1.img": (single[0], image),
            "double.1.txt": (single[0], text),
            "single.0.img": (single[1], image),
            "single.0.txt": (single[1], text),
            "single.1.img": (transformer.norm_out, lambda args, kwargs, out: args[0]),
        },
    )
    got = captured(transformer, list(real))
    for site, value in real.items():
        assert got[site].shape == (3, IMAGE if site.endswith("img") else TEXT, WIDTH)
        check(got[site], value)


def test_updates_are_output_minus_input(transformer):
    def added(part, key):
        return lambda args, kwargs, out: out[part] - kwargs[key]

    blocks = {
        "double": transformer.transformer_blocks,
        "single": transformer.single_transformer_blocks,
    }
    watch = {}
    for kind, blocks_of_kind in blocks.items():
        for i, block in enumerate(blocks_of_kind):
            watch[f"{kind}.{i}.txt.update"] = (block, added(0, "encoder_hidden_states"))
            watch[f"{kind}.{i}.img.update"] = (block, added(1, "hidden_states"))
    real = seen(transformer, watch)
    got = captured(transformer, list(real))
    for site, value in real.items():
        check(got[site], value)


def test_neurons_and_attention_are_what_the_output_layers_use(transformer):
    first = lambda args, kwargs, out: args[0]  # noqa: E731
    given = lambda args, kwargs, out: out  # noqa: E731
    double, single = transformer.transformer_blocks[1], transformer.single_transformer_blocks[1]
    real = seen(
        transformer,
        {
            "double.1.img.mlp": (double.ff.net[2], first),
            "double.1.txt.mlp": (double.ff_context.net[2], first),
            "double.1.img.attn": (double.attn.to_out[0], given),
            "double.1.txt.attn": (double.attn.to_add_out, given),
            "joined": (single.proj_out, first),  # attention, then neurons; text, then image
        },
    )
    joined = real.pop("joined")
    real["single.1.txt.attn"], real["single.1.img.attn"] = (
        joined[..., :WIDTH][:, :TEXT],
        joined[..., :WIDTH][:, TEXT:],
    )
    real["single.1.txt.mlp"], real["single.1.img.mlp"] = (
        joined[..., WIDTH:][:, :TEXT],
        joined[..., WIDTH:][:, TEXT:],
    )
    got = captured(transformer, list(real))
    for site, value in real.items():
        check(got[site], value)
    assert got["double.1.img.mlp"].shape[-1] == got["single.1.txt.mlp"].shape[-1] == 4 * WIDTH


def test_the_older_layout_gives_the_same_at_every_site(transformer, old):
    torch.testing.assert_close(call(old), call(transformer))
    new, before = captured(transformer, EVERY), captured(old, EVERY)
    for site in EVERY:
        torch.testing.assert_close(before[site], new[site], rtol=2**-7, atol=1e-4)


def test_the_text_length_is_read_from_the_tensors(transformer, old):
    for model in (transformer, old):
        got = captured(model, ("double.0.txt", "single.0.txt", "single.0.img.mlp"), text=9)
        assert got["double.0.txt"].shape == got["single.0.txt"].shape == (3, 9, WIDTH)
        assert got["single.0.img.mlp"].shape == (3, IMAGE, 4 * WIDTH)


def test_announced_shapes_are_the_real_ones(transformer):
    got = captured(transformer, EVERY)
    for site in EVERY:
        shape = site_shape(transformer, site, image_tokens=IMAGE, text_tokens=TEXT)
        assert got[site].shape == (3, *shape)


def test_steps_and_batches_of_any_size_are_kept_apart(transformer):
    runs = ((3, 0), (2, 10), (3, 0))
    alone = {
        (images, seed + step): captured(
            transformer, ["single.1.img"], images=images, seed=seed + step
        )
        for images, seed in runs
        for step in (0, 1)
    }
    with Capture(transformer, ["single.1.img"], steps=2) as capture:
        for images, seed in runs:
            call(transformer, images=images, seed=seed)
            call(transformer, images=images, seed=seed + 1)
            got = capture.take()["single.1.img"]
            assert got.shape == (images, 2, IMAGE, WIDTH)
            for step in (0, 1):
                check(got[:, step], alone[images, seed + step]["single.1.img"])


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_no_hook_is_left_behind_and_nothing_is_changed(transformer):
    plain = call(transformer)
    with Capture(transformer, EVERY, steps=1):
        assert hooks(transformer) == len(EVERY) + 1
        np.testing.assert_array_equal(call(transformer).numpy(), plain.numpy())
    assert hooks(transformer) == 0
    with pytest.raises(KeyError), Capture(transformer, EVERY, steps=1):
        raise KeyError("inside")
    with pytest.raises(RuntimeError, match="mat1"), Capture(transformer, EVERY, steps=1):
        transformer.x_embedder(torch.zeros(1, 3))
    assert hooks(transformer) == 0


def test_a_wrong_number_of_steps_is_noticed(transformer):
    with Capture(transformer, ["double.0.img"], steps=2) as capture:
        call(transformer)
        with pytest.raises(RuntimeError, match="expected 2 forward passes, got 1"):
            capture.take()
        call(transformer)
        with pytest.raises(RuntimeError, match="expected 2 forward passes an image, got more"):
            call(transformer)
        capture.reset()
        call(transformer)
        call(transformer)
        assert capture.take()["double.0.img"].shape[1] == 2


def test_a_block_that_is_not_called_is_told(transformer):
    blocks = transformer.transformer_blocks
    other = deepcopy(blocks[1])
    with Capture(transformer, ["double.0.img", "double.1.img"], steps=1) as capture:
        hooked, blocks[1] = blocks[1], other
        try:
            call(transformer)
        finally:
            blocks[1] = hooked
        with pytest.raises(RuntimeError, match=r"call the block of double\.1\.img as a module"):
            capture.take()


def test_a_site_the_model_lacks_is_refused(transformer):
    with pytest.raises(ValueError, match=r"no site double.2.img: it has 2 double blocks"):
        Capture(transformer, ["double.2.img"], steps=1)
    with pytest.raises(ValueError, match="expected a site such as"):
        Capture(transformer, ["double.img"], steps=1)
