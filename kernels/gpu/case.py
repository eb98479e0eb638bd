"""The kernels by name, and what the file of a kernel says about its compiled code.

A file of kernels ends with ``CASES`` (``CASES_SM_90``: for one target alone), the ways to compile them with what each
may cost (`Case`, `Budget`), and with ``CHECKS``, what ``self_check.py`` runs on a device before a kernel serves there
(``docs/add-a-kernel.md``). This file imports neither Triton nor torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Every kernel that is checked: its launcher's name, and the file that has it.
FILES = {
    "quantize_blockwise": "quantize",
    "quantize_scales": "quantize",
    "dequantize": "dequantize",
    "linear": "linear",
    "linear_grad_input": "linear_grad_input",
    "project": "adapter",
    "grad_A": "adapter",
    "masked_low_rank": "adapter",
    "grad_B": "grad_B",
    "adamw": "adamw",
    "adamw_8bit": "adamw_8bit",
}

# Those in CUDA C++, likewise.
CUDA_FILES = {"few_tokens": "few_tokens"}

PACKED = 0.5  # bytes per weight: 4 bits


@dataclass(frozen=True)
class Budget:
    """The limits of one case on sm_90. Spilled registers and local memory are forbidden in all of them.

    Attributes:
        instructions: per weight, in the main loop, at most.
        registers: per thread, at most. A multiprocessor has 65,536: at 128, it holds 512 threads.
        loaded: bytes per weight that loads of `width` bits or more bring, at least: the weights, and with them what
            they are multiplied with. Fewer, and the loads are narrower than meant, or the weights are miscounted.
        width: bits per thread.
        staged: bytes per weight that pass from registers to shared memory, at most. A dequantized weight has 2.
        needs: opcodes that the loop holds.
        forbids: opcodes that it does not.
    """

    instructions: float
    registers: int = 255
    loaded: float = PACKED
    width: int = 128
    staged: float = math.inf
    needs: tuple[str, ...] = ()
    forbids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """One way to compile a kernel.

    Attributes:
        name: of the case, unique among all files: what ``qloralab sass`` calls it.
        kernel: the function under ``@triton.jit``.
        signature: triton's type of each parameter that is no constexpr: ``"*bf16"``, ``"*u8"``, ``"i32"``, ``"fp32"``.
        constexprs: the value of each that is.
        weights: that one program handles in one iteration of its main loop; in all, where there is no loop.
        num_warps: of 32 threads, in a program.
        num_stages: of the software pipeline.
        divisible: parameters that are divisible by 16, pointers by bytes. None: every pointer and every integer.
        budget: what it may cost on sm_90; None: a test would miss it.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    weights: int
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] | None = None
    budget: Budget | None = None


@dataclass(frozen=True)
class CudaCase:
    """One way to compile a kernel in CUDA C++.

    Attributes:
        name: of the case, as of a ``Case``.
        compile: from a target such as ``"sm_90"`` to a cubin of one kernel.
        weights: that one thread handles in one iteration of its main loop.
        shared: bytes of dynamic shared memory, of a CTA.
        budget: what it may cost on sm_90.
    """

    name: str
    compile: Callable[[str], bytes]
    weights: int
    shared: int
    budget: Budget
