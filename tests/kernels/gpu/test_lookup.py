"""The look-up: its tables, and its own assembly in an emulator, over all half-words in both directions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qloralab.kernels.gpu.lookup import assembly, table
from qloralab.nf4.codebook import codebook_values, normal_float

from .prmt import prmt, run

NAMES = ("nf4", "fp4", "fp4_e3m0", "int4")
HALF_WORDS = np.arange(1 << 16, dtype=np.uint32)
OTHER = HALF_WORDS * np.uint32(40503) + np.uint32(12345) & np.uint32(0xFFFF)  # every half-word once, in another order


def bits(numbers: tuple[float, ...]) -> np.ndarray:
    """bfloat16 bits as uint32; -0.0 as 0.0."""
    return (torch.tensor(numbers).view(torch.int32).numpy().view(np.uint32) >> np.uint32(16)) & np.uint32(0xFFFF)


def test_prmt_as_the_manual_has_it():
    a, b = np.array([0x33221180], np.uint32), np.array([0x77E65544], np.uint32)
    assert prmt(a, b, np.array([0x3210], np.uint32)) == a
    assert prmt(a, b, np.array([0x7654], np.uint32)) == b
    assert prmt(a, b, np.array([0x0617], np.uint32)) == 0x80E61177
    assert prmt(a, b, np.array([0xE8F9], np.uint32)) == 0xFFFF0000  # the signs of bytes 6, 0, 7, 1


def test_the_other_half_words_are_all_of_them():
    assert len(np.unique(OTHER)) == 1 << 16


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("name", NAMES)
def test_every_half_word_becomes_its_four_values(name, transposed):
    look_up = table(codebook_values(name))
    values = bits(look_up.values)
    first = 12 if transposed else 10
    registers = {
        f"${first + 2 * i}": np.full(1 << 16, word & 0xFFFFFFFF, np.uint32) for i, word in enumerate(look_up.words)
    }
    registers["$8"] = HALF_WORDS | OTHER << np.uint32(16)
    registers["$9"] = OTHER[::-1] | HALF_WORDS[::-1] << np.uint32(16)
    if transposed:
        registers |= {"$10": np.full(1 << 16, 0x3F803F80, np.uint32), "$11": np.full(1 << 16, 0x3F803F80, np.uint32)}
    result = run(assembly(transposed), registers)
    for j in (0, 1):
        for q in (0, 1):
            half = registers[f"${8 + j}"] >> np.uint32(16 * q)
            for e in (0, 1):
                pair = result[f"${4 * j + 2 * e + q}"]
                for position in (0, 1):
                    i, kp = (position, e) if transposed else (e, position)
                    code = half >> np.uint32(4 * (2 * i + kp)) & np.uint32(15)
                    found = pair >> np.uint32(16 * position) & np.uint32(0xFFFF)
                    found = np.where(found == 0x8000, 0, found)
                    assert np.array_equal(found, values[code])


def test_transposed_each_pair_is_multiplied_by_its_scales():
    look_up = table(normal_float())
    rng = np.random.default_rng(0)
    scales = rng.integers(0x3C00, 0x3D00, (2, 2, 1 << 16), np.uint32)  # word j, row i: positive bfloat16
    registers = {
        f"${12 + 2 * i}": np.full(1 << 16, word & 0xFFFFFFFF, np.uint32) for i, word in enumerate(look_up.words)
    }
    registers |= {"$8": HALF_WORDS | OTHER << np.uint32(16), "$9": OTHER | HALF_WORDS << np.uint32(16)}
    registers |= {f"${10 + j}": scales[j, 0] | scales[j, 1] << np.uint32(16) for j in (0, 1)}
    result = run(assembly(transposed=True), registers)
    values = torch.tensor(look_up.values)
    for j, q, kp, i in np.ndindex(2, 2, 2, 2):
        code = registers[f"${8 + j}"] >> np.uint32(16 * q + 4 * (2 * i + kp)) & np.uint32(15)
        scale = torch.from_numpy((scales[j, i] << np.uint32(16)).view(np.float32).copy())
        expected = (values[torch.from_numpy(code.astype(np.int64))] * scale).bfloat16()
        found = result[f"${4 * j + 2 * kp + q}"] >> np.uint32(16 * i) & np.uint32(0xFFFF)
        assert torch.equal(torch.from_numpy(found.astype(np.uint16)).view(torch.bfloat16), expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_names_every_code_once(name):
    values = codebook_values(name)
    look_up = table(values)
    assert sorted(look_up.order) == list(range(16))
    assert 1 <= look_up.factor < 2
    expected = (values[list(look_up.order)] * look_up.factor).bfloat16().float()
    assert torch.equal(torch.tensor(look_up.values), expected)


def test_the_nf4_table_is_nearer_to_nf4_than_bfloat16_is():
    values = normal_float().double()
    look_up = table(normal_float())
    entries = torch.empty(16, dtype=torch.float64)
    entries[list(look_up.order)] = torch.tensor(look_up.values, dtype=torch.float64) / look_up.factor

    def error(approximate: torch.Tensor) -> float:
        return float((approximate - values).norm() / values.norm())

    assert error(entries) < 0.85 * error(normal_float().bfloat16().double())


@pytest.mark.parametrize(
    ("values", "message"),
    [(torch.linspace(0.1, 1, 8), "16 values, not 8"), (torch.tensor([-1.0] + [0.5] * 15), "signs do not pair")],
    ids=["8 values", "one negative"],
)
def test_no_table(values, message):
    with pytest.raises(ValueError, match=message):
        table(values)
