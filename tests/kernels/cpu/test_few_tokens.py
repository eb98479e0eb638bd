"""``few_tokens.c``, for each instruction set: exact on whole numbers, and near float64 on others."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import WEIGHTS, assert_near, dtypes, linear_few, normal_weight, rounded, whole, whole_weight

from qloralab.kernels.cpu.library import FEW_TOKENS
from qloralab.nf4 import ops

pytestmark = pytest.mark.compiler


@dtypes
@pytest.mark.parametrize("shape", [shape for shape in WEIGHTS if shape[1]], ids=str)
def test_few_tokens(library, shape, dtype, empty):
    N, K = shape
    for block_size, double_quant in itertools.product((32, 64, 128, 4096), (False, True)):
        operands = whole_weight(shape, block_size, double_quant)
        W = ops.dequantize.reference(*operands, dtype).double()
        for tokens in range(1 + double_quant, FEW_TOKENS + 1, 2):
            x = whole(tokens, K).to(dtype)
            bias = whole(N, most=200).to(dtype) if tokens % 4 < 2 else None
            exact = x.double() @ W.T + (0 if bias is None else bias.double())
            y = linear_few(library, operands, x, bias, empty)
            assert torch.equal(y, rounded(exact, dtype)), (tokens, block_size)


@dtypes
@pytest.mark.parametrize("shape", [(320, 512), (67, 4997), (200, 129)], ids=str)
def test_few_tokens_on_any_numbers(library, shape, dtype):
    N, K = shape
    for block_size in (32, 64, 4096):
        operands = normal_weight(shape, block_size)
        W = ops.dequantize.reference(*operands, dtype).double()
        for tokens in (1, 3, 8):
            x, bias = torch.randn(tokens, K).to(dtype), torch.randn(N).to(dtype)
            exact, magnitude = x.double() @ W.T + bias, x.double().abs() @ W.abs().T
            assert_near("y", linear_few(library, operands, x, bias), exact, magnitude, dtype)
