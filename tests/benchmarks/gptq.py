"""How long GPTQ takes on a model folder, and where the time goes. The text is random tokens: time does not depend on it.

    python tests/benchmarks/gptq.py MODEL [--recipe gptq-w4] [--samples 8] [--length 512] [--threads N] [--act-order] [--group-size N]

Prints the seconds of each stage and tokens per second of this run, and extrapolates nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # lobit need not be installed

import torch  # noqa: E402

from lobit.checkpoint import load_model, resolve  # noqa: E402
from lobit.memory import peak_rss_bytes  # noqa: E402
from lobit.quant_recipes import calibration, gptq  # noqa: E402
from lobit.quant_recipes.catalog import find_recipe  # noqa: E402

STAGES = {
    "_Attention.__call__": "attention",
    "moments": "sums of products (Hessians, drift)",
    "catch_up": "what makes up for the layers before",
    "least_squares_scale": "search for scales",
    "_inverse_factor": "Cholesky factors",
    "round_with_hessian": "rounding, column by column",
    "relative_error": "errors before and after",
}
REST = "linear layers, norms, activations"


class Clock:
    """Seconds of each stage, without those of stages inside of it."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inside = 0.0

    def timed(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        """The function, its time counted under a stage."""

        def run(*args: Any, **kwargs: Any) -> Any:
            before, self._inside, start = self._inside, 0.0, perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                whole = perf_counter() - start
                self.seconds[stage] += whole - self._inside
                self._inside = before + whole

        return run

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Counts the stages of what runs meanwhile."""
        with ExitStack() as stack:
            for name, stage in STAGES.items():
                owner, _, attribute = name.rpartition(".")
                for module in (calibration, gptq):
                    place = getattr(module, owner, None) if owner else module
                    if place is not None and hasattr(place, attribute):
                        stack.enter_context(mock.patch.object(place, attribute, self.timed(getattr(place, attribute), stage)))
            yield


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model")
    parser.add_argument("--recipe", default="gptq-w4")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--group-size", type=int)
    parser.add_argument("--act-order", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, clock = load_model(resolve(arguments.model)), Clock()
    recipe = find_recipe(arguments.recipe).with_changes(group_size=arguments.group_size)
    shape = (arguments.samples, arguments.length)
    sequences = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    with clock.watching():
        clock.timed(calibration.calibrate, REST)(model, recipe, sequences, act_order=arguments.act_order)
    whole = clock.seconds.total()
    print(f"{recipe.name}, {shape[0]} x {shape[1]} tokens, {arguments.threads} threads, products in {str(calibration.PRODUCT)[6:]}")
    for stage, seconds in clock.seconds.most_common():
        print(f"{stage:36} {seconds:8.2f} s {100 * seconds / whole:5.1f} %")
    print(f"{'all':36} {whole:8.2f} s, {sequences.numel() / whole:.0f} tokens/s, peak memory {peak_rss_bytes() / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
