"""One bucket: its parameters and gradients, the state of this rank's shard of them, and the update of that shard.

    weights       [num_ranks * n]   p.data of every plain parameter is a view of it       (see weights for others)
    gradients     [num_ranks * n]   p.grad of every parameter that has one is a view of it   (see gradients for others)
    main, exp_avg, exp_avg_sq, max_exp_avg_sq  [n]   this rank's shard only

Where the parameters are narrower than fp32, ``main`` holds what the update acts on: an fp32 copy of the parameter
shard, or the 16 bits that it lacks. Where they are not, there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from sharded_dadamw.buckets.arrangement import Arrangement
from sharded_dadamw.buckets.gradients import Gradients
from sharded_dadamw.buckets.weights import BorrowedWeights, Weights
from sharded_dadamw.kernels import choose as kernels
from sharded_dadamw.kernels.operands import Operands, Update
from sharded_dadamw.kernels.ready import keep
from sharded_dadamw.layout.bucket_layout import Fragment
from sharded_dadamw.update.adamw import Step
from sharded_dadamw.update.storage import MAINS


class _Prepared(NamedTuple):
    """What a step needs for one set of present slots, made once.

    Attributes:
        update: None where this rank holds nothing of those slots.
        params: The parameters of the fragments that it updates, in their order.
        counted: fp32 [num_slots], 1 where a slot is updated.
    """

    update: Update | None
    params: list[Tensor]
    counted: Tensor


class Bucket:
    """One bucket on one rank: parameters of one group, dtype and device, all of them borrowed or none.

    Attributes:
        num_ahead: For how many buckets ``fetch_`` is worth calling before the first of them is updated.
        arrangement: What is in it; ``members``, its parameters in slot order, ``layout`` and ``storage`` are its parts.
        state_shards: The state tensors [n] of this rank, by their names in ``optimizer.state``.
    """

    num_ahead = 0

    def __init__(
        self, arrangement: Arrangement, rank: int, *, weights: Weights, gradients: Gradients, amsgrad: bool
    ) -> None:
        """Allocate the state, zeros; ``amsgrad`` says whether there is a ``max_exp_avg_sq``."""
        self.arrangement = arrangement
        self.layout, self.members, self.storage = arrangement.layout, arrangement.members, arrangement.storage
        self.rank = rank
        self.group_index = self.members[0].group_index
        self.weights = weights
        self.gradients = gradients
        self._params = [member.param for member in self.members]
        self._prepared: dict[tuple[object, ...], _Prepared] = {}
        self._runs: dict[tuple[bool, ...], list[slice]] = {}

        numel, device = self.layout.shard_numel, self.param.device
        self.state_shards = {
            name: torch.zeros(numel, dtype=dtype, device=device)
            for name, dtype in self.storage.state(amsgrad=amsgrad).items()
        }
        self.exp_avg, self.exp_avg_sq = self.state_shards["exp_avg"], self.state_shards["exp_avg_sq"]
        self.max_exp_avg_sq = self.state_shards.get("max_exp_avg_sq")
        self.main = next((self.state_shards[name] for name in MAINS if name in self.state_shards), None)
        self.counts = torch.zeros(len(self.members), dtype=torch.float32, device=device)

    @property
    def param(self) -> Tensor:
        """[n], what an update works on for this rank's shard of the parameters."""
        return self.weights.shard

    @property
    def grad(self) -> Tensor:
        """[n], what an update reads for this rank's shard of the gradients."""
        return self.gradients.shard

    def current_param(self, part: slice) -> Tensor:
        """A range of this rank's shard of the parameters as it is now, on the state's device; only to be read."""
        return self.weights.shard[part]

    @property
    def is_borrowed(self) -> bool:
        """Whether the parameters' memory belongs to something else."""
        return isinstance(self.weights, BorrowedWeights)

    @property
    def fuses_norms(self) -> bool:
        """Whether the norms of its updates come out of the updates; the same on every rank."""
        fragment = self.layout.fragment(0, self.rank)
        form = self._operands_at(fragment, self.param[fragment.in_shard]).form
        return kernels.kernel_for(form).fuses_norms

    def state_of(self, slot: int) -> dict[str, Tensor]:
        """The state of one parameter on this rank, all views: ``step`` [] and its 1-D fragments of the shards."""
        part = self.layout.fragment(slot, self.rank).in_shard
        return {"step": self.counts[slot]} | {name: shard[part] for name, shard in self.state_shards.items()}

    def reset_main_(self) -> None:
        """Take the main parameter from the weights, after those were filled with others."""
        if self.main is not None:
            self.main.copy_(self._main_of_weights(self.main, slice(None)))

    def main_of_weight(self, slot: int) -> Tensor:
        """What this rank's fragment of a main parameter is where nothing is known but the weight, 1-D; only to be read.

        Of borrowed weights it is what they were at the last ``weights.refresh_``.
        """
        assert self.main is not None
        part = self.layout.fragment(slot, self.rank).in_shard
        return self._main_of_weights(self.main[part], part)

    def _main_of_weights(self, main: Tensor, part: slice) -> Tensor:
        return torch.zeros_like(main) if main.dtype is torch.int16 else self.current_param(part)

    def runs(self, wanted: tuple[bool, ...]) -> list[slice]:
        """The ranges of the shard that belong to the slots that are ``wanted``, neighbours joined."""
        if wanted not in self._runs:
            runs: list[slice] = []
            for part in (fragment.in_shard for fragment in self._fragments_of(wanted)):
                is_next = bool(runs) and runs[-1].stop == part.start
                runs.append(slice(runs.pop().start, part.stop) if is_next else part)
            keep(self._runs, wanted, runs)
        return self._runs[wanted]

    def fetch_(self, step: Step) -> None:
        """Begin to bring in what ``update_`` reads, once gradients are reduced."""
        self.weights.refresh_()

    def update_(self, step: Step, present: tuple[bool, ...]) -> tuple[list[Tensor], Tensor | None]:
        """Apply the update rule to this rank's shard, after ``fetch_`` with the same ``step``.

        Slots that are not ``present`` stay as they are, with their state. Where ``void`` is 1 no step is counted
        either.

        Returns:
            The parameters of which this rank has updated fragments, and if they came out of the same pass the squared
            norms of those, fp64 [num_params, 4] in the order of NORMS, on the state's device.
        """
        prepared = self._prepared_for(present)
        self.counts.add_(prepared.counted if step.void is None else prepared.counted * (1 - step.void))
        return prepared.params, None if prepared.update is None else prepared.update(step, self.group_index)

    def _prepared_for(self, present: tuple[bool, ...]) -> _Prepared:
        """What a step needs; nothing that grows with the number of slots is done twice for the same ones.

        Not for tensors that have moved since, as by Tensor.share_memory_(): kernels go by addresses.
        """
        tensors = (self.param, self.grad, self.counts, *self.state_shards.values())
        key = (present, *map(Tensor.data_ptr, tensors))
        prepared = self._prepared.get(key)
        if prepared is None:
            fragments = self._fragments_of(present)
            operands = [self._operands_at(fragment, self.param[fragment.in_shard]) for fragment in fragments]
            counted = torch.tensor([float(here) for here in present], dtype=torch.float32)
            prepared = keep(
                self._prepared,
                key,
                _Prepared(
                    kernels.kernel_for(operands[0].form)(operands) if operands else None,
                    [self._params[fragment.slot] for fragment in fragments],
                    counted.to(self.counts.device, non_blocking=True),  # or the host would wait for the device
                ),
            )
        return prepared

    def _fragments_of(self, present: Sequence[bool]) -> list[Fragment]:
        return [fragment for fragment in self.layout.fragments(self.rank) if present[fragment.slot]]

    def _operands_at(self, fragment: Fragment, param: Tensor) -> Operands:
        part, first = fragment.in_shard, self.members[fragment.slot].first_element + fragment.param_start
        return Operands(
            param=param,
            grad=self.grad[part],
            exp_avg=self.exp_avg[part],
            exp_avg_sq=self.exp_avg_sq[part],
            max_exp_avg_sq=None if self.max_exp_avg_sq is None else self.max_exp_avg_sq[part],
            main=None if self.main is None else self.main[part],
            count=self.counts[fragment.slot],
            first_element=first if self.storage.is_stochastic else None,
        )

    def operands_of(self, slot: int) -> Operands:
        """This rank's fragment of one parameter as it is now, on the state's device; only to be read."""
        fragment = self.layout.fragment(slot, self.rank)
        return self._operands_at(fragment, self.current_param(fragment.in_shard))

    def announce_update(self, present: Sequence[bool]) -> list[Tensor]:
        """Let autograd know of the update, so that a backward through an older graph fails; returns who was updated."""
        updated = self._params if all(present) else list(compress(self._params, present))
        increment_version(updated)
        return updated
