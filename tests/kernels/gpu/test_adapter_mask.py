"""The mask in a kernel has the bits of ``lora/dropout.py``: every place, threshold and seed."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from qloralab.kernels.gpu.adapter_mask import coins, limit, quad_terms, row_terms, row_words, threshold
from qloralab.lora.dropout import keep_mask, rate


@triton.jit
def _mask(seed, out, M, K, words, threshold, ROWS: tl.constexpr, QUADS: tl.constexpr):
    m = tl.arange(0, ROWS).to(tl.int64)
    k = tl.arange(0, 4 * QUADS)
    numbers = coins(row_terms(seed, m, words)[:, None] + quad_terms(tl.arange(0, QUADS))[None, :])
    keep = tl.reshape(numbers, (ROWS, 4 * QUADS)) >= limit(threshold)
    tl.store(out + m[:, None] * K + k[None, :], keep.to(tl.int8), mask=(m[:, None] < M) & (k[None, :] < K))


def mask(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    out = torch.empty(M, K, dtype=torch.int8, device=seed.device)
    _mask[(1,)](seed, out, M, K, row_words(K), threshold(p), ROWS=32, QUADS=64)  # pyright: ignore[reportArgumentType]
    return out.bool()


@pytest.mark.parametrize("p", [1e-4, 0.1, 0.5, 0.999, 1 - 1e-9])
@pytest.mark.parametrize(("M", "K"), [(1, 1), (3, 31), (17, 33), (32, 256)])
def test_the_mask_is_the_definitions(M, K, p, device):
    for number in (0, -1, 2**63 - 1, -(2**63), 1234567):
        seed = torch.tensor(number, device=device)
        assert torch.equal(mask(seed, M, K, p), keep_mask(seed, M, K, p))


@pytest.mark.parametrize("p", [0.0, 1e-6, 1e-5, 0.1, 0.5, 1 - 1e-9])
def test_the_threshold_is_that_of_the_applied_rate(p):
    assert threshold(p) / 65536 == rate(p)
    assert 0 <= threshold(p) <= 65535
