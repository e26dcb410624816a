"""State of other optimizers as ours, and back; in files, in folders and in memory.

``contents`` finds state dicts in what a file holds, ``state_dicts`` turns one kind into another, ``deepspeed`` reads
its folders, and ``convert`` goes from files to ``files``.
"""

from sharded_dadamw.interchange.convert import Source, read_state, write_state
from sharded_dadamw.interchange.deepspeed import from_deepspeed
from sharded_dadamw.interchange.state_dicts import from_composer, from_torch, to_torch

__all__ = [
    "Source",
    "from_composer",
    "from_deepspeed",
    "from_torch",
    "read_state",
    "to_torch",
    "write_state",
]
