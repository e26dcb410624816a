"""What commands say of mistakes."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def one_line_errors(code: int = 1) -> Iterator[None]:
    """Print as one sentence, without a traceback, what a user can do something about."""
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(code) from error
