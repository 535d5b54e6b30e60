"""Checkpoints: bit for bit, newest kept, written before buffers are reused, damage named."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from jaxdict.runs import state_file
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


LARGE = 5_000_000
"""Numbers of an array that takes several pieces."""


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of 1 MB, so that an array of 20 MB is written and copied by all threads at once."""
    monkeypatch.setattr(state_file, "_PIECE", 1 << 20)


def test_a_large_array_is_written_in_pieces_and_the_next_steps_do_not_change_it(
    tmp_path, small_pieces
):
    first = {"w": jnp.arange(LARGE, dtype=jnp.float32), "v": jnp.arange(LARGE, dtype=jnp.int32)}
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, first, {})
        pointers = {x.unsafe_buffer_pointer() for x in first.values()}
        current = step(first)
        # The views that the writer had of them are gone, else JAX would copy them and use new memory.
        assert {x.unsafe_buffer_pointer() for x in current.values()} == pointers
        checkpoints.wait()
        kept, _ = checkpoints.restore(current)
    for array in kept.values():
        np.testing.assert_array_equal(array, np.arange(LARGE))


def test_at_most_the_said_share_is_copied(tmp_path, small_pieces):
    arrays = {str(i): jnp.zeros(LARGE, jnp.float32) for i in range(3)}
    arrays["host"] = np.zeros(LARGE, np.float32)
    file = state_file.StateFile(tmp_path / "state", arrays, {})
    copied = sum(piece.data.nbytes for piece in file._copied)
    assert copied <= state_file.COPIED * 4 * LARGE * 4
    assert all(
        not np.shares_memory(piece.data, x) for piece in file._copied for x in arrays.values()
    )
    file.finish()


def test_safetensors_opens_a_checkpoint(tmp_path):
    before = state(3)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, before, {"batches": 2})
    (file,) = tmp_path.glob("checkpoints/2/*/*.safetensors")
    found = load_file(file)
    np.testing.assert_array_equal(found["params/encoder"], before.params.encoder)
    np.testing.assert_array_equal(found["optimizer/nu/atoms"], before.optimizer.nu.atoms)
    assert len(found) == len(jax.tree.leaves(before))


def test_a_part_of_the_state_is_read_alone_and_placed_one_by_one(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, state(3), {})
    template = jax.eval_shape(state)._replace(optimizer=None, params=None, since_fired=None)
    place = jax.tree.map(lambda _: jnp.array, template)
    with Checkpoints(tmp_path) as checkpoints:
        part, _ = checkpoints.restore(template, place=place)
    assert part.params is None
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(part))
    np.testing.assert_array_equal(part.ema.atoms, state(3).ema.atoms)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with two checkpoints."""
    run = tmp_path_factory.mktemp("saved")
    with Checkpoints(run) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), {"batches": step})
    return run


def copy_of(run: Path, to: Path) -> tuple[Path, Path]:
    """A copy of the run, and the file of its newest checkpoint."""
    shutil.copytree(run, to)
    return to, next(to.glob("checkpoints/2/*/*.safetensors"))


def refusal(run: Path, **options) -> str:
    with (
        Checkpoints(run, **options) as checkpoints,
        pytest.raises((ValueError, FileNotFoundError)) as error,
    ):
        checkpoints.restore(jax.eval_shape(state))
    line = str(error.value)
    assert "\n" not in line
    return line


def test_every_flipped_bit_is_found_and_the_file_named(saved, tmp_path):
    run, file = copy_of(saved, tmp_path / "run")
    whole = file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for at in [*range(0, start, 97), *range(start, len(whole), 41), len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[at] ^= 4
        file.write_bytes(damaged)
        assert str(file) in refusal(run), f"byte {at}"
    file.write_bytes(whole)
    with Checkpoints(run) as checkpoints:
        assert checkpoints.restore(jax.eval_shape(state))[1] == {"batches": 2}


def test_no_verify_reads_it_all_the_same(saved, tmp_path):
    run, file = copy_of(saved, tmp_path / "run")
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    assert "is damaged" in refusal(run)
    with Checkpoints(run, verify=False) as checkpoints:
        checkpoints.restore(jax.eval_shape(state))


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_a_cut_file_is_named(saved, tmp_path, kept):
    run, file = copy_of(saved, tmp_path / "run")
    file.write_bytes(file.read_bytes()[:kept])
    assert str(file) in refusal(run)
    assert str(file) in refusal(run, verify=False)


def test_a_missing_file_is_named_and_the_checkpoint_before_still_reads(saved, tmp_path):
    run, file = copy_of(saved, tmp_path / "run")
    file.unlink()
    assert f"expected {file.name} in {file.parent}, found none" in refusal(run)
    shutil.rmtree(file.parent)
    assert f"expected {file.parent.name} in {file.parent.parent}, found none" in refusal(run)
    shutil.rmtree(file.parent.parent)
    with Checkpoints(run) as checkpoints:
        assert checkpoints.latest == 1
        checkpoints.restore(jax.eval_shape(state))


def test_a_state_of_another_shape_is_refused(saved):
    other = initial_state(jax.random.key(0), 7, mean=jnp.arange(4.0), step_config=STEP_CONFIG)
    with (
        Checkpoints(saved) as checkpoints,
        pytest.raises(ValueError, match=r"expected params/encoder of float32 \(7, 4\), got .*6, 4"),
    ):
        checkpoints.restore(other)


def test_checkpoints_of_version_1_are_read_and_saved_after(tmp_path):
    before = state(3)
    options = ocp.CheckpointManagerOptions(create=True)
    with ocp.CheckpointManager(tmp_path / "checkpoints", options=options) as manager:
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(jax.tree.map(np.asarray, before)),
            facts=ocp.args.JsonSave({"version": 1, "batches": 7}),
        )
        manager.save(7, args=args)
    part = jax.eval_shape(state)._replace(optimizer=None)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.facts() == {"batches": 7}
        after, _ = checkpoints.restore(jax.eval_shape(state))
        np.testing.assert_array_equal(checkpoints.restore(part)[0].params.atoms, after.params.atoms)
        checkpoints.save(8, after, {"batches": 8})
        checkpoints.wait()
        again, facts = checkpoints.restore(jax.eval_shape(state))
    assert facts == {"batches": 8}
    for one, *others in zip(*map(jax.tree.leaves, (before, after, again)), strict=True):
        assert all(np.asarray(one).tobytes() == np.asarray(other).tobytes() for other in others)
    shutil.rmtree(tmp_path / "checkpoints" / "8")
    shutil.rmtree(tmp_path / "checkpoints" / "7" / "state")
    assert str(tmp_path / "checkpoints" / "7") in refusal(tmp_path)


def test_an_error_behind_is_raised_once_and_not_printed(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.WARNING)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(1), {})
        checkpoints.wait()
        broken = monkeypatch.context()
        with broken as patch:
            patch.setattr("os.fsync", _full)
            checkpoints.save(2, state(2), {})
            with pytest.raises(OSError, match="No space left"):
                checkpoints.wait()
        assert not caplog.records
        assert checkpoints.latest == 1
        checkpoints.restore(jax.eval_shape(state))
    assert not list(tmp_path.glob("checkpoints/2*/**/*.safetensors")), "nothing of it is left"


def _full(_file: int) -> None:
    raise OSError(28, "No space left on device")
