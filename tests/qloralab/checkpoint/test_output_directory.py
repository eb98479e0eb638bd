"""A directory that is there whole, or not at all; and what stands in its way, in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qloralab.checkpoint.output_directory import check_writable, size_text, written_beside
from qloralab.errors import UserError


def test_the_directory_appears_at_the_end(tmp_path):
    out = tmp_path / "a" / "b"
    with written_beside(out, 10) as part:
        (part / "file").write_text("x")
        assert not out.exists()
    assert (out / "file").read_text() == "x"
    assert os.listdir(tmp_path / "a") == ["b"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path, error):
    def fail() -> None:
        with written_beside(tmp_path / "a" / "b", 10) as part:
            (part / "file").write_text("x")
            raise error

    with pytest.raises(error):
        fail()
    assert os.listdir(tmp_path) == []


def test_what_a_killed_process_has_left_is_removed_and_nothing_else(tmp_path):
    out, others = tmp_path / "[a]", (".a.part-1", ".[a].part", ".[a]b.part-1", "part-1")
    for name in (*others, ".[a].part-1", f".[a].part-{os.getppid()}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    with written_beside(out, 10) as ours:
        assert sorted(os.listdir(tmp_path)) == sorted([*others, ours.name])
        with written_beside(tmp_path / "b", 10):
            child = os.fspath(tmp_path)
            code = "import sys, pathlib\nfrom qloralab.checkpoint.output_directory import written_beside\n"
            code += "with written_beside(pathlib.Path(sys.argv[1]) / '[a]', 10) as part: pass"
            subprocess.run([sys.executable, "-c", code, child], check=True)  # while we are at it
        assert ours.is_dir()
        (out / "theirs").touch()
        (out / "theirs").unlink()
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "[a]", "b"])


def test_a_disk_that_is_too_small_is_said_first(tmp_path):
    with (
        pytest.raises(UserError, match=r"b needs 1000000\d*\.00 GB, and .* are free"),
        written_beside(tmp_path / "b", 10**15),
    ):
        pytest.fail("written to")
    assert os.listdir(tmp_path) == []


def test_what_is_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    check_writable(Path("out"), tmp_path / "new" / "out")
    with pytest.raises(UserError, match=r"^out cannot be written: .*file is not a directory$"):
        check_writable(Path("out"), tmp_path / "file" / "out")


def test_sizes_are_read_in_mb_or_gb():
    assert [size_text(count) for count in (5e5, 1.5e6, 2.25e9)] == ["500.0 kB", "1.5 MB", "2.25 GB"]
