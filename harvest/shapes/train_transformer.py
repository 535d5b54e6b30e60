"""Second stage of training `shapes`: text encoders and transformer, by flow matching on the autoencoder's latents."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from harvest.shapes import draw
from harvest.shapes.muon import Muon
from harvest.shapes.train_vae import encode

BATCH = 64
WARM_UP = 100
DECAY_SHARE = 0.55
MUON_RATE = 5e-3
ADAM_RATE = 2e-3
EMA = 0.998
OBJECT_WEIGHT = 3.0
HEADS_WEIGHT = 0.05
EMPTY_CAPTIONS = 0.05
DROP = 0.06
PAIR_SHARE = 0.15
"""Share of two-object scenes in a batch: one-object scenes are learned much sooner."""
TEXT_LENGTHS = (16, 16, 16, 16, 20, 24, 32, 48, 64)
"""T5 lengths, drawn at random: the pipeline does not mask pads, so the transformer must learn to look past them."""
TEXT_STEPS = 400
"""Steps of the text encoders' own pre-training on the caption's attributes."""

_CLASSES = {
    "background": tuple(draw.BACKGROUNDS),
    "relation": tuple(draw.RELATIONS),
    "size": tuple(draw.SIZES),
    "position": tuple(draw.POSITIONS),
    "shape": draw.SHAPES,
    "colour": tuple(draw.COLOURS),
    "texture": draw.TEXTURES,
}
_PER_OBJECT = ("shape", "colour", "texture")


@dataclasses.dataclass
class Data:
    """Drawn scenes, encoded: packed latents [n, 64, 16], weights [n, 64], token ids, attribute classes,
    number of objects [n]."""

    latents: torch.Tensor
    weights: torch.Tensor
    clip_ids: torch.Tensor
    t5_ids: torch.Tensor
    targets: dict[str, torch.Tensor]
    objects: torch.Tensor

    def __len__(self) -> int:
        """Number of scenes."""
        return len(self.latents)


def make_data(pipe: FluxPipeline, count: int, seed: int) -> Data:
    """Draws and encodes `count` scenes (no held-out pair among them)."""
    rng = np.random.default_rng(seed)
    captions, latents, weights, rows, objects = [], [], [], [], []
    pictures = []
    for index in tqdm(range(count), desc="scenes", unit="picture"):
        scene = draw.sample_scene(rng)
        picture, masks = draw.render(scene, rng)
        pictures.append(picture)
        objects.append(len(scene.things))
        cover = masks.any(0).reshape(8, 8, 8, 8).any((1, 3)).reshape(64)
        weights.append(1.0 + (OBJECT_WEIGHT - 1) * cover)
        text = draw.caption(scene, rng, drop=DROP)
        empty = rng.random() < EMPTY_CAPTIONS
        captions.append("" if empty else text)
        rows.append(_classes(scene, "" if empty else text))
        if len(pictures) == 512 or index + 1 == count:
            batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
            latents.append(pack(encode(pipe.vae, batch)))
            pictures = []
    clip = pipe.tokenizer(captions, padding="max_length", max_length=32, truncation=True)[
        "input_ids"
    ]
    t5 = pipe.tokenizer_2(
        captions, padding="max_length", max_length=max(TEXT_LENGTHS), truncation=True
    )["input_ids"]
    targets = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    weight = torch.from_numpy(np.stack(weights)).float()
    return Data(
        torch.cat(latents),
        weight,
        torch.tensor(clip),
        torch.tensor(t5),
        targets,
        torch.tensor(objects),
    )


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents [n, 4, 16, 16] as the transformer's tokens [n, 64, 16], two by two, as FluxPipeline packs them."""
    n, channels, height, width = latents.shape
    blocks = latents.view(n, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return blocks.reshape(n, height * width // 4, channels * 4)


class Heads(nn.Module):
    """Linear read-outs of the caption's attributes from both text encoders; used in training only."""

    def __init__(self) -> None:
        """One head for each attribute and encoder."""
        super().__init__()
        sizes = {
            name: len(options) for name, options in _CLASSES.items() if name not in _PER_OBJECT
        }
        sizes |= {f"{name}{slot}": len(_CLASSES[name]) for name in _PER_OBJECT for slot in (0, 1)}
        self.clip = nn.ModuleDict({name: nn.Linear(64, size) for name, size in sizes.items()})
        self.t5 = nn.ModuleDict({name: nn.Linear(96, size) for name, size in sizes.items()})

    def loss(
        self, pooled: torch.Tensor, states: torch.Tensor, targets: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Mean cross-entropy over heads; what a caption leaves open does not count."""
        total = pooled.new_zeros(())
        mean = states.mean(1)
        for name in self.clip:
            for head, value in ((self.clip[name], pooled), (self.t5[name], mean)):
                total = total + functional.cross_entropy(
                    head(value), targets[name], ignore_index=-100
                )
        return total / (2 * len(self.clip))


def train_transformer(
    pipe: FluxPipeline,
    data: Data,
    checkpoint: Path,
    *,
    steps: int,
    seed: int = 0,
    every: int = 500,
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
        report: called with (step, pipeline holding the averaged weights) after each checkpoint.
    """
    parts = nn.ModuleDict(
        {"t": pipe.transformer, "clip": pipe.text_encoder, "t5": pipe.text_encoder_2}
    )
    torch.manual_seed(seed)
    heads = Heads()
    muon, adam = _optimizers(parts, heads)
    first = 0
    average = None
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        parts.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        muon.load_state_dict(state["muon"])
        adam.load_state_dict(state["adam"])
        average, first = state["average"], state["step"]
    parts.train()
    if first == 0:
        _train_text(parts, heads, data, seed)
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
            loss, flow = _loss(parts, heads, data, step, seed)
            muon.zero_grad(set_to_none=True)
            adam.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([*parts.parameters(), *heads.parameters()], 1.0)
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
                    "heads": heads.state_dict(),
                    "muon": muon.state_dict(),
                    "adam": adam.state_dict(),
                    "average": average,
                    "step": step + 1,
                }
                partial = checkpoint.with_suffix(".partial")
                torch.save(state, partial)
                partial.replace(checkpoint)
                if report is not None:
                    current = copy.deepcopy(parts.state_dict())
                    parts.load_state_dict(average)
                    parts.eval()
                    report(step + 1, pipe)
                    parts.load_state_dict(current)
                    parts.train()
    parts.load_state_dict(average)
    parts.eval()


def _loss(
    parts: nn.ModuleDict, heads: Heads, data: Data, step: int, seed: int
) -> tuple[torch.Tensor, float]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
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
    out = parts["t"](
        hidden_states=noisy,
        timestep=t,
        pooled_projections=pooled,
        encoder_hidden_states=states,
        img_ids=_image_ids(),
        txt_ids=torch.zeros(length, 3),
        return_dict=False,
    )[0]
    weights = data.weights[rows]
    error = (out - (noise - clean)).square().mean(-1)
    flow = (error * weights).sum() / weights.sum()
    targets = {name: value[rows] for name, value in data.targets.items()}
    return flow + HEADS_WEIGHT * heads.loss(pooled, states, targets), flow.item()


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
    parts: nn.ModuleDict, heads: Heads
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    matrices, rest = [], list(heads.parameters())
    for name, value in parts.named_parameters():
        inside = name.startswith(("t.transformer_blocks", "t.single_transformer_blocks"))
        (matrices if inside and value.ndim == 2 and ".norm" not in name else rest).append(value)
    muon = Muon(matrices, rate=MUON_RATE)
    return muon, torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.99), weight_decay=0.0)


def _schedule(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / (DECAY_SHARE * steps))


def _image_ids() -> torch.Tensor:
    ids = torch.zeros(8, 8, 3)
    ids[..., 1] = torch.arange(8.0)[:, None]
    ids[..., 2] = torch.arange(8.0)[None, :]
    return ids.reshape(64, 3)


def _classes(scene: draw.Scene, text: str) -> dict[str, int]:
    """Class of each attribute that the caption names, -100 for what it leaves open."""
    said = set(text.replace(",", "").split())
    row = dict.fromkeys(("background", "relation", "size", "position"), -100)
    if "background" in said:
        row["background"] = _CLASSES["background"].index(scene.background)
    if scene.relation and text:
        row["relation"] = _CLASSES["relation"].index(scene.relation)
    for slot in (0, 1):
        thing = scene.things[slot] if slot < len(scene.things) and text else None
        for name in _PER_OBJECT:
            value = getattr(thing, name) if thing else None
            row[f"{name}{slot}"] = _CLASSES[name].index(value) if value in said else -100
    if len(scene.things) == 1:
        for name in ("size", "position"):
            value = getattr(scene.things[0], name)
            row[name] = _CLASSES[name].index(value) if value in said else -100
    return row
