"""Muon: gradient descent with an orthogonalised momentum, for hidden matrices (Jordan et al., 2024)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
WEIGHT_DECAY = 0.05
STEP_SCALE = 0.5  # of an orthogonal matrix that the learning rate multiplies


def orthogonalize(matrices: Tensor) -> Tensor:
    """About the nearest semi-orthogonal matrix to each of `matrices` [..., rows, columns], in bf16.

    Five Newton-Schulz steps: a quintic polynomial of the singular values that moves them all near 1.
    """
    x: Tensor = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        squares = x @ x.mT
        x = 3.4445 * x + (-4.7750 * squares + 2.0315 * squares @ squares) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For parameters of at least two dimensions, of which all but the last two are batch: stacked experts."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr = group["lr"]
            for parameter in group["params"]:
                gradient = parameter.grad
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].mul_(MOMENTUM).add_(gradient)
                direction = orthogonalize(gradient.add(momentum, alpha=MOMENTUM)).to(parameter.dtype)
                rows, columns = parameter.shape[-2:]
                scale = STEP_SCALE * max(1.0, rows / columns) ** 0.5
                parameter.mul_(1 - lr * WEIGHT_DECAY).add_(direction, alpha=-lr * scale)
