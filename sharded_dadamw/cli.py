"""The command `sharded-dadamw`: convert checkpoints, and look into ours."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from sharded_dadamw.interchange.convert import Source, read_state, write_state
from sharded_dadamw.interchange.files import read_text
from sharded_dadamw.interchange.inspection import inspect as look_into

if importlib.util.find_spec("typer") and importlib.util.find_spec("rich"):
    import typer
    from rich.console import Console
    from rich.table import Table
else:
    sys.exit("error: sharded-dadamw needs typer and rich; install them with: pip install 'sharded_dadamw[cli]'")

app = typer.Typer(
    help="Checkpoints of optimizer state: convert them from and to other optimizers', and see what ours hold.",
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
        Path | None,
        typer.Option(help="The parameters' names, one a line, in the order of the optimizer's groups."),
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
        lines = read_text(names).split("\n") if names is not None else None
        listed = [line.strip() for line in lines if line.strip()] if lines is not None else None
        state, held = read_state(source, written_by, weights=weights, names=listed, peak_lr=peak_lr)
        write_state(target, state, held)
    typer.echo(f"{target}: state of {len(state['state'])} parameters in {len(state['param_groups'])} groups")
    for index, group in enumerate(state["param_groups"]):
        typer.echo(
            f"  group {index}: decays by {group['weight_decay']:g} a step at the peak lr, {group['initial_lr']:g}"
        )


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="One of our checkpoints, or a folder of them: then the newest.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what one of our checkpoints holds, and whether its checksums hold."""
    with _errors():
        contents = look_into(path)
    if as_json:
        typer.echo(json.dumps(contents, indent=1))
    else:
        _print(contents, Console(highlight=False, markup=False, emoji=False))
    if contents["damage"]:
        raise typer.Exit(1)


def main() -> None:
    """Run the command line."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    app()


@contextmanager
def _errors() -> Iterator[None]:
    """Print as one sentence, without a traceback, what a user can do something about."""
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def _print(contents: dict[str, Any], console: Console) -> None:
    console.print(contents["path"], style="bold", soft_wrap=True)
    facts = {
        "step": str(contents["step"]),
        "parameters": f"{contents['num_parameters']:,} with {contents['num_elements']:,} elements",
        "ranks": str(contents["num_ranks"]),
        "optimizer": contents["optimizer"] or "not known",
        "written by": ", ".join(f"{name} {version}" for name, version in contents["versions"].items()),
        "checksums": "; ".join(contents["damage"]) or "hold",
    }
    for name, fact in facts.items():
        console.print(f"  {name:11} {fact}", soft_wrap=True)
    for names in contents["aliases"]:
        console.print(f"  {'tied':11} {', '.join(names)}", soft_wrap=True)
    for index, group in enumerate(contents["param_groups"]):
        known = ", ".join(f"{key} {_text(group[key])}" for key in _HYPERPARAMETERS if key in group)
        console.print(f"  {f'group {index}':11} {_text(group['params'])} parameters: {known}", soft_wrap=True)
    for rows, header in (
        (contents["sizes"], ("kind", "dtype", "tensors", "bytes")),
        (contents["largest"], ("largest", "shape", "bytes")),
    ):
        table = Table(box=None, padding=(0, 2, 0, 2), header_style="dim")
        for name in header:
            table.add_column(name, justify="right" if name in ("tensors", "bytes") else "left")
        for row in rows:
            table.add_row(*map(_text, row.values()))
        console.print(table)


def _text(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(map(str, value)) + ")"
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
