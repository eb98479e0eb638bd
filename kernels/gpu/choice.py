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

**What is chosen** is a function of the architecture, the shape and the tokens (`fused_up_to`), which a measurement of
the card and the shape overrides (`MEASURED`). Nothing is tuned while a program runs: that would change bits between
runs. One limit is for forward and backward together: the fused kernels round the weight elsewhere than the definition
does, and a gradient is to be that of the weights that were multiplied by.

===================  ===============================================================================================
sm_90                256: at most 14 % behind the faster of the two at each point of the H100's record, whose fused
                     kernels read a tiled copy of the weight; those of today were not measured
other architectures  not measured. Two-pass moves 8 times the bytes for one token, so that fused wins there at a
                     quarter of its roofline; the limits fall with the share of the tensor cores that a kernel
                     without WGMMA reaches
===================  ===============================================================================================

Half of it where the weight has too few rows to give each fourth multiprocessor a program.

``QLORALAB_EXACT=1``, read at the first product, is for those who compare numbers: all products are two-pass, and so
multiply by the definition's weights, bit for bit.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch

KERNELS = ("fused", "two-pass")
VARIABLE = "QLORALAB_EXACT"
ROWS = 128  # of the weight, that a fused program takes

# The most tokens that are fused, by architecture; and for others of NVIDIA's.
FUSED_UP_TO: Mapping[str, int] = {
    "sm_80": 64,
    "sm_86": 64,
    "sm_89": 64,
    "sm_90": 256,
    "sm_100": 16,
    "sm_103": 16,
    "sm_120": 64,
}
OTHERS = 16

# By the card's name, then [N, K]: the most tokens for which the fused products took less time, both directions
# together. ``python -m benchmarks.gpu --save`` prints the rows of the card that it measures. There are none yet of the
# kernels of today.
MEASURED: Mapping[str, Mapping[tuple[int, int], int]] = {}

asked: str | None = None


class Decision(NamedTuple):
    """Which of `KERNELS` multiplies, and why, in words."""

    kernel: str
    why: str


class Device(NamedTuple):
    """What a choice depends on: "sm_90" of a GPU, "cpu" of the interpreter, "other" of a GPU not NVIDIA's."""

    architecture: str
    multiprocessors: int
    name: str


def decide(N: int, K: int, M: int, device: Device) -> Decision:
    """The kernel for the products, forward and backward, of M tokens with a packed [N, K] weight."""
    if asked is not None:
        return Decision(asked, "it was asked for")
    if is_exact():
        return Decision("two-pass", f"it was asked for ({VARIABLE}=1)")
    up_to, why = _limit(N, K, device)
    return Decision("fused" if 0 < M <= up_to else "two-pass", why)


@functools.cache
def is_exact() -> bool:
    """Whether QLORALAB_EXACT asks for the definition's weights; read once.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    word = os.environ.get(VARIABLE) or "0"
    if word not in ("0", "1"):
        raise ValueError(f"{VARIABLE} is 0 or 1, not {word!r}")
    return word == "1"


@functools.lru_cache(1024)
def _limit(N: int, K: int, device: Device) -> tuple[int, str]:
    measured = MEASURED.get(device.name, {}).get((N, K))
    if measured is not None:
        return measured, f"measured on {device.name}: fused up to {measured} tokens"
    up_to = fused_up_to(N, device)
    return (
        up_to,
        f"{device.architecture}: fused up to {up_to} tokens" if up_to else f"{device.architecture}: never fused",
    )


def fused_up_to(N: int, device: Device) -> int:
    """The rule: the most tokens for which a product with N rows is fused."""
    if not device.architecture.startswith("sm_"):
        return 0  # the look-up is in PTX
    up_to = FUSED_UP_TO.get(device.architecture, OTHERS)
    return up_to // 2 if device.multiprocessors / 4 > -(-N // ROWS) else up_to


@functools.cache
def device(where: torch.device) -> Device:
    """What ``decide`` takes of a device."""
    if where.type != "cuda":
        return Device(where.type, 0, where.type)
    properties = torch.cuda.get_device_properties(where)
    name = "other" if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return Device(name, properties.multi_processor_count, properties.name)


def summary(device: Device) -> str:
    """What is chosen on a device, for reports."""
    up_to = fused_up_to(1 << 20, device)
    if is_exact():
        return f"never fused ({VARIABLE}=1)"
    if not up_to:
        return f"never fused: {device.architecture}"
    rows = MEASURED.get(device.name, {})
    measured = "".join(f", {tokens} for {N}x{K} (measured)" for (N, K), tokens in rows.items())
    return f"fused up to {up_to} tokens, {up_to // 2} where the weight has few rows{measured}"


@contextmanager
def use(kernel: str) -> Iterator[None]:
    """Decide for one kernel inside the body, whatever was measured: for benchmarks and tests. It is the whole process'.

    Raises:
        ValueError: the kernel is none of `KERNELS`.
    """
    global asked
    if kernel not in KERNELS:
        raise ValueError(f"the kernel is one of {', '.join(KERNELS)}, not {kernel!r}")
    before, asked = asked, kernel
    try:
        yield
    finally:
        asked = before
