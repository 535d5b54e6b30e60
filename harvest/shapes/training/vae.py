"""First stage of training `shapes`: the picture autoencoder, 64x64 pixels to 16x16x4 latents of unit variance."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn
from tqdm import tqdm

from harvest.atomic import whole_file
from harvest.shapes import draw
from harvest.shapes.training.muon import Muon

STEPS = 900
BATCH = 16
ADAM_RATE = 2e-3
MUON_RATE = 6e-3
WARM_UP = 50
KL_WEIGHT = 1e-5
POLISH_STEPS = 2400
EMA = 0.995


def pictures(count: int, seed: int) -> torch.Tensor:
    """Renders `count` random scenes, float32 [count, 3, 64, 64] in [-1, 1]."""
    rng = np.random.default_rng(seed)
    drawn = np.stack(
        [draw.render(draw.sample_scene(rng, held_out="include"), rng)[0] for _ in range(count)]
    )
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(
    vae: AutoencoderKL, checkpoint: Path, *, seed: int = 0, steps: int = STEPS, scenes: int = 16_384
) -> float:
    """Trains the autoencoder in place; resumes from `checkpoint` when it is there.

    Loss: MSE + 0.3 L1 + 1e-5 KL, Muon on the kernels and Adam on the rest with a cosine schedule, an exponential average of the weights kept at the end.
    Then each latent channel is scaled to unit variance inside the weights and the common mean becomes `shift_factor`.

    Args:
        vae: the autoencoder, changed in place.
        checkpoint: file of the training state, written every 150 steps.
        seed: fixes pictures and order.
        steps: optimizer steps of 16 pictures.
        scenes: drawn pictures in the training set.

    Returns:
        PSNR in dB on 256 fresh pictures.
    """
    data = pictures(scenes, seed + 1)
    vae.train().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    muon, adam = _optimizers(vae)
    average = copy.deepcopy(vae.state_dict())
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(state["model"])
        muon.load_state_dict(state["muon"])
        adam.load_state_dict(state["adam"])
        average, first = state["average"], state["step"]
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="vae", unit="step")
    for step in bar:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        batch = data[torch.randint(len(data), (BATCH,), generator=generator)]
        posterior = vae.encode(batch.contiguous(memory_format=torch.channels_last)).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        out = vae.decode(posterior.mean + posterior.std * noise).sample
        error = out - batch
        loss = error.square().mean() + 0.3 * error.abs().mean() + KL_WEIGHT * posterior.kl().mean()
        _update(loss, vae, (muon, adam), _schedule(step, steps))
        _average(average, vae, step)
        if step % 25 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % 150 == 0 or step + 1 == steps:
            _save(checkpoint, vae, (muon, adam), average, step + 1)
    vae.load_state_dict(average)
    vae.eval()
    _normalise_latents(vae, data[:1024])
    return psnr(vae, pictures(256, seed + 2))


def polish_decoder(
    vae: AutoencoderKL,
    latents: torch.Tensor,
    targets: torch.Tensor,
    checkpoint: Path,
    *,
    seed: int = 0,
    steps: int = POLISH_STEPS,
) -> float:
    """Trains the decoder on, the encoder frozen, so that latents (and what is trained on them) stay as they are.

    Args:
        vae: an autoencoder from `train_vae`, changed in place.
        latents: what to decode, [n, 4, 16, 16], as the transformer sees them.
        targets: what it should become, float32 [n, 3, 64, 64] in [-1, 1].
        checkpoint: file of the training state, written every 150 steps.
        seed: fixes the order.
        steps: optimizer steps of 16 pictures.

    Returns:
        PSNR in dB on 256 fresh pictures, from latents as the encoder gives them.
    """
    decoder = vae.decoder.train()
    muon, adam = _optimizers(decoder)
    average = copy.deepcopy(decoder.state_dict())
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        decoder.load_state_dict(state["model"])
        muon.load_state_dict(state["muon"])
        adam.load_state_dict(state["adam"])
        average, first = state["average"], state["step"]
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="decoder", unit="step")
    for step in bar:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step + 2**30)
        rows = torch.randint(len(latents), (BATCH,), generator=generator)
        chosen = latents[rows] / vae.config.scaling_factor + vae.config.shift_factor
        error = vae.decode(chosen).sample - targets[rows]
        loss = error.square().mean() + 0.3 * error.abs().mean()
        _update(loss, decoder, (muon, adam), 0.5 * _schedule(step, steps))
        _average(average, decoder, step)
        if step % 25 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % 150 == 0 or step + 1 == steps:
            _save(checkpoint, decoder, (muon, adam), average, step + 1)
    decoder.load_state_dict(average)
    vae.eval()
    return psnr(vae, pictures(256, seed + 2))


@torch.no_grad()
def psnr(vae: AutoencoderKL, batch: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of the reconstruction through the latent mean."""
    total = 0.0
    for part in batch.split(64):
        out = vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1)
        total += ((out - part) / 2).square().mean((1, 2, 3)).sum().item()
    return -10 * math.log10(total / len(batch))


@torch.no_grad()
def encode(vae: AutoencoderKL, batch: torch.Tensor) -> torch.Tensor:
    """Latents as the transformer sees them: (mean - shift) * scale, float32 [n, 4, 16, 16]."""
    means = torch.cat([vae.encode(part).latent_dist.mean for part in batch.split(64)])
    return (means - vae.config.shift_factor) * vae.config.scaling_factor


@torch.no_grad()
def _normalise_latents(vae: AutoencoderKL, batch: torch.Tensor) -> None:
    """Folds one scale a channel into the weights around the latents, and sets the pipeline's shift and scale."""
    means = torch.cat([vae.encode(part).latent_dist.mean for part in batch.split(64)])
    scale = means.std((0, 2, 3))
    out, into = vae.encoder.conv_out, vae.decoder.conv_in
    channels = len(scale)
    out.weight[:channels] /= scale.view(-1, 1, 1, 1)
    out.bias[:channels] /= scale
    out.bias[channels:] -= 2 * scale.log()
    into.weight *= scale.view(1, -1, 1, 1)
    means = means / scale.view(1, -1, 1, 1)
    vae.register_to_config(shift_factor=round(means.mean().item(), 4))
    vae.register_to_config(scaling_factor=round(1 / means.std().item(), 4))


def _optimizers(module: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    kernels = [value for value in module.parameters() if value.ndim > 1]
    rest = [value for value in module.parameters() if value.ndim == 1]
    return Muon(kernels, rate=MUON_RATE), torch.optim.Adam(rest, lr=ADAM_RATE, betas=(0.9, 0.99))


def _schedule(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _update(
    loss: torch.Tensor,
    module: nn.Module,
    optimizers: tuple[torch.optim.Optimizer, ...],
    scale: float,
) -> None:
    for optimizer, rate in zip(optimizers, (MUON_RATE, ADAM_RATE), strict=True):
        optimizer.zero_grad(set_to_none=True)
        for group in optimizer.param_groups:
            group["lr"] = rate * scale
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()


@torch.no_grad()
def _average(average: dict[str, torch.Tensor], module: nn.Module, step: int) -> None:
    decay = min(EMA, (step + 1) / (step + 10))
    for name, value in module.state_dict().items():
        average[name].lerp_(value, 1 - decay)


def _save(
    checkpoint: Path,
    module: nn.Module,
    optimizers: tuple[torch.optim.Optimizer, ...],
    average: dict[str, torch.Tensor],
    step: int,
) -> None:
    """Writes the training state, whole or not at all."""
    muon, adam = optimizers
    state = {
        "model": module.state_dict(),
        "muon": muon.state_dict(),
        "adam": adam.state_dict(),
        "average": average,
        "step": step,
    }
    with whole_file(checkpoint) as draft:
        torch.save(state, draft)
