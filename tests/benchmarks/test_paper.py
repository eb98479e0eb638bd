"""The paper's tables: each with tiny settings on a library of a few modules, and the rules that they rest on."""

from __future__ import annotations

import io
import json
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats

from qloralab.benchmarks.paper import __main__ as command
from qloralab.benchmarks.paper import corpus, normality, rounded_before, sign_encodings, tinylm
from qloralab.benchmarks.paper.adapters_where import equal_rank
from qloralab.benchmarks.paper.fine_tuning import ATTENTION
from qloralab.benchmarks.paper.interval import bootstrap, shown, student
from qloralab.benchmarks.paper.page import PAGE, PICTURES, RECORDS, write_page
from qloralab.benchmarks.paper.table import Context
from qloralab.benchmarks.paper.weight_error import errors
from qloralab.checkpoint.models import load_model, load_tokenizer
from qloralab.display import Display
from qloralab.errors import UserError
from qloralab.lora.config import LoraConfig
from qloralab.lora.inject import inject_, trainable
from qloralab.nf4.data_type import DATA_TYPES

SILENT = Display(Console(file=io.StringIO()))
MODULES = ("json", "email", "logging", "collections", "concurrent", "urllib", "html", "wsgiref")


@pytest.fixture(scope="module", autouse=True)
def small_library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A few packages of the standard library in the place of all."""
    folder = tmp_path_factory.mktemp("library")
    for name in MODULES:
        shutil.copytree(Path(sysconfig.get_path("stdlib"), name), folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "LIBRARY", folder)
        caches = (corpus.sources, corpus.docstrings, corpus._examples)
        for cached in caches:
            cached.cache_clear()
        yield
        for cached in caches:
            cached.cache_clear()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tinylm-tiny"
    tinylm.make(path, tinylm.RECIPES["tiny"], SILENT)
    return path


def test_tinylm_learns_is_seeded_and_opens(tiny: Path):
    record = json.loads((tiny / tinylm.RECORD).read_text())
    assert record["loss_after"] < record["loss_before"]
    model, tokenizer = load_model(tiny, torch.float32), load_tokenizer(tiny)
    again, _, _ = tinylm.train(tinylm.RECIPES["tiny"], SILENT)
    for (name, ours), theirs in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    text = "def f(x):\n    return 'é'"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    with pytest.raises(UserError, match="exists; remove it"):
        tinylm.make(tiny, tinylm.RECIPES["tiny"], SILENT)


@torch.no_grad()
def test_the_loss_of_tinylm_is_that_of_transformers(tiny: Path):
    model, ids = load_model(tiny, torch.float32), torch.arange(40).view(2, 20)
    assert float(tinylm.loss_of(model, ids)) == pytest.approx(float(model(input_ids=ids, labels=ids).loss), rel=1e-5)


def test_nothing_is_held_out_and_trained_on():
    held_out, learned = corpus.documents(held_out=True), corpus.documents(held_out=False)
    assert held_out
    assert not set(held_out) & set(learned)
    for half in (True, False):
        files = {one.source.partition(":")[0] for one in corpus.docstrings(half)}
        assert files
        assert files <= {path for path in corpus.sources() if corpus.is_held_out(path) == half}


def test_every_table_with_tiny_settings(tiny: Path, tmp_path: Path):
    context = Context("tiny", tiny, None, None, SILENT)
    for name, table in command.TABLES.items():
        command.measure(name, table, context, tmp_path)
        run, *_ = json.loads((tmp_path / RECORDS / f"{name}.json").read_text())
        assert run["size"] == "tiny"
    write_page(tmp_path, command.TABLES)
    page = (tmp_path / PAGE).read_text()
    for name, table in command.TABLES.items():
        assert f"## {table.TITLE}" in page
        assert (tmp_path / PICTURES / f"paper-{name}.png").stat().st_size > 1000 or name == "retrieval"
    assert "nan" not in page


def test_errors_of_normal_weights_are_the_published_ones():
    normal = [torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))]
    nf4, bof4, bof4_s = (errors(normal, DATA_TYPES[name])[0, 0] for name in ("nf4", "bof4", "bof4-s"))
    assert bof4 / nf4 == pytest.approx(0.94, abs=0.01)
    assert bof4_s / nf4 == pytest.approx(0.87, abs=0.01)


@pytest.mark.parametrize("name", sign_encodings.ENCODINGS)
def test_an_encoding_of_signed_scales_keeps_sign_and_size(name: str):
    encoding = sign_encodings.ENCODINGS[name]
    generator = torch.Generator().manual_seed(0)
    scales = torch.rand(1, 1000, generator=generator) + 2
    scales *= torch.randn(1, 1000, generator=generator).sign()
    decoded = encoding.decoded(scales, torch.ones(1))
    assert torch.equal(decoded.sign(), scales.sign())
    assert ((decoded - scales) / scales).abs().max() < 0.02


def test_q4_1_is_that_of_gguf():
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    kind = gguf.GGMLQuantizationType.Q4_1
    theirs = gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind)
    ours = rounded_before.q4_1(weight).numpy()
    step = np.ptp(weight.numpy().reshape(-1, 32), axis=1).max() / 15
    assert np.abs(ours - theirs).max() < step * 0.01  # theirs rounds d to float16 after it has divided by it


def test_the_distance_is_that_of_scipy_and_normal_rows_exceed_the_level_in_five_of_a_hundred():
    generator = torch.Generator().manual_seed(1)
    z = normality.standardized(torch.randn(1000, 96, generator=generator))
    distances = normality.distance(z)
    assert float(distances[0]) == pytest.approx(stats.kstest(z[0].numpy(), "norm").statistic)
    level = normality.level(96, 4000)
    assert float((distances > level).float().mean()) == pytest.approx(0.05, abs=0.02)
    uniform = normality.standardized(torch.rand(200, 960, generator=generator))
    assert float((normality.distance(uniform) > normality.level(960, 1000)).float().mean()) > 0.9


def test_intervals():
    values = [1.0, 2.0, 4.0, 4.5, 3.0]
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert student(values)["interval"] == pytest.approx([low, high])
    assert student([2.0]) == {"value": 2.0, "interval": None}
    generator = np.random.default_rng(1)
    samples = np.column_stack([generator.normal(3, 1, 400), np.ones(400)])
    found = bootstrap(samples, lambda sums: sums[:, 0] / sums[:, 1])
    half = 1.96 * samples[:, 0].std() / 20
    assert found["interval"] == pytest.approx([found["value"] - half, found["value"] + half], abs=0.02)
    assert shown({"value": 0.5, "interval": [0.25, 1.0]}, 2, sign=True) == "+0.50 (+0.25 to +1.00)"


def test_equal_ranks_train_as_many_parameters(tiny: Path):
    counts = []
    for r, targets in ((8, "all-linear"), (equal_rank(8, tiny), ATTENTION)):
        model = inject_(load_model(tiny, torch.float32), LoraConfig(r=r, lora_alpha=r, target_modules=targets))
        counts.append(sum(parameter.numel() for parameter in trainable(model)))
    assert counts[1] == pytest.approx(counts[0], rel=0.05)


def test_a_missing_model_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command, "DIRECTORY", tmp_path / "tinylm")
    with pytest.raises(SystemExit, match="`make tinylm` trains it"):
        command.main(["--only", "double_quant"])
