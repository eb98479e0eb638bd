"""Which layers a model reads instead of calling: their weight is taken out and multiplied by another module.

An adapter beside ``proj`` learns nothing of ``F.linear(x, self.proj.weight)``, and weights in 4 bits are no tensor to
multiply by. Torch's ``TransformerEncoderLayer`` and ``MultiheadAttention`` do that, the mixers of Mamba, and RWKV,
which rescales weights in place.

What is read is found in the source, without running it: in ``forward`` of each class of the model and the functions of
that class and its file that it names, an expression ``a.b.weight`` whose value is used. ``self.b.weight`` is the layer
b; any other ``x.a.b.weight`` stands for the layers below the module whose paths end in a.b. To look at the dtype,
device or shape uses no value. A branch that an attribute of the module rules out
(``if self.config.pretraining_tp > 1``) does not count.

A layer under another name (``proj = self.proj; proj.weight``) is not found, nor is one in a class without source. There
a dense layer with an adapter raises when its weight is used (see ``lora/layer.py``), and one in 4 bits raises
TypeError, as its weight is no ``torch.Tensor``.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from torch import nn

_METADATA = ("device", "dim", "dtype", "element_size", "is_meta", "ndim", "numel", "requires_grad", "shape", "size")
_LOOKS_AT = ("hasattr", "id", "isinstance", "type")


def weights_read(model: nn.Module) -> dict[nn.Module, str]:
    """The modules whose weight another one reads, and who does: "MambaMixer.forward"."""
    found: dict[nn.Module, str] = {}
    for module in model.modules():
        for function in _functions(type(module), type(module).forward) if module._modules else ():
            chains = _chains(_tree(function), module)
            for name, layer in module.named_modules(remove_duplicate=False) if chains else ():
                if any(re.fullmatch(chain, name) for chain in chains):
                    found.setdefault(layer, function.__qualname__)
    return found


@functools.cache
def _functions(cls: type[nn.Module], forward: Any) -> list[FunctionType]:
    """``forward`` of a class, and the functions of the class and of its file that are named on the way from there."""
    found: dict[FunctionType, None] = {}
    todo = [_function(forward)]
    while todo:
        function = todo.pop()
        if function is None or function in found:
            continue
        found[function] = None
        for node in ast.walk(_tree(function)):
            if isinstance(node, ast.Attribute) and not hasattr(nn.Module, node.attr):
                todo.append(_function(inspect.getattr_static(cls, node.attr, None)))
            elif isinstance(node, ast.Name):
                named = _function(function.__globals__.get(node.id))
                if named and named.__module__ == function.__module__:
                    todo.append(named)
    return list(found)


def _function(thing: Any) -> FunctionType | None:
    """The function behind a method, a property or a decorator."""
    thing = inspect.unwrap(getattr(thing, "fget", None) or getattr(thing, "__func__", thing))
    return thing if isinstance(thing, FunctionType) else None


@functools.cache
def _tree(function: FunctionType) -> ast.AST:
    try:
        source = inspect.getsource(function)
        return ast.parse(f"if True:\n{source}" if source[0].isspace() else source)
    except (OSError, SyntaxError):  # no source, or a lambda inside an expression
        return ast.Module([], [])


def _chains(tree: ast.AST, module: nn.Module) -> list[str]:
    """Patterns of the paths, below the module that runs a function, of the layers whose weight the function uses."""
    found = []
    for node, parent in _live(tree, tree, module):
        if not isinstance(node, ast.Attribute) or node.attr != "weight" or not isinstance(node.ctx, ast.Load):
            continue
        if (isinstance(parent, ast.Attribute) and parent.attr in _METADATA) or isinstance(parent, ast.Compare):
            continue
        if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id in _LOOKS_AT:
            continue
        parts, root = [], node.value
        while isinstance(root, ast.Attribute | ast.Subscript):
            parts.insert(0, _component(root))
            root = root.value
        if parts:
            of_self = isinstance(root, ast.Name) and root.id == "self"
            found.append(("" if of_self else r"(.+\.)?") + r"\.".join(parts))
    return found


def _component(node: ast.Attribute | ast.Subscript) -> str:
    """A pattern of the component of a path that an attribute or an index stands for."""
    if isinstance(node, ast.Attribute):
        return re.escape(node.attr)
    return re.escape(str(node.slice.value)) if isinstance(node.slice, ast.Constant) else r"[^.]+"


def _live(node: ast.AST, parent: ast.AST, module: nn.Module) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Each node and its parent, without the branches that the attributes of a module rule out."""
    yield node, parent
    known = _known(node.test, module) if isinstance(node, ast.If | ast.IfExp) else None
    for field, value in ast.iter_fields(node):
        if known is None or field != ("orelse" if known else "body"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _live(child, node, module)


def _known(test: ast.expr, module: nn.Module) -> bool | None:
    """The value of a condition on attributes of ``self`` other than ``training``; None when it takes more to know."""
    if isinstance(test, ast.BoolOp):
        values = [_known(value, module) for value in test.values]
        decides = isinstance(test.op, ast.Or)
        return decides if decides in values else None if None in values else not decides
    plain = ast.Attribute, ast.Name, ast.Constant, ast.Compare, ast.cmpop, ast.UnaryOp, ast.unaryop, ast.Load
    for node in ast.walk(test):
        if not isinstance(node, plain) or (isinstance(node, ast.Attribute) and node.attr == "training"):
            return None
    try:
        return bool(eval(compile(ast.Expression(test), "<condition>", "eval"), {"__builtins__": {}}, {"self": module}))
    except Exception:  # another variable, or whatever a property raises
        return None
