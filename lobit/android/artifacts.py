"""Fetches what Android work needs from package registries, each file checked against the sha256 in `android_demo/artifacts.toml`."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import lobit
from lobit.errors import MissingPartError, listed
from lobit.runtime.manifest import sha256_of
from lobit.user_cache import user_cache

SOURCES = Path(lobit.__file__).parent / "android_demo"
"""The app's sources and the list of artifacts."""
PLUGIN = "org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy-dependencies"
"""Maven's plugin that puts artifacts into a folder."""
POM = """<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>
<groupId>lobit</groupId><artifactId>artifacts</artifactId><version>1</version><dependencies>
{}
</dependencies></project>
"""
DEPENDENCY = """<dependency><groupId>{}</groupId><artifactId>{}</artifactId><version>{}</version><type>{}</type>
<exclusions><exclusion><groupId>*</groupId><artifactId>*</artifactId></exclusion></exclusions></dependency>"""


def cache_folder() -> Path:
    """The folder that keeps what was fetched and compiled: LOBIT_ANDROID, or lobit's part of the user's cache."""
    told = os.environ.get("LOBIT_ANDROID")
    return Path(told).resolve() if told else user_cache("android")


@dataclass(frozen=True)
class Artifact:
    """A file of a registry."""

    registry: str
    """`maven` or `npm`."""
    name: str
    """`group:artifact`, or the name of an npm package."""
    version: str
    type: str
    """Its suffix: `jar`, `aar`, `tgz`."""
    sha256: str
    uses: tuple[str, ...]
    """What it is needed for; the file tells which there are."""

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{self.name.rpartition(':')[2]}-{self.version}.{self.type}"


@lru_cache
def _listed() -> dict[str, Any]:
    return tomllib.loads((SOURCES / "artifacts.toml").read_text(encoding="utf-8"))


def artifacts() -> list[Artifact]:
    """All artifacts, in the order of the file."""
    found = [
        Artifact("npm", entry["name"], entry["version"], "tgz", entry["sha256"], tuple(entry["uses"])) for entry in _listed()["npm"]
    ]
    for entry in _listed()["maven"]:
        group, name, version, kind = f"{entry['artifact']}:jar".split(":")[:4]
        found.append(Artifact("maven", f"{group}:{name}", version, kind, entry["sha256"], tuple(entry["uses"])))
    return found


@dataclass(frozen=True)
class Program:
    """A program of Debian's."""

    name: str
    packages: str
    """The Debian packages to install for it, with spaces between them."""
    use: str
    """`native`, `arm64`, `apk` or `adb`; the file tells what each is."""


def programs() -> list[Program]:
    """All programs, in the order of the file."""
    return [Program(**entry) for entry in _listed()["program"]]


def missing_programs(*uses: str) -> list[Program]:
    """The programs for the given uses, or for all where none is given, that are not installed."""
    return [program for program in programs() if program.use in (uses or (program.use,)) and shutil.which(program.name) is None]


def install_command(missing: Sequence[Program]) -> str:
    """The command that installs programs."""
    packages = dict.fromkeys(name for program in missing for name in program.packages.split())
    return f"apt-get install --no-install-recommends {' '.join(packages)}"


def arm64_packages() -> list[str]:
    """Names of the Debian packages that the emulated arm64 process runs on."""
    return list(_listed()["arm64-root"]["packages"])


def fetched(*uses: str) -> list[Path]:
    """The files of all artifacts for the given uses; those that are not in the cache yet are fetched and checked.

    Raises:
        MissingPartError: a program that fetches is missing, a registry does not answer, or a file is not the listed one.
    """
    folder = cache_folder() / "artifacts"
    wanted = [artifact for artifact in artifacts() if set(uses) & set(artifact.uses)]
    missing = [artifact for artifact in wanted if not (folder / artifact.file).is_file()]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        new = Path(name)
        _from_maven([artifact for artifact in missing if artifact.registry == "maven"], new)
        for artifact in missing:
            if artifact.registry == "npm":
                run(["npm", "pack", "--silent", f"{artifact.name}@{artifact.version}"], cwd=new)
        wrong = [artifact.file for artifact in missing if sha256_of(new / artifact.file) != artifact.sha256]
        if wrong:
            raise MissingPartError(listed(wrong, "these files of package registries are not the ones that artifacts.toml lists, not used:"))
        for artifact in missing:
            (new / artifact.file).replace(folder / artifact.file)
    return [folder / artifact.file for artifact in wanted]


def _from_maven(missing: Sequence[Artifact], folder: Path) -> None:
    if missing:
        entries = (DEPENDENCY.format(*artifact.name.split(":"), artifact.version, artifact.type) for artifact in missing)
        (folder / "pom.xml").write_text(POM.format("\n".join(entries)), encoding="utf-8")
        repository = f"-Dmaven.repo.local={folder / 'repository'}"
        run(["mvn", "-q", "-B", repository, "-f", "pom.xml", PLUGIN, f"-DoutputDirectory={folder}"], cwd=folder)


def run(command: Sequence[str | Path], **options: Any) -> str:
    """Runs a program and returns what it prints.

    Raises:
        MissingPartError: the program is not installed, or fails; the message has the end of what it said.
    """
    if shutil.which(str(command[0])) is None:
        raise MissingPartError(f"{command[0]} is not installed: `lobit doctor android` says how to install it")
    words = [*map(str, command)]
    done: subprocess.CompletedProcess[str] = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False, **options)
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()][-8:]
        raise MissingPartError(listed(said, f"{command[0]} failed with exit code {done.returncode}:"))
    return done.stdout


def unpacked(archive: Path, members: Iterable[str], folder: Path) -> None:
    """Unpacks members of a zip or tgz file, without their folders, into a folder.

    Raises:
        MissingPartError: the archive lacks one of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if archive.suffix == ".tgz":
            with tarfile.open(archive) as tar:
                for member in members:
                    file = tar.extractfile(member)
                    assert file is not None
                    (folder / Path(member).name).write_bytes(file.read())
        else:
            with zipfile.ZipFile(archive) as packed:
                for member in members:
                    (folder / Path(member).name).write_bytes(packed.read(member))
    except KeyError as error:
        raise MissingPartError(f"{archive.name} lacks {error}: artifacts.toml lists another version than this lobit knows") from None
