"""The walls of the house: which folder may import which, how the folders are packaged, what is loaded once.

A folder is named after what it is. Arrows point one way, so that ``nf4/`` can be read alone and ``lora/`` never learns
which kernel serves it. The packaging rule exists because ``kernels`` is also the name of a package of Hugging Face's.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch._library.custom_ops import CustomOpDef

from qloralab.lora import ops as lora_ops
from qloralab.nf4 import ops as nf4_ops

ROOT = Path(__file__).resolve().parent.parent
ARROWS = {
    "nf4": set(),
    "kernels": {"lora", "nf4"},
    "optim": {"kernels"},
    "lora": {"nf4"},
    "benchmarks.sass": {"kernels"},  # `qloralab sass` is a door to it, so it is packaged; the other benchmarks are not
    "qloralab": {"lora", "optim", "kernels", "nf4", "benchmarks.sass"},
    "benchmarks": {"qloralab", "lora", "optim", "kernels", "nf4"},
}
FOLDERS = [name for name in ARROWS if "." not in name]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def sources(*folders: str) -> list[Path]:
    """The Python files of these folders, relative to the root."""
    return sorted(path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """The one name that a file may be loaded under: nf4/ops.py is qloralab.nf4.ops."""
    parts = path.with_suffix("").parts
    parts = parts if parts[0] == "qloralab" else ("qloralab", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(*parts: str) -> str:
    """Which of `ARROWS` a path or a name below qloralab belongs to."""
    return next((name for name in (".".join(parts[:2]), parts[0]) if name in ARROWS), "qloralab")


PACKAGED = [path for path in sources(*FOLDERS) if room(*path.parts) != "benchmarks"]
MODULES = [module_name(path) for path in PACKAGED]


def imported(node: ast.Import | ast.ImportFrom, path: Path) -> list[str]:
    """The absolute dotted names that one import statement of the file `path` asks for."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base: list[str] = []
    if node.level:
        package = module_name(path).split(".")
        package = package if path.name == "__init__.py" else package[:-1]
        base = package[: len(package) - node.level + 1]
    if node.module:
        base += node.module.split(".")
    return [".".join([*base, alias.name]) for alias in node.names]


def violations(source: str, path: Path) -> list[str]:
    """Each import of `source`, read as the file `path`, that the house does not allow, as "file:line: why"."""
    here, found = room(*path.parts), []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        for name in imported(node, path):
            first, *rest = name.split(".")
            if first in ARROWS and first != "qloralab":
                why = f"{name} is a top-level name; ours is qloralab.{name}"
            elif first != "qloralab":
                continue
            else:
                there = room(*rest, "")
                if there == here and not relative:
                    why = f"{name} is in the same folder; import it relatively"
                elif there != here and there not in ARROWS[here]:
                    why = f"no arrow points from {here} to {there} ({name})"
                elif there != here and relative:
                    why = f"{name} is in another folder; name it in full"
                else:
                    continue
            found.append(f"{path}:{node.lineno}: {why}")
    return found


def test_imports_follow_the_arrows():
    found = [line for path in sources(*FOLDERS) for line in violations((ROOT / path).read_text(), path)]
    assert not found, "\n".join(["", *found])


@pytest.mark.parametrize(
    ("path", "source", "why"),
    [
        ("nf4/ops.py", "from qloralab.lora.layer import f", "no arrow points from nf4 to lora"),
        ("nf4/ops.py", "from ..lora import layer", "no arrow points from nf4 to lora"),
        ("nf4/ops.py", "from .. import lora", "no arrow points from nf4 to lora"),
        ("nf4/ops.py", "import qloralab", "no arrow points from nf4 to qloralab"),
        ("nf4/ops.py", "from qloralab import quantize", "no arrow points from nf4 to qloralab"),
        ("nf4/ops.py", "def f():\n    import qloralab.kernels.dispatch", "no arrow points from nf4 to kernels"),
        ("nf4/ops.py", "import lora.layer", "is a top-level name"),
        ("nf4/ops.py", "from qloralab.nf4 import double_quant", "import it relatively"),
        ("optim/adamw.py", "from qloralab.nf4 import double_quant", "no arrow points from optim to nf4"),
        ("lora/layer.py", "from ..nf4 import ops", "name it in full"),
        ("qloralab/cli.py", "from .lora import layer", "name it in full"),
        ("qloralab/__init__.py", "from .nf4.ops import f", "name it in full"),
        ("kernels/gpu/gemm.py", "from ...optim import pager", "no arrow points from kernels to optim"),
        ("kernels/gpu/gemm.py", "from qloralab.benchmarks import case", "no arrow points from kernels to benchmarks"),
        ("qloralab/cli.py", "from qloralab.benchmarks import case", "no arrow points from qloralab to benchmarks"),
        ("benchmarks/cpu.py", "from benchmarks.case import Case", "is a top-level name"),
        ("benchmarks/sass/compile.py", "from ..case import Case", "no arrow points from benchmarks.sass to benchmarks"),
    ],
)
def test_a_wrong_import_is_found(path, source, why):
    (found,) = violations(source, Path(path))
    assert why in found
    assert found.startswith(f"{path}:{source.count(chr(10)) + 1}: ")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("nf4/ops.py", "from . import double_quant\nfrom .blockwise import f\nimport torch"),
        ("lora/layer.py", "from qloralab.nf4 import ops"),
        ("optim/adamw.py", "from qloralab.kernels.dispatch import f"),
        ("qloralab/__init__.py", "from qloralab.nf4.ops import f\nfrom .resident import g"),
        ("kernels/gpu/gemm.py", "from ..dispatch import f\nfrom qloralab.nf4 import codebook"),
        ("benchmarks/cpu.py", "from .case import Case\nfrom qloralab.lora import layer\nimport qloralab"),
        ("qloralab/commands.py", "from qloralab.benchmarks.sass.report import sass"),
    ],
)
def test_a_right_import_is_left_alone(path, source):
    assert violations(source, Path(path)) == []


def seen_at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below one, at any depth, without what only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        yield child
        yield from seen_at_run_time(child)


def arrows(source: str, path: Path, operators: dict[str, str]) -> set[str]:
    """The modules that a source asks for: by imports, inside functions too, and by the names of operators in strings.

    Args:
        source: read as the file `path`.
        operators: the module that declares each operator of the namespace ``qloralab``, by its name.
    """
    found = set()
    for node in seen_at_run_time(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {part for name in imported(node, path) for part in (name, name.rpartition(".")[0])}
    for names in re.findall(r"torch\.ops\.qloralab\.(\w+)|qloralab::(\w+)", source):
        found |= {operators[name] for name in names if name in operators}
    return found & {*MODULES} - {module_name(path)}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules that reach themselves."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = graph[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    return [name for name in graph if name in reached(name)]


def test_no_circle_of_imports():
    operators = {
        name: module.__name__
        for module in (nf4_ops, lora_ops)
        for name, value in vars(module).items()
        if isinstance(value, CustomOpDef)
    }
    assert operators["linear"] == "qloralab.nf4.ops"
    assert operators["adapted_linear"] == "qloralab.lora.ops"
    graph = {module_name(path): arrows((ROOT / path).read_text(), path, operators) for path in sources(*ARROWS)}
    assert circle(graph) == []


@pytest.mark.parametrize(
    "source",
    [
        "from .reference import f",
        "def f():\n    from . import reference",
        "import qloralab.nf4.reference",
        "y = torch.ops.qloralab.of_reference(x)",
        "impl('qloralab::of_reference', 'CPU', f)",
    ],
)
def test_a_circle_is_found(source, monkeypatch):
    ours = {"qloralab.nf4.ops", "qloralab.nf4.reference"}
    monkeypatch.setitem(globals(), "MODULES", [*ours])
    of_ops = arrows(source, Path("nf4/ops.py"), {"of_reference": "qloralab.nf4.reference"})
    graph = {"qloralab.nf4.ops": of_ops, "qloralab.nf4.reference": {"qloralab.nf4.ops"}}
    assert sorted(circle(graph)) == sorted(ours)


def test_what_only_type_checkers_see_is_no_arrow():
    source = "if TYPE_CHECKING:\n    from .tensor import QuantizedTensor"
    assert arrows(source, Path("nf4/ops.py"), {}) == set()


def test_no_init_where_it_would_make_a_top_level_package():
    forbidden = [ROOT, *(ROOT / folder for folder in FOLDERS if folder != "qloralab")]
    found = [folder / "__init__.py" for folder in forbidden if (folder / "__init__.py").exists()]
    found += (ROOT / "tests").rglob("__init__.py")
    assert not found


def test_every_folder_with_modules_is_packaged():
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == {
        module_name(path.parent / "__init__.py") for path in PACKAGED
    }


def test_every_c_file_is_packaged():
    data = PYPROJECT["tool"]["setuptools"]["package-data"]
    packages = PYPROJECT["tool"]["setuptools"]["packages"]
    c_files = [path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.[ch]")]
    c_files = [path for path in c_files if module_name(path.parent / "__init__.py") in packages]
    assert c_files
    missing = [
        path
        for path in c_files
        if not any(path.match(pattern) for pattern in data.get(module_name(path.parent / "__init__.py"), []))
    ]
    assert not missing


def test_every_folder_is_measured_and_type_checked():
    folders = {*FOLDERS, "tests"}
    assert {path.parts[0] for path in PACKAGED} <= set(PYPROJECT["tool"]["coverage"]["run"]["source"])
    assert folders == set(PYPROJECT["tool"]["pyright"]["include"])


@pytest.mark.parametrize("name", [folder for folder in FOLDERS if folder != "qloralab"])
def test_a_folder_does_not_shadow_an_installed_package(name, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    found = run_python(f"import json, {name}; print(json.dumps({name}.__file__))", ROOT, PYTHONPATH=str(tmp_path))
    assert found == str(tmp_path / name / "__init__.py")


@pytest.mark.parametrize("path", sources(*FOLDERS), ids=str)
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse((ROOT / path).read_text()))


LOAD = """
import importlib, json, os, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
for name in NAMES:
    importlib.import_module(name)
files = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
print(json.dumps({name: os.path.realpath(file) for name, file in files.items() if file}))
"""


def run_python(code: str, cwd: Path, **environment: str):
    """What `code` prints as JSON, run by a fresh interpreter in the folder `cwd`."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def load(names: list[str], cwd: Path, blocked: tuple[str, ...] = ()) -> dict[str, str]:
    """Import `names` in a fresh interpreter in `cwd`; the file of every module that is loaded then, by name."""
    return run_python(f"NAMES = {names!r}\nBLOCKED = {blocked!r}\n{LOAD}", cwd)


def second_names(files: dict[str, str]) -> dict[str, str]:
    """The modules that are one of ours under another name."""
    ours = {files[name] for name in MODULES}
    return {name: file for name, file in files.items() if file in ours and name not in MODULES}


def test_every_module_loads_once_from_the_checkout():
    files = load(MODULES, ROOT)
    assert {name: files[name] for name in MODULES} == {module_name(path): str(ROOT / path) for path in PACKAGED}
    assert second_names(files) == {}


def test_every_module_loads_once_from_elsewhere(tmp_path):
    try:
        distribution("qloralab")
    except PackageNotFoundError:
        pytest.skip("qloralab is not installed here: run `make install`, or pip install -e .")
    files = load(MODULES, tmp_path)
    assert len({files[name] for name in MODULES}) == len(MODULES)
    assert second_names(files) == {}
    home = Path(os.path.commonpath([files[name] for name in MODULES]))
    assert home == ROOT or home.name == "qloralab"  # an editable install, or one folder that holds all of it


def test_an_editable_install_is_found_without_running_it(tmp_path):
    """By type checkers and editors: one folder, with a link to every module and the mark that they are typed."""
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    code = "import json; from setuptools.build_meta import build_editable; print(json.dumps(build_editable('.')))"
    with zipfile.ZipFile(tmp_path / run_python(code, tmp_path)) as wheel:
        (links,) = [Path(wheel.read(name).decode().strip()) for name in wheel.namelist() if name.endswith(".pth")]
    files = [path if path.parts[0] == "qloralab" else "qloralab" / path for path in PACKAGED]
    assert not [file for file in [*files, Path("qloralab", "py.typed")] if not (links / file).is_file()]
    assert [entry.name for entry in links.iterdir()] == ["qloralab"]


def test_the_library_needs_none_of_the_programs_packages():
    blocked = ("transformers", "accelerate", "gguf", "typer", "rich", "matplotlib", "peft", "bitsandbytes")
    missing = [name for name in blocked if importlib.util.find_spec(name) is None]
    assert not missing, f"not installed, so nothing is shown about them: {missing}"
    names = ["qloralab", *(module_name(path) for path in sources("nf4", "kernels", "optim", "lora"))]
    assert set(names) <= set(load(names, ROOT, blocked))


def requirements() -> list[Requirement]:
    """Every direct requirement of pyproject.toml, extras and the build included, but for our own extras."""
    project = PYPROJECT["project"]
    lists = [PYPROJECT["build-system"]["requires"], project["dependencies"], *project["optional-dependencies"].values()]
    return [one for lines in lists for one in map(Requirement, lines) if one.name != project["name"]]


def pins() -> dict[str, str]:
    """constraints.txt: version by canonical name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def test_every_pin_is_in_the_range_that_the_project_states():
    wrong = {str(one): pins().get(canonicalize_name(one.name)) for one in requirements()}
    wrong = {one: pin for one, pin in wrong.items() if pin is None or pin not in Requirement(one).specifier}
    assert not wrong
