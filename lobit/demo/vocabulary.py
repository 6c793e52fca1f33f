"""The demo model's tokenizer: byte-level BPE learned from the stories."""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from lobit.demo import BEGIN, END
from lobit.demo.story import STORIES

BEGIN_ID, END_ID = 0, 1
"""Special tokens come first in the vocabulary."""


def make_tokenizer(size: int, seed: int, stories: int = 8000) -> Tokenizer:
    """Learns a byte-level BPE of `size` tokens; words are split as in GPT-2, so that none is merged across its edges."""
    rng = random.Random(f"vocabulary {seed}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((STORIES.sample(rng).text for _ in range(stories)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, BEGIN_ID)]
    )
    return tokenizer


def count(tokenizer: Tokenizer, text: str) -> int:
    """The number of tokens of a text, without special ones."""
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json as Hugging Face reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
