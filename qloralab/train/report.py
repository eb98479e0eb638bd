"""The two things of a run that a person looks at: the curves, and the answers before and after."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from .run_directory import Metrics


def plot_loss(metrics: Sequence[Metrics], title: str, path: Path) -> None:
    """Draw training and validation loss over the tokens seen.

    Args:
        metrics: of the run, in order.
        title: above the picture.
        path: of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    trained = [(m.tokens, m.loss) for m in metrics if m.loss is not None]
    validated = [(m.tokens, m.val_loss) for m in metrics if m.val_loss is not None]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    if trained:
        tokens, losses = zip(*trained, strict=True)
        axes.plot(tokens, losses, color="#9bb7d4", linewidth=0.8, label="training, each batch")
        axes.plot(tokens, _smooth(losses), color="#1f5fa8", linewidth=1.8, label="training, smoothed")
    if validated:
        tokens, losses = zip(*validated, strict=True)
        axes.plot(tokens, losses, "o-", color="#c0392b", linewidth=1.8, markersize=5, label="validation")
        for x, y in (validated[0], validated[-1]):
            axes.annotate(f"{y:.2f}", (x, y), xytext=(0, 7), textcoords="offset points", ha="center", color="#c0392b")
    axes.set_title(title, parse_math=False)  # the name of a model may hold "$"
    axes.set(xlabel="tokens trained on", ylabel="loss of the answer (nats per token)")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
    axes.legend(frameon=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a box is drawn for it
        figure.savefig(path, dpi=150)
    plt.close(figure)


def _smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    average, total, out = 0.0, 0.0, []
    for value in values:
        average = weight * average + (1 - weight) * value
        total = weight * total + (1 - weight)
        out.append(average / total)
    return out


def write_samples(
    path: Path, prompts: Sequence[str], answers: dict[str, Sequence[str]], sources: Sequence[str], title: str
) -> None:
    """Write held-out prompts and their answers as Markdown.

    Args:
        path: of the file.
        prompts: what was asked.
        answers: for each column ("before", "after", ...), the answers in the order of the prompts.
        sources: where the examples come from.
        title: the heading.
    """
    lines = [f"# {title}", ""]
    for i, (prompt, source) in enumerate(zip(prompts, sources, strict=True)):
        lines += [f"## {source}", "", _quote(prompt), ""]
        for name, texts in answers.items():
            lines += [f"**{name}**", "", _quote(texts[i]), ""]
    path.write_text("\n".join(lines), encoding="utf-8", errors="backslashreplace")  # a path may be no UTF-8


def _quote(text: str) -> str:
    # four spaces make code of it: nothing in a model's answer is taken for Markdown
    return "\n".join(f"    {line}" for line in text.strip().splitlines() or ["(nothing)"])
