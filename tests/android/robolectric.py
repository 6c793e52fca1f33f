"""Runs the app's own tests (`android_demo/app/src/test`) on the JVM: Robolectric stands for Android, with the app's real resources."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Mapping
from pathlib import Path

from lobit.android import notices
from lobit.android.artifacts import SOURCES, fetched
from lobit.android.build import Project, class_jars, compile_classes, compile_resources, framework
from lobit.android.kotlin import compile_command
from lobit.android.shim import shim

FORGET = re.compile(r"^\s+at (org\.junit|java\.base|org\.robolectric|jdk\.internal)", re.MULTILINE)


class Robolectric:
    """The app and its tests, compiled once.

    Args:
        folder: an empty folder to work in.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        project = Project.in_folder(parts=("binding", "core", "app"))
        self.base, generated = compile_resources(project, folder)
        app = compile_classes(project, generated, folder)
        tests = sorted((SOURCES / "app/src/test/kotlin").rglob("*.kt"))
        loader = [SOURCES / "host/src/main/kotlin/dev/lobit/host/Libraries.kt"]
        self.classpath = [folder / "tests", *app, *class_jars("robolectric", folder), framework()]
        (folder / "tests").mkdir()
        subprocess.run(list(map(str, compile_command([*tests, *loader], self.classpath[1:], folder / "tests"))), check=True)
        self._write_properties(project)

    def _write_properties(self, project: Project) -> None:
        """Tells Robolectric where the app's manifest, resources and assets are."""
        with zipfile.ZipFile(self.base, "a") as resources:
            for path in notices.files():
                resources.write(path, f"assets/licences/{path.name}")
        place = self.folder / "tests/com/android/tools/test_config.properties"
        place.parent.mkdir(parents=True)
        told = {
            "android_merged_manifest": project.manifest,
            "android_resource_apk": self.base,
            "android_custom_package": "dev.lobit.demo",
        }
        place.write_text("".join(f"{name}={value}\n" for name, value in told.items()), encoding="utf-8")

    def run(self, name: str, properties: Mapping[str, object], *, native: bool = False) -> None:
        """Runs the tests of a class, with system properties; `native` gives them the phone's library for x86_64.

        Raises:
            AssertionError: a test failed; the message has what JUnit says.
        """
        sdk = self.folder / "sdk"
        if not sdk.is_dir():
            sdk.mkdir()
            for path in fetched("robolectric-sdk"):
                shutil.copy(path, sdk)
        told = {"robolectric.offline": "true", "robolectric.dependency.dir": sdk, "user.home": self.folder, **properties}
        environment = dict(os.environ)
        if native:
            told["lobit.libraries"] = environment["LD_LIBRARY_PATH"] = str(shim("x86_64"))
        words = [f"-D{name}={value}" for name, value in told.items()]
        # Robolectric makes descriptors of files that apps hand to each other.
        java = ["java", "-Xmx2g", "--add-opens=java.base/java.io=ALL-UNNAMED", *words, "-cp", os.pathsep.join(map(str, self.classpath))]
        command = [*java, "org.junit.runner.JUnitCore", f"dev.lobit.demo.{name}"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, errors="replace", check=False)
        lines = [line for line in done.stdout.splitlines() if not FORGET.match(line)]
        (self.folder / f"{name}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
        passed = done.returncode == 0 and re.search(r"^OK \(\d+ tests?\)", done.stdout, re.MULTILINE)
        assert passed, "\n".join(lines[-200:]) + done.stderr[-3000:]
