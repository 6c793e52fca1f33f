"""The app: its screens on the JVM with a fake runtime, and with the phone's own library for x86_64."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lobit import verbs
from tests.android.robolectric import Robolectric

PROMPT, LENGTH = "Once upon a time", 40
PICTURES = 4 * 5
"""Screens, and the ways in which each is drawn."""


@pytest.fixture(scope="module")
def app(android_tools: Callable[[str], None], tmp_path_factory: pytest.TempPathFactory) -> Robolectric:
    android_tools("native")
    android_tools("apk")
    return Robolectric(tmp_path_factory.mktemp("robolectric"))


@pytest.fixture(scope="module")
def demo(bundles: Any) -> Path:
    return bundles("demo", "8da4w-g32")


@pytest.mark.slow
def test_every_screen_does_what_it_says(app: Robolectric, demo: Path) -> None:
    app.run("ScreensTest", {"lobit.bundle": demo})


@pytest.mark.slow
def test_bundles_come_into_the_app_whole_or_not_at_all(app: Robolectric, demo: Path) -> None:
    app.run("BundlesTest", {"lobit.bundle": demo})


@pytest.mark.slow
def test_a_folder_comes_into_the_app_whole_or_not_at_all(app: Robolectric, demo: Path) -> None:
    app.run("FolderTest", {"lobit.bundle": demo})


@pytest.mark.slow
def test_what_takes_long_can_be_cancelled(app: Robolectric, demo: Path) -> None:
    app.run("CancelTest", {"lobit.bundle": demo})


@pytest.mark.slow
def test_the_service_serves_adb_alone(app: Robolectric, demo: Path) -> None:
    app.run("ServiceTest", {"lobit.bundle": demo})


@pytest.mark.slow
def test_the_app_writes_the_story_that_lobit_writes(app: Robolectric, bundles: Any) -> None:
    """stories260k in floats: greedy text of INT8 activations may fork where another processor rounds an input to another step."""
    story = bundles("stories260k", "fp")
    expected = verbs.run(story, PROMPT, max_new_tokens=LENGTH)["text"]
    app.run("StoryTest", {"lobit.story": story, "lobit.expected": expected, "lobit.length": LENGTH}, native=True)


@pytest.mark.slow
def test_the_screens_are_drawn_light_dark_large_and_on_a_tablet(app: Robolectric, demo: Path, tmp_path: Path) -> None:
    app.run("PicturesTest", {"lobit.story": demo, "lobit.pictures": tmp_path}, native=True)
    assert len(list(tmp_path.glob("*.png"))) == PICTURES
    if (kept := Path(__file__).parents[2] / ".android").is_dir():
        shutil.copytree(tmp_path, kept / "pictures", dirs_exist_ok=True)
