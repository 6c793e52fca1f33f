"""The benchmark on a phone, with recorded rows: its result, its table, its place in a report, and its commands."""

import io
import json
import os
import re
import subprocess
from typing import Any

import pytest
from rich.console import Console

from lobit import verbs
from lobit.errors import InputError, LobitError, MissingPartError
from lobit.runtime.bench_phone import Pace
from lobit.targets import Device
from tests.android.phone_bundles import write_bundle
from tests.commands import ENVIRONMENT, PATIENCE, assert_one_message, lobit_command
from tests.runtime.test_bench import make_bundle

PHONE = Device("adb")


def state(celsius: float | None, status: int | None) -> dict[str, Any]:
    return {"battery_celsius": celsius, "battery_percent": 80, "thermal_status": status, "frequencies_khz": [1_803_000, None]}


def recorded_row(phase: str, tokens: int, depth: int = 0) -> dict[str, Any]:
    return {
        "phase": phase,
        "tokens": tokens,
        "depth": depth,
        "samples_ns": [1_000_000, 2_000_000],
        "first_token_ns": [1_500_000, 2_500_000] if phase == "pp" else None,
        "load_seconds": 0.5,
        "base_rss_bytes": 90_000_000,
        "peak_rss_bytes": 120_000_000,
        "before": state(31.0, 0),
        "after": state(34.5, 1),
    }


@pytest.fixture
def benched(phone):
    """A phone that has a bench's answer to give."""
    phone.bench_answer["rows"] = [recorded_row("pp", 8), recorded_row("tg", 4, 10)]
    phone.bench_answer["skipped"] = [{"test": "pp60@d10", "why": "70 tokens are more than the context of 64"}]
    phone.bench_answer["sustained"] = {"seconds": 20, "samples": [[float(i), 20.0 - i / 2] for i in range(20)]}
    return phone


def table(result: dict[str, Any]) -> str:
    from lobit import tables

    console = Console(file=io.StringIO(), width=220)
    console.print(tables.bench(result))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_rows_of_a_phone_have_the_figures_of_this_machines_and_its_temperature(benched, tmp_path):
    folder = write_bundle(tmp_path / "story").folder
    result = verbs.bench([folder], prompts=[8, 60], generates=[4], depths=[0, 10], repetitions=2, device=PHONE)
    prompt, generated = result["rows"]
    assert (prompt["test"], prompt["tokens_per_second"], prompt["first_token_ms"]) == ("pp8", 6000, 2.0)
    assert (generated["test"], generated["model"], generated["threads"]) == ("tg4@d10", "story", None)
    assert generated["gigabytes_per_second"] > 0 and generated["bandwidth_share"] is None
    assert (prompt["before"]["battery_celsius"], prompt["after"]["thermal_status"]) == (31.0, 1)
    assert result["device"] == "phone: Google Pixel 8 (Android 15, Tensor G3, 9 cores)"
    assert result["skipped"] == [{"model": "story", "test": "pp60@d10", "why": "70 tokens are more than the context of 64"}]
    assert json.loads(json.dumps(result)) == result


def test_the_phone_is_asked_for_what_the_options_say(benched, tmp_path):
    folder = write_bundle(tmp_path / "story").folder
    tests = {"prompts": [8], "generates": [4], "depths": [0, 10]}
    verbs.bench([folder], **tests, threads=4, repetitions=3, device=PHONE, pace=Pace(30, 35.5, 600))
    asked = {"repetitions": 3, "threads": 4, "rest_seconds": 30, "cool_celsius": 35.5, "sustained_seconds": 600}
    assert benched.requests == [{**tests, **asked}]


def test_the_table_shows_temperature_thermal_status_and_drift(benched, tmp_path):
    text = table(verbs.bench([write_bundle(tmp_path / "story").folder], device=PHONE))
    assert text.count("31.0 → 34.5 °C") == text.count("none → light") == 2
    assert "sustained: story 19.75 t/s at first, 10.75 t/s after 20 s" in text
    assert "left out: story pp60@d10" in text and "memory bandwidth" not in text


def test_a_phone_that_tells_no_temperature_has_empty_cells(benched, tmp_path):
    unknown = {"before": state(None, None), "after": state(None, None)}
    benched.bench_answer["rows"] = [{**recorded_row("pp", 8), **unknown}]
    text = table(verbs.bench([write_bundle(tmp_path / "story").folder], device=PHONE))
    assert "°C" not in text and "none" not in text and "6000.00" in text


def test_two_bundles_are_measured_one_after_the_other(benched, tmp_path):
    folders = [write_bundle(tmp_path / name).folder for name in ("story", "novel")]
    seen: list[tuple[str, int, int]] = []
    result = verbs.bench(folders, device=PHONE, progress=lambda *entry: seen.append(entry))
    assert [row["model"] for row in result["rows"]] == ["story", "story", "novel", "novel"]
    assert [entry for entry in seen if re.search(" (pp|tg)", entry[0])] == [
        ("story pp8", 0, 4), ("story tg4", 1, 4), ("novel pp8", 2, 4), ("novel tg4", 3, 4),
    ]  # fmt: skip


def test_the_report_draws_a_phones_drift(benched, tmp_path):
    result = tmp_path / "bench.json"
    result.write_text(json.dumps(verbs.bench([write_bundle(tmp_path / "story").folder], device=PHONE)))
    page = verbs.report([result], tmp_path / "report.html").read_text()
    assert 'aria-label="Tokens a second over time"' in page and "seconds of decoding without a pause" in page


def test_a_phone_lost_in_the_middle_of_a_bench_is_one_message(benched, tmp_path):
    benched.lost_in_bench = True
    with pytest.raises(LobitError, match=r"Pixel 8 .* was lost in the middle: plug it in again and repeat the command"):
        verbs.bench([write_bundle(tmp_path / "story").folder], device=PHONE)


def test_an_answer_that_is_not_known_names_the_app(benched, tmp_path):
    del benched.bench_answer["rows"][0]["samples_ns"]
    with pytest.raises(MissingPartError, match=r"the app on Pixel 8 answers what this lobit does not know .*samples_ns"):
        verbs.bench([write_bundle(tmp_path / "story").folder], device=PHONE)


def test_the_library_for_x86_is_never_timed(tmp_path):
    """On emulated-arm64 instructions are counted, which test_engines.py tests."""
    with pytest.raises(InputError, match="how long it takes on emulated-x86_64 says nothing of a phone"):
        verbs.bench([make_bundle(tmp_path / "a")], device=Device("emulated-x86_64"))


@pytest.mark.parametrize("device", ["host", "emulated-arm64"])
def test_resting_is_for_phones(tmp_path, device):
    with pytest.raises(InputError, match="are for a phone"):
        verbs.bench([make_bundle(tmp_path / "a")], device=Device(device), pace=Pace(rest=5))


@pytest.mark.parametrize("wrong", [{"threads": 0}, {"repetitions": 0}, {"prompts": [0]}, {"depths": [-1]}, {"bundles": []}], ids=str)
def test_numbers_out_of_range_are_refused_before_a_phone_is_looked_for(tmp_path, monkeypatch, wrong):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError):
        verbs.bench(**{"bundles": [write_bundle(tmp_path / "a").folder], "device": PHONE, **wrong})


def command(*words: Any) -> subprocess.CompletedProcess[str]:
    """A command of lobit's in a process of its own, with the adb server of these tests."""
    environment = {**os.environ, "PYTHONPATH": ENVIRONMENT["PYTHONPATH"]}
    return subprocess.run(lobit_command(*words), env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE)


def test_the_commands_install_and_measure(benched, tmp_path):
    folder, apk = write_bundle(tmp_path / "story").folder, tmp_path / "app.apk"
    apk.write_bytes(b"an app")
    installed = command("android", "install", apk, folder)
    assert installed.stdout == f"on Pixel 8: the app, story\nnext:   lobit bench {folder} --device adb\n", installed.stderr
    benched.pushed.clear()
    measured = command("bench", folder, "--device", "adb", "-p", "8", "-n", "4", "--sustained", "20", "--cool", "35")
    assert measured.returncode == 0 and "31.0 → 34.5 °C" in measured.stdout, measured.stderr
    assert benched.pushed == [] and benched.requests[0]["sustained_seconds"] == 20


def test_a_command_without_a_phone_ends_in_one_message(adb_server, tmp_path):
    assert_one_message(command("bench", write_bundle(tmp_path / "story").folder, "--device", "adb"), "no phone is connected: switch on")


def test_an_apk_that_is_not_there_is_one_message(tmp_path):
    assert_one_message(command("android", "install", tmp_path / "app.apk"), "app.apk: give one APK that is there; `lobit android build`")
