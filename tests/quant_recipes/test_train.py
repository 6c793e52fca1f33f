"""The training loop: what each setting does, that a run that stopped goes on to the same bits, what is refused."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lobit.checkpoint import load_config, load_model
from lobit.errors import InputError, RecipeError
from lobit.model import CausalAttention, rotary_tables, weight_of
from lobit.quant_recipes.apply import prepare
from lobit.quant_recipes.catalog import find_recipe
from lobit.quant_recipes.corpus import Corpus, pack
from lobit.quant_recipes.fake_quant import attention_for
from lobit.quant_recipes.metrics import figures
from lobit.quant_recipes.schedule import Training
from lobit.quant_recipes.train import ROWS, TUNING_BATCH, Row, Run, Trainer, is_scale, native_precision
from lobit.quant_recipes.trainee import Trainee, new_weights
from lobit.tokenizer import Tokenizer
from tests.quant_recipes.test_trained import QUANTIZED, small_model

pytestmark = pytest.mark.usefixtures("one_thread")
LEARNED = "w4-channel-learned"
PLAIN = Training()
TWO_STAGES = Training(learning_rate=0.02, optimizer="cautious", weight_decay=0.1, tuning_samples=4, tuning_epochs=3)
"""Five steps of all weights in these tests, then three of scales and norms alone."""


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus(torch.randint(96, (24, 17), generator=torch.Generator().manual_seed(1)))


Make = Any
"""The fixture `make`."""


@pytest.fixture
def make(corpus: Corpus, tmp_path: Path) -> Make:
    """`make(training, recipe=…, …)`: a trainer of a small model, the float one its teacher, that keeps checkpoints in tmp_path."""

    def trainer(
        training: Training = PLAIN, recipe: str = LEARNED, recompute: bool = False, folder: Path = tmp_path / "steps", **run: Any
    ) -> Trainer:
        told, whole = Run(**{"steps": 4, "batch": 4, **run}).dealt(), find_recipe(recipe)
        teacher = small_model().eval().requires_grad_(False)
        trainee = Trainee(prepare(small_model(), whole), whole, teacher, training.distillation, recompute)
        return Trainer(trainee, training, corpus, told, folder)

    return trainer


def state(trainer: Trainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.trainee.model.named_parameters()}


def ended(trainer: Trainer) -> dict[str, Tensor]:
    """What the training ends with."""
    list(trainer.train())
    return state(trainer)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def told(rows: list[Row]) -> list[Row]:
    """The rows without what depends on the clock."""
    return [replace(row, seconds=0) for row in rows]


# --- the loss ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [LEARNED, "8da8w"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_loss_is_torchs_of_all_logits(name: str, share: float, corpus: Corpus) -> None:
    """With the key-value cache that the recipe has."""
    recipe, sequences = find_recipe(name), corpus.batch(0, 4)
    model, teacher = prepare(new_weights(small_model().config, 1), recipe), small_model().requires_grad_(False)
    loss = Trainee(model, recipe, teacher, share)(sequences)
    tokens, targets = sequences[:, :-1], sequences[:, 1:].flatten()
    attend = attention_for(recipe, CausalAttention(model.config))
    student = model(tokens, rotary_tables(model.config, torch.arange(16)), attend).flatten(0, 1).log_softmax(1)
    reference = teacher(tokens).flatten(0, 1).log_softmax(1)
    kl = F.kl_div(student, reference, log_target=True, reduction="batchmean")
    torch.testing.assert_close(loss, share * kl + (1 - share) * F.nll_loss(student, targets))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize(("recipe", "rate", "share"), [("8da8w", 1e-5, 0.97), (LEARNED, 2e-4, 0.8)])
def test_a_trained_model_is_nearer_to_the_float_one_than_a_rounded_one(
    recipe: str, rate: float, share: float, stories: Path, shared: Any, tmp_path: Path
) -> None:
    whole, tokenizer = find_recipe(recipe), Tokenizer.from_folder(stories, load_config(stories).vocab_size)
    text = shared("text/tinystories_sample.txt").read_text(encoding="utf-8")[:40_000]
    trained_on, held_out = pack([tokenizer.encode(text)], 64).split(0.1)
    reference = load_model(stories)
    model = prepare(load_model(stories).requires_grad_(True), whole)
    before = figures(model, held_out, whole, reference)
    training = Training(learning_rate=rate, distillation=1.0)
    trainer = Trainer(Trainee(model, whole, reference, 1.0), training, trained_on, Run(30, batch=4).dealt(), tmp_path)
    assert len(list(trainer.train())) == 30
    assert figures(model, held_out, whole, reference).kl < share * before.kl


def test_new_weights_learn_from_the_text_alone(stories: Path, corpus: Corpus, tmp_path: Path) -> None:
    recipe = find_recipe("bitnet")
    model = prepare(new_weights(small_model().config, 3), recipe)
    few = replace(corpus, sequences=corpus.sequences[:4])
    rows = list(Trainer(Trainee(model, recipe), Training(learning_rate=0.01), few, Run(20, batch=4).dealt(), tmp_path).train())
    assert rows[0].loss == pytest.approx(math.log(96), abs=0.7)  # new weights know nothing
    assert rows[-1].loss < 0.7 * rows[0].loss


def test_new_weights_depend_on_the_seed_alone_and_keep_the_size_of_what_they_multiply() -> None:
    config = small_model(hidden_size=256, intermediate_size=512, tie_word_embeddings=False).config
    torch.manual_seed(5)
    model, again, other = new_weights(config, 7), new_weights(config, 7), new_weights(config, 2**64 + 8)
    assert same(dict(model.named_parameters()), dict(again.named_parameters()))
    assert not torch.equal(weight_of(model.head), weight_of(other.head))
    up, down = (weight_of(layer).detach() for layer in (model.blocks[0].mlp.up, model.blocks[0].mlp.down))
    assert F.linear(torch.randn(64, 256), up).std().item() == pytest.approx(1, rel=0.05)
    added = F.linear(torch.randn(64, 512), down).std()
    assert added.item() == pytest.approx((2 * len(config.layers)) ** -0.5, rel=0.05)


# --- what the settings do ---------------------------------------------------------------------------------------------------------

CHANGES: dict[str, tuple[Training, Any]] = {
    "learning_rate": (Training(), 1e-3),
    "schedule": (Training(), "two_stage"),
    "warm_up": (Training(), 0.5),
    "second_peak": (Training(schedule="two_stage"), 0.9),
    "weight_decay": (Training(), 0.1),
    "optimizer": (Training(), "cautious"),
    "clip": (Training(), 0.01),
    "range_rate": (Training(), 2.0),
    "distillation": (Training(), 0.5),
    "tuning_samples": (Training(), 4),
    "tuning_epochs": (Training(tuning_samples=4), 3),
}
"""Of every value of a training: one to begin with, and another value."""


def test_every_value_of_a_training_is_walked() -> None:
    assert set(CHANGES) == {field.name for field in fields(Training)}


@pytest.mark.parametrize("name", CHANGES)
def test_every_value_of_a_training_changes_the_weights(name: str, make: Make) -> None:
    training, value = CHANGES[name]
    assert getattr(training, name) != value
    once = ended(make(training))
    assert same(once, ended(make(training))), "else any two trainings differ"
    assert not same(once, ended(make(replace(training, **{name: value}))))


def test_rows_tell_what_was_done(make: Make) -> None:
    training = Training(learning_rate=0.5e-3, schedule="two_stage", weight_decay=0.1)
    trainer = make(training, steps=6)
    rows = list(trainer.train())
    assert rows == trainer.rows
    assert [row.step for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row.tokens for row in rows] == [64 * step for step in range(1, 7)]
    for row in rows:
        done = row.step / 7  # no step has a rate of 0: the first is one step into the warm-up, the last one before the end
        assert (row.learning_rate, row.weight_decay) == (training.rate(done), training.decay(done))
        assert row.learning_rate > 0 and row.gradient_norm > 0 and row.seconds > 0
    assert rows[-1].weight_decay == 0 != rows[0].weight_decay


def test_the_first_loss_is_that_before_any_step(make: Make) -> None:
    trainer = make()
    with torch.no_grad():
        before = trainer.trainee(trainer.stages[0].corpus.batch(0, 4)).item()
    assert next(trainer.train()).loss == pytest.approx(before, abs=1e-6)


def test_the_gradient_is_clipped(make: Make) -> None:
    trainer = make(Training(clip=0.125))
    seen = []
    original = torch.optim.AdamW.step

    def step_of(self: Any, *arguments: Any) -> Any:
        seen.append(math.sqrt(sum(float(p.grad.square().sum()) for group in self.param_groups for p in group["params"])))
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step_of)
        rows = list(trainer.train())
    assert all(row.gradient_norm > 0.125 for row in rows)
    assert seen == pytest.approx([0.125] * 4, rel=1e-4)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_sequences_computed_apart_give_the_same_losses(micro_batch: int, make: Make) -> None:
    whole, apart = (list(make(Training(learning_rate=1e-3), batch=8, micro_batch=size).train()) for size in (8, micro_batch))
    assert [row.loss for row in apart] == pytest.approx([row.loss for row in whole], abs=1e-5)
    assert [row.gradient_norm for row in apart] == pytest.approx([row.gradient_norm for row in whole], rel=1e-3)
    assert whole[0].loss - whole[-1].loss != 0


@pytest.mark.parametrize("recipe", ["fp", "8da8w", "bonsai"])
def test_activations_computed_twice_give_the_same_bits(recipe: str, make: Make) -> None:
    assert same(ended(make(recipe=recipe)), ended(make(recipe=recipe, recompute=True)))


def test_activations_computed_twice_are_not_kept(make: Make) -> None:
    def kept(recompute: bool) -> int:
        found = []

        def keep(tensor: Tensor) -> Tensor:
            found.append(tensor.numel() * tensor.element_size())
            return tensor

        trainer = make(recompute=recompute)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            trainer.trainee(trainer.stages[0].corpus.batch(0, 8))
        return sum(found)

    assert kept(recompute=True) < 0.5 * kept(recompute=False)


def test_bfloat16_rounds_products_and_not_weights(make: Make) -> None:
    exact, rough = make(Training(learning_rate=1e-3)), make(Training(learning_rate=1e-3), precision="bf16")
    losses = [[row.loss for row in trainer.train()] for trainer in (exact, rough)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert {tensor.dtype for tensor in state(rough).values()} == {torch.float32}
    assert native_precision("cpu") in ("bf16", "float32")


# --- the second stage -------------------------------------------------------------------------------------------------------------


def test_scales_and_norms_are_told_by_their_names() -> None:
    names = [name for name, _ in prepare(small_model(), find_recipe("bonsai")).named_parameters()]
    scales = {name for name in names if is_scale(name)}
    assert {name.rpartition(".")[2] for name in scales if ".quantizer." in name} == {"magnitude"}
    assert {"norm.weight", "layers.0.attention_norm.weight", "layers.1.mlp_norm.weight"} <= scales
    assert len([name for name in scales if ".quantizer." in name]) == 2 * 7
    assert all(name.endswith(".weight") for name in set(names) - scales)
    assert "embedding.weight" not in scales


def test_the_second_stage_trains_scales_and_norms_alone(make: Make, corpus: Corpus) -> None:
    trainer = make(TWO_STAGES, "bonsai", steps=5)
    running = trainer.train()
    first = list(islice(running, 5))
    between = state(trainer)
    second = list(running)
    after = state(trainer)
    assert trainer.steps == len(first) + len(second) == 8
    for name, tensor in between.items():
        assert is_scale(name) != torch.equal(tensor, after[name]), name
    assert {row.weight_decay for row in first} == {0.1} and {row.weight_decay for row in second} == {0.0}
    assert second[0].learning_rate > second[-1].learning_rate, "with a schedule of its own"
    assert [row.step for row in second] == [6, 7, 8]


@pytest.mark.parametrize(("samples", "batch", "steps"), [(1, 4, 10), (4, 4, 10), (10, 8, 12), (24, 24, 10), (999, 24, 10)])
def test_the_second_stage_sees_each_of_its_sequences_so_many_times(samples: int, batch: int, steps: int, make: Make) -> None:
    """At most 64 at once, a multiple of what processes compute at once."""
    trainer = make(Training(tuning_samples=samples), "bonsai", micro_batch=4)
    stage = trainer.stages[1]
    assert (len(stage.corpus), stage.batch, stage.steps) == (min(samples, 24), batch, 10 * min(samples, 24) // batch or 1)
    assert stage.batch <= TUNING_BATCH and stage.steps >= min(steps, 2)


# --- a run that stopped goes on ---------------------------------------------------------------------------------------------------


def stopped(trainer: Trainer, steps: int) -> None:
    """Ends a training after so many steps, as a signal would."""
    running = trainer.train()
    list(islice(running, steps + 1))  # a checkpoint is written when the next step is asked for
    running.close()


@pytest.mark.parametrize(
    ("recipe", "training"),
    [
        (LEARNED, Training(learning_rate=0.02, distillation=1.0)),
        ("8da8w", Training(learning_rate=0.02)),
        ("bonsai", TWO_STAGES),
    ],
    ids=["adamw", "tied", "cautious in two stages"],
)
def test_a_run_that_stopped_anywhere_ends_with_the_same_bits(recipe: str, training: Training, make: Make, tmp_path: Path) -> None:
    undisturbed = make(training, recipe, steps=5, folder=tmp_path / "undisturbed")
    wanted = ended(undisturbed)
    for steps in range(1, undisturbed.steps):
        folder = tmp_path / str(steps)
        stopped(make(training, recipe, steps=5, minutes=0.0, folder=folder), steps)
        again = make(training, recipe, steps=5, folder=folder)
        rows = list(again.train())
        kept = steps - 1 if steps == 5 else steps  # between the stages there is no checkpoint
        assert [row.step for row in rows] == list(range(kept + 1, undisturbed.steps + 1)), "what is done is not done again"
        assert told(again.rows) == told(undisturbed.rows)
        assert same(state(again), wanted), steps


def test_a_run_may_stop_again_and_again(make: Make, tmp_path: Path) -> None:
    wanted = ended(make(TWO_STAGES, "bonsai", steps=5, folder=tmp_path / "undisturbed"))
    for _ in range(3):
        stopped(make(TWO_STAGES, "bonsai", steps=5, minutes=0.0), 2)
    assert same(ended(make(TWO_STAGES, "bonsai", steps=5)), wanted)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_one_checkpoint_is_kept_and_only_every_so_many_minutes(make: Make, tmp_path: Path) -> None:
    folder, seen = tmp_path / "steps", []
    for _ in make(minutes=0.0).train():
        seen.append(names(folder))
    assert seen == [[], ["step-000000001"], ["step-000000002"], ["step-000000003"]]
    assert names(folder) == ["step-000000003"], "none is made after the last step"
    rare = tmp_path / "rare"
    list(make(minutes=60.0, folder=rare).train())
    assert names(rare) == []


def test_what_is_half_written_is_not_read(make: Make, tmp_path: Path) -> None:
    wanted = ended(make(folder=tmp_path / "undisturbed"))
    stopped(make(minutes=0.0), 2)
    half = tmp_path / "steps" / "step-000000003.new"
    half.mkdir()
    (half / ROWS).write_text("[", encoding="utf-8")
    again = make(minutes=0.0)
    assert same(ended(again), wanted)
    assert names(tmp_path / "steps") == ["step-000000003"]


# --- what is refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "micro_batch", "advice"), [(8, 3, 9), (4, 8, 8), (7, 2, 8)])
def test_a_batch_that_cannot_be_dealt_out_is_refused_with_one_that_can(batch: int, micro_batch: int, advice: int, make: Make) -> None:
    said = f"--batch {batch} is no multiple of 1 processes times --micro-batch {micro_batch}: take {advice}"
    with pytest.raises(InputError, match=said):
        make(batch=batch, micro_batch=micro_batch)
    make(batch=advice, micro_batch=micro_batch)


def test_without_a_micro_batch_all_sequences_are_computed_at_once() -> None:
    assert Run(1, batch=12).dealt().micro_batch == 12
    assert Run(1, batch=12, micro_batch=3).dealt().micro_batch == 3


def test_a_loss_that_is_not_finite_is_refused_and_the_checkpoint_stays(make: Make, tmp_path: Path) -> None:
    trainer = make(Training(distillation=0.5), minutes=0.0, steps=6)
    running = trainer.train()
    list(islice(running, 3))
    trainer.trainee.distillation = math.nan
    with pytest.raises(RecipeError, match="the loss of step 4 is nan: take a lower --learning-rate"):
        list(running)
    assert [row.step for row in trainer.rows] == [1, 2, 3]
    again = make(Training(distillation=0.5), steps=6)
    assert next(again.train()).step == 4


def test_a_gradient_that_is_not_finite_is_refused(make: Make) -> None:
    trainer = make(recipe="fp")
    with torch.no_grad():
        trainer.trainee.model.get_parameter("embedding.weight").mul_(1e22)
    before = state(trainer)
    with pytest.raises(RecipeError, match=r"the gradient of step 1 is (inf|nan): take a lower --learning-rate"):
        list(trainer.train())
    assert same(state(trainer), before)


def test_all_recipes_train(make: Make) -> None:
    for recipe in QUANTIZED:
        trainer = make(Training(learning_rate=0.01), recipe, steps=2)
        before = state(trainer)
        after = ended(trainer)
        assert not any(torch.equal(before[name], after[name]) for name in before if name.endswith(".weight")), recipe
        assert all(tensor.isfinite().all() for tensor in after.values())
