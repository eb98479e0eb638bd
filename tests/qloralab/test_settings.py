"""What cannot be run is refused, in the words of the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch

from qloralab.optim.paged_adamw import PagedAdamW
from qloralab.settings import ADAPTERS, DTYPES, Method, Settings


@pytest.fixture
def make(tmp_path) -> Callable[..., Settings]:
    return lambda **changes: Settings(**{"out": tmp_path / "run", "model": Path("model"), **changes})


@pytest.fixture
def refused(refusal, make) -> Callable[..., str]:
    """The one line that refuses these settings."""
    return lambda **changes: refusal(make, **changes)


COUNTS = ("steps", "epochs", "batch_size", "accumulate", "max_length", "held_out", "eval_every")
# option, what is refused, why, what is accepted
RANGES = [
    *((name, value, f"is {value}; it must be at least 1", [1]) for name in COUNTS for value in (0, -1)),
    *(
        (name, value, f"is {value}; it must be positive and finite", [1e-9])
        for name in ("lr", "max_grad_norm")
        for value in (0.0, -1e-3, float("nan"), float("inf"))
    ),
    *(("state_bits", bits, f"is {bits}; it must be 32 or 8", [32, 8]) for bits in (0, 4, 16, 64)),
    *(
        ("dtype", dtype, f"is {dtype!r}; it must be one of auto, bfloat16, float32", DTYPES)
        for dtype in ("", "float16", "bf16", "torch.float32")
    ),
    ("accumulate", 5, "5 is more than the 4 examples of a batch", [4]),
    ("data", "", "is empty; give a JSONL file or 'stdlib'", ["."]),
    ("method", "full", "full trains all weights, without adapters; leave it out", get_args(Method)),
    ("format", "chat", "would be ignored: --data stdlib is no JSONL file; leave it out", [None]),
]


@pytest.mark.parametrize(("name", "value", "why", "accepted"), RANGES)
def test_a_value_is_refused_with_its_option(make, refused, tmp_path, name, value, why, accepted):
    more = {"adapter": Path("a")} if name == "method" else {}  # each alone is accepted
    start = "--adapter would be ignored: --method" if more else "--" + name.replace("_", "-")
    assert refused(**{name: value}, **more) == f"{start} {why}"
    for one in accepted:
        assert getattr(make(**{name: one}), name) == one
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("method", "rate"), [("qlora", 1e-3), ("lora", 1e-3), ("full", 1e-4)])
def test_defaults_that_depend_on_other_settings(make, method, rate):
    assert make(method=method).learning_rate == rate
    assert make(method=method, lr=0.5).learning_rate == 0.5
    assert [make(data=data).treats_too_long for data in ("stdlib", "a.jsonl")] == ["skip", "error"]
    assert make(too_long="cut").treats_too_long == "cut"


def test_epochs_are_counted_in_steps(make, refused):
    settings = make(epochs=3, batch_size=4)
    assert [settings.in_steps(examples).steps for examples in (1, 4, 5, 16)] == [3, 3, 6, 12]
    assert settings.in_steps(5) == make(steps=6, batch_size=4)
    assert make(steps=7).in_steps(5) == make(steps=7)
    assert refused(epochs=3, steps=7) == "--steps and --epochs say the same in two ways; give one"


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**64])
def test_a_seed_is_one_that_torch_takes(make, refused, seed):
    assert refused(seed=seed) == f"--seed is {seed}; it must be a number of 64 bits"
    nearest = min(max(seed, -(2**63)), 2**64 - 1)
    torch.manual_seed(make(seed=nearest).seed)
    with pytest.raises(ValueError, match="Overflow"):
        torch.manual_seed(seed)


def test_the_smallest_budget_is_that_of_the_optimizer(make, refused):
    assert refused(state_budget=16) == "--state-budget is 16 MB; it must be at least 17"
    settings = make(state_budget=17)
    assert settings.state_budget is not None
    param = torch.nn.Parameter(torch.zeros(1))
    PagedAdamW([param], budget=settings.state_budget * 10**6)
    with pytest.raises(ValueError, match="budget"):
        PagedAdamW([param], budget=16 * 10**6)


@pytest.mark.parametrize("name", ["r", "lora_alpha", "lora_dropout"])
@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"method": "full"}, "--method full trains all weights, without adapters"),
        ({"adapter": Path("a")}, "the adapter in a has its own"),
    ],
)
def test_what_another_option_makes_meaningless_is_refused(make, refused, name, other, why):
    """Also where it has the value that it has by default."""
    option, value = "--" + name.replace("_", "-"), ADAPTERS[name]
    assert refused(**{name: value}, **other) == f"{option} would be ignored: {why}; leave it out"
    make(**{name: value})


def test_a_run_does_not_write_over_another(refused, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    Settings(out=out, model=Path("model"))
    (out / "metrics.jsonl").write_text("kept")
    assert refused() == f"{out} exists and is not empty; a run never writes over another, give --out a new name"
    file = out / "metrics.jsonl"
    assert refused(out=file) == f"{file} is a file; give --out the name of a new directory"
    assert (out / "metrics.jsonl").read_text() == "kept"


@pytest.mark.parametrize(
    ("name", "value"),
    [("data_type", "nf4"), ("block_size", 64), ("double_quant", False), ("skip", "lm_head"), ("merge_aware", True)],
)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_only_qlora_quantizes(refused, name, value, method):
    option = "--" + name.replace("_", "-")
    expected = f"{option} would be ignored: --method {method} quantizes no weights; leave it out"
    assert refused(**{name: value}, method=method) == expected


@pytest.mark.parametrize(("name", "value"), [("target_modules", "q_proj"), ("rslora", True), ("init", "gaussian")])
@pytest.mark.parametrize("other", [{"method": "full"}, {"adapter": Path("a")}], ids=["full", "adapter"])
def test_only_new_adapters_have_a_shape(refused, name, value, other):
    option = "--" + name.replace("_", "-")
    assert refused(**{name: value}, **other).startswith(f"{option} would be ignored: ")


def test_names_stand_between_commas(refused, tmp_path):
    settings = Settings(out=tmp_path / "run", model=Path("m"), target_modules="q_proj, up_proj", skip="layers.0")
    assert settings.new_adapters["target_modules"] == ("q_proj", "up_proj")
    assert settings.skipped == ("layers.0",)
    for name in ("target_modules", "skip"):
        option = "--" + name.replace("_", "-")
        for value in ("", "a,,b", "a,"):
            assert refused(**{name: value}) == f"{option} is {value!r}; it takes names with commas between them"


def test_an_interval_takes_two_runs(refused, tmp_path):
    assert refused(seeds=1) == "--seeds is 1; an interval takes at least 2 runs"
    assert refused(seeds=2, seed=2**64 - 1) == f"--seed is {2**64 - 1}; it must be a number of 64 bits"
    assert Settings(out=tmp_path / "run", model=Path("m"), seed=3, seeds=5).last_seed == 7


def test_how_adapters_start(refused, tmp_path):
    assert refused(init="olora") == "--init is 'olora'; it must be one of kaiming, gaussian, loftq, pissa"
    made = [Settings(out=None, model=Path("m"), init=init).new_adapters for init in (None, "kaiming", "gaussian")]
    assert [one["init_lora_weights"] for one in made] == [True, True, "gaussian"]
    assert Settings(out=None, model=Path("m"), rslora=True).new_adapters["use_rslora"] is True


def test_merge_aware_training_has_no_dropout(make, refused):
    assert make(merge_aware=True).new_adapters["lora_dropout"] == 0.0
    expected = "--lora-dropout would be ignored: --merge-aware has no dropout; leave it out"
    assert refused(merge_aware=True, lora_dropout=0.1) == expected
