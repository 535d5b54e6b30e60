"""Measures the embedded model: how many pictures show what their prompts say, as `check` reads them back.

python -m harvest.shapes.quality --prompts 500 --steps 8
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline
from tqdm import tqdm

from harvest.atomic import write_json
from harvest.shapes import check, draw

HELD_OUT_SEED = 990_001
"""Seed of the prompts and of the noise; training draws from other seeds."""


def generate(
    pipe: FluxPipeline,
    prompts: list[str],
    seed: int,
    *,
    steps: int = 8,
    length: int = 32,
    batch: int = 25,
) -> np.ndarray:
    """Pictures of the prompts, uint8 [n, 64, 64, 3]; the noise of picture i is drawn from (seed, i)."""
    parts = []
    pipe.set_progress_bar_config(disable=True)
    for first in range(0, len(prompts), batch):
        chosen = prompts[first : first + batch]
        noise = [
            torch.Generator().manual_seed(
                int(np.random.SeedSequence([seed, first + i]).generate_state(1)[0])
            )
            for i in range(len(chosen))
        ]
        out = pipe(
            prompt=chosen,
            height=draw.SIDE,
            width=draw.SIDE,
            num_inference_steps=steps,
            guidance_scale=0.0,
            max_sequence_length=length,
            generator=noise,
            output_type="np",
        ).images  # pyright: ignore[reportAttributeAccessIssue]
        parts.append(np.clip(np.rint(np.asarray(out) * 255), 0, 255).astype(np.uint8))
    return np.concatenate(parts)


def measure(
    pipe: FluxPipeline,
    *,
    objects: int,
    prompts: int,
    steps: int = 8,
    length: int = 32,
    held_out: str = "exclude",
    seed: int = HELD_OUT_SEED,
) -> dict[str, float]:
    """Share of pictures with each attribute right (see `check.matches`), on prompts drawn from `seed`."""
    rng = np.random.default_rng(seed + objects)
    scenes = [draw.sample_scene(rng, objects=objects, held_out=held_out) for _ in range(prompts)]
    pictures = generate(
        pipe, [draw.caption(scene) for scene in scenes], seed, steps=steps, length=length
    )
    right: Counter[str] = Counter()
    for scene, picture in zip(scenes, pictures, strict=True):
        right.update(
            {
                name: int(ok)
                for name, ok in check.matches(check.read_picture(picture), scene).items()
            }
        )
    return {name: count / prompts for name, count in right.items()}


def measure_checker(prompts: int, *, objects: int, seed: int = HELD_OUT_SEED) -> dict[str, float]:
    """Share of *drawn* pictures that `check` reads back rightly: the ceiling of `measure`."""
    rng = np.random.default_rng(seed + objects)
    right: Counter[str] = Counter()
    for _ in range(prompts):
        scene = draw.sample_scene(rng, objects=objects, held_out="include")
        reading = check.read_picture(draw.render(scene, rng)[0])
        right.update({name: int(ok) for name, ok in check.matches(reading, scene).items()})
    return {name: count / prompts for name, count in right.items()}


def full_report(
    pipe: FluxPipeline, *, prompts: int = 500, steps: int = 8
) -> dict[str, dict[str, float]]:
    """Everything the model is held to: one and two objects, held-out pairs, other step counts and text lengths."""
    cases = {
        "one object": {"objects": 1, "prompts": prompts, "steps": steps},
        "two objects": {"objects": 2, "prompts": prompts, "steps": steps},
        "held-out pairs": {
            "objects": 1,
            "prompts": max(1, prompts // 2),
            "steps": steps,
            "held_out": "only",
        },
    }
    few = max(1, prompts // 5)
    cases |= {
        f"one object, {n} steps": {"objects": 1, "prompts": few, "steps": n} for n in (1, 4, 20)
    }
    cases |= {
        f"one object, {n} text tokens": {"objects": 1, "prompts": few, "steps": steps, "length": n}
        for n in (16, 64, 128, 256, 512)
    }
    report = {"checker, one object": measure_checker(prompts, objects=1)}
    report["checker, two objects"] = measure_checker(prompts, objects=2)
    for name, options in tqdm(cases.items(), desc="quality", unit="case"):
        report[name] = measure(pipe, **options)
    return report


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, default=Path(__file__).parent / "weights")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=None, help="also write the numbers as JSON")
    arguments = parser.parse_args()
    pipe = FluxPipeline.from_pretrained(
        arguments.weights, torch_dtype=torch.float32, local_files_only=True
    )
    report = full_report(pipe, prompts=arguments.prompts, steps=arguments.steps)
    for case, shares in report.items():
        print(f"{case:28s}", "  ".join(f"{name} {share:.3f}" for name, share in shares.items()))
    if arguments.out:
        write_json(arguments.out, report)
        print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
