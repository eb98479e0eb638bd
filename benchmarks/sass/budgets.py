"""What each kernel may cost: instructions per weight, registers, and what its main loop may not do.

The budgets are for sm_90 and triton 3.7.1. Compiled by 3.6.0, two cases of ``linear`` take 0.01 and 0.05 instructions
more than theirs, and ``grad_B`` in 128 columns spills 8 bytes on sm_120. Each stands beside its case, in the file of
the kernel. The tests compile every case and hold it; ``qloralab sass`` prints the verdicts. Counts are those of
``reader.py``.

Where the limits come from: an H100 issues 128 x 132 instructions for one thread each per clock and reads 3.0 TB/s. At
1.755 GHz it has 5.1 instructions for each 4-bit weight that arrives (0.516 bytes, with an 8-bit scale for 64), and 25
where a bf16 weight is written or read as well (2.5625 bytes). A kernel within its budget is not bound by the issue of
instructions, or nearly so; that is necessary for the speed of the memory, and does not prove it.
"""

from __future__ import annotations

from qloralab.kernels.gpu.case import Budget

from .compile import Compiled
from .reader import Counts

TARGET = "sm_90"


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
