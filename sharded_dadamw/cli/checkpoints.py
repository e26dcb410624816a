"""Convert checkpoints, look into ours, and compare them."""

from pathlib import Path
from typing import Annotated

import typer

from sharded_dadamw.checkpoint.difference import difference
from sharded_dadamw.checkpoint.folder import Manifest, found_at
from sharded_dadamw.interchange.convert import Source, read_state, write_state
from sharded_dadamw.interchange.files import read_text

app = typer.Typer()

_HYPERPARAMETERS = ("lr", "initial_lr", "max_lr", "betas", "eps", "weight_decay", "amsgrad")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A file of torch.save, or a folder.")],
    target: Annotated[
        Path,
        typer.Argument(
            help="NAME.pt: state dict of torch's AdamW. Anything else: a new folder of torch.distributed.checkpoint, "
            "with the weights if they are known."
        ),
    ],
    written_by: Annotated[
        Source, typer.Option("--from", help="The optimizer that wrote it; what weight_decay means depends on that.")
    ],
    weights: Annotated[
        Path | None,
        typer.Option(help="The model's state dict, if not in the same place; also .safetensors, or its .index.json."),
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
    listed = None if names is None else list(filter(None, map(str.strip, read_text(names).split("\n"))))
    state, held = read_state(source, written_by, weights=weights, names=listed, peak_lr=peak_lr)
    write_state(target, state, held)
    typer.echo(f"{target}: state of {len(state['state'])} parameters in {len(state['param_groups'])} groups")
    for index, group in enumerate(state["param_groups"]):
        typer.echo(
            f"  group {index}: decays by {group['weight_decay']:g} a step at the peak lr, {group['initial_lr']:g}"
        )


@app.command()
def inspect(
    path: Annotated[
        Path, typer.Argument(help="One of our checkpoints, a folder of them or that of a run: then the newest.")
    ],
) -> None:
    """Show what one of our checkpoints says that it is, and whether its checksums hold."""
    folder = found_at(path)[-1]
    manifest = Manifest.read(folder)
    damage = list(manifest.damage(folder))
    facts = [
        ("step", f"{manifest.step:,}"),
        ("ranks", f"{manifest.num_ranks:,}"),
        ("bytes", f"{sum(file.size for file in manifest.files.values()):,}"),
        ("optimizer", manifest.optimizer or "not known"),
        ("written by", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
        ("checksums", "; ".join(damage) or "hold"),
        *(("tied", ", ".join(names)) for names in manifest.aliases),
    ]
    for index, group in enumerate(manifest.param_groups):
        known = ", ".join(f"{key} {group[key]}" for key in _HYPERPARAMETERS if key in group)
        facts.append((f"group {index}", f"{len(group['params']):,} parameters: {known}"))
    typer.echo("\n".join([str(folder), *(f"  {name:11} {fact}" for name, fact in facts)]))
    if damage:
        raise typer.Exit(1)


@app.command()
def diff(
    one: Annotated[Path, typer.Argument(help="A checkpoint, a folder of them, a run's folder, or a metrics.jsonl.")],
    other: Annotated[Path, typer.Argument(help="Another one, written on any number of ranks.")],
) -> None:
    """Tell at which step and in which tensor two runs first differ, by their fingerprints; exit code 1 if so."""
    found = difference(one, other)
    typer.echo("the same" if found is None else found)
    if found is not None:
        raise typer.Exit(1)
