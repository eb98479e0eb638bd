"""The curves of runs, as SVG that stands inside an HTML page.

Matplotlib draws; what it writes is a file of its own, and is made a part of a page here: without its head and its
metadata, with identifiers that no other chart of the page has, with text as text in the font of the page, and with the
page's colour where a line or a word has none of a run's. So the charts follow the page into dark mode, and onto paper.

A curve has the identifier ``curve-CHART-RUN-KIND``. A curve of many steps is thinned to what a screen shows: of each
of some hundred intervals the smallest and the largest value, so that a spike stays.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..inspection.budget import groups
from ..train.report import smooth
from ..train.run_directory import Metrics
from .runs import Run

COLOURS = ("#3b82d6", "#e0533d", "#2f9e6e", "#a06cd5", "#d4901c", "#17a2b8", "#c2588f", "#8a8f98")
_INTERVALS = 400
_KINDS = 12  # of layers that get a panel of their own
_INK = "#010203"  # stands for the page's colour
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.5,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
}


def colour(index: int) -> str:
    """That of a run, by its place."""
    return COLOURS[index % len(COLOURS)]


def dash(index: int) -> str:
    """The dashes of a run's lines, in SVG's terms: those beyond the colours differ by them."""
    return ("", "5 2", "1.5 1.5")[index // len(COLOURS) % 3]


def losses(runs: Sequence[Run]) -> str:
    """Training and validation loss over the tokens."""

    def draw(axes: Any) -> None:
        for index, run in enumerate(runs):
            tokens, values = _column(run.metrics, "loss")
            _curve(axes, f"loss-{index}-batch", index, tokens, values, linewidth=0.7, alpha=0.35)
            _curve(axes, f"loss-{index}-smoothed", index, tokens, smooth(values), linewidth=1.8)
            tokens, values = _column(run.metrics, "val_loss")
            marks = {"marker": "o", "markersize": 6, "markeredgewidth": 1.6, "markerfacecolor": "none"}
            _curve(axes, f"loss-{index}-validation", index, tokens, values, linewidth=0.9, thin=False, **marks)
        axes.set(xlabel="tokens trained on", ylabel="loss of the answer (nats per token)")

    return _chart("loss", draw, (9.2, 4.0))


def column(runs: Sequence[Run], field: str, label: str, scale: float = 1.0, log: bool = False) -> str:
    """A field of ``Metrics`` over the tokens.

    Args:
        runs: to compare.
        field: its name.
        label: of the axis.
        scale: what the values are multiplied by.
        log: whether the axis is logarithmic; else it starts at 0.
    """

    def draw(axes: Any) -> None:
        for index, run in enumerate(runs):
            tokens, values = _column(run.metrics, field)
            _curve(axes, f"{field}-{index}-all", index, tokens, [scale * value for value in values], linewidth=1.1)
        axes.set(xlabel="tokens trained on", ylabel=label)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:g}"[-1] in "25" else "")
        else:
            axes.yaxis.set_major_formatter("{x:,g}")
            axes.set_ylim(bottom=0)

    return _chart(field, draw, (4.5, 2.6))


def adapters(runs: Sequence[Run]) -> str:
    """The norm of what an adapter adds, over the blocks: a panel for each kind of layer."""
    norms = [{one.layer: one.norm for one in run.updates} for run in runs]
    names = list(dict.fromkeys(layer for of_run in norms for layer in of_run))
    kinds = groups(names, "kind")
    if len(kinds) > _KINDS or len(kinds) == len(names):
        kinds = {"all layers": names}
    columns = min(len(kinds), 4)
    rows = -(-len(kinds) // columns)

    def draw(figure: Any) -> None:
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for number, axes in enumerate(grid.flat):
            if number >= len(kinds):
                axes.set_visible(False)
                continue
            kind, layers = [*kinds.items()][number]
            for index, of_run in enumerate(norms):
                if of_run:
                    values = [of_run.get(layer, np.nan) for layer in layers]
                    name, places = f"adapter{number}-{index}-norm", range(len(layers))
                    _curve(axes, name, index, places, values, thin=False, marker="o", markersize=2.2, linewidth=1.1)
            axes.set_title(kind, fontsize=8.5, parse_math=False)
            axes.set_xlabel("block" if len(kinds) > 1 else "layer")
            axes.xaxis.get_major_locator().set_params(integer=True)
            _plain(axes)
        grid[0, 0].set_ylim(bottom=0)  # of all of them, once all are drawn

    return _svg("adapters", draw, (9.2, 2.1 * rows + 0.2))


def _column(metrics: Sequence[Metrics], field: str) -> tuple[list[int], list[float]]:
    """The tokens and the values, where there is one."""
    pairs = [(line.tokens, value) for line in metrics if (value := getattr(line, field)) is not None]
    return [tokens for tokens, _ in pairs], [value for _, value in pairs]


def _curve(
    axes: Any, name: str, index: int, x: Sequence[int], y: Sequence[float], thin: bool = True, **style: Any
) -> None:
    if not x:
        return
    kept = _thinned(y) if thin else range(len(x))
    if dash(index):
        style["linestyle"] = (0, tuple(float(length) for length in dash(index).split()))
    places, values = [x[i] for i in kept], [y[i] for i in kept]
    axes.plot(places, values, color=colour(index), gid=f"curve-{name}", **style)


def _thinned(values: Sequence[float]) -> list[int]:
    """Which of some values to draw: all of few; of many the extremes of each interval, the first and the last."""
    count = len(values)
    if count <= 3 * _INTERVALS:
        return list(range(count))
    kept = {0, count - 1}
    for places in np.array_split(np.arange(count), _INTERVALS):
        part = [values[i] for i in places]
        kept |= {int(places[np.argmin(part)]), int(places[np.argmax(part)])}
    return sorted(kept)


def _plain(axes: Any) -> None:
    axes.grid(color=_INK, alpha=0.13, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _chart(name: str, draw: Callable[[Any], None], size: tuple[float, float]) -> str:
    """One pair of axes, over tokens."""
    from matplotlib.ticker import EngFormatter

    def drawn(figure: Any) -> None:
        axes = figure.subplots()
        draw(axes)
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        _plain(axes)

    return _svg(name, drawn, size)


def _svg(name: str, draw: Callable[[Any], None], size: tuple[float, float]) -> str:
    """What `draw` puts on a figure of that many inches, as an element of a page."""
    import matplotlib
    from matplotlib.figure import Figure

    file = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the page's font may have it
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    return _part_of_a_page(file.getvalue())


def _part_of_a_page(text: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)  # the style is the page's
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| version="1.1"', "", text)
    text = re.sub(r' id="(?!curve-)(?![mpC][0-9a-f]{10}")[^"]*"', "", text)  # but for curves, and what is referred to
    text = text.replace("xlink:href", "href").replace(_INK, "currentColor").replace("'DejaVu Sans'", "system-ui")
    return re.sub(r'(<svg[^>]*?) width="[^"]*"| height="[^"]*pt"', r"\1", text, count=2)
