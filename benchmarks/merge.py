"""What a merged model is worth: the README's job, merged in every way, on the answers that the run held out.

    python -m benchmarks.merge                  train, merge, write benchmarks/records/merge-CLASS.json, show it
    python -m benchmarks.merge --view           show every class of processors again; --view avx2: one of them

Each seed trains twice, ``qloralab finetune`` with its defaults and with ``--merge-aware``, and each run is merged with
``qloralab merge``. The loss is the mean over the answer tokens of the examples that the run held out, in nats. The seed
draws them, so models are compared seed by seed; the interval of a difference is Student's t over the seeds. Base, and
base and adapter, are the run's own validations. A merged directory is read again and validated in the same batches and
dtype; where the merge-aware one is not what its run came to, there is no record.

Runs stay in ``--runs``. One that is complete is not run again, and one that was stopped goes on. What was measured of
a seed is in its ``merged.json`` and is not measured again while that is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from qloralab.checkpoint.models import default_model, load_model
from qloralab.compute import run_device
from qloralab.data.batches import collate
from qloralab.data.encoding import Encoded
from qloralab.display import Display
from qloralab.merge.run import merge
from qloralab.merge.settings import Into, MergeSettings, Onto
from qloralab.merge.survival import overall
from qloralab.nf4.files.json_file import read_object, write_object
from qloralab.nf4.processor import processor_class
from qloralab.settings import STDLIB, STEPS, Settings
from qloralab.train.finetune import finetune, resume
from qloralab.train.loss import AnswerLoss
from qloralab.train.prepare import Material, read_data
from qloralab.train.trainer import LENGTH_MULTIPLE

from .case import WrongResultError
from .paper.interval import shown, student
from .record import TRIALS, parse, provenance, record_file, record_files, write
from .view import grid, show

SEEDS = 3
PLAIN, AWARE = "plain", "merge-aware"  # the runs of a seed
BASE, ADAPTED, MERGED_AWARE = "base", "base and adapter", "merge-aware, 4 bits"
MEASURED = "merged.json"
SURVIVING = ("codes_changed", "kept", "cosine")
SAME_LOSS = 1e-4  # the same weights, multiplied by the same code
WIDTH = 140  # of the table, where the terminal says less or is none


@dataclasses.dataclass(frozen=True)
class Way:
    """One merge: of which run, into what, onto what."""

    run: str
    into: Into
    onto: Onto


WAYS = {
    "merged, bfloat16": Way(PLAIN, "bf16", "dequantized"),
    "merged, 4 bits, onto dequantized": Way(PLAIN, "4bit", "dequantized"),
    "merged, 4 bits, onto original": Way(PLAIN, "4bit", "original"),
    MERGED_AWARE: Way(AWARE, "4bit", "dequantized"),
}


def trained(settings: Settings, path: Path, display: Display) -> dict[str, Any]:
    """The result of the run at a path: one that is there, goes on, or is made now.

    Raises:
        SystemExit: the run that is there has other settings, or was stopped just now.
    """
    if not (path / "config.json").is_file():
        result = dataclasses.asdict(finetune(dataclasses.replace(settings, out=path), display))
    else:
        config = read_object(path / "config.json")
        if config["given"] != settings.given():
            raise SystemExit(f"{path} is a run with other settings; give --runs another folder")
        result = config.get("result")
        if not result or result["interrupted"]:
            result = dataclasses.asdict(resume(path, display=display))
    if result["interrupted"]:
        raise SystemExit(f"{path} was stopped; the same command goes on with it")
    return result


@torch.no_grad()
def validation(directory: Path, held_out: Sequence[Encoded], dtype: torch.dtype, batch_size: int) -> float:
    """The mean loss of a model on held-out answers, in the batches of a run's own validation.

    Args:
        directory: of the model.
        held_out: the examples.
        dtype: that is computed in.
        batch_size: of the run; a validation takes twice as many examples at once.
    """
    device = run_device()
    loss = AnswerLoss(load_model(directory, dtype).to(device))
    order = sorted(held_out, key=lambda example: len(example.input_ids))
    total, count = 0.0, 0
    for start in range(0, len(order), 2 * batch_size):
        rows = collate(order[start : start + 2 * batch_size], LENGTH_MULTIPLE)
        found, labels = loss(rows["input_ids"].to(device), rows["labels"].to(device))
        total, count = total + found.item(), count + labels
    return total / count


def models(settings: Settings, folder: Path, display: Display) -> dict[str, dict[str, Any]]:
    """The figures of every model of one seed.

    Args:
        settings: of the run without ``--merge-aware``.
        folder: that the two runs are in.
        display: shows the training.

    Returns:
        by model its ``loss``; of the merged ones ``bytes``, and in 4 bits ``codes_changed``, ``kept`` and ``cosine``.

    Raises:
        WrongResultError: merged, the merge-aware model is not what was trained.
    """
    runs = {PLAIN: settings, AWARE: dataclasses.replace(settings, merge_aware=True)}
    results = {name: trained(run, folder / name, display) for name, run in runs.items()}
    found: dict[str, dict[str, Any]] = {
        BASE: {"loss": results[PLAIN]["val_before"]},
        ADAPTED: {"loss": results[PLAIN]["val_after"]},
    }
    kept = folder / MEASURED
    found |= read_object(kept) if kept.is_file() else {}
    silent = Display(Console(file=io.StringIO()))
    read = read_data(settings, silent)
    for name, way in WAYS.items():
        if name not in found:
            display.fact("merging", f"{folder}: {name}")
            found[name] = _measured(way, settings, folder / way.run / "adapter", read, silent)
            write_object(kept, {one: found[one] for one in WAYS if one in found})
    merged, as_trained = found[MERGED_AWARE]["loss"], results[AWARE]["val_after"]
    if abs(merged - as_trained) > SAME_LOSS:
        raise WrongResultError(f"{folder}: {AWARE} is {as_trained:.6f} as it trained, and {merged:.6f} merged")
    return found


def _measured(way: Way, settings: Settings, adapter: Path, read: Material, silent: Display) -> dict[str, Any]:
    """Merge in a way; read what came of it, and validate it."""
    with tempfile.TemporaryDirectory() as directory:
        out, force = Path(directory, "model"), way.into == "4bit"
        made = merge(
            MergeSettings(model=settings.model, adapter=adapter, out=out, into=way.into, onto=way.onto, force=force),
            silent,
        )
        loss = validation(out, read.held_out, read.precision.dtype, settings.batch_size)
    survived = overall(made.survived) if made.survived else None
    figures = {figure: getattr(survived, figure) for figure in SURVIVING} if survived else {}
    return {"loss": loss, "bytes": made.bytes, **figures}


def records(by_seed: Mapping[int, Mapping[str, Mapping[str, Any]]], steps: int) -> list[dict[str, Any]]:
    """A record for each model: what each seed came to, their mean, and the difference to base and adapter."""
    made = []
    for name in (BASE, ADAPTED, *WAYS):
        mine = [figures[name] for figures in by_seed.values()]
        losses = [one["loss"] for one in mine]
        differences = [figures[name]["loss"] - figures[ADAPTED]["loss"] for figures in by_seed.values()]
        means = {figure: sum(one[figure] for one in mine) / len(mine) for figure in mine[0] if figure != "loss"}
        made.append(
            {
                "benchmark": "merge",
                "model": name,
                "steps": steps,
                "seeds": [*by_seed],
                "losses": losses,
                "loss": student(losses),
                "difference": None if name == ADAPTED else student(differences),
                **means,
                **provenance(),
            }
        )
    return made


def table(found: Sequence[Mapping[str, Any]]) -> Table:
    """The records of a class of processors."""
    first = found[0]
    rows = [
        (
            one["model"],
            f"{one['bytes'] / 1e6:.0f}" if "bytes" in one else "",
            f"{one['loss']['value']:.3f}",
            ", ".join(f"{loss:.3f}" for loss in one["losses"]),
            "" if one["difference"] is None else shown(one["difference"], sign=True),
            f"{100 * one['codes_changed']:.2g} %" if "codes_changed" in one else "",
            f"{one['kept']:.3f}" if "kept" in one else "",
            f"{one['cosine']:.3f}" if "cosine" in one else "",
        )
        for one in found
    ]
    headings = ("model", "MB", "loss", "each seed", "to base and adapter", "codes changed", "kept", "cosine")
    title = f"{first['class']}: {first['steps']} steps, seeds {', '.join(map(str, first['seeds']))}, {first['device']}"
    return grid(headings, rows, left=("model",), wrap=True, title=title)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, merge, write the records, show them."""
    parser = argparse.ArgumentParser(description="The loss of merged models, over seeds.")
    parser.add_argument("--view", nargs="?", const="all", metavar="CLASS", help="show the records, measure nothing")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="runs of each kind")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run")
    parser.add_argument("--model", type=Path, help="Hugging Face directory or GGUF file; by default SmolLM2-135M")
    parser.add_argument("--data", default=STDLIB, help="as finetune has it")
    parser.add_argument("--runs", type=Path, default=TRIALS / "merge", help="folder of the runs")
    args = parse(parser, arguments)
    if not args.view:
        display, by_seed = Display(), {}
        for seed in range(args.seeds):
            settings = Settings(
                out=None, model=args.model or default_model(), data=args.data, steps=args.steps, seed=seed
            )
            by_seed[seed] = models(settings, args.runs / f"seed-{seed}", display)
        write(records(by_seed, args.steps), record_file(args.out, "merge"))
    files = record_files(args.out, "merge", args.view or processor_class())
    show([table(json.loads(file.read_text())) for file in files], WIDTH)


if __name__ == "__main__":
    main()
