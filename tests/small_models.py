"""A small random model of every family: all widths divide by 32, every special kind of layer appears, windows end inside of the context.

The folder is written by transformers wherever it has a class; what it computes is the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from tests.oracles import CONTEXT, SMALL, WINDOW, bitnet, bonsai, mobilellm, mobilellm_pro, of_class, trilm

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.25, 1.5, 2.0, 3.0],
    "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
}
"""A head of 16 turns 12 of its entries."""
BITNET = transformers.BitNetConfig(**SMALL, tie_word_embeddings=True)


@dataclass(frozen=True)
class SmallModel:
    """One row of the table of families."""

    adds: str
    """To a plain Llama block."""
    reference: str
    """What says what the model computes."""
    write: Callable[[Path], nn.Module]
    """Makes the folder and gives the oracle."""


FAMILIES: dict[str, SmallModel] = {
    "tinyllama": SmallModel("nothing", "LlamaForCausalLM", of_class(transformers.LlamaConfig(**SMALL))),
    "llama3": SmallModel(
        "llama3 rotary scaling, tied head",
        "LlamaForCausalLM",
        of_class(transformers.LlamaConfig(**SMALL, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE)),
    ),
    "danube3": SmallModel(
        "rotary base 1e5, head size of its own",
        "LlamaForCausalLM",
        of_class(
            transformers.LlamaConfig(
                **{**SMALL, "num_key_value_heads": 4}, head_dim=24, rope_parameters={"rope_type": "default", "rope_theta": 1e5}
            )
        ),
    ),
    "smollm3": SmallModel(
        "every fourth layer without rotary embedding", "SmolLM3ForCausalLM", of_class(transformers.SmolLM3Config(**SMALL))
    ),
    "qwen2": SmallModel(
        "biases on q, k, v", "Qwen2ForCausalLM", of_class(transformers.Qwen2Config(**SMALL, tie_word_embeddings=True))
    ),
    "qwen3": SmallModel(
        "weighted norms of q and k",
        "Qwen3ForCausalLM",
        of_class(transformers.Qwen3Config(**SMALL, head_dim=32, tie_word_embeddings=True)),
    ),
    "mistral": SmallModel(
        "a window on every layer", "MistralForCausalLM", of_class(transformers.MistralConfig(**SMALL, sliding_window=WINDOW))
    ),
    "phi3": SmallModel(
        "fused products, a window on every layer",
        "Phi3ForCausalLM",
        of_class(transformers.Phi3Config(**SMALL, sliding_window=WINDOW)),
    ),
    "phi4": SmallModel(
        "fused products, three quarters of each head turned, longrope",
        "Phi3ForCausalLM",
        of_class(
            transformers.Phi3Config(
                **{**SMALL, "max_position_embeddings": 32 * CONTEXT},
                original_max_position_embeddings=CONTEXT,
                rope_parameters=LONGROPE,
                tie_word_embeddings=True,
            )
        ),
    ),
    "gemma3": SmallModel(
        "norms of 1 + w, also after each part; two rotary bases, windows, scaled embedding, tanh GELU",
        "Gemma3ForCausalLM",
        of_class(
            transformers.Gemma3TextConfig(
                **{**SMALL, "num_hidden_layers": 6, "hidden_size": 96},
                head_dim=32,
                sliding_window=WINDOW,
                query_pre_attn_scalar=24,
            ),
            norm=0.0,
        ),
    ),
    "mobilellm": SmallModel("shared embedding under another name", "LlamaForCausalLM, tied", mobilellm(1)),
    "mobilellm-ls": SmallModel("each block twice in a row", "LlamaForCausalLM, layers copied", mobilellm(2)),
    "mobilellm-r1": SmallModel(
        "interleaved rotary pairs, weightless norms of q and k, Llama 4's names",
        "Llama4ForCausalLM",
        of_class(
            transformers.Llama4TextConfig(
                **{**SMALL, "intermediate_size": 96},
                intermediate_size_mlp=128,
                head_dim=32,
                moe_layers=[],
                no_rope_layers=[1] * 4,
                attn_temperature_tuning=False,
                attention_chunk_size=CONTEXT,
                tie_word_embeddings=True,
                rope_parameters={"rope_type": "default", "rope_theta": 8e6},
            )
        ),
    ),
    "mobilellm-pro": SmallModel(
        "as MobileLLM-R1, and windows on three layers of four", "Llama4ForCausalLM with windows", mobilellm_pro
    ),
    "trilm": SmallModel("ternary values in float16", "LlamaForCausalLM", trilm),
    "bonsai": SmallModel("ternary values, a scale per output channel", "LlamaForCausalLM, linear layers written out", bonsai),
    "bitnet": SmallModel(
        "norms inside of attention and feed-forward, squared ReLU; packed codes times a scale", "BitNetForCausalLM", bitnet(BITNET)
    ),
    "bitnet-masters": SmallModel(
        "as BitNet, float weights rounded on use", "BitNetForCausalLM", bitnet(BITNET, mode="online")
    ),
    "llama-bitnet": SmallModel(
        "packed codes over a scale", "LlamaForCausalLM", bitnet(transformers.LlamaConfig(**SMALL), "bitlinear")
    ),
}


def write_tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens are bytes, so that any text can be read."""
    alphabet = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def write_model(name: str, folder: Path) -> nn.Module:
    """The folder of a family's small model with a tokenizer; gives its oracle."""
    oracle = FAMILIES[name].write(folder)
    write_tokenizer(folder)
    return oracle


def oracle_logits(oracle: nn.Module, tokens: Tensor) -> Tensor:
    """Logits [B, T, V] of tokens [B, T]."""
    with torch.inference_mode():
        return oracle(tokens).logits  # type: ignore[no-any-return]
