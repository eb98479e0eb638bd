"""The records of ``optimizer.py`` as tables, as a picture, and against their goals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from .view import Record, annotate, grid, p50, picture, yes

DISK_SHARE = 0.70  # of the sequential rate
RESIDENT = 0.95  # torch's time over ours
WITNESSES = {
    "mincore_mb": ("mincore, all of the state", "#4c72b0"),
    "mapping_mb": ("resident set of the mapping", "#55a868"),
    "process_mb": ("growth of the process", "#c44e52"),
}
PEER = "torch fused"


def of_kind(records: Sequence[Record], kind: str) -> list[Record]:
    """The records that answer one question."""
    return [record for record in records if record["kind"] == kind]


def throughput(paging: Record) -> dict[str, float]:
    """What the disk and the steps reach, by medians.

    Returns:
        GB/s, bytes read plus bytes written: "step"; "sequential": written and then read; "mixed": both at once. And
        "share": of the step in the sequential rate; "write" and "read": GB/s of one way.
    """
    seconds = {name: median(some) for name, some in paging["seconds"].items()}
    nbytes = paging["disk_bytes"]
    rates = {
        "write": nbytes / seconds["write"] / 1e9,
        "read": nbytes / seconds["read"] / 1e9,
        "sequential": 2 * nbytes / (seconds["write"] + seconds["read"]) / 1e9,
        "mixed": 2 * nbytes / seconds["mixed"] / 1e9,
        "step": median(paging["traffic"]) / seconds["step"] / 1e9,
    }
    return {**rates, "share": rates["step"] / rates["sequential"]}


def goals(records: Sequence[Record]) -> Iterator[str]:
    """A line for each thing that must hold: what was found, and whether it does."""
    for paging in of_kind(records, "paging"):
        most = (paging["budget"] + paging["spare"]) / 1e6
        for name, (what, _) in WITNESSES.items():
            found = max(paging["samples"][name])
            yield _goal(
                f"{what} ≤ budget + {paging['spare'] / 1e6:.0f} MB = {most:.0f} MB", f"{found:.0f}", found <= most
            )
        yield _goal("paged and unpaged, the same bits", yes(paging["same_bits"]), paging["same_bits"])
        share = throughput(paging)["share"]
        yield _goal(f"of the sequential disk ≥ {DISK_SHARE:.0%}", f"{share:.0%}", share >= DISK_SHARE)
    for limit in of_kind(records, "limit"):
        done = limit["ours"]["finished"] and limit["same_bits"] and not limit["torch"]["finished"]
        found = f"torch {_end(limit['torch'])}; ours {_end(limit['ours'])}"
        yield _goal(f"within {limit['ours']['limit'] / 1e6:.0f} MB of data ours ends, torch's does not", found, done)
    for kill in of_kind(records, "kill"):
        found = f"resumed at step {kill['resumed_at']}: {yes(kill['same_bits'])}"
        yield _goal(f"killed in step {kill['killed_in']}, the same bits in the end", found, kill["same_bits"])
    resident = of_kind(records, "resident")
    for record in resident:
        if record["optimizer"] in ("ours", "ours, in a budget"):
            ratio = _ratio(resident, record, PEER)
            what = f"{record['optimizer']}, {record['set']}: torch's fused time over ours ≥ {RESIDENT}"
            yield _goal(what, f"{ratio:.2f}", ratio >= RESIDENT)


def tables(records: Sequence[Record]) -> Iterator[Table]:
    """Paging; then all in memory."""
    for paging in of_kind(records, "paging"):
        rates = throughput(paging)
        cells = [f"{rates[name]:.2f}" for name in ("write", "read", "sequential", "mixed", "step")]
        yield grid(
            ("GB/s", "write", "read", "write, then read", "both at once", "step", "step / sequential"),
            [("", *cells, f"{rates['share']:.0%}")],
            wrap=True,
            title=f"{paging['state_bytes'] / 1e6:,.0f} MB of state in {paging['tensors']:,} tensors, a budget of "
            f"{paging['budget'] / 1e6:.0f} MB, {paging['steps']} steps; {paging['device']}, commit {paging['commit']}",
            caption=f"bytes read and written over seconds; the disk alone, {'past' if paging['direct'] else 'through'} "
            f"the cache, {paging['file_system']}; a step {median(paging['seconds']['step']):.2f} s, of which "
            f"{median(paging['stalled']):.2f} s waiting",
        )
    if resident := of_kind(records, "resident"):
        first = resident[0]

        def row(record: Record) -> list[str]:
            ms, peer = record["ms"], "bitsandbytes" + ("" if record["bits"] == 32 else ", 8 bits")
            return [
                f"{record['set']}: {record['elements'] / 1e6:.1f} M in {record['tensors']:,}",
                record["optimizer"],
                *(f"{ms[q]:.2f}" for q in ("p50", "p20", "p80")),
                f"{record['bound_ms'] / ms['p50']:.0%}",
                f"{record['state_bytes'] / 1e6:.0f}",
                *(f"{_ratio(resident, record, name):.2f}" for name in (PEER, peer)),
            ]

        yield grid(
            ("set", "optimizer", "median ms", "p20", "p80", "bound", "state MB", "torch/this", "bnb/this"),
            map(row, resident),
            left=("set", "optimizer"),
            wrap=True,
            title=f"all of the state in memory: {first['device']}, commit {first['commit']}",
            caption=f"copy {first['copy_gb_per_s']:.1f} GB/s; bound: the time of the least traffic at that rate over "
            "this; bitsandbytes does not page on CPUs",
        )


def plot(records: Sequence[Record], path: Path) -> None:
    """Draw what was resident over time; the disk and the step; the steps with all in memory."""
    with picture(path, 1, 3, figsize=(16, 5), width_ratios=[2, 0.9, 1.6]) as (_, axes):
        for paging in of_kind(records, "paging"):
            _memory(axes[0][0], paging)
            _disk(axes[0][1], throughput(paging))
        _resident(axes[0][2], of_kind(records, "resident"))


def _memory(axes: Any, paging: Record) -> None:
    samples, budget = paging["samples"], paging["budget"] / 1e6
    order = sorted(range(len(samples["seconds"])), key=samples["seconds"].__getitem__)
    seconds = [samples["seconds"][i] for i in order]
    for name, (label, colour) in WITNESSES.items():
        axes.plot(seconds, [samples[name][i] for i in order], color=colour, label=label, linewidth=1.2)
    axes.axhline(budget, color="black", linestyle="--", linewidth=1, label=f"budget, {budget:.0f} MB")
    most = budget + paging["spare"] / 1e6
    axes.axhline(most, color="black", linestyle=":", linewidth=1, label=f"budget + {paging['spare'] / 1e6:.0f} MB")
    for end in paging["ends"]:
        axes.axvline(end, color="grey", linewidth=0.6)
    axes.set(xlabel="seconds; a line at the end of each step", ylabel="MB in memory", ylim=(0, 1.35 * most))
    axes.set_title(f"{paging['state_bytes'] / 1e6:,.0f} MB of state: what is in memory")
    axes.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)


def _disk(axes: Any, rates: Mapping[str, float]) -> None:
    names = {"sequential": "disk, write\nthen read", "mixed": "disk, both\nat once", "step": "step"}
    for x, name in enumerate(names):
        axes.bar(x, rates[name], color="#c44e52" if name == "step" else "#8c8c8c", width=0.6)
        annotate(axes, x, rates[name], f"{rates[name]:.2f}")
    goal = DISK_SHARE * rates["sequential"]
    axes.axhline(goal, color="black", linestyle=":", linewidth=1)
    annotate(axes, 2.4, goal, f"{DISK_SHARE:.0%}", ha="right", fontsize=8)
    axes.set_xticks(range(len(names)), labels=names.values())
    axes.set(ylabel="GB/s, read and written")
    axes.margins(y=0.12)
    axes.set_title("a step beside the disk alone")


def _resident(axes: Any, resident: Sequence[Record]) -> None:
    sets = list(dict.fromkeys(record["set"] for record in resident))
    optimizers = list(dict.fromkeys(record["optimizer"] for record in resident))
    width = 0.8 / max(len(sets), 1)
    for number, title in enumerate(sets):
        some = {record["optimizer"]: record for record in resident if record["set"] == title}
        xs = [optimizers.index(name) + (number - (len(sets) - 1) / 2) * width for name in some]
        axes.bar(xs, [p50(record) for record in some.values()], width=width, color=f"C{number % 2}", label=title)
        for x, record in zip(xs, some.values(), strict=True):
            annotate(axes, x, p50(record), f"{p50(record):.0f}", fontsize=8)
            axes.hlines(record["bound_ms"], x - width / 2, x + width / 2, color="black", linestyle=":")
    axes.set_xticks(range(len(optimizers)), labels=optimizers, rotation=25, ha="right", fontsize=9)
    axes.set(ylabel="ms a step; dotted: the bound")
    axes.margins(y=0.12)
    axes.set_title("all of the state in memory")
    if sets:
        axes.legend(frameon=False, fontsize=8)


def _ratio(resident: Sequence[Record], record: Record, peer: str) -> float:
    """The time of a peer over that of a record, on the same set."""
    other = next((one for one in resident if (one["set"], one["optimizer"]) == (record["set"], peer)), None)
    return p50(other) / p50(record) if other else float("nan")


def _goal(what: str, found: str, holds: bool) -> str:
    return f"{'yes' if holds else 'NO '}  {what}: {found}"


def _end(process: Record) -> str:
    if process["finished"]:
        return "finished"
    _, _, said = process["error"].rpartition("DefaultCPUAllocator: ")  # behind a line of PyTorch's source
    return f"failed ({said.partition('. ')[0]})"
