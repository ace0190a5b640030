"""The command line: `npu-fusion explain`, `npu-fusion ops`, `npu-fusion doctor`.

Results go to standard output, progress and errors to standard error. Bad input is one line and exit code 2.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from ..config import TARGETS, FusionConfig
from ..errors import NpuFusionError, UnsupportedInputError
from ..table import WIDTH
from .loading import ATTENTIONS, DTYPES

_log = logging.getLogger(__name__)
app = typer.Typer(
    name="npu-fusion",
    help="Fuse plain PyTorch models for Ascend NPUs: see what is fused, and why something is not.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Target = Annotated[str, typer.Option(metavar=f"[{'|'.join(TARGETS)}]", help="What to compile for; it need not be here.")]


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except NpuFusionError as error:
        _console(stderr=True).print(Text.assemble(("npu-fusion: ", "bold red"), str(error)), soft_wrap=True)
        sys.exit(2)


@app.callback()
def _configure(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what the compiler does, with tracebacks.")] = False,
) -> None:
    if verbose:
        logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
        logging.getLogger("npu_fusion").setLevel(logging.DEBUG)


@app.command()
def explain(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A transformers config (folder, .json or model id), module:callable or file.py:callable, or an exported program (.pt2).",
        ),
    ],
    target: Target = "auto",
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report with the graphs before and after as a web page.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    attn: Annotated[str, typer.Option(metavar=f"[{'|'.join(ATTENTIONS)}]", help="Attention of a transformers config.")] = "sdpa",
    dtype: Annotated[
        str, typer.Option(metavar=f"[{'|'.join(DTYPES)}]", help="Parameters and activations of a transformers config.")
    ] = "bf16",
    seq: Annotated[int, typer.Option(min=1, help="Tokens of the prefill; with --decode the length of the cache.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in the batch.")] = 1,
    decode: Annotated[bool, typer.Option("--decode", help="One decode step against a static cache, in place of a prefill.")] = False,
    dynamic: Annotated[bool | None, typer.Option(help="Symbolic sizes; left out, as torch.compile decides.")] = None,
) -> None:
    """Show what is fused in a model, what is not and why, without running it."""
    from ..explain import explain as explain_callable
    from .loading import ModelOptions, load

    options = ModelOptions(attn=attn, dtype=dtype, batch=batch, seq=seq, decode=decode)
    config = FusionConfig(target=target)
    if html is not None and not html.resolve().parent.is_dir():
        raise UnsupportedInputError(f"cannot write {html}: no such folder")
    with _progress("Building the model"):
        example = load(model, options)
    with _progress(f"Compiling {example.title}"), _readable_errors(example.title):
        report = explain_callable(example.function, *example.args, config=config, dynamic=dynamic, **example.kwargs)
    if html is not None:
        report.to_html(html)
    if as_json:
        typer.echo(report.to_json())
        return
    console = _console()
    console.print(Text(example.title, style="dim"))
    console.print(report)
    if html is not None:
        console.print(Text(f"Graphs before and after: {html}", style="dim"))


@app.command()
def ops(
    target: Target = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """List semantic ops, the rules that produce them, what runs them, and for an Ascend target the ops of its table."""
    from . import listing

    target = FusionConfig(target=target).target
    if as_json:
        typer.echo(json.dumps(listing.as_data(target), indent=2))
        return
    console = _console()
    for part in listing.renderables(target):
        console.print(part)


@app.command()
def doctor(
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Compare every Ascend op that is emitted with its CPU kernel; about a minute.")
    ] = False,
    device: Annotated[
        str, typer.Option(metavar="[npu|cpu]", help="Where the self test runs; on cpu it compares the kernels with themselves.")
    ] = "npu",
    op: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Self-test this op only; may be given several times.")] = None,
) -> None:
    """Say what is installed and what each target can do here; with --self-test, whether the device computes what it should.

    The exit code is 1 where the self test finds a mismatch or an error, or nothing that it could run.
    """
    from . import npu
    from .environment import packages_table, targets_table

    if device not in ("npu", "cpu"):
        raise UnsupportedInputError(f"unknown device {device!r}. Known: npu, cpu")
    if (op or device != "npu") and not self_test:
        raise UnsupportedInputError("--op and --device are options of the self test: give --self-test as well")
    console = _console()
    console.print(packages_table())
    console.print(targets_table())
    if npu.is_loaded():
        console.print(npu.presence_table())
    if self_test:
        _self_test(console, device, op or [])


def _self_test(console: Console, device: str, names: list[str]) -> None:
    from . import npu

    with _progress("Self test") as say:
        target, outcomes = npu.run_self_test(device, names, lambda case: say(f"Self test: {case}"))
    console.print(npu.outcomes_table(f"Self test of {target} on {device}", outcomes))
    console.print(Text(npu.summary(outcomes)))
    if npu.failed(outcomes):
        raise typer.Exit(1)


@contextlib.contextmanager
def _progress(text: str) -> Iterator[Callable[[str], Any]]:
    """A spinner with the time it took so far, on standard error, where that is a terminal; yields a function that changes its text."""
    console = _console(stderr=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns: tuple[Any, ...] = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(text, total=None)
        yield lambda text: progress.update(task, description=escape(text))


@contextlib.contextmanager
def _readable_errors(title: str) -> Iterator[None]:
    """Whatever a model raises while it is traced, as one line."""
    from .loading import first_line

    try:
        yield
    except NpuFusionError:
        raise
    except Exception as error:  # a model that fails on its inputs, or that Dynamo cannot trace, may raise anything
        _log.debug("explaining %s failed", title, exc_info=True)
        raise UnsupportedInputError(f"cannot compile {title}: {type(error).__name__}: {first_line(error)}") from error


def _console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal; a file or pipe gets the width of `str(report)`."""
    console = Console(stderr=stderr, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    return console
