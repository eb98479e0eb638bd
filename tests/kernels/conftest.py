"""What the tests of the kernels need from the machine."""

from __future__ import annotations

import os
import shutil

import pytest

from qloralab.kernels.cpu.build import COMPILERS


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `compiler` run where there is one."""
    found = os.environ.get("CC") or any(shutil.which(name) for name in COMPILERS)
    if item.get_closest_marker("compiler") and not found:
        pytest.skip("needs a C compiler: install gcc and the headers of the C library")
