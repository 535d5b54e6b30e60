"""A tiny FLUX pipeline of true diffusers classes with random weights, and random dictionaries of
every kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jaxdict.dictionary.arrays import Dictionary

D, TEXT, GRID = 32, 5, (4, 6)


def _random_dictionary(
    kind: str,
    *,
    m: int = 48,
    d: int = D,
    d_out: int = 0,
    k: int = 4,
    transform: str = "none",
    site: str = "double.1.img",
    target: str = "",
    seed: int = 0,
) -> Dictionary:
    """A dictionary of a kind with random tensors; `transform` is none, diagonal or full.

    With a `target` it is a transcoder, whose atoms may have a width `d_out` of their own.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    out = d_out or d
    atoms = normal(m, out)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    typical = rng.uniform(0.5, 2, m).astype(np.float32)
    card = {"site": site}
    if kind != "itda":
        start = atoms if out == d else normal(m, d) / d**0.5
        encoder, encoder_bias, bias = start + 0.1 * normal(m, d), 0.1 * normal(m), normal(out)
        thresholds = {
            "batchtopk": np.full(m, 0.3, np.float32),
            "matryoshka": np.full(m, 0.6, np.float32),
            "jumprelu": rng.uniform(0, 0.8, m).astype(np.float32),
        }
        if target:
            card["target"] = target
        return Dictionary(
            kind,
            k,
            atoms,
            bias,
            encoder,
            encoder_bias,
            threshold=thresholds.get(kind),
            typical=typical,
            card=card,
        )
    mean, matrix, inverse = None, None, None
    if transform == "diagonal":
        mean, matrix = normal(d), rng.uniform(0.2, 3, d).astype(np.float32)
        inverse = 1 / matrix
    if transform == "full":
        mean, matrix = normal(d), normal(d, d)
        inverse = np.linalg.inv(matrix.astype(np.float64)).astype(np.float32)
    other = {}
    if target:
        card["target"] = target
        read = normal(m, d)
        read /= np.linalg.norm(read, axis=1, keepdims=True)
        other = {"encoder": read, "bias": normal(out)}
        inverse = None if matrix is None else normal(*(out for _ in matrix.shape))
    shared = {"mean": mean, "transform": matrix, "inverse": inverse, "typical": typical}
    return Dictionary("itda", k, atoms, card=card, **shared, **other)


@pytest.fixture(scope="session")
def random_dictionary():
    """Function: a random dictionary."""
    return _random_dictionary


@pytest.fixture(scope="session")
def pipe():
    """FluxPipeline with d = 32, 2 double and 2 single blocks, for pictures of 4 by 6 image
    tokens."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        shift_factor=0.0,
        scaling_factor=1.0,
    )
    made = FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, transformer)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def draw(pipe):
    """Function: run the pipeline and return its latents [batch, tokens, 16]."""

    def run(batch: int = 1, steps: int = 4, text: int = TEXT, dtype=torch.float32, **options):
        generator = torch.Generator().manual_seed(1)
        words = torch.randn(1, text, 24, generator=generator).expand(batch, -1, -1)
        pooled = torch.randn(1, 8, generator=generator).expand(batch, -1)
        return pipe(
            prompt_embeds=words.to(dtype),
            pooled_prompt_embeds=pooled.to(dtype),
            height=GRID[0] * 4,
            width=GRID[1] * 4,
            num_inference_steps=steps,
            generator=generator,
            output_type="latent",
            **options,
        ).images

    return run


@pytest.fixture
def hook_count(pipe):
    """Function: forward hooks and pre-hooks in the transformer."""

    def count() -> int:
        modules = pipe.transformer.modules()
        return sum(
            len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules
        )

    return count
