"""Random sequences of calls on simulated ranks, beside the update rule on whole tensors; equal to the last bit.

A sequence is a list of calls, and two interpreters know what each means: `_Ours` is a rank with the sharded optimizer,
and `_Oracle` keeps the gradients of all ranks apart, adds them up as the documentation says, and has `DecoupledAdamW`
update whole tensors (where moments are rounded at random, the sharded one on one rank). A call may also be an error
where the oracle says so. It then is one on all ranks, it has changed nothing, and the sequence goes on after
`zero_grad()`.

    RANDOM_CALLS=10000 RANDOM_CALLS_SEED=3 python -m pytest -q -s tests/test_random_calls.py

runs other sequences, and more of them. A failure is shrunk, and shows the set-up and the calls.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, Phase, example, given, note, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.optim.lr_scheduler import StepLR

from sharded_dadamw import (
    DecoupledAdamW,
    Exchange,
    GradientResidency,
    MainParameter,
    Moments,
    ShardedDecoupledAdamW,
    ShardingConfig,
    StateResidency,
)
from sharded_dadamw.checkpoint import load_checkpoint, save_checkpoint
from sharded_dadamw.update.precision import weight_of
from tests import pool
from tests.models import BF16, F32, draw_gradient, mean_in_rank_order, whole_state_dict
from tests.simulated import on_ranks

NUM_SEQUENCES = int(os.environ.get("RANDOM_CALLS", "40"))
SEED = int(os.environ.get("RANDOM_CALLS_SEED", "0"))

SHAPES: dict[str, tuple[int, ...]] = {"a": (7, 5), "b": (3,), "c": (0, 4), "d": (70,), "e": (33,), "x": (9, 2), "y": ()}
GROUPS = ("ab", "cde")
ADDED = ("x", "y")  # by add_param_group
SIZES = {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}


@dataclass(frozen=True)
class Call:
    """One that users make, as a method of the interpreters or of the optimizer."""

    name: str
    args: tuple[Any, ...] = ()

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(map(repr, self.args))})"


@dataclass(frozen=True)
class Setup:
    """How both begin."""

    num_ranks: int
    config: ShardingConfig
    amsgrad: bool
    max_grad_norm: float | None
    metrics_in_step: bool
    frozen: str
    narrow: str  # parameters in bf16
    interleaving: int | None

    @property
    def is_full(self) -> bool:
        return self.config.gradient_residency is GradientResidency.FULL or not self.config.reduce_gradients


@dataclass
class Outcome:
    """What a rank has seen of a call."""

    error: str | None = None
    value: Any = None
    params: np.ndarray | None = None  # flat, since tensors cost more to hand over than to make
    steps: dict[str, float] = field(default_factory=dict)


def flat(params: Iterable[Tensor]) -> np.ndarray:
    """The values of all, comparable: without nan, and with one kind of zero."""
    whole = torch.cat([param.detach().reshape(-1).float() for param in params])
    return (whole.nan_to_num(nan=77.0) + 0.0).numpy()


def draw(name: str, dtype: torch.dtype, key: int, rank: int) -> Tensor:
    return draw_gradient(torch.empty(SHAPES[name], dtype=dtype), key, rank, ord(name))


class Part(nn.Module):
    def __init__(self, params: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.own = nn.ParameterDict(params)

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        """A sum whose gradients are those that are given."""
        terms = [(self.own[name] * gradients[name]).sum().float() for name in self.own if name in gradients]
        return sum(terms, torch.zeros(()))


class Net(nn.Module):
    def __init__(self, params: dict[str, nn.Parameter]) -> None:
        super().__init__()
        names = [*GROUPS, "".join(ADDED)]
        self.parts = nn.ModuleList(Part({name: params[name] for name in part}) for part in names)

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        return sum((part(gradients) for part in self.parts), torch.zeros(()))


class _Both:
    """What the interpreters share: parameters, groups, and hyperparameters."""

    setup: Setup
    params: dict[str, nn.Parameter]
    optimizer: Any

    def build(self, setup: Setup, start: Start, make: Callable[[str, Tensor], nn.Parameter]) -> dict[str, Any]:
        self.setup = setup
        self.params = {name: make(name, start.weights[name]) for name in SHAPES}
        for name, param in self.params.items():
            param.requires_grad_(name not in start.frozen)
        groups = [{"params": [(name, self.params[name]) for name in group]} for group in start.groups]
        return {"params": groups, "lr": 1e-2, "weight_decay": 9e-4, "amsgrad": setup.amsgrad}

    def ready(self, start: Start) -> None:
        if start.state is not None:
            self.optimizer.load_state_dict(start.state)
        self.scheduler = StepLR(self.optimizer, 3, 0.5)

    @property
    def groups(self) -> tuple[str, ...]:
        names = {id(param): name for name, param in self.params.items()}
        return tuple("".join(names[id(param)] for param in group["params"]) for group in self.optimizer.param_groups)

    @property
    def frozen(self) -> str:
        return "".join(name for name, param in self.params.items() if not param.requires_grad)

    def used(self, without: str) -> list[str]:
        members = "".join(self.groups)
        return [name for name in members if name not in without and self.params[name].requires_grad]

    def freeze(self, name: str) -> None:
        self.params[name].requires_grad_(False)

    def unfreeze(self, name: str) -> None:
        self.params[name].requires_grad_(True)

    def set_group(self, group: int, key: str, value: Any) -> None:
        self.optimizer.param_groups[group][key] = value

    def schedule(self) -> None:
        self.scheduler.step()

    def edit(self, name: str) -> None:
        if name not in self.setup.narrow:
            with torch.no_grad():
                self.params[name].mul_(0.75)

    def add_group(self, lr: float) -> None:
        if left := [name for name in ADDED if name not in "".join(self.groups)]:
            self.optimizer.add_param_group({"params": [(left[0], self.params[left[0]])], "lr": lr})


@dataclass
class Start:
    """What a number of ranks begins with, and leaves to the next one."""

    weights: dict[str, Tensor]
    groups: tuple[str, ...]
    frozen: str
    state: dict[str, Any] | None = None
    how: str = ""  # as a whole state dict, or in a folder that has a name of its own
    folder: str = ""


# --- ours ------------------------------------------------------------------------------------------------------------


class _Ours(_Both):
    def __init__(self, group: Any, setup: Setup, start: Start) -> None:
        is_saved = bool(start.folder)
        arguments = self.build(
            setup, start, lambda _, weight: nn.Parameter(torch.zeros_like(weight) if is_saved else weight.clone())
        )
        self.group, self.rank, self.num_ranks = group, group.rank(), group.size()
        self.optimizer = ShardedDecoupledAdamW(
            **arguments,
            process_group=group,
            config=setup.config,
            max_grad_norm=setup.max_grad_norm,
            metrics_in_step=setup.metrics_in_step,
        )
        self.net, self.attachments = Net(self.params), list[Any]()
        if is_saved:
            self.load(start)
        self.ready(start)
        self.new_scaler()

    def saved(self) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(self.net),
            "optimizer": get_optimizer_state_dict(self.net, self.optimizer),
        }

    def save(self, how: str, folder: str) -> None:
        if how == "checkpoint":
            save_checkpoint(folder, step=1, model=self.net, optimizer=self.optimizer, process_group=self.group)
        elif how == "dcp":
            self.optimizer.state_dict()  # the whole, where it was consolidated
            dcp.save(self.saved(), checkpoint_id=folder, process_group=self.group)

    def load(self, start: Start) -> None:
        if start.how == "checkpoint":
            load_checkpoint(start.folder, model=self.net, optimizer=self.optimizer, process_group=self.group)
        else:
            state = self.saved()
            dcp.load(state, checkpoint_id=start.folder, process_group=self.group)
            set_model_state_dict(self.net, state["model"])
            set_optimizer_state_dict(self.net, self.optimizer, state["optimizer"])

    def new_scaler(self) -> None:
        self.scaler = ShardedGradScaler("cpu", init_scale=8.0, growth_interval=2, process_group=self.group)

    def run(self, call: Call) -> Outcome:
        outcome = Outcome()
        try:
            outcome.value = self.call(call)
        except (RuntimeError, ValueError) as error:
            if "start again from a checkpoint" in str(error):
                raise
            outcome.error = f"{type(error).__name__}: {error}"
            self.optimizer.zero_grad()
            self.new_scaler()
        if outcome.error or not self.attachments or call.name == "read":
            outcome.params = flat(self.params.values())
            states = {name: self.optimizer.state.get(param, {}) for name, param in self.params.items()}
            outcome.steps = {name: float(state["step"]) for name, state in states.items() if "step" in state}
        return outcome

    def call(self, call: Call) -> Any:
        """By a method of this class, or of the optimizer itself."""
        return getattr(self if hasattr(self, call.name) else self.optimizer, call.name)(*call.args)

    def read(self) -> None:
        pass

    def gradient(self, name: str, key: int) -> Tensor:
        """This rank's, or where something else averages the mean."""
        dtype = self.params[name].dtype
        if self.setup.config.reduce_gradients:
            return draw(name, dtype, key, self.rank)
        return mean_in_rank_order([draw(name, dtype, key, rank) for rank in range(self.num_ranks)])

    def loss(self, key: int, without: str, bad: int | None = None) -> Tensor | None:
        gradients = {name: self.gradient(name, key) for name in self.used(without)}
        if bad is not None and (not self.setup.config.reduce_gradients or bad % self.num_ranks == self.rank):
            next(iter(gradients.values()), torch.ones(1)).view(-1)[:1] = torch.inf
        return self.net(gradients) if gradients else None

    def backward(self, key: int, without: str, bad: int | None = None) -> float | None:
        loss = self.loss(key, without, bad if self.setup.config.skip_nonfinite else None)
        if loss is None:
            return None
        loss.backward()
        return float(loss)

    def accumulate(self, key: int, without: str) -> None:
        with self.optimizer.no_sync() if self.setup.config.reduce_gradients else contextlib.nullcontext():
            self.backward(key, without)

    def uneven(self, key: int, idle: int, without: str, to_none: bool, then: Call) -> Any:
        """One rank has no backward, or uses other parameters."""
        self.optimizer.zero_grad(to_none)
        if not self.setup.config.reduce_gradients or idle % self.num_ranks != self.rank or self.num_ranks == 1:
            self.backward(key, "")
        elif without:
            self.backward(key, without)
        return self.call(then)

    def closure(self, key: int) -> Any:
        def evaluate() -> Any:
            self.optimizer.zero_grad()
            return self.backward(key, "")

        return self.optimizer.step(evaluate)

    def assign(self, name: str, key: int) -> None:
        if name in "".join(self.groups):
            self.params[name].grad = self.gradient(name, key)

    def scale(self, factor: float) -> None:
        for param in self.params.values():
            if param.grad is not None:
                param.grad.mul_(factor)

    def scaled(self, key: int, bad: int | None, max_norm: float | None) -> None:
        """A step under a loss scaler."""
        self.optimizer.zero_grad()
        if not self.setup.is_full or (loss := self.loss(key, "", bad)) is None:
            return
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        if max_norm is not None:
            self.optimizer.clip_grad_norm_(max_norm, 2.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def joined(self, key: int, counts: Sequence[int]) -> None:
        """Ranks with uneven data."""
        if self.setup.config.reduce_gradients and self.used(""):
            with Join([self.optimizer]):
                for number in range(counts[self.rank]):
                    self.optimizer.zero_grad(True)
                    self.backward(key + number, "")
                    self.optimizer.step()
        self.optimizer.zero_grad(True)  # to scale the zeros that ranks without data have is to clear them

    def drop(self, name: str) -> None:
        self.params[name].grad = None

    def attach(self) -> None:
        self.attachments.append(self.optimizer.attach(self.net))

    def remove(self) -> None:
        if self.attachments:
            self.attachments.pop().remove()

    def reload(self, whole: bool) -> None:
        state_dict = whole_state_dict(self.optimizer, self.num_ranks) if whole else self.optimizer.state_dict()
        self.optimizer.load_state_dict(state_dict)

    def reset(self, name: str, how: str) -> None:
        """Have the state of a parameter begin anew, by what torch's optimizers understand."""
        state, param = self.optimizer.state, self.params[name]
        if how == "pop":
            state.pop(param, None)
        elif param in state:
            # Not of a main parameter, which is the weight.
            moments = {key: value if "main" in key else torch.zeros_like(value) for key, value in state[param].items()}
            state[param] = {} if how == "empty" else moments

    def consolidate(self, to: int) -> None:
        self.optimizer.consolidate_state_dict(to % self.num_ranks)


def run_rank(
    group: Any, setup: Setup, start: Start, calls: Sequence[Call], how: str, folder: str
) -> tuple[list[Outcome], Start | None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = _Ours(group, setup, start)
        outcomes = [ours.run(call) for call in calls]
    ours.optimizer.zero_grad(True)
    outcomes.append(ours.run(Call("read")))
    if any(ours.params[name] not in ours.optimizer.state for name in ours.used("")):  # unfrozen since the last step
        how = folder = ""
    ours.save(how, folder)
    ours.optimizer.consolidate_state_dict()
    if ours.rank:
        return outcomes, None
    weights = {name: param.detach().clone() for name, param in ours.params.items()}
    return outcomes, Start(weights, ours.groups, ours.frozen, ours.optimizer.state_dict(), how, folder)


# --- the oracle ------------------------------------------------------------------------------------------------------


_HARMLESS = ("read", "attach", "remove", "synchronize", "consolidate", "metrics")
"""Calls that leave the report of the last step as it is."""


class _Differs(Exception):
    """Ranks have gradients of different parameters, which is an error."""


class _Oracle(_Both):
    """The gradients of all ranks, and whole tensors.

    Attributes:
        local: Per rank the gradients that are not averaged yet, by name.
        means: With sharded gradients, the means that backward passes have left.
        factor: What the clips that wait for a step multiply gradients by.
        may_fail: Whether the next call that needs gradients may be refused.
    """

    def __init__(self, setup: Setup, start: Start) -> None:
        arguments = self.build(setup, start, lambda _, weight: nn.Parameter(weight.float().clone()))
        if setup.config.moments is Moments.BF16:
            self.optimizer = ShardedDecoupledAdamW(**arguments, config=ShardingConfig(moments=Moments.BF16))
        else:
            self.optimizer = DecoupledAdamW(**arguments)
        self.forget(setup.num_ranks)

    def forget(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.local: list[dict[str, Tensor]] = [{} for _ in range(num_ranks)]
        self.means: dict[str, Tensor] = {}
        self.factor: Tensor | None = None
        self.is_used = self.is_averaged = self.is_touched = False
        self.assigned: set[str] = set()

    def may_fail(self, call: Call) -> bool:
        config = self.setup.config
        if call.name in ("step", "clip_grad_norm_"):
            return self.is_touched or (self.is_used and self.setup.is_full and config.reduce_gradients)
        if call.name in ("backward", "accumulate") and config.reduce_gradients:
            return self.is_used or self.is_averaged or self.factor is not None or (self.is_touched and bool(self.means))
        return call.name == "metrics" and (self.setup.metrics_in_step or self.is_gone)

    is_fresh = is_gone = False

    def dtype(self, name: str) -> torch.dtype:
        return BF16 if name in self.setup.narrow else F32

    def weight(self, name: str) -> Tensor:
        return weight_of(self.params[name].detach(), self.dtype(name))  # ties are not torch's

    def add(self, name: str, rank: int, key: int, value: Tensor | None = None) -> None:
        gradient = self.gradient(name, key, rank)
        here = self.local[rank]
        here[name] = here[name] + gradient if name in here else gradient

    def gradient(self, name: str, key: int, rank: int) -> Tensor:
        each = [draw(name, self.dtype(name), key, rank) for rank in range(self.num_ranks)]
        return each[rank] if self.setup.config.reduce_gradients else mean_in_rank_order(each)

    def backward(self, key: int, without: str, bad: int | None = None) -> Any:
        self.accumulate(key, without)
        used = self.used(without)
        if used and bad is not None and self.setup.config.skip_nonfinite:
            self.local[bad % self.num_ranks][used[0]].view(-1)[:1] = torch.inf
            if not self.setup.config.reduce_gradients:
                for here in self.local:
                    here[used[0]].view(-1)[:1] = torch.inf
        if used:
            self.end_round()
        return [self.loss(key, used, rank, bad) for rank in range(self.num_ranks)] if used else None

    def loss(self, key: int, used: Sequence[str], rank: int, bad: int | None) -> float | None:
        if bad is not None:
            return None
        gradients = {name: self.gradient(name, key, rank) for name in used}
        return float(Net({name: nn.Parameter(self.weight(name)) for name in SHAPES})(gradients))

    def end_round(self) -> None:
        if not self.setup.is_full:
            self.average()
            if self.is_used:
                self.is_averaged = True
        elif self.setup.config.overlap and self.num_ranks > 1:
            self.is_averaged = True

    def average(self) -> None:
        """Turn what is local into means, or add it to those there are."""
        for name in {name: None for here in self.local for name in here}:
            if sum(name in here for here in self.local) != self.num_ranks and self.params[name].requires_grad:
                raise _Differs(name)
        for name in self.local[0]:
            each = [here[name] for here in self.local if name in here]
            if len(each) == self.num_ranks:
                mean = each[0] if not self.setup.config.reduce_gradients else mean_in_rank_order(self.sent(each))
                self.means[name] = self.means[name] + mean if name in self.means else mean
        self.local = [{} for _ in self.local]
        self.assigned.clear()

    def sent(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        wire = self.setup.config.wire_dtype
        return [gradient if wire is None else gradient.to(wire).to(gradient.dtype) for gradient in gradients]

    def accumulate(self, key: int, without: str) -> None:
        if self.factor is not None and self.used(without):
            self.is_touched = True
        for rank in range(self.num_ranks):
            for name in self.used(without):
                self.add(name, rank, key)
        self.assigned -= set(self.used(without))

    def uneven(self, key: int, idle: int, without: str, to_none: bool, then: Call) -> Any:
        self.zero_grad(to_none)
        idle %= self.num_ranks
        if not self.setup.config.reduce_gradients or self.num_ranks == 1:
            self.backward(key, "")
        else:
            for rank in range(self.num_ranks):
                for name in self.used("" if rank != idle else without or "".join(SHAPES)):
                    self.add(name, rank, key)
            self.end_round()
        return getattr(self, then.name)(*then.args)

    def present(self) -> dict[str, Tensor]:
        """The means of parameters that are to be updated. With full gradients, they stay local for the oracle."""
        kept = [dict(here) for here in self.local], dict(self.means)
        self.average()
        means = {name: mean for name, mean in self.means.items() if self.params[name].requires_grad}
        if self.setup.is_full:
            self.local, self.means = kept
        return means

    def clip_grad_norm_(self, max_norm: float, norm_type: float) -> Tensor:
        if self.is_touched and not self.setup.config.reduce_gradients:
            self.factor = None
            self.is_touched = False
        gradients = [mean.double().flatten() for mean in self.present().values()]
        flat = torch.cat([torch.zeros(1, dtype=torch.float64), *gradients])
        norm = torch.linalg.vector_norm(flat, norm_type).float()
        before = norm if self.factor is None else norm * self.factor
        factor = torch.clamp(max_norm / (before + 1e-6), max=1.0)
        self.factor = factor if self.factor is None else self.factor * factor
        return before

    def step(self) -> None:
        means = self.present()
        if self.setup.max_grad_norm is not None:
            self.clip_grad_norm_(self.setup.max_grad_norm, 2.0)
        for name, param in self.params.items():
            param.grad = means[name].float() if name in means else None
        is_finite = all(mean.isfinite().all() for mean in means.values())
        is_void = self.setup.config.skip_nonfinite and not is_finite
        if not is_void:
            self.optimizer.grad_scale = None if self.factor is None else 1.0 / self.factor
            self.optimizer.step()
            self.optimizer.grad_scale = None
        self.factor, self.is_touched = None, False
        self.is_used, self.is_averaged, self.is_gone = True, False, False
        self.is_fresh = not is_void
        if not self.setup.is_full:
            self.local, self.means = [{} for _ in self.local], {}

    def closure(self, key: int) -> Any:
        self.zero_grad(True)
        loss = self.backward(key, "")
        self.step()
        return loss

    def zero_grad(self, to_none: bool) -> None:
        keep = [] if to_none else [*({n for here in self.local for n in here} if self.setup.is_full else self.assigned)]
        local = [{name: torch.zeros_like(here[name]) for name in keep if name in here} for here in self.local]
        self.forget(self.num_ranks)
        self.local, self.assigned = local, set(keep)
        self.is_gone = True

    def assign(self, name: str, key: int) -> None:
        if name not in "".join(self.groups):
            return
        self.is_touched = self.is_touched or self.is_averaged or self.is_used or self.factor is not None
        self.is_touched = self.is_touched or name in self.means
        for rank in range(self.num_ranks):
            self.local[rank][name] = self.gradient(name, key, rank)
        self.assigned.add(name)

    def scale(self, factor: float) -> None:
        self.is_touched = self.is_touched or self.factor is not None or bool(self.means)
        for here in self.local:
            for name in here:
                here[name] = here[name] * factor

    def scaled(self, key: int, bad: int | None, max_norm: float | None) -> None:
        self.zero_grad(True)
        if not self.setup.is_full or not self.used(""):
            return
        self.backward(key, "")
        if bad is None or not SIZES[self.used("")[0]]:
            if max_norm is not None:
                self.clip_grad_norm_(max_norm, 2.0)
            self.step()
        self.zero_grad(True)

    def joined(self, key: int, counts: Sequence[int]) -> None:
        used = self.used("")
        for number in range(max(counts[: self.num_ranks]) if self.setup.config.reduce_gradients and used else 0):
            self.zero_grad(True)
            for rank in range(self.num_ranks):
                for name in used:
                    self.add(name, rank, key + number)
                    if number >= counts[rank]:
                        self.local[rank][name].zero_()
            self.end_round()
            self.step()
        self.zero_grad(True)

    def drop(self, name: str) -> None:
        if self.setup.config.reduce_gradients:
            self.is_touched = self.is_touched or (self.factor is not None and any(name in here for here in self.local))
        self.is_touched = self.is_touched or name in self.means
        self.assigned.discard(name)
        for here in self.local:
            here.pop(name, None)
        if not any(self.local):  # the clip goes with the last of its gradients
            self.factor = None if not self.setup.config.reduce_gradients else self.factor

    def reset(self, name: str, how: str = "") -> None:
        for value in self.state()[name].values():
            value.zero_()

    def nothing(self, *_: Any) -> None:
        pass

    read = attach = remove = synchronize = reload = consolidate = metrics = nothing

    def state(self) -> dict[str, dict[str, Tensor]]:
        return {name: self.optimizer.state.get(param, {}) for name, param in self.params.items()}

    # --- comparing ---

    def follow(self, call: Call, outcomes: Sequence[Outcome]) -> None:
        """Do what the ranks have done, and see that they have done right."""
        errors = [outcome.error for outcome in outcomes]
        assert all(errors) or not any(errors), f"{call}: an error on some ranks only: {errors}"
        if errors[0]:
            if not self.may_fail(call):
                with contextlib.suppress(_Differs):
                    getattr(self, call.name)(*call.args)
                    raise AssertionError(f"{call}: {errors}")
            self.zero_grad(True)
        else:
            try:
                self.is_fresh = self.is_fresh and call.name in _HARMLESS
                expected = getattr(self, call.name)(*call.args)
            except _Differs as differs:
                raise AssertionError(f"{call}: gradients of {differs} differ, and no error") from None
            self.compare_values(call, expected, [outcome.value for outcome in outcomes])
        expected = flat(self.weight(name) for name in SHAPES)
        for outcome in outcomes:
            self.compare(call, outcome, expected)

    def compare_values(self, call: Call, expected: Any, values: Sequence[Any]) -> None:
        if isinstance(expected, Tensor):
            assert all(same(value, values[0]) for value in values), f"{call}: ranks differ: {values}"
            torch.testing.assert_close(
                values[0], expected, rtol=1e-6, atol=0.0, equal_nan=True, msg=lambda m: f"{call}: {m}"
            )
        elif isinstance(expected, list) and None not in expected:
            assert list(values) == expected, f"{call}: loss {values}, expected {expected}"
        if call.name == "metrics":
            assert all(map(str(values[0]).__eq__, map(str, values))), f"{call}: ranks differ"
            mine = self.optimizer.metrics() if self.is_fresh else {}
            for key, value in mine.items():
                is_same = key in values[0] and (set(mine) <= set(values[0]) or not key.endswith("global"))
                if is_same and not key.startswith("skipped") and not (self.setup.narrow and "/param/" in key):
                    torch.testing.assert_close(
                        values[0][key], value, rtol=1e-4, atol=1e-7, msg=f"{key}: {values[0][key]}, expected {value}"
                    )

    def compare(self, call: Call, outcome: Outcome, weights: np.ndarray) -> None:
        if outcome.params is not None and not np.array_equal(outcome.params, weights):
            places = np.flatnonzero(outcome.params != weights)
            raise AssertionError(
                f"after {call}: of {SIZES} differ {places}: {outcome.params[places]} {weights[places]}"
            )
        for name, count in outcome.steps.items():
            expected = float(self.state()[name].get("step", 0))
            assert count == expected, f"after {call}: step of {name} is {count}, expected {expected}"

    def compare_state(self, state: dict[str, Any]) -> None:
        names = "".join(self.groups)
        for index, entries in state["state"].items():
            expected = self.state()[names[index]]
            for key in entries:
                if key in ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
                    value = expected.get(key, torch.zeros_like(entries[key]))
                    assert same(entries[key].flatten(), value.flatten()), (
                        f"{key} of {names[index]}: {entries[key]}, expected {value}"
                    )


def same(some: Tensor, other: Tensor) -> bool:
    return torch.equal(some.nan_to_num(nan=77.0), other.nan_to_num(nan=77.0))


# --- sequences -------------------------------------------------------------------------------------------------------

NAMES, KEYS = st.sampled_from(sorted(SHAPES)), st.integers(0, 99)
WITHOUT = st.sets(NAMES, max_size=2).map(lambda names: "".join(sorted(names)))
RANKS = st.integers(0, 2)
NORMS = st.sampled_from([0.1, 1.0, 100.0])


def call(name: str, *args: st.SearchStrategy[Any]) -> st.SearchStrategy[Call]:
    return st.tuples(*args).map(lambda values: Call(name, values))


CLIP = call("clip_grad_norm_", NORMS, st.sampled_from([2.0, float("inf")]))
STEP = call("step")
SETTINGS = st.sampled_from(
    [("lr", 3e-3), ("lr", 0.0), ("weight_decay", 0.0), ("weight_decay", 5e-4), ("betas", (0.8, 0.9))]
)
CALLS = st.one_of(
    call("read"),
    STEP,
    call("zero_grad", st.booleans()),
    call("backward", KEYS, WITHOUT, st.none() | RANKS),
    STEP,
    call("zero_grad", st.just(True)),
    call("backward", KEYS, st.just("")),
    CLIP,
    call("accumulate", KEYS, WITHOUT),
    call("uneven", KEYS, RANKS, WITHOUT, st.booleans(), STEP | CLIP),
    call("scale", st.sampled_from([0.5, 2.0])),
    call("assign", NAMES, KEYS),
    call("closure", KEYS),
    call("scaled", KEYS, st.none() | RANKS, st.none() | NORMS),
    call("metrics"),
    call("schedule"),
    st.builds(lambda group, setting: Call("set_group", (group, *setting)), st.integers(0, 1), SETTINGS),
    call("freeze", NAMES),
    call("unfreeze", NAMES),
    call("edit", NAMES),
    call("add_group", st.sampled_from([1e-2, 2e-3])),
    call("attach"),
    call("remove"),
    call("synchronize"),
    call("reload", st.booleans()),
    call("consolidate", RANKS),
    call("drop", NAMES),
    call("reset", NAMES, st.sampled_from(["pop", "empty", "zeros"])),
    call("joined", KEYS, st.lists(st.integers(1, 3), min_size=3, max_size=3)),
    call("on_other_ranks", st.integers(1, 3), st.sampled_from(["state_dict", "state_dict", "checkpoint", "dcp"])),
)


@st.composite
def setups(draw: Any) -> Setup:
    reduces = draw(st.booleans() | st.just(True))
    narrow = draw(st.sampled_from(["", "ae"]))
    config = ShardingConfig(
        bucket_cap_mb=draw(st.sampled_from([16.0, 1e-4, 1e-3])),
        reduce_gradients=reduces,
        overlap=draw(st.booleans() | st.just(True)),
        gradient_residency=draw(st.sampled_from(GradientResidency)),
        exchange=draw(st.sampled_from([Exchange.FASTEST, Exchange.RANK_ORDER]))
        if narrow
        else draw(st.sampled_from(Exchange)),
        skip_nonfinite=draw(st.booleans()),
        main_parameter=draw(st.sampled_from([MainParameter.FP32, MainParameter.REMAINDER])),
        moments=Moments.FP32 if narrow else draw(st.sampled_from(Moments)),
        state_residency=draw(st.sampled_from([StateResidency.DEVICE, StateResidency.DEVICE, StateResidency.HOST])),
    )
    if config.exchange is not Exchange.BACKEND and draw(st.booleans()):
        config = replace(config, wire_dtype=BF16)
    return Setup(
        draw(st.integers(1, 3)),
        config,
        draw(st.booleans()),
        draw(st.sampled_from([None, 0.3])),
        draw(st.booleans()),
        draw(WITHOUT),
        narrow,
        draw(st.none() | st.integers(0, 9)),
    )


def segments(num_ranks: int, calls: Sequence[Call]) -> Iterator[tuple[int, list[Call], str]]:
    """What happens on each number of ranks, and how it is saved for the next one."""
    part: list[Call] = []
    for each in calls:
        if each.name == "on_other_ranks":
            yield num_ranks, part, each.args[1]
            num_ranks, part = each.args[0], []
        else:
            part.append(each)
    yield num_ranks, part, ""


def check(run: Callable[..., Any], setup: Setup, calls: Sequence[Call]) -> None:
    """Have ranks make these calls, as ``run`` runs them, beside the oracle."""
    note(f"RANDOM_CALLS_SEED={SEED}")
    weights = {name: draw_gradient(torch.empty(shape), 1, ord(name)) for name, shape in SHAPES.items()}
    weights |= {name: weights[name].to(BF16) for name in setup.narrow}
    start = Start(weights, GROUPS, setup.frozen)
    oracle = _Oracle(setup, start)
    with tempfile.TemporaryDirectory() as root:
        for number, (num_ranks, part, how) in enumerate(segments(setup.num_ranks, calls)):
            oracle.forget(num_ranks)
            oracle.ready(Start({}, (), ""))  # each number of ranks begins a schedule
            for name in start.frozen:  # whose state a new optimizer leaves out, main parameters among it, as it warns
                oracle.reset(name)
                oracle.params[name].data.copy_(oracle.weight(name))
            folder = f"{root}/{number}" if how in ("checkpoint", "dcp") else ""
            results = run(num_ranks, run_rank, setup, start, part, how, folder)
            for place, each in enumerate([*part, Call("zero_grad", (True,))]):
                oracle.follow(each, [outcomes[place] for outcomes, _ in results])
            start = results[0][1]
            oracle.compare_state(start.state)
            if start.folder:
                start.state = None


SEQUENCES = st.lists(CALLS, min_size=10, max_size=40)
IN_TURN = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


PLAIN = Setup(2, ShardingConfig(), False, None, False, "", "ae", None)
ASSIGNED_ON_ONE = [Call("assign", ("d", 0)), Call("uneven", (0, 0, "d", False, Call("step")))]
OVERFLOW = [Call("scaled", (0, 0, 0.1))]
ANEW = [Call("closure", (0,)), Call("reset", ("a", "empty")), Call("on_other_ranks", (1, "checkpoint"))]


@seed(SEED)
@settings(IN_TURN, max_examples=NUM_SEQUENCES)
@example(PLAIN, ASSIGNED_ON_ONE)  # what random sequences have found
@example(replace(PLAIN, num_ranks=3, frozen="a", narrow=""), OVERFLOW)
@example(PLAIN, ANEW)
@given(setups(), SEQUENCES)
def test_every_sequence_of_calls_does_what_the_update_rule_does_on_whole_tensors(
    setup: Setup, calls: list[Call]
) -> None:
    check(partial(on_ranks, seed=setup.interleaving), setup, calls)


@pytest.mark.clients
@seed(SEED)
@settings(IN_TURN, max_examples=NUM_SEQUENCES // 3, phases=[Phase.generate])  # a hang takes long, and is not shrunk
@given(setups(), SEQUENCES)
def test_so_does_every_sequence_over_gloo(setup: Setup, calls: list[Call]) -> None:
    if setup.config.exchange is Exchange.BACKEND and 3 in (
        num_ranks for num_ranks, *_ in segments(setup.num_ranks, calls)
    ):
        setup = replace(setup, config=replace(setup.config, exchange=Exchange.RANK_ORDER))  # gloo adds in its own order
    check(pool.on_ranks, setup, calls)
