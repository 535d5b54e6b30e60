"""Trains the embedded model from nothing: autoencoder, text encoders and transformer, then the decoder once more.

    python -m harvest.shapes.training.train --out harvest/shapes/weights

A run cut short goes on from `--state`. The shipped weights took 112 minutes with `--threads 2 --fuse`, on two AVX2 cores that
other work took a part of: autoencoder 18, scenes 2, text 1, transformer 72, decoder 19. What it reached (shares of 500
held-out prompts, 8 steps): one object's background 1.00, colour 1.00, shape 0.97, texture 0.99, size 1.00, position 1.00;
two objects right in everything 0.88. `docs/shapes.md` has the whole table, and what each stage brought.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import FluxPipeline

from harvest.shapes import quality
from harvest.shapes.training import build
from harvest.shapes.training.data import Data, make_data
from harvest.shapes.training.redraw import redraw
from harvest.shapes.training.transformer import train_transformer
from harvest.shapes.training.vae import polish_decoder, train_vae

SCENES = 32_000
STEPS = 4_500
REDRAWN = 8_192


def train(
    out: Path,
    state: Path,
    *,
    seed: int = 0,
    steps: int = STEPS,
    scenes: int = SCENES,
    every: int = 500,
    fuse: bool = False,
) -> None:
    """Runs all stages and writes the pipeline to `out` (bfloat16) after each checkpoint.

    Args:
        out: folder of the pipeline.
        state: folder of the training state; what it holds is not done again.
        seed: fixes weights, scenes, order and noise.
        steps: optimizer steps of the transformer.
        scenes: drawn scenes in the training set.
        every: steps between checkpoints.
        fuse: compile the transformer's training step.
    """
    state.mkdir(parents=True, exist_ok=True)
    pipe = build.new_pipeline(seed)
    fidelity = train_vae(pipe.vae, state / "vae.pt", seed=seed)
    print(f"autoencoder: PSNR {fidelity:.2f} dB")
    if (state / "data.pt").exists():
        data = Data(**torch.load(state / "data.pt", weights_only=True))
    else:
        data = make_data(pipe, scenes, seed + 10)
        torch.save(vars(data), state / "data.pt")

    def report(step: int, current: FluxPipeline) -> None:
        build.save_pipeline(current, out)
        for objects in (1, 2):
            shares = quality.measure(current, objects=objects, prompts=50, seed=123)
            line = {"step": step, "objects": objects} | {
                name: round(share, 3) for name, share in shares.items()
            }
            print("\n" + json.dumps(line), flush=True)

    train_transformer(
        pipe,
        data,
        state / "transformer.pt",
        steps=steps,
        seed=seed,
        every=every,
        fuse=fuse,
        report=report,
    )
    latents, targets = redraw(pipe, REDRAWN, seed + 20)
    fidelity = polish_decoder(pipe.vae, latents, targets, state / "decoder.pt", seed=seed)
    print(f"polished decoder: PSNR {fidelity:.2f} dB")
    build.save_pipeline(pipe, out)
    print(f"wrote {out}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--state", type=Path, default=Path("runs/shapes-training"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--scenes", type=int, default=SCENES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads", type=int, default=1, help="results repeat bit for bit at the same number"
    )
    parser.add_argument(
        "--fuse",
        action="store_true",
        help="compile the transformer: a quarter less time a step, needs a C++ compiler",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    train(
        arguments.out,
        arguments.state,
        seed=arguments.seed,
        steps=arguments.steps,
        scenes=arguments.scenes,
        fuse=arguments.fuse,
    )


if __name__ == "__main__":
    main()
