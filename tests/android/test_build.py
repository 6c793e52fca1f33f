"""An APK is signed, can be mapped by phones with large pages, and has the same bytes whenever and wherever it is built."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from lobit.android import apk
from lobit.android.artifacts import SOURCES, cache_folder, fetched
from lobit.android.build import MIN_SDK, TARGET_SDK, Project, build, check_programs, version_code
from lobit.android.checks import AppError
from lobit.android.notices import files
from lobit.android.signing import debug_key, key_of, sign
from lobit.errors import BundleError, InputError, MissingPartError
from lobit.runtime.manifest import FileEntry, Manifest
from lobit.verbs import android as verbs
from tests.commands import assert_one_message, ended, lobit_command

MANIFEST = """<manifest xmlns:android="http://schemas.android.com/apk/res/android" package="dev.lobit.small">
<application android:label="@string/name" android:extractNativeLibs="false">
<activity android:name=".Main" android:exported="true"/></application></manifest>"""
MAIN = """package dev.lobit.small

import android.app.Activity
import android.os.Bundle
import org.pytorch.executorch.NativeLibraries

class Main : Activity() {
    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        NativeLibraries.load()
        title = getString(R.string.name) + WORD
    }
}
"""


def small_app(folder: Path, word: str = '"!"') -> Project:
    """An app with one screen, which shows a word; and the binding, copied, so that its files have other paths and times."""
    main = folder / "app/src/main"
    (main / "res/values").mkdir(parents=True)
    (main / "kotlin").mkdir()
    (main / "AndroidManifest.xml").write_text(MANIFEST, encoding="utf-8")
    (main / "res/values/strings.xml").write_text('<resources><string name="name">small</string></resources>', encoding="utf-8")
    (main / "kotlin/Main.kt").write_text(MAIN.replace("WORD", word), encoding="utf-8")
    shutil.copytree(SOURCES / "binding", folder / "binding", copy_function=shutil.copyfile)
    return Project.in_folder(folder, ("binding", "app"))


@pytest.fixture(scope="module")
def built(android_tools, tmp_path_factory):
    """The small app's APK, built with an asset, and what the build tells of it."""
    android_tools("native")
    android_tools("apk")
    folder = tmp_path_factory.mktemp("built")
    asset = folder / "manifest.json"
    asset.write_text("{}", encoding="ascii")
    result = build(folder / "app.apk", small_app(folder / "sources"), assets={"bundles/none/manifest.json": asset})
    return folder, result


@pytest.mark.slow
def test_an_apk_is_accepted_by_apksigner_and_says_what_it_is(built):
    folder, result = built
    told = subprocess.run(
        ["apksigner", "verify", "--verbose", "--min-sdk-version", "24", folder / "app.apk"], capture_output=True, text=True
    )
    assert told.returncode == 0
    assert "Verified using v2 scheme (APK Signature Scheme v2): true" in told.stdout
    assert "Verified using v3 scheme (APK Signature Scheme v3): true" in told.stdout
    badging = subprocess.run(["aapt2", "dump", "badging", folder / "app.apk"], capture_output=True, text=True).stdout
    assert f"versionCode='{version_code(result['version'])}' versionName='{result['version']}'" in badging
    assert f"sdkVersion:'{MIN_SDK}'" in badging and f"targetSdkVersion:'{TARGET_SDK}'" in badging
    assert "application-debuggable" in badging and "native-code: 'arm64-v8a'" in badging


@pytest.mark.slow
def test_an_apk_has_its_classes_libraries_licences_and_assets_and_nothing_else(built):
    with zipfile.ZipFile(built[0] / "app.apk") as packed:
        names = set(packed.namelist())
    libraries = {f"lib/arm64-v8a/{name}" for name in ("libexecutorch.so", "libfbjni.so", "libc++_shared.so")}
    licences = {f"assets/licences/{path.name}" for path in files()}
    others = {"AndroidManifest.xml", "resources.arsc", "classes.dex", "assets/bundles/none/manifest.json"}
    assert names == libraries | licences | others


@pytest.mark.slow
def test_the_same_sources_give_the_same_bytes_elsewhere_and_later(built, tmp_path, monkeypatch):
    """Everything is compiled again, from copies; only what was fetched and the key are the same."""
    cache = tmp_path / "another cache"
    cache.mkdir()
    (cache / "artifacts").symlink_to(cache_folder() / "artifacts")
    shutil.copy(debug_key().keystore, cache)
    for name, value in {"LOBIT_ANDROID": str(cache), "TZ": "Asia/Kathmandu", "LC_ALL": "C"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    asset = tmp_path / "asset"
    asset.write_text("{}", encoding="ascii")
    umask = os.umask(0o077)
    try:
        build(Path("again.apk"), small_app(tmp_path / "sources"), assets={"bundles/none/manifest.json": asset})
    finally:
        os.umask(umask)
    assert Path("again.apk").read_bytes() == (built[0] / "app.apk").read_bytes()


@pytest.mark.slow
def test_an_app_that_calls_what_android_lacks_is_refused_and_what_was_there_stays(android_tools, tmp_path):
    """Java 9's `readAllBytes` compiles here, where the JDK has it, and would fail on phones up to Android 12."""
    android_tools("native")
    android_tools("apk")
    out = tmp_path / "app.apk"
    out.write_bytes(b"an older one")
    with pytest.raises(AppError, match=r"dex: 1 problems, .*\n  Missing method .*readAllBytes\(\)") as error:
        build(out, small_app(tmp_path / "sources", 'String("!".byteInputStream().readAllBytes())'))
    assert "nothing is written" in str(error.value)
    assert out.read_bytes() == b"an older one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["app.apk", "sources"]


def test_signing_twice_gives_the_same_bytes(android_tools, tmp_path):
    android_tools("native")
    android_tools("apk")
    base = tmp_path / "base.apk"
    _compile_manifest(base, tmp_path)
    certificates = {sign(base, tmp_path / f"{number}.apk", debug_key()) for number in (1, 2)}
    assert (tmp_path / "1.apk").read_bytes() == (tmp_path / "2.apk").read_bytes() != base.read_bytes()
    assert len(certificates) == 1


def test_a_key_of_ones_own_signs(android_tools, tmp_path):
    android_tools("native")
    android_tools("apk")
    base, store, password = tmp_path / "base.apk", tmp_path / "own.p12", tmp_path / "password"
    _compile_manifest(base, tmp_path)
    password.write_text("a long word\n", encoding="ascii")
    make = ["keytool", "-genkeypair", "-keystore", store, "-storetype", "PKCS12", "-alias", "me", "-keyalg", "RSA", "-dname", "CN=me"]
    subprocess.run([*make, "-storepass", "a long word"], check=True, capture_output=True)
    own = sign(base, tmp_path / "own.apk", key_of(store, "me", password))
    assert own != sign(base, tmp_path / "debug.apk", debug_key())


def _compile_manifest(out: Path, folder: Path) -> None:
    """Writes an APK that has only a manifest."""
    manifest = folder / "AndroidManifest.xml"
    manifest.write_text(MANIFEST.replace("@string/name", "small"), encoding="utf-8")
    levels = ["--min-sdk-version", str(MIN_SDK), "--target-sdk-version", str(TARGET_SDK)]
    subprocess.run(
        ["aapt2", "link", *levels, "-I", *fetched("framework"), "--manifest", manifest, "-o", out], check=True, capture_output=True
    )


@pytest.mark.parametrize("length", range(1, 12))
def test_packed_libraries_begin_at_pages_whatever_is_before_them(tmp_path, length):
    entries = {"a" * length: b"x" * length, "lib/one.so": b"1" * 40000, "lib/two.so": b"2", "resources.arsc": b"3"}
    apk.pack(entries, tmp_path / "a.apk")
    assert apk.misaligned(tmp_path / "a.apk") == []
    with zipfile.ZipFile(tmp_path / "a.apk") as packed:
        assert {name: packed.read(name) for name in packed.namelist()} == entries


def test_libraries_that_a_phone_cannot_map_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.apk", "w") as packed:
        packed.writestr("lib/moved.so", b"1")
        packed.writestr("lib/small.so", b"2" * 999, zipfile.ZIP_DEFLATED)
    assert apk.misaligned(tmp_path / "a.apk") == [
        "lib/moved.so begins at byte 42, which is no multiple of 16384",
        "lib/small.so is compressed",
    ]


def test_packing_depends_on_names_and_contents_alone(tmp_path):
    content = tmp_path / "content"
    content.write_bytes(b"2")
    apk.pack({"b": b"2", "a.so": b"1"}, tmp_path / "one.apk")
    apk.pack({"a.so": b"1", "b": content}, tmp_path / "two.apk")
    assert (tmp_path / "one.apk").read_bytes() == (tmp_path / "two.apk").read_bytes()


def test_newer_versions_have_larger_codes():
    versions = ["0.1.0", "0.1.1", "0.2.0", "0.10.0", "1.0.0", "1.0.12"]
    assert sorted(map(version_code, versions)) == list(map(version_code, versions))


def test_one_command_installs_all_missing_programs(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingPartError, match=r"not installed: apt-get install .*openjdk-17-jdk-headless maven npm gcc .*aapt zipalign"):
        check_programs()


def test_an_app_without_a_place_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"nowhere is no folder: make it first, or choose another place with -o"):
        build(tmp_path / "nowhere/app.apk", Project(tmp_path, tmp_path, []))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--bundle", "b", "--no-bundle"], "--bundle b and --no-bundle contradict each other: leave one out"),
        (["--keystore", "k"], "needs all of --keystore, --key-alias and --key-password-file"),
        (["--keystore", "k", "--key-alias", "a", "--key-password-file", "p"], "k is no file: give --keystore"),
    ],
)
def test_options_that_do_not_fit_are_told_before_any_work(options, told):
    assert_one_message(ended(lobit_command("android", "build", *options)), told)


@pytest.fixture
def onnx_bundle(tmp_path):
    """A bundle for target onnx with one file, which the manifest describes as it is."""
    golden = (Path(__file__).parents[1] / "golden/manifests/handed-states.json").read_bytes()
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx/model.onnx").write_bytes(b"a program")
    files = [FileEntry.of(tmp_path / "onnx", "model.onnx", "program")]
    text = dataclasses.replace(Manifest.from_json(golden), files=files).to_json()
    (tmp_path / "onnx/manifest.json").write_text(text, encoding="utf-8")
    return tmp_path / "onnx"


def test_a_bundle_for_another_target_is_refused_before_anything_is_built(onnx_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("lobit.android.build.check_programs", lambda: None)
    with pytest.raises(BundleError, match=r"onnx is for target onnx, and the app runs xnnpack: export the model with --target xnnpack"):
        verbs.build(tmp_path / "app.apk", bundle=onnx_bundle)


@pytest.mark.slow
def test_a_bundle_goes_into_the_app_without_files_that_it_does_not_need(bundles, tmp_path, monkeypatch):
    """What the build gets is seen in place of a build."""
    seen = {}
    monkeypatch.setattr("lobit.android.build.check_programs", lambda: None)
    monkeypatch.setattr("lobit.android.build.build", lambda out, project, **rest: seen.update(rest) or {"seconds": {}})
    bundle = bundles("demo", "8da4w-g32")
    verbs.build(tmp_path / "app.apk", bundle=bundle, x86_64=True)
    names = ("manifest.json", "model.pte", "tokenizer.json", "tokenizer_config.json")
    assert seen["assets"] == {f"bundles/{bundle.name}/{name}": bundle / name for name in names}
    assert seen["processors"] == ("arm64", "x86_64")
