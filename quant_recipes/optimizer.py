"""The optimizers of the recipes, and the learning rate and weight decay of each parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lobit.quant_recipes.schedule import Training

BETAS = (0.9, 0.95)
"""Decay rates of the two moments [Spectra section A.3]."""


class CautiousAdamW(torch.optim.Optimizer):
    """AdamW that updates only entries whose update and gradient have the same sign, and scales them up for those left out.

    Source: Liang et al. 2025 (arXiv:2411.16085), Algorithm 1; Bonsai section 2.1.
    """

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float] = BETAS, eps: float = 1e-8) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        state["step"] += 1
        (first, second), step = group["betas"], float(state["step"])
        mean = state["exp_avg"].lerp_(gradient, 1 - first)
        square = state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        update = mean / ((square / (1 - second**step)).sqrt_().add_(group["eps"]))
        agrees = (mean * gradient > 0).to(update.dtype)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(update * agrees / agrees.mean().clamp(min=1e-3) * (group["lr"] / (1 - first**step)))


def optimizer_for(named: Iterable[tuple[str, nn.Parameter]], training: Training) -> torch.optim.Optimizer:
    """The optimizer of the parameters that want a gradient; each group has a factor on the rate (`scale`) and whether it `decays`."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            learned = ".quantizer." in name
            share = (training.range_rate if learned else 1.0, parameter.ndim == 2 and not learned)
            groups.setdefault(share, []).append(parameter)
    settings = [{"params": members, "scale": scale, "decays": decays} for (scale, decays), members in groups.items()]
    if training.optimizer == "cautious":
        return CautiousAdamW(settings, lr=training.learning_rate)
    return torch.optim.AdamW(settings, lr=training.learning_rate, betas=BETAS, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, training: Training, done: float) -> None:
    """Sets rate and decay of every group after the share `done` of the steps."""
    for group in optimizer.param_groups:
        group["lr"] = training.rate(done) * group["scale"]
        group["weight_decay"] = training.decay(done) if group["decays"] else 0.0
