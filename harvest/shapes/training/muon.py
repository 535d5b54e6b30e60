"""The optimizer Muon in float32, for matrices and convolution kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix updates are orthogonalised (Jordan et al. 2024), scaled to the RMS of AdamW's updates.

    The same update as `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` with Nesterov momentum, but the Newton-Schulz
    steps run in float32: torch's run in bfloat16, which CPUs without that type emulate at a fortieth of the speed. A
    convolution's kernel counts as the matrix [out, in * height * width].
    """

    def __init__(
        self, matrices: list[torch.Tensor], *, rate: float, momentum: float = 0.95
    ) -> None:
        """Args: matrices of two or more dimensions, learning rate, decay of the momentum."""
        super().__init__(matrices, {"lr": rate, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One update; `closure` is not used."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum"] = torch.zeros_like(matrix)
                state["momentum"].lerp_(matrix.grad, 1 - group["momentum"])
                update = matrix.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                scale = 0.2 * max(update.shape) ** 0.5
                update = orthogonalise(update).view_as(matrix)
                matrix.add_(update, alpha=-group["lr"] * scale)


def orthogonalise(matrix: torch.Tensor, *, iterations: int = 5) -> torch.Tensor:
    """An approximation of U V^T of the singular value decomposition, by the quintic Newton-Schulz iteration.

    Args:
        matrix: float32 [rows, columns].
        iterations: five bring every singular value into about [0.7, 1.2].
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x
