"""Products of 16 bits: PyTorch's own where hardware takes them, otherwise in float32 and rounded once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from qloralab.nf4 import processor, product

LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
ALL = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
PRODUCTS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "matmul": (product.matmul, torch.matmul, [(5, 70), (70, 9)]),
    "batched": (product.matmul, torch.matmul, [(2, 3, 70), (70, 9)]),
    "linear": (product.linear, F.linear, [(2, 3, 70), (9, 70)]),
    "bias": (product.linear, F.linear, [(5, 70), (9, 70), (9,)]),
    "addmm": (partial(product.addmm, alpha=0.5), partial(torch.addmm, alpha=0.5), [(5, 9), (5, 70), (70, 9)]),
}
products = pytest.mark.parametrize("name", PRODUCTS)


class Taken(TorchDispatchMode):
    """Records the dtypes that PyTorch multiplies."""

    def __init__(self):
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.bmm):
            self.dtypes |= {a.dtype for a in args if isinstance(a, Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["float32", "bfloat16"])
def multiplies(request: pytest.FixtureRequest, monkeypatch) -> torch.dtype:
    """A processor that multiplies this dtype in hardware."""
    dtype = getattr(torch, request.param)
    monkeypatch.setattr(processor, "compute_dtype", lambda device: processor.ComputeDtype(dtype, "a test"))
    return dtype


@products
@ALL
def test_it_is_the_product_of_float64_rounded_once(multiplies, name, dtype):
    ours, definition, shapes = PRODUCTS[name]
    tensors = [torch.randint(-3, 4, shape).to(dtype) for shape in shapes]  # whole numbers: any order of sums is exact
    found = ours(*tensors)
    assert found.dtype == dtype
    assert torch.equal(found, definition(*(t.double() for t in tensors)).to(dtype))


@products
@ALL
def test_nothing_is_multiplied_that_would_be_emulated(multiplies, name, dtype):
    ours, _, shapes = PRODUCTS[name]
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    with Taken() as taken:
        ours(*tensors)
    emulated = dtype == torch.float16 or (dtype == torch.bfloat16 and multiplies == torch.float32)
    assert taken.dtypes == {torch.float32 if emulated else dtype}


@products
@LOW
def test_another_dtype_is_refused(multiplies, name, dtype):
    ours, _, shapes = PRODUCTS[name]
    tensors = [torch.zeros(shape).to(dtype) for shape in shapes]
    for index in range(1, len(tensors)):
        mixed = [t.float() if i == index else t for i, t in enumerate(tensors)]
        with pytest.raises(RuntimeError, match="dtype"):
            ours(*mixed)
