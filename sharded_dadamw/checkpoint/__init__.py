"""Checkpoints of a whole run, whole or not at all, at any number of ranks; see :func:`save_checkpoint`."""

from sharded_dadamw.checkpoint.loading import Resumed, load_checkpoint
from sharded_dadamw.checkpoint.manifest import checkpoints
from sharded_dadamw.checkpoint.saving import Saving, save_checkpoint

__all__ = ["Resumed", "Saving", "checkpoints", "load_checkpoint", "save_checkpoint"]
