"""Commands that run R8's programs."""

from __future__ import annotations

from pathlib import Path

from lobit.android.artifacts import fetched
from lobit.android.java_library import java_library

JAVA = ("java", "-Xmx2g", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")
"""The programs run for seconds: the JVM's optimizing compiler and parallel collector would cost more than they gain."""


def framework() -> Path:
    """The jar with Android's classes and resources."""
    return fetched("framework")[0]


def oldest_framework() -> Path:
    """The jar with the classes of the oldest Android that the app runs on."""
    return fetched("oldest-framework")[0]


def r8_command(program: str, *arguments: str | Path, android: Path | None = None) -> list[str]:
    """The command that runs one of R8's programs, which knows what Android has.

    Args:
        program: the class that is run, below R8's package.
        arguments: its own.
        android: a jar with the classes of another Android than `framework`.
    """
    libraries = ("--lib", android or framework(), "--lib", java_library())
    return [*map(str, (*JAVA, "-cp", fetched("dex")[0], f"com.android.tools.r8.{program}", *libraries, *arguments))]
