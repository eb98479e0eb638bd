"""How long the rest of a run takes, from its first steps, and what would make it shorter."""

from __future__ import annotations

from qloralab.kernels import report

from ..compute import Precision
from ..settings import Settings
from .run_directory import Metrics

LONG = 30 * 60.0  # seconds from which on it is worth a line


def seconds_left(settings: Settings, metrics: Metrics, tokens_per_step: float, validation_s: float) -> float:
    """The seconds of training and validation after a step, at its pace.

    Args:
        settings: of the run.
        metrics: of the step.
        tokens_per_step: on average.
        validation_s: seconds that one validation takes.
    """
    assert metrics.tokens_per_s is not None
    later = range(metrics.step + 1, settings.steps + 1)
    validations = sum(number % settings.eval_every == 0 or number == settings.steps for number in later)
    return len(later) * tokens_per_step / metrics.tokens_per_s + validations * validation_s


def note(settings: Settings, step: int, seconds: float, precision: Precision, device: str) -> str:
    """The line about a run on a device ("cpu" or "cuda") that takes that many seconds more after a step."""
    ways = ["fewer --steps", "a smaller --max-length"]
    if precision.slow:
        ways.insert(0, "--dtype float32, which is not emulated here")
    if settings.method == "qlora" and (why := _reference_why(device)):
        ways.insert(0, f"compiled operators instead of the reference in plain PyTorch ({why})")
    left, minutes = settings.steps - step, seconds / 60
    about = f"{minutes:.0f} minutes" if minutes < 100 else f"{minutes / 60:.1f} hours"
    shorter = f"{', '.join(ways[:-1])} or {ways[-1]}"
    return f"about {about} for the {left:,} step{'s' if left > 1 else ''} left; shorter with {shorter}"


def _reference_why(device: str) -> str | None:
    """Why plain PyTorch serves the adapted layers; None where it does not."""
    row = next(row for row in report.implementations(device) if row["operator"] == "adapted_linear")
    return row["why"] if row["implementation"] == "reference" else None
