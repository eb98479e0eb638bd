"""What a capture asks of PyTorch, and what it leaves where it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qloralab.train.capture import captured


class FakeCuda:
    """As much of torch.cuda as a capture takes; it fails if the body does, and then leaves its stream behind."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.streams, self.options, self.states = ["main"], list[dict[str, Any]](), list[str]()
        generator = SimpleNamespace(clone_state=lambda: "new", graphsafe_set_state=self.states.append)
        for name, value in {
            "CUDAGraph": lambda: SimpleNamespace(replay="replayed"),
            "default_generators": (generator,),
            "current_device": lambda: 0,
            "current_stream": lambda: self.streams[-1],
            "stream": self.stream,
            "graph": self.graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    @contextmanager
    def stream(self, stream: str) -> Iterator[None]:
        before = list(self.streams)
        try:
            yield
        finally:
            self.streams = before

    @contextmanager
    def graph(self, graph: Any, **options: Any) -> Iterator[None]:
        self.options.append(options)
        self.streams.append("capture")
        yield
        self.streams.pop()


def test_a_capture_that_fails_leaves_no_trace(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    stream: Any = "side"
    assert captured(lambda: None, "pool", stream) == "replayed"
    assert cuda.options == [{"pool": "pool", "stream": "side"}]
    assert (cuda.streams, cuda.states) == (["main"], [])

    def fail() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        captured(fail, "pool", stream)
    assert (cuda.streams, cuda.states) == (["main"], ["new"])
