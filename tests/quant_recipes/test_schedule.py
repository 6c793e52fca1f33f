"""Learning rate and weight decay of every step, the groups that they go to, and the cautious optimizer."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lobit.quant_recipes.apply import prepare
from lobit.quant_recipes.catalog import CATALOG, find_recipe
from lobit.quant_recipes.optimizer import BETAS, CautiousAdamW, optimizer_for, set_rates
from lobit.quant_recipes.schedule import BEGUN, FINE_TUNING, RECIPES, Training, training_of
from tests.quant_recipes.test_trained import small_model

shares = st.floats(0.001, 0.999)
COSINE = Training(learning_rate=0.5, warm_up=0.1, weight_decay=0.3)
TWO_STAGE = replace(COSINE, schedule="two_stage", second_peak=0.625)


# --- rates ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [COSINE, TWO_STAGE], ids=["cosine", "two_stage"])
@given(done=st.floats(0, 0.0999))
def test_the_rate_rises_linearly_while_warming_up(training: Training, done: float) -> None:
    assert training.rate(done) == pytest.approx(0.5 * done / 0.1)


def test_a_cosine_falls_from_the_peak_through_its_half_to_nothing() -> None:
    assert COSINE.rate(0.1) == pytest.approx(0.5)
    assert COSINE.rate(0.55) == pytest.approx(0.25)
    assert COSINE.rate(0.1 + 0.9 / 3) == pytest.approx(0.5 * 0.75)  # (1 + cos 60°) / 2
    assert COSINE.rate(1.0) == pytest.approx(0)


@given(shares, shares)
def test_no_rate_rises_after_the_warm_up(one: float, two: float) -> None:
    early, late = sorted((max(one, 0.1), max(two, 0.1)))
    for training in (COSINE, TWO_STAGE):
        assert 0 <= training.rate(late) <= training.rate(early) <= 0.5


def test_two_stages_are_two_lines_and_the_second_peak_is_five_eighths_of_the_first() -> None:
    """Spectra Table 3: 2.4e-3 to 1.5e-3; section 3.3: roughly at the halfway point."""
    training = Training(learning_rate=2.4e-3, schedule="two_stage")
    assert training.rate(0.25) == pytest.approx(2.4e-3 * 0.75)
    assert training.rate(0.49999) == pytest.approx(1.2e-3, rel=1e-4)
    assert training.rate(0.5) / training.rate(0.5 - 1e-9) == pytest.approx(1.5 / 2.4)
    assert training.rate(0.75) == pytest.approx(1.5e-3 * 0.25)
    assert training.rate(1.0) == 0


def test_two_stages_have_no_weight_decay_from_two_thirds_on() -> None:
    assert TWO_STAGE.decay(0) == TWO_STAGE.decay(2 / 3 - 1e-9) == 0.3
    assert TWO_STAGE.decay(2 / 3) == TWO_STAGE.decay(1) == 0
    assert COSINE.decay(0) == COSINE.decay(0.9) == 0.3


def test_a_training_without_warm_up_begins_at_its_peak() -> None:
    assert replace(COSINE, warm_up=0.0).rate(0) == 0.5


def test_recipes_train_as_their_papers_say() -> None:
    assert set(RECIPES) <= set(CATALOG)
    for name in ("trilm", "bitnet", "bilm"):
        assert training_of(find_recipe(name)).schedule == "two_stage"
    bonsai = training_of(find_recipe("bonsai"))
    assert (bonsai.optimizer, bonsai.schedule) == ("cautious", "cosine")
    assert (bonsai.tuning_samples, bonsai.tuning_epochs) == (128, 10)
    for name in ("8da4w-g32", "w4-channel", "w4-channel-learned"):
        assert training_of(find_recipe(name)) == FINE_TUNING
    assert training_of(find_recipe("8da8w")) == replace(FINE_TUNING, learning_rate=1e-5)
    assert FINE_TUNING.distillation == 1
    assert training_of(find_recipe("fp")).distillation == 0


# --- groups -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w4-channel-learned", "bonsai", "fp"])
@pytest.mark.parametrize("kind", ["adamw", "cautious"])
def test_matrices_decay_and_what_is_learned_has_a_rate_of_its_own(name: str, kind: str) -> None:
    model = prepare(small_model(), find_recipe(name))
    training = Training(learning_rate=0.5, weight_decay=0.3, range_rate=7.0, optimizer=kind)
    optimizer = optimizer_for(model.named_parameters(), training)
    set_rates(optimizer, training, 0.525)
    found = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    rate = training.rate(0.525)
    for path, parameter in model.named_parameters():
        group, learned = found.pop(parameter), ".quantizer." in path
        assert group["lr"] == pytest.approx(rate * (7 if learned else 1)), path
        assert group["weight_decay"] == (0.3 if parameter.ndim == 2 and not learned else 0), path
        assert group["betas"] == BETAS == (0.9, 0.95)
    assert not found


def test_what_is_frozen_is_in_no_group() -> None:
    model = small_model()
    model.embedding.requires_grad_(False)
    optimizer = optimizer_for(model.named_parameters(), Training())
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


# --- the cautious optimizer -------------------------------------------------------------------------------------------------------


def stepped(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, gradients: list[Tensor]) -> list[Tensor]:
    """The parameter after each step."""
    found = []
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        found.append(parameter.detach().clone())
    return found


def two_optimizers(start: Tensor, decay: float) -> tuple[list[torch.optim.Optimizer], list[nn.Parameter]]:
    parameters = [nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [
        CautiousAdamW([{"params": parameters[0]}], lr=0.1),
        torch.optim.AdamW([{"params": parameters[1]}], lr=0.1, betas=BETAS),
    ]
    for optimizer in optimizers:
        optimizer.param_groups[0]["weight_decay"] = decay
    return optimizers, parameters


@given(seed=st.integers(0, 2**31), decay=st.sampled_from([0.0, 0.2]))
def test_where_all_signs_agree_it_is_adamw(seed: int, decay: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randn(5, 3, generator=generator).sign()
    gradients = [signs * (0.1 + torch.rand(5, 3, generator=generator)) for _ in range(6)]
    optimizers, parameters = two_optimizers(torch.randn(5, 3, generator=generator), decay)
    cautious, plain = (stepped(*each, gradients) for each in zip(optimizers, parameters, strict=True))
    for one, other in zip(cautious, plain, strict=True):
        torch.testing.assert_close(one, other)


def test_entries_that_disagree_stay_and_the_others_move_further_worked_out_by_hand() -> None:
    """Algorithm 1: of four entries one has turned; the other three move 4 / 3 as far, and all decay."""
    start, first, second = torch.ones(4), torch.tensor([1.0, 1, -1, 1]), torch.tensor([1.0, -0.5, -1, 1])
    optimizers, parameters = two_optimizers(start, decay=0.2)
    after = stepped(optimizers[0], parameters[0], [first, second])
    shrunk = 1 - 0.1 * 0.2
    one = [shrunk - 0.1, shrunk - 0.1, shrunk + 0.1, shrunk - 0.1]  # mean / sqrt(square) is the sign
    assert after[0].tolist() == pytest.approx(one, abs=1e-6)
    # The mean of the second entry, 0.9 * 0.1 - 0.1 * 0.5 = 0.04, points against its gradient.
    move = 0.1 * 4 / 3
    two = [one[0] * shrunk - move, one[1] * shrunk, one[2] * shrunk + move, one[3] * shrunk - move]
    assert after[1].tolist() == pytest.approx(two, abs=1e-6)


@given(seed=st.integers(0, 2**31))
def test_it_moves_as_algorithm_one_says(seed: int) -> None:
    """Entry by entry in plain numbers, over steps whose signs turn."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(6, generator=generator, dtype=torch.float64)
    gradients = [torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(4)]
    optimizers, parameters = two_optimizers(start, decay=0.2)
    found = stepped(optimizers[0], parameters[0], gradients)
    values, means, squares = start.tolist(), [0.0] * 6, [0.0] * 6
    for t, gradient in enumerate(gradients, 1):
        g = gradient.tolist()
        means = [0.9 * m + 0.1 * x for m, x in zip(means, g, strict=True)]
        squares = [0.95 * s + 0.05 * x * x for s, x in zip(squares, g, strict=True)]
        updates = [m / (1 - 0.9**t) / (math.sqrt(s / (1 - 0.95**t)) + 1e-8) for m, s in zip(means, squares, strict=True)]
        agree = [u * x > 0 for u, x in zip(updates, g, strict=True)]
        share = max(sum(agree) / 6, 1e-3)
        values = [v * (1 - 0.1 * 0.2) - 0.1 * u * a / share for v, u, a in zip(values, updates, agree, strict=True)]
        assert found[t - 1].tolist() == pytest.approx(values, rel=1e-9, abs=1e-9)


def test_parameters_without_a_gradient_stay() -> None:
    moved, still = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = CautiousAdamW([moved, still], lr=0.1)
    moved.grad = torch.ones(2)
    optimizer.step()
    assert moved.tolist() == pytest.approx([0.9, 0.9])
    assert still.tolist() == [1, 1]


def test_training_that_begins_at_calibrated_integers_has_a_rate_of_its_own() -> None:
    for name in ("8da4w-g32", "8da8w", "w4-channel"):
        plain, begun = training_of(find_recipe(name)), training_of(find_recipe(name), begun=True)
        assert begun == replace(plain, learning_rate=BEGUN * plain.learning_rate)
