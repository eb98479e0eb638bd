"""The curves and the samples, as files that others read."""

from __future__ import annotations

import numpy as np
import pytest
from markdown_it import MarkdownIt
from matplotlib import pyplot as plt

from qloralab.train.report import plot_loss, read_samples, smooth, write_samples
from qloralab.train.run_directory import Metrics

START = Metrics(0, 0, None, 3.8, None, None, None, 100.0)
ANSWERS = [
    "plain",
    "",
    "# heading\n\n* item\n1. one",
    "```python\nx = 1\n```",
    "`code` **bold** <b>html</b> [link](http://x)",
    "\n\n    indented\n\n\n  two blank lines\n",
    "~~~\nopen fence",
    "<script>alert(1)</script>\n---\n| a | b |",
]


def training(steps: int) -> list[Metrics]:
    last = {steps: 2.5}
    return [Metrics(i, 100 * i, 3.8 - i / 50, last.get(i), 1e-3, 0.5, 120.0, 100.0) for i in range(1, steps + 1)]


@pytest.mark.parametrize("weight", [0.0, 0.5, 0.9])
def test_the_average_weighs_the_past_geometrically(weight):
    values = np.random.default_rng(0).normal(size=30)
    expected = []
    for end in range(1, 31):
        weights = np.power(weight, np.arange(end)[::-1])
        expected.append((weights * values[:end]).sum() / weights.sum())
    np.testing.assert_allclose(smooth(list(values), weight), expected, rtol=1e-12)


def test_the_average_of_one_value_is_the_value():
    assert smooth([3.5]) == pytest.approx([3.5])
    assert smooth([]) == []


@pytest.mark.parametrize("metrics", [[START], [START, *training(1)], [START, *training(25)]], ids=["0", "1", "25"])
def test_the_plot_is_a_picture_with_curves(tmp_path, metrics):
    path = tmp_path / "loss.png"
    plot_loss(metrics, r"a_title with $x_{$, [brackets], \frac, 模型, \udcff, 😀", path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    picture = plt.imread(path)[..., :3]
    assert picture.shape == (600, 1050, 3)
    assert picture.min() < 0.2  # the text
    red = np.isclose(picture, np.array([0xC0, 0x39, 0x2B]) / 255, atol=1 / 255).all(-1).sum()
    blue = np.isclose(picture, np.array([0x1F, 0x5F, 0xA8]) / 255, atol=1 / 255).all(-1).sum()
    assert red > 50  # validation is in each of them
    assert (blue > 50) == (len(metrics) > 1)
    assert not plt.get_fignums()


def test_each_answer_is_code_and_nothing_else(tmp_path):
    path = tmp_path / "samples.md"
    prompts = [f"<|im_start|>\nprompt {i} ```" for i in range(len(ANSWERS))]
    write_samples(path, prompts, {"before": ANSWERS, "after": ANSWERS[::-1]}, [f"f.jsonl:{i}" for i in range(8)], "Run")
    tokens = MarkdownIt("commonmark").parse(path.read_text(encoding="utf-8"))
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings == ["Run", *(f"f.jsonl:{i}" for i in range(8))]
    names = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "paragraph_open"]
    assert names == ["**before**", "**after**"] * 8
    kinds = {token.type.removesuffix("_open").removesuffix("_close") for token in tokens}
    assert kinds == {"heading", "inline", "paragraph", "code_block"}
    code = [token.content.strip() for token in tokens if token.type == "code_block"]
    expected = [one for rows in zip(prompts, ANSWERS, ANSWERS[::-1], strict=True) for one in rows]
    assert code == [one.strip() or "(nothing)" for one in expected]


def test_samples_are_read_back(tmp_path):
    path = tmp_path / "samples.md"
    prompts = [f"prompt {i}\n\n## f.jsonl:7\n**after**" for i in range(len(ANSWERS))]
    write_samples(path, prompts, {"before": ANSWERS, "after": ANSWERS[::-1]}, [f"f.jsonl:{i}" for i in range(8)], "Run")
    kept = [one.strip() or "(nothing)" for one in ANSWERS]
    rows = zip(prompts, kept, kept[::-1], strict=True)
    expected = [{"prompt": prompt, "before": before, "after": after} for prompt, before, after in rows]
    assert read_samples(path) == [(f"f.jsonl:{i}", texts) for i, texts in enumerate(expected)]


def test_a_title_that_is_no_unicode(tmp_path):
    """A path, with bytes that are not UTF-8."""
    write_samples(tmp_path / "samples.md", ["a"], {}, ["\udcff.jsonl:1"], "模型\udcff")
    assert (tmp_path / "samples.md").read_text(encoding="utf-8").startswith("# 模型\\udcff\n\n## \\udcff.jsonl:1\n")


def test_as_many_sources_as_prompts(tmp_path):
    with pytest.raises(ValueError, match="zip"):
        write_samples(tmp_path / "samples.md", ["a", "b"], {}, ["one"], "Run")
