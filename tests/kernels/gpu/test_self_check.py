"""A kernel serves on a device once it has agreed with the definition there; the variable chooses what else happens."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch

from qloralab.kernels.gpu import self_check
from qloralab.kernels.gpu.case import FILES
from qloralab.kernels.gpu.self_check import NotServedError, kernel, mode, reason
from qloralab.nf4.packed import DTYPES

PACKAGE = "qloralab.kernels.gpu"


@pytest.fixture(autouse=True)
def fresh(monkeypatch) -> None:
    monkeypatch.delenv(self_check.VARIABLE, raising=False)
    monkeypatch.setattr(self_check, "_passed", {})
    monkeypatch.setattr(self_check, "_serving", {})
    monkeypatch.setattr(self_check, "_warned", set())


@pytest.fixture
def there(device: str) -> torch.device:
    return torch.device(device)


def spoil(monkeypatch, name: str, change) -> None:
    """Let the launcher of a kernel return what ``change`` makes of its result, or of the tensors that it updates."""
    right = self_check._launcher(name)

    def wrong(*args, **named):
        result = right(*args, **named)
        return change(tuple(args[0].params) if result is None else result)

    monkeypatch.setattr(self_check, "_launcher", lambda _: wrong)


@pytest.mark.parametrize("name", FILES)
def test_the_kernels_pass(name, there):
    assert reason(name, there) == ""
    launch = kernel(name, there)
    assert launch is not None
    assert (launch.__name__, launch.__module__) == (name, f"qloralab.kernels.gpu.{FILES[name]}")


VARIANTS = [
    *(("quantize_blockwise", dtype, size) for dtype in DTYPES for size in (32, 4096)),
    *(("dequantize", dtype, size, levels) for dtype in DTYPES for size in (32, 4096) for levels in (1, 2)),
    *((name, dtype) for name in ("project", "grad_A", "grad_B", "masked_low_rank") for dtype in DTYPES),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant)))
def test_every_variant_passes_and_is_checked_for_itself(variant, there, monkeypatch):
    name, *rest = variant
    assert reason(name, there, *rest) == ""
    spoil(
        monkeypatch,
        name,
        lambda result: tuple(part[..., :-1] for part in result) if isinstance(result, tuple) else result[..., :-1],
    )
    assert reason(name, there, *rest) == ""  # it is known
    self_check._passed.clear()
    assert reason(name, there, *rest) == f"its result differs from the definition's on {there} for " + ", ".join(
        map(str, rest)
    )


def test_what_serves_is_asked_once(there, monkeypatch):
    found = kernel("dequantize", there, torch.float16, 64, 2)
    monkeypatch.setenv(self_check.VARIABLE, "reference")
    assert kernel("dequantize", there, torch.float16, 64, 2) is found
    assert kernel("dequantize", there, torch.float16, 64, 1) is None


LAST = [(name, -1) for name in ("quantize_blockwise", "quantize_scales", "linear", "linear_grad_input")]


@pytest.mark.parametrize(("name", "part"), [*((name, 0) for name in FILES), *LAST])
def test_one_bit_in_one_place_is_seen(name, part, there, monkeypatch):
    calls = []

    def flip(result):
        calls.append(result)
        parts = result if isinstance(result, tuple) else (result,)
        if len(calls) == (2 if part and name.startswith("linear") else 1):
            parts[part].view(-1)[-1:].view(torch.uint8)[0] ^= 1
        return result

    spoil(monkeypatch, name, flip)
    assert reason(name, there) == f"its result differs from the definition's on {there}"


@pytest.mark.parametrize("change", [lambda y: y.float(), lambda y: y[:-1]], ids=["dtype", "shape"])
def test_another_dtype_or_shape_is_seen(change, there, monkeypatch):
    spoil(monkeypatch, "dequantize", change)
    assert "differs from the definition's" in reason("dequantize", there)


def test_it_is_checked_once(there, monkeypatch):
    calls = []
    spoil(monkeypatch, "dequantize", lambda y: calls.append(1) or y)
    assert [reason("dequantize", there) for _ in range(3)] == ["", "", ""]
    assert len(calls) == 1


def test_auto_warns_once_and_the_reference_serves(there, break_check):
    break_check("dequantize", "ptxas\n  has   failed")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [kernel("dequantize", there) for _ in range(3)] == [None] * 3
    (warning,) = caught
    assert warning.category is RuntimeWarning
    assert "GPU kernel of dequantize is not in use: RuntimeError: ptxas has failed\n" in str(warning.message)


def test_triton_raises_every_time(there, monkeypatch, break_check):
    monkeypatch.setenv(self_check.VARIABLE, "triton")
    break_check("dequantize", "ptxas\n  has   failed")
    for _ in range(2):
        with pytest.raises(NotServedError, match=r"dequantize is not served on .*: RuntimeError: ptxas has failed"):
            kernel("dequantize", there)
    assert kernel("quantize_scales", there) is not None


def test_the_reference_checks_nothing(there, monkeypatch, break_check):
    monkeypatch.setenv(self_check.VARIABLE, "reference")
    break_check("dequantize", "ptxas\n  has   failed")
    assert kernel("dequantize", there) is None
    assert self_check._passed == {}


@pytest.mark.parametrize("value", ["Triton", "cuda", "1"])
def test_another_word_is_refused(value, there, monkeypatch):
    monkeypatch.setenv(self_check.VARIABLE, value)
    for function in (mode, lambda: kernel("dequantize", there)):
        with pytest.raises(ValueError, match=f"QLORALAB_GPU is one of auto, triton, reference, not '{value}'"):
            function()


def test_without_triton_the_reason_is_its_name(there, monkeypatch):
    for name in list(sys.modules):
        if name == "triton" or name.startswith(("triton.", *(f"{PACKAGE}.{file}" for file in ("de", "interpreter")))):
            monkeypatch.delitem(sys.modules, name)

    class Nowhere:
        def find_spec(self, name, *_):
            if name == "triton":
                raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(sys, "meta_path", [Nowhere(), *sys.meta_path])
    assert reason("dequantize", there) == "triton is not installed"


@pytest.mark.gpu
def test_a_first_call_within_a_capture_is_refused():
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")
        with pytest.raises(NotServedError, match="call it before"):
            reason("dequantize", torch.device("cuda"))
