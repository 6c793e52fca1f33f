"""Every family, loaded, exported and compared: the table of the README.

    python tests/benchmarks/families.py [FAMILY...]

For each small random model of tests/small_models.py: the largest difference of a logit between lobit's float model and the reference,
relative to the largest logit, and of the XNNPACK artifact under 8da4w-g32 its size and what `lobit parity` says: mean KL in nats a
token against the float model and against the fake-quantized one, over all positions and over those beyond a window.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for `tests`, which is not installed

from lobit import verbs  # noqa: E402
from lobit.checkpoint import load_config, load_model  # noqa: E402
from lobit.quant_recipes.catalog import find_recipe  # noqa: E402
from tests.small_models import FAMILIES, oracle_logits, write_model  # noqa: E402

RECIPE, CONTEXT, CHUNK, THREADS = "8da4w-g32", 64, 24, 1
TOKENS = 320
"""Of the text: five contexts."""
COLUMNS = ("small model", "`model_type`", "adds", "reference", "float error", "file", "KL", "KL of the conversion", "beyond a window")


def float_error(folder: Path, oracle: nn.Module) -> float:
    """The largest difference of a logit from the reference, relative to the largest logit, over a whole context."""
    tokens = torch.tensor(np.random.default_rng(1).integers(0, 256, (4, CONTEXT)))
    expected = oracle_logits(oracle, tokens)
    return float((load_model(folder)(tokens) - expected).abs().max() / expected.abs().max())


def compared(folder: Path, bundle: Path) -> dict[str, Any]:
    """What parity says of the artifact."""
    text = "".join(chr(code) for code in np.random.default_rng(0).integers(32, 127, TOKENS))
    verbs.export(str(folder), "xnnpack", bundle, recipe=find_recipe(RECIPE), context=CONTEXT, chunk=CHUNK)
    return verbs.parity(bundle, str(folder), text, stages=["fake_quant"], threads=THREADS)


def row(name: str) -> Iterator[str]:
    """The cells of one family."""
    small = FAMILIES[name]
    with tempfile.TemporaryDirectory() as place:
        folder, bundle = Path(place) / name, Path(place) / "bundle"
        oracle = write_model(name, folder)
        error, result = float_error(folder, oracle), compared(folder, bundle)
        artifact, wrapped = result["stages"][-1], result["phases"]["wrapped"]
        yield from (name, f"`{load_config(folder).family}`", small.adds, small.reference, f"{error:.0e}")
        yield f"{sum(path.stat().st_size for path in bundle.glob('model.*')) / 1000:.0f} kB"
        yield f"{artifact['kl_mean']:.1e}"
        yield f"{artifact['kl_conversion']:.1e}"
        yield f"{wrapped['kl_conversion']:.1e}" if wrapped else ""


def main() -> None:
    """Prints the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("families", nargs="*", choices=[[], *FAMILIES], metavar="FAMILY")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(THREADS)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name in arguments.families or FAMILIES:
        print(f"| {' | '.join(row(name))} |", flush=True)


if __name__ == "__main__":
    main()
