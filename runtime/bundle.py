"""Reads a bundle: its manifest and its files, with their hashes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lobit.errors import BundleError, listed, shown_name
from lobit.runtime.manifest import FILE_NAME, LARGEST_MANIFEST, Manifest, sha256_of


@dataclass(frozen=True)
class Bundle:
    """A folder that export wrote."""

    folder: Path
    manifest: Manifest

    def path(self, role: str) -> Path:
        """The path of the first file that has a role."""
        return self.folder / self.manifest.file(role).path


def open_bundle(folder: Path | str, hashes: bool = True) -> Bundle:
    """Reads a bundle and checks that its files are those that export wrote.

    Args:
        folder: the bundle.
        hashes: whether the files' sha256 are compared too, not only their presence and size.

    Raises:
        BundleError: the folder is no bundle, or files are missing, are links that leave it or have changed; all of them are named.
    """
    folder = Path(folder)
    path = folder / FILE_NAME
    if not path.is_file():
        raise BundleError(f"{folder} is no bundle, it has no {FILE_NAME}: make one with `lobit export`")
    if path.stat().st_size > LARGEST_MANIFEST:
        raise BundleError(f"{path} has {path.stat().st_size} bytes, at most {LARGEST_MANIFEST} are read: export the bundle again")
    manifest = Manifest.from_json(path.read_bytes())
    problems = [problem for entry in manifest.files if (problem := _problem(folder, entry.path, entry.bytes, entry.sha256, hashes))]
    if problems:
        raise BundleError(listed(problems, f"bundle {folder} is not as export wrote it, export it again:"))
    return Bundle(folder, manifest)


def _problem(folder: Path, name: str, size: int, sha256: str, hashes: bool) -> str | None:
    path = folder / name
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            return f"{name} is a link that leaves the bundle"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if hashes and sha256_of(path) != sha256:
            return f"{name} has changed: its sha256 is not the manifest's"
    except (OSError, RuntimeError) as error:  # links in a circle are a RuntimeError
        return f"{shown_name(name)} cannot be read ({getattr(error, 'strerror', None) or error})"
    return None
