"""One command per benchmark."""

import typer

from scripts.bench import checkpoint, host, kernel, memory, metrics, overlap, parameters, planning, step

COMMANDS = (step, kernel, memory, overlap, host, checkpoint, metrics, planning, parameters)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
for module in COMMANDS:
    app.command(module.__name__.rpartition(".")[2])(module.main)

if __name__ == "__main__":
    app()
