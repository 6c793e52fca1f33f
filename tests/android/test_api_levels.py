"""The app runs on the oldest Android that it names: what that one lacks is used behind a look at the phone's API level alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lobit.android import checks
from lobit.android.artifacts import SOURCES
from lobit.android.build import MIN_SDK, Project, compile_classes, compile_dex, compile_resources
from lobit.android.r8 import oldest_framework
from tests.android.test_build import small_app

APP = SOURCES / "app/src/main/kotlin/dev/lobit/demo"
SHOWN = ("service/ServiceActivity.kt", "if (Build.VERSION.SDK_INT >= 27) {")
SOC = ("PhoneProbe.kt", "if (Build.VERSION.SDK_INT >= 31) ")
NEWER = {
    "void android.app.Activity.setShowWhenLocked(boolean)": SHOWN,
    "void android.app.Activity.setTurnScreenOn(boolean)": SHOWN,
    "java.lang.String android.os.Build.SOC_MANUFACTURER": SOC,
    "java.lang.String android.os.Build.SOC_MODEL": SOC,
    "int android.os.PowerManager.getCurrentThermalStatus()": ("PhoneProbe.kt", "if (Build.VERSION.SDK_INT >= 29) "),
}
"""All that the app uses and Android 8.0 lacks, each with the file that uses it and the guard before it."""
MISSING = re.compile(r"Missing \w+ (.+?) \(referenced from: ")


def newer(project: Project, work: Path) -> set[str]:
    """What an app uses that the oldest Android lacks."""
    _, generated = compile_resources(project, work)
    told = checks.unresolved(compile_dex(compile_classes(project, generated, work), work), oldest_framework())
    return {match[1] if (match := MISSING.match(line)) else line for line in told}


@pytest.fixture(autouse=True)
def tools(android_tools: Callable[[str], None]) -> None:
    android_tools("native")
    android_tools("apk")


@pytest.mark.slow
def test_what_the_oldest_android_lacks_is_used_behind_its_guard_alone(tmp_path: Path) -> None:
    assert MIN_SDK == 26, "oldest-framework in artifacts.toml is Android 8.0's"
    assert newer(Project.in_folder(), tmp_path) == set(NEWER)
    for reference, (name, guard) in NEWER.items():
        lines = (APP / name).read_text(encoding="utf-8").splitlines()
        member = re.split(r"[.(]", reference.removesuffix("(boolean)").removesuffix("()"))[-1]
        used = re.compile(rf"\b({member}|{_property(member)})\b")
        places = [number for number, line in enumerate(lines) if used.search(line)]
        assert places and all(any(guard in line for line in lines[number - 3 : number + 1]) for number in places), reference


def _property(getter: str) -> str:
    """The name by which Kotlin calls a getter."""
    plain = getter.removeprefix("get")
    return plain[0].lower() + plain[1:]


@pytest.mark.slow
def test_a_further_reference_that_the_oldest_android_lacks_is_found(tmp_path: Path) -> None:
    """`getLongVersionCode` came with API level 28: it compiles, and would end the app on phones before."""
    word = "packageManager.getPackageInfo(packageName, 0).longVersionCode"
    found = newer(small_app(tmp_path / "sources", word), tmp_path)
    assert found == {"long android.content.pm.PackageInfo.getLongVersionCode()"}
