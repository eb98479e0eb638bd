"""The shapes of a model's linear layers, and sums of times over them."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GPTNeoXConfig, LlamaConfig, Qwen3Config

from qloralab.benchmarks.gpu_model import OF_STEP, OF_TOKEN, linear_shapes, name, sums, tables

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize("file", [False, True], ids=["folder", "config.json"])
@pytest.mark.parametrize("tied", [False, True], ids=["a head", "a tied head"])
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
def test_grouped_heads_of_their_own_size_have_the_shapes_that_transformers_makes(kind, tied, file, tmp_path):
    kind(**SIZES, num_key_value_heads=1, head_dim=32, tie_word_embeddings=tied).save_pretrained(tmp_path)
    found = linear_shapes(tmp_path / "config.json" if file else tmp_path)
    assert found == {(128, 64): 3, (32, 64): 6, (64, 128): 3, (96, 64): 6, (64, 96): 3}  # q; k, v; o; gate, up; down


def test_a_model_that_projects_once_has_one_shape_for_it(tmp_path):
    GPTNeoXConfig(**SIZES).save_pretrained(tmp_path)
    assert linear_shapes(tmp_path) == {(192, 64): 3, (64, 64): 3, (96, 64): 3, (64, 96): 3}


def test_a_model_is_called_by_its_folder(tmp_path):
    assert name(tmp_path / "Some-8B" / "config.json") == name(tmp_path / "Some-8B") == "Some-8B"
    assert name(tmp_path / "other.json") == "other"


def point(provider: str, shape: list[int], operation: str, M: int, ms: float | None, count: int) -> dict[str, Any]:
    ms_ = ms and {"p20": ms, "p50": ms, "p80": ms}
    return {
        "kind": "point", "provider": provider, "shape": shape, "operation": operation, "M": M, "ms": ms_,
        "count": count, "model": "Some-8B",
    }  # fmt: skip


def records() -> list[dict[str, Any]]:
    small, large = ([64, 64], 2), ([64, 128], 3)
    times = {
        "ours": (1.0, 2.0, 5.0), "ours, fused": (3.0, 1.0, 50.0), "bf16": (4.0, 8.0, 4.0), "peer": (1.0, None, None)
    }  # fmt: skip
    return [
        point(one, shape, operation, M, ms, count)
        for one, (first, second, step) in times.items()
        for (shape, count), ms in zip((small, large), (first, second), strict=True)
        for operation, M, ms in (("linear", 1, ms), ("linear", 4096, step), ("input gradient", 4096, step))
    ]


def test_sums_weigh_each_shape_by_its_layers():
    assert sums(records(), OF_TOKEN) == {
        "ours": 2 * 1 + 3 * 2, "ours, fused": 2 * 3 + 3 * 1, "bf16": 2 * 4 + 3 * 8, "the faster of ours": 2 * 1 + 3 * 1
    }  # fmt: skip
    assert sums(records(), OF_STEP) == {"ours": 50, "ours, fused": 500, "bf16": 40, "the faster of ours": 50}


def test_the_table_has_both_sums_and_the_dense_model_beside_them(lines):
    rows = lines(*tables(records()))
    assert rows[0] == ["ours", "8.00", "4.00", "50.00", "0.80"]
    assert [row[0] for row in rows] == ["ours", "ours, fused", "bf16", "the faster of ours"]
    only_tokens = [record for record in records() if record["M"] == 1]
    assert lines(*tables(only_tokens))[0] == ["ours", "8.00", "4.00", "", ""]


def test_without_a_model_there_is_no_table():
    assert list(tables([{**record, "count": None} for record in records()])) == []
