"""The commands of `lobit android`: the app for a phone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lobit.cli_options import Json, app, print_json
from lobit.errors import InputError
from lobit.targets import PHONE

if TYPE_CHECKING:
    from lobit.android.signing import Key

android = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The app that runs bundles on a phone: build, install.")
app.add_typer(android, name="android")


@android.command(epilog="Examples: lobit android build -o app.apk  |  lobit android build -o app.apk --bundle bundle --x86-64")
def build(
    out: Annotated[Path, typer.Option("-o", "--out", help="The APK; replaced where it is there.")] = Path("app.apk"),
    bundle: Annotated[Path | None, typer.Option("--bundle", help="A bundle for xnnpack to ship in place of the demo model's.")] = None,
    no_bundle: Annotated[bool, typer.Option("--no-bundle", help="Ship none: bundles are installed or picked on the phone.")] = False,
    x86_64: Annotated[bool, typer.Option("--x86-64", help="For x86-64 too, as emulators of phones have it; larger by 30 MB.")] = False,
    keystore: Annotated[Path | None, typer.Option("--keystore", metavar="FILE", help="Your key; default: a debug key, made once.")] = None,
    key_alias: Annotated[str | None, typer.Option("--key-alias", help="Its name in the keystore.")] = None,
    key_password_file: Annotated[Path | None, typer.Option("--key-password-file", metavar="FILE", help="File with its password.")] = None,
    as_json: Json = False,
) -> None:
    """From the app's sources to a signed and checked APK.

    The same inputs give the same bytes. `lobit doctor android` tells what is needed.
    """
    from lobit.progress import bar
    from lobit.verbs import android as verbs

    if bundle is not None and no_bundle:
        raise InputError(f"--bundle {bundle} and --no-bundle contradict each other: leave one out")
    key = _key(keystore, key_alias, key_password_file)
    with bar() as shown:
        result = verbs.build(out, x86_64=x86_64, bundle=bundle, demo=not no_bundle, key=key, progress=shown.count)
    if as_json:
        print_json(result)
        return
    seconds = sum(result["seconds"].values())
    typer.echo(f"{out}: {result['bytes']} bytes in {seconds:.0f} s, for {' and '.join(result['processors'])}\nsha256 {result['sha256']}")
    typer.echo(f"next:   lobit android install {out}   (or: adb install {out})")


@android.command(epilog="Examples: lobit android install app.apk  |  lobit android install app.apk bundle --device adb:4711")
def install(
    what: Annotated[list[Path], typer.Argument(metavar="APK|BUNDLE...", help="The app, bundles for xnnpack, or both.")],
    device: Annotated[str, typer.Option("--device", metavar="adb[:SERIAL]", help="Which phone; default: the only one.")] = PHONE,
    as_json: Json = False,
) -> None:
    """Brings the app and bundles to a phone by adb.

    What is there already is not sent again, and a bundle is in place only when all of it is there.
    """
    from lobit.progress import bar
    from lobit.targets import parse_device
    from lobit.verbs import android as verbs

    apks = [path for path in what if path.is_file() or path.suffix == ".apk"]
    bundles = [path for path in what if path not in apks]
    if len(apks) > 1 or not all(path.is_file() for path in apks):
        raise InputError(f"{', '.join(map(str, apks))}: give one APK that is there; `lobit android build` makes it")
    with bar() as shown:
        result = verbs.install(apks[0] if apks else None, bundles, device=parse_device(device), progress=shown.count)
    if as_json:
        print_json(result)
        return
    there = ", ".join([*(["the app"] if result["app"] else []), *result["bundles"]])
    typer.echo(f"on {result['phone']}: {there}\nnext:   lobit bench {' '.join(map(str, bundles)) or 'BUNDLE'} --device {device}")


def _key(keystore: Path | None, alias: str | None, password_file: Path | None) -> Key | None:
    """The key that the options name; None where they name none."""
    from lobit.android.signing import key_of

    if keystore is None and alias is None and password_file is None:
        return None
    if keystore is None or alias is None or password_file is None:
        raise InputError("a key of your own needs all of --keystore, --key-alias and --key-password-file: give them, or none of them")
    return key_of(keystore, alias, password_file)
