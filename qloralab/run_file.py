"""``qloralab finetune --config run.yaml``: the options of a run as a file, and the file that every run leaves.

::

    model: path/to/model
    batch-size: 8        # the names of the options; batch_size will do, too
    lr: 1e-4

A value is what would stand behind the option: its text goes to the option, which refuses it in its own words. So
``1e-4``, which YAML takes for a word, is a number, and ``2.5`` is no number of steps. The values take the place of the
defaults, and what is on the command line goes before them (click's ``default_map``). A relative path is relative to the
current directory, as it is on the command line, wherever the file lies.
"""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any

import typer

from .errors import UserError
from .settings import Settings

NAME = "run.yaml"
_HEAD = (
    "# qloralab finetune --config {} --out NEW repeats this run.\n"
    "# Relative paths are relative to the directory that it is started in.\n"
)


def use_config(context: typer.Context, path: Path | None) -> Path | None:
    """The callback of ``--config``, called before the other options are looked at: the file has their defaults.

    Raises:
        UserError: the file cannot be read, names something that is no setting of a run, or a value is not usable.
    """
    if path is not None:
        context.default_map = _read(path, context)
    return path


def drop_the_other(context: typer.Context, options: dict[str, Any], *names: str) -> None:
    """Of options that stand for each other, one on the command line goes before one in the file.

    Args:
        context: of the command.
        options: of the command, by name; what is dropped gets its default.
        names: of the options.

    Raises:
        UserError: several are given at the same place.
    """
    sources = {name: getattr(context.get_parameter_source(name), "name", "DEFAULT") for name in names}
    for source in ("COMMANDLINE", "DEFAULT_MAP"):
        given = [name for name in names if sources[name] == source]
        if len(given) > 1:
            raise UserError(f"{' and '.join(f'--{name}' for name in given)} say the same in two ways; give one")
        if given:
            fields = {field.name: field.default for field in dataclasses.fields(Settings)}
            options.update({name: fields[name] for name in names if name not in given})
            return


def _read(path: Path, context: typer.Context) -> dict[str, str]:
    """The text of each value, by the name of its field."""
    import yaml

    try:
        node = yaml.compose(path.read_bytes(), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path} holds no settings; give it lines like 'batch-size: 8'")
    fields = {field.name for field in dataclasses.fields(Settings)}
    options: dict[str, Any] = {one.name: one for one in context.command.params if one.name in fields}
    found: dict[str, str] = {}
    for key, value in node.value:
        where = f"{path}, line {key.start_mark.line + 1}"
        name = str(key.value).replace("-", "_")
        if name not in options:
            near = difflib.get_close_matches(name, options, 1) or ["--help"]
            meant = "see --help" if near == ["--help"] else f"do you mean {near[0].replace('_', '-')}?"
            raise UserError(f"{where}: {key.value!r} is no setting of a run; {meant}")
        if name in found:
            raise UserError(f"{where}: {key.value} is there twice")
        if not isinstance(value, yaml.ScalarNode):
            raise UserError(f"{where}: {key.value} takes one value; names go into one, with commas between them")
        if value.tag != "tag:yaml.org,2002:null":
            _check(options[name], value.value, context, f"{where}: {key.value}")
            found[name] = value.value
    return found


def _check(parameter: Any, text: str, context: typer.Context, where: str) -> None:
    """Refuse what the option refuses, and say where it stands."""
    try:
        parameter.process_value(context, text)
    except UserError:
        raise
    except Exception as error:  # of click, or of the copy of it that typer has
        why = " ".join(str(getattr(error, "message", error)).split())
        raise UserError(f"{where} is {text!r}: {why}") from None


def write(settings: Settings, path: Path, **leave_out: bool) -> None:
    """Write the settings of a run as a file for ``--config``: defaults too, which may change in a later version.

    Args:
        settings: as they were given.
        path: of the file; its directory is there.
        leave_out: fields that are not written.

    Raises:
        OSError: it cannot be written.
    """
    import yaml

    values = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(settings).items()
        if value is not None and name != "out" and not leave_out.get(name)
    }
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    path.write_text(_HEAD.format(path.name) + text, encoding="utf-8")
