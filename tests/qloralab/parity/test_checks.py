"""Each check finds the fault that it is there for, and allows what it says and no more."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from qloralab.nf4.blockwise import nearest, pack, unpack
from qloralab.nf4.codebook import codebook_values
from qloralab.nf4.tensor import QuantizedTensor, quantize
from qloralab.parity import checks, peer
from qloralab.parity.rows import DIFFERS, Row, Rows
from qloralab.parity.tensors import Sample, hostile_samples, in_tail


@pytest.fixture
def rows() -> Rows:
    return Rows()


@pytest.fixture(autouse=True)
def as_written():
    """bitsandbytes' PyTorch code is not compiled."""
    with torch.compiler.set_stance("force_eager"):
        yield


def normal(*shape: int, dtype: torch.dtype = torch.float32, block_size: int = 64) -> Sample:
    return Sample("normal", torch.randn(shape).to(dtype), block_size)


def verdicts(rows: Rows) -> dict[str, str]:
    return {row.quantity: row.verdict for row in rows.all()}


def only(rows: Rows, quantity: str) -> Row:
    (row,) = (row for row in rows.all() if row.quantity == quantity)
    return row


def with_codes(q: QuantizedTensor, change) -> QuantizedTensor:
    codes = unpack(q.packed, q.shape.numel()).clone()
    change(codes)
    return dataclasses.replace(q, packed=pack(codes, q.values))


def faulty(monkeypatch, change) -> None:
    """Our ``quantize`` gives something else."""
    monkeypatch.setattr(checks, "quantize", lambda *arguments, **options: change(quantize(*arguments, **options)))


@pytest.mark.parametrize("codebook", checks.CODEBOOKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_right_passes(rows, codebook, dtype):
    checks.compare_weight(rows, normal(64, 256, dtype=dtype), codebook)
    found = verdicts(rows)
    assert found.pop("codes") == ("equal" if codebook == "nf4" else "same value")
    # FP4's code 8 is -0.0 in bitsandbytes on some processors, and +0.0 on others.
    assert found.pop("weights") in (("equal",) if codebook == "nf4" else ("equal", "same value"))
    assert found.pop("scales") == found.get("decoded scales", "equal") == "equal"
    assert DIFFERS not in found.values()


def test_codebooks_are_equal_and_compared(rows, monkeypatch):
    checks.compare_codebooks(rows)
    assert [(row.detail, row.compared, row.equal) for row in rows.all()] == [
        ("nf4", 16, 16), ("fp4", 16, 16), ("8-bit map", 256, 256)
    ]  # fmt: skip
    monkeypatch.setattr(checks, "codebook_values", lambda name: codebook_values(name).nextafter(torch.ones(())))
    checks.compare_codebooks(off := Rows())
    assert [row.verdict for row in off.all()] == [DIFFERS, DIFFERS, "equal"]


def bumped(codes: torch.Tensor) -> None:
    codes[77] = (codes[77] + 1) % 16


def wrong_bit(weight: torch.Tensor) -> torch.Tensor:
    weight.view(torch.int32)[5, 7] ^= 1
    return weight


def up(x: torch.Tensor) -> torch.Tensor:
    return x.nextafter(torch.tensor(9.0))


ZEROS = Sample("zeros", torch.zeros(2, 64), 64)
# A fault of what we quantize, or of what a method of it gives -> sample, codebook, the quantity and how much is beyond.
QUANTIZED = {
    "one code": (lambda q: with_codes(q, bumped), (64, 256), "nf4", "codes", 1),
    "padding": (lambda q: dataclasses.replace(q, packed=torch.cat([q.packed[:-1], q.packed[-1:] ^ 1])),
                (65,), "nf4", "codes, extremes", 1),
    "a code in a tail": (lambda q: with_codes(q, lambda codes: codes[-1:].bitwise_xor_(1)),
                         (100,), "nf4", "codes, extremes", 1),
    "scales one ulp off": (lambda q: dataclasses.replace(q, scales=up(q.scales)), (64, 256), "nf4", "scales", 256),
    "the second code of zero": (lambda q: dataclasses.replace(q, packed=torch.full_like(q.packed, 0x88)),
                                ZEROS, "fp4", "codes", 128),
}  # fmt: skip
READ = {
    "one bit": ("dequantize", wrong_bit, (64, 256), "weights", 1),
    "one bit in split rows": ("dequantize", wrong_bit, (64, 96), "weights, split rows", None),
    "negative zero": ("dequantize", lambda weight: torch.where(weight == 0, -0.0, weight), ZEROS, "weights", 128),
    "decoded scales one ulp off": ("absmax", up, (64, 256), "decoded scales", 256),
}


def check_fault(rows: Rows, sample: Any, codebook: str, quantity: str, beyond: int | None) -> Row:
    checks.compare_weight(rows, sample if isinstance(sample, Sample) else normal(*sample), codebook)
    row = only(rows, quantity)
    assert row.verdict == DIFFERS
    assert row.beyond == beyond if beyond else row.beyond >= 1
    return row


@pytest.mark.parametrize("fault", QUANTIZED)
def test_a_fault_of_what_is_quantized_is_found(rows, monkeypatch, fault):
    change, *expected = QUANTIZED[fault]
    faulty(monkeypatch, change)
    row = check_fault(rows, *expected)
    assert fault != "one code" or "[77]" in str(row.first)
    assert fault != "scales one ulp off" or row.largest == 1.0


@pytest.mark.parametrize("fault", READ)
def test_a_fault_of_what_is_read_is_found(rows, monkeypatch, fault):
    method, change, sample, quantity, beyond = READ[fault]
    right = getattr(QuantizedTensor, method)
    monkeypatch.setattr(QuantizedTensor, method, lambda self, *dtype: change(right(self, *dtype)))
    check_fault(rows, sample, "nf4", quantity, beyond)


def test_fp4s_second_zero_is_the_only_exchange_of_codes_allowed(rows, monkeypatch):
    sample = normal(64, 256)
    checks.compare_weight(rows, sample, "fp4")
    row = only(rows, "codes")
    assert row.allowed["second zero"] == row.compared - row.equal > 0

    def change(codes):
        codes[(codes == 0).nonzero()[0]] = 1

    faulty(monkeypatch, lambda q: with_codes(q, change))
    checks.compare_weight(off := Rows(), sample, "fp4")
    assert only(off, "codes").beyond == 1


def test_the_quotient_is_allowed_in_a_tail_and_nowhere_else(rows, monkeypatch):
    weight = in_tail("nf4", torch.Generator().manual_seed(0))
    checks.compare_weight(rows, Sample("tail", weight, 64), "nf4")
    row = only(rows, "codes, extremes")
    assert row.allowed["quotient"] == row.compared - row.equal > 0
    # The same weights in a whole block, quantized by us as if they were a tail.
    whole = torch.cat([weight[64:], torch.zeros(32)])
    theirs = peer.quantize(weight[64:], "nf4", 64)[0]
    faulty(monkeypatch, lambda q: dataclasses.replace(q, packed=torch.cat([theirs, q.packed[16:]])))
    checks.compare_weight(off := Rows(), Sample("whole", whole, 64), "nf4")
    assert only(off, "codes").beyond == row.allowed["quotient"]


def test_under_an_extreme_scale_only_the_nearest_code_is_allowed(rows, monkeypatch):
    weight = torch.linspace(-1, 1, 64) * 2.0**-128
    checks.compare_weight(rows, Sample("subnormal", weight, 64, has_extremes=True), "nf4")
    row = only(rows, "codes, extremes")
    assert row.allowed["extreme scale"] == row.compared - row.equal > 0

    def change(codes):
        codes[3:5] += 2  # neither nearest nor theirs

    faulty(monkeypatch, lambda q: with_codes(q, change))
    checks.compare_weight(off := Rows(), Sample("subnormal", weight, 64, has_extremes=True), "nf4")
    assert only(off, "codes, extremes").beyond == 2


def test_where_theirs_flushes_to_zero_ours_has_to_be_the_oracles(rows, monkeypatch):
    weight = torch.linspace(-1, 1, 64, dtype=torch.bfloat16) * torch.finfo(torch.float32).tiny
    sample = Sample("small", weight, 64, has_extremes=True)
    checks.compare_weight(rows, sample, "nf4")
    row = only(rows, "weights, extremes")
    assert row.verdict == ("as documented" if peer.functional().has_avx512bf16() else "equal")
    right = QuantizedTensor.dequantize
    monkeypatch.setattr(QuantizedTensor, "dequantize", lambda self, dtype=None: right(self, dtype) * 0.5)
    checks.compare_weight(off := Rows(), sample, "nf4")
    assert only(off, "weights, extremes").verdict == DIFFERS


def test_a_tail_of_zeros_may_have_the_scale_0(rows):
    checks.compare_weight(rows, Sample("zeros", torch.cat([torch.ones(64), torch.zeros(9)]), 64), "nf4")
    assert only(rows, "scales").allowed == {"zero tail": 1}


def test_where_bitsandbytes_misreads_rows_the_oracle_says_who_is_right(rows):
    checks.compare_weight(rows, normal(64, 96), "nf4")
    row = only(rows, "weights, split rows")
    assert row.verdict == ("equal" if row.equal == row.compared else "bitsandbytes wrong")
    assert row.beyond == 0


def test_our_second_level_codes_are_never_farther(rows, monkeypatch):
    checks.compare_weight(rows, normal(1024, 4096), "nf4")
    row = only(rows, "second-level codes")
    assert (row.fails, row.verdict) == (False, "ours closer")
    assert row.cases[0]["closer"] > 0
    monkeypatch.setattr(checks, "nearest", lambda x, values: (nearest(x, values).int() - 1).clamp_(0).to(torch.uint8))
    checks.compare_weight(off := Rows(), normal(64, 4096), "nf4")
    row = only(off, "second-level codes")
    assert row.verdict == DIFFERS
    assert row.beyond > row.compared // 2


def farther(offset: torch.Tensor) -> torch.Tensor:
    """By eight ulps: within the limit, but the mean of float64 is nearer."""
    for _ in range(8):
        offset = up(offset)
    return offset


# A fault of the scales' second level -> the quantities that differ.
SECOND_LEVEL = {
    "offset, eight ulps": (lambda codes, absmax2, offset: (codes, absmax2, farther(offset)), {"offset"}),
    # The scales may be off by what the offset is off, and that is more than 2**-20 of them.
    "both": (lambda codes, absmax2, offset: (codes, absmax2 * (1 + 2.0**-20), offset * (1 + 2.0**-16)), {"offset"}),
    "scales": (lambda codes, absmax2, offset: (codes, absmax2 * 1.01, offset), {"scales"}),
}


@pytest.mark.parametrize(("change", "differs"), SECOND_LEVEL.values(), ids=SECOND_LEVEL)
def test_a_fault_of_the_second_level_is_found(rows, monkeypatch, change, differs):
    right = checks.ops.quantize_scales
    monkeypatch.setattr(checks.ops, "quantize_scales", lambda absmax: change(*right(absmax)))
    checks.compare_weight(rows, normal(64, 256), "nf4")
    found = {name for name in ("offset", "scales") if only(rows, f"second-level {name}").verdict == DIFFERS}
    assert found == differs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products(rows, monkeypatch, dtype):
    sample = normal(96, 256, dtype=dtype)
    checks.compare_products(rows, sample, "nf4", tokens=5, seed=0)
    assert {row.verdict for row in rows.all()} <= {"equal", "no worse"}
    assert only(rows, "forward").compared == 5 * 96
    assert only(rows, "input gradient").compared == 5 * 256
    right = checks.linear
    monkeypatch.setattr(checks, "linear", lambda x, weight: right(x, weight) * 1.01)
    checks.compare_products(off := Rows(), sample, "nf4", tokens=5, seed=0)
    assert verdicts(off) == {"forward": DIFFERS, "input gradient": DIFFERS}


@pytest.mark.parametrize("shape", [(48, 128), (128, 64)], ids=str)
def test_the_backward_multiplies_with_the_weight_of_the_forward(rows, monkeypatch, shape):
    sample = normal(*shape, dtype=torch.bfloat16)
    checks.compare_backward_weights(rows, sample, "nf4", torch.float32)
    (row,) = rows.all()
    assert row.verdict == "as documented"
    assert row.compared == shape[0] * shape[1]
    right = checks.linear
    monkeypatch.setattr(checks, "linear", lambda x, weight: right(x, weight) * (1 + 2.0**-20))
    checks.compare_backward_weights(off := Rows(), sample, "nf4", torch.float32)
    assert verdicts(off) == {"weights in backward": DIFFERS}


@pytest.mark.parametrize("codebook", checks.CODEBOOKS)
def test_files_byte_for_byte(rows, monkeypatch, codebook):
    sample = normal(16, 128, dtype=torch.bfloat16)
    checks.compare_files(rows, sample, codebook)
    (row,) = rows.all()
    assert row.verdict == "equal"
    assert len(row.cases) == 2 * len(checks.STORAGES) + (len(checks.STORAGES) if codebook == "nf4" else 0)
    right = QuantizedTensor.to_bitsandbytes

    def off(self, prefix="weight", storage=torch.uint8):
        tensors = right(self, prefix, storage)
        tensors[f"{prefix}.quant_map"] = tensors[f"{prefix}.quant_map"].clone()
        tensors[f"{prefix}.quant_map"].view(torch.uint8)[5] ^= 1
        return tensors

    monkeypatch.setattr(QuantizedTensor, "to_bitsandbytes", off)
    checks.compare_files(wrong := Rows(), sample, codebook)
    (row,) = wrong.all()
    assert row.beyond == len(row.cases)
    assert "weight.quant_map, byte 5" in str(row.first)


def test_a_tensor_that_is_missing_or_of_another_dtype_counts_with_all_its_bytes():
    row = Row("files", "")
    theirs = {"a": torch.zeros(4), "b": torch.zeros(2, dtype=torch.uint8)}
    checks._add_bytes(row, "case", {"b": torch.zeros(2, dtype=torch.int8), "c": torch.zeros(1)}, theirs)
    assert (row.compared, row.equal) == (16 + 2 + 4, 0)
    assert row.first == "case a is missing for f32 [4]"


@pytest.mark.parametrize("codebook", checks.CODEBOOKS)
def test_hostile_tensors_pass(rows, codebook):
    for sample in hostile_samples(torch.bfloat16, 0):
        checks.compare_weight(rows, sample, codebook)
    assert [row for row in rows.all() if row.fails] == []
    assert only(rows, "codes, extremes").allowed["extreme scale"] > 0


def test_ulps():
    a = torch.tensor([1.0, 0.0, -1.0, 1.0])
    b = torch.tensor([1.0, -0.0, -1.0, 1.0]).nextafter(torch.tensor([2.0, -0.0, -2.0, 1.0]))
    assert checks._ulps(a, b).tolist() == [1, 0, 1, 0]
