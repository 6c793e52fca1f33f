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


def r8_command(program: str, *arguments: str | Path) -> list[str]:
    """The command that runs one of R8's programs, which knows what Android has.

    Args:
        program: the class that is run, below R8's package.
        arguments: its own.
    """
    libraries = ("--lib", framework(), "--lib", java_library())
    return [*map(str, (*JAVA, "-cp", fetched("dex")[0], f"com.android.tools.r8.{program}", *libraries, *arguments))]
