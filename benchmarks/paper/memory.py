"""Memory: LLaMA of 7 B to 65 B predicted beside the paper's bars (Figure 6), and three methods predicted and measured.

The prediction is that of ``qloralab memory`` (``qloralab/memory/predict.py``): the model is laid out on the meta device
with the paper's settings for Figure 6: batch 1, 512 tokens, checkpointing, r = 64, AdamW with 32-bit moments. What is
measured is the largest resident memory of a process that trains two steps on batches that are as large as the
predicted one.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from qloralab.data.stdlib_corpus import stdlib_examples
from qloralab.memory.predict import Job, predict
from qloralab.memory.report import LLAMA, config_of
from qloralab.nf4.data_type import data_type

from ..view import picture as figure
from .table import Context, Record, Records, grid

TITLE = "Memory: predicted beside the paper's bars, and measured (Figures 1 and 6)"
# Figure 6, in 10**6 bytes: the model in 4 bits, the adapters, the optimizer; and the total of its bar.
FIGURE_6 = {
    "llama-7b": (5046, 288, 1152, 6900),
    "llama-13b": (8476, 450, 1800, 11300),
    "llama-33b": (19302, 877.5, 3510, 24700),
    "llama-65b": (37074, 1440, 5760, 45000),
}
_ROOM = 4  # examples of the file for one of a batch
_CHILD = """
import json, sys
from pathlib import Path
import torch
from qloralab.checkpoint.models import default_model
from qloralab.compute import precision, run_device
from qloralab.memory.predict import Job, predict
from qloralab.memory.report import config_of
from qloralab.nf4.data_type import data_type
from qloralab.settings import Settings
from qloralab.train.finetune import finetune

method, model, data, out, batch, length = sys.argv[1:]
size = {"batch_size": int(batch), "max_length": int(length)}
job = Job(method=method, dtype=precision("auto", run_device()).dtype, data_type=data_type("nf4"), **size)
predicted = predict(config_of(model), job)
settings = Settings(model=Path(model), data=data, format="text", too_long="cut", method=method, out=Path(out), steps=2,
                    eval_every=2, held_out=1, **size)
print(json.dumps({"predicted": predicted.peak, "measured": finetune(settings).peak_mb * 1e6}))
"""


@dataclass(frozen=True)
class Settings:
    """Names of ``LLAMA``; whether to measure; examples of a batch, and tokens of each."""

    models: tuple[str, ...] = tuple(LLAMA)
    measured: bool = True
    batch: int = 4
    length: int = 256


SETTINGS = {"full": Settings(), "quick": Settings(), "tiny": Settings(models=("llama-7b",), measured=False)}


def rows(context: Context) -> list[Record]:
    """A record for each of the paper's models, and one for each method."""
    settings = context.of(SETTINGS)
    paper = {"batch_size": 1, "max_length": 512, "checkpointing": True, "r": 64}
    job = Job(method="qlora", dtype=torch.bfloat16, data_type=data_type("nf4"), **paper)
    records: list[Record] = []
    for name in settings.models:
        found = predict(config_of(name), job, constants=0)
        parts = dict(zip(("model", "adapters", "optimizer", "total"), FIGURE_6[name], strict=True))
        records.append(
            {"kind": "predicted", "model": name, "bytes": dataclasses.asdict(found), "peak": found.peak, "paper": parts}
        )
    if settings.measured:
        methods = ("qlora", "lora", "full")
        with context.display.busy("training", "methods") as progress:
            for done, method in enumerate(methods, 1):
                records.append(_measured(context.smollm2 or context.tinylm, method, settings))
                progress(done, len(methods))
    return records


def _measured(model: Path, method: str, settings: Settings) -> Record:
    texts = [one.messages[0].content for one in stdlib_examples()]
    longest = sorted(texts, key=len, reverse=True)[: _ROOM * settings.batch]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "long.jsonl")
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in longest), encoding="utf-8")
        arguments = [method, str(model), str(data), f"{folder}/run", str(settings.batch), str(settings.length)]
        command = [sys.executable, "-c", _CHILD, *arguments]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return {"kind": "measured", "model": model.name, "method": method, **json.loads(done.stdout.splitlines()[-1])}


def markdown(records: Records) -> str:
    """The paper's models, then the methods."""
    predicted = [one for one in records if one["kind"] == "predicted"]
    cells = []
    for one in predicted:
        found, paper = one["bytes"], one["paper"]
        model = (found["weights"] + found["dense"]) / 1e6
        cells.append([
            one["model"],
            f"{model:,.0f} / {paper['model']:,.0f}",
            f"{found['adapters'] / 1e6:,.0f} / {paper['adapters']:,.0f}",
            f"{found['optimizer'] / 1e6:,.0f} / {paper['optimizer']:,.0f}",
            f"{(found['activations'] + found['working']) / 1e6:,.0f}",
            f"{one['peak'] / 1e9:.1f} / {paper['total'] / 1e3:.1f}",
        ])  # fmt: skip
    parts = [
        "Predicted here / in the paper's Figure 6, in MB and, in the last column, GB: batch 1, 512 tokens, "
        "checkpointing, r = 64 beside every linear layer, without the interpreter and libraries. The adapters are "
        "float32 here, so they take about twice what the paper's do; the moments are float32 in both. The paper's bar "
        "of the model is more than its weights at 4.127 bits and its embeddings in 16, which is what is counted here.",
        grid(("model", "model", "adapters", "optimizer", "activations", "peak, GB"), cells),
    ]
    measured = [one for one in records if one["kind"] == "measured"]
    if measured:
        some = [
            [
                one["method"],
                *(f"{one[key] / 1e9:.2f}" for key in ("predicted", "measured")),
                f"{one['predicted'] / one['measured'] - 1:+.1%}",
            ]
            for one in measured
        ]
        parts += [
            f"{measured[0]['model']}, two steps of full batches, the largest resident memory of the process:",
            grid(("method", "predicted, GB", "measured, GB", "difference"), some),
        ]
    return "\n\n".join(parts)


def picture(records: Records, path: Path) -> None:
    """Bars of the parts, the paper's totals as marks."""
    predicted = [one for one in records if one["kind"] == "predicted"]
    with figure(path, 1, 1, figsize=(8, 4)) as (_, axes):
        axis, bottom = axes[0][0], [0.0] * len(predicted)
        names = [one["model"] for one in predicted]
        for part in ("weights", "dense", "adapters", "gradients", "optimizer", "activations", "working"):
            heights = [one["bytes"][part] / 1e9 for one in predicted]
            axis.bar(names, heights, bottom=bottom, label=part)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        totals = [one["paper"]["total"] / 1e3 for one in predicted]
        axis.scatter(names, totals, marker="D", color="black", zorder=3, label="the paper's total")
        axis.set(ylabel="GB")
        axis.legend(fontsize="small")
