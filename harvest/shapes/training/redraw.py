"""What the finished transformer makes of noised pictures: the data that the decoder is trained on last."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import FluxPipeline
from tqdm import tqdm

from harvest.shapes import draw
from harvest.shapes.training.data import pack, unpack
from harvest.shapes.training.transformer import image_ids
from harvest.shapes.training.vae import encode

CLEAN = 0.25
"""Share of pictures whose latents are left as the encoder gives them."""
NOISE = (0.05, 0.5)
"""Noise levels t, uniform, of the others."""
_LENGTH = 32


@torch.no_grad()
def redraw(
    pipe: FluxPipeline, count: int, seed: int, *, batch: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents as the decoder will meet them, and the pictures that they should become.

    A drawn picture's latents x_0 are noised to x_t = (1 - t) x_0 + t noise; the transformer's velocity v leads back
    to x_t - t v, with the mistakes it makes on the last steps of a generation.

    Args:
        pipe: pipeline whose autoencoder and transformer are trained.
        count: drawn pictures (no held-out pair among them).
        seed: fixes scenes, noise and noise levels.
        batch: pictures in one forward pass.

    Returns:
        latents [count, 4, 16, 16] as the transformer sees them, and pictures, float32 [count, 3, 64, 64] in [-1, 1].
    """
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    latents, pictures = [], []
    for first in tqdm(range(0, count, batch), desc="redraw", unit="batch"):
        scenes = [draw.sample_scene(rng) for _ in range(min(batch, count - first))]
        drawn = np.stack([draw.render(scene, rng)[0] for scene in scenes])
        picture = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1
        clean = pack(encode(pipe.vae, picture))
        n = len(scenes)
        low, high = NOISE
        t = low + (high - low) * torch.rand(n, generator=generator)
        t = t * (torch.rand(n, generator=generator) >= CLEAN)
        noisy = torch.lerp(clean, torch.randn(clean.shape, generator=generator), t[:, None, None])
        states, pooled, text_ids = pipe.encode_prompt(
            [draw.caption(scene) for scene in scenes], None, max_sequence_length=_LENGTH
        )
        velocity = pipe.transformer(
            hidden_states=noisy,
            timestep=t,
            pooled_projections=pooled,
            encoder_hidden_states=states,
            img_ids=image_ids(),
            txt_ids=text_ids,
            return_dict=False,
        )[0]
        latents.append(unpack(noisy - t[:, None, None] * velocity))
        pictures.append(picture)
    return torch.cat(latents), torch.cat(pictures)
