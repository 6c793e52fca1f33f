"""Joins the pictures of the app's screens, which `test_app.py` leaves in `.android/pictures`, to `docs/app.png`.

Run it as `python -m tests.android.pictures`.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[2]
SHOWN = ("bundle-phone-light", "chat-phone-light", "bench-phone-light", "chat-phone-dark", "bundle-phone-large")
INCHES, DPI = 1.9, 100


def main() -> None:
    """Writes one row of screens."""
    figure, axes = plt.subplots(1, len(SHOWN), figsize=(INCHES * len(SHOWN), INCHES * 891 / 411))
    for axis, name in zip(axes, SHOWN, strict=True):
        axis.imshow(plt.imread(ROOT / f".android/pictures/{name}.png"))
        axis.axis("off")
    figure.subplots_adjust(0, 0, 1, 1, wspace=0.04)
    figure.savefig(ROOT / "docs/app.png", dpi=DPI)


if __name__ == "__main__":
    main()
