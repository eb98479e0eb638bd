"""The product of few tokens: the source of the GPU's kernel, compiled for a CPU, against the definition of its weights.

A GPU's thread is a thread here (``cuda_shim.h``), so what the threads of a CTA do to each other is what is tested. Only
the instructions that have no C++ are stood in for.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qloralab.kernels.cpu import build
from qloralab.kernels.gpu import canonical, few_tokens, self_check
from qloralab.kernels.gpu.adapter_operands import LowRank
from qloralab.kernels.gpu.lookup import table
from qloralab.nf4 import blockwise, double_quant
from qloralab.nf4.blockwise import unpack
from qloralab.nf4.packed import Packed

from ..cpu.cases import NF4
from .conftest import few
from .test_linear import dequantized, rounded, whole_weight

HERE = Path(__file__).parent
FILES = (HERE / "few_tokens_cpu.cpp", HERE / "cuda_shim.h", few_tokens.SOURCE)
FLAGS = ("-std=c++20", "-O1", f"-I{few_tokens.SOURCE.parent}", "-Wno-unknown-pragmas", "-pthread")

pytestmark = pytest.mark.compiler


@functools.cache
def library(constants: few_tokens.Constants) -> ctypes.CDLL:
    """The kernel compiled for a CPU with some constants."""
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in FILES)).hexdigest()  # the cache goes by flags
    options = [option.decode() for option in constants.options()]
    return build.load([FILES[0]], "native", [*FLAGS, *options, f"-DSOURCES=0x{digest[:8]}", "-lstdc++"])


def multiply(
    x: Tensor, weight: Packed, bias: Tensor | None = None, adapter: LowRank | None = None, grid: int = 3
) -> Tensor:
    """``few_tokens.few_tokens`` on so many multiprocessors of a CPU."""
    M, (N, _) = len(x), weight.shape
    constants = few_tokens.Constants.of(M, weight)
    out = torch.full((M, N), float("nan"), dtype=torch.bfloat16)
    operands, grid = few_tokens.arguments(x, weight, bias, adapter, out), few_tokens.grid_of(N, grid)
    operands = [value for _, value in operands]
    *tensors, M_, N_, r, inverse = operands[:-8]
    pointers = [ctypes.c_void_p(one.data_ptr() if isinstance(one, Tensor) else None) for one in tensors]
    numbers = [*map(ctypes.c_uint, (M_, N_, r)), ctypes.c_float(inverse)]
    words = (ctypes.c_uint * 8)(*[word & 0xFFFFFFFF for word in operands[-8:]])
    shared = ctypes.c_size_t(few_tokens.shared_bytes(weight, grid))
    assert library(constants).run(ctypes.c_uint(grid), shared, *pointers, *numbers, words) == 1
    return out


def bits_of_the_weight(weight: Packed) -> Tensor:
    """bfloat16 [N, K]: bf16(c v) bf16(s / c), each of the three rounded once."""
    found, operands = table(weight.values), canonical.arguments(weight)
    scales, inverse = weight.scales, torch.tensor(operands["inverse"])
    if weight.absmax2 is not None:
        assert weight.offset is not None
        level = (weight.absmax2 * inverse).repeat_interleave(256)[: len(scales)].double()
        scales = (operands["scale_map"][scales.int()].double() * level + (weight.offset * inverse).double()).float()
    else:
        scales = scales * inverse
    codes = unpack(weight.packed, weight.shape[0] * weight.shape[1]).long()
    values = torch.tensor(found.values).bfloat16()[codes]
    return (values * scales.bfloat16().repeat_interleave(weight.block_size)[: len(values)]).view(weight.shape)


def random_weight(N: int, K: int, block_size: int = 64, double: bool = True) -> Packed:
    packed, absmax = blockwise.quantize_blockwise(torch.randn(N, K), NF4, block_size)
    scales = double_quant.quantize_scales(absmax) if double else (absmax, None, None)
    return Packed(packed, *scales, NF4, (N, K), block_size)


# M, N, K, block size, double quantization, rank, multiprocessors: each number of tokens; K of less than a unit, of half
# a unit more, and of more units than warps; odd rows; blocks that span rows.
CASES = [
    (1, 64, 64, 64, True, 0, 1), (2, 65, 128, 64, False, 1, 1), (3, 100, 192, 64, True, 16, 2),
    (4, 192, 256, 128, True, 17, 5), (5, 65, 1024, 64, True, 64, 3), (6, 67, 2112, 256, False, 0, 1),
    (7, 96, 2240, 64, True, 3, 2), (8, 70, 576, 4096, True, 33, 132), (9, 65, 128, 512, False, 0, 2),
    (10, 79, 192, 64, True, 5, 1), (11, 80, 4160, 64, True, 0, 1), (12, 81, 320, 4096, True, 70, 2),
    (13, 64, 64, 64, False, 100, 4), (14, 66, 1088, 1024, True, 0, 3), (15, 1000, 128, 64, True, 2, 7),
    (16, 95, 4224, 64, True, 20, 2),
]  # fmt: skip


@pytest.mark.parametrize(("M", "N", "K", "block_size", "double", "r", "grid"), CASES)
def test_exact_sums(M, N, K, block_size, double, r, grid):
    weight, x, bias = whole_weight(N, K, block_size, double), few(M, K), few(N) if M % 2 else None
    adapter = LowRank(few(M, r), few(N, r).float()) if r else None
    exact = x.double() @ dequantized(weight).T
    if bias is not None:
        exact += bias.double()
    if adapter is not None:
        exact += adapter.h.double() @ adapter.B.double().T
    assert torch.equal(multiply(x, weight, bias, adapter, grid).double(), rounded(exact))


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("K", [128, 192])
def test_the_weights_are_those_of_the_other_kernels(K, double):
    weight = random_weight(96, K, double=double)
    W = torch.cat([multiply(rows.contiguous(), weight) for rows in torch.eye(K).bfloat16().split(16)]).T
    assert torch.equal(W, bits_of_the_weight(weight))


@pytest.mark.parametrize(("M", "K"), [(3, 2304), (16, 576)])
def test_every_grid_gives_the_same_bits_near_the_exact_sum(M, K):
    N, r = 150, 20
    weight, x, bias = random_weight(N, K), torch.randn(M, K).bfloat16(), torch.randn(N).bfloat16()
    adapter = LowRank(torch.randn(M, r).bfloat16(), torch.randn(N, r))
    found = [multiply(x, weight, bias, adapter, grid) for grid in (1, 2, 3, 7)]
    assert all(torch.equal(found[0], one) for one in found)
    exact = x.double() @ bits_of_the_weight(weight).double().T + bias.double()
    exact += adapter.h.double() @ adapter.B.bfloat16().double().T
    assert ((found[0].double() - exact).norm() / exact.norm()) < 1.8e-3  # one rounding to bfloat16: 1.65e-3


@pytest.mark.parametrize(("N", "K"), [(160, 192), (96, 2112)])
def test_warps_differ_by_one_unit(N, K):
    """Two row tiles by 128 columns are 16 multiplications, in all groups of rows together."""
    weight = whole_weight(N, K)
    multiply(few(1, K), weight, grid=1)
    found = library(few_tokens.Constants.of(1, weight))
    products = [found.products_of(warp) for warp in range(16)]
    assert sum(products) == 16 * -(-N // 32) * -(-K // 128)
    assert max(products) - min(products) <= 16


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (few(17, 64), {}, "there must be 1 to 16 tokens, not 17"),
        (few(0, 64), {}, "there must be 1 to 16 tokens, not 0"),
        (few(1, 128), {}, "the last dimension of x must be 64"),
        (few(1, 64).float(), {}, "x must be bfloat16"),
        (few(1, 64), {"bias": few(1, 64)}, "bias must have 1 dimension"),
        (few(1, 64), {"adapter": LowRank(few(1, 3), torch.zeros(64, 4))}, "h must be"),
    ],
    ids=["17 tokens", "no tokens", "columns", "dtype", "bias", "adapter"],
)
def test_what_does_not_fit_is_refused(x, options, message):
    with pytest.raises(ValueError, match=message):
        few_tokens.few_tokens(x, whole_weight(64, 64), **options)


def test_nothing_is_served_without_a_gpu():
    assert not few_tokens.serves(few(1, 64), 1, whole_weight(64, 64))


def test_the_definition_of_the_check_is_what_the_kernel_computes():
    """The check at first use, of each kind of scales and half a unit."""
    for constants in (few_tokens.Constants(1, True, 3, 0), few_tokens.Constants(2, False, 4, 1)):
        found, expected = few_tokens.CHECKS["few_tokens"](multiply, torch.device("cpu"), constants)
        assert self_check.same(found, expected)


def test_one_launch(monkeypatch):
    """What is launched: one CTA for each multiprocessor, and a launch that depends from the second on."""
    launches = list[tuple]()
    monkeypatch.setattr(few_tokens, "_function", lambda *_: 7)
    monkeypatch.setattr(few_tokens, "_multiprocessors", lambda _: 4)
    monkeypatch.setattr(few_tokens, "_can_depend", lambda _: True)
    monkeypatch.setattr(few_tokens, "launch_native", lambda *given: launches.append(given))
    weight, x = whole_weight(100, 64), few(3, 64)
    for _ in range(2):
        assert few_tokens.few_tokens(x, weight, few(100)).shape == (3, 100)
    weight.packed.add_(1)
    few_tokens.few_tokens(x, weight)
    assert [given[:4] for given in launches] == [("few_tokens", 7, (4,), 512)] * 3
    assert [given[-2:] for given in launches] == [(True, False), (True, True), (True, False)]
    few_tokens.few_tokens(few(4 * 64 + 1)[1:].view(4, 64), weight)
    assert launches[-1][5][0][1].data_ptr() % 16 == 0


def test_a_weight_is_settled_once_it_was_multiplied_and_until_it_is_written_to():
    weight = whole_weight(100, 64)
    assert [few_tokens.is_settled(weight.tensors) for _ in range(3)] == [False, True, True]
    for one in weight.tensors:
        if one is not None:
            one.add_(1)
            assert [few_tokens.is_settled(weight.tensors) for _ in range(2)] == [False, True]
    assert not few_tokens.is_settled([one if one is None else one.clone() for one in weight.tensors])
    with torch.inference_mode():
        made = [one if one is None else one.clone() for one in weight.tensors]
    assert [few_tokens.is_settled(made) for _ in range(2)] == [False, False]


@pytest.mark.parametrize(
    ("capability", "missing", "failed", "warned"),
    [
        ((7, 5), "", "", ""),
        ((9, 0), "NVRTC cannot be loaded", "", ""),
        ((9, 0), "", "its result differs", "its result differs"),
        ((9, 0), "", "", None),
    ],
)
def test_where_it_fails_it_says_so_and_where_something_is_missing_it_does_not(
    capability, missing, failed, warned, monkeypatch
):
    said = list[str]()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(few_tokens, "_multiprocessors", lambda _: 4)
    monkeypatch.setattr(few_tokens.nvrtc, "why_not", lambda: missing)
    monkeypatch.setattr(few_tokens.self_check, "reason", lambda *_: failed)
    monkeypatch.setattr(few_tokens.self_check, "warn_once", lambda name, why, note: said.append(why))
    monkeypatch.setattr(few_tokens, "_serves", {})
    x: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    for _ in range(2):
        assert few_tokens.serves(x, 3, whole_weight(64, 64)) == (warned is None)
    assert said == ([warned] if warned else [])


SANITIZERS = {"address": ("5", "65"), "thread": ("3", "65")}


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [3, 33], ids=["3 blocks", "33 blocks"])
@pytest.mark.parametrize("name", SANITIZERS)
def test_under_a_sanitizer(name: str, blocks: int, tmp_path: Path):
    """No byte beside an operand; no value that another thread writes before a barrier."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs g++")
    program = tmp_path / "program"
    options = [one.decode() for one in few_tokens.Constants(1, True, blocks, 0).options()]
    command = [compiler, *FLAGS, *options, "-g", f"-fsanitize={name}", "-DMAIN", str(FILES[0]), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in done.stderr:
        pytest.skip(f"g++ has no -fsanitize={name}")
    assert done.returncode == 0, done.stderr
    _passes([str(program), *SANITIZERS[name]])


def _passes(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
