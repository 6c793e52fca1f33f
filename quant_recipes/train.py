"""Training: the loop, its stages, and checkpoints from which a run that was killed goes on to the same weights.

It runs in one process or, under torchrun, in several with FSDP2; checkpoints are torch.distributed.checkpoint's, in safetensors.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lobit.atomic_folder import publish
from lobit.errors import InputError, RecipeError
from lobit.model import Transformer
from lobit.quant_recipes.apply import prepare, skeleton
from lobit.quant_recipes.corpus import Corpus
from lobit.quant_recipes.optimizer import optimizer_for, set_rates
from lobit.quant_recipes.schedule import Training
from lobit.quant_recipes.trainee import Trainee
from lobit.quiet import quiet_python

TUNING_BATCH = 64
"""Sequences in a step of the second stage [Bonsai section 2.2]."""
ROWS, TENSORS, NEW = "rows.json", "tensors", ".new"
"""Names in a checkpoint: the file of its rows, the folder of weights and optimizer state; the ending of one that is being written."""
Precision = Literal["bf16", "float32"]


@dataclass(frozen=True)
class Run:
    """How much to train, and on what.

    Attributes:
        steps: updates of the weights.
        batch: sequences in a step, over all processes.
        micro_batch: sequences that one process computes at once; gradients of the others are added up.
        precision: the type of products; weights and sums are float32.
        minutes: time between two checkpoints.
        device: `cpu`, or `cuda` with the process's own number.
    """

    steps: int
    batch: int = 8
    micro_batch: int = 0
    precision: Precision = "float32"
    minutes: float = 5.0
    device: str = "cpu"

    @property
    def processes(self) -> int:
        """How many processes train together."""
        return distributed.get_world_size() if distributed.is_initialized() else 1

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""
        return distributed.get_rank() if distributed.is_initialized() else 0

    def dealt(self) -> Run:
        """The run with its micro batch set: where it is 0, to all sequences of a process."""
        return self if self.micro_batch else replace(self, micro_batch=max(1, self.batch // self.processes))

    def wait(self) -> None:
        """Waits until all processes are here."""
        if self.processes > 1:
            distributed.barrier()

    def check(self) -> None:
        """Refuses a batch that cannot be divided evenly.

        Raises:
            InputError: the batch is no multiple of the processes times the micro batch.
        """
        share = self.processes * self.micro_batch
        if self.batch % share:
            raise InputError(
                f"--batch {self.batch} is no multiple of {self.processes} processes times --micro-batch {self.micro_batch}: "
                f"take {-(-self.batch // share) * share}"
            )


@dataclass(frozen=True)
class Row:
    """The figures of one step."""

    step: int
    tokens: int
    """Tokens seen so far."""
    loss: float
    """Nats a token, before the step."""
    learning_rate: float
    weight_decay: float
    gradient_norm: float
    seconds: float
    """The time that this step took."""


@dataclass(frozen=True)
class Stage:
    """A part of the training with an optimizer of its own."""

    training: Training
    corpus: Corpus
    steps: int
    batch: int
    wants: Callable[[str], bool]
    """Whether the parameter of that name is trained."""


def stages(trainee: Trainee, training: Training, corpus: Corpus, run: Run) -> list[Stage]:
    """The first stage trains all weights; the second, where the recipe has one, only scales and norms [Bonsai section 2.2]."""
    wanted = {name for name, parameter in trainee.model.named_parameters() if parameter.requires_grad}
    found = [Stage(training, corpus, run.steps, run.batch, wanted.__contains__)]
    if training.tuning_samples:
        few = corpus.first(training.tuning_samples)
        share = run.processes * run.micro_batch
        batch = max(share, min(TUNING_BATCH, len(few)) // share * share)
        steps = max(1, training.tuning_epochs * len(few) // batch)
        calm = replace(training, schedule="cosine", weight_decay=0.0)
        found.append(Stage(calm, few, steps, batch, lambda name: name in wanted and is_scale(name)))
    return found


def is_scale(name: str) -> bool:
    """Whether a parameter is a norm's weight or a learned scale."""
    return ".quantizer." in name or "norm" in name.split(".")[-2]


class Trainer:
    """Trains a model in place.

    Args:
        trainee: the model and its loss; the parameters that want a gradient are trained.
        training: how to train.
        corpus: the text to train on.
        run: how much to train, and where.
        folder: where checkpoints are written.

    Raises:
        InputError: the batch does not fit the processes.
    """

    def __init__(self, trainee: Trainee, training: Training, corpus: Corpus, run: Run, folder: Path) -> None:
        run = run.dealt()
        run.check()
        self.trainee, self.run, self.folder = trainee.to(run.device), run, folder
        self.stages = stages(trainee, training, corpus, run)
        self.rows: list[Row] = []
        if run.processes > 1:
            shard(trainee)

    @property
    def steps(self) -> int:
        """The number of steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def train(self) -> Iterator[Row]:
        """Trains, from the newest checkpoint on if there is one; yields the figures of each new step.

        Raises:
            RecipeError: the loss is no longer finite.
        """
        done, before, saved = self._restore(), 0, time.monotonic()
        for stage in self.stages:
            for name, parameter in self.trainee.model.named_parameters():
                parameter.requires_grad_(stage.wants(name))
            optimizer = optimizer_for(self.trainee.model.named_parameters(), stage.training)
            if before < done < before + stage.steps:
                self._load(optimizer)
            for step in range(max(0, done - before), stage.steps):
                yield self._step(stage, step, optimizer)
                if self._agreed(time.monotonic() - saved > 60 * self.run.minutes) and step + 1 < stage.steps:
                    self._save(optimizer)
                    saved = time.monotonic()
            before += stage.steps

    def _step(self, stage: Stage, step: int, optimizer: torch.optim.Optimizer) -> Row:
        start, run, training = time.perf_counter(), self.run, stage.training
        done = (step + 1) / (stage.steps + 1)
        set_rates(optimizer, training, done)
        batch = stage.corpus.batch(step, stage.batch).to(run.device)
        loss = self._gradients(batch[run.rank :: run.processes])
        norm = nn.utils.clip_grad_norm_([p for p in self.trainee.parameters() if p.requires_grad], training.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        for what, value in (("loss", loss), ("gradient", norm.item())):
            if not math.isfinite(value):
                raise RecipeError(f"the {what} of step {len(self.rows) + 1} is {value}: take a lower --learning-rate")
        optimizer.step()
        optimizer.zero_grad()
        tokens = (self.rows[-1].tokens if self.rows else 0) + stage.batch * stage.corpus.length
        seconds = time.perf_counter() - start
        row = Row(len(self.rows) + 1, tokens, loss, training.rate(done), training.decay(done), norm.item(), seconds)
        self.rows.append(row)
        return row

    def _gradients(self, sequences: Tensor) -> float:
        """Adds up the gradients of this process's sequences; returns the mean loss over all processes."""
        pieces = sequences.split(self.run.micro_batch)
        total = torch.zeros((), device=self.run.device)
        for i, piece in enumerate(pieces):
            if self.run.processes > 1:
                self.trainee.set_requires_gradient_sync(i == len(pieces) - 1)  # type: ignore[operator]
            with torch.autocast(sequences.device.type, torch.bfloat16, enabled=self.run.precision == "bf16"):
                loss = self.trainee(piece)
            (loss / len(pieces)).backward()
            total += loss.detach() / len(pieces)
        if self.run.processes > 1:
            distributed.all_reduce(total)
            total /= self.run.processes
        return total.item()

    def _restore(self) -> int:
        """Reads the rows of the newest checkpoint; returns their number, the steps that are not done again."""
        newest = self._newest()
        if newest is not None:
            self.rows = [Row(**row) for row in json.loads((newest / ROWS).read_text(encoding="utf-8"))]
        return len(self.rows)

    def _newest(self) -> Path | None:
        """The newest checkpoint's folder, or None."""
        found = sorted(path for path in self.folder.glob("step-*") if path.suffix != NEW)
        return found[-1] if found else None

    def _state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The model's parameters and the optimizer's state, by name."""
        named: dict[Any, str] = {parameter: name for name, parameter in self.trainee.model.named_parameters()}
        state = {f"model.{name}": parameter.detach() for parameter, name in named.items()}
        for parameter, values in optimizer.state.items():
            state |= {f"{kind}.{named[parameter]}": value for kind, value in values.items()}
        return state

    def _save(self, optimizer: torch.optim.Optimizer) -> None:
        """Writes a checkpoint, and deletes the one before it when this one is complete."""
        place = self.folder / f"step-{len(self.rows):09}"
        new = place.with_suffix(NEW)
        if self.run.rank == 0:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
            (new / ROWS).write_text(json.dumps([asdict(row) for row in self.rows]), encoding="utf-8")
        self.run.wait()
        writer = HuggingFaceStorageWriter(str(new / TENSORS), save_distributed=True)
        with quiet_python():
            save(self._state(optimizer), storage_writer=writer, no_dist=self.run.processes == 1)
        self.run.wait()
        if self.run.rank == 0:
            before = self._newest()
            publish(new, place)
            if before is not None:
                shutil.rmtree(before)
        self.run.wait()

    def _load(self, optimizer: torch.optim.Optimizer) -> None:
        newest = self._newest()
        assert newest is not None
        fill(optimizer)
        reader = HuggingFaceStorageReader(str(newest / TENSORS))
        with quiet_python():
            load(self._state(optimizer), storage_reader=reader, no_dist=self.run.processes == 1)

    def _agreed(self, mine: bool) -> bool:
        """The first process's answer, for all processes, since all must do the same."""
        if self.run.processes == 1:
            return mine
        found = torch.tensor([mine], device=self.run.device)
        distributed.broadcast(found, 0)
        return bool(found)

    def trained(self) -> Transformer:
        """The trained model on the CPU; of several processes only the first has its weights."""
        model = self.trainee.model
        if self.run.processes == 1:
            return model.cpu()
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        whole = prepare(skeleton(model.config), self.trainee.recipe)
        if self.run.rank == 0:
            whole.load_state_dict(state, assign=True)
        return whole


def join() -> str:
    """Joins the other processes, if torchrun started several; returns the device of this one."""
    number = int(os.environ.get("LOCAL_RANK", "0"))
    device = f"cuda:{number}" if torch.cuda.is_available() else "cpu"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        distributed.init_process_group("nccl" if device != "cpu" else "gloo")
    if device != "cpu":
        torch.cuda.set_device(number)
    return device


def native_precision(device: str) -> Precision:
    """bf16 where the hardware multiplies it, else float32."""
    if device != "cpu":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    cpu: Any = torch.cpu
    return "bf16" if cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported() else "float32"


def shard(trainee: Trainee) -> None:
    """Distributes the weights of model and teacher, block by block, over all processes (FSDP2)."""
    mesh = init_device_mesh(next(trainee.parameters()).device.type, (distributed.get_world_size(),))
    for model in (trainee.model, trainee.teacher):
        for block in model.blocks if model else []:
            fully_shard(block, mesh=mesh)
    fully_shard(trainee, mesh=mesh)


def fill(optimizer: torch.optim.Optimizer) -> None:
    """Creates the optimizer's state, by a step with zero gradients, so that a checkpoint can be read into it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
