"""The pages: their Python runs, their links lead somewhere, and the map of the code is complete."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks" / "README.md"])
FOLDERS = ("nf4", "lora", "kernels", "optim", "qloralab", "benchmarks")


def python(page: Path) -> str:
    """The Python of a page, its blocks one after the other."""
    return "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))


def heading(line: str) -> str:
    """The anchor that a heading has on GitHub."""
    return re.sub(r"[^\w\- ]", "", line.lstrip("#").strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [page for page in PAGES if python(page)], ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page, tmp_path):
    code = python(page)
    if page.name == "README.md" and page.parent == ROOT:
        code = README.replace("README", code).replace("path/to/model", str(tmp_path / "model"))
    (tmp_path / "page.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


README = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
)).save_pretrained("path/to/model")
ids = labels = torch.arange(16)[None]
README
from peft import PeftModel
PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("path/to/model"), "adapter")
"""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in map(heading, re.findall(r"^#+ .*", file.read_text(), re.MULTILINE)), target


def test_every_picture_of_a_chapter_is_there_and_has_what_makes_it():
    script = (ROOT / "docs" / "pictures.py").read_text()
    made = set(re.findall(r'^    "([\w-]+\.svg)": ', script, re.MULTILINE))
    chapters = [page.read_text() for page in ROOT.glob("docs/first-principles/*.md")]
    shown = [re.findall(r"\]\(\.\./pictures/([^)]+)\)", text) for text in chapters]
    assert [len(pictures) for pictures in shown] == [1] * 5
    assert {picture for (picture,) in shown} == made == {path.name for path in ROOT.glob("docs/pictures/*.svg")}


def test_the_map_names_every_file_once():
    """The tree in docs/architecture.md: every module and C file by its path."""
    tree = re.findall(r"```\n(nf4/.*?)```", (ROOT / "docs" / "architecture.md").read_text(), re.DOTALL)[0]
    named, folder = [], ""
    for line in tree.splitlines():
        words = re.split(r"\s{2,}", line.strip())[0]
        if not line.startswith(" "):
            folder = words
            continue
        named += [folder + word for word in words.split(", ")]
    there = {
        str(p.relative_to(ROOT))
        for f in FOLDERS
        for p in (ROOT / f).rglob("*")
        if p.suffix in (".py", ".c", ".h", ".cpp")
    }
    there = {path for path in there if not path.endswith("__init__.py")}
    assert sorted(named) == sorted(there)
