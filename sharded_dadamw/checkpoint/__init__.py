"""Checkpoints of a whole run, whole or not at all, at any number of ranks.

    folder     where checkpoints are, whether one is all there, and how one appears
    dcp        writing torch.distributed.checkpoint's format; entries: reading it; metadata: its `.metadata`
    pickles    pickles and files of `torch.save`, read without running anything
    names      what parameters and optimizers are called
    run        what there is to save of a run
    matching   whether what was saved fits a run
    save, load the calls, which sequence the rest on all ranks
    difference at which step and in which tensor two runs part

This room knows optimizers by their class and their state dicts, and of other people's files torch's alone: the rest are
`interchange`'s.
"""

from sharded_dadamw.checkpoint.folder import checkpoints
from sharded_dadamw.checkpoint.load import Resumed, load_checkpoint
from sharded_dadamw.checkpoint.save import Saving, save_checkpoint

__all__ = ["Resumed", "Saving", "checkpoints", "load_checkpoint", "save_checkpoint"]
