"""``qloralab memory`` as a table, and the LLaMA models of the paper by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..checkpoint.models import check_model, default_model, load_tokenizer_and_config, quiet, reading
from ..checkpoint.output_directory import count_text, size_text
from ..compute import precision, run_device
from ..data_types import named_data_type
from ..errors import UserError
from ..settings import Dtype, Method
from .predict import PARTS, Job, Memory, predict

# LLaMA (arXiv 2302.13971, table 2): hidden size, blocks, heads, inner size of the feed-forward layers.
LLAMA = {
    "llama-7b": (4096, 32, 32, 11008),
    "llama-13b": (5120, 40, 40, 13824),
    "llama-33b": (6656, 60, 52, 17920),
    "llama-65b": (8192, 80, 64, 22016),
}
_MEANING = {
    "weights": "of the linear layers",
    "dense": "embeddings, norms, head",
    "adapters": "float32",
    "gradients": "of what trains, float32",
    "optimizer": "AdamW's moments",
    "activations": "saved for backward",
    "working": "logits of a chunk, a weight in full",
    "constants": "interpreter and libraries, here",
}


def config_of(model: str | None) -> Any:
    """The configuration of a model: a name of ``LLAMA``, a config.json, or what ``--model`` takes; None: the default.

    Raises:
        UserError: there is no such model.
    """
    from transformers import AutoConfig, LlamaConfig

    if model in LLAMA:
        hidden, blocks, heads, inner = LLAMA[model]
        return LlamaConfig(
            hidden_size=hidden, num_hidden_layers=blocks, num_attention_heads=heads, intermediate_size=inner
        )
    path = default_model() if model is None else Path(model)
    if path.name == "config.json" and path.is_file():
        with reading(path):
            return AutoConfig.from_pretrained(str(path.parent), local_files_only=True)
    try:
        check_model(path)
    except UserError as error:
        raise UserError(f"{error}; or give one of {', '.join(LLAMA)}") from None
    with quiet():
        return load_tokenizer_and_config(path)[1]


def memory(
    model: str | None,
    method: Method,
    data_type: str,
    dtype: Dtype,
    out: Path | None,
    console: Console,
    **sizes: Any,
) -> Memory:
    """Predict and show.

    Args:
        model: see ``config_of``.
        method, dtype: as ``Settings`` has them; "auto" is what this machine multiplies.
        data_type: see ``named_data_type``.
        out: a JSON file to write, or None.
        console: for the table.
        sizes: the other fields of ``Job``.
    """
    kind = named_data_type(data_type)
    chosen = precision("auto", run_device()).dtype if dtype == "auto" else getattr(torch, dtype)
    job = Job(method=method, dtype=chosen, data_type=kind, **sizes)
    found = predict(config_of(model), job)
    console.print(table(model or default_model().name, job, found))
    if out:
        values = {"model": model, "job": _plain(job), "bytes": dataclasses.asdict(found), "peak": found.peak}
        out.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return found


def _plain(job: Job) -> dict[str, Any]:
    values = {field.name: getattr(job, field.name) for field in dataclasses.fields(job)}
    return values | {"dtype": str(job.dtype).removeprefix("torch."), "data_type": job.data_type.settings()}


def table(name: str, job: Job, found: Memory) -> Table:
    """The parts and the peak."""
    how = f"{job.method}, {job.batch_size} x {job.max_length} tokens, {str(job.dtype).removeprefix('torch.')}"
    shown = Table(title=f"{name}: {count_text(found.parameters)} parameters, {how}")
    shown.add_column("part")
    shown.add_column("memory", justify="right")
    shown.add_column("what")
    for part in PARTS:
        shown.add_row(part, size_text(getattr(found, part)), _MEANING[part])
    shown.add_section()
    before = found.activations + found.working >= found.gradients + found.block
    moment = "at the end of the forward pass" if before else "at the end of the backward pass"
    shown.add_row("peak", size_text(found.peak), moment)
    return shown
