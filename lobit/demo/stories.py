"""Stories of the demo's grammar as a training text: `python -m lobit.demo.stories > stories.txt`."""

import argparse
import random

from lobit.demo import BEGIN, END
from lobit.demo.story import STORIES


def training_text(stories: int, seed: int) -> str:
    """Fresh stories as one text, with the special tokens between them; the tokenizer adds the first."""
    rng = random.Random(f"training text {seed}")
    return (END + BEGIN).join(STORIES.sample(rng).text for _ in range(stories)) + END


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m lobit.demo.stories", description=__doc__)
    parser.add_argument("--stories", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(training_text(arguments.stories, arguments.seed))


if __name__ == "__main__":
    main()
