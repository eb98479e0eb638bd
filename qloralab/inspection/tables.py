"""An inspection as a person reads it. What the numbers are, docs/inspect.md says, and the modules that make them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

from ..checkpoint.models import model_name
from ..checkpoint.output_directory import count_text
from ..display import Display
from .adapter import Adapter
from .budget import ROUNDINGS, Budget, Rounding, groups
from .layers import Layer, Quantized

if TYPE_CHECKING:
    from .run import Inspection


_WIDE = 100  # columns that have room for shapes


def show(found: Inspection, display: Display) -> None:
    """Print the facts, the notes and the tables of an inspection."""
    settings = found.settings
    if found.adapter is not None:
        _show_adapter(found.adapter, settings.top, display)
        return
    layers = found.layers
    count = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    kinds = ", ".join(sorted({layer.stored for layer in layers}))
    display.fact(
        "model", f"{model_name(settings.path)}: {len(layers)} linear layers, {count_text(count)} weights, {kinds}"
    )
    for note in found.notes:
        display.fact("note", note)
    if found.text is not None:
        one = found.text
        display.fact(
            "text", f"{one['source']}: {one['pieces']} pieces, {one['tokens']:,} tokens, {one['counted']:,} count"
        )
    _print(display, "The whole model, by data type", _whole(layers))
    if any(layer.distribution for layer in layers):
        _print(display, "How normal the weights are, by kind of layer (means)", _normality(layers))
    shown = _ranked(layers, settings.top)
    if shown:
        title = f"Layers of largest and least error of {next(iter(layers[0].quantized))} (errors in %)"
        _print(display, title, _of_layers(shown, display.console.width >= _WIDE))
    _print(
        display,
        "Largest blocks: of the largest magnitude, over the median of the layer's blocks",
        _blocks(layers, settings.top),
    )
    if found.budget is not None and found.roundings is not None:
        name = next(iter(found.data_types))
        _print(
            display,
            f"Of which layers the KL divergence of {name} comes (nats a token)",
            _budget(found.budget, settings.top),
        )
        _tell_sums(found.budget, display)
        _print(display, f"Of which roundings, {name}", _roundings(found.roundings))


def _whole(layers: Sequence[Layer]) -> Table:
    """Errors and bits over all weights; the mean output error and entropy of a layer."""
    names = list(dict.fromkeys(name for layer in layers for name in layer.quantized))
    has_error = any(one.error is not None for layer in layers for one in layer.quantized.values())
    has_output = any(one.output_error is not None for layer in layers for one in layer.quantized.values())
    columns = ["bits a weight", *(["weight error"] if has_error else []), *(["output error"] if has_output else [])]
    table = _table("data type", *columns, "entropy of codes")
    for name in names:
        pairs = [(layer, layer.quantized[name]) for layer in layers if name in layer.quantized]
        size = [layer.shape[0] * layer.shape[1] for layer, _ in pairs]
        bits = sum(one.bits * n for (_, one), n in zip(pairs, size, strict=True)) / sum(size)
        cells = [f"{bits:.3f}"]
        if has_error:
            squares = [layer.distribution.norm**2 if layer.distribution else 0.0 for layer, _ in pairs]
            lost = sum((one.error or 0.0) * n for (_, one), n in zip(pairs, squares, strict=True))
            cells.append(_error(lost / sum(squares)) if sum(squares) else "")
        if has_output:
            cells.append(_error(mean(one.output_error or 0.0 for _, one in pairs)))
        entropy = sum(one.codes.entropy * n for (_, one), n in zip(pairs, size, strict=True)) / sum(size)
        table.add_row(escape(name), *cells, f"{entropy:.3f}")
    return table


def _normality(layers: Sequence[Layer]) -> Table:
    table = _table("layers", "kurtosis", "of rows", "KS distance", "largest block")
    by_name = {layer.name: layer for layer in layers}
    for kind, names in [*groups(list(by_name), "kind").items(), ("all", list(by_name))]:
        some = [one.distribution for one in (by_name[name] for name in names) if one.distribution]
        ratio = max(
            (by_name[name].largest_blocks[0].ratio for name in names if by_name[name].largest_blocks), default=0
        )
        table.add_row(
            escape(kind) if kind != "all" else "[bold]all",
            f"{mean(one.excess_kurtosis for one in some):+.2f}",
            f"{mean(one.row_excess_kurtosis for one in some):+.2f}",
            f"{mean(one.ks_distance for one in some):.4f}",
            f"{ratio:.1f} x",
        )
    return table


def _ranked(layers: Sequence[Layer], top: int) -> list[Layer]:
    """The layers of largest error, then those of least, by the output where it is known; of the first data type."""

    def rank(layer: Layer) -> float:
        one = next(iter(layer.quantized.values()))
        found = one.output_error if one.output_error is not None else one.error
        return -1.0 if found is None else found

    ranked = sorted((layer for layer in layers if layer.quantized and rank(layer) >= 0), key=rank, reverse=True)
    return ranked if len(ranked) <= 2 * top else [*ranked[:top], *ranked[-top:]]


def _of_layers(layers: Sequence[Layer], has_room: bool) -> Table:
    names = list(layers[0].quantized)
    measures: list[tuple[str, Callable[[Quantized], float | None]]] = [("weight", lambda one: one.error)]
    if any(one.output_error is not None for layer in layers for one in layer.quantized.values()):
        measures.append(("output", lambda one: one.output_error))
    columns = [
        *(["shape"] if has_room else []),
        "kurtosis",
        *(f"{name} {what}" for name in names for what, _ in measures),
    ]
    table = _table("layer", *columns, whole=2 if has_room else 1)
    shorter = _shorter([layer.name for layer in layers])
    for layer in layers:
        found = [of(layer.quantized[name]) if name in layer.quantized else None for name in names for _, of in measures]
        kurtosis = f"{layer.distribution.excess_kurtosis:+.2f}" if layer.distribution else ""
        shape = [" x ".join(map(str, layer.shape))] if has_room else []
        cells = ("" if one is None else f"{100 * one:#.3g}" for one in found)
        table.add_row(escape(shorter(layer.name)), *shape, kurtosis, *cells)
    return table


def _blocks(layers: Sequence[Layer], top: int) -> Table:
    table = _table("layer", f"block of {layers[0].block_size}", "largest magnitude", "over the median")
    shorter = _shorter([layer.name for layer in layers])
    found = [(layer, block) for layer in layers for block in layer.largest_blocks]
    for layer, block in sorted(found, key=lambda pair: pair[1].ratio, reverse=True)[:top]:
        table.add_row(escape(shorter(layer.name)), f"{block.index:,}", f"{block.absmax:.4g}", f"{block.ratio:.1f} x")
    return table


def _budget(budget: Budget, top: int) -> Table:
    table = _table(budget.by, "weights", "alone", "share", "saved if dense", "share")
    whole = budget.whole or 1.0
    shorter = _shorter([part.group for part in budget.parts])
    ranked = sorted(budget.parts, key=lambda part: part.alone, reverse=True)
    rows = [(shorter(p.group), p.weights, p.alone, budget.whole - p.rest) for p in ranked[:top]]
    if others := ranked[top:]:
        saved = sum(budget.whole - p.rest for p in others)
        rows.append((f"{len(others)} others", sum(p.weights for p in others), sum(p.alone for p in others), saved))
    rows.append(("sum", sum(p.weights for p in ranked), budget.sum_alone, budget.sum_saved))
    for name, weights, alone, saved in rows:
        style = "bold" if name == "sum" else ""
        cells = [f"{alone:.5f}", f"{100 * alone / whole:.1f} %", f"{saved:.5f}", f"{100 * saved / whole:.1f} %"]
        table.add_row(escape(name), count_text(weights), *cells, style=style)
    return table


def _tell_sums(budget: Budget, display: Display) -> None:
    whole = budget.whole
    if not whole:
        display.fact("whole", "0: quantizing changes no prediction")
        return
    display.fact("whole", f"{whole:.5f} nats a token with all layers quantized")
    alone, saved = budget.sum_alone / whole, budget.sum_saved / whole
    display.fact("sum", f"of the parts alone {alone:.2f} x the whole, of what is saved {saved:.2f} x")


def _roundings(roundings: Sequence[Rounding]) -> Table:
    table = _table("rounded", "KL", "output error", "against")
    for one in roundings:
        table.add_row(ROUNDINGS[one.name], f"{one.kl:.3g}", _error(one.output_error), one.against)
    return table


def _show_adapter(adapter: Adapter, top: int, display: Display) -> None:
    config, updates = adapter.config, adapter.updates
    display.fact("adapter", f"{len(updates)} layers, r = {config.r}, scaling {config.scaling:g}")
    if adapter.base is not None:
        display.fact("base", str(adapter.base))
    for note in adapter.notes:
        display.fact("note", note)
    has_share = any(one.share is not None for one in updates)
    columns = ("norm", *(("of the weight",) if has_share else ()), "effective rank", "stable rank")
    by_name = {one.layer: one for one in updates}
    table = _table("layers", *columns)
    for kind, names in [*groups(list(by_name), "kind").items(), ("all", list(by_name))]:
        some = [by_name[name] for name in names]
        shares = [f"{100 * mean(one.share or 0.0 for one in some):.2f} %"] if has_share else []
        ranks = [f"{mean(one.effective_rank for one in some):.2f}", f"{mean(one.stable_rank for one in some):.2f}"]
        title = "[bold]all" if kind == "all" else escape(kind)
        table.add_row(title, f"{mean(one.norm for one in some):.4g}", *shares, *ranks)
    _print(display, "By kind of layer (means)", table)

    ranked = sorted(updates, key=lambda one: one.share if one.share is not None else one.norm, reverse=True)
    shown = ranked if len(ranked) <= 2 * top else [*ranked[:top], *ranked[-top:]]
    has_room = display.console.width >= _WIDE
    table = _table("layer", *(["shape"] if has_room else []), *columns, whole=2 if has_room else 1)
    shorter = _shorter([one.layer for one in shown])
    for one in shown:
        share = [] if not has_share else ["" if one.share is None else f"{100 * one.share:.2f} %"]
        ranks = [f"{one.effective_rank:.2f}", f"{one.stable_rank:.2f}"]
        shape = [" x ".join(map(str, one.shape))] if has_room else []
        table.add_row(escape(shorter(one.layer)), *shape, f"{one.norm:.4g}", *share, *ranks)
    _print(display, "Layers of largest and least update", table)


def _table(*names: str, whole: int = 0) -> Table:
    """A table of these columns; where there is no room, the first so many give way after the others."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(names):
        justify = "right" if index else "left"
        table.add_column(escape(name), justify=justify, overflow="fold", no_wrap=index < whole)
    return table


def _print(display: Display, title: str, table: Table) -> None:
    display.console.print()
    display.console.print(f"[bold]{escape(title)}")
    display.console.print(table)


def _error(value: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:#.3g} %" if value >= 1e-5 else f"{value:.2g}"


def _shorter(names: Sequence[str]) -> Callable[[str], str]:
    """Names without the components that all of them begin with."""
    cut = 0
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1 or len(names) < 2:
            break
        cut += len(parts[0]) + 1
    return lambda name: name[cut:]
