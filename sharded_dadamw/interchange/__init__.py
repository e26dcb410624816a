"""State of other optimizers as ours, and back; in files, in folders and in memory.

``state_dicts`` turns one kind of state dict into another, ``deepspeed`` reads its folders, ``files`` safetensors, and
``convert`` goes from files to files. ``inspection`` tells what a checkpoint holds, ours included.
"""

from sharded_dadamw.interchange.convert import Source, read_state, write_state
from sharded_dadamw.interchange.deepspeed import from_deepspeed
from sharded_dadamw.interchange.files import from_safetensors, to_safetensors
from sharded_dadamw.interchange.inspection import inspect
from sharded_dadamw.interchange.state_dicts import from_composer, from_torch, renamed, to_torch

__all__ = [
    "Source",
    "from_composer",
    "from_deepspeed",
    "from_safetensors",
    "from_torch",
    "inspect",
    "read_state",
    "renamed",
    "to_safetensors",
    "to_torch",
    "write_state",
]
