"""The Kotlin that the pages show compiles against the app's own code, and is no longer than a page says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from lobit.android.artifacts import fetched
from lobit.android.kotlin import compiled, sources

PAGES = [Path(__file__).parents[2] / f"docs/{name}.md" for name in ("android", "qnn")]


def test_the_examples_for_other_apps_compile(android_tools: Callable[[str], None], tmp_path: Path) -> None:
    android_tools("native")
    examples = [tmp_path / f"{page.stem}.kt" for page in PAGES]
    for page, example in zip(PAGES, examples, strict=True):
        (code,) = re.findall(r"```kotlin\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        assert len([line for line in code.splitlines() if line.strip()]) <= 40
        example.write_text(code, encoding="utf-8")
    jars = [path for path in fetched("jvm", "framework", "kotlin") if "compiler" not in path.name]
    compiled("example", [*sources("binding", "core"), *examples], jars)
