"""What the tests of quantized weights share: their parts, their memory, comparisons bit for bit and with float64."""

from __future__ import annotations

import pytest
from torch import Tensor

from qloralab.nf4.packed import DTYPES, Packed
from qloralab.nf4.tensor import QuantizedTensor

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
double_quants = pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
biases = pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])


def parts(weight: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors that a weight holds, by name."""
    named = zip(Packed._fields, weight.operands().tensors, strict=False)
    return {name: part for name, part in named if part is not None}


def pointers(tensors: dict[str, Tensor]) -> set[int]:
    """Where the memory of tensors begins."""
    return {part.untyped_storage().data_ptr() for part in tensors.values()}


def assert_same_bits(a: QuantizedTensor, b: QuantizedTensor) -> None:
    assert parts(a).keys() == parts(b).keys()
    for name, part in parts(a).items():
        other = parts(b)[name]
        assert (part.dtype, part.shape) == (other.dtype, other.shape), name
        assert part.numpy().tobytes() == other.numpy().tobytes(), name
    assert (a.shape, a.dtype, a.codebook, a.block_size) == (b.shape, b.dtype, b.codebook, b.block_size)


def assert_near(found: Tensor, exact: Tensor, tolerance: float, name: str = "") -> None:
    """Within a root-mean-square error relative to that of float64."""
    assert found.shape == exact.shape, name
    assert found.isfinite().all(), name
    assert (found.double() - exact).norm() <= tolerance * exact.norm(), name
