"""The tiles: every position of a tile in both directions, scales, and padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qloralab.kernels.gpu import packing
from qloralab.kernels.gpu.lookup import assembly
from qloralab.kernels.gpu.packing import tile, why_not
from qloralab.nf4 import blockwise
from qloralab.nf4.codebook import codebook_values, normal_float
from qloralab.nf4.double_quant import dequantize_scales, quantize_scales

from .prmt import run

NF4 = normal_float()
# (N, K, block size): one tile, padded rows, a block over many rows, several tiles
SHAPES = [(64, 64, 64), (65, 192, 64), (3, 128, 128), (130, 192, 4096), (1, 64, 2048)]


def operands(N: int, K: int, block_size: int = 64, values: torch.Tensor = NF4):
    packed = torch.randint(256, (N * K // 2, 1), dtype=torch.uint8)
    return packed, torch.rand(-(-N * K // block_size)) + 0.5, None, None, values, (N, K), block_size


def test_a_weight_is_converted_in_slabs(monkeypatch):
    weight = operands(200, 128)
    whole = tile(*weight)
    monkeypatch.setattr(packing, "_SLAB", 64 * 128)
    assert torch.equal(tile(*weight).words, whole.words)


@pytest.mark.parametrize(("N", "K", "block_size"), SHAPES)
@pytest.mark.parametrize("name", ["nf4", "fp4", "int4"])
def test_every_position_of_a_tile_forward_and_backward(N, K, block_size, name):
    """The assembly, run on all words, gives each weight where the docstring has it; rows of the padding are zeros."""
    weight = operands(N, K, block_size, codebook_values(name))
    tiled = tile(*weight)
    assert tiled.words.shape == (-(-N // 64), K // 64, 512)
    order = torch.tensor(tiled.table.order)
    by_code = torch.empty(16).index_put_((order,), torch.tensor(tiled.table.values))
    rows = -(-N // 64) * 64
    W = np.zeros((rows, K), np.float32)
    W[:N] = by_code[blockwise.unpack(weight[0], N * K).long()].view(N, K).numpy()

    words = tiled.words.numpy().view(np.uint32).reshape(rows // 64, K // 64, 2, 2, 2, 4, 4, 2, 2)
    tn, tk, n32, k32, n16, u, c, k16 = np.indices(words.shape[:-1])
    n0, k0 = 64 * tn + 32 * n32 + 16 * n16 + 2 * u, 64 * tk + 32 * k32 + 16 * k16 + 2 * c
    seen = {False: np.zeros((rows, K), int), True: np.zeros((rows, K), int)}
    for transposed in (False, True):
        registers = {"$8": words[..., 0], "$9": words[..., 1]}
        one = np.full(words.shape[:-1], 0x3F803F80, np.uint32)
        if transposed:
            registers |= {"$10": one, "$11": one}
        first = 12 if transposed else 10
        registers |= {f"${first + 2 * i}": np.full_like(one, t & 0xFFFFFFFF) for i, t in enumerate(tiled.table.words)}
        result = run(assembly(transposed), registers)
        for p, e, q, position in np.ndindex(2, 2, 2, 2):
            i, kp = (position, e) if transposed else (e, position)
            n, k = n0 + 8 * p + i, k0 + 8 * q + kp
            value = (result[f"${4 * p + 2 * e + q}"] >> np.uint32(16 * position)) << np.uint32(16)
            assert np.array_equal(value.view(np.float32), W[n, k])
            np.add.at(seen[transposed], (n, k), 1)
    assert all((count == 1).all() for count in seen.values())


@pytest.mark.parametrize(("N", "K", "block_size"), SHAPES)
def test_scales_of_a_tile(N, K, block_size):
    weight = operands(N, K, block_size)
    tiled = tile(*weight)
    scales = tiled.scales.view(-1, K // 64, 4, 2, 2, 2, 2)
    for n in range(-(-N // 64) * 64):
        t, n32, n16, p, u, i = n // 64, n // 32 % 2, n // 16 % 2, n // 8 % 2, n // 2 % 4, n % 2
        for k in range(K // 64):
            expected = weight[1][(n * K + 64 * k) // block_size] / tiled.table.factor if n < N else torch.tensor(0.0)
            assert scales[t, k, u, n32, n16, p, i] == expected
    assert torch.equal(tiled.scales_bf16, tiled.scales.bfloat16())


def test_double_quantization_is_decoded():
    packed, absmax, *_ = operands(64, 128)
    codes, absmax2, offset = quantize_scales(absmax)
    tiled = tile(packed, codes, absmax2, offset, NF4, (64, 128), 64)
    decoded = dequantize_scales(codes, absmax2, offset)
    assert torch.equal(tiled.scales, tile(packed, decoded, None, None, NF4, (64, 128), 64).scales)


@pytest.mark.parametrize(
    ("shape", "block_size", "values", "message"),
    [
        ((64, 96), 64, NF4, "K must be a multiple of 64, not 96"),
        ((64, 64), 32, NF4, "block size must be a multiple of 64, not 32"),
        ((64,), 64, NF4, "2 dimensions, not 1"),
        ((64, 64), 64, normal_float(3), "16 values, not 8"),
    ],
    ids=["K", "block size", "1-D", "3 bits"],
)
def test_what_cannot_be_tiled(shape, block_size, values, message):
    assert message in str(why_not(values, shape, block_size))
    with pytest.raises(ValueError, match=message):
        tile(torch.zeros(2048, 1, dtype=torch.uint8), torch.ones(64), None, None, values, shape, block_size)
