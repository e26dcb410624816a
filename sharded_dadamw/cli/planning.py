"""Plan a run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import typer

from sharded_dadamw.config import (
    Exchange,
    GradientResidency,
    MainParameter,
    Moments,
    ShardingConfig,
    StateResidency,
)
from sharded_dadamw.plan import plan as plan_run
from sharded_dadamw.plan.picture import draw
from sharded_dadamw.plan.text import lines_of

app = typer.Typer()

Choice = TypeVar("Choice")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="llama3-8b, llama3-70b, llama3-405b, gpt3-175b, tiny, 3m, 30m or 125m; a config.json of Hugging Face; "
            "or file.py:function, which builds a module."
        ),
    ],
    ranks: Annotated[int, typer.Option(help="Ranks in all.")],
    per_host: Annotated[int, typer.Option(help="Ranks of one host.")] = 8,
    gpu: Annotated[str, typer.Option(help="a100-40, a100, h100, h200 or b200.")] = "h200",
    memory: Annotated[float | None, typer.Option(help="GB of a device, if not what the GPU has.")] = None,
    mesh: Annotated[str | None, typer.Option(help="REPLICASxSHARDS, such as 8x8: shard within a row only.")] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="What parameters are held in: fp32, bf16 or fp16. [default: what the model says, or bf16]"),
    ] = None,
    gradient_dtype: Annotated[
        str | None, typer.Option(help="What gradients are added up in, likewise. [default: the parameters']")
    ] = None,
    main_parameter: Annotated[
        str, typer.Option("--main", help="Kept beside 16-bit ones: fp32, remainder or none.")
    ] = "fp32",
    moments: Annotated[str, typer.Option(help="fp32, bf16 or like-parameters.")] = "fp32",
    amsgrad: Annotated[bool, typer.Option("--amsgrad", help="Keep the largest second moment.")] = False,
    gradients: Annotated[str, typer.Option(help="What is kept of averages: full or sharded.")] = "full",
    state: Annotated[str, typer.Option(help="Where optimizer state lives: device or host.")] = "device",
    exchange: Annotated[str, typer.Option(help="fastest, rank-order or backend.")] = "fastest",
    wire: Annotated[str | None, typer.Option(help="What gradients are rounded to before they are sent.")] = None,
    bucket_cap_mb: Annotated[float, typer.Option(help="MiB of parameters that share a bucket.")] = 16.0,
    overlap: Annotated[bool, typer.Option(help="Average behind backward.")] = True,
    attach: Annotated[bool, typer.Option(help="Gather behind the next forward.")] = True,
    micro_batches: Annotated[
        int | None, typer.Option(help="Of all ranks in a step, added in one order on any number of ranks.")
    ] = None,
    activations: Annotated[float, typer.Option(help="GB of activations that a backward begins with.", min=0)] = 0.0,
    compute: Annotated[float | None, typer.Option(help="Seconds of forward and backward in a step.", min=0)] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of one rank in a step, with --mfu.", min=1)] = None,
    mfu: Annotated[float | None, typer.Option(help="Share of the GPU's operations that compute reaches.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="A picture to write, such as plan.png.")] = None,
) -> None:
    """Say what a training run will hold, send and wait for, on every rank, before it runs."""
    planned = plan_run(
        model,
        ranks=ranks,
        per_host=per_host,
        mesh=None if mesh is None else _mesh(mesh),
        gpu=gpu,
        config=ShardingConfig(
            bucket_cap_mb=bucket_cap_mb,
            overlap=overlap,
            gradient_residency=_chosen(GradientResidency.__members__, "--gradients", gradients),
            state_residency=_chosen(StateResidency.__members__, "--state", state),
            exchange=_chosen(Exchange.__members__, "--exchange", exchange),
            wire_dtype=None if wire is None else _chosen(_DTYPES, "--wire", wire),
            main_parameter=_chosen(MainParameter.__members__, "--main", main_parameter),
            moments=_chosen(Moments.__members__, "--moments", moments),
            micro_batches=micro_batches,
        ),
        dtype=None if precision is None else _chosen(_DTYPES, "--precision", precision),
        gradient_dtype=None if gradient_dtype is None else _chosen(_DTYPES, "--gradient-dtype", gradient_dtype),
        amsgrad=amsgrad,
        attached=attach,
        memory=None if memory is None else 1e9 * memory,
        activations=1e9 * activations,
        compute=compute,
        tokens=tokens,
        mfu=mfu,
    )
    if plot is not None:
        draw(planned, plot)
    typer.echo(json.dumps(planned.as_dict(), indent=1) if as_json else "\n".join(lines_of(planned)))


def _chosen(choices: Mapping[str, Choice], option: str, text: str) -> Choice:
    """A choice by its name, in small letters."""
    names = {name.lower().replace("_", "-"): choice for name, choice in choices.items()}
    if text not in names:
        raise ValueError(f"{option}: expected one of {', '.join(names)}, got {text}")
    return names[text]


def _mesh(text: str) -> tuple[int, int]:
    replicas, _, shards = text.partition("x")
    if not (replicas.isdecimal() and shards.isdecimal()):
        raise ValueError(f"--mesh: expected REPLICASxSHARDS, such as 8x8, got {text}")
    return int(replicas), int(shards)
