"""All functions together: on any number of threads, and between pages that may not be touched. And those of AdamW."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import (
    Layer,
    any_weight,
    dequantized,
    linear_few,
    normal_weight,
    quantized,
    same_bits,
    scales_quantized,
    segments,
)
from torch import Tensor

from qloralab.kernels.adamw import DTYPES as PARAMETER_DTYPES
from qloralab.kernels.adamw import Rates, adamw_rounded_
from qloralab.kernels.adamw_8bit import adamw_8bit_reference_
from qloralab.kernels.cpu import library as module
from qloralab.kernels.cpu.library import DTYPES, Library, weight_of

pytestmark = pytest.mark.compiler

ROOT = Path(__file__).resolve().parents[3]
ADAMW = Rates(lr=3e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
PROT_NONE = 0  # of <sys/mman.h>


def everything(library: Library) -> list[Tensor]:
    """The results of every function on the same numbers; enough of them for several tasks each."""
    torch.manual_seed(5)
    x = torch.randn(150, 1000)
    packed, absmax = quantized(library, x, 64)
    results = [packed, absmax, *scales_quantized(library, torch.rand(3000), 0.5)]
    operands = normal_weight((260, 1088))  # few_tokens.c leaves less than 2**18 weights to one thread
    results += [dequantized(library, operands, dtype) for dtype in DTYPES]
    results += [linear_few(library, operands, torch.randn(5, 1088).to(dtype), None) for dtype in DTYPES]
    dropped = torch.empty_like(x)
    library.dropout(x, 7, 30_000, 2.0, dropped)
    wide, narrow = segments([50_000, 200_000, 7]), segments([50_000, 20_000, 7], torch.bfloat16, bits=8)
    library.adamw(*wide, [3, 4, 5], ADAMW)  # pyright: ignore[reportCallIssue]
    library.adamw_8bit(*narrow, [3, 4, 5], ADAMW)  # pyright: ignore[reportCallIssue]
    results += [dropped, *(tensor for some in (*wide, *narrow) for tensor in some)]
    for dtype in DTYPES:
        results += Layer(operands, 50, 70, 0.1, 5_000, True, dtype, torch.randn).run(library).values()
    return results


def test_the_number_of_threads_changes_no_bit(library, set_threads):
    set_threads(1)
    alone = everything(library)
    for threads in (1, 2, 3, 2):
        set_threads(threads)
        for index, (one, other) in enumerate(zip(everything(library), alone, strict=True)):
            assert torch.equal(one, other), (threads, index)


def test_without_a_pool_the_calling_thread_does_it_all(library):
    expected = everything(library)
    library._c.qloralab_set_pool(None)
    try:
        found = everything(library)
    finally:
        library._c.qloralab_set_pool(library.pool.parallel if library.pool else None)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", PARAMETER_DTYPES, ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("sizes", [[1], [7, 0, 33], [65_536, 255, 1], [100_001, 512]], ids=str)
def test_adamw_rounds_every_step_of_its_formula_to_float32(library, sizes, dtype, empty):
    def put(tensor: Tensor) -> Tensor:
        return empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor)

    found, steps = segments(sizes, dtype, put=put), [1, 1000, 3][: len(sizes)]
    expected = [[tensor.clone() for tensor in some] for some in found]
    library.adamw(*found, steps, ADAMW)
    for p, g, m, v, step in zip(*expected, steps, strict=True):
        adamw_rounded_(p, g, m, v, step, ADAMW)
    for one, other in zip(found, expected, strict=True):
        assert all(same_bits(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", PARAMETER_DTYPES, ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("sizes", [[1], [7, 0, 33], [65_536, 255, 1], [10_001, 512]], ids=str)
def test_adamw_8bit_gives_the_bits_of_the_reference(library, sizes, dtype, empty):
    def put(tensor: Tensor) -> Tensor:
        return empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor)

    found, steps = segments(sizes, dtype, bits=8, put=put), [1, 1000, 3][: len(sizes)]
    p, g, m, v, m_absmax, v_absmax = ([tensor.clone() for tensor in some] for some in found)
    library.adamw_8bit(*found, steps, ADAMW)
    adamw_8bit_reference_(p, g, m, v, m_absmax, v_absmax, steps, ADAMW)
    for one, other in zip(found, [p, g, m, v, m_absmax, v_absmax], strict=True):
        assert all(same_bits(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("features", "expected"),
    [("avx512f amx_bf16 amx_tile", True), ("avx512f avx512_bf16 amx_tile", False), ("", False)],
)
def test_a_matrix_unit_is_one_for_bfloat16(features, expected, monkeypatch):
    monkeypatch.setattr(module, "cpu_features", lambda: features)
    assert module.has_matrix_unit.__wrapped__() is expected  # without its cache


def test_nothing_is_touched_beyond_its_ends(library):
    """Every operand lies between two pages that may not be touched, against the one, then against the other.

    A step too far ends the process, so it is another one.
    """
    command = [sys.executable, __file__, library.isa, *library.extra]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONWARNINGS": "ignore"}, capture_output=True, text=True
    )
    last = done.stdout.splitlines()[-2:]
    assert done.returncode == 0, f"status {done.returncode} after {last}\n{done.stderr}"
    assert last[-1:] == ["done"]


def fenced(tensor: Tensor, at_end: bool) -> Tensor:
    """A copy whose last byte is before, or whose first byte is after, a page that may not be touched."""
    if not tensor.numel():
        return tensor
    size, page = tensor.nbytes, mmap.PAGESIZE
    inside = -(-size // page) * page
    memory = mmap.mmap(-1, inside + 2 * page)
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for fence in (address, address + page + inside):
        if libc.mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(page), PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    start = page + (inside - size if at_end else 0)
    out = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start)
    return out.copy_(tensor.contiguous().view(-1).view(torch.uint8)).view(tensor.dtype).view(tensor.shape)


def run_between_fences(isa: str, *extra: str) -> None:
    """Every function on odd and small shapes; prints what it is about to do."""
    library = Library(isa, extra)
    torch.set_num_threads(1)
    shapes = [(1, 1), (1, 31), (3, 5), (17, 33), (16, 32), (2, 64), (5, 96), (33, 128), (3, 4097), (34, 65)]
    for at_end in (True, False):
        for shape in shapes:
            for block_size, double_quant in [(32, True), (64, False), (4096, True)]:
                print(f"{shape} {block_size=} {double_quant=} {at_end=}")
                between_fences(library, shape, block_size, double_quant, at_end)
    print("done", flush=True)


def between_fences(library: Library, shape: tuple[int, int], block_size: int, double_quant: bool, at_end: bool) -> None:
    """Every function on one shape."""

    def put(tensor: Tensor) -> Tensor:
        return fenced(tensor, at_end)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return put(torch.zeros(shape, dtype=dtype))

    packed, scales, absmax2, offset, values, size, _ = any_weight(shape, block_size, double_quant)
    if absmax2 is not None and offset is not None:
        absmax2, offset = put(absmax2), put(offset)
    operands = put(packed), put(scales), absmax2, offset, put(values), size, block_size
    weight, (N, K) = weight_of(*operands), shape
    scales_quantized(library, put(torch.rand(N)), 0.5, new)
    for dtype in DTYPES:
        print("dequantize, quantize, dropout, adamw", dtype, flush=True)
        library.dequantize(weight, range(N), range(K), new(N, K, dtype=dtype))
        library.dequantize(weight, range(N - 1, N), range(K // 2, K), new(1, K - K // 2, dtype=dtype))
        x = put(torch.randn(shape).to(dtype))
        quantized(library, x, block_size, operands[4], new)
        library.dropout(x, 3, 30_000, 2.0, new(N, K, dtype=dtype))
        library.adamw(*segments([N * K, 3, K], dtype, put=put), [1, 2, 3], ADAMW)  # pyright: ignore[reportCallIssue]
        library.adamw_8bit(*segments([N * K, 3, K], dtype, 8, put), [1, 2, 3], ADAMW)  # pyright: ignore[reportCallIssue]
        bias = put(torch.randn(N).to(dtype))
        for tokens in (1, 2, 3, 8, 9):
            print("linear_few", dtype, tokens, flush=True)
            linear_few(library, operands, put(torch.randn(tokens, K).to(dtype)), bias, new)
        for tokens, r in [(1, 1), (13, 7), (9, 33), (14, 34), (2, 0)]:
            print("adapted_linear", dtype, tokens, r, flush=True)
            layer = Layer(operands, tokens, r, 1.0, 10_000 * (r % 2), True, dtype)
            layer.x, layer.grad, layer.bias, layer.A, layer.B = map(put, (layer.x, layer.grad, bias, layer.A, layer.B))
            layer.run(library, new)


if __name__ == "__main__":
    run_between_fences(*sys.argv[1:])
