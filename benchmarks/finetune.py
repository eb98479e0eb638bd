"""QLoRA here, beside bitsandbytes + PEFT: the same job, each in a process of its own, in turns.

    python -m benchmarks.finetune --steps 60
    python -m benchmarks.finetune --view            show every class of processors again; --view avx2: one of them

Both start from the same bfloat16 weights and see the same batches in the same order, with the same rank, scaling,
dropout, learning rates and clipping, and both compute in the dtype that the processor multiplies in hardware
(``nf4/processor.py``), in which each is the faster; ``--dtype`` chooses another for both. What differs is the library.
The peer is used as its documentation has it: ``BitsAndBytesConfig`` (NF4, double quantization), ``get_peft_model`` on
all linear layers, ``model(..., labels=...).loss``; without ``prepare_model_for_kbit_training``, whose float32 copies
and activation checkpointing would make it slower.

A turn is a few steps, or what comes before and after them; the other process sleeps meanwhile. So what the machine
does besides reaches both. Speed is in tokens of the examples, padding not counted, from the median step; memory is the
peak of the process.
One JSON record per library goes to ``benchmarks/records/``, the class of the processor in its name; the table is a view
of the two.

Our job compiles its allocator, so it needs a C++ compiler; without one the benchmark says so before it begins.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from qloralab.checkpoint.models import default_model, load_model, load_tokenizer, quantize_loaded_, quiet
from qloralab.data.batches import collate, length_grouped_batches, split
from qloralab.data.encoding import NO_LABEL, Encoded, encode_all
from qloralab.data.stdlib_corpus import stdlib_examples
from qloralab.kernels.cpu import allocator
from qloralab.kernels.cpu.build import BuildError
from qloralab.nf4.processor import compute_dtype, processor_class
from qloralab.resident import peak_mb, resident_mb
from qloralab.train.trainer import LENGTH_MULTIPLE, schedule

from .clock import quantiles
from .record import lower_mkl, parse, provenance, record_file, record_files
from .turns import in_turns, turn
from .view import grid, show, yes

LIBRARIES = ("qloralab", "bitsandbytes+peft")
R, ALPHA, DROPOUT, LR, CLIP = 16, 32, 0.05, 5e-4, 0.3
BATCH, MAX_LENGTH, HELD_OUT, SEED = 4, 256, 64, 0
TURN = 4  # steps
# By class: tokens a second over the peer's, at least; memory over the peer's, at most.
GOALS = {"avx512-bf16": (2.0, 1 / 3), "avx2": (1.8, 0.45)}
WIDTH = 100  # of the table, where the terminal says less or is none
SAME_LOSS = 0.03  # between the two after training

Loss = Callable[[dict[str, torch.Tensor]], torch.Tensor]  # a batch -> mean loss of its labels


def qloralab_job(directory: Path, dtype: torch.dtype) -> tuple[Any, Loss]:
    """The model and its loss, as ``qloralab finetune`` sets them up."""
    import qloralab as ql
    from qloralab.train.loss import AnswerLoss

    allocator.install()
    model = quantize_loaded_(load_model(directory), dtype)
    ql.inject_(model, ql.LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=DROPOUT))
    answer_loss = AnswerLoss(model)

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        total, count = answer_loss(batch["input_ids"], batch["labels"])
        return total / count

    return model, loss


def peft_job(directory: Path, dtype: torch.dtype) -> tuple[Any, Loss]:
    """The model and its loss, as the documentation of transformers and PEFT sets them up."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    with quiet():
        base = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, dtype=dtype)
    adapters = LoraConfig(
        r=R, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, adapters)
    return model, lambda batch: model(**batch).loss


JOBS = {"qloralab": qloralab_job, "bitsandbytes+peft": peft_job}


def run(library: str, directory: Path, steps: int, dtype: torch.dtype) -> dict[str, Any]:
    """Train with one library and measure it, in this process, in turns with the other."""
    tokenizer = load_tokenizer(default_model())
    encoded = encode_all(stdlib_examples(), tokenizer, MAX_LENGTH, "skip")
    train, held_out = split(encoded, HELD_OUT, SEED)
    order = length_grouped_batches([len(example.input_ids) for example in train], BATCH, SEED, epoch=0)

    torch.manual_seed(SEED)
    model, loss = JOBS[library](directory, dtype)
    multiple = LENGTH_MULTIPLE if library == "qloralab" else 1  # each pads as it does outside this file
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)
    loaded = resident_mb()
    before = validate(model, loss, held_out)
    losses, seconds, tokens = [], [], []
    model.train()
    for step in range(steps):
        if step % TURN == 0:
            turn()
        examples = [train[i] for i in order[step]]
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = LR * schedule(step, steps)
        value = loss(collate(examples, multiple))
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
        seconds.append(time.perf_counter() - start)
        tokens.append(sum(len(example.input_ids) for example in examples))
    peak = peak_mb()
    turn()
    after = validate(model, loss, held_out)
    rates = [t / s for t, s in zip(tokens, seconds, strict=True)]
    return {
        "benchmark": "finetune",
        "library": library,
        "dtype": str(dtype).removeprefix("torch."),
        "steps": steps,
        "tokens": sum(tokens),
        "tokens_per_s": {**quantiles(rates), "all": sum(tokens) / sum(seconds)},
        "loaded_mb": loaded,
        "peak_mb": peak,
        "val_before": before,
        "val_after": after,
        "losses": losses,
        "trainable": sum(p.numel() for p in parameters),
        **provenance(),
    }


@torch.no_grad()
def validate(model: Any, loss: Loss, held_out: Sequence[Encoded]) -> float:
    """Mean loss of the held-out answers. Only the dropouts are put in evaluation mode: an evaluation-mode forward of
    bitsandbytes on an AVX512 CPU rearranges its weights in place."""
    for module in model.modules():
        module.training = type(module).__name__ not in ("Dropout", "LoRALinear")
    total, count = 0.0, 0
    rows = sorted(held_out, key=lambda example: len(example.input_ids))
    for start in range(0, len(rows), 2 * BATCH):
        batch = collate(rows[start : start + 2 * BATCH])
        labels = int((batch["labels"][:, 1:] != NO_LABEL).sum())
        total += loss(batch).item() * labels
        count += labels
    model.train()
    return total / count


def table(records: Sequence[Mapping[str, Any]]) -> Table:
    """The records of a class side by side; then ours over theirs, the goal, and whether it is reached."""
    ours, theirs = (next(r for r in records if r["library"] == name) for name in LIBRARIES)
    kind = ours["class"]
    speed, memory = GOALS.get(kind, (None, None))
    rows = []
    for name, value, form, relation, goal in (
        ("tokens/s, median step", lambda r: r["tokens_per_s"]["p50"], "{:,.0f}", "≥", speed),
        ("tokens/s, whole training", lambda r: r["tokens_per_s"]["all"], "{:,.0f}", "", None),
        ("peak memory, MB", lambda r: r["peak_mb"], "{:,.0f}", "≤", memory),
        ("validation loss before", lambda r: r["val_before"], "{:.3f}", "", None),
        ("validation loss after", lambda r: r["val_after"], "{:.3f}", "within", SAME_LOSS),
    ):
        a, b = value(ours), value(theirs)
        reached = goal and {"≥": a / b >= goal, "≤": a / b <= goal, "within": abs(a - b) <= goal}[relation]
        rows.append((name, form.format(a), form.format(b), f"{a / b:.2f}"))
        rows[-1] += (f"{relation} {goal:.2g}", yes(bool(reached))) if goal else ("", "")
    title = f"{kind}: {ours['steps']} steps, {ours['tokens']:,} tokens, {ours['dtype']}, {ours['device']}"
    return grid(("", *LIBRARIES, "ratio", "goal", "reached"), rows, left=("", "goal"), wrap=True, title=title)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run both libraries, write the records, print the table."""
    parser = argparse.ArgumentParser(description="QLoRA here beside bitsandbytes + PEFT.")
    parser.add_argument("--view", nargs="?", const="all", metavar="CLASS", help="show the records, measure nothing")
    parser.add_argument("--steps", type=int, default=60, help="two at least")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="to compute in")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parse(parser, arguments)
    if args.worker:
        library, directory = args.worker
        dtype = compute_dtype("cpu").dtype if args.dtype == "auto" else getattr(torch, args.dtype)
        turn()
        print(json.dumps(run(library, Path(directory), args.steps, dtype)))
        return
    if not args.view:
        try:
            allocator.install()
        except BuildError as error:
            raise SystemExit(f"this job needs a C++ compiler, for the allocator that it runs with: {error}") from error
        lower_mkl()
        args.out.mkdir(parents=True, exist_ok=True)
        for record in measure(args.steps, args.dtype):
            record_file(args.out, f"finetune-{record['library']}").write_text(json.dumps(record, indent=1) + "\n")
    for file in record_files(args.out, f"finetune-{LIBRARIES[0]}", args.view or processor_class()):
        files = [file.with_name(file.name.replace(LIBRARIES[0], library)) for library in LIBRARIES]
        show([table([json.loads(one.read_text()) for one in files])], WIDTH)


def measure(steps: int, dtype: str) -> list[dict[str, Any]]:
    """The records of both libraries, each measured in a process of its own, in turns with the other."""
    with tempfile.TemporaryDirectory() as directory:
        # In a process of its own: what loading costs is not the job's memory.
        subprocess.run([sys.executable, "-c", _CONVERT, directory], check=True)
        command = [sys.executable, "-m", "benchmarks.finetune", "--steps", str(steps), "--dtype", dtype]
        return in_turns({library: [*command, "--worker", library, directory] for library in LIBRARIES})


_CONVERT = """
import sys
from qloralab.checkpoint.models import default_model, load_model, quiet
model = load_model(default_model())
with quiet():
    model.save_pretrained(sys.argv[1])
"""

if __name__ == "__main__":
    main()
