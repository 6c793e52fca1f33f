"""The app for a phone.

Imports are inside the functions: what a verb does not need is not loaded.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lobit.progress_callback import Progress
from lobit.targets import PHONE, TARGETS, Device

if TYPE_CHECKING:
    from lobit.android.signing import Key
    from lobit.runtime.bundle import Bundle

DEMO, DEMO_RECIPE = "demo", "8da4w-g32"
"""The model inside the app, which is also the name of its bundle, and its recipe."""
TARGET = "xnnpack"
"""The target whose bundles an app that is built here runs; another's library may have more backends."""
PHONE_ALONE = Device(PHONE)
"""The only phone that is connected."""


def build(
    out: Path,
    *,
    x86_64: bool = False,
    bundle: Path | None = None,
    demo: bool = True,
    key: Key | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Builds the app from its sources to a signed and checked APK.

    Args:
        out: the file to write; one that is there is replaced.
        x86_64: whether the app also runs on x86-64, as most emulators of phones do.
        bundle: a bundle for target xnnpack that the app ships; None: the demo model's, if `demo`.
        demo: whether the app ships a bundle where none is given.
        key: what to sign with; None: this machine's debug key.
        progress: called as the work advances.

    Returns:
        What `lobit.android.build.build` returns, with the seconds of the demo model's export among those of the steps.

    Raises:
        BundleError: the bundle is incomplete or changed, or for another target.
        MissingPartError: a program or an artifact is missing, or refuses the sources.
        AppError: a check has found what would fail on a phone; nothing is written.
    """
    from lobit.android.build import Project, check_programs
    from lobit.android.build import build as build_app
    from lobit.verbs.make import choose_recipe, export

    processors = ("arm64", "x86_64") if x86_64 else ("arm64",)
    check_programs()  # what is missing is told before the demo model is exported
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if bundle is None and demo:
            bundle = Path(folder) / DEMO
            export(DEMO, TARGET, bundle, recipe=choose_recipe(DEMO_RECIPE), progress=progress)
        assets = {} if bundle is None else _bundle_files(bundle)
        exported = round(time.perf_counter() - begin, 1)
        result = build_app(out, Project.in_folder(), processors=processors, assets=assets, key=key, progress=progress)
    return result | {"seconds": {"export": exported, **result["seconds"]}}


def install(
    apk: Path | None, bundles: Sequence[Path] = (), *, device: Device = PHONE_ALONE, progress: Progress | None = None
) -> dict[str, Any]:
    """Installs the app on a phone, over an older version of it, and brings bundles into it; what is there already is not sent again.

    Args:
        apk: the app; None: it is there already.
        bundles: the bundles' folders.
        device: the phone; without a serial number, the only one.
        progress: called while bundles are sent.

    Returns:
        `{"phone", "app", "bundles"}`: the phone's name, whether the app was installed, and the names of the bundles there.

    Raises:
        BundleError: a bundle is not as export wrote it, or is for another target.
        InputError: the device is no phone, or not clear.
        LobitError: the phone is gone, refuses the app or has no space.
        MissingPartError: adb is not installed, or the app is not there and none is given.
    """
    from lobit.errors import InputError
    from lobit.runtime import phone
    from lobit.runtime.adb import find_phone

    if device.kind != PHONE:
        raise InputError(f"the app is for a phone, not for device {device}: name one with --device adb:SERIAL, or leave it out")
    opened = [_open_for_app(folder, [name for name, target in TARGETS.items() if PHONE in target.engines]) for folder in bundles]
    found = find_phone(device.detail)
    return {"phone": found.name, "app": apk is not None, "bundles": phone.install(found, apk, opened, progress)}


def _open_for_app(folder: Path, targets: Sequence[str]) -> Bundle:
    """A bundle for one of the targets that the app runs.

    Raises:
        BundleError: the bundle is incomplete or changed, or for another target.
    """
    from lobit.errors import BundleError
    from lobit.runtime.bundle import open_bundle

    opened = open_bundle(folder)
    if opened.manifest.target not in targets:
        told = f"{folder} is for target {opened.manifest.target}, and the app runs {', '.join(targets)}"
        raise BundleError(f"{told}: export the model with --target {TARGET}")
    return opened


def _bundle_files(folder: Path) -> dict[str, Path]:
    """The files that a bundle needs, by their places among the APK's assets.

    Raises:
        BundleError: the bundle is incomplete or changed, or for another target.
    """
    from lobit.runtime.manifest import FILE_NAME

    manifest = _open_for_app(folder, [TARGET]).manifest
    names = [FILE_NAME, *(entry.path for entry in manifest.files)]
    return {f"bundles/{folder.resolve().name}/{name}": folder / name for name in names}
