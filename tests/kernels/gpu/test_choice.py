"""Fused or two-pass: the rule, what was measured, and who asked; nothing else decides."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qloralab.kernels.gpu import choice
from qloralab.kernels.gpu.choice import Device, decide, fused_up_to, summary

H100 = Device("sm_90", 132, "NVIDIA H100 80GB HBM3")
LARGE = 4352  # rows: 34 programs, more than a fourth of 132


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    for function in (choice.is_exact, choice._limit):
        function.cache_clear()
    yield
    for function in (choice.is_exact, choice._limit):
        function.cache_clear()


@pytest.mark.parametrize(
    ("architecture", "up_to"),
    [
        ("sm_75", 16), ("sm_80", 64), ("sm_86", 64), ("sm_89", 64), ("sm_90", 256), ("sm_100", 16), ("sm_103", 16),
        ("sm_110", 16), ("sm_120", 64), ("sm_121", 16), ("other", 0), ("cpu", 0),
    ],
)  # fmt: skip
def test_the_rule(architecture, up_to):
    device = Device(architecture, 132, "a card")
    assert fused_up_to(LARGE, device) == up_to
    for M in (0, 1, up_to, up_to + 1):
        assert decide(LARGE, 64, M, device).kernel == ("fused" if 0 < M <= up_to else "two-pass")


@pytest.mark.parametrize(("N", "up_to"), [(4096, 128), (4097, 256), (64, 128), (14336, 256)])
def test_few_rows_are_half(N, up_to):
    """Of 132 multiprocessors a fourth is 33: 32 programs of 128 rows are fewer, 33 are not."""
    assert fused_up_to(N, H100) == up_to


def test_what_was_measured_overrides_the_rule(monkeypatch):
    monkeypatch.setattr(choice, "MEASURED", {H100.name: {(14336, 4096): 512, (64, 64): 0}})
    assert decide(14336, 4096, 512, H100) == ("fused", f"measured on {H100.name}: fused up to 512 tokens")
    assert decide(14336, 4096, 513, H100).kernel == "two-pass"
    assert decide(64, 64, 1, H100).kernel == "two-pass"
    assert decide(14336, 8192, 257, H100) == ("two-pass", "sm_90: fused up to 256 tokens")
    assert decide(14336, 4096, 257, H100._replace(name="another")).kernel == "two-pass"
    assert "512 for 14336x4096 (measured)" in summary(H100)


def test_the_summary_says_what_is_fused(monkeypatch):
    assert summary(H100) == "fused up to 256 tokens, 128 where the weight has few rows"
    assert summary(H100._replace(architecture="other")) == "never fused: other"
    monkeypatch.setenv(choice.VARIABLE, "1")
    choice.is_exact.cache_clear()
    assert summary(H100) == "never fused (QLORALAB_EXACT=1)"


def test_exact_is_two_pass(monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "1")
    assert decide(LARGE, 64, 1, H100) == ("two-pass", "it was asked for (QLORALAB_EXACT=1)")
    monkeypatch.setenv(choice.VARIABLE, "0")
    assert decide(LARGE, 64, 1, H100).kernel == "two-pass"  # it is read once
    choice.is_exact.cache_clear()
    assert decide(LARGE, 64, 1, H100).kernel == "fused"


@pytest.mark.parametrize("word", ["yes", "true", "2"])
def test_exact_refuses_another_word(word, monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, word)
    with pytest.raises(ValueError, match=f"QLORALAB_EXACT is 0 or 1, not '{word}'"):
        decide(LARGE, 64, 1, H100)


def test_a_device_is_what_its_properties_say(monkeypatch):
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132, name=H100.name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    device = choice.device.__wrapped__
    assert device(torch.device("cuda", 0)) == H100
    assert device(torch.device("cpu")).architecture == "cpu"
    monkeypatch.setattr(torch.version, "hip", "6.4")  # an MI300 says 9, 4
    assert device(torch.device("cuda", 0)).architecture == "other"


def test_use_decides_inside_the_body_whatever_else_does():
    with choice.use("two-pass"):
        assert decide(LARGE, 64, 1, H100) == ("two-pass", "it was asked for")
        with choice.use("fused"):
            assert decide(64, 128, 7, Device("cpu", 0, "cpu")).kernel == "fused"
        with pytest.raises(RuntimeError, match="out of the body"), choice.use("fused"):
            raise RuntimeError("out of the body")
        assert decide(LARGE, 64, 1, H100).kernel == "two-pass"
    assert decide(LARGE, 64, 1, H100).kernel == "fused"


def test_use_refuses_another_word():
    with pytest.raises(ValueError, match="fused, two-pass, not 'fast'"), choice.use("fast"):
        pass
