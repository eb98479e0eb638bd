"""One CUDA graph out of a function that launches kernels, and no trace of an attempt that fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def captured(run: Callable[[], None], pool: Any = None, stream: torch.cuda.Stream | None = None) -> Callable[[], None]:
    """A function as a CUDA graph, to be called in its place.

    Args:
        run: is run once, on the stream, and launches nothing.
        pool: of memory, which graphs can share; None: its own.
        stream: to capture on; None: one of PyTorch's.

    Raises:
        RuntimeError: it cannot be captured.
    """
    graph, generator = torch.cuda.CUDAGraph(), torch.cuda.default_generators[torch.cuda.current_device()]
    try:
        # A capture that fails leaves its stream the current one, and the generator as if it went on.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=pool, stream=stream):
            run()
    except BaseException:
        generator.graphsafe_set_state(generator.clone_state())
        raise
    return graph.replay
