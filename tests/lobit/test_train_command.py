"""`lobit train`: what it writes, what its options do, what is refused, what is left when it stops."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lobit import verbs
from lobit.checkpoint import load_model
from lobit.quant_recipes import trainee
from lobit.quant_recipes.catalog import find_recipe
from lobit.quant_recipes.corpus import Corpus, pack
from lobit.quant_recipes.metrics import figures
from lobit.quant_recipes.quantized import is_checkpoint, load_checkpoint
from lobit.quant_recipes.train import Run, Trainer
from lobit.tokenizer import Tokenizer
from lobit.verbs.learn import HELD_OUT, STEPS

pytestmark = pytest.mark.usefixtures("one_thread")
Answer = Any
Lobit = Callable[..., Answer]
DONE, MISTAKE, INTERRUPTED = 0, 2, 130
SMALL = ("--length", 16, "--batch", 2, "--steps", 4, "--precision", "float32")
MADE = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json", "training.csv", "training.png"}


@pytest.fixture(scope="session")
def text(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some stories."""
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text(sample.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    return path


@pytest.fixture
def train(stories: Path, text: Path, lobit: Lobit) -> Lobit:
    """`train(out, *options, recipe=…)`: a short training of stories260k."""

    def call(out: Path, *options: Any, recipe: str = "w4-channel-learned", model: Any = stories) -> Answer:
        return lobit("train", model, "--recipe", recipe, "--text", text, "-o", out, *SMALL, *options, "--json")

    return call


def losses(folder: Path) -> list[float]:
    return [float(line["loss"]) for line in csv.DictReader((folder / "training.csv").read_text(encoding="utf-8").splitlines())]


def same_weights(one: Path, other: Path) -> bool:
    tensors, others = (load_file(folder / "model.safetensors") for folder in (one, other))
    return tensors.keys() == others.keys() and all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


# --- what is written --------------------------------------------------------------------------------------------------------------


def test_a_training_writes_a_checkpoint_its_curves_and_a_record(train: Lobit, stories: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "checkpoint"
    answer = train(out, recipe="8da8w")
    assert answer.code == DONE, answer.err
    assert {path.name for path in out.iterdir()} == MADE | {"recipe.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert answer.json == json.loads((out / "training.json").read_text(encoding="utf-8"))
    assert answer.json["settings"]["command"].startswith("lobit train")
    assert (answer.json["steps"], answer.json["tokens"], len(losses(out))) == (4, 4 * 2 * 16, 4)
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    model, recipe = load_checkpoint(out)
    assert recipe == find_recipe("8da8w")
    _, held_out = packed(stories, text).split(HELD_OUT)
    found = figures(model, held_out, recipe, load_model(stories))
    told = {name: answer.json[name] for name in ("held_out_tokens", "loss", "perplexity", "kl", "top1")}
    assert told == pytest.approx(
        {"held_out_tokens": found.tokens, "loss": found.loss, "perplexity": found.perplexity, "kl": found.kl, "top1": found.top1}
    ), "the figures are those of the checkpoint"
    assert answer.json["reference_loss"] == pytest.approx(figures(load_model(stories), held_out).loss)


def test_progress_tells_step_loss_and_speed_and_then_measures(stories: Path, text: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    begin(stories, text, tmp_path / "out", progress=lambda *count: told.append(count))
    *steps, (what, done, total) = told
    assert [count[1:] for count in steps] == [(step, 4) for step in range(1, 5)]
    assert all(re.fullmatch(rf"step {step}, loss \d+\.\d{{3}}, [\d,]+ t/s", count[0]) for step, count in enumerate(steps, 1))
    mean = sum(losses(tmp_path / "out")) / 4
    assert f"loss {mean:.3f}" in steps[-1][0], "of the last steps together"
    assert what == "measuring" and done == total


def test_fp_trains_a_float_model_that_others_read(train: Lobit, stories: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "float"
    assert train(out, recipe="fp").code == DONE
    assert {path.name for path in out.iterdir()} == MADE
    assert not is_checkpoint(out)
    tokens = torch.arange(1, 33)[None]
    with torch.no_grad():
        ours, theirs = load_model(out)(tokens), transformers.LlamaForCausalLM.from_pretrained(out)(tokens).logits
        assert not torch.equal(ours, load_model(stories)(tokens))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_table_tells_what_was_trained(lobit: Lobit, stories: Path, text: Path, tmp_path: Path) -> None:
    answer = lobit("train", stories, "--recipe", "8da8w", "--text", text, "-o", tmp_path / "out", *SMALL)
    assert answer.code == DONE
    for told in ("4 steps", "128 tokens", "loss, nats a token", "perplexity", "KL from the float model"):
        assert told in " ".join(answer.out.split())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["bitnet", "trilm", "bilm", "8da8w"])
def test_every_recipe_trains_to_a_checkpoint(recipe: str, train: Lobit, tmp_path: Path) -> None:
    answer = train(tmp_path / "out", recipe=recipe)
    assert answer.code == DONE, answer.err
    load_checkpoint(tmp_path / "out")


# --- what the options do ----------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, tuple[tuple[Any, ...], Callable[[Any], Any], Any]] = {
    "--steps": ((6,), lambda told: told["steps"], 6),
    "--length": ((8,), lambda told: told["tokens"] / told["steps"] / told["settings"]["run"]["batch"], 8),
    "--batch": ((4,), lambda told: told["settings"]["run"]["batch"], 4),
    "--micro-batch": ((1,), lambda told: told["settings"]["run"]["micro_batch"], 1),
    "--learning-rate": ((0.01,), lambda told: told["settings"]["training"]["learning_rate"], 0.01),
    "--distillation": ((0.25,), lambda told: told["settings"]["training"]["distillation"], 0.25),
    "--precision": (("bf16",), lambda told: told["settings"]["run"]["precision"], "bf16"),
    "--checkpoint-minutes": ((2.5,), lambda told: told["settings"]["run"]["minutes"], 2.5),
    "--seed": ((3,), lambda told: told["settings"]["seed"], 3),
    "--except": (("layers.1.*",), lambda told: told["settings"]["recipe"]["exclude"], ["layers.1.*"]),
    "--kv-cache": (("int8",), lambda told: told["settings"]["recipe"]["kv_bits"], 8),
    "--activations": (("float",), lambda told: told["settings"]["recipe"].get("compute_bits"), None),
    "--mixed": (("layers.0.mlp.up=int8",), lambda told: told["settings"]["recipe"]["rules"][0]["weights"]["bits"], 8),
}
"""Of each option that changes what is trained: a value, and what of the result tells that it was heard."""
ELSEWHERE = {"--recipe", "--text", "--out", "--held-out", "--from-scratch", "--recompute", "--group-size"} | {
    *("--from", "--scale-rule", "--rotate", "--json", "--help")
}
"""Options that tests of their own walk."""


def test_every_option_is_walked(lobit: Lobit) -> None:
    listed = set(re.findall(r"^ +(?:-\w, )?(--[a-z-]+)", lobit("train", "--help").out.partition("Options:")[2], re.MULTILINE))
    assert listed == set(OPTIONS) | ELSEWHERE


def begin(model: Path, text: Path, out: Path, minutes: float = 5.0, progress: Any = None) -> None:
    """What the command of `train` calls."""
    texts, run = verbs.Texts([text.read_text(encoding="utf-8")], length=16), Run(4, 2, minutes=minutes)
    verbs.train(str(model), find_recipe("w4-channel-learned"), texts, out, run=run.dealt(), progress=progress)


@pytest.fixture(scope="module")
def plain(stories: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `train` makes without options."""
    out = tmp_path_factory.mktemp("plain") / "out"
    begin(stories, text, out)
    return out


def test_the_command_is_the_verb(train: Lobit, plain: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "out").code == DONE
    assert same_weights(tmp_path / "out", plain)


def test_all_options_together_do_what_they_say(train: Lobit, plain: Path, tmp_path: Path) -> None:
    answer = train(tmp_path / "out", *[word for option, (values, *_) in OPTIONS.items() for word in (option, *values)])
    assert answer.code == DONE, answer.err
    before = json.loads((plain / "training.json").read_text(encoding="utf-8"))
    for option, (_, found, wanted) in OPTIONS.items():
        assert found(answer.json) == wanted != found(before), option


@pytest.mark.parametrize("option", ["--seed", *(pytest.param(option, marks=pytest.mark.slow) for option in OPTIONS if option != "--seed")])
def test_every_option_does_what_it_says(option: str, train: Lobit, plain: Path, tmp_path: Path) -> None:
    values, found, wanted = OPTIONS[option]
    answer = train(tmp_path / "out", option, *values)
    assert answer.code == DONE, answer.err
    assert found(answer.json) == wanted
    if option not in ("--micro-batch", "--checkpoint-minutes", "--activations"):
        assert not same_weights(tmp_path / "out", plain)


def test_groups_are_as_large_as_asked(train: Lobit, tmp_path: Path) -> None:
    answer = train(tmp_path / "out", "--group-size", 4, recipe="8da4w-g32")
    assert answer.code == DONE, answer.err
    assert load_checkpoint(tmp_path / "out")[1].rules[0].weights.group_size == 4


def test_activations_computed_twice_give_the_same_model(train: Lobit, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, calls = trainee.checkpoint, []
    monkeypatch.setattr(trainee, "checkpoint", lambda *arguments, **options: calls.append(1) or checkpoint(*arguments, **options))
    assert train(tmp_path / "out", "--recompute").code == DONE
    assert len(calls) >= 4 * 5, "of each block in each step"
    assert same_weights(tmp_path / "out", plain)


def packed(stories: Path, *texts: Path) -> Corpus:
    """The texts as they are read, in sequences of 16."""
    tokenizer = Tokenizer.from_folder(stories, 512)
    return pack([tokenizer.encode(path.read_text(encoding="utf-8")) for path in texts], 16, bos=tokenizer.bos)


def test_texts_follow_each_other_and_one_may_be_held_out(train: Lobit, text: Path, sample: Path, tmp_path: Path, stories: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(sample.read_text(encoding="utf-8")[4000:6000], encoding="utf-8")
    both = train(tmp_path / "both", "--text", other).json
    assert both["held_out_tokens"] == round(len(packed(stories, text, other)) * HELD_OUT) * 16
    held_out = train(tmp_path / "held-out", "--held-out", other).json
    assert held_out["held_out_tokens"] == len(packed(stories, other)) * 16
    assert len({record["settings"]["text"] for record in (both, held_out)}) == 2


def test_from_scratch_nothing_of_the_models_weights_is_used(train: Lobit, models: Any, stories: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(stories, tmp_path / "model"))
    other.chmod(0o755)
    (other / "model.safetensors").chmod(0o644)
    save_file({name: tensor * 2 for name, tensor in load_file(stories / "model.safetensors").items()}, other / "model.safetensors")
    found = [train(tmp_path / str(i), "--from-scratch", model=model) for i, model in enumerate((stories, other))]
    assert [answer.code for answer in found] == [DONE, DONE]
    assert same_weights(tmp_path / "0", tmp_path / "1")
    assert found[0].json["kl"] is found[0].json["top1"] is found[0].json["reference_loss"] is None
    assert found[0].json["settings"]["training"]["distillation"] == 0
    assert found[0].json["loss"] == pytest.approx(torch.tensor(512.0).log().item(), rel=0.15), "it knows nothing yet"


# --- what is refused --------------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[tuple[Any, ...], str, str]] = [
    (("--recipe", "gptq-w4"), "recipe gptq-w4 rounds after training", "lobit quantize --calibration"),
    (("--recipe", "8da4w-g32"), r"layers.0.mlp.down \(in=172\)", "--except 'layers.*.mlp.down'"),
    (("--length", 0), "--length 0 is outside of 1 to 512", "choose one inside"),
    (("--length", 513), "--length 513 is outside of 1 to 512", "choose one inside"),
    (("--length", 512, "--text", "FEW"), "sequences? of 512 tokens|a sequence needs 513", "give more text"),
    (("--batch", 5, "--micro-batch", 2), "--batch 5 is no multiple of 1 processes times --micro-batch 2", "take 6"),
    (("--learning-rate", 0), "--learning-rate 0.0 is outside of 0 to 1", "the recipe's own is"),
    (("--learning-rate", "nan"), "--learning-rate nan is outside of 0 to 1", "the recipe's own is"),
    (("--from-scratch", "--distillation", 0.5), "new weights have no float model to learn from", "leave --distillation out"),
    (("--held-out", "MISSING"), "cannot be read", "give a text file"),
    (("--text", "BINARY"), r"is not UTF-8 text \(byte 3\)", "give a text file"),
    (("--held-out", "EMPTY"), r"the text has \d tokens?, a sequence needs 17", "give more text or a shorter --length"),
]


@pytest.mark.parametrize(("options", "told", "advice"), REFUSED, ids=[" ".join(map(str, options)) for options, *_ in REFUSED])
def test_mistakes_are_told_with_a_way_out_and_leave_nothing(
    options: tuple[Any, ...], told: str, advice: str, stories: Path, text: Path, lobit: Lobit, tmp_path: Path
) -> None:
    files = {"FEW": b"One day.", "BINARY": b"abc\xff", "EMPTY": b"", "MISSING": None}
    for name, content in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    given = [tmp_path / option if option in files else option for option in options]
    texts = [] if "FEW" in options else ["--text", text]
    before = sorted(path.name for path in tmp_path.iterdir())
    answer = lobit("train", stories, "--recipe", "8da8w", *texts, "-o", tmp_path / "out", *SMALL, *given)
    assert answer.code == MISTAKE
    assert answer.out == ""
    assert re.search(told, answer.err) and advice in answer.err, answer.err
    assert answer.err.count("\n") < 6 and "Traceback" not in answer.err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_quantized_model_and_a_place_that_is_taken_are_refused(train: Lobit, plain: Path, tmp_path: Path) -> None:
    answer = train(tmp_path / "out", model=plain)
    assert answer.code == MISTAKE
    assert f"{plain} is quantized already: give the float model" in answer.err
    (tmp_path / "out").mkdir()
    answer = train(tmp_path / "out")
    assert answer.code == MISTAKE
    assert "is already there and is left as it is" in answer.err
    assert list((tmp_path / "out").iterdir()) == []


# --- runs that stop ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Any], None]:
    """`fails(step, how)`: the loss of that step is `how`, or raises it."""
    whole = Trainer._gradients

    def set_up(step: int, how: Any) -> None:
        def gradients(trainer: Trainer, sequences: torch.Tensor) -> float:
            found = whole(trainer, sequences)
            if len(trainer.rows) + 1 != step:
                return found
            if isinstance(how, BaseException):
                raise how
            return float(how)

        monkeypatch.setattr(Trainer, "_gradients", gradients)

    return set_up


def contents(folder: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in files.items() if name != ".writer"}


def test_a_loss_that_is_not_finite_is_told_and_what_was_done_is_kept(train: Lobit, fails: Any, tmp_path: Path) -> None:
    fails(4, float("nan"))
    answer = train(tmp_path / "out", "--checkpoint-minutes", 0)
    assert answer.code == MISTAKE
    assert "the loss of step 4 is nan: take a lower --learning-rate" in answer.err
    assert [path.name for path in (tmp_path / "out.partial" / STEPS).iterdir()] == ["step-000000003"]


def test_a_run_that_kept_nothing_may_begin_again_with_other_settings(train: Lobit, fails: Any, tmp_path: Path) -> None:
    fails(1, float("inf"))
    assert train(tmp_path / "out").code == MISTAKE
    fails(0, None)
    assert train(tmp_path / "out", "--learning-rate", 1e-5).code == DONE


def test_weights_whose_gradient_overflows_are_refused(train: Lobit, stories: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(stories, tmp_path / "model"))
    model.chmod(0o755)
    (model / "model.safetensors").chmod(0o644)
    tensors = load_file(stories / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= 1e22
    save_file(tensors, model / "model.safetensors")
    answer = train(tmp_path / "out", recipe="fp", model=model)
    assert answer.code == MISTAKE
    assert "of step 1 is" in answer.err and "take a lower --learning-rate" in answer.err
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_says_how_to_go_on_and_goes_on(train: Lobit, fails: Any, plain: Path, tmp_path: Path) -> None:
    fails(4, KeyboardInterrupt())
    answer = train(tmp_path / "out", "--checkpoint-minutes", 0)
    assert answer.code == INTERRUPTED
    assert "the same command goes on from there" in answer.err
    fails(2, AssertionError("it begins anew"))
    assert train(tmp_path / "out", "--checkpoint-minutes", 0).code == DONE
    assert same_weights(tmp_path / "out", plain)
    assert losses(tmp_path / "out") == losses(plain)
    assert {path.name for path in (tmp_path / "out").iterdir()} == MADE | {"recipe.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


OTHERS = {
    "training.learning_rate": ("--learning-rate", 0.01),
    "seed": ("--seed", 1),
    "text": ("--length", 8),
    "run.steps": ("--steps", 9),
    "from_scratch": ("--from-scratch",),
    "recipe.exclude": ("--except", "head"),
}
"""Options that make another training, by a setting that the message names."""


@pytest.fixture(scope="module")
def unfinished(stories: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is left of `train(out, "--checkpoint-minutes", 0)` after two steps."""
    out = tmp_path_factory.mktemp("unfinished") / "out"

    def stop(what: str, done: int, steps: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin(stories, text, out, minutes=0.0, progress=stop)
    return out.with_name("out.partial")


@pytest.mark.parametrize("setting", OTHERS)
def test_other_settings_are_refused_and_touch_nothing(setting: str, train: Lobit, unfinished: Path, tmp_path: Path) -> None:
    partial = Path(shutil.copytree(unfinished, tmp_path / "out.partial"))
    before = contents(partial)
    assert any(name.endswith(".safetensors") for name in before)
    answer = train(tmp_path / "out", "--checkpoint-minutes", 0, *OTHERS[setting])
    assert answer.code == MISTAKE
    assert re.search(rf"out\.partial holds an unfinished `lobit train` with other settings \(.*{re.escape(setting)}", answer.err)
    assert contents(partial) == before


VERBS = {"quantize": ("--recipe", "8da8w"), "export": ("--recipe", "8da8w", "--target", "onnx"), "merge": (), "demo": (), "fetch": ()}


@pytest.mark.parametrize("verb", VERBS)
def test_an_unfinished_training_survives_every_other_verb(
    verb: str, train: Lobit, lobit: Lobit, plain: Path, stories: Path, unfinished: Path, tmp_path: Path
) -> None:
    out, partial = tmp_path / "out", Path(shutil.copytree(unfinished, tmp_path / "out.partial"))
    before, names = contents(partial), {"merge": [stories, stories], "demo": [], "fetch": ["smollm2"]}
    answer = lobit(verb, *names.get(verb, [stories]), *VERBS[verb], "-o", out)
    assert answer.code == MISTAKE
    assert "out.partial holds an unfinished `lobit train`: go on with it (" in answer.err
    assert contents(partial) == before
    assert train(out, "--checkpoint-minutes", 0).code == DONE and same_weights(out, plain)
