"""Directories that a command makes: whether they can be made, and how they come to be there whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError


def check_writable(out: Path, at: Path) -> None:
    """Refuse at once what would be refused at the end.

    Args:
        out: what is to be written, for the message.
        at: the directory in which something is made; it may be missing, and those above it.

    Raises:
        UserError: the nearest that exists is no directory, or not ours to write in.
    """
    try:
        os.lstat(at)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except OSError as error:  # a name that is too long
        raise UserError(f"{out} cannot be written: {error.strerror}") from None
    there = _existing(at)
    if not there.is_dir():
        raise UserError(f"{out} cannot be written: {there} is not a directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{out} cannot be written: no permission to write in {there}")


def check_new(out: Path) -> None:
    """Refuse at once, by a ``UserError``, a directory to make that is there with something in it or cannot be made."""
    if os.path.isdir(out) and any(out.iterdir()):
        raise UserError(f"{out} exists and is not empty; give --out the name of a new directory")
    if os.path.lexists(out) and not os.path.isdir(out):
        raise UserError(f"{out} is not a directory; give --out the name of a new one")
    check_writable(out, out.absolute())


@contextlib.contextmanager
def written_beside(out: Path, needed: int) -> Iterator[Path]:
    """A hidden directory beside out, which becomes out at the end; whatever ends it otherwise, nothing is left.

    What a killed process has left there is removed: a directory that nobody holds locked.

    Raises:
        UserError: the disk has less than the needed bytes free.
    """
    out = out.absolute()
    free = shutil.disk_usage(_existing(out.parent)).free
    if needed > free:
        raise UserError(f"{out} needs {size_text(needed)}, and {size_text(free)} are free on its disk")
    made = [folder for folder in out.parents if not folder.exists()]
    part = out.with_name(f".{out.name}.part-{os.getpid()}")
    for left in out.parent.glob(f".{glob.escape(out.name)}.part-*"):
        with _locked(left) as ours:
            if ours:
                shutil.rmtree(left, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        with _locked(part):
            yield part
            part.rename(out)  # over an empty directory, if there is one
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a directory, which ends with its process; False where another one has it, or there are none."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = True
    except OSError:
        ours = False
    try:
        yield ours
    finally:
        os.close(descriptor)


def size_text(count: float) -> str:
    """Bytes as kB, MB or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count_text(count)}B"


def count_text(count: float) -> str:
    """A count, or what a prefix of a unit is put behind, in millions or thousands: "1.5 M"."""
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count / 1e3:.1f} k"


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(there for there in (folder, *folder.parents) if os.path.lexists(there))
