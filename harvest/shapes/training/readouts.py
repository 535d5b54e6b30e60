"""Linear read-outs that help `shapes` to learn; none of them is part of the finished model."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from harvest.shapes.training.data import CLASSES, PER_OBJECT


class Heads(nn.Module):
    """Linear read-outs of the caption's attributes from both text encoders; used in training only."""

    def __init__(self) -> None:
        """One head for each attribute and encoder."""
        super().__init__()
        sizes = {name: len(options) for name, options in CLASSES.items() if name not in PER_OBJECT}
        sizes |= {f"{name}{slot}": len(CLASSES[name]) for name in PER_OBJECT for slot in (0, 1)}
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


class Maps(nn.Module):
    """Linear read-outs, from the image tokens, of where each object lies and of what lies under a token.

    Used in training only. They teach the transformer outlines and binding at high noise, where the velocity alone says
    little about either, and fade before training ends, so that no direction of the finished model is held to them.
    """

    def __init__(self, width: int) -> None:
        """Args: width d of the image stream."""
        super().__init__()
        self.cover = nn.Linear(width, 32)
        self.under = nn.ModuleDict(
            {name: nn.Linear(width, len(CLASSES[name])) for name in PER_OBJECT}
        )

    def loss(self, hidden: torch.Tensor, cover: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of the cover, plus the mean over attributes of what lies under each covered token.

        Args:
            hidden: image tokens [n, 64, d].
            cover: shares [n, 64, 2, 16] in [0, 1].
            kinds: class of each attribute of each object, [n, 2, 3], -1 where there is no second object.
        """
        where = functional.binary_cross_entropy_with_logits(
            self.cover(hidden), cover.flatten(2), reduction="none"
        )
        most, which = cover.mean(-1).max(-1)
        covered = most > 0.25
        kind = kinds[torch.arange(len(kinds))[:, None], which][covered]
        tokens = hidden[covered]
        what = sum(
            functional.cross_entropy(head(tokens), kind[:, index])
            for index, head in enumerate(self.under.values())
        )
        return where.mean() * 4 + what / len(PER_OBJECT)
