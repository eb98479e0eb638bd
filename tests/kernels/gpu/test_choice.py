"""Fused or two-pass: what the table says decides, and why; nothing else does."""

from __future__ import annotations

import pytest
import torch

from qloralab.kernels.gpu import choice
from qloralab.kernels.gpu.choice import FUSED_UP_TO, decide, summary


@pytest.mark.parametrize(
    ("N", "K", "M", "architecture", "kernel", "why"),
    [
        (4096, 4096, 1, "sm_90", "fused", "measured on sm_90: fused up to 256 tokens"),
        (4096, 4096, 256, "sm_90", "fused", "measured on sm_90: fused up to 256 tokens"),
        (4096, 4096, 257, "sm_90", "two-pass", "measured on sm_90: fused up to 256 tokens"),
        (14336, 4096, 512, "sm_90", "fused", "measured on sm_90: fused up to 512 tokens"),
        (4096, 11008, 1, "sm_90", "two-pass", "a weight of 4096x11008 was not measured on sm_90"),
        (4096, 4096, 1, "sm_80", "two-pass", "sm_80 was not measured"),
        (4096, 4096, 1, "cpu", "two-pass", "cpu was not measured"),
    ],
)
def test_the_table_decides(N, K, M, architecture, kernel, why):
    assert decide(N, K, M, architecture) == (kernel, why)


def test_the_summary_names_what_is_fused():
    assert summary("sm_80") == "never fused: sm_80 was not measured"
    for (N, K), tokens in FUSED_UP_TO["sm_90"].items():
        assert f"{tokens} tokens for {N}x{K}" in summary("sm_90")


def test_an_architecture_is_named_by_its_capability(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    name = choice.architecture.__wrapped__
    assert name(torch.device("cuda", 0)) == "sm_90"
    assert name(torch.device("cpu")) == "cpu"
    monkeypatch.setattr(torch.version, "hip", "6.4")  # an MI300 says (9, 4)
    assert name(torch.device("cuda", 0)) == "other"


def test_use_decides_inside_the_body_whatever_was_measured():
    with choice.use("two-pass"):
        assert decide(4096, 4096, 1, "sm_90") == ("two-pass", "it was asked for")
        with choice.use("fused"):
            assert decide(64, 128, 7, "cpu").kernel == "fused"
        with pytest.raises(RuntimeError, match="out of the body"), choice.use("fused"):
            raise RuntimeError("out of the body")
        assert decide(4096, 4096, 1, "sm_90").kernel == "two-pass"
    assert decide(4096, 4096, 1, "sm_90").kernel == "fused"


def test_use_refuses_another_word():
    with pytest.raises(ValueError, match="fused, two-pass, not 'fast'"), choice.use("fast"):
        pass
