"""What every table of the page is: a module with a title and three functions, which are given the same.

=====================  ==============================================================================================
``TITLE``              heading of the page
``rows(context)``      measure: records, which are JSON; the only slow one
``markdown(records)``  the table, and a paragraph on what it shows and what it does not
``picture(...)``       draw the records into a PNG
=====================  ==============================================================================================

Sizes are settings of a module, by name: "full" is what is committed, "quick" takes minutes for all tables together, and
"tiny" is for the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

from qloralab.display import Display

from .tinylm import trained

Record = dict[str, Any]
Records = Sequence[Mapping[str, Any]]
SIZES = ("full", "quick", "tiny")

S = TypeVar("S")


@dataclass(frozen=True)
class Context:
    """What a table is measured with.

    Attributes:
        size: one of SIZES.
        model: directory of a causal language model of the user's own; None: tinylm.
        minilm: directory of the encoder; None: the tables do without.
        smollm2: the GGUF file of the default model; None: the tables do without.
        display: shows what is going on.
    """

    size: str
    model: Path | None
    minilm: Path | None
    smollm2: Path | None
    display: Display

    def of(self, settings: Mapping[str, S]) -> S:
        """The settings of this size."""
        return settings[self.size]

    @cached_property
    def tinylm(self) -> Path:
        """Directory of tinylm, trained now where there is none of this size yet; or the model in its place."""
        return self.model or trained(self.size, self.display)

    @cached_property
    def language_models(self) -> dict[str, Path]:
        """The causal models by their names."""
        return {self.tinylm.name: self.tinylm} | ({"SmolLM2-135M": self.smollm2} if self.smollm2 else {})


class Table(Protocol):
    """A module of this folder that is a table."""

    TITLE: str
    rows: Callable[[Context], list[Record]]
    markdown: Callable[[Records], str]
    picture: Callable[[Records, Path], None]


def grid(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table in Markdown, the first columns to the left and the others to the right."""
    rule = ["---"] * left + ["---:"] * (len(headings) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [headings, rule, *rows])


def of_kind(records: Records, kind: str) -> list[Mapping[str, Any]]:
    """The records that answer one question."""
    return [record for record in records if record["kind"] == kind]
