"""What a run computes with: the device, the dtype of the products and why, what the environment asks for.

``--dtype auto`` follows the device (``nf4/processor.py``): the paper's bfloat16 where hardware multiplies it, otherwise
float32. That is the dtype of the activations, the attention and the head, and of the products with 4-bit weights. The
other two are honoured everywhere, and said to be slow where they are.
"""

from __future__ import annotations

import dataclasses

import torch

from qloralab.kernels import dispatch, report
from qloralab.kernels.cpu import allocator
from qloralab.kernels.cpu.build import BuildError
from qloralab.nf4 import processor

from .display import Display
from .errors import UserError
from .settings import Dtype, Method


@dataclasses.dataclass(frozen=True)
class Precision:
    """The dtype that a run computes in.

    Attributes:
        dtype: bfloat16 or float32.
        why: a phrase for a person.
        slow: whether the device emulates products of that dtype.
    """

    dtype: torch.dtype
    why: str
    slow: bool

    @property
    def name(self) -> Dtype:
        """The dtype as ``--dtype`` takes it."""
        return "bfloat16" if self.dtype == torch.bfloat16 else "float32"

    def described(self, method: Method | None = None) -> str:
        """The line of a run. Full fine-tuning has weights of its own: float32, whatever its products are in."""
        if method != "full":
            what = self.name
        elif self.dtype == torch.bfloat16:
            what = "float32 weights, bfloat16 products (autocast)"
        else:
            what = "float32, weights and products"
        return f"{what}: {self.why}"


def run_device() -> torch.device:
    """Where a run computes: on the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def precision(asked: Dtype, device: torch.device) -> Precision:
    """What ``--dtype`` comes to on a device.

    Raises:
        UserError: QLORALAB_ISA cannot be honoured.
    """
    check_environment()
    dtype, why = processor.compute_dtype(device)
    if asked == "auto":
        return Precision(dtype, why, slow=False)
    chosen = torch.bfloat16 if asked == "bfloat16" else torch.float32
    slow = chosen == torch.bfloat16 and dtype == torch.float32
    return Precision(chosen, f"asked for{', but slow' if slow else ''}; {why}", slow)


def check_environment() -> None:
    """Refuse what environment variables ask for and cannot have, before anything is read.

    Raises:
        UserError: see ``report.check_environment``.
    """
    try:
        report.check_environment()
    except ValueError as error:
        raise UserError(str(error)) from None


def prepare_kernels(display: Display) -> None:
    """Compile the C now if it was not compiled before, so that no step of a run includes that.

    Raises:
        UserError: QLORALAB_CPU=native, and it cannot be compiled.
    """
    try:
        with display.busy("preparing the CPU kernels"):
            dispatch.native()
    except BuildError as error:
        first, *more = str(error).splitlines()
        reason = " ".join([first, *more[:1]])
        raise UserError(f"{dispatch.VARIABLE}=native, but there are no CPU kernels: {reason}") from None


def prepare_memory(display: Display) -> None:
    """On CPUs, let what a tensor leaves serve the next one of its size (``kernels/cpu/allocator.py``).

    A note says where that cannot be had. Not with QLORALAB_CPU=reference, under which nothing is compiled.
    """
    if run_device().type != "cpu" or dispatch.mode() == "reference":
        return
    try:
        allocator.install()
    except BuildError:
        display.fact("note", "training takes up to a quarter more memory without a C++ compiler (g++)")
