"""The commands, as typer reads them from the functions' signatures.

Nothing here imports torch before a command runs: ``--help`` and a mistyped option are answered at once.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO, get_type_hints

import typer

from . import __version__
from .errors import UserError
from .evaluate.settings import EvalSettings
from .export.settings import ExportSettings
from .inspection.settings import InspectSettings
from .interrupt import STATUS, stopping_at_once
from .merge.settings import MergeSettings
from .one_voice import expect_others, speaks
from .run_file import drop_the_other, use_config
from .settings import MODEL_OPTION, DtypeOption, Method, Parallel, Settings

app = typer.Typer(
    help="QLoRA from scratch: fine-tune a language model whose weights are held in 4 bits.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

ModelOption = Annotated[Path | None, MODEL_OPTION]

# What typer raises for a wrong option: a class of click, or of the copy of click that newer versions of typer carry.
_UsageError: Any = typer.BadParameter.__mro__[1]


@contextmanager
def _loading(file: TextIO) -> Iterator[None]:
    """For imports: Ctrl-C ends the process at once, and `file` is told why nothing else happens."""
    with stopping_at_once():
        from rich.console import Console

        from .display import Display

        with Display(Console(file=file, quiet=not speaks())).busy("loading PyTorch and transformers"):
            yield


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qloralab {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _commands(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _takes(settings: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make the fields of a dataclass of settings the options of a command, behind those it names itself."""
    types = get_type_hints(settings, include_extras=True)
    options = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if field.default is dataclasses.MISSING else field.default,
            annotation=types[field.name],
        )
        for field in dataclasses.fields(settings)
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        named = inspect.signature(command, eval_str=True).parameters.values()
        own = [one for one in named if one.kind is not inspect.Parameter.VAR_KEYWORD]
        command.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        return command

    return decorate


def _one_of_several(parallel: Parallel | None) -> Parallel | None:
    if parallel is not None:
        expect_others()
    return parallel


@app.command()
@_takes(Settings)
def finetune(
    context: typer.Context,
    *,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file of these options, by their names; options given here go before it. Every run leaves one.",
            show_default=False,
            callback=use_config,
            is_eager=True,
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Go on with this run, as if it had not ended; --steps may be raised.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run and what it takes; run nothing.")] = (
        False
    ),
    parallel: Annotated[
        Parallel | None,
        typer.Option(
            help="Of several processes, started by torchrun: copies, or a part each.",
            show_default=False,
            callback=_one_of_several,
            is_eager=True,
        ),
    ] = None,
    **options: Any,
) -> None:
    """Fine-tune a language model.

    With the defaults, on this machine's CPU in minutes.
    """
    if resume is not None:
        given = {"config": config, "dry_run": dry_run, **options}
        _go_on(resume, {name: given[name] for name in given if _is_given(context, name)}, parallel)
        return
    drop_the_other(context, options, "steps", "epochs")
    with _loading(sys.stdout):
        from .checkpoint.models import default_model
        from .train.dry_run import dry_run as show
        from .train.finetune import finetune as run
        from .train.processes import processes
        from .train.seeds import finetune_seeds

    settings = Settings(**{**options, "model": options["model"] or default_model()})
    if dry_run:
        if parallel is not None:
            raise UserError("--parallel would be ignored: --dry-run plans one process; leave it out")
        show(settings)
        return
    with processes(parallel) as group:
        one = settings.seeds is None or parallel is not None
        result = run(settings, processes=group) if one else finetune_seeds(settings)
    if result.interrupted:
        raise typer.Exit(STATUS)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _go_on(path: Path, given: dict[str, Any], parallel: Parallel | None) -> None:
    """``finetune --resume``: all settings but the steps are the run's own."""
    steps = given.pop("steps", None)
    for name in given:
        raise UserError(f"--{name.replace('_', '-')} would be ignored: {path} has its own settings; leave it out")
    with _loading(sys.stdout):
        from .train.finetune import resume
        from .train.processes import processes
    with processes(parallel) as group:
        result = resume(path, steps, processes=group)
    if result.interrupted:
        raise typer.Exit(STATUS)


@app.command()
def generate(
    words: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="What to ask, in quotes.", show_default=False)
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="The same; '-' reads it from standard input.", show_default=False)
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Directory of the adapter.", show_default="none: the model alone")
    ] = None,
    model: ModelOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Where the answer is cut.", min=1)] = 96,
    quantized: Annotated[
        bool, typer.Option("--quantized/--dense", help="Weights in 4 bits, as in QLoRA, or as in LoRA.")
    ] = True,
    data_type: Annotated[
        str | None, typer.Option(help="Of the weights: a name, or your own as FILE.py:NAME.", show_default="nf4")
    ] = None,
    dtype: DtypeOption = "auto",
) -> None:
    """Answer a prompt with a model and an adapter."""
    if words is not None and prompt is not None:
        raise UserError("there are two prompts; give one, as a word in quotes or with --prompt")
    text = _text(words if prompt is None else prompt)
    with _loading(sys.stderr):
        from .checkpoint.models import default_model
        from .train.generate import answer

    typer.echo(answer(model or default_model(), adapter, text, max_new_tokens, quantized, dtype, data_type=data_type))
    if lost := getattr(sys.stdout, "failure", None):
        raise UserError(f"the answer cannot be written: {lost}")


def _text(prompt: str | None) -> str:
    """A prompt as it was given, or from standard input: UTF-8, whatever the locale says."""
    if prompt is None:
        raise UserError("there is no prompt; give it in quotes, or with '--prompt'")
    given = sys.stdin.buffer.read() if prompt == "-" else os.fsencode(prompt)
    try:
        text = given.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt is not UTF-8 (byte {error.start + 1})") from None
    if not text.strip():
        raise UserError("the prompt is empty")
    return text


@app.command("report")
def show_runs(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, or those of --seeds.")],
    out: Annotated[Path, typer.Option(help="HTML file to write; one that is there is replaced.")] = Path("report.html"),
) -> None:
    """Show runs on one page: curves, adapters, answers, settings.

    The page is one HTML file that loads nothing; several runs are compared.
    """
    with _loading(sys.stdout):
        from .report.page import report

    report(runs, out)


@app.command("eval")
@_takes(EvalSettings)
def evaluate(**options: Any) -> None:
    """Evaluate a model on a text.

    Perplexity, KL divergence and top-1 agreement with the dense model, with 95 % intervals over the documents.
    """
    with _loading(sys.stdout):
        from .checkpoint.models import default_model
        from .evaluate.run import evaluate_model

    evaluate_model(EvalSettings(**{**options, "model": options["model"] or default_model()}))


@app.command("inspect")
@_takes(InspectSettings)
def look_inside(**options: Any) -> None:
    """Show what lies in a model, in 4-bit weights or in an adapter.

    How normal the weights are, what each data type makes of each layer, and which layers cause the error.
    """
    with _loading(sys.stdout):
        from .checkpoint.models import default_model
        from .inspection.run import inspect_path

    inspect_path(InspectSettings(**{**options, "path": options["path"] or default_model()}))


@app.command()
def quantize(
    out: Annotated[Path, typer.Option(help="Directory to make, new or empty.")],
    model: ModelOption = None,
    codebook: Annotated[Literal["nf4", "fp4"], typer.Option(help="The 16 values.")] = "nf4",
    block_size: Annotated[int, typer.Option(help="Weights that share a scale: a power of two, 32 to 4096.")] = 64,
    double_quant: Annotated[
        bool, typer.Option("--double-quant/--no-double-quant", help="Quantize the scales too, or keep them in float32.")
    ] = True,
    storage: Annotated[
        str, typer.Option(help="Dtype the packed codes are labelled with: uint8, bfloat16, float16, float32, ...")
    ] = "uint8",
) -> None:
    """Write a model with 4-bit weights.

    What it writes opens here, and in transformers with bitsandbytes. A directory streams, one tensor after the other:
    memory follows the largest of them, not the model. A GGUF file is loaded whole first.
    """
    with _loading(sys.stdout):
        from .checkpoint.models import default_model
        from .checkpoint.quantize_checkpoint import Options, quantize_model, storage_dtype
        from .compute import check_environment

    check_environment()
    options = Options(codebook, block_size, double_quant, storage_dtype(storage))
    quantize_model(model or default_model(), out, options)


@app.command()
@_takes(MergeSettings)
def merge(**options: Any) -> None:
    """Write a model with an adapter merged into its weights.

    In bfloat16 it opens in transformers alone. In 4 bits again, a report says what survives of the adapter.
    """
    for name in ("adapter", "out"):
        if options[name] is None:
            raise UserError(f"Missing option '--{name}'.")
    with _loading(sys.stdout):
        from .checkpoint.models import default_model
        from .merge.run import merge as run

    run(MergeSettings(**{**options, "model": options["model"] or default_model()}))


@app.command()
@_takes(ExportSettings)
def export(**options: Any) -> None:
    """Write a model, or an adapter, as a GGUF file.

    It is what llama.cpp opens, and transformers. A directory streams, one tensor after the other; 4-bit weights are
    dequantized.
    """
    if options["gguf"] is None:
        raise UserError("Missing option '--gguf'.")
    with _loading(sys.stdout):
        from .checkpoint.models import default_model
        from .export.run import export as run

    run(ExportSettings(**{**options, "model": options["model"] or default_model()}))


@app.command()
def memory(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Directory, GGUF file, config.json, or llama-7b, -13b, -33b, -65b.",
            show_default="SmolLM2-135M-Instruct",
        ),
    ] = None,
    method: Annotated[Method, typer.Option(help="As finetune has it.")] = "qlora",
    data_type: Annotated[str, typer.Option(help="Of the 4-bit weights.")] = "nf4",
    dtype: DtypeOption = "auto",
    batch_size: Annotated[int, typer.Option(help="Examples that are computed at once.", min=1)] = 4,
    max_length: Annotated[int, typer.Option(help="Tokens of each.", min=1)] = 256,
    r: Annotated[int, typer.Option("--r", help="Rank of the adapters.", min=1)] = 16,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute activations.")] = False,
    state_bits: Annotated[int, typer.Option(help="Of AdamW's moments: 32 or 8.")] = 32,
    json: Annotated[Path | None, typer.Option(help="Write the result here.")] = None,
) -> None:
    """Predict the memory of a run, without reading a weight."""
    if state_bits not in (32, 8):
        raise UserError(f"--state-bits is {state_bits}; it must be 32 or 8")
    with _loading(sys.stderr):
        from rich.console import Console

        from .memory.report import memory as predict_and_show

    sizes = {"batch_size": batch_size, "max_length": max_length, "r": r}
    predict_and_show(
        model, method, data_type, dtype, json, Console(), checkpointing=checkpointing, state_bits=state_bits, **sizes
    )


@app.command()
def parity(
    model: Annotated[
        Path | None,
        typer.Option(help="Its linear layers too: Hugging Face directory or GGUF file.", show_default=False),
    ] = None,
    weights: Annotated[
        int, typer.Option(help="Random weights, in each of 3 dtypes and 2 codebooks.", min=1)
    ] = 10_000_000,
    json: Annotated[Path | None, typer.Option(help="Write the result here, with all details.")] = None,
    seed: Annotated[int, typer.Option(help="Of all random numbers.")] = 0,
) -> None:
    """Look for the first bit that differs from bitsandbytes.

    Exit status 1 when something differs beyond what is documented.
    """
    with _loading(sys.stderr):
        from .compute import check_environment
        from .parity.report import compare_and_show

    check_environment()
    if not compare_and_show(weights, model, seed, json):
        raise typer.Exit(1)


@app.command()
def doctor(
    json: Annotated[Path | None, typer.Option(help="Write what was found here.")] = None,
) -> None:
    """Say what this machine has and what serves each operator, and test it.

    Exit status 1 when a test fails.
    """
    with _loading(sys.stderr):
        from rich.console import Console

        from .doctor import doctor as look_and_show

    if not look_and_show(json, Console()):
        raise typer.Exit(1)


@app.command()
def sass(
    target: Annotated[str, typer.Option(help="Architecture: sm_80, sm_90, sm_100 or sm_120.")] = "sm_90",
    kernel: Annotated[
        str | None, typer.Option(help="Only this kernel, or those that begin so.", show_default="all")
    ] = None,
    explain: Annotated[
        str | None, typer.Option(help="Print this kernel's main loop, line by line.", show_default=False)
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the table here.")] = None,
) -> None:
    """Count what the GPU kernels cost in machine code.

    Compiles the kernels, without a GPU, and disassembles bitsandbytes' beside them. Exit status 1 when a kernel
    exceeds its budget.
    """
    if kernel and explain:
        raise UserError("--kernel would be ignored: --explain prints one kernel, and no table")
    with _loading(sys.stderr):
        from qloralab.benchmarks.sass.compile import OfflineError
        from qloralab.benchmarks.sass.report import sass as count_and_show

    try:
        kept = count_and_show(target, kernel, json, explain)
    except OfflineError as error:
        raise UserError(" ".join(str(error).split())) from error
    if not kept:
        raise typer.Exit(1)


def run() -> int:
    """Do what the command line says.

    Returns:
        the exit status: 0; 1 where a command says no; ``interrupt.STATUS`` after Ctrl-C.

    Raises:
        UserError: an option is wrong; and whatever a command raises.
    """
    try:
        return app(standalone_mode=False) or 0  # that of a typer.Exit; typer also makes one of Ctrl-C
    except _UsageError as error:
        raise UserError(error.format_message()) from error
    except typer.Abort as error:  # which typer makes of Ctrl-C, or not, depending on its version; and of an EOFError
        raise error.__cause__ or KeyboardInterrupt from None
    except SystemExit as error:  # which it makes of any broken pipe
        raise error.__context__ or error from None
