"""The classes of the Java platform that Android has: what an app may use of java.* and javax.*.

Android's own jar lacks them. At API level 26 they are those of Java 8, less the packages for desktops and servers; the JDK has their
signatures, for its option --release.
"""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from lobit.android import apk
from lobit.android.artifacts import cache_folder
from lobit.android.shim import java_home
from lobit.atomic_folder import publish
from lobit.errors import MissingPartError

RELEASE = "8"
PACKAGES = (
    *("java/io/", "java/math/", "java/net/", "java/nio/", "java/security/", "java/sql/", "java/text/", "java/time/", "java/util/"),
    *("java/lang/annotation/", "java/lang/invoke/", "java/lang/ref/", "java/lang/reflect/"),
    *("javax/crypto/", "javax/net/", "javax/security/auth/", "javax/security/cert/", "javax/sql/", "javax/xml/"),
    *("org/w3c/dom/", "org/xml/sax/"),
)
"""Packages that Android has, with those below them; java.lang itself is one too, but not all below it."""
LANG = "java/lang"


def java_library() -> Path:
    """A jar with the signatures of the classes, made when it is first asked for.

    Raises:
        MissingPartError: the JDK has no signatures.
    """
    signatures = java_home() / "lib/ct.sym"
    if not signatures.is_file():
        raise MissingPartError(f"{signatures} is missing: `lobit doctor android` names the JDK to install")
    digest = hashlib.sha256(Path(__file__).read_bytes() + signatures.read_bytes()).hexdigest()
    jar = cache_folder() / f"java-{RELEASE}-android-{digest[:16]}.jar"
    if not jar.is_file():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder, zipfile.ZipFile(signatures) as archive:
            new = Path(folder) / jar.name
            apk.pack({entry: archive.read(name) for name in archive.namelist() if (entry := _class_file(name))}, new)
            publish(new, jar)
    return jar


def _class_file(name: str) -> str | None:
    """The name of a class file for an entry `RELEASES/MODULE/CLASS.sig`; None where Android lacks the class.

    RELEASES has a character for each release that has the class.
    """
    releases, _, rest = name.partition("/")
    path = rest.partition("/")[2]
    if not (path.endswith(".sig") and RELEASE in releases and (path.startswith(PACKAGES) or str(PurePosixPath(path).parent) == LANG)):
        return None
    return path.removesuffix(".sig") + ".class"
