"""The command `sharded-dadamw`: convert checkpoints, and look into them."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from sharded_dadamw.interchange.convert import Source, read_state, write_state
from sharded_dadamw.interchange.inspection import Contents
from sharded_dadamw.interchange.inspection import inspect as look_into

if importlib.util.find_spec("typer") and importlib.util.find_spec("rich"):
    import typer
    from rich.console import Console
    from rich.table import Table
else:
    sys.exit("error: sharded-dadamw needs typer and rich; install them with: pip install 'sharded_dadamw[cli]'")

app = typer.Typer(
    help="Checkpoints of optimizer state: convert them from and to other optimizers', and see what they hold.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_HYPERPARAMETERS = ("lr", "initial_lr", "max_lr", "betas", "eps", "weight_decay", "amsgrad")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A file of torch.save, a folder, or a .safetensors file.")],
    target: Annotated[
        Path,
        typer.Argument(
            help="NAME.pt: state dict of torch's AdamW. NAME.safetensors: tensors by name. Anything else: a new folder "
            "of torch.distributed.checkpoint, with the weights if they are known."
        ),
    ],
    written_by: Annotated[
        Source, typer.Option("--from", help="The optimizer that wrote it; what weight_decay means depends on that.")
    ],
    weights: Annotated[
        Path | None, typer.Option(help="The model's state dict, if it is not in the same file or folder.")
    ] = None,
    names: Annotated[
        Path | None, typer.Option(help="The parameters' names, one a line, in the order of the optimizer's groups.")
    ] = None,
    peak_lr: Annotated[
        float | None,
        typer.Option(
            help="The schedule's peak, if a group's initial_lr does not say it; else its lr is taken.", min=0.0
        ),
    ] = None,
) -> None:
    """Convert optimizer state from another optimizer, or to another."""
    with _errors():
        listed = names.read_text().split() if names is not None else None
        state, held = read_state(source, written_by, weights=weights, names=listed, peak_lr=peak_lr)
        write_state(target, state, held)
    console = Console(highlight=False)
    console.print(f"{target}: state of {len(state['state'])} parameters in {len(state['param_groups'])} groups")
    for index, group in enumerate(state["param_groups"]):
        console.print(
            f"  group {index}: decays by {group['weight_decay']:g} a step at the peak lr, {group['initial_lr']:g}"
        )


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint: a folder or a file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a checkpoint holds, without reading its tensors and without running anything in it."""
    with _errors():
        contents = look_into(path)
    if as_json:
        typer.echo(json.dumps(contents.as_json(), indent=1))
    else:
        _print(contents, Console(highlight=False))
    if contents.damage:
        raise typer.Exit(1)


def main() -> None:
    """Run the command line."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    app()


@contextmanager
def _errors() -> Iterator[None]:
    """What a user can do something about is one sentence, and no traceback."""
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def _print(contents: Contents, console: Console) -> None:
    console.print(f"{contents.path}: {contents.format}", style="bold", soft_wrap=True)
    written = [f"{name} {version}" for name, version in contents.versions.items()]
    facts = {
        "step": "none" if contents.step is None else f"{contents.step:g}",
        "parameters": f"{contents.num_parameters:,} with {contents.num_elements:,} elements",
        "ranks": "not known" if contents.num_ranks is None else str(contents.num_ranks),
        "optimizer": contents.optimizer or "not known",
        "written by": ", ".join(written) or "not known",
        "checksums": "none" if contents.damage is None else "; ".join(contents.damage) or "hold",
    }
    for name, fact in facts.items():
        console.print(f"  {name:11} {fact}", soft_wrap=True)
    for names in contents.aliases:
        console.print(f"  {'tied':11} {', '.join(names)}", soft_wrap=True)
    for index, group in enumerate(contents.groups):
        known = ", ".join(f"{key} {_text(group[key])}" for key in _HYPERPARAMETERS if key in group)
        console.print(f"  {f'group {index}':11} {_text(group['params'])} parameters: {known}", soft_wrap=True)
    console.print(_table(["kind", "dtype", "tensors", "bytes"], [[*map(_text, row)] for row in contents.sizes()]))
    console.print(_table(["largest", "shape", "bytes"], [[*map(_text, row)] for row in contents.largest(5)]))


def _table(header: list[str], rows: list[list[str]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 2), header_style="dim")
    for name in header:
        table.add_column(name, justify="right" if name in ("tensors", "bytes") else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _text(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(map(str, value)) + ")"
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
