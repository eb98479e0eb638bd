"""The whole of ``benchmarks/cpu.py`` on small weights: each provider is right and timed; one that is wrong is not."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

import qloralab as ql
from benchmarks.cpu import OPERATORS, POINTS, Roofline, main, measure, roofline, write
from benchmarks.cpu_check import WrongResultError, check
from benchmarks.cpu_problem import EMULATED, OPERATIONS, SEED, Problem, Weight
from benchmarks.cpu_providers import PRODUCTS, PROVIDERS, Provider
from benchmarks.provenance import record_file
from qloralab.nf4 import ops

LIMITS = Roofline(copy_gb_per_s=10.0, float32_gflop_per_s=100.0, bfloat16_gflop_per_s=400.0)
FIELDS = {
    "benchmark", "memory", "operation", "shape", "M", "provider", "dtype", "ms", "reps", "device", "class",
    "capability", "mkl", "lowered", "threads", "versions", "commit", "error", "wrong", "skipped", "roofline",
    "bound_ms",
}  # fmt: skip


@pytest.fixture(scope="module")
def weight() -> Weight:
    return Weight((64, 128))


def provider(name: str) -> Provider:
    return next(one for one in PROVIDERS if one.name == name)


def test_a_tiny_run_from_the_measurement_to_the_views(tmp_path, capsys):
    points = [("dequantize", None), ("quantize", None), *((operation, 4) for operation in PRODUCTS)]
    records = list(measure([(64, 64)], points, LIMITS, seconds=0.0, memory="recycled"))
    assert [r["wrong"] for r in records] == [None] * len(records)
    assert {(r["operation"], r["provider"]) for r in records} == {
        (operation, one.name) for one in PROVIDERS for operation in one.operations
    }
    for record in records:
        assert set(record) >= FIELDS
        assert record["reps"] == provider(record["provider"]).fewest
        assert 0 < record["ms"]["p20"] <= record["ms"]["p50"] <= record["ms"]["p80"]
    assert {r["dtype"] for r in records if r["provider"] in ("ours, f32", "f32")} == {"float32"}
    assert {r["dtype"] for r in records if r["provider"] in ("ours", "bf16")} == {"bfloat16"}
    file = record_file(tmp_path, "cpu")
    write(records, file)
    assert json.loads(file.read_text()) == records
    main(["--view", records[0]["class"], "--out", str(tmp_path)])
    assert "dequantize" in capsys.readouterr().out
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_provider_is_not_timed():
    calls = []

    def off(problem: Problem):
        def run() -> torch.Tensor:
            calls.append(problem)
            return (problem.expected[0] * 1.0125).bfloat16()

        return [run]

    wrong = Provider("ours", off, ("linear",))
    records = list(measure([(64, 64)], [("linear", 4)], LIMITS, [wrong, provider("bf16")], 0.0, memory="recycled"))
    assert len(calls) == 1  # for the check
    refused, timed = records
    assert (refused["ms"], refused["reps"], refused["error"]) == (None, 0, None)
    assert refused["wrong"] == "error 0.013, 0.002 allowed"
    assert timed["reps"] == 15


def test_more_rows_than_a_provider_has_time_for_are_recorded_as_skipped():
    def never(problem: Problem):
        raise AssertionError

    slow = Provider("bf16", never, ("linear",), dense=True, most_rows=16)
    (record,) = measure([(64, 64)], [("linear", 17)], LIMITS, [slow], 0.0, memory="recycled")
    assert (record["ms"], record["wrong"], record["reps"]) == (None, None, 0)
    assert record["skipped"].endswith("up to M = 16")


@pytest.mark.parametrize("operation", PRODUCTS)
@pytest.mark.parametrize("one", PROVIDERS, ids=lambda one: one.name)
def test_products_are_right_within_the_tolerance_and_not_far_below_it(weight, operation, one):
    if operation not in one.operations:
        pytest.skip(f"{one.name} has no {operation}")
    problem = Problem(operation, weight, 16, one.dtype)
    error = check(problem, one, result(problem, one))
    if one.dtype == torch.bfloat16:
        tolerance = one.tolerance * 3**0.5 if operation == "adapted layer" and not one.dense else one.tolerance
    else:
        tolerance = 2**-24 * (max(problem.terms) / 2) ** 0.5
    assert tolerance / 10 < error <= tolerance  # a looser one would let more than rounding pass


def result(problem: Problem, one: Provider, seed: int = SEED) -> Any:
    run = one.runs(problem)[0]  # making an adapter draws, too
    torch.manual_seed(seed)
    return run()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda y: torch.cat([y[:1] + 2.0**-7 * y[:1].abs().amax(), y[1:]]),
        lambda y: y.double(),
        lambda y: y[:, :-1],
        lambda y: y.masked_fill(y == y.max(), float("nan")),
    ],
    ids=["one row", "dtype", "shape", "one NaN"],
)
@pytest.mark.parametrize("name", ["ours", "ours, f32"])
def test_a_wrong_product_is_refused(weight, spoil, name):
    one = provider(name)
    problem = Problem("linear", weight, 4, one.dtype)
    y = problem.expected[0].to(one.dtype)
    check(problem, one, y)
    with pytest.raises(WrongResultError):
        check(problem, one, spoil(y))


def test_a_product_in_float32_that_was_taken_in_bfloat16_is_refused(weight):
    problem = Problem("linear", weight, 4, torch.float32)
    W = weight.dequantized(torch.float32)
    for y in (problem.x.bfloat16().float() @ W.T, problem.x @ W.bfloat16().float().T):
        with pytest.raises(WrongResultError):
            check(problem, provider("ours, f32"), y)


@pytest.mark.parametrize("part", range(4), ids=["y", "dx", "dA", "dB"])
@pytest.mark.parametrize("name", ["ours", "ours, f32"])
def test_each_part_of_an_adapted_layer_is_checked(weight, name, part):
    one = provider(name)
    problem = Problem("adapted layer", weight, 16, one.dtype)
    parts = list(result(problem, one))
    check(problem, one, tuple(parts))
    parts[part] = parts[part] * 1.01
    with pytest.raises(WrongResultError):
        check(problem, one, tuple(parts))
    with pytest.raises(WrongResultError, match="3 results, not 4"):
        check(problem, one, tuple(result(problem, one)[:3]))


def test_an_adapted_layer_with_another_mask_is_refused(weight):
    one = provider("ours, f32")
    problem = Problem("adapted layer", weight, 16, one.dtype)
    with pytest.raises(WrongResultError):
        check(problem, one, result(problem, one, SEED + 1))


def test_a_dequantized_weight_one_step_off_in_one_place_is_refused(weight):
    problem = Problem("dequantize", weight)
    result = weight.dequantized()
    assert check(problem, provider("bitsandbytes"), result) == 0
    result.view(torch.int16)[5, 7] += 1
    with pytest.raises(WrongResultError):
        check(problem, provider("bitsandbytes"), result)


@pytest.mark.parametrize("part", ["packed", "scales", "absmax2", "offset"])
def test_codes_and_scales_other_than_the_definitions_are_refused(weight, part):
    problem = Problem("quantize", weight)
    quantized = ql.quantize(weight.original)
    check(problem, provider("ours"), quantized)
    changed = getattr(quantized, part).clone()
    changed.view(-1).view(torch.uint8)[0] ^= 1  # the lowest bit of its first number
    with pytest.raises(WrongResultError, match=part):
        check(problem, provider("ours"), dataclasses.replace(quantized, **{part: changed}))


def test_bitsandbytes_codes_that_make_a_larger_error_are_refused(weight):
    problem = Problem("quantize", weight)
    peer = provider("bitsandbytes")
    packed, state = peer.runs(problem)[0]()  # pyright: ignore[reportGeneralTypeIssues]
    check(problem, peer, (packed, state))
    packed[0] ^= 0x88
    with pytest.raises(WrongResultError):
        check(problem, peer, (packed, state))


def test_the_bound_is_the_longer_of_traffic_and_arithmetic():
    assert LIMITS.bound_ms(nbytes=10**7, flops=0, dtype=torch.float32) == pytest.approx(1.0)
    assert LIMITS.bound_ms(nbytes=10**7, flops=3 * 10**8, dtype=torch.float32) == pytest.approx(3.0)
    assert LIMITS.bound_ms(nbytes=0, flops=8 * 10**8, dtype=torch.bfloat16) == pytest.approx(2.0)
    emulated = dataclasses.replace(LIMITS, bfloat16_gflop_per_s=None)
    assert emulated.bound_ms(nbytes=0, flops=8 * 10**8, dtype=torch.bfloat16) == pytest.approx(8.0)


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
    assert Problem(operation, weight, M, dtype).work(dense) == work


def test_rates_are_measured():
    limits = roofline(nbytes=2**16, shape=(8, 64, 64), seconds=0.0)
    assert 0.01 < limits.copy_gb_per_s < 10**4
    assert 0.001 < limits.float32_gflop_per_s < 10**5
    assert (limits.bfloat16_gflop_per_s is None) == EMULATED  # its product is not timed where it is emulated


def test_an_emulated_product_is_not_timed_with_many_rows():
    assert (provider("bf16").most_rows == 16) == EMULATED


def test_every_operation_is_measured_and_is_one_of_ours():
    assert {operation for operation, _ in POINTS} == set(OPERATIONS) == set(OPERATORS)
    assert all(hasattr(ops, name) for name in OPERATORS.values())
