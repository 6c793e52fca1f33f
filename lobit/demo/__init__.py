"""The demo model: small, trained by this project on stories whose entropy is known exactly, and shipped with it."""

import random
from pathlib import Path

FOLDER = Path(__file__).parent / "model"
"""The shipped model, a Hugging Face folder."""
TERNARY_FOLDER = Path(__file__).parent / "ternary"
"""The same model after further training under recipe `bitnet`: a quantized checkpoint."""

BEGIN, END = "<|begin|>", "<|end|>"
"""The special tokens around each story, ids 0 and 1."""


def held_out_stories(stories: int = 200, seed: int = 0) -> list[str]:
    """Stories that training has not drawn: it seeds its generator otherwise, and repeats are practically impossible."""
    from lobit.demo.story import STORIES

    rng = random.Random(f"held out {seed}")
    return [STORIES.sample(rng).text for _ in range(stories)]


def held_out_text(stories: int = 200, seed: int = 0) -> str:
    """Held-out stories as one text, with the special tokens between them as in training; the tokenizer adds the first."""
    return (END + BEGIN).join(held_out_stories(stories, seed)) + END
