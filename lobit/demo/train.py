"""Trains the demo model: `python -m lobit.demo.train --out DIR`.

The same seed, steps and number of threads give the same bytes on the same kind of processor with the same torch; elsewhere
sums are rounded in another order, and the weights come out a little different. The shipped model took 25 minutes on one core.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from lobit.checkpoint import load_model, save_model
from lobit.demo.evaluate import held_out_figures
from lobit.demo.story import STORIES
from lobit.demo.vocabulary import BEGIN_ID, END_ID, make_tokenizer, save_tokenizer
from lobit.families import read_config
from lobit.model import FloatAttention, Transformer

LAYERS = 8
EMBEDDING = "embedding.weight"

CONFIG: dict[str, Any] = {
    "architectures": ["MobileLLMP1ForCausalLM"],
    "model_type": "mobilellm_p1",
    "hidden_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 512,
    "intermediate_size_mlp": 512,
    "vocab_size": 768,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "use_qk_norm": True,
    "layer_types": ["full_attention" if i % 4 == 0 or i == LAYERS - 1 else "sliding_attention" for i in range(LAYERS)],
    "sliding_window": 32,
    "hidden_act": "silu",
    "bos_token_id": BEGIN_ID,
    "eos_token_id": END_ID,
    "torch_dtype": "bfloat16",
}
"""MobileLLM-Pro's architecture in small; every story is several windows long."""


@dataclass(frozen=True)
class Plan:
    """How to train.

    Attributes:
        steps: updates of the weights.
        seed: seeds the initial weights and the stories.
        step_tokens: tokens in one step.
        row_tokens: tokens in a row of most steps; a whole story fits.
        long_row_tokens: tokens in a row of each `long_every`-th step, for the positions up to the end of the context.
        learning_rate: its peak; from there it falls to a hundredth along a cosine.
        warm_up: steps until the peak.
        weight_decay: applies to the matrices other than the embedding.
        clip: the largest norm of the gradient.
    """

    steps: int = 4000
    seed: int = 0
    step_tokens: int = 2048
    row_tokens: int = 256
    long_row_tokens: int = 1024
    long_every: int = 8
    learning_rate: float = 3e-3
    warm_up: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        if step < self.warm_up:
            return self.learning_rate * (step + 1) / self.warm_up
        done = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)

    def row_length(self, step: int) -> int:
        """The tokens in each row of a step."""
        return self.long_row_tokens if step % self.long_every == self.long_every - 1 else self.row_tokens


def rows(tokenizer: Tokenizer, rng: random.Random, count: int, length: int) -> Tensor:
    """Fresh stories [count, length + 1]; each row begins with a story, and the last story in it is cut short."""
    return torch.tensor([_row(tokenizer, rng, length + 1) for _ in range(count)])


def _row(tokenizer: Tokenizer, rng: random.Random, length: int) -> list[int]:
    ids: list[int] = []
    while len(ids) < length:
        story = tokenizer.encode(STORIES.sample(rng).text, add_special_tokens=False).ids
        ids += [BEGIN_ID, *story, END_ID]
    return ids[:length]


def initialise(model: Transformer, seed: int) -> None:
    """Normal weights that keep the size of what they multiply, and attention that begins by copying.

    The grammar treats all names alike, so a model learns late that it can copy one: after most of what else there is to
    learn. Hence the embedding begins large and does not decay, since only chance tells the names apart; attention adds
    values to the stream as they were read (mimetic initialisation, Trockman and Kolter 2023, arXiv:2305.09828, with the
    opposite sign); and standard deviations suit this width (0.02, usual for wide models, is too small).
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if name == EMBEDDING:
            nn.init.normal_(weight, 0.0, 0.25, generator=generator)
        elif weight.ndim == 2:
            depth = 2 * len(model.layers) if name.endswith("mlp.down.weight") else 1
            nn.init.normal_(weight, 0.0, (weight.shape[1] * depth) ** -0.5, generator=generator)
    state, config = model.state_dict(), model.config
    for layer in range(len(model.layers)):
        values = state[f"layers.{layer}.attention.v.weight"].unflatten(0, (config.kv_heads, config.head_dim))
        read = values.repeat_interleave(config.heads // config.kv_heads, 0).flatten(0, 1)
        state[f"layers.{layer}.attention.o.weight"].copy_(0.5 * read.T)


def optimiser(model: Transformer, plan: Plan) -> torch.optim.AdamW:
    """AdamW; the matrices decay, the norms and the embedding do not."""
    decays = {name: weight.ndim == 2 and name != EMBEDDING for name, weight in model.named_parameters()}
    groups = [
        {
            "params": [weight for name, weight in model.named_parameters() if decays[name] == decay],
            "weight_decay": plan.weight_decay if decay else 0.0,
        }
        for decay in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95), fused=True)


def losses(model: Transformer, tokenizer: Tokenizer, plan: Plan) -> Iterator[float]:
    """Trains the model in place; yields each step's loss in nats per token, of the weights before the step."""
    initialise(model, plan.seed)
    optimizer = optimiser(model, plan)
    rng = random.Random(f"training {plan.seed}")
    attend = FloatAttention(model.config)
    for step in range(plan.steps):
        length = plan.row_length(step)
        batch = rows(tokenizer, rng, max(1, plan.step_tokens // length), length)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch[:, :-1], attend=attend)
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        optimizer.step()
        yield loss.item()


def report(step: int, plan: Plan, recent: list[float], seconds: float) -> None:
    """One line of progress on stderr."""
    left = seconds / step * (plan.steps - step) / 60
    mean = sum(recent) / len(recent)
    print(f"step {step}/{plan.steps}  loss {mean:.4f} nats/token  {left:.1f} min left", file=sys.stderr, flush=True)


def train(folder: Path, plan: Plan, every: int = 100, stories: int = 1000) -> dict[str, Any]:
    """Trains and writes the model's folder; returns what is in its training.json.

    Args:
        every: steps between two lines of progress.
        stories: how many fresh ones the written model is measured on.
    """
    tokenizer = make_tokenizer(CONFIG["vocab_size"], plan.seed)
    model = Transformer(read_config(CONFIG))
    start, history = time.monotonic(), list[float]()
    for loss in losses(model, tokenizer, plan):
        history.append(loss)
        if len(history) % every == 0:
            report(len(history), plan, history[-every:], time.monotonic() - start)
    save_model(model, CONFIG, folder)
    save_tokenizer(tokenizer, folder, CONFIG["max_position_embeddings"])
    figures = held_out_figures(load_model(folder), tokenizer, stories)
    record = {
        "seed": plan.seed,
        "steps": plan.steps,
        "threads": torch.get_num_threads(),
        "tokens_seen": plan.steps * plan.step_tokens,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        **figures,
        "torch": torch.__version__,
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m lobit.demo.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    record = train(arguments.out, Plan(steps=arguments.steps, seed=arguments.seed))
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
