"""How fast integers are packed and unpacked, beside a plain copy of them.

    python tests/benchmarks/packing.py [--rows N] [--columns N] [--threads N] [--repeats N]

Prints one row per layout: GB/s of int8 integers, of the quickest repeat. All rows take turns, so that a busy machine slows each alike.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lobit.quant_recipes.packing import LAYOUTS, Layout


def random_integers(layout: Layout, rows: int, columns: int) -> Tensor:
    """int8 [rows, columns]."""
    values = torch.arange(layout.lowest, layout.highest + 1, layout.step).to(torch.int8)
    return values[torch.randint(len(values), (rows, columns))]


def contestants(rows: int, columns: int) -> dict[tuple[str, str], Callable[[], Tensor]]:
    """What is timed, by layout and direction; the copy takes new memory too."""
    integers = random_integers(LAYOUTS["nibbles-1"], rows, columns)
    timed: dict[tuple[str, str], Callable[[], Tensor]] = {("copy", ""): integers.clone}
    for name, layout in LAYOUTS.items():
        values = random_integers(layout, rows, columns)
        packed = layout.pack(values)
        timed[name, "pack"] = lambda layout=layout, values=values: layout.pack(values)
        timed[name, "unpack"] = lambda layout=layout, packed=packed: layout.unpack(packed, columns)
    return timed


def quickest(timed: dict[tuple[str, str], Callable[[], Tensor]], repeats: int) -> dict[tuple[str, str], float]:
    """Seconds."""
    best = dict.fromkeys(timed, float("inf"))
    for _ in range(repeats):
        for name, call in timed.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    seconds = quickest(contestants(arguments.rows, arguments.columns), arguments.repeats)
    speed = {name: arguments.rows * arguments.columns / best / 1e9 for name, best in seconds.items()}
    print(f"{'layout':10} {'bits a weight':>13} {'pack GB/s':>10} {'unpack GB/s':>11}")
    for name, layout in LAYOUTS.items():
        print(f"{name:10} {layout.bits_per_weight:13.1f} {speed[name, 'pack']:10.2f} {speed[name, 'unpack']:11.2f}")
    print(f"{'copy':10} {8:13.1f} {speed['copy', '']:10.2f} {speed['copy', '']:11.2f}")


if __name__ == "__main__":
    main()
