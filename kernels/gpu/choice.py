"""Three ways to multiply by a packed weight, and which of them a product takes.

==========  ========================================================================================================
two-pass    ``two_pass.py``: dequantize into a workspace, then cuBLAS. Any size, dtype and codebook.
fused       ``linear.py``, ``linear_grad_input.py``: dequantize in registers on the way into the tensor cores. For x in
            bfloat16 and a weight that can be tiled.
canonical   ``canonical.py``: likewise, from the canonical layout, for the weights that cannot. For few tokens.
==========  ========================================================================================================

**What the hardware says.** A weight in the dtype of x takes 2 bytes, a packed one 0.516. For M tokens, with a copy rate
R and a product rate T, a weight costs::

    two-pass    (0.516 + 2) / R  +  max(2 M / T, 2 / R)         write it in full, then read it in cuBLAS
    fused       max(0.516 / R, 2 M / (e T))                     e: the part of cuBLAS' rate that the kernel reaches

The first term of two-pass is a fixed price. On an H100 (R = 3.0 TB/s, T = 798 TFLOP/s) it is 335/M of the product, so
the fused kernel wins below M = 335 e / (1 - e) (``crossing``): 1,004 tokens at e = 0.75, 3,012 at 0.9. Neither N nor K
is in it. The model leaves out launches and the tail of a small grid.
On an H100 the fused kernel was the faster one up to 256 tokens in both directions and up to 512 or 1,024 forward; it
reaches 0.6 to 0.75 of cuBLAS' rate there (``benchmarks/README.md``).

**What is chosen.** The model is an expectation, and no kernel here is trusted before its device has measured it:
``decide`` answers "fused" or "canonical" only where a record in the cache says that it and two-pass ran there and it
took less time; without a record it answers "two-pass", and ``Decision.why`` says so. "fused" is for forward and
backward together, by the sum of their times: its weights are rounded elsewhere than the others', and a gradient is to
be that of the weights that were multiplied by. ``python -m benchmarks.gpu --save`` writes the record,
``<cache>/gpu-choice.json`` (``<cache>`` as in ``kernels/cpu/build.py``)::

    {"fingerprint": "...", "devices": {"NVIDIA H100 80GB HBM3":
        {"linear 4096x4096": {"16": {"fused": 0.004, "canonical": 0.009, "two-pass": 0.021}, ...}, ...}}}

in milliseconds, by operation, N x K, and the largest M of a bucket. A record of other kernels, another Triton or
another PyTorch has another fingerprint and counts for nothing. A process reads the file once and keeps each decision;
``decisions`` lists those that were asked for.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..cpu.build import cache_folder
from ..dispatch import warn

OPERATIONS = ("linear", "linear_grad_input")
KERNELS = ("fused", "canonical", "two-pass")
FEW = 64  # tokens, up to which ``canonical.py`` expects to be the faster
BUCKETS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)  # the largest M of each; the last takes all above it
PACKED = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: its code, an 8-bit scale for 64, a float32 for 256 of these
DENSE = 2.0  # bytes a weight, bfloat16
FILE = "gpu-choice.json"
EFFICIENCY = 0.75  # of the fused kernel, where nothing is known

Measured = Mapping[str, Mapping[str, Mapping[str, float]]]  # "linear 4096x4096" -> "16" -> "fused" -> ms


@dataclass(frozen=True)
class Limits:
    """What a device can do at most.

    Attributes:
        copy_gb_per_s: bytes read plus bytes written by a large copy, 10**9 a second.
        gemm_tflop_per_s: a large bfloat16 product, 10**12 floating-point operations a second.
    """

    copy_gb_per_s: float
    gemm_tflop_per_s: float

    def two_pass_ms(self, N: int, K: int, M: int) -> float:
        """The least time of dequantizing [N, K] and multiplying M rows by it, in milliseconds."""
        product = max(2 * M * self._ms_per_flop, DENSE * self._ms_per_byte)
        return N * K * ((PACKED + DENSE) * self._ms_per_byte + product)

    def fused_ms(self, N: int, K: int, M: int, efficiency: float = EFFICIENCY) -> float:
        """The same in one kernel that reaches this part of the product rate."""
        return N * K * max(PACKED * self._ms_per_byte, 2 * M * self._ms_per_flop / efficiency)

    def crossing(self, efficiency: float = EFFICIENCY) -> float:
        """The M above which two-pass is the faster, where both are bound by arithmetic."""
        price = (PACKED + DENSE) * self._ms_per_byte / (2 * self._ms_per_flop)
        return price * efficiency / (1 - efficiency)

    @property
    def _ms_per_byte(self) -> float:
        return 1e-6 / self.copy_gb_per_s

    @property
    def _ms_per_flop(self) -> float:
        return 1e-9 / self.gemm_tflop_per_s


H100 = Limits(copy_gb_per_s=3000.0, gemm_tflop_per_s=798.0)


@dataclass(frozen=True)
class Decision:
    """Which kernel multiplies, and why.

    Attributes:
        operation: one of OPERATIONS.
        N, K: of the weight.
        bucket: the largest M that the decision is for; the last bucket has no largest.
        device: its name.
        kernel: one of KERNELS.
        expected: what the model at the top of this file expects of an H100.
        why: in words.
    """

    operation: str
    N: int
    K: int
    bucket: int
    device: str
    kernel: str
    expected: str
    why: str


_decisions: dict[tuple[str, int, int, int, str, str], Decision] = {}
_record: Mapping[str, Measured] | None = None
_asked: str | None = None


def bucket(M: int) -> int:
    """The bucket of M tokens, by the largest M in it."""
    return BUCKETS[min(bisect_left(BUCKETS, M), len(BUCKETS) - 1)]


def decide(operation: str, N: int, K: int, M: int, device: str, instead: str = "fused") -> Decision:
    """The kernel for a product with a packed [N, K] weight; the same for every M of a bucket.

    Args:
        operation: "linear" or "linear_grad_input".
        N, K: of the weight.
        M: rows of the input.
        device: its name, as ``torch.cuda.get_device_name`` has it.
        instead: what can be had instead of two-pass, "fused" or "canonical".

    Raises:
        ValueError: another operation.
    """
    key = (operation, N, K, bucket(M), device, instead)
    found = _decisions.get(key)
    if found is None:
        if operation not in OPERATIONS:
            raise ValueError(f"the operation is one of {', '.join(OPERATIONS)}, not {operation!r}")
        found = _decisions[key] = _decide(*key)
    return found


def _decide(operation: str, N: int, K: int, M: int, device: str, instead: str) -> Decision:
    faster = M <= FEW if instead == "canonical" else H100.fused_ms(N, K, M) < H100.two_pass_ms(N, K, M)
    expected = instead if faster else "two-pass"
    if _asked is not None:
        return Decision(operation, N, K, M, device, _asked, expected, "it was asked for")
    measured, able = _read().get(device, {}), (instead, "two-pass")
    together = OPERATIONS if instead == "fused" else (operation,)
    found = [measured.get(weight_key(one, N, K), {}).get(str(M), {}) for one in together]
    if all(set(times) >= set(able) for times in found):
        times = {name: sum(times[name] for times in found) for name in able}
        kernel = min(able, key=lambda name: times[name])
        why = f"measured{', both ways' * (len(found) > 1)}: "
        why += ", ".join(f"{name} {times[name]:.4f} ms" for name in able)
    else:
        kernel, why = "two-pass", f"not measured on {device}; the roofline of an H100 expects {expected}"
    return Decision(operation, N, K, M, device, kernel, expected, why)


@functools.cache
def device_name(device: torch.device) -> str:
    """What ``decide`` calls a device: the name of a GPU, "cpu" for the interpreter's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def decisions() -> list[Decision]:
    """The decisions that this process has asked for, in the order of the first request."""
    return list(_decisions.values())


@contextmanager
def use(kernel: str) -> Iterator[None]:
    """Decide for one kernel inside the body, whatever was measured: for benchmarks and tests. It is the whole process'.

    Args:
        kernel: one of KERNELS.

    Raises:
        ValueError: another word.
    """
    global _asked
    if kernel not in KERNELS:
        raise ValueError(f"the kernel is one of {', '.join(KERNELS)}, not {kernel!r}")
    before, _asked = _asked, kernel
    _decisions.clear()
    try:
        yield
    finally:
        _asked = before
        _decisions.clear()


def forget() -> None:
    """Decide anew from the next request on, from the file as it is then."""
    global _record
    _decisions.clear()
    _record = None


def weight_key(operation: str, N: int, K: int) -> str:
    """What the record calls a product with a weight of [N, K]."""
    return f"{operation} {N}x{K}"


def save(device: str, measured: Measured) -> Path:
    """Add what was measured on a device to the record, in place of what it had for the same weights.

    Args:
        device: its name.
        measured: milliseconds by ``weight_key``, by bucket, by kernel.

    Returns:
        the file.

    Raises:
        OSError: it cannot be written.
        ValueError: a key, bucket or kernel that ``decide`` does not look for, or a time that is none.
    """
    _check(measured)
    devices = {name: dict(entries) for name, entries in _load().items()}
    devices.setdefault(device, {}).update(measured)
    path = record_path()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{FILE}-", delete=False) as scratch:
        try:
            json.dump({"fingerprint": fingerprint(), "devices": devices}, scratch, indent=1)
            scratch.close()
            os.replace(scratch.name, path)  # other processes read the old file or the new one, nothing between
        except BaseException:
            Path(scratch.name).unlink(missing_ok=True)
            raise
    forget()
    return path


def record_path() -> Path:
    """The file; it need not exist."""
    return cache_folder() / FILE


@functools.cache
def fingerprint() -> str:
    """32 hexadecimal digits that change with the kernels, with Triton, and with PyTorch, which brings cuBLAS."""
    files = [(file.name, file.read_bytes()) for file in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(repr((files, _triton_version(), torch.__version__)).encode()).hexdigest()[:32]


def _triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


def _read() -> Mapping[str, Measured]:
    """The record by device; read once. One that cannot be used is worth a warning, not the end of a training."""
    global _record
    if _record is None:
        try:
            _record = _load()
        except (OSError, ValueError) as error:
            warn(f"qloralab ignores {record_path()}: {error}")
            _record = {}
    return _record


def _load() -> dict[str, Measured]:
    """The record by device; empty when there is none, or one of other kernels.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not what ``save`` writes.
    """
    try:
        text = record_path().read_text()
    except FileNotFoundError:
        return {}
    record = json.loads(text)
    if not isinstance(record, dict) or not isinstance(devices := record.get("devices"), dict):
        raise ValueError("it is not a record of measured times")
    if record.get("fingerprint") != fingerprint():
        return {}
    for measured in devices.values():
        _check(measured)
    return devices


def _check(measured: Any) -> None:
    """Raise ValueError where ``decide`` would stumble, or find nothing."""
    try:
        times = [
            (key.split(" ")[0], int(M), name, ms)
            for key, by_bucket in measured.items()
            for M, by_kernel in by_bucket.items()
            for name, ms in by_kernel.items()
        ]
    except (AttributeError, ValueError):
        raise ValueError("it is not a record of measured times") from None
    for operation, M, name, ms in times:
        if operation not in OPERATIONS or M not in BUCKETS or name not in KERNELS:
            raise ValueError(f"it times {operation} M={M} {name}, which is never looked up")
        if not isinstance(ms, int | float) or not 0 < ms < float("inf"):
            raise ValueError(f"{operation} M={M} {name} takes {ms!r} ms")
