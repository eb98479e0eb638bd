"""All functions together: on any number of threads, and between pages that may not be touched. And those of AdamW."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import chain
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
)
from torch import Tensor

from qloralab.kernels.adamw import ADAMW, Rates
from qloralab.kernels.cpu import library as module
from qloralab.kernels.cpu.library import DTYPES, Library, weight_of
from qloralab.kernels.lion import LION
from qloralab.kernels.lion import Rates as LionRates
from qloralab.kernels.rule import DTYPES as PARAMETER_DTYPES
from qloralab.kernels.rule import Rule, Segments
from qloralab.nf4.packed import Packed

pytestmark = pytest.mark.compiler

ROOT = Path(__file__).resolve().parents[3]
RATES = Rates(lr=3e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
LION_RATES = LionRates(lr=3e-4, beta1=0.9, beta2=0.95, weight_decay=0.1)
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
    results += [dropped, *updated(library, 32, wide), *updated(library, 8, narrow)]
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


def segments(
    sizes: Sequence[int],
    dtype: torch.dtype = torch.float32,
    bits: int = 32,
    put: Callable[[Tensor], Tensor] = Tensor.clone,
    rule: Rule = ADAMW,
) -> Segments:
    """Segments of random numbers, or codes."""
    p, g = ([put(torch.randn(n).to(dtype)) for n in sizes] for _ in range(2))
    steps = [3, 1000, 1][: len(sizes)]
    if bits == 32:
        return Segments(p, g, [[put(torch.rand(n)) for n in sizes] for _ in rule.moments], None, steps)
    codes = [[put(torch.randint(256, (n,), dtype=torch.uint8)) for n in sizes] for _ in rule.moments]
    return Segments(p, g, codes, [[put(torch.rand(-(-n // 256))) for n in sizes] for _ in rule.moments], steps)


def updated(library: Library, bits: int, some: Segments, rule: Rule = ADAMW) -> list[Tensor]:
    """All tensors of segments behind an update in C."""
    launch = library.update(f"{rule.kernel}_8bit" if bits == 8 else str(rule.kernel))
    assert launch
    launch(some, RATES if rule is ADAMW else LION_RATES)
    return [tensor for tensors in some.tensors for tensor in tensors]


@pytest.mark.parametrize("dtype", PARAMETER_DTYPES, ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("sizes", [[1], [7, 0, 33], [65_536, 255, 1], [100_001, 512]], ids=str)
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("rule", [ADAMW, LION], ids=["adamw", "lion"])
def test_update_adamw_and_lion_round_every_step_of_their_formula(library, rule, bits, sizes, dtype, empty):
    def put(tensor: Tensor) -> Tensor:
        return empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor)

    if bits == 8 and sizes[0] > 70_000:
        sizes = [10_001, *sizes[1:]]
    found = segments(sizes, dtype, bits, put, rule)
    lists = [[tensor.clone() for tensor in some] for some in found.tensors]
    count = 2 + len(rule.moments)
    expected = Segments(lists[0], lists[1], lists[2:count], lists[count:] or None, found.steps)
    rule.apply_(expected, RATES if rule is ADAMW else LION_RATES, rounded=True)
    pairs = zip(updated(library, bits, found, rule), chain(*expected.tensors), strict=True)
    assert all(same_bits(a, b) for a, b in pairs)


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
    operands = Packed(put(packed), put(scales), absmax2, offset, put(values), size, block_size)
    weight, (N, K) = weight_of(operands), shape
    scales_quantized(library, put(torch.rand(N)), 0.5, new)
    for dtype in DTYPES:
        print("dequantize, quantize, dropout, adamw", dtype, flush=True)
        library.dequantize(weight, range(N), range(K), new(N, K, dtype=dtype))
        library.dequantize(weight, range(N - 1, N), range(K // 2, K), new(1, K - K // 2, dtype=dtype))
        x = put(torch.randn(shape).to(dtype))
        quantized(library, x, block_size, operands[4], new)
        library.dropout(x, 3, 30_000, 2.0, new(N, K, dtype=dtype))
        for rule, bits in itertools.product((ADAMW, LION), (32, 8)):
            updated(library, bits, segments([N * K, 3, K], dtype, bits, put, rule), rule)
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
