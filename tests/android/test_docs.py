"""The Kotlin that docs/android.md shows compiles against the app's own code, and is no longer than the page says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from lobit.android.artifacts import fetched
from lobit.android.kotlin import compiled, sources

PAGE = Path(__file__).parents[2] / "docs/android.md"


def test_the_example_for_other_apps_compiles(android_tools: Callable[[str], None], tmp_path: Path) -> None:
    android_tools("native")
    (code,) = re.findall(r"```kotlin\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
    (tmp_path / "StoryActivity.kt").write_text(code, encoding="utf-8")
    jars = [path for path in fetched("jvm", "framework", "kotlin") if "compiler" not in path.name]
    compiled("example", [*sources("binding", "core"), tmp_path / "StoryActivity.kt"], jars)
