"""``product.h`` in both arithmetics, for each instruction set: exact on whole numbers, and near float64 on others."""

from __future__ import annotations

import pytest
import torch
from cases import NOISE, ULP, WEIGHTS, Layer, assert_near, double_quants, normal_weight, thresholds, whole_weight

pytestmark = pytest.mark.compiler

# Every height of a tile of tokens (1 to 12), one and several tiles, odd counts; every way that r is no multiple of 32.
TOKENS = [*range(1, 14), 24, 25, 37, 0]
RANKS = [0, 1, 2, 7, 12, 13, 16, 31, 32, 33, 64]


@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
@double_quants
def test_adapted_products_of_any_weight(product, shape, double_quant, empty):
    library, dtype = product
    sizes = [(9, 5), (14, 16), (25, 33), (1, 1), (6, 0)]
    for block_size, (tokens, r) in zip((32, 64, 128, 1024, 4096), sizes, strict=True):
        operands = whole_weight(shape, block_size, double_quant)
        layer = Layer(operands, tokens, r, 0.5, 20_000 * (tokens % 2), r % 2 == 0, dtype)
        layer.check_whole(layer.run(library, empty))


@pytest.mark.parametrize("tokens", TOKENS)
@thresholds
def test_adapted_products_of_any_number_of_tokens(product, tokens, threshold, empty):
    library, dtype = product
    for shape in [(40, 96), (33, 65)]:
        for r in (0, 7, 33):
            layer = Layer(whole_weight(shape, 32), tokens, r, 2.0, threshold, True, dtype)
            layer.check_whole(layer.run(library, empty))


@pytest.mark.parametrize("r", RANKS)
@thresholds
def test_adapted_products_of_any_rank(product, r, threshold, empty):
    library, dtype = product
    for shape in [(64, 64), (31, 67), (520, 1030)]:  # a packing task is 512 long
        for tokens in (5, 26):
            layer = Layer(whole_weight(shape, 64), tokens, r, 1.0, threshold, False, dtype)
            layer.check_whole(layer.run(library, empty))


def test_the_gradient_of_the_input_may_be_left_out(product, empty):
    library, dtype = product
    for r, tokens in [(5, 9), (33, 26)]:
        layer = Layer(whole_weight((37, 70)), tokens, r, 1.0, 9_000, False, dtype)
        layer.check_whole(layer.run(library, empty, needs_input=False))


@pytest.mark.parametrize("threshold", [1, 32_767, 32_768, 65_535])
def test_thresholds_are_unsigned(product, threshold, empty):
    library, dtype = product
    layer = Layer(whole_weight((16, 1000)), 20, 8, 1.0, threshold, False, dtype)
    layer.check_whole(layer.run(library, empty))


@pytest.mark.parametrize("shape", [(320, 512), (67, 4997), (4997, 129)], ids=str)
@pytest.mark.parametrize("threshold", [0, 6_554], ids=["plain", "dropout"])
def test_adapted_products_on_any_numbers(product, shape, threshold):
    library, dtype = product
    layer = Layer(normal_weight(shape), 33, 16, 0.03, threshold, True, dtype, torch.randn)
    found = layer.run(library)
    x, kept, keep, grad, bias, W, A, B = layer.float64()
    h, G = found["h"].double(), layer.scale * grad @ B
    assert_near("h", found["h"], layer.scale * kept @ A.T, layer.scale * kept.abs() @ A.abs().T, dtype)
    assert_near("y", found["y"], x @ W.T + h @ B.T + bias, x.abs() @ W.abs().T + h.abs() @ B.abs().T, dtype)
    assert_near("dB", found["dB"], grad.T @ h, grad.abs().T @ h.abs(), dtype)
    off = ULP[dtype] / NOISE * G.abs() + layer.scale * grad.abs() @ B.abs()  # what G's rounding and its sum add
    assert_near("dA", found["dA"], G.T @ kept, (G.abs() + off).T @ kept.abs(), dtype)
    terms = grad.abs() @ W.abs() + keep * ((G.abs() + off) @ A.abs())
    assert_near("dx", found["dx"], grad @ W + keep * (G @ A), terms, dtype)
