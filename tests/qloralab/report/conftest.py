"""Runs of the tiny model to report on, and a browser that looks at the page."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qloralab.display import Display
from qloralab.settings import Settings
from qloralab.train.finetune import finetune


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, colours: Path) -> Path:
    """A folder with the runs "first" and "second", of another rank and learning rate; not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    for name, changes in (("first", {}), ("second", {"r": 4, "lr": 5e-3})):
        small = Settings(
            **{"model": model_dir, "data": str(colours), "steps": 6, "held_out": 4, "eval_every": 3, **changes},
            out=folder / name,
        )
        finetune(small, Display(Console(file=io.StringIO())))
    return folder


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """A copy of ``trained``, to spoil."""
    return Path(shutil.copytree(trained, tmp_path / "runs"))


class Browser:
    """Chromium on a pipe, in its DevTools protocol: JSON objects with a zero byte behind each.

    Attributes:
        events: what it has told, in order.
    """

    def __init__(self, process: subprocess.Popen[bytes], to: int, back: int):
        self.process, self._to, self._back = process, to, back
        self._rest, self._number = b"", 0
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol, and wait for its answer."""
        self._number += 1
        session = {"sessionId": self._session} if hasattr(self, "_session") else {}
        message = {"id": self._number, "method": method, "params": parameters, **session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda told: told.get("id") == self._number)
        assert "result" in answer, answer
        return answer["result"]

    def open(self, path: Path) -> None:
        """Show a file, and wait until it and what it asks for are loaded."""
        self.call("Page.navigate", url=path.absolute().as_uri())
        self._until(lambda told: told.get("method") == "Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in JavaScript."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def told(self, method: str) -> list[dict[str, Any]]:
        """The events of a kind."""
        return [event["params"] for event in self.events if event.get("method") == method]

    def _until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        while True:
            while b"\0" not in self._rest:
                read = os.read(self._back, 1 << 20)
                assert read, "the browser ended"
                self._rest += read
            one, _, self._rest = self._rest.partition(b"\0")
            message = json.loads(one)
            self.events.append(message)
            if wanted(message):
                return message


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"needs a browser: none of {', '.join(names)} is installed")
    (read, to), (back, write) = os.pipe(), os.pipe()
    words = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
    words += [f"--user-data-dir={tmp_path_factory.mktemp('browser')}"]
    # Chromium takes the descriptors 3 and 4.
    shell = ["sh", "-c", f'exec "$@" 3</dev/fd/{read} 4>/dev/fd/{write}', "sh"]
    with subprocess.Popen([*shell, *words], pass_fds=(read, write), stderr=subprocess.DEVNULL) as process:
        os.close(read)
        os.close(write)
        try:
            yield Browser(process, to, back)
        finally:
            process.terminate()
            process.wait(20)
            os.close(to)
            os.close(back)
