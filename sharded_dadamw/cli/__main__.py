"""The command, as `python -m sharded_dadamw.cli`."""

from sharded_dadamw.cli.commands import main

main()
