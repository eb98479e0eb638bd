"""What ``qloralab quantize`` takes for a checkpoint of 2 GB: time, and memory, which is to follow the largest tensor.

    python -m benchmarks.quantize           measure, write benchmarks/records/quantize.json, show it
    python -m benchmarks.quantize --view    show it again

The checkpoint has the shapes of a Llama of 7 B parameters and four of its layers: bfloat16, N(0, 1) x 0.02, a file for
the embedding, one for each layer and one for the head. The command runs as a process of its own, once with the C
kernels and once with the plain PyTorch reference; its peak is what the system counted for that process (``ru_maxrss``),
mapped pages of the files included. The bound is one and a half times the largest tensor in float32, which here is the
embedding, plus 300 MB. Before a record is made, the new checkpoint is compared with the old: a weight of each layer bit
by bit with ``quantize``, the embedding byte by byte.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from qloralab.kernels.cpu import operators as _cpu_kernels  # noqa: F401  # serve the operators from here on
from qloralab.nf4.files.checkpoint import Checkpoint, write_index
from qloralab.nf4.files.safetensors_writer import SafetensorsWriter
from qloralab.nf4.tensor import quantize

from .case import WrongResultError
from .record import ROOT, parse, provenance, write
from .view import grid, show

KERNELS = ("native", "reference")  # values of QLORALAB_CPU
FACTOR, ALLOWANCE_MB = 1.5, 300.0


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a Llama with an output head of its own."""

    hidden: int = 4096
    intermediate: int = 11008
    vocabulary: int = 32000
    layers: int = 4

    @property
    def bound_mb(self) -> float:
        """What the peak may be, in 10**6 bytes."""
        largest = max(self.vocabulary, self.intermediate) * self.hidden
        return FACTOR * 4 * largest / 1e6 + ALLOWANCE_MB


def make(directory: Path, shape: Shape) -> int:
    """Write the checkpoint.

    Args:
        directory: made if missing.
        shape: of the model.

    Returns:
        bytes of all tensors.
    """
    from transformers import LlamaConfig  # slow to import, and needed for this alone

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(directory)
    h, i, v = shape.hidden, shape.intermediate, shape.vocabulary
    block = {f"self_attn.{name}_proj.weight": (h, h) for name in "qkvo"}
    block |= {"mlp.gate_proj.weight": (i, h), "mlp.up_proj.weight": (i, h), "mlp.down_proj.weight": (h, i)}
    block |= {"input_layernorm.weight": (h,), "post_attention_layernorm.weight": (h,)}
    shards: list[dict[str, tuple[int, ...]]] = [
        {"model.embed_tokens.weight": (v, h)},
        *({f"model.layers.{layer}.{name}": size for name, size in block.items()} for layer in range(shape.layers)),
        {"model.norm.weight": (h,), "lm_head.weight": (v, h)},
    ]
    generator = torch.Generator().manual_seed(0)
    weight_map, total = {}, 0
    for number, sizes in enumerate(shards, 1):
        path = directory / f"model-{number:05}-of-{len(shards):05}.safetensors"
        with SafetensorsWriter(path, {name: (torch.bfloat16, size) for name, size in sizes.items()}) as file:
            for name, size in sizes.items():
                tensor = torch.empty(size, dtype=torch.bfloat16)
                tensor.normal_(0, 0.02, generator=generator)
                file.write(name, tensor)
                weight_map[name] = path.name
                total += tensor.nbytes
    write_index(directory, weight_map, total)
    return total


def check(dense: Path, quantized: Path, shape: Shape) -> None:
    """Compare the new checkpoint with the old.

    Raises:
        WrongResultError: they do not belong together.
    """
    old, new = Checkpoint(dense), Checkpoint(quantized)
    if len(new.quantized_names()) != 7 * shape.layers:
        raise WrongResultError(f"{len(new.quantized_names())} weights are in 4 bits")
    for layer in range(shape.layers):
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        if not torch.equal(new.quantized(name).dequantize(), quantize(old.tensor(name)).dequantize()):
            raise WrongResultError(f"{name} is not what quantize gives")
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        if not torch.equal(new.tensor(name).view(torch.int16), old.tensor(name).view(torch.int16)):
            raise WrongResultError(f"{name} is not a copy")


# Started by a large process, a process begins with that one's peak; so a small one stands between. It prints the peak
# of its child in KiB, and passes on the child's output, as its own errors, and its exit status.
_BETWEEN = """
import os, subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdout=sys.stderr)
_, status, usage = os.wait4(child.pid, 0)
child.returncode = os.waitstatus_to_exitcode(status)
print(usage.ru_maxrss)
sys.exit(child.returncode)
"""


def measure(dense: Path, quantized: Path, kernels: str) -> dict[str, Any]:
    """Run the command as a process of its own.

    Args:
        dense: the checkpoint.
        quantized: where the new one goes.
        kernels: one of KERNELS.

    Returns:
        seconds of the whole process; peak_mb, its largest resident memory in 10**6 bytes.

    Raises:
        CalledProcessError: the command failed; it has the output.
    """
    command = [sys.executable, "-m", "qloralab", "quantize", "--model", str(dense), "--out", str(quantized)]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _BETWEEN, *command],
        cwd=ROOT,
        env={**os.environ, "QLORALAB_CPU": kernels},
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, done.stderr)
    return {"seconds": seconds, "peak_mb": int(done.stdout) * 1024 / 1e6}


def table(records: Sequence[Mapping[str, Any]]) -> Table:
    """The records side by side, each against the bound."""
    first = records[0]
    rows = [
        (
            record["kernels"],
            f"{record['seconds']:.1f}",
            f"{record['bytes_before'] / 1e6 / record['seconds']:,.0f}",
            f"{record['peak_mb']:,.0f}",
            f"{record['bound_mb']:,.0f}",
            "kept" if record["peak_mb"] <= record["bound_mb"] else "exceeded",
            f"{record['bytes_after'] / 1e9:.2f} GB",
        )
        for record in records
    ]
    headings = ("kernels", "seconds", "MB/s", "peak MB", "bound MB", "", "size")
    title = f"{first['bytes_before'] / 1e9:.2f} GB in {first['files']} files, {first['device']}"
    return grid(headings, rows, left=("kernels", ""), wrap=True, title=title)


def run(folder: Path, shape: Shape) -> list[dict[str, Any]]:
    """Make the checkpoint in a folder, quantize it with each implementation, compare.

    Raises:
        WrongResultError: see ``check``.
    """
    dense = folder / "dense"
    before = int(_worker("make", dense, shape))
    records = []
    for kernels in KERNELS:
        quantized = folder / kernels
        figures = measure(dense, quantized, kernels)
        _worker("check", dense, shape, quantized)
        files = sorted(quantized.glob("*.safetensors"))
        records.append(
            {
                "benchmark": "quantize",
                "kernels": kernels,
                **dataclasses.asdict(shape),
                "files": len(files),
                "bytes_before": before,
                "bytes_after": sum(file.stat().st_size for file in files),
                **figures,
                "bound_mb": shape.bound_mb,
                **provenance(),
            }
        )
    return records


def _worker(job: str, dense: Path, shape: Shape, quantized: Path | None = None) -> str:
    """A job that takes memory, in a process of its own: what it takes is gone when the command runs."""
    words = [job, str(dense), json.dumps(dataclasses.asdict(shape)), str(quantized)]
    command = [sys.executable, "-m", "benchmarks.quantize", "--worker", *words]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the records, show them."""
    parser = argparse.ArgumentParser(description="Time and memory of qloralab quantize.")
    parser.add_argument("--view", action="store_true", help="show the records, measure nothing")
    parser.add_argument("--layers", type=int, default=Shape.layers, help="of the model, 0.4 GB each")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parse(parser, arguments)
    if args.worker:
        job, dense, shape, quantized = args.worker
        if job == "make":
            print(make(Path(dense), Shape(**json.loads(shape))))
            quantize(torch.ones(64))  # compiles the C kernels where that was not done yet: no part of the time
        else:
            check(Path(dense), Path(quantized), Shape(**json.loads(shape)))
        return
    file = args.out / "quantize.json"
    if not args.view:
        with tempfile.TemporaryDirectory() as folder:
            write(run(Path(folder), Shape(layers=args.layers)), file)
    show([table(json.loads(file.read_text()))])


if __name__ == "__main__":
    main()
