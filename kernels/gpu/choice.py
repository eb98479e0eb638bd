"""Two ways to multiply by a packed weight, and which of them a product takes.

========  ==========================================================================================================
two-pass  ``two_pass.py``: dequantize into a workspace, then cuBLAS. Any size, dtype and codebook.
fused     ``linear.py``, ``linear_grad_input.py``: dequantize in registers on the way into the tensor cores. For x in
          bfloat16 and a weight that fits (``fused.py``).
========  ==========================================================================================================

**What the hardware says.** A weight in bfloat16 takes 2 bytes, a packed one 0.516. For M tokens, with a copy rate R and
a product rate T, a weight costs::

    two-pass    (0.516 + 2) / R  +  max(2 M / T, 2 / R)         write it in full, then read it in cuBLAS
    fused       max(0.516 / R, 2 M / (e T))                     e: the part of cuBLAS' rate that the kernel reaches

The first term of two-pass is a fixed price. On an H100 (R = 3.0 TB/s, T = 798 TFLOP/s) it is 335/M of the product, so
the fused kernel wins below M = 335 e / (1 - e). The model leaves out launches and the tail of a small grid.

**What is chosen** is what was measured: the table below, by architecture. A weight or an architecture that is not in it
is two-pass. One row is for forward and backward together, by the sum of their times: the fused kernels round the weight
elsewhere than the definition does, and a gradient is to be that of the weights that were multiplied by.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch

KERNELS = ("fused", "two-pass")

# By architecture and [N, K]: the most tokens for which the fused products took less time, both directions together.
# ``python -m benchmarks.gpu --save`` prints the rows of the device that it measures. These are of
# benchmarks/records/gpu-nvidia-h100-80gb-hbm3.json, whose forward kernel took 4.0 instructions a weight up to 32
# tokens; it takes 4.5 since. The next measurement replaces them.
FUSED_UP_TO: Mapping[str, Mapping[tuple[int, int], int]] = {
    "sm_90": {(4096, 4096): 256, (14336, 4096): 512, (4096, 14336): 256},
}

_asked: str | None = None


class Decision(NamedTuple):
    """Which of `KERNELS` multiplies, and why, in words."""

    kernel: str
    why: str


def decide(N: int, K: int, M: int, architecture: str) -> Decision:
    """The kernel for the products, forward and backward, of M tokens with a packed [N, K] weight."""
    return _measured(N, K, M, architecture) if _asked is None else Decision(_asked, "it was asked for")


@functools.lru_cache(4096)
def _measured(N: int, K: int, M: int, architecture: str) -> Decision:
    rows = FUSED_UP_TO.get(architecture)
    if rows is None:
        return Decision("two-pass", f"{architecture} was not measured")
    if (N, K) not in rows:
        return Decision("two-pass", f"a weight of {N}x{K} was not measured on {architecture}")
    up_to = rows[N, K]
    return Decision("fused" if up_to >= M else "two-pass", f"measured on {architecture}: fused up to {up_to} tokens")


@functools.cache
def architecture(device: torch.device) -> str:
    """What ``decide`` calls a device: "sm_90" of a GPU, "cpu" for the interpreter's, "other" for one not NVIDIA's."""
    if device.type != "cuda":
        return device.type
    return "other" if torch.version.hip else "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def summary(architecture: str) -> str:
    """What the table says of an architecture, for reports."""
    rows = FUSED_UP_TO.get(architecture)
    if rows is None:
        return f"never fused: {architecture} was not measured"
    return "fused up to " + ", ".join(f"{up_to} tokens for {N}x{K}" for (N, K), up_to in rows.items())


@contextmanager
def use(kernel: str) -> Iterator[None]:
    """Decide for one kernel inside the body, whatever was measured: for benchmarks and tests. It is the whole process'.

    Raises:
        ValueError: the kernel is none of `KERNELS`.
    """
    global _asked
    if kernel not in KERNELS:
        raise ValueError(f"the kernel is one of {', '.join(KERNELS)}, not {kernel!r}")
    before, _asked = _asked, kernel
    try:
        yield
    finally:
        _asked = before
