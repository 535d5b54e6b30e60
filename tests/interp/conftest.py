"""A small world with planted features: a real store and real dictionaries of both kinds on a real disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from harvest.store import Store, StoreSpec, create_store, open_store
from interp.config import IndexConfig
from interp.index.arrays import FeatureIndex, load_index
from interp.index.build import build_index
from jaxdict.dictionary.arrays import Dictionary
from jaxdict.dictionary.files import save_dictionary

GRID = (4, 4)
TOKENS, STEPS, D, IMAGES, WORDS = 16, 2, 16, 120, 9
COLOURS = {"red": (220, 40, 40), "green": (45, 160, 70), "blue": (45, 80, 215)}
BACKGROUNDS = {"white": (244, 243, 240), "black": (22, 22, 26)}
POSITIONS = ("left", "right")
M, K = 12, 3
NASTY = '<script>alert("x")</script> & <img src="http://evil.example/x.png">'


@dataclass(frozen=True)
class World:
    """The paths, and what was planted: feature i is the direction of names[i]; later ones are dead."""

    root: Path
    store: Store
    activations: dict[str, np.ndarray]
    names: list[str]
    summary: dict = field(default_factory=dict)

    @property
    def index(self) -> FeatureIndex:
        return load_index(self.root / "index")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("interp")
    rng = np.random.default_rng(0)
    names = [*COLOURS, *BACKGROUNDS, *POSITIONS]
    axis = {name: np.eye(D, dtype=np.float32)[i] for i, name in enumerate(names)}
    prompts, labels, words, pictures = [], [], [], []
    rows = 0.02 * rng.standard_normal((IMAGES, STEPS, TOKENS, D)).astype(np.float32)
    text = 0.02 * rng.standard_normal((IMAGES, STEPS, WORDS, D)).astype(np.float32)
    for image in range(IMAGES):
        colour = list(COLOURS)[rng.integers(3)]
        background = list(BACKGROUNDS)[rng.integers(2)]
        position = POSITIONS[rng.integers(2)]
        prompt = f"a {colour} disc on the {position}, {background} background, no {image}"
        row, column = 1 + rng.integers(2), 0 if position == "left" else 3
        token = int(row * 4 + column)
        for step in range(STEPS):
            rows[image, step] += (1 + step) * axis[background]
            rows[image, step, token] = (2 + step + rng.random()) * axis[colour] + axis[position]
        picture = np.full((32, 32, 3), BACKGROUNDS[background], np.uint8)
        picture[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = COLOURS[colour]
        tokens = prompt.replace(",", "").split()[: WORDS - 1]
        for place, word in enumerate(tokens):
            if word in axis:
                text[image, :, place] += 2 * axis[word]
        known = {"objects": ["1"], "colour": [colour], "background": [background]}
        prompts.append(prompt)
        labels.append(known | {"position": [position]})
        words.append((tokens + ["<pad>"] * WORDS)[:WORDS])
        pictures.append(picture)
    prompts[0] = prompts[1] = NASTY
    labels[0], labels[1] = {}, {**labels[1], "objects": ["2"], "colour": ["red", "blue"]}
    words[0] = (NASTY.split() + ["<pad>"] * WORDS)[:WORDS]
    rows[:2] += 0.5 * axis["red"]
    split = [int(image % 10 != 9) for image in range(IMAGES)]
    spec = StoreSpec(
        sites={"double.0.img": (TOKENS, D), "double.0.txt": (WORDS, D)},
        images=IMAGES,
        steps=STEPS,
        prompts=prompts,
        seeds=list(range(1000, 1000 + IMAGES)),
        split=split,
        labels=labels,
        sigmas=[1.0, 0.5],
        timesteps=[1000.0, 500.0],
        grid=GRID,
        words=words,
        picture=(32, 32),
        attrs={"model": {"name": "planted"}},
        images_per_shard=32,
    )
    writer = create_store(root / "store", spec)
    activations = {"double.0.img": rows, "double.0.txt": text}
    for shard in writer.pending():
        part = writer.images_of(shard)
        writer.write(
            shard, {site: x[part] for site, x in activations.items()}, np.stack(pictures[part])
        )
    store = open_store(root / "store")
    activations = {site: store.read(site) for site in activations}
    card = {"model": "planted", "store_fingerprint": store.fingerprint}
    atoms = np.zeros((M, D), np.float32)
    atoms[np.arange(M), np.arange(M)] = 1
    bias = np.full(M, -0.2, np.float32)
    bias[len(names) :] = -50  # dead
    for stream in ("img", "txt"):
        dictionary = Dictionary(
            kind="topk",
            k=K,
            atoms=atoms,
            bias=np.zeros(D, np.float32),
            encoder=atoms.copy(),
            encoder_bias=bias,
            typical=np.ones(M, np.float32),
            card=card | {"site": f"double.0.{stream}", "stream": stream},
        )
        save_dictionary(dictionary, root / f"sae_{stream}")
    source = np.stack([np.arange(8), np.arange(8) % STEPS, np.arange(8) + 3], 1).astype(np.int32)
    patches = activations["double.0.img"][tuple(source.T)]
    itda = Dictionary(
        kind="itda",
        k=K,
        atoms=patches / np.linalg.norm(patches, axis=1, keepdims=True),
        typical=np.ones(8, np.float32),
        source=source,
        card=card | {"site": "double.0.img", "stream": "img"},
    )
    save_dictionary(itda, root / "itda")
    summary = build_index(
        IndexConfig(dictionary=root / "sae_img", store=root / "store", out=root / "index")
    )
    return World(root, store, activations, names, summary)
