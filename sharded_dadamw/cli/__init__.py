"""The command `sharded-dadamw`: convert checkpoints, look into ours and compare them, and plan a run."""

from sharded_dadamw.cli.commands import app, main

__all__ = ["app", "main"]
