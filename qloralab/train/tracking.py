"""The numbers of a run for a tracker, which keeps many runs and compares them: W&B or trackio, with ``--track``.

trackio has the functions of wandb by their names, so one class serves both::

    run = init(project="qloralab", name=..., config=..., resume=...)
    run.log({"loss": ...}, step=...)
    finish()

They differ in how a run is found again: wandb takes the id that it gave, trackio the name. A run that goes on repeats
steps that a tracker may have already; those are left out here, for trackio would keep both.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import os
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from ..errors import UserError
from .tensorboard import NAMES

PROJECT = "qloralab"


def check(name: str) -> None:
    """Refuse, by a ``UserError``, a tracker that is not installed, before anything is read."""
    if importlib.util.find_spec(name) is None:
        raise UserError(f"--track {name} needs a package: pip install {name}")


class Tracker:
    """Writes a run into a tracker's project "qloralab".

    Args:
        name: "wandb" or "trackio".
        directory: of the run; its name is the run's.
        config: what the tracker shows beside the run.
        before: the id of the run that goes on; None for a new one.
        logged: the last step that this run has in the tracker; -1 for none.

    Attributes:
        id: the tracker's, for ``before``.

    Raises:
        Exception: whatever the tracker raises, here and in the methods.
    """

    def __init__(self, name: str, directory: Path, config: Mapping[str, Any], before: str | None, logged: int = -1):
        self._logged = -1 if before is None else logged
        self._module = module = importlib.import_module(name)
        options: dict[str, Any] = {"project": PROJECT, "name": directory.resolve().name}
        options["config"] = json.loads(json.dumps(config, default=str))
        options["resume"] = "never" if before is None else "allow"
        if name == "wandb":
            options |= {"id": before, "dir": str(directory), "mode": _mode(module)}
            options["settings"] = module.Settings(console="off", silent=True)
        with redirect_stdout(io.StringIO()):  # trackio's welcome
            self._run = module.init(**options)
        self.id = str(self._run.id)

    def log(self, metrics: Mapping[str, float | None]) -> None:
        """Add what was measured in a step, whose number is ``metrics["step"]``, where the tracker lacks it."""
        step = metrics["step"]
        assert step is not None
        if step > self._logged:
            self._run.log({name: metrics[name] for name in NAMES if metrics[name] is not None}, step=int(step))

    def close(self) -> None:
        """Write what is left. With W&B online this waits until all is sent."""
        with redirect_stdout(io.StringIO()):
            self._module.finish()


def _mode(wandb: Any) -> str | None:
    """What WANDB_MODE says; without it and without a login offline, where wandb would ask for a key, or fail."""
    if "WANDB_MODE" in os.environ:
        return None
    return None if wandb.login(prompt=False, verify=False) else "offline"
