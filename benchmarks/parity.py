"""``qloralab parity`` on 10^8 random weights in each dtype and codebook, and on the default model's linear layers.

    python -m benchmarks.parity           compare, write benchmarks/records/parity.json, show it
    python -m benchmarks.parity --view    show it again, and the short table in Markdown

The exit status is 1 when something differs beyond what is documented. Tensors of 16 million weights come one after the
other: it takes some minutes on two cores, and less than 4 GB.
"""

from __future__ import annotations

import qloralab  # noqa: F401  # isort: skip  # before torch: how OpenMP's threads wait is read when torch is loaded

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from qloralab.checkpoint.models import default_model
from qloralab.errors import UserError
from qloralab.parity.compare import compare
from qloralab.parity.report import from_json, in_short, show, table, to_json

from .record import parse, provenance

WEIGHTS = 100_000_000
FILE = "parity.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, write the record, show it; the exit status."""
    parser = argparse.ArgumentParser(description="Every quantity of a 4-bit weight, beside bitsandbytes.")
    parser.add_argument("--view", action="store_true", help="show the record, compare nothing")
    parser.add_argument("--weights", type=int, default=WEIGHTS, help="random ones, in each dtype and codebook")
    parser.add_argument("--model", type=Path, help="Hugging Face directory or GGUF file; by default SmolLM2-135M")
    parser.add_argument("--no-model", action="store_true", help="random and hostile weights only")
    args = parse(parser, arguments)
    file, console = args.out / FILE, Console()
    if not args.view:
        model = None if args.no_model else args.model or _default_model()
        with Console(stderr=True).status("bitsandbytes") as status:
            report = compare(args.weights, model, progress=status.update)
        report = dataclasses.replace(report, facts={**report.facts, **provenance()})
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(to_json(report, most=3), encoding="utf-8")
    report = from_json(file.read_text(encoding="utf-8"))
    show(report, console)
    if args.view:
        console.width = 200
        console.print(table(in_short(report)))
    return int(report.fails)


def _default_model() -> Path | None:
    try:
        return default_model()
    except UserError as error:
        print(f"without a model: {error}", file=sys.stderr)
        return None


if __name__ == "__main__":
    sys.exit(main())
