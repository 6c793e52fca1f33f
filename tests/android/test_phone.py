"""lobit's app on a phone: how it gets there, the engine over its service, and what is said where one fails."""

import gc
from pathlib import Path

import numpy as np
import pytest

import lobit
from lobit import verbs
from lobit.errors import BundleError, LobitError, MissingPartError
from lobit.runtime.adb import find_phone
from lobit.runtime.bundle import open_bundle
from lobit.runtime.engine import open_engine
from lobit.runtime.phone import PhoneService, install
from lobit.targets import Device
from lobit.verbs import android
from tests.android.phone_bundles import VOCABULARY, content, write_bundle
from tests.runtime.test_bench import CONTEXT, make_bundle

PHONE = Device("adb")


def test_without_the_app_the_message_says_how_it_gets_there(connect, tmp_path):
    connect()
    with pytest.raises(MissingPartError, match=r"lobit's app is not on Pixel 8: `lobit android build` .* `lobit android install`"):
        install(find_phone(None), None, [write_bundle(tmp_path / "story")])


def test_app_and_bundles_are_installed_in_one_call(connect, tmp_path):
    phone, _ = connect()
    apk = tmp_path / "app.apk"
    apk.write_bytes(b"an app")
    folder = write_bundle(tmp_path / "story").folder
    assert android.install(apk, [folder]) == {"phone": "Pixel 8", "app": True, "bundles": ["story"]}
    assert content(phone.bundle("story")) == content(folder)


def test_a_bundle_for_another_target_is_not_installed(tmp_path):
    with pytest.raises(BundleError, match="is for target onnx, and the app runs xnnpack, qnn: export"):
        android.install(None, [make_bundle(tmp_path / "story", "onnx")])


def constant(folder: Path):
    """An engine whose logits tell the tokens and the position."""
    return lambda tokens, position: np.full(VOCABULARY, 100 * position + sum(tokens), ">f4").tobytes()


def test_the_engine_reads_on_the_phone(phone, tmp_path):
    phone.engine = constant
    engine = open_engine(write_bundle(tmp_path / "story"), device=PHONE)
    assert engine.prefill([3, 4])[0] == 7
    assert engine.decode(5)[0] == 205
    assert engine.context == CONTEXT


def test_the_app_and_the_connection_end_with_the_engine(phone, tmp_path, adb_server):
    phone.engine = constant
    engine = open_engine(write_bundle(tmp_path / "story"), device=PHONE)
    assert phone.opened == phone.bundle("story") and "localabstract" in adb_server("forward", "--list")
    del engine
    gc.collect()
    assert phone.opened is None and "localabstract" not in adb_server("forward", "--list")


@pytest.mark.parametrize(("threads", "told"), [(None, False), (3, True)])
def test_the_phone_chooses_its_threads_unless_they_are_told(phone, tmp_path, monkeypatch, threads, told):
    monkeypatch.setattr("lobit.runtime.engine.usable_cores", lambda: 64)
    phone.engine = constant
    open_engine(write_bundle(tmp_path / "story"), threads, PHONE)
    started = next(line for line in phone.commands if line.startswith("am start"))
    assert ("--ei threads 3" in started) == told and "64" not in started


def test_an_app_that_listens_late_is_waited_for(phone, tmp_path):
    phone.engine, phone.late = constant, 3
    assert open_engine(write_bundle(tmp_path / "story"), device=PHONE).decode(1)[0] == 1
    assert phone.late == 0


def test_an_app_that_refuses_a_bundle_says_why(phone, tmp_path):
    with pytest.raises(BundleError, match="the app on Pixel 8 does not run bundle story: it has no engine"):
        open_engine(write_bundle(tmp_path / "story"), device=PHONE).decode(1)


def test_an_app_that_ends_while_it_runs_names_memory(phone, tmp_path):
    phone.crashes = True
    with pytest.raises(LobitError, match="the app on Pixel 8 ended while it ran bundle story, mostly because memory ran out: close"):
        open_engine(write_bundle(tmp_path / "story"), device=PHONE).decode(1)


@pytest.mark.parametrize("version", ["0.0.9", "unknown", None])
def test_an_older_app_is_refused_with_both_versions(phone, tmp_path, version):
    phone.app_version = version
    with pytest.raises(MissingPartError, match=f"too old, its version is {version}, that of lobit {lobit.__version__}: `lobit android"):
        PhoneService(find_phone(None), write_bundle(tmp_path / "story"))


def test_an_app_without_the_service_is_too_old(phone, tmp_path):
    phone.start_answer = "Error type 3\nError: Activity class {dev.lobit.demo/.service.ServiceActivity} does not exist.\n"
    with pytest.raises(MissingPartError, match=r"is too old, it has no dev.lobit.demo/.service.ServiceActivity"):
        PhoneService(find_phone(None), write_bundle(tmp_path / "story"))


@pytest.fixture
def real(phone, android_tools, bundles):
    """A phone on which the app's own library runs the demo model, and the bundle."""
    from lobit.runtime.executorch_android import Server

    android_tools("native")
    phone.engine = lambda folder: Server(open_bundle(folder), 1, Device("emulated-x86_64")).step
    return bundles("demo", "8da4w-g32")


def test_the_story_on_the_phone_is_the_one_of_this_machine(real):
    here, there = (verbs.run(real, "Once", max_new_tokens=20, device=device)["tokens"] for device in (Device("host"), PHONE))
    assert there == here and len(there) == 20


def test_parity_holds_on_the_phone(real, models):
    from lobit.demo import held_out_text

    result = verbs.parity(real, str(models("demo")), held_out_text(2), tokens=100, stages=["artifact"], device=PHONE)
    assert result["passed"] and (result["device"], result["emulated"]) == ("adb", False)
    assert [stage["name"] for stage in result["stages"]] == ["artifact", "adb"]
