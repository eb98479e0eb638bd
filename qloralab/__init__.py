"""QLoRA (arXiv 2305.14314) from scratch: NF4 weights, double quantization, adapters beside every linear layer.

The folders ``nf4/`` and ``lora/`` at the root of the repository are the packages ``qloralab.nf4`` and
``qloralab.lora``.
"""

import os as _os
from pathlib import Path as _Path

# Read when torch loads OpenMP, so it comes first: threads that wait sleep. By default they spin, and two busy processes
# on one machine then slow each other more than tenfold.
_os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# In a checkout, the folders beside this one are subpackages; installed, they already are below it.
_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and str(_root) not in __path__:
    __path__.append(str(_root))

from qloralab.lora.config import LoraConfig  # noqa: E402
from qloralab.lora.files import load_adapter_, save_adapter  # noqa: E402
from qloralab.lora.inject import inject_, linear_names, quantize_, trainable  # noqa: E402
from qloralab.nf4.codebook import normal_float  # noqa: E402
from qloralab.nf4.errors import FormatError  # noqa: E402
from qloralab.nf4.tensor import QuantizedTensor, linear, quantize  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "FormatError",
    "LoraConfig",
    "QuantizedTensor",
    "inject_",
    "linear",
    "linear_names",
    "load_adapter_",
    "normal_float",
    "quantize",
    "quantize_",
    "save_adapter",
    "trainable",
]
