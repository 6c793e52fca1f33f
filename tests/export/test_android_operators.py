"""The list of operators that a program may leave outside its delegates on Android."""

from __future__ import annotations

import re
from importlib import resources

import pytest

HEADER, OPERATORS = [], []
for line in resources.files("lobit.export.xnnpack").joinpath("android_operators.txt").read_text(encoding="utf-8").splitlines():
    (HEADER if line.startswith("#") else OPERATORS).append(line)

LANGUAGE_MODEL = (
    "llama::custom_sdpa.out",
    "llama::custom_quantized_sdpa.out",
    "llama::update_cache.out",
    "llama::update_cache_with_indices.out",
    "quantized_decomposed::embedding_2bit.out",
    "quantized_decomposed::embedding_4bit.out",
    "quantized_decomposed::embedding_byte.out",
    "quantized_decomposed::choose_qparams_per_token_asymmetric.out",
    "quantized_decomposed::quantize_per_token.out",
    "quantized_decomposed::dequantize_per_token.out",
)
"""What attention, the cache and the embedding of every recipe need."""


def test_list_is_sorted_and_without_repeats():
    assert sorted(set(OPERATORS)) == OPERATORS


def test_every_line_is_an_operator():
    assert [name for name in OPERATORS if not re.fullmatch(r"\w+::\w+(\.\w+)?", name)] == []


@pytest.mark.parametrize("operator", LANGUAGE_MODEL)
def test_language_models_have_their_operators(operator):
    assert operator in OPERATORS


def test_header_gives_the_number():
    assert f"# Number    {len(OPERATORS)}" in HEADER


def test_header_names_the_package_and_the_hash_of_the_library():
    header = "\n".join(HEADER)
    assert "react-native-executorch 0.9.3" in header
    assert re.search(r"\b[0-9a-f]{64}\b", header)
