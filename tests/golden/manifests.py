"""Manifests that every reader must take, or refuse for the same reason: `python tests/golden/manifests.py` writes them to `manifests/`.

`expected.json` has the outcome of each: `read`, or one of `version`, `fields`, `path`, `contradiction`, `seal`. They are for whoever
reads bundles in another language.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lobit.runtime.manifest import sealed

FOLDER = Path(__file__).parent / "manifests"
EXPECTED = "expected.json"
DIGESTS = [f"{digit}" * 64 for digit in "0123456789"]


def port(name: str, role: str, shape: list[Any], dtype: str = "float32") -> dict[str, Any]:
    return {"name": name, "role": role, "shape": shape, "dtype": dtype}


def plain() -> dict[str, Any]:
    """A program that keeps its own states."""
    return {
        "name": "story",
        "target": "xnnpack",
        "model": {
            "family": "llama", "parameters": 330_000, "layers": 2, "hidden_size": 64, "vocab_size": 512, "max_context": 256,
            "largest_window": 32,
        },
        "recipe": {"name": "8da4w-g32", "summary": "INT4 in groups of 32 – weights, INT8 inputs"},
        "checkpoint_sha256": DIGESTS[0],
        "context": 128,
        "chunk": 64,
        "threads": 0,
        "options": {},
        "methods": [
            {
                "name": "forward",
                "role": "step",
                "inputs": [port("tokens", "tokens", [1, "1..64"], "int64"), port("input_pos", "position", [1], "int64")],
                "outputs": [port("logits", "logits", [1, 1, 512])],
            }
        ],
        "states": [],
        "cache": {"dtype": "int8", "slots": [128, 32], "value_bytes": 20_480, "scale_bytes": 3_200},
        "tokens": {"bos": 1, "stop": [2], "chat_template": "{{ messages[0]['content'] }} ☺", "special": {"eos_token": "</s>"}},
        "generation": {"temperature": 0.7, "top_k": 40, "top_p": None, "repetition_penalty": None},
        "delegation": {"backend": "XnnpackBackend", "partitions": 9, "delegated": {"linear": 15}, "left": {"aten::embedding.out": 1}},
        "weights": [{"kind": "mlp", "format": "int4 group 32", "parameters": 100_000, "bytes": 56_250}],
        "files": [
            {"path": "model.pte", "role": "program", "bytes": 250_000, "sha256": DIGESTS[1]},
            {"path": "tokenizer.json", "role": "tokenizer", "bytes": 20_000, "sha256": DIGESTS[2]},
        ],
        "versions": {"lobit": "0.1.0", "torch": "2.13.0"},
        "schema_version": "2.0",
    }  # fmt: skip


def with_states() -> dict[str, Any]:
    """A client hands in keys that grow, a window that is written in place, and a state without positions."""
    values = plain() | {"target": "onnx", "options": {"provider": "CPUExecutionProvider", "portable": True}}
    (method,) = values["methods"]
    shapes: dict[str, list[Any]] = {"key": [1, 2, "0..127", 16], "ring": [1, 2, 32, 16], "recurrent": [1, 64, 4]}
    method["inputs"] = [
        port("input_ids", "tokens", [1, "1..64"], "int64"),
        port("position_ids", "positions", [1, "1..64"], "int64"),
        *(port(f"past.{name}", "state", shape) for name, shape in shapes.items()),
    ]
    method["outputs"] += [port(f"present.{name}", "state", shape) for name, shape in shapes.items()]
    kept = {"key": ([1, 2, 128, 16], 2, None, False), "ring": ([1, 2, 32, 16], 2, 32, True), "recurrent": ([1, 64, 4], None, None, False)}
    values["states"] = [
        {
            "input": f"past.{name}",
            "output": f"present.{name}",
            "dtype": "float32",
            "shape": shape,
            "axis": axis,
            "window": window,
            "in_place": in_place,
        }
        for name, (shape, axis, window, in_place) in kept.items()
    ]
    return values


def with_client() -> dict[str, Any]:
    """The client looks up embeddings, gives rotary tables and masks, and keeps the rows that two methods of fixed shapes put out."""
    values = plain() | {"target": "qnn", "options": {"soc": "SM8650"}, "schema_version": "2.1", "chunk": 32}
    caches = {"k.0": 128, "v.0": 128, "k.1": 32, "v.1": 32}
    values["methods"] = [
        {
            "name": name,
            "role": name,
            "inputs": [
                port("embeddings", "client", [1, tokens, 64], "float16"),
                port("cos.0", "client", [1, tokens, 1, 8], "float16"),
                port("sin.0", "client", [1, tokens, 1, 8], "float16"),
                port("mask.0", "client", [1, 1, tokens, 32 + tokens], "float16"),
                port("mask.1", "client", [1, 1, tokens, 128 + tokens], "float16"),
                *([port("last", "client", [1, 1, tokens], "float16")] if tokens > 1 else []),
                *(port(cache, "state", [1, 2, slots, 16], "float16") for cache, slots in caches.items()),
            ],
            "outputs": [
                *(port(f"{cache[0]}_rows{cache[1:]}", "state", [1, 2, tokens, 16], "float16") for cache in caches),
                port("logits", "logits", [1, 1, 512], "float16"),
            ],
        }
        for name, tokens in (("prefill", 32), ("decode", 1))
    ]
    values["states"] = [
        {
            "input": cache,
            "output": f"{cache[0]}_rows{cache[1:]}",
            "dtype": "float16",
            "shape": [1, 2, slots, 16],
            "axis": 2,
            "window": None if slots == 128 else 32,
            "in_place": False,
            "rows": True,
        }
        for cache, slots in caches.items()
    ]
    client = {
        "embedding": {"port": "embeddings", "file": "embedding.safetensors", "bits": 4, "factor": 1},
        "rotary": [{"cos": "cos.0", "sin": "sin.0", "frequencies": [1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003], "factor": 1.0}],
        "masks": [{"port": "mask.0", "window": 32, "hidden": -10000.0}, {"port": "mask.1", "window": None, "hidden": -10000.0}],
        "last": "last",
    }
    values["files"].append({"path": "embedding.safetensors", "role": "embedding", "bytes": 20_000, "sha256": DIGESTS[3]})
    values["delegation"] |= {"read_bytes": {"prefill": 300_000, "decode": 200_000}}
    before = list(values).index("cache")
    return dict([*list(values.items())[:before], ("client", client), *list(values.items())[before:]])


def newer() -> dict[str, Any]:
    """What a later version may write."""
    values = plain() | {"schema_version": "2.7", "client": None, "adapters": []}
    values["model"]["experts"] = 0
    values["delegation"]["read_bytes"] = {}
    return values


def changed(edit: Callable[[dict[str, Any]], Any], make: Callable[[], dict[str, Any]] = plain) -> str:
    values = copy.deepcopy(make())
    edit(values)
    return sealed(values)


CASES: dict[str, tuple[str, str]] = {
    "own-states": ("read", sealed(plain())),
    "handed-states": ("read", sealed(with_states())),
    "client-inputs": ("read", sealed(with_client())),
    "newer-minor": ("read", sealed(newer())),
    "newer-major": ("version", changed(lambda values: values.update(schema_version="3.0"))),
    "older-major": ("version", changed(lambda values: values.update(schema_version=1))),
    "unknown-field": ("fields", changed(lambda values: values.update(surprise=1))),
    "missing-field": ("fields", changed(lambda values: values.pop("context"))),
    "text-for-number": ("fields", changed(lambda values: values.update(chunk="64"))),
    "truth-for-number": ("fields", changed(lambda values: values.update(chunk=True))),
    "path-up": ("path", changed(lambda values: values["files"][0].update(path="../model.pte"))),
    "path-absolute": ("path", changed(lambda values: values["files"][0].update(path="/model.pte"))),
    "path-backslash": ("path", changed(lambda values: values["files"][0].update(path="..\\model.pte"))),
    "file-twice": ("contradiction", changed(lambda values: values["files"].append(values["files"][0]))),
    "stop-outside-vocabulary": ("contradiction", changed(lambda values: values["tokens"].update(stop=[512]))),
    "chunk-over-context": ("contradiction", changed(lambda values: values.update(chunk=129))),
    "cache-of-other-layers": ("contradiction", changed(lambda values: values["cache"].update(slots=[128]))),
    "state-without-port": ("contradiction", changed(lambda values: values["states"][0].update(input="past"), with_states)),
    "state-of-unknown-type": ("contradiction", changed(lambda values: values["states"][0].update(dtype="object"), with_states)),
    "state-axis-outside": ("contradiction", changed(lambda values: values["states"][0].update(axis=4), with_states)),
    "two-methods-of-a-role": ("contradiction", changed(lambda values: values["methods"].append(values["methods"][0]))),
    "client-input-without-port": ("contradiction", changed(lambda values: values["client"]["masks"][0].update(port="mask"), with_client)),
    "embedding-without-file": ("contradiction", changed(lambda values: values["client"]["embedding"].update(file="table"), with_client)),
    "embedding-of-odd-bits": ("contradiction", changed(lambda values: values["client"]["embedding"].update(bits=5), with_client)),
    "client-without-masks": ("fields", changed(lambda values: values["client"].pop("masks"), with_client)),
    "changed-digit": ("seal", sealed(plain()).replace('"threads": 0', '"threads": 1')),
    "other-layout": ("seal", json.dumps(json.loads(sealed(plain())))),
    "windows-line-ends": ("seal", sealed(plain()).replace("\n", "\r\n")),
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, (_, text) in CASES.items():
        (FOLDER / f"{name}.json").write_bytes(text.encode("ascii"))
    outcomes = {f"{name}.json": outcome for name, (outcome, _) in CASES.items()}
    (FOLDER / EXPECTED).write_text(json.dumps(outcomes, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
