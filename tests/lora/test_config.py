"""The config: PEFT's fields with PEFT's meaning, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists

from qloralab.lora.config import ALL_LINEAR, LoraConfig

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.v_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.10.mlp.up_proj",
    "q_proj",
    "vision.my_q_proj",
]


@pytest.mark.parametrize("field", ["lora_dropout", "bias", "use_rslora"])
def test_defaults_are_those_of_peft(field):
    defaults = {f.name: f.default for f in dataclasses.fields(peft.LoraConfig)}
    assert getattr(LoraConfig(8, 16), field) == defaults[field]


@pytest.mark.parametrize(
    ("r", "alpha", "rslora", "scaling"),
    [(8, 16, False, 2), (64, 16, False, 0.25), (16, 8, True, 2), (3, 1, False, 1 / 3), (2, 1, True, math.sqrt(0.5))],
)
def test_scaling(r, alpha, rslora, scaling):
    assert LoraConfig(r, alpha, use_rslora=rslora).scaling == pytest.approx(scaling, rel=1e-15)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r is 0; "),
        ({"r": -1}, "r is -1; "),
        ({"r": 8.0}, "r is 8.0; "),
        ({"r": "8"}, "r is '8'; "),
        ({"r": True}, "r is True; "),
        ({"lora_alpha": 0}, "lora_alpha is 0; it must be positive"),
        ({"lora_alpha": -16}, "lora_alpha is -16; it must be positive"),
        ({"lora_alpha": math.nan}, "lora_alpha is nan; it must be positive"),
        ({"lora_alpha": math.inf}, "lora_alpha is inf; it must be positive"),
        ({"lora_dropout": 1}, "lora_dropout is 1; it must be in [0, 1)"),
        ({"lora_dropout": -0.1}, "lora_dropout is -0.1; it must be in [0, 1)"),
        ({"lora_dropout": math.nan}, "lora_dropout is nan; it must be in [0, 1)"),
        ({"bias": "all"}, "bias is 'all'; only 'none' is supported"),
        ({"bias": "lora_only"}, "bias is 'lora_only'; only 'none' is supported"),
        ({"target_modules": ()}, "target_modules is empty"),
        ({"target_modules": ""}, "target_modules is empty"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None,
)
def test_refused(fields, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        LoraConfig(**{"r": 8, "lora_alpha": 16, **fields})


def test_the_smallest_and_largest_values_are_taken():
    assert LoraConfig(1, 1e-3, lora_dropout=0.999).r == 1


def test_it_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoraConfig(8, 16).r = 4  # pyright: ignore[reportAttributeAccessIssue]


def chosen_by_peft(targets: Any, names: list[str]) -> list[str]:
    config = peft.LoraConfig(target_modules=targets)
    return [name for name in names if check_target_module_exists(config, name)]


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj"],
        ["q_proj", "up_proj"],
        ("mlp.up_proj",),
        ["0.mlp.up_proj"],
        ["model.layers.0.self_attn.v_proj"],
        ["model.layers.10.self_attn.q_proj", "v_proj"],
        r".*\.q_proj",
        r"model\.layers\.\d\..*",
        r".*q_proj",
        r"(q_proj|vision\..*)",
        "q_proj",
    ],
    ids=str,
)
def test_targets_mean_what_they_mean_to_peft(targets):
    chosen = LoraConfig(8, 16, target_modules=targets).select(NAMES)
    assert chosen == chosen_by_peft(list(targets) if isinstance(targets, tuple) else targets, NAMES)
    assert chosen


words = st.sampled_from(["a", "b", "ab", "0", "10"])
paths = st.lists(words, min_size=1, max_size=4).map(".".join)


@given(names=st.lists(paths, min_size=1, max_size=8, unique=True), data=st.data())
def test_suffixes_mean_what_they_mean_to_peft(names, data):
    suffixes = []
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)):
        parts = name.split(".")
        suffixes.append(".".join(parts[data.draw(st.integers(0, len(parts) - 1)) :]))
    assert LoraConfig(8, 16, target_modules=suffixes).select(names) == chosen_by_peft(suffixes, names)


def test_all_linear_takes_every_name_in_order():
    assert LoraConfig(8, 16).target_modules == ALL_LINEAR
    assert LoraConfig(8, 16).select(NAMES) == NAMES
    assert LoraConfig(8, 16).select(NAMES[::-1]) == NAMES[::-1]


@pytest.mark.parametrize(
    ("targets", "missing"),
    [
        (["q_proj", "query"], "'query'"),
        (["proj"], "'proj'"),
        (["attn.q_proj"], "'attn.q_proj'"),
        ([ALL_LINEAR], "'all-linear'"),
        ([""], "''"),
        (r"layers\.0\..*", "'layers"),
        ("proj", "'proj'"),
        ("up_proj", "'up_proj'"),
    ],
    ids=str,
)
def test_a_target_that_matches_nothing_is_named_beside_what_there_is(targets, missing):
    with pytest.raises(ValueError, match=f"no linear layer matches {missing}") as caught:
        LoraConfig(8, 16, target_modules=targets).select(NAMES)
    assert str(caught.value).endswith("linear layers here: q_proj, v_proj, up_proj, my_q_proj")


@pytest.mark.parametrize("targets", [ALL_LINEAR, ["q_proj"], ".*"], ids=str)
def test_no_names_at_all(targets):
    with pytest.raises(ValueError, match="linear layers here: none"):
        LoraConfig(8, 16, target_modules=targets).select([])
