"""The check before the clock: every provider is right within its tolerance, and whatever else is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import qloralab as ql
from qloralab.benchmarks import case as module
from qloralab.benchmarks import cpu_providers, gpu_providers
from qloralab.benchmarks.case import SEED, Case, Weight, WrongResultError, check, last_level_cache
from qloralab.benchmarks.provider import PRODUCTS, Provider
from qloralab.benchmarks.work import packed_bytes

CPU = {one.name: one for one in cpu_providers.PROVIDERS}
GPU = {one.name: one for one in gpu_providers.PROVIDERS if not one.needs_gpu and one.name != "unsloth"}
OURS = [CPU["ours"], CPU["ours, f32"]]
ROWS = {"dequantize": None, "quantize": None}  # by operation, where it has none


@pytest.fixture(scope="module")
def weight() -> Weight:
    return Weight((64, 128))


def given(provider: Provider, operation: str, weight: Weight, M: int = 16) -> Case:
    """The case that a provider is given; on CPUs an adapted layer has dropout."""
    dropout = 0.05 if CPU.get(provider.name) is provider else 0.0
    dtype = torch.bfloat16 if operation in ROWS else provider.dtype
    return Case(operation, weight, ROWS.get(operation, M), dtype, dropout)


def answer(provider: Provider, case: Case, seed: int = SEED) -> Any:
    run = (provider.runs(case) or [])[0]  # making an adapter draws, too
    torch.manual_seed(seed)
    return run()


def rules() -> list:
    every = [("CPU", one) for one in CPU.values()] + [("GPU", one) for one in GPU.values()]
    return [
        pytest.param(one, operation, id=f"{where}: {one.name}, {operation}")
        for where, one in every
        for operation in one.operations
    ]


@pytest.mark.parametrize(("one", "operation"), rules())
def test_a_provider_is_right_within_its_tolerance_and_not_far_below_it(weight, one, operation):
    case = given(one, operation, weight)
    error = check(case, one, answer(one, case))
    if case.M is not None:
        tolerance = module._tolerance(case, one, 0)
        strict = GPU.get(one.name) is not one  # those of a GPU have room for its own roundings
        assert (tolerance / 10 if strict else 0.0005) < error  # a looser one would let more than rounding pass
    with torch.no_grad():
        assert {check(case, one, run()) for run in [*(one.runs(case) or [])] if not case.adapted} <= {error}


SPOILED = {
    "one row": lambda y: torch.cat([y[:1] + 2.0**-6 * y[:1].abs().amax(), y[1:]]),
    "the last of many rows": lambda y: torch.cat([y[:-1], y[-1:] + 1]),
    "dtype": lambda y: y.double(),
    "shape": lambda y: y[:, :-1],
    "one NaN": lambda y: y.masked_fill(y == y.max(), float("nan")),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
@pytest.mark.parametrize("M", [4, 700])
@pytest.mark.parametrize("one", [*OURS, GPU["ours"]], ids=["bf16", "f32", "GPU"])
def test_a_wrong_product_is_refused(weight, spoil, M, one):
    case = given(one, "linear", weight, M)
    y = (case.x.double() @ weight.dequantized(case.dtype).double().T).to(case.dtype)
    check(case, one, y)
    if spoil is not SPOILED["one row"] or M < 700:  # that one is a small part of many rows
        with pytest.raises(WrongResultError):
            check(case, one, spoil(y))


def test_a_product_in_float32_that_was_taken_in_bfloat16_is_refused(weight):
    case = Case("linear", weight, 4, torch.float32)
    W = weight.dequantized(torch.float32)
    for y in (case.x.bfloat16().float() @ W.T, case.x @ W.bfloat16().float().T):
        with pytest.raises(WrongResultError):
            check(case, CPU["ours, f32"], y)


@pytest.mark.parametrize("part", range(4), ids=["y", "dx", "dA", "dB"])
@pytest.mark.parametrize("one", [*OURS, GPU["ours"]], ids=["bf16", "f32", "GPU"])
def test_each_part_of_an_adapted_layer_is_checked(weight, one, part):
    case = given(one, "adapted layer", weight)
    parts = list(answer(one, case))
    check(case, one, tuple(parts))
    parts[part] = parts[part] * 1.02
    with pytest.raises(WrongResultError):
        check(case, one, tuple(parts))
    with pytest.raises(WrongResultError, match="3 results, not 4"):
        check(case, one, tuple(answer(one, case)[:3]))


def test_an_adapted_layer_with_another_mask_is_refused(weight):
    case = given(CPU["ours, f32"], "adapted layer", weight)
    with pytest.raises(WrongResultError):
        check(case, CPU["ours, f32"], answer(CPU["ours, f32"], case, SEED + 1))


def test_a_dequantized_weight_one_step_off_in_one_element_is_refused(weight):
    case = Case("dequantize", weight)
    result = weight.dequantized()
    for one in (CPU["bitsandbytes"], GPU["ours"]):
        assert check(case, one, result) == 0
    result.view(torch.int16)[5, 7] += 1
    for one in (CPU["bitsandbytes"], GPU["ours"]):
        with pytest.raises(WrongResultError):
            check(case, one, result)
        with pytest.raises(WrongResultError):
            check(case, one, result[:-1])


@pytest.mark.parametrize("part", ["packed", "scales", "absmax2", "offset"])
def test_codes_and_scales_other_than_the_definitions_are_refused(weight, part):
    case = Case("quantize", weight)
    quantized = ql.quantize(weight.original)
    check(case, CPU["ours"], quantized)
    changed = getattr(quantized, part).clone()
    changed.view(-1).view(torch.uint8)[0] ^= 1  # the lowest bit of its first number
    with pytest.raises(WrongResultError, match=part):
        check(case, CPU["ours"], dataclasses.replace(quantized, **{part: changed}))


def test_bitsandbytes_codes_that_make_a_larger_error_are_refused(weight):
    case, peer = Case("quantize", weight), CPU["bitsandbytes"]
    packed, state = answer(peer, case)
    check(case, peer, (packed, state))
    packed[0] ^= 0x88
    with pytest.raises(WrongResultError):
        check(case, peer, (packed, state))


PACKED = 64 * 64 + 128 + 8  # bytes: codes, scales, their scales and offset


@pytest.mark.parametrize(
    ("operation", "M", "dtype", "dense", "work"),
    [
        ("dequantize", None, torch.bfloat16, False, (64 * 128 * 2 + PACKED, 0)),
        ("dequantize", None, torch.bfloat16, True, (2 * 64 * 128 * 2, 0)),
        ("linear", 4, torch.bfloat16, True, (64 * 128 * 2 + 4 * 2 * (64 + 128), 2 * 4 * 64 * 128)),
        ("linear", 4, torch.float32, True, (64 * 128 * 4 + 4 * 4 * (64 + 128), 2 * 4 * 64 * 128)),
        ("input gradient", 4, torch.float32, False, (PACKED + 4 * 4 * (64 + 128), 2 * 4 * 64 * 128)),
        ("adapted layer", 4, torch.float32, True, (2 * (64 * 128 * 4 + 4 * 4 * (64 + 128)), 4 * 4 * 64 * 128)),
        (
            "adapted layer", 4, torch.float32, False,
            # the adapter's 16 rows are read both ways, and their gradients written: three products with A and with B
            (2 * (PACKED + 4 * 4 * (64 + 128)) + 3 * 4 * 16 * (64 + 128), 4 * 4 * (64 * 128) + 6 * 4 * 16 * (64 + 128)),
        ),
    ],
)  # fmt: skip
def test_work_counts_each_byte_once(weight, operation, M, dtype, dense, work):
    least = Case(operation, weight, M, dtype).least(dense)
    assert (least.nbytes, least.flops) == work


def test_what_is_written_is_the_result(weight):
    N, K, i = 64, 128, 2
    written = {"dequantize": i * N * K, "quantize": PACKED, "linear": i * 4 * N, "input gradient": i * 4 * K}
    written["adapted layer"] = i * 4 * (N + K) + 4 * 16 * (N + K)
    for operation, nbytes in written.items():
        assert Case(operation, weight, ROWS.get(operation, 4)).least(False).written == nbytes


@pytest.mark.parametrize("shape", [(64, 128), (63, 65), (1, 1), (300, 1000)])
def test_a_packed_weight_takes_the_bytes_that_are_counted(shape):
    assert packed_bytes(shape[0] * shape[1]) == Weight(shape).quantized.nbytes


@pytest.mark.parametrize(("times", "count"), [(1000, 32), (10, 20), (1.01, 3), (1, 2), (1e-4, 2)])
def test_copies_fill_the_cache_twice_within_limits(weight, monkeypatch, times, count):
    case = Case("linear", weight, 4)
    monkeypatch.setattr(weight, "most", 32)
    monkeypatch.setattr(weight, "cache", int(case.least(False).nbytes * times))
    assert case.copies() == count


def test_copies_are_of_their_own(weight):
    first, again = (weight.form("some", weight.dequantized, count) for count in (2, 3))
    assert [a is b for a, b in zip(first, again, strict=False)] == [True, True]
    assert len({part.data_ptr() for part in again}) == 3


def test_memory_counts_what_is_there(weight):
    case = Case("linear", weight, 8)
    one, five = case.memory(1), case.memory(5)
    assert five - one == 4 * (case.copies() * 2 * 8 * 128 + 2 * 64 * 128)
    assert one > 8 * 64 * 128 + case.copies() * (2 * 64 * 128 + 64 * 64)


def test_the_last_level_cache_is_a_plausible_size():
    assert 2**18 <= last_level_cache() <= 2**31


def test_every_product_has_a_provider_of_ours():
    assert all(set(PRODUCTS) <= set(one.operations) for one in OURS)
