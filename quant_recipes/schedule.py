"""How a recipe trains: plain values, and the learning rate and weight decay of every step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from lobit.quant_recipes.recipe import Recipe


@dataclass(frozen=True)
class Training:
    """How to train, whatever the model and the text."""

    learning_rate: float = 2e-4
    """The learning rate at its peak."""
    schedule: Literal["cosine", "two_stage"] = "cosine"
    """`two_stage`: linear decay whose peak drops at half of the steps, and no weight decay from two thirds on [Spectra section 3.3]."""
    warm_up: float = 0.05
    """Share of the steps in which the rate rises linearly."""
    second_peak: float = 0.625
    """The peak of `two_stage` after half of the steps, as a share of the first [Spectra Table 3: 2.4e-3 to 1.5e-3]."""
    weight_decay: float = 0.0
    """The weight decay of matrices; norms, ranges and magnitudes never decay."""
    optimizer: Literal["adamw", "cautious"] = "adamw"
    """`cautious`: AdamW that leaves out the entries whose update points against the gradient [Liang et al. 2025, arXiv:2411.16085]."""
    clip: float = 1.0
    """The norm to which larger gradients are clipped."""
    range_rate: float = 1.0
    """Learning rate of learned ranges and magnitudes, as a multiple of that of the weights."""
    distillation: float = 0.0
    """Share of the loss that is KL(float model || trained model); the rest is cross entropy [MobileLLM-Pro Table 16]."""
    tuning_samples: int = 0
    """Sequences of a second stage that trains scales and norms alone [Bonsai section 2.2]; 0: there is none."""
    tuning_epochs: int = 10
    """Times that the second stage sees each of its sequences."""

    def rate(self, done: float) -> float:
        """The learning rate after the share `done` of the steps."""
        if done < self.warm_up:
            return self.learning_rate * done / self.warm_up
        if self.schedule == "two_stage":
            return self.learning_rate * (1 - done) * (self.second_peak if done >= 0.5 else 1)
        return self.learning_rate * (1 + math.cos(math.pi * (done - self.warm_up) / (1 - self.warm_up))) / 2

    def decay(self, done: float) -> float:
        """The weight decay after the share `done` of the steps."""
        return 0.0 if self.schedule == "two_stage" and done >= 2 / 3 else self.weight_decay


FINE_TUNING = Training(distillation=1.0)
"""Training that starts from a float model, which is also the teacher."""
RECIPES = {
    "8da8w": replace(FINE_TUNING, learning_rate=1e-5),
    **dict.fromkeys(("fp", "fp16"), Training(learning_rate=1e-3, weight_decay=0.1)),
    "bitnet": Training(learning_rate=2.4e-3, schedule="two_stage", weight_decay=0.1),
    "trilm": Training(learning_rate=2.4e-3, schedule="two_stage", weight_decay=0.1),
    "bilm": Training(learning_rate=2.4e-3, schedule="two_stage", weight_decay=0.1),
    "bonsai": Training(learning_rate=1e-2, weight_decay=0.1, optimizer="cautious", tuning_samples=128),
}
"""The recipes that do not train as `FINE_TUNING` [Spectra Table 3, smallest model; Bonsai sections 2.1 and 2.2]. INT8 is so near to the
float model that a larger rate leads away from it."""


BEGUN = 2.0
"""A factor on the rate where training begins at integers that calibration found. Each weight is then at least a quarter of a step from
rounding to another integer (`quantizers.INSIDE`): 240 steps on SmolLM2 at half the usual rate, 1e-4, changed not one integer in a
thousand (`README.md`, Training)."""


def training_of(recipe: Recipe, alone: bool = False, begun: bool = False) -> Training:
    """How a recipe trains by default.

    Args:
        recipe: what ships.
        alone: training starts from new weights, which have no float model to learn from.
        begun: training starts from the integers of a checkpoint.
    """
    training = RECIPES.get(recipe.name, FINE_TUNING)
    if begun:
        training = replace(training, learning_rate=BEGUN * training.learning_rate)
    return replace(training, distillation=0.0) if alone else training
