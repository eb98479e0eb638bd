"""Tables 3 and 4 in miniature: full fine-tuning, LoRA, and QLoRA by data type, on the same data and budget.

Rank 16 at every linear layer, alpha twice the rank, no dropout. Full fine-tuning wants another learning rate than
adapters do, so each of the two is chosen from three, by the loss after training with a seed that is not used again.
Intervals are Student's over the seeds; the difference to LoRA is taken seed by seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qloralab.lora.config import LoraConfig
from qloralab.nf4.data_type import DATA_TYPES
from qloralab.settings import Method

from ..view import picture as figure
from .fine_tuning import Budget, Task
from .interval import shown, student
from .table import Context, Record, Records, grid, of_kind

TITLE = "Full, LoRA, QLoRA by data type (Tables 3 and 4, in miniature)"
_SEARCH = 1000  # the seed that learning rates are chosen with


@dataclass(frozen=True)
class Settings:
    """The budget of a run, the rank, the learning rates to choose from, the data types."""

    budget: Budget
    r: int = 16
    full_lrs: tuple[float, ...] = (2e-4, 5e-4, 1e-3)
    adapter_lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    data_types: tuple[str, ...] = ("nf4", "fp4", "int4", "af4", "bof4", "bof4-s", "nvfp4")


SETTINGS = {
    "full": Settings(Budget(seeds=5, steps=40)),
    "quick": Settings(Budget(seeds=2, steps=12, read=800, held_out=32), adapter_lrs=(3e-3,), full_lrs=(5e-4,)),
    "tiny": Settings(
        Budget(seeds=2, steps=2, batch=2, length=256, read=160, held_out=2),
        r=2,
        full_lrs=(5e-4,),
        adapter_lrs=(3e-3,),
        data_types=("nf4",),
    ),
}


def rows(context: Context) -> list[Record]:
    """A record for each learning rate tried, and one for each method."""
    settings, records = context.of(SETTINGS), []
    task = Task.of(context.tinylm, settings.budget)
    config = LoraConfig(r=settings.r, lora_alpha=2 * settings.r)
    methods: list[tuple[str, Method, str | None]] = [("full", "full", None), ("LoRA, float32", "lora", None)]
    methods.extend((f"QLoRA, {name}", "qlora", name) for name in settings.data_types)
    searched = {"full": settings.full_lrs, "lora": settings.adapter_lrs}
    total = sum(map(len, searched.values())) + len(methods) * settings.budget.seeds
    with context.display.busy("fine-tuning", "runs") as progress:
        done, best = 0, {}
        for method in ("full", "lora"):
            losses = {}
            for lr in searched[method]:
                found = task.run(method, lr, _SEARCH, config=None if method == "full" else config)
                losses[lr] = found["after"]
                records.append({"kind": "search", "method": method, "lr": lr, **found})
                progress(done := done + 1, total)
            best[method] = min(losses, key=losses.__getitem__)
        reference: list[float] = []
        order = sorted(methods, key=lambda one: one[1] != "lora")  # LoRA first: the others are compared with it
        for name, method, data_type in order:
            lr = best["full" if method == "full" else "lora"]
            runs = []
            for seed in range(settings.budget.seeds):
                kind = None if data_type is None else DATA_TYPES[data_type]
                runs.append(task.run(method, lr, seed, kind, None if method == "full" else config))
                progress(done := done + 1, total)
            after = [run["after"] for run in runs]
            reference = reference or after
            records.append(
                {"kind": "method", "name": name, "method": method, "data_type": data_type, "lr": lr}
                | {"model": task.model.name, "seeds": len(runs), "steps": settings.budget.steps}
                | {"parameters": runs[0]["parameters"], "tokens": runs[0]["tokens"], "held_out": len(task.held_out)}
                | {"before": runs[0]["before"], "losses": after, "after": student(after)}
                | {"less_lora": student([ours - theirs for ours, theirs in zip(after, reference, strict=True)])}
            )
    return records


def markdown(records: Records) -> str:
    """The methods one below the other."""
    found = of_kind(records, "method")
    first = found[0]
    cells = [
        [
            one["name"],
            f"{one['parameters']:,}",
            f"{one['lr']:g}",
            f"{one['before']:.3f}",
            shown(one["after"]),
            "0" if one["method"] == "lora" else shown(one["less_lora"], sign=True),
        ]
        for one in sorted(found, key=lambda one: one["method"] != "full")
    ]
    headings = ("method", "trained parameters", "learning rate", "loss before", "loss after", "less LoRA's")
    return "\n\n".join(
        [
            f"{first['model']}; {first['steps']} steps, {first['tokens']:,} tokens of docstrings and their functions; "
            "the loss "
            f"of {first['held_out']} held-out docstrings, nats a token; {first['seeds']} seeds, 95 % intervals "
            "(Student). "
            "The paper's Table 3 measures GLUE and instructions with models of 80 M to 11 B parameters, its Table 4 "
            "MMLU "
            "with LLaMA of 7 B to 65 B. Here only the order of the methods can be compared, and only on one small "
            "task.",
            grid(headings, cells),
            "" if first["seeds"] > 2 else "Two seeds: Student's interval is wide (t = 12.7), and says so.",
        ]
    ).strip()


def picture(records: Records, path: Path) -> None:
    """The loss after training, with its interval and a point for each seed."""
    found = sorted(of_kind(records, "method"), key=lambda one: one["method"] != "full")
    with figure(path, 1, 1, figsize=(7, 0.5 * len(found) + 1.5)) as (_, axes):
        draw(axes[0][0], found, [one["name"] for one in found])
        axes[0][0].set(xlabel="loss of the held-out answers after training, nats a token")


def draw(axis: Any, found: list[Mapping[str, Any]], labels: list[str]) -> None:
    """An interval and the seeds for each record."""
    for row, one in enumerate(found):
        axis.scatter(one["losses"], [row] * len(one["losses"]), s=14, color="#8fb0d6", zorder=2)
        axis.plot(one["after"]["value"], row, "k|", markersize=12)
        if one["after"]["interval"] and one["seeds"] > 2:
            axis.plot(one["after"]["interval"], [row, row], color="black", linewidth=1)
    axis.set_yticks(range(len(labels)), labels=labels)
    axis.invert_yaxis()
