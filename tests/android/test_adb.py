"""Phones by the real adb: which one, commands, files, connections, and what is said where one of these fails."""

import os
import socket
from pathlib import Path

import pytest

from lobit.errors import InputError, LobitError, MissingPartError
from lobit.runtime.adb import connected, find_phone
from lobit.runtime.phone_bundle import PUSHED


def test_the_only_phone_is_found_with_its_model(connect):
    _, serial = connect("Pixel 8")
    found = find_phone(None)
    assert (found.serial, found.name) == (serial, "Pixel 8")


def test_no_phone_says_how_to_connect_one(adb_server):
    with pytest.raises(InputError, match=r"no phone is connected: switch on “USB debugging”.*`adb devices`"):
        find_phone(None)


def test_of_two_phones_one_must_be_named(connect):
    (_, first), (_, second) = connect("Pixel 8"), connect("Galaxy S24")
    with pytest.raises(InputError, match=r"2 phones are connected: choose one of .* with --device adb:SERIAL") as raised:
        find_phone(None)
    for text in (f"{first} (Pixel 8)", f"{second} (Galaxy S24)"):
        assert text in str(raised.value)
    assert find_phone(second).name == "Galaxy S24"


def test_the_phone_that_adb_itself_would_take_is_taken(connect, monkeypatch):
    connect("Pixel 8")
    _, second = connect("Galaxy S24")
    monkeypatch.setenv("ANDROID_SERIAL", second)
    assert find_phone(None).serial == second


def test_a_phone_that_is_not_connected_is_told_with_those_that_are(connect):
    _, serial = connect("Pixel 8")
    with pytest.raises(InputError, match=f"phone 4711 is not connected: choose one of {serial}"):
        find_phone("4711")


def test_an_unauthorized_phone_says_what_to_accept(connect):
    _, serial = connect(is_authorized=False)
    with pytest.raises(LobitError, match=f"phone {serial} is unauthorized: unlock it and accept the question"):
        find_phone(None)


def test_an_unauthorized_phone_does_not_hide_the_one_that_works(connect):
    connect("Pixel 8", is_authorized=False)
    _, second = connect("Galaxy S24")
    assert find_phone(None).serial == second


def test_a_phone_that_was_lost_is_told_by_its_state(connect):
    phone, serial = connect()
    phone.lose()
    with pytest.raises(LobitError, match=rf"phone {serial} is offline: unplug it|phone {serial} is not connected|no phone is connected"):
        find_phone(serial)


def test_without_adb_the_message_says_where_to_find_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingPartError, match="adb is not installed: `lobit doctor android`"):
        connected()


def test_adb_starts_no_server_of_its_own_accord(android_tools, monkeypatch):
    """A clean-up that comes after the tests' server has ended would leave one behind."""
    android_tools("adb")
    with socket.create_server(("127.0.0.1", 0)) as free:
        unused = free.getsockname()
    assert os.environ["ADB_SERVER_SOCKET"].startswith("tcp:127.0.0.1:")
    monkeypatch.setenv("ADB_SERVER_SOCKET", f"tcp:127.0.0.1:{unused[1]}")
    with pytest.raises(MissingPartError, match="cannot start server on remote host"):
        connected()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(unused)


def test_a_command_gives_its_exit_code_and_output(phone):
    found = find_phone(None)
    assert found.shell("pm", "path", "dev.lobit.demo") == (0, "package:/data/app/base.apk\n")
    assert found.shell("no-such-command") == (127, "no-such-command: not found\n")


def test_words_reach_the_phone_as_they_are(phone):
    """A name with quotes, spaces and a semicolon is one argument."""
    name = "/data/local/tmp/it's; rm -rf \"$HOME\""
    assert find_phone(None).shell("mkdir", "-p", name)[0] == 0
    assert (phone.root / name.removeprefix("/")).is_dir()


@pytest.mark.parametrize("size", [0, 1, 3_000_000])
def test_a_file_arrives_as_it_is(phone, tmp_path, size):
    file, place = tmp_path / "file", f"{PUSHED}.bin"
    file.write_bytes(bytes(range(251)) * (size // 251) + bytes(size % 251))
    find_phone(None).push(file, place)
    assert (phone.root / place.removeprefix("/")).read_bytes() == file.read_bytes()


def test_the_bytes_that_have_arrived_are_told_while_a_file_is_sent(phone, tmp_path):
    file, seen = tmp_path / "file", []
    file.write_bytes(bytes(200_000))
    phone.pause = 0.5
    find_phone(None).push(file, f"{PUSHED}.bin", seen.append)
    assert seen and all(0 < count <= 200_000 for count in seen)


def test_a_phone_lost_in_the_middle_of_a_file_is_one_message(phone, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(3_000_000))
    phone.lost_after = 1_000_000
    with pytest.raises(LobitError, match=r"Pixel 8 \(127.0.0.1:\d+\) was lost in the middle: plug it in again and repeat"):
        find_phone(None).push(file, f"{PUSHED}.bin")


def test_a_file_that_does_not_fit_is_told_with_its_size(phone, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(3_000_000))
    phone.free = 1000
    with pytest.raises(LobitError, match=r"Pixel 8 does not take file \(3,000,000 bytes\)(.|\n)*No space left on device"):
        find_phone(None).push(file, f"{PUSHED}.bin")


def test_a_port_that_nobody_listens_on_is_forwarded_until_it_is_ended(phone, adb_server):
    found = find_phone(None)
    port = found.forward("nobody")
    assert f"tcp:{port} localabstract:nobody" in adb_server("forward", "--list")
    found.end_forward(port)
    assert "nobody" not in adb_server("forward", "--list")


def test_an_app_is_installed(connect, tmp_path):
    phone, _ = connect()
    apk = tmp_path / "app.apk"
    apk.write_bytes(b"an app")
    find_phone(None).install(apk)
    assert phone.has_app


@pytest.mark.parametrize(
    ("reason", "way_out"),
    [
        ("INSTALL_FAILED_UPDATE_INCOMPATIBLE: signatures do not match", "adb uninstall"),
        ("INSTALL_FAILED_NO_MATCHING_ABIS: Failed to extract native libraries, res=-113", "lobit android build --x86-64"),
        ("INSTALL_FAILED_SOMETHING_NEW", "INSTALL_FAILED_SOMETHING_NEW"),
    ],
)
def test_an_app_that_is_refused_says_why(connect, tmp_path, reason, way_out):
    phone, _ = connect()
    phone.install_answer = f"Failure [{reason}]\n"
    apk: Path = tmp_path / "app.apk"
    apk.write_bytes(b"an app")
    with pytest.raises(LobitError, match=rf"Pixel 8 does not install app.apk(.|\n)*{way_out}"):
        find_phone(None).install(apk)
