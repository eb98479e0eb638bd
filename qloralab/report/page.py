"""``qloralab report``: runs on one page of HTML, which needs nothing but itself.

The page has no script and loads nothing, so that it can be mailed, archived and opened without a network; the charts
are SVG inside it (``charts.py``). What comes from a run, its names, settings, samples, is text: the template escapes
it, and a browser shows an answer that is HTML as what the model wrote.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qloralab.nf4.files.atomic import replacing

from .. import __version__
from ..checkpoint.models import model_name
from ..checkpoint.output_directory import check_writable, count_text, size_text
from ..display import Display, duration
from ..errors import UserError
from ..train.seeds import Interval
from . import charts
from .runs import Run, read_runs, read_seeds

_TEMPLATE = "page.html"
_NO_SETTINGS = (
    "out",
    "versions",
    "result",
    "notes",
    "given",
    "fingerprints",
    "init_errors",
    "resumed",
)  # of config.json


def report(paths: Sequence[Path], out: Path, display: Display | None = None) -> Path:
    """Write the page about some runs.

    Args:
        paths: see ``read_runs``.
        out: the file to write; one that is there is replaced, once the page is whole.
        display: shows what is going on.

    Returns:
        out.

    Raises:
        UserError, FormatError: a run cannot be read, or the page not be written.
    """
    display = display or Display()
    if out.is_dir():
        raise UserError(f"{out} is a directory; give --out the name of a file")
    check_writable(out, out.absolute().parent)
    with display.busy("reading the runs"):
        runs, seeds = read_runs(paths), read_seeds(paths)
    with display.busy("drawing"):
        text = page(runs, seeds)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as (part,):
            part.write_text(text, encoding="utf-8", errors="backslashreplace")  # a path may be no UTF-8
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from error
    display.fact("report", f"{out}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {size_text(out.stat().st_size)}")
    return out


def page(runs: Sequence[Run], seeds: Sequence[tuple[Path, dict[str, Any]]] = ()) -> str:
    """The page as text.

    Args:
        runs: at least one.
        seeds: see ``read_seeds``.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    settings, versions = _table(runs, [_settings(run) for run in runs]), _table(runs, [_versions(run) for run in runs])
    drawn = {
        "learning rate": charts.column(runs, "lr", "learning rate"),
        "gradient norm, before clipping": charts.column(runs, "grad_norm", "norm", log=True),
        "speed": charts.column(runs, "tokens_per_s", "tokens per second"),
        "resident memory": charts.column(runs, "rss_mb", "GB", scale=1e-3),
    }
    return environment.get_template(_TEMPLATE).render(
        title=f"{', '.join(run.name for run in runs[:4])}{' and more' if len(runs) > 4 else ''}",
        runs=[{**_result(run), "colour": charts.colour(i), "dash": charts.dash(i)} for i, run in enumerate(runs)],
        seeds=[one for path, fields in seeds if (one := _seeds(path, fields))],
        losses=Markup(charts.losses(runs)),
        charts={name: Markup(chart) for name, chart in drawn.items()},
        adapters=Markup(charts.adapters(runs)) if any(run.updates for run in runs) else None,
        updates=[_updates(run) for run in runs if run.updates],
        settings=settings,
        versions=versions,
        samples=_samples(runs),
        notes=[(run.name, note) for run in runs for note in run.notes],
        version=__version__,
    )


def _result(run: Run) -> dict[str, str]:
    """The line of a run in the first table."""
    validated = [line for line in run.metrics if line.val_loss is not None]
    before, after = (validated[0], validated[-1]) if validated else (None, None)
    last, seconds = run.metrics[-1], run.seconds
    change = "—"
    if before and after and before is not after:
        change = f"{(after.val_loss or 0) - (before.val_loss or 0):+.3f}"
    return {
        "name": run.name,
        "path": str(run.path),
        "model": model_name(Path(str(run.config.get("model", "—")))),
        "method": str(run.config.get("method", "—")),
        "steps": f"{last.step:,} of {run.config.get('steps', '?')}",
        "tokens": f"{last.tokens:,}",
        "before": "—" if before is None or before.step else f"{before.val_loss:.3f}",
        "after": "—" if after is None or not after.step else f"{after.val_loss:.3f}",
        "after_step": f"after step {after.step:,}" if after and after.step not in (0, last.step) else "",
        "change": change,
        "speed": f"{last.tokens / seconds:,.0f}" if seconds else "—",
        "memory": f"{run.peak_mb / 1000:.2f} GB",
        "time": duration(seconds) if seconds else "—",
        "state": run.state,
    }


def _seeds(path: Path, fields: dict[str, Any]) -> dict[str, str] | None:
    """The means of ``seeds.json`` in words; None where it holds others than this version writes."""
    try:
        means = {name: str(Interval(**fields[name])) for name in ("val_before", "val_after", "change")}
        return {"path": str(path), "count": str(len(fields["runs"])), **means}
    except (KeyError, TypeError, ValueError):
        return None


def _settings(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run.config.items() if name not in _NO_SETTINGS}


def _versions(run: Run) -> dict[str, Any]:
    versions = run.config.get("versions")
    return versions if isinstance(versions, dict) else {}


def _table(runs: Sequence[Run], of_runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Names and their values in each run; those in which the runs differ first, and marked."""
    rows = []
    for name in dict.fromkeys(name for fields in of_runs for name in fields):
        values = [_shown(fields.get(name)) for fields in of_runs]
        rows.append({"name": name, "values": values, "differs": len(set(values)) > 1})
    return sorted(rows, key=lambda row: not row["differs"])


def _shown(value: Any) -> str:
    if value is None:
        return "—"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _updates(run: Run) -> dict[str, str]:
    """What the adapter of a run came to, over all layers."""
    ranks = [one.effective_rank for one in run.updates]
    return {
        "name": run.name,
        "layers": str(len(run.updates)),
        "parameters": count_text(sum(one.rank * sum(one.shape) for one in run.updates)),
        "norm": f"{math.sqrt(sum(one.norm**2 for one in run.updates)):.3g}",
        "largest": max(run.updates, key=lambda one: one.norm).layer,
        "rank": f"{sum(ranks) / len(ranks):.1f} of {max(one.rank for one in run.updates)}",
    }


def _samples(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each held-out prompt once, with the answers of all the runs that were asked it."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for index, run in enumerate(runs):
        for source, texts in run.samples:
            key = (source, texts.get("prompt", ""), texts.get("reference", ""))
            answers = {kind: text for kind, text in texts.items() if kind not in ("prompt", "reference")}
            found.setdefault(key, []).append({"name": run.name, "colour": charts.colour(index), "texts": answers})
    return [
        {"source": source, "prompt": prompt, "reference": reference, "answers": answers}
        for (source, prompt, reference), answers in found.items()
    ]
