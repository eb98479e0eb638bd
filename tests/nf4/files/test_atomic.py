"""A file is as before or as after; of two, tests/lora/test_files.py shows it, killed at every step."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qloralab.nf4.files.atomic import replacing


@pytest.mark.parametrize("names", [["a"], ["a", "b"]])
def test_all_or_nothing(tmp_path, names):
    paths = [tmp_path / name for name in names]

    def write(text: str, fail: bool = False) -> None:
        with replacing(*paths) as parts:
            for part in parts:
                part.write_text(text)
                if fail:
                    raise KeyboardInterrupt

    write("1")
    with pytest.raises(KeyboardInterrupt):
        write("2", fail=True)
    assert {path.read_text() for path in paths} == {"1"}
    write("3")
    assert {path.read_text() for path in paths} == {"3"}
    assert sorted(os.listdir(tmp_path)) == names


def test_the_last_file_stays_in_its_place_when_it_does_not_change(tmp_path, monkeypatch):
    weights, config = tmp_path / "weights", tmp_path / "config"
    config.write_text("same")
    moved: list[str] = []
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (moved.append(Path(paths[0]).name), real(*paths)))
    with replacing(weights, config) as (weights_part, config_part):
        weights_part.write_text("new")
        config_part.write_text("same")
    assert moved == [".weights.part", ".config.part"]
