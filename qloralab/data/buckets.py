"""A few lengths that batches are padded to, where each new length has a price: a CUDA graph, say, or a compilation.

With one length for all, the short examples are mostly padding; with a length for each, nothing is saved. The best few
are found exactly, by dynamic programming over the distinct lengths c[0] < c[1] < ..., where n[j] examples have c[j]::

    cost[1, j] = c[j] (n[0] + ... + n[j])
    cost[b, j] = min over i < j of  cost[b - 1, i] + c[j] (n[i + 1] + ... + n[j])

cost[b, j] is the least number of positions of all examples up to length c[j] in b buckets, of which c[j] is the last.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence

import numpy as np

MOST = 8


def buckets(lengths: Sequence[int], most: int = MOST, multiple: int = 1, limit: int | None = None) -> list[int]:
    """The lengths to pad to, such that the examples, each padded to the next one, have the fewest positions.

    Args:
        lengths: tokens of each example, at least one example.
        most: how many buckets there may be.
        multiple: a bucket is a multiple of it.
        limit: but no longer than this; None: no end. No example is longer.

    Returns:
        ascending; the last one holds the longest example.
    """
    counts = Counter(min(-(-length // multiple) * multiple, limit or sys.maxsize) for length in lengths)
    c = np.array(sorted(counts), np.float64)
    until = np.cumsum([counts[length] for length in sorted(counts)])
    rising = np.triu(np.ones((len(c), len(c)), bool), 1)
    cost, before = c * until, list[np.ndarray]()
    for _ in range(min(most, len(c)) - 1):
        table = np.where(rising, cost[:, None] + c * (until - until[:, None]), np.inf)  # [i, j]
        before.append(table.argmin(0))
        cost = table.min(0)
    chosen = [len(c) - 1]
    for one in reversed(before):
        chosen.append(int(one[chosen[-1]]))
    return [int(c[j]) for j in reversed(chosen)]
