"""How long the rest of a run takes, from its first steps, and what would make it shorter."""

from __future__ import annotations

from qloralab.kernels import report

from ..compute import Precision
from ..settings import Settings

LONG = 30 * 60.0  # seconds from which on it is worth a line


def seconds_left(
    settings: Settings, step: int, tokens_per_step: float, tokens_per_s: float, validation_s: float
) -> float:
    """Of training and validation, after a step.

    Args:
        settings: of the run.
        step: that was done.
        tokens_per_step: on average.
        tokens_per_s: of the step.
        validation_s: seconds that one validation takes.
    """
    later = range(step + 1, settings.steps + 1)
    validations = sum(number % settings.eval_every == 0 or number == settings.steps for number in later)
    return len(later) * tokens_per_step / tokens_per_s + validations * validation_s


def note(settings: Settings, step: int, seconds: float, precision: Precision, device: str) -> str:
    """The line about a run that takes long.

    Args:
        settings: of the run.
        step: that was done.
        seconds: that are left.
        precision: of the run.
        device: "cpu" or "cuda".
    """
    ways = ["fewer --steps", "a smaller --max-length"]
    if precision.slow:
        ways.insert(0, "--dtype float32, which is not emulated here")
    if settings.method == "qlora" and (why := _reference_why(device)):
        ways.insert(0, f"compiled operators instead of the reference in plain PyTorch ({why})")
    left = settings.steps - step
    return f"about {_about(seconds)} for the {left:,} step{'s' if left > 1 else ''} left; shorter with {_or(ways)}"


def _reference_why(device: str) -> str | None:
    """Why plain PyTorch serves the adapted layers; None where it does not."""
    rows = {row["operator"]: row for row in report.implementations(device)}
    row = rows["adapted_linear"]
    return row["why"] if row["implementation"] == "reference" else None


def _about(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes < 100 else f"{minutes / 60:.1f} hours"


def _or(ways: list[str]) -> str:
    return f"{', '.join(ways[:-1])} or {ways[-1]}"
