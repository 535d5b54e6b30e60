"""Checkpoints: bit for bit, newest kept, copied before buffers are reused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdict.runs.checkpoint import Checkpoints
from jaxdict.sae.state import initial_state
from jaxdict.sae.step_config import AdamConfig, ScheduleConfig, StepConfig

SCHEDULE, ADAM = ScheduleConfig(10, 1, 0.0), AdamConfig(0.9, 0.99, 1e-8, 1.0)
STEP_CONFIG = StepConfig("topk", 2, 2, 0, "residual", 100, 0.9, SCHEDULE, ADAM)


def state(seed=0):
    return initial_state(jax.random.key(seed), 6, mean=jnp.arange(4.0), step_config=STEP_CONFIG)


def test_whole_state_comes_back_bit_for_bit(tmp_path):
    before = state()._replace(step=jnp.int32(7), since_fired=jnp.arange(6, dtype=jnp.int32))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest is None
        checkpoints.save(7, before, {"batches": 7})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 7
        after, facts = checkpoints.restore(jax.eval_shape(state))
    assert facts == {"batches": 7}
    assert jax.tree.structure(after) == jax.tree.structure(before)
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.asarray(one).dtype == np.asarray(other).dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, state(step), {"batches": step})
        checkpoints.wait()
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"3", "4"}


def test_the_best_is_kept_and_found_by_another_process_too(tmp_path, caplog):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.best is None
        for step, score in ((1, None), (2, 0.5), (3, 0.2), (4, None)):
            checkpoints.save(step, state(step), {}, score=score)
    for step, score in ((5, 0.4), (6, None)):
        with Checkpoints(tmp_path, keep=1) as checkpoints:
            assert checkpoints.best == 3
            checkpoints.save(step, state(step), {}, score=score)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"3", "6"}
    assert not caplog.records, "nothing to warn of"


def test_a_save_is_not_disturbed_by_donating_the_state_right_after(tmp_path):
    first = {"w": jnp.arange(1_000_000, dtype=jnp.float32)}
    step = jax.jit(lambda s: {"w": s["w"] * 0 - 1}, donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, first, {})
        current = first
        for _ in range(20):
            current = step(current)
        jax.block_until_ready(current)
        checkpoints.wait()
        kept, _ = checkpoints.restore(current)
    np.testing.assert_array_equal(kept["w"], np.arange(1_000_000))


def test_missing_checkpoint_says_what_to_do(tmp_path):
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(ValueError, match="found none; train the run first"),
    ):
        checkpoints.restore(state())
