"""All commands, by name; a command's module is imported when it is asked for."""

import importlib
import importlib.util
import logging
import sys
from typing import Any

if importlib.util.find_spec("typer"):
    import typer
    from typer.core import TyperGroup
    from typer.main import get_group
else:
    sys.exit("error: sharded-dadamw needs typer; install it with: pip install 'sharded_dadamw[cli]'")

_MODULES = {"convert": "checkpoints", "inspect": "checkpoints", "diff": "checkpoints", "plan": "planning"}


class _Commands(TyperGroup):
    """Imports what a command needs: torch.distributed.checkpoint alone takes longer than most plans.

    What a user can do something about is one sentence, without a traceback.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_MODULES)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _MODULES:
            return None
        module = importlib.import_module(f"sharded_dadamw.cli.{_MODULES[cmd_name]}")
        return get_group(module.app).commands[cmd_name]

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # of which typer says nothing
            raise
        except (ValueError, OSError, ModuleNotFoundError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2 if ctx.invoked_subcommand == "diff" else 1) from error


app = typer.Typer(cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _about() -> None:
    """Plan a training run; convert checkpoints from and to other optimizers', and see what ours hold."""


def main() -> None:
    """Run the command line."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    app()
