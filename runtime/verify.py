"""`lobit verify`: reads the integers and scales of an artifact back and compares each with the checkpoint's."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lobit.errors import BundleError
from lobit.runtime.bundle import Bundle
from lobit.runtime.stored import StoredLayer, read_program


def verify(
    bundle: Bundle, checkpoint: Sequence[StoredLayer], vectors: Sequence[StoredLayer], fingerprint: str | None = None
) -> dict[str, Any]:
    """Compares every integer and every scale with the checkpoint's, and float layers, norms and biases value for value.

    Args:
        bundle: the artifact.
        checkpoint: the checkpoint's layers in the order of execution (`reference.stored_layers`).
        vectors: the checkpoint's norms and biases (`reference.stored_vectors`).
        fingerprint: the checkpoint's digest, which must be the manifest's; None: it is not compared.

    Returns:
        `{"kind", "bundle", "tensors", "integers", "differing_integers", "scales", "differing_scales", "floats",
        "differing_floats", "checkpoint_matches", "layers": [...], "passed"}`.

    Raises:
        BundleError: the program does not have the checkpoint's layers.
    """
    program = read_program(bundle)
    pairs = itertools.chain(paired(program.layers(), checkpoint), paired(program.vectors(), vectors))
    rows = [compare(part, values, scale) for part, values, scale in pairs]
    return summary(bundle, rows, fingerprint)


def paired(
    program: Iterator[StoredLayer], checkpoint: Sequence[StoredLayer]
) -> Iterator[tuple[StoredLayer, NDArray[Any], NDArray[np.float32] | None]]:
    """Yields each layer of a checkpoint with the values and scales that a program has in its place.

    Raises:
        BundleError: the program does not have the checkpoint's layers.
    """
    expected = list(checkpoint)
    position = 0
    for stored in program:
        taken = 0
        while taken < stored.values.shape[0]:
            if position == len(expected):
                raise BundleError(f"{stored.name} has more weights than the checkpoint: is it this bundle's checkpoint?")
            part = expected[position]
            if part.values.shape[1:] != stored.values.shape[1:] or taken + part.values.shape[0] > stored.values.shape[0]:
                raise BundleError(
                    f"{stored.name} {stored.values.shape} stands where the checkpoint has {part.name} {part.values.shape}: "
                    "is it this bundle's checkpoint?"
                )
            cut = slice(taken, taken + part.values.shape[0])
            yield part, stored.values[cut], None if stored.scale is None else stored.scale[cut]
            taken += part.values.shape[0]
            position += 1
    if position < len(expected):
        raise BundleError(f"the program lacks {', '.join(layer.name for layer in expected[position:])}: export it again")


def compare(part: StoredLayer, values: NDArray[Any], scale: NDArray[np.float32] | None) -> dict[str, Any]:
    """One layer's row of the result: the checkpoint's values beside those that a program has in their place."""
    row: dict[str, Any] = dict.fromkeys(
        ("integers", "differing_integers", "scales", "differing_scales", "floats", "differing_floats"), 0
    )
    row["name"] = part.name
    kind = "integers" if part.scale is not None else "floats"
    row[kind] = part.values.size
    # A target that keeps floats in half precision has the checkpoint's rounded to it.
    expected = part.values.astype(values.dtype) if values.dtype == np.float16 and kind == "floats" else part.values
    same_kind = expected.dtype == values.dtype
    row[f"differing_{kind}"] = int(np.count_nonzero(_bits(expected) != _bits(values))) if same_kind else part.values.size
    if part.scale is not None:
        row["scales"] = part.scale.size
        row["differing_scales"] = part.scale.size if scale is None else _differing(part.scale, scale)
    return row


def _bits(values: NDArray[Any]) -> NDArray[Any]:
    """The values' bits as whole numbers: as floats -0.0 would be 0.0, and NaN not itself."""
    array = np.ascontiguousarray(values)
    return array.view(f"u{array.itemsize}")


def _differing(expected: NDArray[np.float32], found: NDArray[np.float32]) -> int:
    """Number of scales [out, groups] that differ from the checkpoint's; a runtime may hold each of them several times, side by side."""
    rows, groups = expected.shape
    if len(found) != rows or found.shape[1] % groups:
        return expected.size
    return int(np.count_nonzero((_bits(found).reshape(rows, groups, -1) != _bits(expected)[:, :, None]).any(axis=2)))


def summary(bundle: Bundle, rows: list[dict[str, Any]], fingerprint: str | None) -> dict[str, Any]:
    """The result of `lobit verify` from the rows of its layers."""
    counts = {name: sum(row[name] for row in rows) for name in rows[0] if name != "name"}
    manifest = bundle.manifest
    differing = sum(count for name, count in counts.items() if name.startswith("differing"))
    matches = None if fingerprint is None else fingerprint == manifest.checkpoint_sha256
    return {
        "kind": "verify",
        "bundle": {"name": manifest.name, "target": manifest.target, "recipe": manifest.recipe["name"]},
        "tensors": len(rows),
        **counts,
        "checkpoint_matches": matches,
        "layers": rows,
        "passed": differing == 0 and matches is not False,
    }
