"""The picture of a record: where its points stand, and the roof over them."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import Any

import pytest
from matplotlib import pyplot as plt

from qloralab.benchmarks import gpu_plot
from qloralab.benchmarks.gpu import main
from qloralab.benchmarks.record import RECORDS, write
from qloralab.benchmarks.work import packed_bytes

PACKED = packed_bytes(4096 * 4096)


def record(provider: str, M: int, ms: float | None, **fields: Any) -> dict[str, Any]:
    return {
        "kind": "point", "operation": "linear", "shape": [4096, 4096], "M": M, "provider": provider,
        "ms": ms and {"p20": ms, "p50": ms, "p80": ms}, "device": "a GPU", "commit": "abc",
        "roofline": {"copy_gb_per_s": 2000.0, "read_gb_per_s": 3000.0, "gemm_tflop_per_s": 700.0}, **fields,
    }  # fmt: skip


def lines(records: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The lines of the first panel by their names."""
    figure, axes = plt.subplots(2, 1, squeeze=False)

    @contextmanager
    def picture(path, rows, columns, **options):
        assert (rows, columns) == axes.shape
        yield figure, axes

    monkeypatch.setattr(gpu_plot, "picture", picture)
    gpu_plot.plot(records, RECORDS / "unused.png")
    plt.close(figure)
    return {str(line.get_label()): line for line in axes[0, 0].lines}


def test_a_point_stands_at_its_operations_a_byte_and_a_second(monkeypatch):
    flops, moved = 2 * 4 * 4096 * 4096, 2 * 4 * 2 * 4096
    given = [record("ours", 4, 0.02), record("bf16", 4, 0.04), record("bitsandbytes", 4, None)]
    given.append({"kind": "canary", "name": "right"})
    found = lines(given, monkeypatch)
    assert found["ours"].get_xydata()[0] == pytest.approx([flops / (PACKED + moved), 1e-9 * flops / 0.02])
    assert found["bf16"].get_xydata()[0] == pytest.approx([flops / (2 * 4096 * 4096 + moved), 1e-9 * flops / 0.04])
    assert set(found) == {"ours", "bf16", "read 3,000 GB/s, 700 TFLOP/s", "copy 2,000 GB/s, 700 TFLOP/s"}


def test_the_roof_is_what_memory_gives_and_then_the_product(monkeypatch):
    found = lines([record("ours", M, 1.0) for M in (1, 8192)], monkeypatch)
    x, y = found["copy 2,000 GB/s, 700 TFLOP/s"].get_data()
    assert (y[0], y[-1]) == (pytest.approx(2.0 * x[0]), 700.0)
    assert found["read 3,000 GB/s, 700 TFLOP/s"].get_ydata()[0] == pytest.approx(1.5 * y[0])


@pytest.mark.parametrize("records", [[], [record("ours", 4, None)]], ids=["none", "none timed"])
def test_without_points_there_is_a_picture_of_nothing(records, tmp_path):
    gpu_plot.plot(records, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 0


def test_a_record_that_is_viewed_is_drawn_beside_it(tmp_path, capsys):
    write(json.loads((RECORDS / "gpu-nvidia-h100-80gb-hbm3.json").read_text()), tmp_path / "gpu.json")
    main(["--view", str(tmp_path / "gpu.json")])
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")
