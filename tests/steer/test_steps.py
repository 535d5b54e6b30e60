"""Which denoising step a call of the transformer is: from its own timestep, counted from the first that is run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from PIL import Image

from steer.call_state import CallState
from steer.coder import Coder
from steer.edits import Edit
from steer.hooks import intervening, steering
from steer.splice import splicing

SITE, TEXT, GRID = "double.1.img", 5, (4, 6)


@pytest.fixture
def coder(random_dictionary):
    return Coder(random_dictionary("topk"))


@pytest.fixture
def seen():
    """Steps that `reading` read."""
    return []


@pytest.fixture
def reading(pipe, seen):
    """Function: a context in which the step of every call of the transformer goes into `seen`."""

    def read(rows, state):
        seen.append(state.step)

    return lambda chosen=pipe: intervening(chosen, {SITE: read})


def call_by_hand(pipe, timesteps):
    """A loop over the transformer as people write it, without the pipeline."""
    places = pipe._prepare_latent_image_ids(1, *GRID, "cpu", torch.float32)
    with torch.no_grad():
        for timestep in timesteps:
            pipe.transformer(
                hidden_states=torch.zeros(1, GRID[0] * GRID[1], 16),
                timestep=timestep[None] / 1000,
                encoder_hidden_states=torch.zeros(1, TEXT, 24),
                pooled_projections=torch.zeros(1, 8),
                txt_ids=torch.zeros(TEXT, 3),
                img_ids=places,
            )


def test_a_loop_after_an_interrupted_picture_reads_its_own_steps(pipe, draw, reading, seen):
    def stop(pipeline, step, timestep, kwargs):
        if step == 2:
            raise KeyboardInterrupt
        return kwargs

    with pytest.raises(KeyboardInterrupt):
        draw(steps=4, callback_on_step_end=stop)
    assert pipe.current_timestep is not None
    for count in (4, 7):
        pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / count, count))
        with reading():
            call_by_hand(pipe, pipe.scheduler.timesteps)
    assert seen == [*range(4), *range(7)]


def steps_told(pipe, dtype):
    """The step of a call at each timestep of the scheduler, made as pipelines make it."""
    state = CallState(pipe, [])
    for timestep in pipe.scheduler.timesteps:
        pipe._current_timestep = timestep
        state.read(pipe.transformer, (), {"timestep": timestep[None].to(dtype) / 1000})
        yield state.step
    pipe._current_timestep = None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_steps_in_every_precision_on_a_shifted_schedule(pipe, dtype):
    """Where noise levels lie close together, each still has its own number."""
    shift, line = np.exp(1.15), np.linspace(1, 1 / 50, 50)
    pipe.scheduler.set_timesteps(sigmas=shift / (shift + 1 / line - 1))
    assert list(steps_told(pipe, dtype)) == list(range(50))


def test_the_pipeline_tells_steps_of_one_rounded_timestep_apart(pipe):
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 400, 400))
    assert len(pipe.scheduler.timesteps.to(torch.bfloat16).unique()) < 400
    assert list(steps_told(pipe, torch.bfloat16)) == list(range(400))


@pytest.fixture
def redraw(pipe):
    """Image to image with the same parts: function of the strength, gives latents."""
    made = FluxImg2ImgPipeline(**pipe.components)
    made.set_progress_bar_config(disable=True)

    def run(strength, steps=6):
        generator = torch.Generator().manual_seed(0)
        return made(
            image=Image.new("RGB", (GRID[1] * 4, GRID[0] * 4), "gray"),
            prompt_embeds=torch.ones(1, TEXT, 24),
            pooled_prompt_embeds=torch.ones(1, 8),
            height=GRID[0] * 4,
            width=GRID[1] * 4,
            strength=strength,
            num_inference_steps=steps,
            generator=generator,
            output_type="latent",
        ).images

    run.pipe = made
    return run


def test_image_to_image_counts_from_the_first_step_that_is_run(redraw, draw, coder, reading, seen):
    with reading(redraw.pipe):
        redraw(0.5)
        redraw(1.0)
    with reading():
        draw(steps=4)
    assert seen == [*range(3), *range(6), *range(4)]
    plain = redraw(0.5)
    with steering(redraw.pipe, coder, Edit(3, value=5.0, steps=(0, 1))):
        assert not torch.equal(redraw(0.5), plain)


def test_steps_that_never_come_are_warned_of(pipe, draw, redraw, coder):
    never = r"the edit of feature 3 acted in no step: expected some of steps 4:8, but .* 0 to 3"
    with pytest.warns(UserWarning, match=never), steering(pipe, coder, Edit(3, steps=(4, 8))):
        draw(steps=4)
    with (
        pytest.warns(UserWarning, match="splicing acted in no step"),
        splicing(pipe, coder, steps=(4, 2**31)),
    ):
        draw(steps=4)
    with (
        pytest.warns(UserWarning, match="0 to 2"),
        steering(redraw.pipe, coder, Edit(3, steps=(3, 8))),
    ):
        redraw(0.5)
    # Of two edits the one is named; of two calls the one in which it did not act.
    edits = [Edit(3, steps=(0, 2)), Edit(5, steps=(5, 6))]
    for counts in ((7, 4), (4, 7)):
        with pytest.warns(UserWarning) as told, steering(pipe, coder, edits):
            for steps in counts:
                draw(steps=steps)
        (one,) = told
        assert "feature 5" in str(one.message) and "steps 0 to 3" in str(one.message)
        assert one.filename == __file__ or counts == (4, 7)


def test_steps_that_come_are_not_warned_of(pipe, draw, coder, recwarn):
    with steering(pipe, coder, [Edit(3, steps=(3, 9)), Edit(5, steps=(0, 1)), Edit(7)]):
        for steps in (4, 7):
            draw(steps=steps)
    with splicing(pipe, coder, steps=(1, 2)):
        draw(steps=2)
    with pytest.raises(KeyboardInterrupt), steering(pipe, coder, Edit(3, steps=(3, 4))):
        draw(steps=2)
        raise KeyboardInterrupt
    assert not [one for one in recwarn if issubclass(one.category, UserWarning)]
