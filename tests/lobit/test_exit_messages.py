"""Trouble from outside: no space, no rights, no memory. One message, the exit code, nothing half-written."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lobit.errors import LobitError
from lobit.exit_messages import explain
from tests.commands import ENVIRONMENT, MISTAKE, PATIENCE, REPOSITORY, assert_one_message, ended, lobit_command

resource = pytest.importorskip("resource")  # limits are POSIX's

Bundles = Any
Lobit = Callable[..., Any]


# --- space and rights ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path, list[str]], subprocess.CompletedProcess[str]]:
    """`mounted(options, place, command)`: the command with a tmpfs at `place`, that only it sees; what it leaves there ends stdout."""
    script = 'mount -t tmpfs -o "$0" tmpfs "$1" || exit 99; place=$1; shift; "$@"; code=$?; echo "left: $(ls -A "$place")"; exit $code'

    def call(options: str, place: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
        if shutil.which("unshare") is None:
            pytest.skip("there is no unshare")
        done = ended(["unshare", "--map-root-user", "--mount", "sh", "-c", script, options, str(place), *command])
        if done.returncode in (1, 99) and "lobit: " not in done.stderr:
            pytest.skip(f"this process may not mount: {done.stderr.strip()}")
        return done

    return call


def test_a_full_disk_is_one_message_with_the_numbers(mounted: Any, models: Any, tmp_path: Path) -> None:
    command = lobit_command("quantize", models("llama"), "--recipe", "8da4w-g32", "-o", tmp_path / "out")
    done = mounted("size=64k", tmp_path, command)
    assert_one_message(done, str(tmp_path / "out"), "No space left on device", "bytes", "are free there", "-o")
    assert done.stdout.splitlines()[-1] == "left: "


def test_a_place_that_is_read_only_is_one_message(mounted: Any, models: Any, tmp_path: Path) -> None:
    done = mounted("ro", tmp_path, lobit_command("quantize", models("llama"), "--recipe", "8da4w-g32", "-o", tmp_path / "out"))
    assert_one_message(done, str(tmp_path / "out"), "Read-only file system", "choose a place that can be written to")


def test_files_that_may_not_grow_are_one_message_with_the_limit(models: Any, tmp_path: Path) -> None:
    command = lobit_command("quantize", models("llama"), "--recipe", "8da4w-g32", "-o", tmp_path / "out")
    done = ended(command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)))
    assert_one_message(done, "File too large", "a file may have 30000 (ulimit -f)")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="session")
def ordinary() -> list[str]:
    """What makes a command obey the rights of files, also where root runs the tests."""
    if os.geteuid() != 0:
        return []
    prefix = ["setpriv", "--bounding-set=-all"]
    if shutil.which("setpriv") is None or ended([*prefix, sys.executable, "-c", "import lobit.cli"]).returncode:
        pytest.skip("root may do everything, and cannot give that up here")
    return prefix


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A folder that may not be written to."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    yield folder
    folder.chmod(0o755)


def test_a_place_without_the_right_to_write_is_one_message(ordinary: list[str], locked: Path) -> None:
    done = ended([*ordinary, *lobit_command("quantize", "demo", "--recipe", "8da4w-g32", "-o", locked / "out")])
    assert_one_message(done, f"{locked / 'out.partial'} cannot be made (Permission denied)", "choose a place")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_model_without_the_right_to_read_is_one_message(name: str, ordinary: list[str], tmp_path: Path) -> None:
    from lobit.demo import FOLDER

    model = Path(shutil.copytree(FOLDER, tmp_path / "model"))
    (model / name).chmod(0)
    done = ended([*ordinary, *lobit_command("quantize", model, "--recipe", "8da4w-g32", "-o", tmp_path / "out")])
    assert_one_message(done, str(model / name), "Permission denied", "change its rights")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# --- memory -------------------------------------------------------------------------------------------------------------------------

WITH_LITTLE = """
import resource, sys
import lobit.checkpoint, lobit.cli, lobit.memory, lobit.quant_recipes.quantized, lobit.verbs
lobit.memory.LEAST_ADDRESS_SPACE = 0
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + {more},) * 2)
lobit.cli.main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("more", [50 << 20, 300 << 20])
def test_no_memory_left_is_one_message_with_the_numbers(more: int, slow_model: Path, tmp_path: Path) -> None:
    """There is no room for the weights' file of 150 MB, or none for the weights of 300 MB."""
    arguments = ["quantize", slow_model, "--recipe", "8da4w-g32", "-o", tmp_path / "out"]
    done = ended([sys.executable, "-c", WITH_LITTLE.format(more=more), *map(str, arguments)])
    assert_one_message(done, "there is not enough memory", "bytes", "are free", "ulimit -v", "take a smaller model")
    assert not list(tmp_path.iterdir())


def test_a_limit_under_which_nothing_starts_is_one_message(slow_model: Path, tmp_path: Path) -> None:
    command = lobit_command("quantize", slow_model, "--recipe", "8da4w-g32", "-o", tmp_path / "out")
    done = ended(command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30)))
    assert_one_message(done, f"{3 << 30} bytes of address space", f"{4 << 30}", "ulimit -v")
    assert not list(tmp_path.iterdir())


# --- where it happened ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("debug", ["", "1"], ids=["plain", "debug"])
def test_a_traceback_is_shown_where_it_is_asked_for(debug: str, tmp_path: Path) -> None:
    done = subprocess.run(
        lobit_command("quantize", "demo", "--recipe", "fp", "-o", tmp_path / "no" / "folder"),
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, "LOBIT_DEBUG": debug},
        check=False,
    )
    assert done.returncode == MISTAKE
    assert done.stderr.splitlines()[-1].startswith("lobit: "), "the message is the last word"
    assert ("Traceback" in done.stderr and "check_place" in done.stderr) == bool(debug)


# --- streams ------------------------------------------------------------------------------------------------------------------------


def test_a_reader_that_has_enough_is_no_error() -> None:
    process = subprocess.Popen(lobit_command("recipes"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(PATIENCE) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_output_that_cannot_be_written_is_one_message() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(lobit_command("recipes"), stdout=full, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, check=False)
        assert_one_message(done, "the output cannot be written (No space left on device)")
        mute = subprocess.run(lobit_command("recipes", "nope"), stdout=subprocess.PIPE, stderr=full, env=ENVIRONMENT, check=False)
        assert mute.returncode == MISTAKE


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_closed_streams_are_no_error(closed: str) -> None:
    done = ended(["sh", "-c", f'"$@" {closed}', "sh", *lobit_command("recipes")])
    assert done.returncode == 0
    assert done.stderr == ""


def test_output_that_cannot_say_all_characters_is_no_error(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "lobit" / "demo" / "model", tmp_path / "modèle")
    command = lobit_command("quantize", tmp_path / "modèle", "--recipe", "fp", "-o", tmp_path / "après")
    done = subprocess.run(command, capture_output=True, env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}, check=False)
    assert done.returncode == 0, done.stderr
    assert b"checkpoint: " in done.stdout


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    done = ended(lobit_command("quantize", "demo", "--recipe", "fp", "-o", os.fsdecode(bytes(tmp_path / "out") + b"\xff")))
    assert_one_message(done, "is not Unicode")


def test_typed_text_that_is_none_is_one_message(bundles: Bundles, tmp_path: Path, lobit: Lobit, monkeypatch: pytest.MonkeyPatch) -> None:
    from lobit.runtime.manifest import sealed

    folder = Path(shutil.copytree(bundles("stories260k", "fp"), tmp_path / "talking"))
    values = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    values["tokens"]["chat_template"] = "{{ messages[0].content }}"
    (folder / "manifest.json").write_text(sealed(values), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"na\xefve\n"), encoding="utf-8"))
    answer = lobit("run", folder)
    assert answer.code == MISTAKE
    assert "lobit: the input is not UTF-8 text (byte 2 is 0xef)" in answer.err


# --- what is made of an error -------------------------------------------------------------------------------------------------------


def _from(cause: BaseException) -> LobitError:
    """A message that was made of another error."""
    try:
        try:
            raise cause
        except BaseException:
            raise LobitError("it is damaged") from None
    except LobitError as error:
        return error


EXPLAINED: dict[str, tuple[BaseException, int, str]] = {
    "memory": (MemoryError(), 2, "not enough memory: this process has needed"),
    "memory of torch": (RuntimeError("can't allocate memory: you tried to allocate 64 bytes."), 2, "for 64 bytes more"),
    "memory of C++": (RuntimeError("std::bad_alloc"), 2, "not enough memory"),
    "memory of a library": (ImportError("x.so: failed to map segment from shared object"), 2, "not enough memory"),
    "memory of the system": (OSError(errno.ENOMEM, "Cannot allocate memory"), 2, "not enough memory"),
    "memory behind a message": (_from(MemoryError()), 2, "not enough memory"),
    "a message": (_from(ValueError("x")), 2, "it is damaged"),
    "a full disk": (OSError(errno.ENOSPC, "No space left on device", "a/b"), 2, "a/b cannot be written (No space"),
    "no right": (PermissionError(errno.EACCES, "Permission denied", "a/b"), 2, "a/b cannot be used (Permission denied): change its rights"),
    "open files": (OSError(errno.EMFILE, "Too many open files", "a/b"), 2, "ulimit -n"),
    "a broken disk": (OSError(errno.EIO, "Input/output error"), 2, "the output cannot be used (Input/output error)"),
    "no text": (UnicodeDecodeError("utf-8", b"a\xff", 1, 2, "invalid"), 2, "byte 1 is 0xff"),
    "depth": (RecursionError(), 2, "nested too deeply"),
    "Ctrl-C": (KeyboardInterrupt(), 130, "interrupted"),
    "Ctrl-C in C++": (TypeError('failed to unpack with error "KeyboardInterrupt: <EMPTY MESSAGE>'), 130, "interrupted"),
    "an end in C++": (_from(RuntimeError("KeyboardInterrupt: 15")), 143, "interrupted"),
    "an end": (KeyboardInterrupt(signal.SIGTERM), 143, "interrupted"),
}


@pytest.mark.parametrize("name", EXPLAINED)
def test_an_error_from_outside_is_explained(name: str) -> None:
    error, code, part = EXPLAINED[name]
    explained = explain(error)
    assert explained is not None
    assert explained[1] == code and part in explained[0]


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("shapes differ"), KeyError("x"), AssertionError()], ids=repr)
def test_an_error_of_our_own_keeps_its_traceback(error: Exception) -> None:
    assert explain(error) is None
