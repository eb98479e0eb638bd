"""An inspection as pictures."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoint.models import model_name
from ..errors import UserError
from .adapter import Adapter
from .budget import Budget, groups
from .layers import Layer
from .statistics import PROBABILITIES

if TYPE_CHECKING:
    from .run import Inspection

_COLOURS = ("#1f5fa8", "#c0392b", "#2e8b57", "#8e5ea2", "#d68910", "#17a2b8", "#7f8c8d", "#a0522d")
_PANELS = 12  # kinds of layers that get a panel of their own


def draw(found: Inspection, directory: Path) -> list[Path]:
    """Draw what there is to draw, as PNGs.

    Args:
        found: an inspection.
        directory: made if missing; pictures of the same names are replaced.

    Returns:
        their paths.

    Raises:
        UserError: one cannot be written.
    """
    title = model_name(found.settings.path)
    pictures: dict[str, Callable[[Any], None]] = {}
    layers = found.layers
    if any(one.error is not None for layer in layers for one in layer.quantized.values()):
        pictures["error_by_layer.png"] = lambda plt: _errors(plt, layers, title)
    if any(layer.quantized for layer in layers):
        pictures["codes.png"] = lambda plt: _codes(plt, layers, title)
    if any(layer.distribution for layer in layers):
        pictures["normal_quantiles.png"] = lambda plt: _quantiles(plt, layers, title)
    if (budget := found.budget) is not None:
        pictures["budget.png"] = lambda plt: _budget(plt, budget, f"{title}, {next(iter(found.data_types))}")
    if (adapter := found.adapter) is not None:
        pictures["adapter.png"] = lambda plt: _adapter(plt, adapter, title)

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    written = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            picture(plt)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Glyph .* missing from")  # a box is drawn for it
                plt.savefig(directory / name, dpi=150)
            written.append(directory / name)
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror or error}") from error
    finally:
        plt.close("all")
    return written


def _errors(plt: Any, layers: Sequence[Layer], title: str) -> None:
    """The error of each layer: a panel for each kind of layer, over the blocks of the model."""
    names = list(dict.fromkeys(name for layer in layers for name in layer.quantized))
    by_name = {layer.name: layer for layer in layers}
    has_output = any(one.output_error is not None for layer in layers for one in layer.quantized.values())
    with _panels(plt, list(by_name), f"{title}: relative squared error") as panels:
        for axes, of_kind in panels:
            for name, colour in zip(names, _colours(len(names)), strict=True):
                some = [by_name[one].quantized.get(name) for one in of_kind]
                x = np.arange(len(of_kind))
                y = [np.nan if one is None or one.error is None else 100 * one.error for one in some]
                axes.plot(x, y, "o-", color=colour, markersize=2.5, linewidth=1.2, label=f"{name}, weight")
                if has_output:
                    y = [np.nan if one is None or one.output_error is None else 100 * one.output_error for one in some]
                    axes.plot(
                        x, y, "o--", color=colour, markersize=2.5, linewidth=0.9, alpha=0.7, label=f"{name}, output"
                    )
        panels[0][0].set_ylabel("% of the sum of squares")


@contextmanager
def _panels(plt: Any, names: Sequence[str], title: str) -> Iterator[list[tuple[Any, list[str]]]]:
    """A panel for each kind of layer, and the layers of it; one panel where there are too many kinds."""
    kinds = groups(names, "kind")
    if len(kinds) > _PANELS or len(kinds) == len(names):
        kinds = {"all layers": list(names)}
    columns = min(len(kinds), 4)
    rows = -(-len(kinds) // columns)
    size = (max(3.1 * columns, 6.5), 2.5 * rows + 1)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, sharey=True)
    panels = list(grid.flat)
    yield [(axes, layers) for axes, (_, layers) in zip(panels, kinds.items(), strict=False)]
    for axes, kind in zip(panels, kinds, strict=False):
        axes.set_title(kind, fontsize=9, parse_math=False)
        axes.set_xlabel("block" if len(kinds) > 1 else "layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:g}"[-1] in "235" else "")
        axes.tick_params(axis="y", which="both", labelsize=8)
        _plain(axes)
    for axes in panels[len(kinds) :]:
        axes.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False, fontsize=9)
    figure.suptitle(title, parse_math=False)


def _codes(plt: Any, layers: Sequence[Layer], title: str) -> None:
    """How often each value of a codebook is used, in all layers together."""
    names = list(dict.fromkeys(name for layer in layers for name in layer.quantized))
    figure, grid = plt.subplots(len(names), 1, figsize=(7, 2.1 * len(names) + 0.8), layout="constrained", squeeze=False)
    for axes, name, colour in zip(grid.flat, names, _colours(len(names)), strict=True):
        codes = [layer.quantized[name].codes for layer in layers if name in layer.quantized]
        counts = np.sum([one.histogram for one in codes], axis=0)
        values = codes[0].values
        order = np.arange(len(counts)) if values is None else np.argsort(values, kind="stable")
        axes.bar(np.arange(len(counts)), 100 * counts[order] / counts.sum(), color=colour, width=0.85)
        axes.axhline(100 / len(counts), color="#555555", linewidth=0.8, linestyle=":")
        if values is not None and len(values) <= 16:
            axes.set_xticks(np.arange(len(values)), [f"{values[i]:.2f}" for i in order], fontsize=7)
        axes.set_title(name, fontsize=9, parse_math=False)
        axes.set_ylabel("% of the weights")
        _plain(axes)
    grid[-1, 0].set_xlabel("value of the code (dotted: all equally often)")
    figure.suptitle(f"{title}: use of the codes", parse_math=False)


def _quantiles(plt: Any, layers: Sequence[Layer], title: str) -> None:
    """Quantiles of the weights of each layer, less their mean over their deviation, beside normal ones."""
    from scipy.special import ndtri

    normal = ndtri(np.array(PROBABILITIES))
    found = [(layer, layer.distribution) for layer in layers if layer.distribution]
    kinds = groups([layer.name for layer, _ in found], "kind")
    kind_of = {name: kind for kind, names in kinds.items() for name in names}
    few = len(kinds) <= len(_COLOURS)
    colours = dict(zip(kinds, _colours(len(kinds)), strict=True)) if few else dict.fromkeys(kinds, "#9bb7d4")
    _, axes = plt.subplots(figsize=(6, 5.5), layout="constrained")
    told: set[str] = set()
    for layer, one in found:
        kind, beyond = kind_of[layer.name], 1 / (layer.shape[0] * layer.shape[1])  # no weight stands for less
        shown = (beyond <= np.array(PROBABILITIES)) & (np.array(PROBABILITIES) <= 1 - beyond)
        label = kind if few and kind not in told else None
        told.add(kind)
        axes.plot(
            normal[shown], np.array(one.quantiles)[shown], color=colours[kind], linewidth=0.6, alpha=0.55, label=label
        )
    axes.plot(normal, normal, color="black", linewidth=1.2, linestyle="--", label="normal")
    axes.set(xlabel="quantile of N(0, 1)", ylabel="quantile of the weights, in standard deviations")
    most = np.percentile([max(abs(one.quantiles[0]), abs(one.quantiles[-1])) for _, one in found], 90)
    axes.set_ylim(-1.1 * max(most, 4.5), 1.1 * max(most, 4.5))
    _plain(axes)
    legend = axes.legend(frameon=False, fontsize=8)
    for line in legend.get_lines():
        line.set(linewidth=1.6, alpha=1)
    axes.set_title(f"{title}: Q-Q of the weights, a line a layer", parse_math=False)


def _budget(plt: Any, budget: Budget, title: str) -> None:
    """What each group costs alone, and what leaving it dense saves, as shares of the whole KL."""
    whole, x = budget.whole or 1.0, np.arange(len(budget.parts))
    figure, axes = plt.subplots(figsize=(max(6.5, min(0.22 * len(x) + 2, 14)), 4), layout="constrained")
    alone = [100 * part.alone / whole for part in budget.parts]
    saved = [100 * (budget.whole - part.rest) / whole for part in budget.parts]
    axes.bar(x - 0.2, alone, 0.4, color=_COLOURS[0], label=f"quantized alone (sum {sum(alone):.0f} %)")
    axes.bar(x + 0.2, saved, 0.4, color=_COLOURS[1], label=f"saved by leaving it dense (sum {sum(saved):.0f} %)")
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_ylabel(f"% of the KL of {budget.whole:.4f} nats a token")
    if len(x) <= 60:
        names = [part.group.rpartition(".")[2] if budget.by != "module" else part.group for part in budget.parts]
        axes.set_xticks(x, names, rotation=0 if budget.by == "block" else 90, fontsize=7)
    axes.set_xlabel(budget.by)
    axes.margins(x=0.01)
    _plain(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    axes.set_title(f"{title}: error budget", parse_math=False)


def _adapter(plt: Any, adapter: Adapter, title: str) -> None:
    """Norm, or share of the weight's norm, and effective rank of each layer's update."""
    updates = adapter.updates
    has_share = all(one.share is not None for one in updates)
    kinds = groups([one.layer for one in updates], "kind")
    if len(kinds) > len(_COLOURS) or len(kinds) == len(updates):
        kinds = {"all layers": [one.layer for one in updates]}
    by_name = {one.layer: one for one in updates}
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for (kind, names), colour in zip(kinds.items(), _colours(len(kinds)), strict=True):
        some = [by_name[name] for name in names]
        size = [100 * (one.share or 0.0) if has_share else one.norm for one in some]
        left.plot(size, "o-", color=colour, markersize=2.5, linewidth=1.2, label=kind)
        right.plot([one.effective_rank for one in some], "o-", color=colour, markersize=2.5, linewidth=1.2)
    left.set_ylabel("|BA| s, % of |W|" if has_share else "|BA| s")
    right.set_ylabel(f"effective rank, of r = {adapter.config.r}")
    for axes in (left, right):
        axes.set_xlabel("layer" if len(kinds) == 1 else "block")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(bottom=0)
        _plain(axes)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(f"{title}: what the adapter adds", parse_math=False)


def _colours(count: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(count)]


def _plain(axes: Any) -> None:
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
