"""Sharded decoupled AdamW: 1/N of the optimizer state on each of N ranks, and the unsharded optimizer's bits."""

from sharded_dadamw.config import Exchange, GradientResidency, MainParameter, Moments, ShardingConfig, StateResidency
from sharded_dadamw.decoupled import DecoupledAdamW
from sharded_dadamw.layout.param_groups import weight_decay_groups
from sharded_dadamw.schedule.clock import StepCost
from sharded_dadamw.sharded import ShardedDecoupledAdamW

__all__ = [
    "DecoupledAdamW",
    "Exchange",
    "GradientResidency",
    "MainParameter",
    "Moments",
    "ShardedDecoupledAdamW",
    "ShardingConfig",
    "StateResidency",
    "StepCost",
    "weight_decay_groups",
]

__version__ = "0.1.0"
