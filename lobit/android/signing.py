"""Signs APKs: with a debug key of this machine, or a key of one's own."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from lobit.android.artifacts import cache_folder, run
from lobit.atomic_folder import publish
from lobit.errors import InputError

SCHEMES = {1: False, 2: True, 3: True, 4: False}
"""Schemes of signatures. Phones from Android 7 on read 2 and 3, whose bytes depend on the content and the key alone."""
DEBUG_PASSWORD = "android"
"""The password of debug keys, as all Android tools have it; they are no secret."""


@dataclass(frozen=True)
class Key:
    """A key to sign with."""

    keystore: Path
    alias: str
    password: str
    """The password as apksigner reads it: `pass:` and the word, or `file:` and a path."""


def debug_key() -> Key:
    """This machine's debug key, made when it is first asked for."""
    keystore = cache_folder() / "debug.p12"
    if not keystore.is_file():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            new = Path(folder) / "debug.p12"
            kind = ["-storetype", "PKCS12", "-keyalg", "RSA", "-keysize", "2048", "-validity", "10000"]
            names = ["-alias", "debug", "-storepass", DEBUG_PASSWORD, "-dname", "CN=Android Debug"]
            run(["keytool", "-genkeypair", "-keystore", new, *kind, *names])
            publish(new, keystore)
    return Key(keystore, "debug", f"pass:{DEBUG_PASSWORD}")


def sign(unsigned: Path, signed: Path, key: Key) -> str:
    """Signs an APK by schemes 2 and 3, checks the result, and returns the sha256 of the signer's certificate.

    Raises:
        MissingPartError: apksigner cannot read the key, or does not accept the result.
    """
    store: list[str | Path] = ["--ks", key.keystore, "--ks-key-alias", key.alias, "--ks-pass", key.password]
    schemes = [word for scheme, used in SCHEMES.items() for word in (f"--v{scheme}-signing-enabled", str(used).lower())]
    run(["apksigner", "sign", *store, *schemes, "--out", signed, unsigned])
    told = run(["apksigner", "verify", "--print-certs", signed])
    return next(line.split()[-1] for line in told.splitlines() if "certificate SHA-256 digest" in line)


def key_of(keystore: Path, alias: str, password_file: Path) -> Key:
    """A key of one's own.

    Raises:
        InputError: one of the files is not there.
    """
    for path in (keystore, password_file):
        if not path.is_file():
            raise InputError(f"{path} is no file: give --keystore and --key-password-file the files of your key, or leave both out")
    return Key(keystore, alias, f"file:{password_file}")
