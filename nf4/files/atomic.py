"""Files that replace earlier ones whole, or not at all, whatever ends the writing.

A file grows beside its path, as ``.NAME.part``, is made durable and renamed. Two files cannot be renamed at once. Of
two that belong together the last one (a config, without which nothing is opened) is therefore out of the way while the
other is renamed, unless it stays as it is: a process that is killed in between leaves files that are refused, never
the weights of one save beside the config of another.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Give names beside one or two paths of a directory, to be written to; at the end these files get the paths.

    Raises:
        OSError: a file cannot be renamed. After any error, what was there is as it was.
    """
    parts = tuple(path.with_name(f".{path.name}.part") for path in paths)
    try:
        yield parts
        for part in parts:
            with part.open("rb") as file:
                os.fsync(file.fileno())
        _commit(parts, paths)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def _commit(parts: tuple[Path, ...], paths: tuple[Path, ...]) -> None:
    last, old = paths[-1], paths[-1].with_name(f".{paths[-1].name}.old")
    changes = len(paths) > 1 and last.exists() and last.read_bytes() != parts[-1].read_bytes()
    if changes:
        os.replace(last, old)
    try:
        for part, path in zip(parts, paths, strict=True):
            os.replace(part, path)
    except BaseException:
        if changes and parts[0].exists():  # nothing is renamed yet
            os.rename(old, last)
        elif parts[-1].exists() and not parts[0].exists():  # the second file has to follow the first
            os.rename(parts[-1], last)
        raise
    finally:
        old.unlink(missing_ok=True)
