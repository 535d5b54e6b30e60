"""One group of members while it trains: its state, its compiled step, its weights when they are measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdict.devices import mesh
from jaxdict.rows import Loader
from jaxdict.sae import (
    Batch,
    Hyperparams,
    Metrics,
    TrainState,
    dead_features,
    make_train_step,
    sharding,
)
from jaxdict.training import sweep
from jaxdict.training.batches import Normalizations
from jaxdict.training.initialize import random_state
from jaxdict.training.start import first_state
from jaxdict.training.sweep import Group, Member


class GroupTrainer:
    """Trains the members of a group with one compiled step.

    Attributes:
        group: the members.
        state: of one member, or of all of them stacked on a first axis; there is none before `start`, unless it is set.
    """

    state: TrainState

    def __init__(
        self, group: Group, normalizations: Normalizations, *, devices: Mesh | None
    ) -> None:
        """Make the step.

        Args:
            group: the members.
            normalizations: of their rows.
            devices: where to train, None for one device.
        """
        self.group, self._normalizations, self._devices = group, normalizations, devices
        self._train_step = make_train_step(group.step_config, members=group.stacked, mesh=devices)
        self._hyperparams = self._stacked_hyperparams(normalizations.out.variance)

    def start(self, loaders: Mapping[str, Loader]) -> None:
        """Make the first state; `loaders` give first training rows, by site."""
        group = self.group
        states = [first_state(member, self._normalizations, loaders) for member in group.members]
        state = states[0]
        if group.stacked:
            state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        self.state = sharding.place_state(state, self._devices, members=group.stacked)

    @property
    def template(self) -> TrainState:
        """Shapes and dtypes of its state, without arrays."""
        one = jax.eval_shape(lambda: random_state(self.group.members[0], self._normalizations))
        if not self.group.stacked:
            return one
        lead = (self.group.stacked,)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(lead + leaf.shape, leaf.dtype), one)

    @property
    def placing(self) -> Any:
        """For each array of its state, what moves it from NumPy to the devices."""
        return sharding.placing(self.template, self._devices, members=self.group.stacked)

    def _stacked_hyperparams(self, variance: float) -> Hyperparams:
        every = [sweep.hyperparams_of(member, variance) for member in self.group.members]

        def scalars(*values: float) -> jax.Array:
            return jnp.asarray(values if self.group.stacked else values[0], jnp.float32)

        return mesh.everywhere(jax.tree.map(scalars, *every), self._devices)

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps that its state has taken."""
        return int(np.asarray(self.state.step).reshape(-1)[0])

    def step(self, batch: Batch, step: int) -> Metrics:
        """Take optimizer step number `step`, and resample dead features if it is time to.

        Returns:
            The numbers of the step, of each member; they are still on the device.
        """
        self.state, numbers = self._train_step(self.state, batch, self._hyperparams)
        if self.resampling_at(step) and step < self.group.step_config.schedule.steps:
            self.resample(batch, step)
        return numbers

    def resampling_at(self, step: int) -> bool:
        """Whether dead features are due to be resampled after optimizer step `step`."""
        every = self.group.config.dead_features.resample
        return bool(every) and step % every == 0

    def resample(self, batch: Batch, step: int) -> None:
        """Set dead features on rows of the batch of optimizer step `step`."""
        self.state = dead_features.resample(
            self.state,
            batch,
            self.group.step_config,
            seeds=[member.config.seed for member in self.group.members],
            step=step,
            devices=self._devices,
        )

    def members(self, state: TrainState) -> Iterator[tuple[Member, TrainState]]:
        """Each member with its own state, out of one of the group."""
        for place, member in enumerate(self.group.members):
            if self.group.stacked:
                yield member, jax.tree.map(lambda leaf, at=place: leaf[at], state)
            else:
                yield member, state
