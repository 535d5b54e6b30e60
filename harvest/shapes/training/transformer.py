"""Second stage of training `shapes`: text encoders and transformer, by flow matching on the autoencoder's latents."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import FluxPipeline
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from harvest.atomic import whole_file
from harvest.shapes.training.data import TEXT_LENGTHS, Data
from harvest.shapes.training.muon import Muon
from harvest.shapes.training.readouts import Heads, Maps

BATCH = 64
WARM_UP = 100
DECAY_SHARE = 0.55
MUON_RATE = 5e-3
ADAM_RATE = 2e-3
EMA = 0.998
OBJECT_WEIGHT = 3.0
HEADS_WEIGHT = 0.05
MAPS_WEIGHT = 0.3
"""Weight of the image tokens' read-outs; it falls to zero while the learning rate decays (see `_maps_weight`)."""
MAPS_BLOCK = 0
"""Single block whose image tokens those are read from."""
PAIR_SHARE = 0.35
"""Share of two-object scenes in a batch."""
TEXT_STEPS = 400
"""Steps of the text encoders' own pre-training on the caption's attributes."""


def train_transformer(
    pipe: FluxPipeline,
    data: Data,
    checkpoint: Path,
    *,
    steps: int,
    seed: int = 0,
    every: int = 500,
    fuse: bool = False,
    report: Callable[[int, FluxPipeline], None] | None = None,
) -> None:
    """Trains text encoders and transformer in place; resumes from `checkpoint` when it is there.

    Velocity matching: x_t = (1 - t) x_0 + t noise, target noise - x_0, weighted 3x on tokens an object touches; t is
    half sigmoid(N(0.8, 1)), half uniform. Muon on the blocks' matrices but adaLN's, AdamW on all else.

    Args:
        pipe: pipeline whose autoencoder is trained already.
        data: from `make_data`.
        checkpoint: file of the training state, written every `every` steps.
        steps: optimizer steps of 64 pictures in all.
        seed: fixes order and noise.
        every: steps between checkpoints.
        fuse: compile the transformer (a C++ compiler is needed; a few minutes, then a quarter less time a step).
        report: called with (step, pipeline holding the averaged weights) after each checkpoint.
    """
    parts = nn.ModuleDict(
        {"t": pipe.transformer, "clip": pipe.text_encoder, "t5": pipe.text_encoder_2}
    )
    torch.manual_seed(seed)
    readouts = nn.ModuleDict({"heads": Heads(), "maps": Maps(pipe.transformer.inner_dim)})
    forward, hook = _forward(pipe.transformer)
    if fuse:
        forward = torch.compile(forward, dynamic=False)
    muon, adam = _optimizers(parts, readouts)
    first = 0
    average = None
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        parts.load_state_dict(state["model"])
        readouts.load_state_dict(state["readouts"])
        muon.load_state_dict(state["muon"])
        adam.load_state_dict(state["adam"])
        average, first = state["average"], state["step"]
    parts.train()
    if first == 0:
        _train_text(parts, readouts["heads"], data, seed)
        average = copy.deepcopy(parts.state_dict())
    assert average is not None
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="transformer", unit="step")
    running = 0.0
    with sdpa_kernel(
        SDPBackend.MATH
    ):  # on a CPU the fused kernel's backward is slower than plain matmuls
        for step in bar:
            scale = _schedule(step, steps)
            for optimizer, rate in ((muon, MUON_RATE), (adam, ADAM_RATE)):
                for group in optimizer.param_groups:
                    group["lr"] = rate * scale
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            loss, flow = _loss(
                parts, readouts, forward, data, generator, maps=_maps_weight(step, steps)
            )
            muon.zero_grad(set_to_none=True)
            adam.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([*parts.parameters(), *readouts.parameters()], 1.0)
            muon.step()
            adam.step()
            decay = min(EMA, (step + 1) / (step + 10))
            with torch.no_grad():
                for name, value in parts.state_dict().items():
                    if value.is_floating_point():
                        average[name].lerp_(value, 1 - decay)
            running = flow if step == first else 0.98 * running + 0.02 * flow
            if step % 20 == 0:
                bar.set_postfix(loss=f"{running:.4f}")
            if (step + 1) % every == 0 or step + 1 == steps:
                state = {
                    "model": parts.state_dict(),
                    "readouts": readouts.state_dict(),
                    "muon": muon.state_dict(),
                    "adam": adam.state_dict(),
                    "average": average,
                    "step": step + 1,
                }
                with whole_file(checkpoint) as draft:
                    torch.save(state, draft)
                if report is not None:
                    current = copy.deepcopy(parts.state_dict())
                    parts.load_state_dict(average)
                    parts.eval()
                    report(step + 1, pipe)
                    parts.load_state_dict(current)
                    parts.train()
    hook.remove()
    parts.load_state_dict(average)
    parts.eval()


def _loss(
    parts: nn.ModuleDict,
    readouts: nn.ModuleDict,
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    data: Data,
    generator: torch.Generator,
    *,
    maps: float,
) -> tuple[torch.Tensor, float]:
    rows = _draw_rows(data, generator)
    clean = data.latents[rows]
    noise = torch.randn(clean.shape, generator=generator)
    normal, uniform = (
        torch.randn(BATCH, generator=generator),
        torch.rand(BATCH, generator=generator),
    )
    t = torch.where(torch.arange(BATCH) % 2 == 0, torch.sigmoid(0.8 + normal), uniform)
    length = TEXT_LENGTHS[int(torch.randint(len(TEXT_LENGTHS), (), generator=generator))]
    noisy = torch.lerp(clean, noise, t[:, None, None])
    pooled, states = _encode_text(parts, data, rows, length)
    out, hidden = forward(noisy, t, pooled, states, image_ids(), torch.zeros(length, 3))
    cover = data.cover[rows].float() / 255
    weights = 1.0 + (OBJECT_WEIGHT - 1) * (cover.amax((2, 3)) > 0)
    error = (out - (noise - clean)).square().mean(-1)
    flow = (error * weights).sum() / weights.sum()
    targets = {name: value[rows] for name, value in data.targets.items()}
    loss = flow + HEADS_WEIGHT * readouts["heads"].loss(pooled, states, targets)
    if maps > 0:
        loss = loss + maps * readouts["maps"].loss(hidden, cover, data.kinds[rows])
    return loss, flow.item()


def _forward(
    transformer: nn.Module,
) -> tuple[Callable[..., tuple[torch.Tensor, torch.Tensor]], RemovableHandle]:
    """The transformer as a function that also returns the image tokens after single block `MAPS_BLOCK`, by a hook."""
    kept = {}

    def keep(
        _module: nn.Module, _arguments: tuple, output: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        kept["image"] = output[1]

    def forward(
        noisy: torch.Tensor,
        t: torch.Tensor,
        pooled: torch.Tensor,
        states: torch.Tensor,
        image_ids: torch.Tensor,
        text_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = transformer(
            hidden_states=noisy,
            timestep=t,
            pooled_projections=pooled,
            encoder_hidden_states=states,
            img_ids=image_ids,
            txt_ids=text_ids,
            return_dict=False,
        )[0]
        return out, kept.pop("image")

    return forward, transformer.single_transformer_blocks[MAPS_BLOCK].register_forward_hook(keep)


def _maps_weight(step: int, steps: int) -> float:
    """Full until the learning rate decays, then falling to zero in half of the time that is left."""
    left = (steps - step) / (DECAY_SHARE * steps)
    return MAPS_WEIGHT * min(1.0, max(0.0, 2 * left - 1))


def _draw_rows(data: Data, generator: torch.Generator) -> torch.Tensor:
    """Rows of a batch, `PAIR_SHARE` of them scenes of two objects."""
    single = torch.where(data.objects == 1)[0]
    double = torch.where(data.objects == 2)[0]
    one = single[torch.randint(len(single), (BATCH,), generator=generator)]
    two = double[torch.randint(len(double), (BATCH,), generator=generator)]
    return torch.where(torch.rand(BATCH, generator=generator) < PAIR_SHARE, two, one)


def _encode_text(
    parts: nn.ModuleDict, data: Data, rows: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    pooled = parts["clip"](data.clip_ids[rows]).pooler_output
    return pooled, parts["t5"](data.t5_ids[rows, :length]).last_hidden_state


def _train_text(parts: nn.ModuleDict, heads: Heads, data: Data, seed: int) -> None:
    """Lets the text encoders learn to tell the caption's attributes before there is a picture to make."""
    parameters = [*parts["clip"].parameters(), *parts["t5"].parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    bar = tqdm(range(TEXT_STEPS), desc="text", unit="step")
    for step in bar:
        generator = torch.Generator().manual_seed(seed * 1_000_003 - step - 1 + 2**40)
        rows = torch.randint(len(data), (128,), generator=generator)
        pooled, states = _encode_text(parts, data, rows, 16)
        loss = heads.loss(
            pooled, states, {name: value[rows] for name, value in data.targets.items()}
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def _optimizers(
    parts: nn.ModuleDict, readouts: nn.Module
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    matrices, rest = [], list(readouts.parameters())
    for name, value in parts.named_parameters():
        inside = name.startswith(("t.transformer_blocks", "t.single_transformer_blocks"))
        (matrices if inside and value.ndim == 2 and ".norm" not in name else rest).append(value)
    muon = Muon(matrices, rate=MUON_RATE)
    return muon, torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.99), weight_decay=0.0)


def _schedule(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / (DECAY_SHARE * steps))


def image_ids() -> torch.Tensor:
    """Position ids of the image tokens as the pipeline gives them, float32 [64, 3]."""
    ids = torch.zeros(8, 8, 3)
    ids[..., 1] = torch.arange(8.0)[:, None]
    ids[..., 2] = torch.arange(8.0)[None, :]
    return ids.reshape(64, 3)
