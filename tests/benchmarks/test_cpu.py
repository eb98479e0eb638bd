"""The whole of ``benchmarks/cpu.py`` on small weights: each provider is right and timed; one that is wrong is not."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import qloralab as ql
from benchmarks.cpu import OPERATORS, POINTS, Roofline, main, measure, roofline, write
from benchmarks.cpu_check import WrongResultError, check
from benchmarks.cpu_problem import OPERATIONS, Problem, Weight
from benchmarks.cpu_providers import PROVIDERS, Provider
from qloralab.nf4 import ops

LIMITS = Roofline(copy_gb_per_s=10.0, gemm_gflop_per_s=100.0)
FIELDS = {
    "benchmark", "memory", "operation", "shape", "M", "provider", "ms", "reps", "device", "threads", "versions",
    "commit", "error", "wrong", "roofline", "bound_ms",
}  # fmt: skip


@pytest.fixture(scope="module")
def weight() -> Weight:
    return Weight((64, 128))


def provider(name: str) -> Provider:
    return next(one for one in PROVIDERS if one.name == name)


def test_a_tiny_run_from_the_measurement_to_the_views(tmp_path, capsys):
    points = [("dequantize", None), ("quantize", None), ("linear", 4), ("input gradient", 4)]
    records = list(measure([(64, 64)], points, LIMITS, seconds=0.0, memory="recycled"))
    assert [r["wrong"] for r in records] == [None] * len(records)
    assert {(r["operation"], r["provider"]) for r in records} == {
        (operation, one.name) for one in PROVIDERS for operation in one.operations
    }
    for record in records:
        assert set(record) >= FIELDS
        assert record["reps"] == provider(record["provider"]).fewest
        assert 0 < record["ms"]["p20"] <= record["ms"]["p50"] <= record["ms"]["p80"]
    write(records, tmp_path / "cpu.json")
    assert json.loads((tmp_path / "cpu.json").read_text()) == records
    main(["--view", "--out", str(tmp_path)])
    assert "dequantize" in capsys.readouterr().out
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_provider_is_not_timed():
    calls = []

    def off(problem: Problem):
        def run() -> torch.Tensor:
            calls.append(problem)
            return (problem.expected * 1.0125).bfloat16()

        return [run]

    wrong = Provider("ours", off, ("linear",))
    records = list(measure([(64, 64)], [("linear", 4)], LIMITS, [wrong, provider("bf16")], 0.0, memory="recycled"))
    assert len(calls) == 1  # for the check
    refused, timed = records
    assert (refused["ms"], refused["reps"], refused["error"]) == (None, 0, None)
    assert refused["wrong"] == "error 0.013, 0.002 allowed"
    assert timed["reps"] == 15


@pytest.mark.parametrize("operation", ["linear", "input gradient"])
@pytest.mark.parametrize("one", PROVIDERS, ids=lambda one: one.name)
def test_products_are_right_within_the_tolerance_and_not_far_below_it(weight, operation, one):
    if operation not in one.operations:
        pytest.skip(f"{one.name} has no {operation}")
    problem = Problem(operation, weight, 16)
    error = check(problem, one, one.runs(problem)[0]())
    assert one.tolerance / 4 < error <= one.tolerance  # a looser one would let more than rounding pass


@pytest.mark.parametrize(
    "spoil",
    [
        lambda y: torch.cat([y[:1] + 2.0**-7 * y[:1].abs().amax(), y[1:]]),
        lambda y: y.float(),
        lambda y: y[:, :-1],
        lambda y: y.masked_fill(y == y.max(), float("nan")),
    ],
    ids=["one row", "dtype", "shape", "one NaN"],
)
def test_a_wrong_product_is_refused(weight, spoil):
    problem = Problem("linear", weight, 4)
    y = problem.expected.bfloat16()
    check(problem, provider("ours"), y)
    with pytest.raises(WrongResultError):
        check(problem, provider("ours"), spoil(y))


def test_a_dequantized_weight_one_step_off_in_one_place_is_refused(weight):
    problem = Problem("dequantize", weight)
    result = weight.dequantized.clone()
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
    assert LIMITS.bound_ms(nbytes=10**7, flops=0) == pytest.approx(1.0)
    assert LIMITS.bound_ms(nbytes=10**7, flops=3 * 10**8) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("operation", "M", "dense", "work"),
    [
        ("dequantize", None, False, (64 * 128 * 2 + 64 * 64 + 128 + 8, 0)),
        ("dequantize", None, True, (2 * 64 * 128 * 2, 0)),
        ("linear", 4, True, (64 * 128 * 2 + 4 * 2 * (64 + 128), 2 * 4 * 64 * 128)),
        ("input gradient", 4, False, (64 * 64 + 128 + 8 + 4 * 2 * (64 + 128), 2 * 4 * 64 * 128)),
    ],
)
def test_work_counts_each_byte_once(weight, operation, M, dense, work):
    assert Problem(operation, weight, M).work(dense) == work


def test_rates_are_measured():
    limits = roofline(nbytes=2**16, shape=(8, 64, 64), seconds=0.0)
    assert 0.01 < limits.copy_gb_per_s < 10**4
    assert 0.001 < limits.gemm_gflop_per_s < 10**5


def test_every_operation_is_measured_and_is_one_of_ours():
    assert {operation for operation, _ in POINTS} == set(OPERATIONS) == set(OPERATORS)
    assert all(hasattr(ops, name) for name in OPERATORS.values())
