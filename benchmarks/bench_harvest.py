"""What does harvesting cost beside the bare pipeline?

python benchmarks/bench_harvest.py [--quick] [--flux]

The embedded model makes the same pictures from the same prompts and seeds in the same batches, with one residual site
harvested at every step, with every site harvested, and bare. With --flux (a GPU is needed): a transformer of FLUX.1's true size with
random weights, bfloat16 and NF4, at 256x256 and 512x512: images and rows a second, overhead and peak memory.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import answer, interleaved, timings

from harvest.capture import Capture
from harvest.config import HarvestConfig
from harvest.models import load_model
from harvest.plan import Plan, make_plan
from harvest.run import fill
from harvest.store import create_store, open_store

ONE, EVERY = {"one site": ("double.2.img",)}, {"every site": ("*.*.*",)}
SHAPES = ((512, 4, ONE, 9), (128, 4, EVERY, 3))
"""Images, steps, sites, rounds. A shard holds 128 images; only the last one's writing is waited for."""
QUICK = ((32, 2, ONE | EVERY, 1),)
FLUX = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
}
"""Settings of FLUX.1-schnell's transformer, from its public card."""


def measure(
    images: int, steps: int, sites: dict[str, tuple[str, ...]], rounds: int
) -> dict[str, Any]:
    """Overhead of a harvest on the embedded model, after a check that the pictures are the same."""
    folder = Path(tempfile.mkdtemp(prefix="bench-harvest-"))
    try:
        return _measure(images, steps, sites, folder, rounds)
    finally:
        shutil.rmtree(folder)


def _measure(
    images: int, steps: int, places: dict[str, tuple[str, ...]], folder: Path, rounds: int
) -> dict[str, Any]:
    model = load_model("shapes", device="cpu")
    runs, stores = {}, {}
    for name, sites in places.items():
        asked = HarvestConfig(out=folder / name, sites=sites, images=images, steps=steps)
        plan = make_plan(asked, model)
        stores[name] = plan.config

        def run(plan: Plan = plan) -> None:
            shutil.rmtree(plan.config.out, ignore_errors=True)
            writer = create_store(plan.config.out, plan.spec)
            with contextlib.redirect_stderr(io.StringIO()):
                fill(writer, plan, model, shards=writer.pending())

        runs[name] = run
    plan = make_plan(next(iter(stores.values())), model)
    config, spec = plan.config, plan.spec

    def bare() -> np.ndarray:
        """The pipeline alone, in the same batches."""
        return np.concatenate(
            [
                model.generate(
                    spec.prompts[first : first + config.batch],
                    spec.seeds[first : first + config.batch],
                    steps=steps,
                    size=(config.height, config.width),
                )
                for first in range(0, images, config.batch)
            ]
        )

    pictures = bare()
    for name, run in runs.items():
        run()
        assert (open_store(stores[name].out).pictures() == pictures).all()
    taken = timings({"bare": bare, **runs}, rounds)
    seconds = {name: statistics.median(found) for name, found in taken.items()}
    rows = {name: sum(open_store(c.out).shape(s)[2] for s in c.sites) for name, c in stores.items()}
    return {
        "images": images,
        "steps": steps,
        "batch": config.batch,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "images/s": {name: images / value for name, value in seconds.items()},
        "rows/s": {name: images * steps * n / seconds[name] for name, n in rows.items()},
        "overhead": {
            name: {
                "of medians": seconds[name] / seconds["bare"] - 1,
                "of the fastest": min(taken[name]) / min(taken["bare"]) - 1,
                "by round": [
                    round(mine / bare - 1, 4)
                    for mine, bare in zip(taken[name], taken["bare"], strict=True)
                ],
            }
            for name in rows
        },
    }


def measure_flux(
    quantize: str, side: int, *, batch: int = 4, steps: int = 4, rounds: int = 3
) -> dict[str, Any]:
    """Speed of one residual site on a transformer of FLUX.1's size; random weights, made-up text."""
    from diffusers import FluxTransformer2DModel

    from harvest.models import KEPT_WHOLE, to_nf4

    torch.manual_seed(0)
    torch.cuda.reset_peak_memory_stats()
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        transformer = FluxTransformer2DModel(**FLUX).eval().requires_grad_(False)
        torch.set_default_dtype(torch.float32)
    if quantize == "nf4":
        to_nf4(transformer, KEPT_WHOLE["transformer"], torch.bfloat16, place="cuda")
    tokens, length = (side // 16) ** 2, 256
    grid = torch.stack(torch.meshgrid(*[torch.arange(side // 16.0)] * 2, indexing="ij"), -1)
    image_ids = torch.nn.functional.pad(grid.reshape(tokens, 2), (1, 0)).cuda()
    inputs = {
        "hidden_states": torch.randn(batch, tokens, 64, device="cuda", dtype=torch.bfloat16),
        "encoder_hidden_states": torch.randn(
            batch, length, 4096, device="cuda", dtype=torch.bfloat16
        ),
        "pooled_projections": torch.randn(batch, 768, device="cuda", dtype=torch.bfloat16),
        "timestep": torch.full((batch,), 0.5, device="cuda", dtype=torch.bfloat16),
        "img_ids": image_ids,
        "txt_ids": torch.zeros(length, 3, device="cuda"),
        "return_dict": False,
    }

    @torch.no_grad()
    def bare() -> None:
        for _ in range(steps):
            transformer(**inputs)
        torch.cuda.synchronize()

    bits = np.empty((batch, steps, tokens, 3072), np.uint16)

    @torch.no_grad()
    def harvested() -> None:
        with Capture(transformer, ["double.18.img"], steps=steps) as capture:
            for _ in range(steps):
                transformer(**inputs)
            taken = capture.take()["double.18.img"]
        bits[:] = taken.view(torch.int16).numpy().view(np.uint16)

    seen = {}
    handle = transformer.transformer_blocks[18].register_forward_hook(
        lambda _module, _inputs, output: seen.update(image=output[1])
    )
    harvested()
    handle.remove()
    real = seen["image"].to(torch.bfloat16).cpu().view(torch.int16).numpy().view(np.uint16)
    assert (bits[:, -1] == real).all()
    seconds = interleaved({"bare": bare, "harvested": harvested}, rounds=rounds)
    return {
        "device": torch.cuda.get_device_name(),
        "quantize": quantize,
        "side": side,
        "batch": batch,
        "steps": steps,
        "seconds": seconds,
        "images/s": batch / seconds["harvested"],
        "rows/s": batch * steps * tokens / seconds["harvested"],
        "overhead": seconds["harvested"] / seconds["bare"] - 1,
        "peak gigabytes": torch.cuda.max_memory_allocated() / 1e9,
    }


if __name__ == "__main__":
    if "--flux" in sys.argv:
        cases = (("none", 256), ("none", 512), ("nf4", 256), ("nf4", 512))
        answer("harvest_flux", measure_flux, cases, quick=cases[:1])
    else:
        answer("harvest", measure, SHAPES, quick=QUICK)
