"""The scenes that `shapes` is trained on: drawn, encoded, and labelled with what their captions say."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from diffusers import FluxPipeline
from tqdm import tqdm

from harvest.shapes import draw
from harvest.shapes.training.vae import encode

TEXT_LENGTHS = (16, 16, 16, 16, 16, 32, 64)
"""T5 lengths, drawn at random: the pipeline does not mask pads, so the transformer must learn to look past them."""
EMPTY_CAPTIONS = 0.05
DROP = 0.06
CLASSES = {
    "background": tuple(draw.BACKGROUNDS),
    "relation": tuple(draw.RELATIONS),
    "size": tuple(draw.SIZES),
    "position": tuple(draw.POSITIONS),
    "shape": draw.SHAPES,
    "colour": tuple(draw.COLOURS),
    "texture": draw.TEXTURES,
}
PER_OBJECT = ("shape", "colour", "texture")


@dataclasses.dataclass
class Data:
    """Drawn scenes, encoded: packed latents [n, 64, 16], cover, token ids, attribute classes, number of objects [n].

    `cover` is the share of each 2x2 pixels that the first and the second object take, in 255ths, uint8 [n, 64, 2, 16];
    `kinds` the class of each object's shape, colour and texture [n, 2, 3], -1 where there is no second object. `targets`
    are the same and the rest as far as the caption says them.
    """

    latents: torch.Tensor
    cover: torch.Tensor
    clip_ids: torch.Tensor
    t5_ids: torch.Tensor
    kinds: torch.Tensor
    targets: dict[str, torch.Tensor]
    objects: torch.Tensor

    def __len__(self) -> int:
        """Number of scenes."""
        return len(self.latents)


def make_data(pipe: FluxPipeline, count: int, seed: int) -> Data:
    """Draws and encodes `count` scenes (no held-out pair among them)."""
    rng = np.random.default_rng(seed)
    captions, latents, covers, kinds, rows, objects = [], [], [], [], [], []
    pictures = []
    for index in tqdm(range(count), desc="scenes", unit="picture"):
        scene = draw.sample_scene(rng)
        picture, masks = draw.render(scene, rng)
        pictures.append(picture)
        objects.append(len(scene.things))
        covers.append(_cover(masks))
        kinds.append(_kinds(scene))
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
    return Data(
        torch.cat(latents),
        torch.from_numpy(np.stack(covers)),
        torch.tensor(clip),
        torch.tensor(t5),
        torch.tensor(kinds),
        targets,
        torch.tensor(objects),
    )


def _cover(masks: np.ndarray) -> np.ndarray:
    """Share of each 2x2 pixels under each object, by image token: uint8 [64, 2, 16] from bool [objects, 64, 64]."""
    shares = np.zeros((2, 8, 4, 8, 4), np.float32)
    shares[: len(masks)] = masks.reshape(-1, 8, 4, 2, 8, 4, 2).mean((3, 6))
    tokens = shares.transpose(1, 3, 0, 2, 4).reshape(64, 2, 16)
    return np.rint(255 * tokens).astype(np.uint8)


def _kinds(scene: draw.Scene) -> list[list[int]]:
    rows = [
        [CLASSES[name].index(getattr(thing, name)) for name in PER_OBJECT] for thing in scene.things
    ]
    return rows + [[-1] * len(PER_OBJECT)] * (2 - len(rows))


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents [n, 4, 16, 16] as the transformer's tokens [n, 64, 16], two by two, as FluxPipeline packs them."""
    n, channels, height, width = latents.shape
    blocks = latents.view(n, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return blocks.reshape(n, height * width // 4, channels * 4)


def unpack(tokens: torch.Tensor) -> torch.Tensor:
    """The transformer's tokens [n, 64, 16] as latents [n, 4, 16, 16]: what `pack` undone gives."""
    n, count, width = tokens.shape
    side, channels = round(count**0.5), width // 4
    blocks = tokens.view(n, side, side, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return blocks.reshape(n, channels, 2 * side, 2 * side)


def _classes(scene: draw.Scene, text: str) -> dict[str, int]:
    """Class of each attribute that the caption names, -100 for what it leaves open."""
    said = set(text.replace(",", "").split())
    row = dict.fromkeys(("background", "relation", "size", "position"), -100)
    if "background" in said:
        row["background"] = CLASSES["background"].index(scene.background)
    if scene.relation and text:
        row["relation"] = CLASSES["relation"].index(scene.relation)
    for slot in (0, 1):
        thing = scene.things[slot] if slot < len(scene.things) and text else None
        for name in PER_OBJECT:
            value = getattr(thing, name) if thing else None
            row[f"{name}{slot}"] = CLASSES[name].index(value) if value in said else -100
    if len(scene.things) == 1:
        for name in ("size", "position"):
            value = getattr(scene.things[0], name)
            row[name] = CLASSES[name].index(value) if value in said else -100
    return row
