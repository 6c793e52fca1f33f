"""A client of a bundle for target qnn that reads its manifest and nothing else of lobit: `python qnn_client.py BUNDLE TOKEN... COUNT`.

It prints the most probable next tokens, as an app in any language would choose them.
"""

import ctypes
import importlib.util
import json
import os
import struct
import sys
from pathlib import Path

import numpy as np


def load_emulator():
    """Qualcomm's libraries, which take the place of a phone's."""
    folder = Path(importlib.util.find_spec("onnxruntime_qnn").submodule_search_locations[0])
    places = sorted(Path(f"{folder}.libs").iterdir(), key=lambda path: ("unwind" not in path.name, "abi" not in path.name))
    for path in [*places, folder / "libQnnSystem.so", folder / "libQnnHtp.so"]:
        ctypes.CDLL(str(path))
    from executorch.runtime import Runtime

    return Runtime.get()


class Client:
    def __init__(self, folder, run):
        self.manifest, self.run = json.loads((folder / "manifest.json").read_text()), run
        self.methods = {method["role"]: method for method in self.manifest["methods"]}
        self.inputs = self.manifest["client"]
        self.caches = {state["input"]: np.zeros(state["shape"], state["dtype"]) for state in self.manifest["states"]}
        self.position, self.data = 0, (folder / self.inputs["embedding"]["file"]).read_bytes()
        (size,) = struct.unpack("<Q", self.data[:8])
        self.tensors, self.begin = json.loads(self.data[8 : 8 + size]), 8 + size

    def tensor(self, name):
        told = self.tensors[name]
        dtype = {"U8": np.uint8, "I8": np.int8, "F16": np.float16, "F32": np.float32}[told["dtype"]]
        start, end = (self.begin + offset for offset in told["data_offsets"])
        return np.frombuffer(self.data[start:end], dtype).reshape(told["shape"])

    def embedding(self, token):
        told, row = self.inputs["embedding"], self.tensor("weight")[token]
        if told["bits"] == 4:
            row = np.stack([row & 15, row >> 4], 1).flatten().astype(np.float32) - 8
        if told["bits"] <= 8:
            scale = self.tensor("scale")[token]
            row = (row.astype(np.float32).reshape(len(scale), -1) * scale[:, None]).flatten()
        return row.astype(np.float32) * np.float32(told["factor"])

    def read(self, tokens):
        method = self.methods["decode" if len(tokens) == 1 else "prefill"]
        shapes = {port["name"]: port["shape"] for port in method["inputs"]}
        room = shapes[self.inputs["embedding"]["port"]][1]
        ports = dict(self.caches)
        rows = [self.embedding(token) for token in tokens]
        ports[self.inputs["embedding"]["port"]] = np.stack([*rows, *[np.zeros_like(rows[0])] * (room - len(rows))])[None]
        positions = self.position + np.arange(room)
        for rotary in self.inputs["rotary"]:
            angles = np.outer(positions.astype(np.float32), np.array(rotary["frequencies"], np.float32))[None, :, None]
            ports[rotary["cos"]] = np.cos(angles) * np.float32(rotary["factor"])
            ports[rotary["sin"]] = np.sin(angles) * np.float32(rotary["factor"])
        for mask in self.inputs["masks"]:
            slots = shapes[mask["port"]][3] - room
            held = [max(range(slot, self.position, slots), default=-1) for slot in range(slots)]
            distance = positions[:, None] - np.array([*held, *positions])
            seen = (np.array([*held, *positions]) >= 0) & (distance >= 0) & (distance < (mask["window"] or np.inf))
            ports[mask["port"]] = np.where(seen, 0, mask["hidden"])[None, None]
        if self.inputs["last"] in shapes:
            ports[self.inputs["last"]] = (np.arange(room) == len(tokens) - 1).astype(float)[None, None]
        given = [np.ascontiguousarray(ports[port["name"]], port["dtype"]) for port in method["inputs"]]
        found = dict(zip([port["name"] for port in method["outputs"]], self.run(method["name"], given), strict=True))
        for state in self.manifest["states"]:
            for index in range(len(tokens)):  # the caches have their positions on axis 2
                slot = (self.position + index) % state["shape"][2]
                self.caches[state["input"]][:, :, slot] = found[state["output"]][:, :, index]
        self.position += len(tokens)
        return int(found["logits"][0, -1].argmax())


def main(folder, tokens, count):
    import torch

    program = load_emulator().load_program(folder / "emulated.pte")
    methods = {}

    def run(name, arrays):
        methods[name] = methods.get(name) or program.load_method(name)
        return [tensor.numpy().copy() for tensor in methods[name].execute([torch.from_numpy(array) for array in arrays])]

    client, found = Client(folder, run), []
    found.append(client.read(tokens))
    while len(found) < count:
        found.append(client.read(found[-1:]))
    return found


if __name__ == "__main__":
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the libraries print
    *tokens, count = map(int, sys.argv[2:])
    print(json.dumps(main(Path(sys.argv[1]), tokens, count)), file=answer, flush=True)
