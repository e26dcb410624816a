"""The command `sharded-dadamw`: convert checkpoints, look into ours and compare them, and plan a run.

``commands`` names the commands and turns what they raise into a line; ``checkpoints`` and ``planning`` have them, each
imported when it is called.
"""

from sharded_dadamw.cli.commands import app, main

__all__ = ["app", "main"]
