"""What cannot be run is refused, in the words of the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch

from qloralab.optim.paged_adamw import PagedAdamW
from qloralab.settings import ADAPTERS, DTYPES, Method, Settings


@pytest.fixture
def refused(refusal, tmp_path) -> Callable[..., str]:
    """The one line that refuses these settings."""
    return lambda **changes: refusal(Settings, **{"out": tmp_path / "run", "model": Path("model"), **changes})


def test_the_defaults_are_accepted(tmp_path):
    settings = Settings(out=tmp_path / "run", model=Path("model"))
    assert settings.method == "qlora"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", ["steps", "batch_size", "accumulate", "max_length", "held_out", "eval_every"])
def test_counts_start_at_one(refused, name, value):
    option = "--" + name.replace("_", "-")
    assert refused(**{name: value}) == f"{option} is {value}; it must be at least 1"


def test_one_is_enough(tmp_path):
    counts = dict.fromkeys(("steps", "batch_size", "accumulate", "max_length", "held_out", "eval_every"), 1)
    Settings(out=tmp_path / "run", model=Path("model"), **counts)


@pytest.mark.parametrize("value", [0.0, -1e-3, float("nan"), float("inf")])
@pytest.mark.parametrize(("name", "option"), [("lr", "--lr"), ("max_grad_norm", "--max-grad-norm")])
def test_rates_are_positive(refused, name, option, value):
    assert refused(**{name: value}) == f"{option} is {value}; it must be positive and finite"


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**64])
def test_a_seed_is_one_that_torch_takes(refused, tmp_path, seed):
    assert refused(seed=seed) == f"--seed is {seed}; it must be a number of 64 bits"
    nearest = min(max(seed, -(2**63)), 2**64 - 1)
    torch.manual_seed(Settings(out=tmp_path / "run", model=Path("model"), seed=nearest).seed)
    with pytest.raises(ValueError, match="Overflow"):
        torch.manual_seed(seed)


def test_empty_data_is_not_the_directory_here(refused):
    assert refused(data="") == "--data is empty; give a JSONL file or 'stdlib'"


def test_no_more_parts_than_examples(refused, tmp_path):
    message = "--accumulate 5 is more than the 4 examples of a batch"
    assert refused(accumulate=5, batch_size=4) == message
    Settings(out=tmp_path / "run", model=Path("model"), accumulate=4, batch_size=4)


@pytest.mark.parametrize("bits", [0, 4, 16, 64])
def test_moments_have_32_or_8_bits(refused, bits):
    assert refused(state_bits=bits) == f"--state-bits is {bits}; it must be 32 or 8"


@pytest.mark.parametrize("dtype", ["", "float16", "bf16", "torch.float32"])
def test_a_dtype_is_one_of_three(refused, tmp_path, dtype):
    assert refused(dtype=dtype) == f"--dtype is {dtype!r}; it must be one of auto, bfloat16, float32"
    for name in DTYPES:
        Settings(out=tmp_path / "run", model=Path("model"), dtype=name)


def test_the_smallest_budget_is_that_of_the_optimizer(refused, tmp_path):
    assert refused(state_budget=16) == "--state-budget is 16 MB; it must be at least 17"
    settings = Settings(out=tmp_path / "run", model=Path("model"), state_budget=17)
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
def test_what_another_option_makes_meaningless_is_refused(refused, tmp_path, name, other, why):
    """Also where it has the value that it has by default."""
    option, value = "--" + name.replace("_", "-"), ADAPTERS[name]
    assert refused(**{name: value}, **other) == f"{option} would be ignored: {why}; leave it out"
    Settings(out=tmp_path / "run", model=Path("model"), **{name: value})


def test_nothing_else_is_ignored(refused, tmp_path):
    assert refused(method="full", adapter=Path("a")).startswith("--adapter would be ignored: --method full")
    assert refused(format="chat") == "--format would be ignored: --data stdlib is no JSONL file; leave it out"
    for method in get_args(Method):
        Settings(out=tmp_path / "run", model=Path("model"), method=method)
    defaults = [Settings(out=None, model=Path("model"), data=data).treats_too_long for data in ("stdlib", "a.jsonl")]
    assert defaults == ["skip", "error"]
    assert Settings(out=None, model=Path("model"), too_long="cut").treats_too_long == "cut"


def test_a_run_does_not_write_over_another(refused, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    Settings(out=out, model=Path("model"))
    (out / "metrics.jsonl").write_text("kept")
    assert refused() == f"{out} exists and is not empty; a run never writes over another, give --out a new name"
    file = out / "metrics.jsonl"
    assert refused(out=file) == f"{file} is a file; give --out the name of a new directory"
    assert (out / "metrics.jsonl").read_text() == "kept"


@pytest.mark.parametrize(("method", "rate"), [("qlora", 1e-3), ("lora", 1e-3), ("full", 1e-4)])
def test_the_learning_rate_depends_on_the_method(tmp_path, method, rate):
    settings = Settings(out=tmp_path / "run", model=Path("model"), method=method)
    assert settings.learning_rate == rate
    assert dataclasses.replace(settings, lr=0.5).learning_rate == 0.5


@pytest.mark.parametrize(
    ("name", "value"), [("data_type", "nf4"), ("block_size", 64), ("double_quant", False), ("skip", "lm_head")]
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


def test_adapters_start_in_one_of_two_ways(refused, tmp_path):
    assert refused(init="pissa") == "--init is 'pissa'; it must be one of kaiming, gaussian"
    made = [Settings(out=None, model=Path("m"), init=init).new_adapters for init in (None, "kaiming", "gaussian")]
    assert [one["init_lora_weights"] for one in made] == [True, True, "gaussian"]
    assert Settings(out=None, model=Path("m"), rslora=True).new_adapters["use_rslora"] is True
