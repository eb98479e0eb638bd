"""The text of the tables: the sources of the standard library, a tenth of the files held out.

A file is held out by a hash of its path. Nothing of a held-out file is seen by ``tinylm.py``, by the tokenizer that is
trained with it or by a fine-tuning of these tables, and everything that is measured is measured there. SmolLM2 was
trained by others, most likely on all of this: what it is asked here is how far quantization moves it, not how good it
is.
"""

from __future__ import annotations

import hashlib
import sysconfig
from functools import cache
from pathlib import Path

from qloralab.data.examples import Example
from qloralab.data.stdlib_corpus import stdlib_examples

LIBRARY = Path(sysconfig.get_path("stdlib"))
_NO_SOURCE = {"test", "tests", "idle_test", "lib2to3", "__pycache__", "site-packages", "encodings", "pydoc_data"}
_HELD_OUT = 10  # one file in so many


@cache
def sources() -> dict[str, str]:
    """The modules of the standard library by their paths, in the order of the paths.

    Left out are tests, and tables that are no prose and hardly code (``encodings``, ``pydoc_data``).
    """
    found = {}
    for path in LIBRARY.rglob("*.py"):
        parts = path.relative_to(LIBRARY).parts
        if not _NO_SOURCE & set(parts[:-1]) and all(part.isidentifier() for part in parts[:-1]):
            text = path.read_text(encoding="utf-8", errors="ignore")
            if text.strip():
                found["/".join(parts)] = text
    return dict(sorted(found.items()))


def is_held_out(path: str) -> bool:
    """Whether the file of a path is held out."""
    return int(hashlib.sha256(path.encode()).hexdigest(), 16) % _HELD_OUT == 0


def documents(held_out: bool) -> list[str]:
    """The sources to train on, or those held out; a document is a file."""
    return [text for path, text in sources().items() if is_held_out(path) == held_out]


@cache
def _examples() -> list[Example]:
    return stdlib_examples(LIBRARY)


@cache
def docstrings(held_out: bool) -> list[Example]:
    """The functions whose docstring is to be written (``stdlib_corpus.py``), of the one half or of the other."""
    return [one for one in _examples() if is_held_out(one.source.partition(":")[0]) == held_out]
