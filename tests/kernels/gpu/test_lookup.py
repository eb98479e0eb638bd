"""The look-up: its tables, and its own assembly in an emulator, over all half-words, of one row and of two."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qloralab.kernels.gpu import lookup
from qloralab.kernels.gpu.lookup import assembly, known, table
from qloralab.nf4.codebook import codebook_values, normal_float

from .prmt import lop3, prmt, run

CODEBOOKS = {
    **{name: codebook_values(name) for name in ("nf4", "fp4", "fp4_e3m0", "int4")},
    "one negative": torch.tensor([-1.0] + [0.5] * 15),
    "without order": torch.tensor([0.3, -0.0, 7, -2e-5, 1e30, 0, -3, 5, 0.1, -0.1, 11, -6, 0.75, 1e-30, -1e9, 2]),
}
codebooks = pytest.mark.parametrize("values", CODEBOOKS.values(), ids=CODEBOOKS)
HALF_WORDS = np.arange(1 << 16, dtype=np.uint32)
OTHER = HALF_WORDS * np.uint32(40503) + np.uint32(12345) & np.uint32(0xFFFF)  # every half-word once, in another order
FIRST, SECOND = HALF_WORDS | OTHER << np.uint32(16), OTHER[::-1] | HALF_WORDS << np.uint32(16)


def full(number: int) -> np.ndarray:
    return np.full(1 << 16, number & 0xFFFFFFFF, np.uint32)


def codes(word: np.ndarray, k: int) -> torch.Tensor:
    """Those of column k: two in a byte, the first in the high nibble."""
    return torch.from_numpy((word >> np.uint32(8 * (k // 2) + 4 * (1 - k % 2)) & np.uint32(15)).astype(np.int64))


def products(values: torch.Tensor, scale: np.ndarray) -> np.ndarray:
    """Bits of the bfloat16 products of values and bfloat16 scales (bits)."""
    scales = torch.from_numpy((scale << np.uint32(16)).view(np.float32).copy())
    return (values * scales).bfloat16().view(torch.int16).numpy().view(np.uint16)


def test_prmt_and_lop3_as_the_manual_has_them():
    a, b = np.array([0x33221180], np.uint32), np.array([0x77E65544], np.uint32)
    assert prmt(a, b, np.array([0x3210], np.uint32)) == a
    assert prmt(a, b, np.array([0x7654], np.uint32)) == b
    assert prmt(a, b, np.array([0x0617], np.uint32)) == 0x80E61177
    assert prmt(a, b, np.array([0xE8F9], np.uint32)) == 0xFFFF0000  # the signs of bytes 6, 0, 7, 1
    assert lop3(a, b, b ^ a, 0xF0 & 0xCC | 0xAA) == a & b | b ^ a


def test_the_other_half_words_are_all_of_them():
    assert len(np.unique(OTHER)) == 1 << 16


@codebooks
def test_every_half_word_of_a_row_becomes_its_values(values):
    look_up = table(values)
    registers = {f"${10 + i}": full(word) for i, word in enumerate(look_up.words)}
    for word in (FIRST, SECOND):
        result = run(assembly(1), registers | {"$8": word, "$9": full(0x3F803F80)})  # scales of 1
        for k in range(8):
            expected = products(torch.tensor(look_up.values)[codes(word, k)], full(0x3F80))
            assert np.array_equal(result[f"${k}"], expected)


@codebooks
def test_every_half_word_of_two_rows_becomes_its_values_times_the_scales_of_its_row(values):
    look_up = table(values)
    scales = np.random.default_rng(0).integers(0x3C00, 0x3D00, (2, 2, 1 << 16), np.uint32)  # half, row: of bfloat16
    scales[:, 1] |= np.uint32(0x8000)  # those of the second row are negative
    low, high = (half[0] | half[1] << np.uint32(16) for half in scales)
    registers = {f"${20 + i}": full(word) for i, word in enumerate(look_up.words)}
    result = run(assembly(2), registers | {"$16": FIRST, "$17": SECOND, "$18": low, "$19": high})
    for k, row in np.ndindex(8, 2):
        expected = products(torch.tensor(look_up.values)[codes((FIRST, SECOND)[row], k)], scales[k // 4, row])
        assert np.array_equal(result[f"${2 * k + row}"], expected)


@codebooks
def test_a_table_is_the_codebook_times_a_factor_in_bfloat16(values):
    look_up = table(values)
    assert 1 <= look_up.factor < 2
    entries = torch.tensor(look_up.values)
    assert torch.equal(entries, (values * look_up.factor).bfloat16().float())
    assert torch.equal(entries.signbit(), values.signbit())
    error = (entries.double() / look_up.factor - values.double()).norm()
    assert error <= (values.bfloat16().double() - values.double()).norm()


def test_the_nf4_table_is_nearer_to_nf4_than_bfloat16_is():
    values, look_up = normal_float().double(), table(normal_float())
    entries = torch.tensor(look_up.values, dtype=torch.float64) / look_up.factor

    def error(approximate: torch.Tensor) -> float:
        return float((approximate - values).norm() / values.norm())

    assert error(entries) < 0.6 * error(values.bfloat16().double())


def test_a_codebook_is_read_once_and_again_when_it_was_written_to(monkeypatch):
    values = normal_float().clone()
    assert known(values) is None
    first = table(values)
    assert known(values) is table(values)
    read: list[tuple[float, ...]] = []
    right = lookup._table
    monkeypatch.setattr(lookup, "_table", lambda numbers: read.append(numbers) or right(numbers))
    assert table(values) is first
    assert read == []
    values[3] = 0.25
    assert known(values) is None
    assert table(values).values[3] > 0 > first.values[3]
    assert len(read) == 1
    with torch.inference_mode():
        assert table(normal_float().clone()) is first


def test_values_that_are_not_finite_stay_what_they_are():
    look_up = table(torch.tensor([torch.inf, -torch.inf] + [0.5] * 14))
    assert look_up.factor == 1
    assert look_up.values == (torch.inf, -torch.inf, *[0.5] * 14)
