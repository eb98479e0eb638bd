"""How an operator is declared: one object has its schema, fake, derivative and reference.

Each is a ``torch.library`` custom operator of the namespace ``qloralab``. A packed weight is seven arguments of its
schema; the functions that an operator is made of take one ``Packed`` instead. Whoever calls them passes ``*weight``.

**Two ways to run.** PyTorch's dispatcher knows the operator, and takes it where something looks at operators: under
``torch.compile`` and ``torch.export``, in a dispatch mode, a transform of ``torch.func`` or a trace, for subclasses of
``Tensor``. It costs: a custom operator whose gradient is wanted crosses from the dispatcher to Python four times, 100
to 200 microseconds of a processor, in which a GPU finishes several small layers. So an eager call of plain tensors goes
past it: to the implementation of the device at once, or by one ``autograd.Function`` with the same derivative.

Derivatives are those of reverse mode. Forward-mode differentiation (``torch.func.jvp``, ``torch.autograd.forward_ad``)
raises NotImplementedError: PyTorch would drop the tangents of a custom operator and go on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._library.autograd import make_autograd_impl
from torch._library.custom_ops import CustomOpDef
from torch.autograd import forward_ad

from . import packed
from .packed import Packed

_Function = Callable[..., Any]


def _bits(*names: str) -> int:
    """Dispatch keys of PyTorch, a bit for each: what there is to a tensor beside its memory."""
    keys = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr() for name in names)
    return functools.reduce(int.__or__, keys)


def backend(device: str) -> int:
    """The bit of "CPU" or "CUDA"."""
    return _bits(device) & _BACKENDS


_keys_of = torch._C._dispatch_keys
_BACKENDS = 0xFFFF
# Dense memory, with autograd and autocast; not a view that is still to be negated, say.
_PLAIN = _bits("CPU", "AutogradCPU", "AutocastCPU", "CUDA", "AutogradCUDA", "AutocastCUDA", "ADInplaceOrView")


class Operator(CustomOpDef):
    """An operator. Its reference serves every device for which nothing faster is registered, and the cases that a
    faster implementation leaves out.

    Attributes:
        reference: the definition in plain PyTorch, as a function of the arguments of the schema.
        implementations: what ``on`` registered, likewise, by ``backend``.
    """

    def __init__(self, schema: str, reference: _Function):
        before, found, _ = schema.partition(packed.SCHEMA)
        self._at = before.count(",") if found else None  # where the weight is among the arguments
        self.reference = self._flat(reference)
        self.implementations: dict[int, _Function] = {}
        self._eager: Any = None  # the autograd.Function
        super().__init__("qloralab", reference.__name__, schema, self.reference)
        self.register_kernel(None)(self.reference)
        derivative = make_autograd_impl(self._opoverload, self)

        def autograd(keyset, *arguments):
            if _has_tangent(arguments):
                raise NotImplementedError(f"{self._qualname} has no forward-mode derivative; use reverse mode")
            return derivative(keyset, *arguments)

        for device in ("CPU", "CUDA"):  # in front of what CustomOpDef registers for every device
            self._lib.impl(self._name, autograd, f"Autograd{device}", with_keyset=True)

    def __call__(self, *arguments: Any) -> Any:
        """The result of the implementation that serves the device of the arguments, differentiable."""
        if _is_watched():
            return self._opoverload(*arguments)
        wants, keys = False, 0
        for argument in arguments:
            kind = type(argument)
            if kind is Tensor or kind is nn.Parameter:
                wants = wants or argument.requires_grad
                keys |= _keys_of(argument).raw_repr()
            elif isinstance(argument, Tensor):
                keys = ~_PLAIN
        wants = wants and torch.is_grad_enabled()
        run = None if keys & ~_PLAIN else self.implementations.get(keys & _BACKENDS)
        if run is None or (wants and self._eager is None):
            return self._opoverload(*arguments)
        return self._eager.apply(*arguments) if wants else run(*arguments)

    def fake(self, function: _Function) -> _Function:
        """Register what gives results of the right shapes, for ``torch.compile``."""
        return self.register_fake(self._flat(function))

    def derivative(self, keep: Callable[..., None], backward: Callable[..., tuple[Any, ...]]) -> None:
        """Register the derivative.

        Args:
            keep: ``keep(ctx, output, *arguments)`` keeps what backward needs.
            backward: ``backward(ctx, *grads)`` gives a gradient or None for each argument, None for a weight.
        """

        def all_gradients(ctx, *grads):
            found, at = backward(ctx, *grads), self._at
            return found if at is None else (*found[:at], *[None] * len(Packed._fields), *found[at + 1 :])

        keep_flat = self._flat(keep, first=2)
        self.register_autograd(all_gradients, setup_context=lambda ctx, inputs, output: keep_flat(ctx, output, *inputs))

        def forward(ctx, *arguments):
            output = self.implementations[_keys_of(arguments[0]).raw_repr() & _BACKENDS](*arguments)
            keep_flat(ctx, output, *arguments)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(all_gradients)}
        self._eager = type(self._name, (torch.autograd.Function,), methods)

    def on(
        self, device: str, around: Callable[[_Function], _Function] | None = None
    ) -> Callable[[_Function], _Function]:
        """Register an implementation for a device, and make it a function of the arguments of the schema.

        This goes past ``register_kernel``, which looks at every call whether a result is an argument: that takes as
        long as a small product.

        Args:
            device: "CPU" or "CUDA".
            around: a wrapper of the function of the arguments.
        """

        def register(function: _Function) -> _Function:
            flat = self._flat(function) if around is None else around(self._flat(function))
            torch.library.impl(self._qualname, device, flat)
            self.implementations[backend(device)] = flat
            return flat

        return register

    def _flat(self, function: _Function, first: int = 0) -> _Function:
        """A function of a ``Packed`` as one of the arguments of the schema, which come after the ``first`` others."""
        if self._at is None:
            return function
        at = first + self._at
        end = at + len(Packed._fields)

        @functools.wraps(function)
        def of_arguments(*arguments: Any) -> Any:
            return function(*arguments[:at], Packed._make(arguments[at:end]), *arguments[end:])

        return of_arguments


def operator(schema: str) -> Callable[[_Function], Operator]:
    """Declare a function, the reference, as an operator of its name."""
    return lambda reference: Operator(schema, reference)


def _is_watched() -> bool:
    """Whether something looks at the operators that run, and so is to see this one."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]
        or forward_ad._current_level >= 0
    )


def _has_tangent(arguments: Sequence[Any]) -> bool:
    return forward_ad._current_level >= 0 and any(
        isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in arguments
    )
