"""Figure 2: adapters at every linear layer against attention only, at equal parameters, for ranks 4 to 64.

The paper finds that adapters at all linear layers are what it takes to match 16-bit fine-tuning, and that the rank
hardly matters then. A rank r at every layer trains ``r * sum(in + out)`` parameters; attention alone gets the rank that
comes nearest to as many. NF4, alpha twice the rank, so that the scaling is the same for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qloralab.lora.config import ALL_LINEAR, LoraConfig
from qloralab.nf4.data_type import DATA_TYPES

from ..view import picture as figure
from .fine_tuning import ATTENTION, Budget, Task
from .interval import shown, student
from .models import linear_weights, load
from .table import Context, Record, Records, grid

TITLE = "Adapters: every linear layer, or attention only (Figure 2)"


@dataclass(frozen=True)
class Settings:
    """The budget of a run, the ranks at all layers, the learning rate."""

    budget: Budget
    ranks: tuple[int, ...] = (4, 8, 16, 32, 64)
    lr: float = 3e-3


SETTINGS = {
    "full": Settings(Budget(seeds=5, steps=40)),
    "quick": Settings(Budget(seeds=2, steps=12, read=800, held_out=32), ranks=(4, 16, 64)),
    "tiny": Settings(Budget(seeds=2, steps=2, batch=2, length=256, read=160, held_out=2), ranks=(2,)),
}


def equal_rank(r: int, model: Path) -> int:
    """The rank at attention alone that trains about as many parameters as r at all linear layers."""
    shapes = {name: sum(weight.shape) for name, weight in linear_weights(load(model)).items()}
    attention = sum(size for name, size in shapes.items() if name.rpartition(".")[2] in ATTENTION)
    return max(1, round(r * sum(shapes.values()) / attention))


def rows(context: Context) -> list[Record]:
    """A record for each rank and choice of layers."""
    settings, records = context.of(SETTINGS), []
    task = Task.of(context.tinylm, settings.budget)
    cases = [(r, "all linear", ALL_LINEAR, r) for r in settings.ranks]
    cases += [(r, "attention only", ATTENTION, equal_rank(r, context.tinylm)) for r in settings.ranks]
    with context.display.busy("adapters", "runs") as progress:
        for index, (r, layers, targets, rank) in enumerate(cases):
            config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
            runs = []
            for seed in range(settings.budget.seeds):
                runs.append(task.run("qlora", settings.lr, seed, DATA_TYPES["nf4"], config))
                progress(index * settings.budget.seeds + seed + 1, len(cases) * settings.budget.seeds)
            after = [run["after"] for run in runs]
            records.append(
                {"kind": "adapters", "model": task.model.name, "of_rank": r, "layers": layers, "r": rank}
                | {"parameters": runs[0]["parameters"], "tokens": runs[0]["tokens"], "steps": settings.budget.steps}
                | {"seeds": len(runs), "lr": settings.lr, "held_out": len(task.held_out)}
                | {"losses": after, "after": student(after)}
            )
    for record in records:
        (other,) = (one for one in records if one["of_rank"] == record["of_rank"] and one["layers"] == "all linear")
        record["less_all"] = student([a - b for a, b in zip(record["losses"], other["losses"], strict=True)])
    return records


def markdown(records: Records) -> str:
    """Ranks below each other, the two choices of layers side by side in turn."""
    first = records[0]
    cells = [
        [
            one["layers"],
            str(one["r"]),
            f"{one['parameters']:,}",
            shown(one["after"]),
            "0" if one["layers"] == "all linear" else shown(one["less_all"], sign=True),
        ]
        for one in sorted(records, key=lambda one: (one["of_rank"], one["layers"]))
    ]
    headings = ("adapters at", "rank", "parameters", "loss after", "less all linear's, paired")
    return "\n\n".join(
        [
            f"{first['model']} in NF4, {first['steps']} steps, {first['tokens']:,} tokens, learning rate "
            f"{first['lr']:g}, "
            f"{first['seeds']} seeds; the loss of {first['held_out']} held-out docstrings. The paper's Figure 2 has "
            "LLaMA "
            "7B on Alpaca, thousands of steps, and RougeL.",
            grid(headings, cells),
        ]
    )


def picture(records: Records, path: Path) -> None:
    """The loss over the parameters that train."""
    with figure(path, 1, 1, figsize=(7, 4)) as (_, axes):
        axis = axes[0][0]
        for number, layers in enumerate(dict.fromkeys(one["layers"] for one in records)):
            some = sorted((one for one in records if one["layers"] == layers), key=lambda one: one["parameters"])
            x = [one["parameters"] for one in some]
            axis.plot(x, [one["after"]["value"] for one in some], marker="o", color=f"C{number}", label=layers)
            for one in some:
                axis.scatter([one["parameters"]] * one["seeds"], one["losses"], s=12, alpha=0.5, color=f"C{number}")
        axis.set(xscale="log", xlabel="parameters that train", ylabel="loss of held-out answers, nats a token")
        axis.legend(frameon=False)
