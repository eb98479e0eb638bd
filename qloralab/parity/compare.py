"""``qloralab parity``: this library beside an installed bitsandbytes, looking for the first bit that differs.

Codebooks, codes, scales, second-level codes and scales, the weights that they stand for, products in both directions
and the bytes of files are compared, for NF4 and FP4 in three dtypes, on random, hostile and real weights. What may
differ is listed in ``rows.py`` with its reason; anything else makes the comparison fail. Where bitsandbytes is
wrong, a float64 oracle says so (``peer.py``, which also says what of bitsandbytes is called, and what never is).

The comparison is of what runs on this machine's CPU: our C kernels where they compile, the reference otherwise.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qloralab.kernels.cpu import operators as _cpu_kernels  # noqa: F401  # serve the operators from here on
from qloralab.kernels.report import implementations

from . import checks, peer
from .edges import compare_edges
from .rows import Row, Rows
from .tensors import (
    DTYPES,
    Sample,
    hostile_samples,
    linear_weights,
    random_samples,
    real_samples,
    short,
    split_row_samples,
)

WEIGHTS = 10_000_000
PRODUCTS = ((64, 64, 1), (192, 256, 7), (576, 1536, 33), (1536, 576, 128))  # N, K, tokens

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Report:
    """What a comparison found.

    Attributes:
        rows: one for each quantity and setting.
        facts: versions, machine, what was asked for, seconds.
    """

    rows: list[Row]
    facts: dict[str, Any]

    @property
    def fails(self) -> bool:
        """Whether something differs beyond its documented allowance."""
        return any(row.fails for row in self.rows)


def compare(
    weights: int = WEIGHTS, model: Path | None = None, seed: int = 0, progress: Progress = lambda text: None
) -> Report:
    """Compare everything.

    Args:
        weights: random ones, for each dtype and codebook; at least 32,768 are drawn.
        model: a Hugging Face directory or GGUF file whose linear layers are compared too, or None.
        seed: of all random numbers.
        progress: is told what is being compared.

    Raises:
        UserError: bitsandbytes is not installed, or there is no model at that path.
    """
    start, rows = time.perf_counter(), Rows()
    peer.functional()
    real = linear_weights(model) if model else []
    with _as_written():
        checks.compare_codebooks(rows)
        for dtype in DTYPES:
            for codebook in checks.CODEBOOKS:
                setting = f"{codebook} {short(dtype)}"
                for sample in _samples(weights, real, dtype, seed):
                    progress(f"{setting}: {sample.name}")
                    checks.compare_weight(rows, sample, codebook)
                progress(f"{setting}: products and files")
                _compare_layers(rows, real, dtype, codebook, seed)
        compare_edges(rows)
    asked = {"weights": weights, "model": model.name if model else None, "seed": seed}
    return Report(rows.all(), {**asked, **environment(), "seconds": round(time.perf_counter() - start, 1)})


def _samples(weights: int, real: list[tuple[str, torch.Tensor]], dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    yield from random_samples(weights, dtype, seed)
    yield from hostile_samples(dtype, seed)
    yield from split_row_samples(dtype, seed)
    yield from real_samples(real, dtype)


def _compare_layers(
    rows: Rows, real: list[tuple[str, torch.Tensor]], dtype: torch.dtype, codebook: str, seed: int
) -> None:
    """Products, and files: of random matrices, and of one real layer of each shape."""
    g = torch.Generator().manual_seed(seed)
    matrices = [(Sample("normal", torch.randn(N, K, generator=g).to(dtype), 64), tokens) for N, K, tokens in PRODUCTS]
    by_shape = {sample.weight.shape: sample for sample in real_samples(reversed(real), dtype)}
    matrices += [(sample, 64) for sample in by_shape.values() if sample.has_whole_rows]
    for sample, tokens in matrices:
        checks.compare_products(rows, sample, codebook, tokens, seed)
    first, _ = matrices[1]
    for other in (torch.float32, torch.bfloat16):
        if other != dtype:
            checks.compare_backward_weights(rows, first, codebook, other)
    checks.compare_files(rows, first, codebook)


def environment() -> dict[str, Any]:
    """The versions and the machine that a result depends on."""
    from ..train.run_directory import versions

    report = implementations()
    served = sorted({row["implementation"] for row in report})
    why = next((row["why"] for row in report if row["implementation"] == "native"), report[0]["why"])
    return {
        "versions": {**versions(), "bitsandbytes": version("bitsandbytes")},
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "has_avx512_bf16": bool(peer.functional().has_avx512bf16()),
        "implementation": f"{', '.join(served)}: {why}",
    }


@contextmanager
def _as_written() -> Iterator[None]:
    """bitsandbytes' PyTorch code runs as it is written, uncompiled, and its warnings of slow shapes are not shown."""
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("ignore")
        yield
