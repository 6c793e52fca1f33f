"""A small Llama as a GGUF file, written by the gguf package."""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from tokenizers import pre_tokenizers

HIDDEN, WIDTH, LAYERS, HEADS, KV_HEADS, CONTEXT = 64, 96, 2, 4, 2, 128
"""Rows are whole blocks of 32."""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "Ġ a", "n d", "Ġa nd"]
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
TEMPLATE = "{% for message in messages %}{{ '<|im_start|>' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
FIELDS: dict[str, Any] = {
    "llama.block_count": LAYERS,
    "llama.context_length": CONTEXT,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": WIDTH,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 100000.0,
    "llama.rope.dimension_count": HIDDEN // HEADS,
    "llama.vocab_size": len(TOKENS),
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)),
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": TEMPLATE,
}
KV_WIDTH = HIDDEN // HEADS * KV_HEADS
LAYER = {
    "attn_norm": (HIDDEN,),
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (KV_WIDTH, HIDDEN),
    "attn_v": (KV_WIDTH, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_norm": (HIDDEN,),
    "ffn_gate": (WIDTH, HIDDEN),
    "ffn_up": (WIDTH, HIDDEN),
    "ffn_down": (HIDDEN, WIDTH),
}
SHAPES: dict[str, tuple[int, ...]] = {
    "token_embd.weight": (len(TOKENS), HIDDEN),
    "output_norm.weight": (HIDDEN,),
    **{f"blk.{layer}.{name}.weight": shape for layer in range(LAYERS) for name, shape in LAYER.items()},
}

MANY = 1 << 62
NUMBERS, TEXTS, ARRAYS = 0, 8, 9
"""GGUF's types of an array's entries: bytes, texts, arrays."""


def header(tensors: int = 0, fields: int = 1, array: int = NUMBERS, entries: int = 0, after: bytes = b"") -> bytes:
    """A file that ends within its header, whatever that says of what follows: 49 bytes, and those after them."""
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + struct.pack("<Q1sIIQ", 1, b"a", ARRAYS, array, entries) + after


ENDLESS = {
    "bytes": header(entries=MANY, after=bytes(12)),
    "texts": header(array=TEXTS, entries=MANY, after=bytes(12)),
    "arrays": header(array=ARRAYS, entries=MANY, after=bytes(12)),
    "arrays in arrays": header(array=ARRAYS, entries=1, after=struct.pack("<IQ", ARRAYS, 1) * 10_000),
    "fields": header(fields=MANY),
    "tensors": header(tensors=MANY),
    "a long name": header(fields=2, after=struct.pack("<Q", MANY)),
    "many axes": header(tensors=1, after=struct.pack("<Q1sI", 1, b"b", 0xFFFFFFFF)),
}
"""Small files that announce more than there is."""


def write_gguf(
    path: Path,
    fields: Mapping[str, Any] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    without: Collection[str] = (),
    architecture: str = "llama",
) -> Path:
    """Writes random weights: the embedding as Q8_0, other matrices as Q4_1, norms as float32.

    Args:
        path: of the file.
        fields: instead of, or besides, `FIELDS`.
        shapes: of tensors, instead of or besides `SHAPES`.
        without: fields and tensors that are left out.
        architecture: that the file names.
    """
    writer, random = GGUFWriter(path, architecture), np.random.default_rng(0)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for name, value in {**FIELDS, **(fields or {})}.items():
        if name not in without:
            add[type(value)](name, value)
    for name, shape in {**SHAPES, **(shapes or {})}.items():
        if name in without:
            continue
        values = random.normal(size=shape).astype(np.float32) / 8 + (len(shape) == 1)
        kind = GGMLQuantizationType.F32
        if len(shape) > 1:
            kind = GGMLQuantizationType.Q8_0 if name == "token_embd.weight" else GGMLQuantizationType.Q4_1
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
