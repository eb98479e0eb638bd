"""QLoRA (arXiv 2305.14314) from scratch: NF4 weights, double quantization, adapters beside every linear layer.

The folders ``nf4/``, ``kernels/``, ``optim/`` and ``lora/`` at the root of the repository are the packages
``qloralab.nf4``, ``qloralab.kernels``, ``qloralab.optim`` and ``qloralab.lora``.

The public names are imported when they are first used (PEP 562): ``import qloralab`` alone loads no torch, so that the
command answers ``--help`` at once.
"""

import os as _os
from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:  # "as" says that a name is public
    from qloralab.lora.config import LoraConfig as LoraConfig
    from qloralab.lora.files import save_adapter as save_adapter
    from qloralab.lora.inject import inject_ as inject_
    from qloralab.lora.inject import load_adapter_ as load_adapter_
    from qloralab.lora.inject import trainable as trainable
    from qloralab.lora.merge import merge_ as merge_
    from qloralab.lora.merge import unmerge_ as unmerge_
    from qloralab.nf4.codebook import normal_float as normal_float
    from qloralab.nf4.data_type import DATA_TYPES as DATA_TYPES
    from qloralab.nf4.data_type import DataType as DataType
    from qloralab.nf4.files.errors import FormatError as FormatError
    from qloralab.nf4.model import linear_names as linear_names
    from qloralab.nf4.model import quantize_ as quantize_
    from qloralab.nf4.tensor import QuantizedTensor as QuantizedTensor
    from qloralab.nf4.tensor import linear as linear
    from qloralab.nf4.tensor import quantize as quantize
    from qloralab.optim.paged_adamw import PagedAdamW as PagedAdamW

    from .checkpoint.quantized_model import load_quantized as load_quantized
    from .checkpoint.quantized_model import save_quantized as save_quantized
    from .train.checkpoint import load_checkpoint_ as load_checkpoint_
    from .train.checkpoint import save_checkpoint as save_checkpoint

# Read when torch loads OpenMP, so it comes first: threads that wait sleep. By default they spin, and two busy processes
# on one machine then slow each other more than tenfold.
_os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# In a checkout, the folders beside this one are subpackages; installed, they already are below it. An editable install
# is made of links, of which a file that is new has none: modules come from where the links point to.
_here = _Path(__file__).resolve().parent
if (_here.parent / "pyproject.toml").is_file():
    __path__[:] = [str(_here), str(_here.parent)]

__version__ = "0.1.0"

_NAMES = {
    "checkpoint.quantized_model": "load_quantized save_quantized",
    "lora.config": "LoraConfig",
    "lora.files": "save_adapter",
    "lora.inject": "inject_ load_adapter_ trainable",
    "lora.merge": "merge_ unmerge_",
    "nf4.codebook": "normal_float",
    "nf4.data_type": "DATA_TYPES DataType",
    "nf4.files.errors": "FormatError",
    "nf4.model": "linear_names quantize_",
    "nf4.tensor": "QuantizedTensor linear quantize",
    "optim.paged_adamw": "PagedAdamW",
    "train.checkpoint": "load_checkpoint_ save_checkpoint",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    """A public name at its first use; from then on it is an attribute like any other."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _import_module(f"{__name__}.kernels.cpu.operators")  # from here on, C serves nf4's operators
    _import_module(f"{__name__}.kernels.gpu.operators")  # and Triton those on CUDA tensors
    _import_module(f"{__name__}.kernels.report").check_environment()
    value = getattr(_import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, used or not."""
    return sorted({*globals(), *__all__})
