"""Commands of lobit in processes of their own, and a model that keeps one busy for some seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
MISTAKE, PATIENCE = 2, 120
"""Seconds until a process that should end has hung."""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}


def lobit_command(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "lobit.cli", *map(str, arguments)]


def ended(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd="/", check=False, timeout=PATIENCE, **options)


def assert_one_message(done: subprocess.CompletedProcess[str], *parts: str, code: int = MISTAKE) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    begins = [line for line in done.stderr.splitlines() if line.startswith("lobit: ")]
    assert len(begins) == 1, done.stderr
    message = done.stderr[done.stderr.index(begins[0]) :]
    for part in parts:
        assert part in message


def write_zeros(folder: Path, vocabulary: int = 1 << 16, width: int = 1024) -> Path:
    """A model of 75 million parameters, all zero: the file takes no space, and quantizing it some seconds."""
    values = {"model_type": "llama", "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1}
    values |= {"num_attention_heads": 8, "max_position_embeddings": 128, "tie_word_embeddings": True}
    layer, square = "model.layers.0.", [width, width]
    shapes = {"model.embed_tokens.weight": [vocabulary, width], "model.norm.weight": [width]}
    shapes |= {f"{layer}{norm}_layernorm.weight": [width] for norm in ("input", "post_attention")}
    shapes |= {f"{layer}self_attn.{part}_proj.weight": square for part in "qkvo"}
    shapes |= {f"{layer}mlp.{part}_proj.weight": square for part in ("gate", "up", "down")}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape[0] * (shape[1] if shape[1:] else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    (folder / "config.json").write_text(json.dumps(values))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder
