"""What each kernel may cost: instructions per weight, registers, and what its main loop may not do.

The budgets are for sm_90 and hold for triton 3.6.0, whose code the design was counted with. `BUDGETS` is the table.
Where another version of triton compiles a kernel to more, `NEWER` has its line, with the reason. The tests compile
every case and hold it; ``qloralab sass`` prints the verdicts. Counts are those of ``kernels/sass.py``.

Where the limits come from: an H100 issues 128 x 132 instructions for one thread each per clock and reads 3.0 TB/s. At
1.755 GHz it has 5.6 instructions for each 4-bit weight that arrives (0.5625 bytes, with a float32 scale for 64), and 25
where a bf16 weight is written or read as well (2.5625 bytes). A kernel within its budget is not bound by the issue of
instructions, or nearly so; that is necessary for the speed of the memory, and does not prove it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .gpu.case import PACKED, Budget
from .offline import Compiled
from .sass import Counts

TARGET = "sm_90"


def _product(instructions: float, tokens: int, registers: int = 255, width: int = 128) -> Budget:
    """A matrix product in tiles of 128 weights along the output, so each bf16 of x is loaded once for 128 weights.

    Dequantized weights stay in registers: no shuffles, and what is staged are the scales.
    """
    return Budget(
        instructions,
        registers=registers,
        loaded=PACKED + (2 * tokens / 128 if width == 128 else 0),
        width=width,
        staged=0.1,
        needs=("HGMMA",),
        forbids=("SHFL",),
    )


def _canonical(instructions: float, loaded: float, width: int = 128, staged: float = 2.1) -> Budget:
    """A product from the canonical layout: decoded weights pass through shared memory on their way to the tensor cores.

    Whole segments: x is loaded 16 bytes at a time. The FADD turns -0.0 into +0.0.
    """
    return Budget(instructions, loaded=loaded, width=width, staged=staged, needs=("FFMA", "FADD"), forbids=("SHFL",))


BUDGETS: Mapping[str, Budget] = {
    # 25 could be issued while 2.5625 bytes arrive and leave. 8 leaves two thirds of that to waiting.
    "dequantize": Budget(8, registers=128, forbids=("SHFL",)),
    # Its FADD turns -0.0 into +0.0: without a second level there is no other.
    "dequantize one level": Budget(8, registers=128, needs=("FFMA", "FADD"), forbids=("SHFL",)),
    "dequantize to float32": Budget(9, registers=128, forbids=("SHFL",)),  # writes twice the bytes of bf16
    # The largest of each block, a quotient, the bin and one comparison per weight.
    "quantize": Budget(22, registers=128, loaded=2),
    "quantize from float32": Budget(22, registers=128, loaded=4),
    "quantize any codebook": Budget(40, loaded=2),  # a search in 4 steps: values that no table of bins separates
    "quantize extreme blocks": Budget(30, registers=128, loaded=2),  # scales whose reciprocal is no normal number
    "quantize scales": Budget(3, registers=64, loaded=4 / 64, width=32),  # of the weights behind the scales, 64 each
    # 5.6 can be issued while 0.5625 bytes arrive. From 64 tokens on, the tensor cores leave more.
    "linear, 16 tokens": _product(4.8, 16, registers=128),  # a scale for each weight, for the bits of backward
    "linear, 32 tokens": _product(5, 32, registers=128),
    "linear, 64 tokens": _product(5.5, 64, registers=168),
    "linear, 128 tokens": _product(6, 128),
    # Across the rows, a thread's share of the packed weights lies in pieces of 8 bytes.
    "linear_grad_input, 16 tokens": _product(5, 16, registers=128, width=64),
    "linear_grad_input, 32 tokens": _product(5, 32, registers=128, width=64),
    "linear_grad_input, 64 tokens": _product(5.5, 64, registers=168, width=64),
    "linear_grad_input, 128 tokens": _product(6, 128, width=64),
    # With an adapter: the loop is the same, and what the terms before it take must not spill.
    "linear, 16 tokens, rank 64": _product(4.8, 16, registers=128),
    "linear, 128 tokens, rank 64": _product(6, 128),
    "linear, 128 tokens, rank 128": _product(6, 128),
    "linear_grad_input, 16 tokens, rank 64": _product(5, 16, registers=128, width=64),
    "linear_grad_input, 64 tokens, rank 128": _product(5.5, 64, registers=168, width=64),
    "linear_grad_input, 128 tokens, rank 64": _product(6, 128, width=64),
    # An element of x here is 2 bytes: 20 can be issued while they arrive or leave. 5 hash the mask.
    "adapter project": Budget(14, registers=128, loaded=2, needs=("HGMMA",)),
    "adapter project without dropout": Budget(4, registers=64, loaded=2, staged=0.5, needs=("HGMMA",)),
    "adapter project, rank 64": Budget(15, registers=168, loaded=2, needs=("HGMMA",)),
    "adapter project, 16 tokens": Budget(24, registers=128, loaded=2, needs=("HMMA",)),  # A, in float32, is as large
    "adapter grad_A": Budget(17, registers=128, loaded=2, needs=("HGMMA",)),
    "adapter grad_A without dropout": Budget(5, registers=64, loaded=2, staged=0.1, needs=("HGMMA",)),
    "adapter grad_A, rank 64": Budget(17, registers=128, loaded=2, needs=("HGMMA",)),
    "adapter masked_low_rank": Budget(21, registers=128, loaded=0, needs=("HGMMA",)),  # counted whole
    # Per element, the slow paths of divisions and roots included. 217 can be issued while 22 bytes arrive and leave.
    "adamw": Budget(75, registers=72, loaded=12),
    "adamw of float32": Budget(70, registers=72, loaded=16),
    "adamw anywhere": Budget(85, registers=80, loaded=12, width=16),
    # 99 can be issued while 10 bytes arrive and leave; of these, a third is for scales that are hardly ever met.
    "adamw_8bit": Budget(160, registers=128, loaded=6),
    "adamw_8bit of float32": Budget(160, registers=128, loaded=10),
    "adamw_8bit anywhere": Budget(205, registers=255, loaded=6, width=8),
    # Bound by their instructions. Without whole segments the codes are loaded byte by byte, more of them for odd K.
    "canonical linear, 32 tokens": _canonical(9.7, 0.5),
    "canonical linear, 64 tokens": _canonical(10, 1),
    "canonical linear, one level, 32 tokens": _canonical(9.5, 0.5),
    "canonical linear, with an adapter, 64 tokens": _canonical(10, 1),
    "canonical linear, float16, 32 tokens": _canonical(9.7, 0.5),
    "canonical linear, even K, 32 tokens": _canonical(18, PACKED, width=8, staged=2.7),
    "canonical linear, odd K, 32 tokens": _canonical(20, PACKED + 1 / 8, width=8, staged=2.7),
    "canonical linear, odd K, 64 tokens": _canonical(24, PACKED + 1 / 8, width=8, staged=3.3),
    "canonical linear_grad_input, 32 tokens": _canonical(10, 0.5),
    "canonical linear_grad_input, 64 tokens": _canonical(10, 1),
    "canonical linear_grad_input, with an adapter, 64 tokens": _canonical(10, 1),
    "canonical linear_grad_input, even K, 32 tokens": _canonical(18.5, PACKED, width=8, staged=2.7),
    "canonical linear_grad_input, odd K, 32 tokens": _canonical(21, PACKED + 1 / 8, width=8, staged=2.7),
    "canonical linear_grad_input, odd K, 64 tokens": _canonical(24, PACKED + 1 / 8, width=8, staged=3.3),
    # One FFMA per token and weight: in float32 there are no tensor cores.
    "canonical linear, float32, 16 tokens": _canonical(31, 1, staged=4.3),
    "canonical linear, float32, 64 tokens": _canonical(86, 4, staged=4.3),
    "canonical linear, float32, odd K, 64 tokens": _canonical(110, PACKED + 1 / 8, width=8, staged=4.6),
    "canonical linear_grad_input, float32, 16 tokens": _canonical(35, 1, staged=4.3),
    "canonical linear_grad_input, float32, 64 tokens": _canonical(88, 4, staged=4.3),
    "canonical linear_grad_input, float32, odd K, 64 tokens": _canonical(110, PACKED + 1 / 8, width=8, staged=4.6),
}

# (case, triton's major and minor version): from that version on, until the next line of the case.
NEWER: Mapping[tuple[str, tuple[int, int]], Mapping[str, float | int]] = {}


def budget(name: str, triton: str) -> Budget | None:
    """The budget of a case.

    Args:
        name: of the case.
        triton: the version that compiles, such as ``"3.6.0"``.

    Returns:
        the limits, or None: the case has none.
    """
    if name not in BUDGETS:
        return None
    major, minor = map(int, triton.split(".")[:2])
    lines = [(since, line) for (case, since), line in NEWER.items() if case == name and since <= (major, minor)]
    return replace(BUDGETS[name], **max(lines)[1]) if lines else BUDGETS[name]


def exceeded(limits: Budget, compiled: Compiled, counts: Counts) -> list[str]:
    """Each limit that a kernel does not keep, in words; empty: it keeps its budget."""
    found = unsound(compiled, counts)
    if counts.per_weight > limits.instructions:
        found.append(f"{counts.per_weight:.2f} instructions per weight, more than {limits.instructions:g}")
    if compiled.registers > limits.registers:
        found.append(f"{compiled.registers} registers, more than {limits.registers}")
    if (loaded := counts.loaded(limits.width)) < limits.loaded:
        how = f"{limits.width // 8} at a time or more"
        found.append(f"loads {loaded:.3g} bytes per weight, {how}; they are {limits.loaded:g}")
    if counts.staged > limits.staged:
        found.append(f"stages {counts.staged:.3g} bytes per weight in shared memory, more than {limits.staged:g}")
    found += [f"no {name} in the loop" for name in limits.needs if name not in counts.opcodes]
    found += [f"{counts.opcodes[name]} {name} in the loop" for name in limits.forbids if name in counts.opcodes]
    return found


def unsound(compiled: Compiled, counts: Counts) -> list[str]:
    """What no kernel may do on any target: spill registers, or use local memory."""
    found = []
    if compiled.spilled:
        found.append(f"{compiled.spilled} bytes of stack per thread")
    if counts.local:
        found.append(f"{counts.local} accesses to local memory")
    return found
