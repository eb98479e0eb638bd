"""A sum that is cut into parts, where whole sums would be too few programs to fill a GPU.

Each program writes the float32 sum of its part to a workspace, and a second kernel adds the parts in a fixed order, so
that equal inputs give equal bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interpreter import bound, round_to, to_float32
from .launch import launch

# What a sum is cut for: two programs for each multiprocessor of an H100; six, of which five fit at a time, where they
# are small and each waits for its words. Measured on one: the sixth evens out what the last ones leave idle.
PROGRAMS, PROGRAMS_OF_FEW_TOKENS = 264, 792
FEWEST_STEPS, FEWEST_STEPS_OF_FEW_TOKENS = 8, 4  # of a program, when a sum is cut
FEW_TOKENS = 32

Run = Callable[[tuple[int, int, int], Tensor, int], None]


def in_parts(
    run: Run,
    out: Tensor,
    grid: tuple[int, int],
    tiles: int,
    splits: int | None,
    tokens: int = FEW_TOKENS + 1,
    bias: Tensor | None = None,
) -> None:
    """Run a kernel over the whole sum, or over parts of it that are added.

    Args:
        run: is called with the grid, where to write ([parts, *out.shape] in float32, or out itself where there is
            one part), and the tiles along the sum that a program takes. Where it is called with out, it adds the bias.
        out: float32, bfloat16 or float16 [..., columns].
        grid: of the programs without a cut.
        tiles: along the sum.
        splits: see ``steps_of``.
        tokens: see ``steps_of``.
        bias: the dtype of out, [columns], or None.
    """
    steps = steps_of(grid[0] * grid[1], tiles, splits, tokens)
    depth = -(-tiles // steps)
    parts = out if depth == 1 else out.new_empty((depth, *out.shape), dtype=torch.float32)
    run((*grid, depth), parts, steps)
    if depth > 1:
        add_parts(parts, out, bias)


def add_parts(parts: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """out = parts[0] + parts[1] + ... + bias.

    Args:
        parts: float32 [parts, *out.shape], two or more.
        out, bias: see ``in_parts``.
    """
    depth, size, block = len(parts), out.numel(), 256
    launch(
        _add_parts, (-(-size // block),),
        parts, out if bias is None else bias, out, size, out.shape[-1], depth,
        BIAS=bias is not None, DEPTH=8 if depth > 4 else 4 if depth > 2 else 2, BLOCK=block, num_warps=2,
    )  # fmt: skip


def steps_of(programs: int, tiles: int, splits: int | None = None, tokens: int = FEW_TOKENS + 1) -> int:
    """How many of the tiles along the sum a program takes.

    Args:
        programs: that there are without a cut.
        tiles: along the sum.
        splits: wished for; None: as many as bring the programs to `PROGRAMS`, with `FEWEST_STEPS` each, or to those of
            few tokens.
        tokens: of a program.

    Returns:
        1 to tiles. Parts of this length cover the tiles, and none is empty.
    """
    if splits is None:
        few = tokens <= FEW_TOKENS
        most, fewest = (PROGRAMS_OF_FEW_TOKENS, FEWEST_STEPS_OF_FEW_TOKENS) if few else (PROGRAMS, FEWEST_STEPS)
        splits = max(min(most // programs, tiles // fewest), 1)
    return -(-tiles // min(max(splits, 1), tiles))


@triton.jit(do_not_specialize=["splits"])
def _add_parts(parts, bias, out, size, N, splits, BIAS: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = parts[0, i] + parts[1, i] + ... + bias[i % N]: DEPTH parts at a time, so that their loads overlap."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, DEPTH)
    at = parts + part.to(tl.int64)[:, None] * size + i[None, :]
    inside = i < size
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, bound(splits), DEPTH):
        total += tl.sum(tl.load(at, mask=inside[None, :] & (first + part < splits)[:, None], other=0.0), axis=0)
        at += size * DEPTH
    if BIAS:
        total += to_float32(tl.load(bias + i % N, mask=inside, other=0.0))
    tl.store(out + i, round_to(total, out.dtype.element_ty), mask=inside)
