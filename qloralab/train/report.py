"""What a person looks at: the curves, the answers before and after, and a tracker's page while it runs."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoint.models import model_name
from ..data.encoding import NO_LABEL, Encoded
from ..display import Display
from .generate import generate
from .run_directory import Metrics, RunDirectory
from .tracking import PROJECT, Tracker
from .trainer import Trainer

_SAMPLES = 3
_SAMPLE_TOKENS = 32


class Reports:
    """What a run tells beside its numbers. A part of it that cannot be made ends no run, and is a note.

    Args:
        trainer: of the run.
        tokenizer: of its model.
        display: shows the notes too.

    Attributes:
        notes: for config.json.
        answers: to the held-out prompts, before and after training.
    """

    def __init__(self, trainer: Trainer, tokenizer: Any, display: Display):
        self.notes: list[str] = []
        self._trainer, self._tokenizer, self._display = trainer, tokenizer, display
        self._examples = trainer.held_out[:_SAMPLES]
        self._samples = [prompt_and_answer(example) for example in self._examples]
        self.answers: dict[str, list[str]] = {}
        self._tracker: Tracker | None = None

    def answer(self, when: str) -> None:
        """Answer the held-out prompts, "before" or "after" training."""
        prompts, trainer = [prompt for prompt, _ in self._samples], self._trainer
        if not (trainer.processes.first or trainer.processes.sharded):
            return
        with (
            self._optional(f"answers {when} training"),
            trainer.processes.whole(trainer.loss),
            self._display.busy(f"answering held-out prompts {when} training", "tokens") as progress,
        ):
            self.answers[when] = generate(trainer.model, self._tokenizer, prompts, _SAMPLE_TOKENS, progress)

    def write(self, run: RunDirectory) -> None:
        """Write loss.png and samples.md."""
        settings = self._trainer.settings
        title = f"{model_name(settings.model)}, {settings.method}, {self._trainer.step} steps"
        with self._optional("loss.png"):
            plot_loss(run.metrics, title, run.path / "loss.png")
        with self._optional("samples.md"):
            prompts, references = (
                [self._tokenizer.decode(ids, skip_special_tokens=False) for ids in column]
                for column in zip(*self._samples, strict=True)
            )
            answers = {**self.answers, "reference": references}
            write_samples(run.path / "samples.md", prompts, answers, [one.source for one in self._examples], title)

    def follow(self, run: RunDirectory) -> None:
        """Begin to follow the run in its tracker, if the settings name one, or go on there."""
        if (name := self._trainer.settings.track) is None or not self._trainer.processes.first:
            return
        with self._optional(name), self._display.busy(f"starting {name}"):
            self._tracker = Tracker(name, run.path, run.config, run.config.get("tracker_id"), run.logged)
            run.update_config(tracker_id=self._tracker.id)
            self._display.fact(name, f"project {PROJECT}, run {self._tracker.id}")

    def track(self, metrics: Metrics) -> None:
        """Log a step in the tracker. The first failure is the last."""
        if (tracker := self._tracker) is not None:
            self._tracker = None
            with self._optional(f"more in {self._trainer.settings.track}"):
                tracker.log(dataclasses.asdict(metrics))
                self._tracker = tracker

    def close(self) -> None:
        """End the run in its tracker."""
        if self._tracker is not None:
            with self._optional(f"end in {self._trainer.settings.track}"):
                self._tracker.close()

    @contextmanager
    def _optional(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.notes.append(f"no {what}: {' '.join(str(error).split()) or type(error).__name__}")
            self._display.fact("note", self.notes[-1])


def prompt_and_answer(example: Encoded) -> tuple[list[int], list[int]]:
    """The tokens before the last answer, and that answer. A text without a question is cut after 16 tokens."""
    labels = example.labels
    end = max(i for i, label in enumerate(labels) if label != NO_LABEL) + 1
    start = end
    while start > 0 and labels[start - 1] != NO_LABEL:
        start -= 1
    start = start or min(16, end - 1)
    return example.input_ids[:start], example.input_ids[start:end]


def plot_loss(metrics: Sequence[Metrics], title: str, path: Path) -> None:
    """Draw training and validation loss over the tokens seen, as a PNG with a title."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    trained = [(m.tokens, m.loss) for m in metrics if m.loss is not None]
    validated = [(m.tokens, m.val_loss) for m in metrics if m.val_loss is not None]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    if trained:
        tokens, losses = zip(*trained, strict=True)
        axes.plot(tokens, losses, color="#9bb7d4", linewidth=0.8, label="training, each batch")
        axes.plot(tokens, smooth(losses), color="#1f5fa8", linewidth=1.8, label="training, smoothed")
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


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
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
    """Write held-out prompts as Markdown, each with its source and its answer of each kind ("before", "after", ...)."""
    lines = [f"# {title}", ""]
    for i, (prompt, source) in enumerate(zip(prompts, sources, strict=True)):
        lines += [f"## {source}", "", _quote(prompt), ""]
        for name, texts in answers.items():
            lines += [f"**{name}**", "", _quote(texts[i]), ""]
    path.write_text("\n".join(lines), encoding="utf-8", errors="backslashreplace")  # a path may be no UTF-8


def _quote(text: str) -> str:
    # four spaces make code of it: nothing in a model's answer is taken for Markdown
    return "\n".join(f"    {line}" for line in text.strip().splitlines() or ["(nothing)"])


def read_samples(path: Path) -> list[tuple[str, dict[str, str]]]:
    """What ``write_samples`` wrote: of each held-out prompt the source, and its texts by kind, "prompt" first."""
    found: list[tuple[str, dict[str, list[str]]]] = []
    name = ""
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line.startswith("## "):
            name = "prompt"
            found.append((line[3:], {}))
        elif line.startswith("**"):
            name = line.strip("*")
        elif line.startswith("    ") and found:
            found[-1][1].setdefault(name, []).append(line[4:])
    return [(source, {kind: "\n".join(lines) for kind, lines in texts.items()}) for source, texts in found]
