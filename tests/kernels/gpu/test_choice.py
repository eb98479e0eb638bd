"""Fused or two-pass: what the model expects, what a record decides, and what a broken record does."""

from __future__ import annotations

import json
import math

import pytest

from qloralab.kernels.gpu import choice
from qloralab.kernels.gpu.choice import BUCKETS, H100, Decision, Limits, bucket, decide, decisions, save

DEVICE = "a GPU"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("QLORALAB_CACHE", str(tmp_path / "cache"))
    choice.forget()
    yield
    choice.forget()
    choice.fingerprint.cache_clear()


def times(fused: float, two_pass: float) -> dict[str, float]:
    return {"fused": fused, "two-pass": two_pass}


def both(shape: str, by_bucket: dict[str, dict[str, float]]) -> dict[str, dict[str, dict[str, float]]]:
    """The same times for forward and backward."""
    return {f"{operation} {shape}": by_bucket for operation in choice.OPERATIONS}


@pytest.mark.parametrize(
    ("M", "expected"), [(0, 1), (1, 1), (2, 4), (4, 4), (5, 16), (512, 512), (513, 1024), (8192, 8192), (10**6, 8192)]
)
def test_the_bucket_is_the_next_edge(M, expected):
    assert bucket(M) == expected


def test_the_price_of_two_passes_is_a_fixed_number_of_tokens():
    product = 2 * 4096 * 4096 * 4096 / 798e12 * 1e3
    assert H100.two_pass_ms(4096, 4096, 4096) / product == pytest.approx(1 + 334.6 / 4096, abs=1e-4)
    assert H100.two_pass_ms(14336, 4096, 4096) == pytest.approx(3.5 * H100.two_pass_ms(4096, 4096, 4096))


def test_at_one_token_only_memory_counts():
    weights = 4096 * 4096
    assert H100.fused_ms(4096, 4096, 1) == pytest.approx(weights * (0.5 + 1 / 64 + 1 / 4096) / 3e12 * 1e3)
    assert H100.two_pass_ms(4096, 4096, 1) == pytest.approx(weights * (4.5 + 1 / 64 + 1 / 4096) / 3e12 * 1e3)


@pytest.mark.parametrize(("efficiency", "M"), [(0.75, 1004), (0.85, 1896), (0.9, 3012)])
def test_the_crossing_is_where_both_take_the_same_time(efficiency, M):
    crossing = H100.crossing(efficiency)
    assert crossing == pytest.approx(M, abs=1)
    for N, K in ((4096, 4096), (14336, 4096)):
        below, above = math.floor(crossing), math.ceil(crossing) + 1
        assert H100.fused_ms(N, K, below, efficiency) < H100.two_pass_ms(N, K, below)
        assert H100.fused_ms(N, K, above, efficiency) > H100.two_pass_ms(N, K, above)


def test_a_device_with_slower_memory_crosses_later():
    assert Limits(1500.0, 798.0).crossing() == pytest.approx(2 * H100.crossing())


@pytest.mark.parametrize(("M", "expected"), [(1, "fused"), (512, "fused"), (2048, "two-pass")])
def test_nothing_measured_is_two_pass_whatever_is_expected(M, expected):
    decision = decide("linear", 4096, 4096, M, DEVICE)
    assert (decision.kernel, decision.expected) == ("two-pass", expected)
    assert decision.why == f"not measured on {DEVICE}; the roofline of an H100 expects {expected}"


def test_a_record_decides_for_its_bucket_operation_weight_and_device():
    save(DEVICE, both("64x128", {"16": times(1.0, 2.0), "64": times(3.0, 2.0)}))
    measured = decide("linear", 64, 128, 7, DEVICE)
    assert measured == Decision(
        "linear", 64, 128, 16, DEVICE, "fused", "fused", "measured, both ways: fused 2.0000 ms, two-pass 4.0000 ms"
    )
    assert decide("linear", 64, 128, 33, DEVICE).kernel == "two-pass"
    assert decide("linear", 64, 128, 33, DEVICE).why.startswith("measured, both ways: ")
    for other in (
        ("linear", 64, 128, 4, DEVICE),
        ("linear", 128, 64, 7, DEVICE),
        ("linear", 64, 128, 7, "another GPU"),
    ):
        assert decide(*other).kernel == "two-pass"
        assert decide(*other).why.startswith("not measured on ")


@pytest.mark.parametrize(
    ("backward", "kernel"), [(times(2.5, 2.0), "fused"), (times(4.0, 2.0), "two-pass"), ({}, "two-pass")]
)
def test_fused_is_for_both_directions_or_none(backward, kernel):
    """By the sum of their times; without those of one direction, none."""
    save(DEVICE, {"linear 64x128": {"16": times(1.0, 2.0)}, "linear_grad_input 64x128": {"16": backward}})
    assert {decide(operation, 64, 128, 7, DEVICE).kernel for operation in choice.OPERATIONS} == {kernel}


def test_what_a_weight_cannot_have_does_not_count():
    save(DEVICE, both("64x128", {"16": {"fused": 1.0, "canonical": 2.0, "two-pass": 3.0}}))
    decision = decide("linear", 64, 128, 7, DEVICE, "canonical")
    assert (decision.kernel, decision.why) == ("canonical", "measured: canonical 2.0000 ms, two-pass 3.0000 ms")
    assert decide("linear", 64, 128, 7, DEVICE).kernel == "fused"
    save(DEVICE, both("64x128", {"16": times(1.0, 3.0)}))
    assert decide("linear", 64, 128, 7, DEVICE, "canonical").kernel == "two-pass"


@pytest.mark.parametrize(("M", "expected"), [(64, "canonical"), (128, "two-pass")])
def test_without_tiles_fusing_is_expected_to_pay_for_few_tokens(M, expected):
    assert decide("linear", 4096, 4100, M, DEVICE, "canonical").expected == expected


def test_one_time_of_two_decides_nothing():
    save(DEVICE, both("64x128", {"16": {"fused": 1.0}}))
    assert decide("linear", 64, 128, 7, DEVICE).kernel == "two-pass"


def test_decisions_are_kept_and_listed_once():
    first = decide("linear", 64, 128, 7, DEVICE)
    assert decide("linear", 64, 128, 9, DEVICE) is first
    second = decide("linear_grad_input", 64, 128, 7, DEVICE)
    assert decisions() == [first, second]
    choice.forget()
    assert decisions() == []


def test_saving_takes_effect_in_the_process_that_saves():
    assert decide("linear", 64, 128, 7, DEVICE).kernel == "two-pass"
    save(DEVICE, both("64x128", {"16": times(1.0, 2.0)}))
    assert decide("linear", 64, 128, 7, DEVICE).kernel == "fused"


def test_saving_keeps_other_devices_and_weights():
    save(DEVICE, both("64x128", {"16": times(1.0, 2.0)}) | both("64x64", {"16": times(1.0, 2.0)}))
    save("another GPU", both("64x128", {"16": times(1.0, 2.0)}))
    path = save(DEVICE, both("64x128", {"16": times(2.0, 1.0)}))
    assert decide("linear", 64, 128, 16, DEVICE).kernel == "two-pass"
    assert decide("linear", 64, 64, 16, DEVICE).kernel == "fused"
    assert decide("linear", 64, 128, 16, "another GPU").kernel == "fused"
    assert [file.name for file in path.parent.iterdir()] == ["gpu-choice.json"]


def test_a_record_of_other_kernels_counts_for_nothing(monkeypatch):
    save(DEVICE, both("64x128", {"16": times(1.0, 2.0)}))
    before = choice.fingerprint()
    choice.fingerprint.cache_clear()
    monkeypatch.setattr(choice, "_triton_version", lambda: "another")
    assert choice.fingerprint() != before
    choice.forget()
    assert decide("linear", 64, 128, 16, DEVICE).kernel == "two-pass"
    save(DEVICE, {"linear 64x64": {"16": times(1.0, 2.0)}})
    assert list(json.loads(choice.record_path().read_text())["devices"][DEVICE]) == ["linear 64x64"]


@pytest.mark.parametrize(
    "measured",
    [
        {"product 64x128": {"16": times(1.0, 2.0)}},
        {"linear 64x128": {"17": times(1.0, 2.0)}},
        {"linear 64x128": {"16": {"fast": 1.0}}},
        {"linear 64x128": {"16": times(0.0, 2.0)}},
        {"linear 64x128": {"16": times(float("nan"), 2.0)}},
        {"linear 64x128": [1.0]},
    ],
    ids=["operation", "bucket", "kernel", "zero", "NaN", "list"],
)
def test_what_would_never_be_found_is_not_saved(measured):
    with pytest.raises(ValueError, match=r"never looked up|ms$|not a record"):
        save(DEVICE, measured)
    assert not choice.record_path().exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"devices": 3}', "\x00"], ids=["cut off", "list", "number", "zero byte"])
def test_a_broken_record_warns_once_and_two_pass_runs(text):
    path = choice.record_path()
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.warns(RuntimeWarning, match=r"qloralab ignores .*gpu-choice\.json: "):
        decision = decide("linear", 64, 128, 7, DEVICE)
    assert decision.kernel == "two-pass"
    assert decide("linear", 64, 64, 7, DEVICE).kernel == "two-pass"  # a second warning would be an error


def test_use_decides_whatever_was_measured_and_gives_it_back():
    save(DEVICE, both("64x128", {"16": times(1.0, 2.0)}))
    with choice.use("two-pass"):
        decision = decide("linear", 64, 128, 16, DEVICE)
        assert (decision.kernel, decision.why) == ("two-pass", "it was asked for")
        with choice.use("fused"):
            assert decide("linear", 64, 64, 16, DEVICE).kernel == "fused"
        assert decide("linear", 64, 64, 16, DEVICE).kernel == "two-pass"
    assert decide("linear", 64, 128, 16, DEVICE).kernel == "fused"
    with pytest.raises(ValueError, match="fused, canonical, two-pass, not 'fast'"), choice.use("fast"):
        pass


def test_another_operation_is_refused():
    with pytest.raises(ValueError, match="linear, linear_grad_input, not 'dequantize'"):
        decide("dequantize", 64, 64, 1, DEVICE)


def test_the_buckets_are_what_the_benchmark_measures():
    from qloralab.benchmarks.gpu import ROWS

    assert ROWS == BUCKETS
