"""The pictures of docs/first-principles, computed by this library: ``python docs/pictures.py`` writes docs/pictures/.

Every number is computed here from a fixed seed, except for the times of kernels.svg, which a benchmark recorded.
Another processor may move a point by less than can be seen. It takes a minute or two.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from torch.nn import functional

import qloralab as ql
from qloralab.nf4.codebook import codebook_values

HERE = Path(__file__).resolve().parent
RECORD = HERE.parent / "benchmarks" / "records" / "gpu-nvidia-h100-80gb-hbm3.json"
OURS, OTHER, THIRD, GREY = "#1b6ca8", "#d1603d", "#4b8f5c", "#888888"


def nf4() -> Figure:
    """What a block holds after it is divided by its largest weight, and the values of three data types."""
    blocks = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0))
    normalized = (blocks / blocks.abs().amax(dim=1, keepdim=True)).flatten()
    figure, (above, below) = _figure(6.4, rows=2, ratio=(2.2, 1))
    above.hist(normalized.numpy(), bins=121, range=(-1.0, 1.0), density=True, color="#c9dcea")
    for value in codebook_values("nf4").tolist():
        above.axvline(value, color=OURS, linewidth=0.9)
    above.set(ylabel="density", title="weights of N(0, 1) in blocks of 64, divided by their largest; NF4's values")
    above.set_xlim(-1.04, 1.04)
    for row, (name, color) in enumerate([("int4", GREY), ("fp4", OTHER), ("nf4", OURS)]):
        values = codebook_values(name)
        error = ql.quantize(blocks, name, block_size=64, double_quant=False).dequantize() - blocks
        below.plot(values.numpy(), [row] * len(values), "|", color=color, markersize=18, markeredgewidth=1.6)
        below.text(1.1, row, f"{name}: {error.square().mean():.5f}", va="center", color=color)
    below.set(ylim=(-0.6, 2.6), yticks=[], xlabel="value / scale of its block")
    below.set_xlim(-1.04, 1.04)
    below.text(1.1, 2.85, "mean squared error", va="center")
    return figure


def double_quantization() -> Figure:
    """The scales of a weight and what is left of them without their mean; the bits that a weight pays for them."""
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    plain, double = ql.quantize(weight, double_quant=False), ql.quantize(weight, double_quant=True)
    scales, error = plain.absmax(), (double.absmax() - plain.absmax()).abs()
    figure, (left, right) = _figure(3.6, columns=2)
    left.hist(scales.numpy(), bins=80, color="#c9dcea")
    left.axvline(scales.mean().item(), color=OURS, linewidth=1.5)
    left.set(
        xlabel="largest magnitude of a block of 64", ylabel="blocks", title="scales are alike: their mean goes first"
    )
    share = error.square().mean().sqrt() / scales.mean()
    left.text(
        0.97,
        0.94,
        f"8 bits are off by {100 * share:.2f} %\n(root mean square)",
        ha="right",
        va="top",
        transform=left.transAxes,
    )
    sizes = [32, 64, 128, 256]
    for offset, bits, color, label in [
        (-0.2, [32 / size for size in sizes], GREY, "float32"),
        (0.2, [8 / size + 32 / (256 * size) for size in sizes], OURS, "8 bits, quantized again"),
    ]:
        bars = right.bar([place + offset for place in range(len(sizes))], bits, 0.4, color=color, label=label)
        right.bar_label(bars, fmt="%.3f", fontsize=7, padding=1)
    right.set(xticks=range(len(sizes)), xlabel="block size", ylabel="bits per weight", title="what the scales cost")
    right.set_xticklabels([str(size) for size in sizes])
    right.legend(frameon=False)
    return figure


def adapters() -> Figure:
    """What adapters of four ranks learn of a change of rank 4 and of the error of 4 bits."""
    generator = torch.Generator().manual_seed(0)
    width, tokens = 64, 512
    weight = torch.randn(width, width, generator=generator) / math.sqrt(width)
    change = torch.randn(width, 4, generator=generator) @ torch.randn(4, width, generator=generator) / width
    x = torch.linalg.qr(torch.randn(tokens, width, generator=generator)).Q * math.sqrt(tokens)  # uncorrelated inputs
    target = x @ (weight + change).T
    figure, axes = _figure(3.8)
    for r, color in [(1, GREY), (2, THIRD), (4, OURS), (8, OTHER)]:
        torch.manual_seed(r)
        layer = torch.nn.Linear(width, width, bias=False)
        with torch.no_grad():
            layer.weight.copy_(weight)
        model = torch.nn.Sequential(layer)
        ql.quantize_(model, compute_dtype=torch.float32, skip=())
        left = weight + change - ql.quantize(weight, double_quant=True).dequantize()
        floor = torch.linalg.svdvals(left)[r:].square().sum().item() / width  # Eckart and Young
        ql.inject_(model, ql.LoraConfig(r=r, lora_alpha=r))
        optimizer = ql.PagedAdamW(ql.trainable(model), lr=1e-2, weight_decay=0.0)
        losses = []
        for step in range(400):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * (1 - step / 400)
            loss = functional.mse_loss(model(x), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        axes.plot(losses, color=color, label=f"r = {r}")
        axes.axhline(floor, color=color, linewidth=0.8, linestyle=":")
    axes.set(yscale="log", xlabel="step", ylabel="mean squared error")
    axes.set_title("a change of rank 4 learned beside a frozen NF4 weight; dotted: the best of each rank")
    axes.legend(frameon=False)
    return figure


def paging() -> Figure:
    """What a step reads from the disk, by the share of the state that fits: counted by the pager, and without one."""
    parameters = [torch.nn.Parameter(torch.zeros(1 << 20)) for _ in range(16)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    state = 8 * sum(parameter.numel() for parameter in parameters)
    shares, fetched = [0.15, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 0.95, 1.0], []
    for share in shares:
        optimizer = ql.PagedAdamW(parameters, budget=int(share * state))
        for _ in range(3):
            before = optimizer.paging().fetched
            optimizer.step()
        fetched.append((optimizer.paging().fetched - before) / state)
        del optimizer
    figure, axes = _figure(3.6)
    axes.plot([0, 1, 1], [1, 1, 0], color=GREY, label="least recently used goes: all of it, until all fits")
    axes.plot([0, 1], [1, 0], color=GREY, linestyle=":", label="least possible: what does not fit")
    axes.plot(shares, fetched, "o-", color=OURS, label="PagedAdamW, third step, counted")
    axes.set(xlabel="budget / state", ylabel="fetched in a step / state", xlim=(0, 1.03), ylim=(-0.03, 1.25))
    axes.set_title("a part of the chunks stays, so a step fetches only the others")
    axes.legend(frameon=False, loc="upper right", fontsize=8)
    return figure


def kernels() -> Figure:
    """The time of a product with a 4-bit weight by the number of tokens, as measured."""
    N, K = 14336, 4096
    points = [
        point
        for point in json.loads(RECORD.read_text())
        if point.get("operation") == "linear" and point["shape"] == [N, K] and point["ms"]
    ]
    figure, axes = _figure(4.0)
    for provider, label, color, marker in [
        ("ours, fused", "fused: decoded in registers", OURS, "o"),
        ("ours", "two-pass: decoded to memory, then cuBLAS", THIRD, "s"),
        ("bf16", "cuBLAS, the weight in bfloat16", GREY, "x"),
        ("bitsandbytes", "bitsandbytes 0.50.2", OTHER, "^"),
    ]:
        found = sorted((point["M"], 1e3 * point["ms"]["p50"]) for point in points if point["provider"] == provider)
        axes.plot(*zip(*found, strict=True), marker + "-", color=color, label=label, markersize=4, linewidth=1.2)
    bound = sorted((point["M"], 1e3 * point["bound_ms"]) for point in points if point["provider"] == "ours, fused")
    axes.plot(
        *zip(*bound, strict=True), ":", color="black", linewidth=1, label="bound: bytes of 4 bits, or multiplications"
    )
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds")
    axes.set_xscale("log", base=2)
    axes.set_title(f"linear, weight {N} x {K}, NVIDIA H100")
    axes.legend(frameon=False, fontsize=8)
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "nf4.svg": nf4,
    "double-quantization.svg": double_quantization,
    "adapters.svg": adapters,
    "paging.svg": paging,
    "kernels.svg": kernels,
}


def write(directory: Path) -> None:
    """Write every picture into a directory that exists."""
    with matplotlib.rc_context({"svg.hashsalt": "qloralab", "axes.titlesize": "medium"}):
        for name, draw in PICTURES.items():
            draw().savefig(directory / name, metadata={"Date": None}, facecolor="white")


def _figure(height: float, rows: int = 1, columns: int = 1, ratio: tuple[float, ...] | None = None):
    """A figure 8 inches wide, and its axes."""
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots(rows, columns, gridspec_kw={"height_ratios": ratio} if ratio else None)
    for one in figure.axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


if __name__ == "__main__":
    write(HERE / "pictures")
