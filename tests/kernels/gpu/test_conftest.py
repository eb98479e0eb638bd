"""The guard of the kernels' tests catches what writes past a tensor, and says which tensor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = """
import pytest, torch

@pytest.mark.parametrize("at", [-1, 0, 99, 100])
def test_write(guarded, at):
    guarded(7)
    x = guarded(100, dtype=torch.uint8, offset=3)
    x.as_strided((1,), (1,), x.storage_offset() + at).fill_(1)
"""


def run(folder: Path, tests: str, before: str = "") -> str:
    """What pytest prints about `tests` beside the conftest of this folder, with a line among its imports."""
    text = Path(__file__).with_name("conftest.py").read_text()
    (folder / "conftest.py").write_text(text.replace("import math\n", f"import math\n{before}\n", 1))
    (folder / "test_it.py").write_text(tests)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder), f"--rootdir={folder}"]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True).stdout


def test_a_write_past_a_tensor_is_an_error(tmp_path):
    out = run(tmp_path, TESTS)
    assert "4 passed, 2 errors" in out
    assert "something wrote before tensor 1 of this test" in out
    assert "something wrote after tensor 1 of this test" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU nothing is interpreted")
def test_a_triton_that_came_too_early_is_named(tmp_path):
    out = run(tmp_path, "def test_it(): pass", before="import triton")
    assert "triton was imported before TRITON_INTERPRET was set" in out
    assert "1 error" in out


def test_what_it_allocates(guarded, device):
    x = guarded(3, 5, dtype=torch.bfloat16)
    assert (x.shape, x.dtype, x.device.type) == ((3, 5), torch.bfloat16, device)
    assert x.data_ptr() % 256 == 0
    assert x.isnan().all()
    assert guarded(3, dtype=torch.float32, offset=4).data_ptr() % 256 == 4
    values = torch.arange(6.0).view(2, 3).to(device)
    copy = guarded(values, offset=8)
    assert torch.equal(copy, values)
    assert copy.data_ptr() % 256 == 8
    assert guarded(0).numel() == 0
