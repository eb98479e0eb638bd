"""What survives of an adapter in 4 bits, as a person reads it: the worst layers first, all of them in one line."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from ..display import Display
from .survival import Survival, overall

_SHOWN = 5  # layers


def show(found: Sequence[Survival], display: Display) -> None:
    """Print the layers that keep least, and all together.

    Args:
        found: by layer.
        display: its console takes the table.
    """
    whole = overall(found)
    columns = ["codes changed", "kept", "cosine", "norm ratio"]
    columns += ["output error", "update error"] if whole.outputs else []
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(["layer", *columns]):
        table.add_column(name, justify="right" if index else "left", overflow="fold")
    for one in sorted(found, key=lambda one: one.kept)[:_SHOWN]:
        table.add_row(escape(one.layer), *_cells(one))
    table.add_section()
    table.add_row(whole.layer, *_cells(whole))
    display.console.print(f"\n[bold]What survives of the adapter: the worst of {len(found)} layers")
    display.console.print(table)


def _cells(one: Survival) -> list[str]:
    errors = [f"{100 * value:.3g} %" for value in (one.output_error, one.update_error) if value is not None]
    return [
        f"{100 * one.codes_changed:.3g} %",
        f"{one.kept:.3f}",
        f"{one.cosine:.3f}",
        f"{one.norm_ratio:.2f}",
        *errors,
    ]
