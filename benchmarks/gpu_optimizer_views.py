"""The records of ``benchmarks/gpu_optimizer.py`` as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table


def tables(records: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """The steps; beneath, the ceilings and the overlap."""
    found = {
        kind: [record for record in records if record["kind"] == kind] for kind in ("ceilings", "overlap", "paging")
    }
    first = records[0]
    lines = []
    for record in found["ceilings"]:
        lines += [
            f"GB/s: copy on the device {record['copy']:,.0f}; pinned memory to the device {record['to_device']:.0f}, "
            f"to the host {record['to_host']:.0f}, both {record['both']:.0f}; managed memory by prefetch to the device "
            f"{record['prefetch_to_device']:.0f}, to the host {record['prefetch_to_host']:.1f}, "
            f"both {record['prefetch_both']:.0f}"
        ]
    for record in found["overlap"]:
        read, written, updated = (record[name]["p50"] for name in ("read", "write", "update"))
        lines += [f"state on the host, ms: read {read:.1f}, written {written:.1f}, updated {updated:.1f}"]
    for record in found["paging"]:
        some = record["budget"]
        lines += [
            f"{record['bits']} bits, budget: {some['state_bytes'] / 1e6:.0f} MB of state, "
            f"{some['resident_bytes'] / 1e6:.0f} resident; the device gave {some['given_by_device'] / 1e6:.0f}; "
            f"{', '.join(some['pointers'])} memory; bits as without"
        ]
    view = Table(title=f"{first['device']}, commit {first['commit']}: a step of AdamW", caption="\n".join(lines))
    for heading in ("set", "optimizer", "state", "median ms", "bound", "link GB/s", "torch/this", "bnb/this"):
        view.add_column(heading, justify="left" if heading in ("set", "optimizer", "state") else "right", no_wrap=True)
    for record in records:
        if record["kind"] == "point":
            peer = "bitsandbytes paged" + ("" if record["bits"] == 32 else ", 8 bits")
            view.add_row(
                f"{record['set']}, {record['elements'] / 1e6:.0f} M in {record['tensors']:,}",
                record["optimizer"],
                "host" if record["away"] else "device",
                f"{record['ms']['p50']:.3f}",
                f"{record['roofline_share']:.0%}" if record["roofline_share"] else "",
                f"{record['link_gb_per_s']:.0f}" if record["link_gb_per_s"] else "",
                f"{record['ratios']['torch fused']:.2f}" if "torch fused" in record["ratios"] else "",
                f"{record['ratios'][peer]:.2f}" if peer in record["ratios"] else "",
            )
    yield view
