"""One bucket: its parameters and gradients, the state of this rank's shard of them, and the update of that shard.

    weights       [num_ranks * n]   p.data of every plain parameter is a view of it       (see weights for others)
    gradients     [num_ranks * n]   p.grad of every parameter that has one is a view of it   (see gradients for others)
    main, exp_avg, exp_avg_sq, max_exp_avg_sq  [n]   this rank's shard only

State, and what an update takes for this rank's shard of parameters and gradients, are where ``workplace`` says.

Where the parameters are narrower than fp32, ``main`` holds what the update acts on: an fp32 copy of the parameter
shard, or the 16 bits that it lacks. Where they are not, there is none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from sharded_dadamw.buckets.gradients import Gradients
from sharded_dadamw.buckets.offload import Workplace
from sharded_dadamw.buckets.weights import BorrowedWeights, Weights
from sharded_dadamw.kernels import choose as kernels
from sharded_dadamw.kernels.operands import Form, Operands, Update
from sharded_dadamw.layout.bucket_layout import BucketLayout, Fragment
from sharded_dadamw.layout.parameters import NamedParameter
from sharded_dadamw.update.adamw import Step, value_of
from sharded_dadamw.update.precision import image
from sharded_dadamw.update.storage import Storage

_MAIN_KEYS = {torch.float32: "main_param", torch.int16: "main_remainder"}
_NUM_PLANS = 8
"""Updates kept ready. More than one is in use where the set of parameters with a gradient alternates."""


class _Plan(NamedTuple):
    """What a step needs for one set of present slots, made once.

    Attributes:
        update: The kernel, ready to be called; None where this rank holds nothing of those slots.
        params: The parameters of the fragments that it updates, in their order.
        taken: fp32 [num_slots], 1 where a slot is updated.
        spans: The ranges of the shard that it updates, as few as can be, with padding between slots.
    """

    update: Update | None
    params: list[Tensor]
    taken: Tensor
    spans: list[slice]


class Bucket:
    """One bucket on one rank: parameters of one group, dtype and device, all of them borrowed or none.

    Constructing it allocates the state.

    Attributes:
        layout: Where everything lies.
        storage: In what dtypes.
        rank: This rank.
        group_index: The parameter group whose hyperparameters hold for the whole bucket.
        members: The parameters, in slot order.
        histories: Per slot a number that is equal for slots with equal step counts; known without asking the device.
        weights: The parameters' elements.
        gradients: Their gradients.
        workplace: Where state lives and updates are made.
    """

    def __init__(
        self,
        layout: BucketLayout,
        members: Sequence[NamedParameter],
        storage: Storage,
        *,
        rank: int,
        group_index: int,
        weights: Weights,
        gradients: Gradients,
        workplace: Workplace,
        amsgrad: bool,
    ) -> None:
        """Allocate the state.

        Args:
            layout: Sizes must be those of ``members``.
            members: Parameters of one dtype on one device, in slot order.
            storage: The same for all of them.
            rank: Which shard is ours.
            group_index: Position of their parameter group.
            weights: Those of ``members``.
            gradients: Those of ``members``.
            workplace: For these weights and gradients.
            amsgrad: Whether to hold ``max_exp_avg_sq``.
        """
        self.layout = layout
        self.storage = storage
        self.rank = rank
        self.group_index = group_index
        self.members = tuple(members)
        self._params = [member.param for member in members]
        self.histories = [0] * len(members)
        self._plans: dict[tuple[object, ...], _Plan] = {}
        self._runs: dict[tuple[bool, ...], list[Tensor]] = {}
        self._places: list[int] = []

        self.weights = weights
        self.gradients = gradients
        self.workplace = workplace
        numel, device = layout.shard_numel, workplace.device
        self.main = None if storage.main is None else torch.zeros(numel, dtype=storage.main, device=device)
        self.reset_main_()
        self.exp_avg, self.exp_avg_sq, *maximum = (
            torch.zeros(numel, dtype=storage.moments, device=device) for _ in range(3 if amsgrad else 2)
        )
        self.max_exp_avg_sq = maximum[0] if amsgrad else None
        self.steps = torch.zeros(len(members), dtype=torch.float32, device=device)
        self._takes_edits = False

    @property
    def is_borrowed(self) -> bool:
        """Whether the parameters' memory belongs to something else."""
        return isinstance(self.weights, BorrowedWeights)

    @property
    def fuses_norms(self) -> bool:
        """Whether the norms of its updates come out of the updates; the same on every rank."""
        param, grad, storage = self.workplace.param, self.workplace.grad, self.storage
        form = Form(
            param.device, param.dtype, grad.dtype, storage.moments, storage.main, self.max_exp_avg_sq is not None
        )
        fuses_norms: bool = kernels.kernel_for(form).Update.fuses_norms
        return fuses_norms

    @property
    def shards(self) -> dict[str, Tensor]:
        """The state tensors [n] of this rank, by their names in ``optimizer.state``."""
        shards = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        if self.max_exp_avg_sq is not None:
            shards["max_exp_avg_sq"] = self.max_exp_avg_sq
        if self.main is not None:
            shards[_MAIN_KEYS[self.main.dtype]] = self.main
        return shards

    @property
    def state_bytes(self) -> int:
        """Bytes of the state tensors of this rank, as stored."""
        return sum(shard.nbytes for shard in self.shards.values())

    def state_of(self, slot: int) -> dict[str, Tensor]:
        """The state of one parameter on this rank, all views: ``step`` [] and its 1-D fragments of the shards."""
        part = _part(self.layout.fragment(slot, self.rank))
        return {"step": self.steps[slot]} | {name: shard[part] for name, shard in self.shards.items()}

    def reset_main_(self) -> None:
        """Take the main parameter from the weights, after those were filled with others."""
        if self.main is not None:
            self.main.copy_(self._main_of_weights(self.main, slice(None)))

    def main_of_weight(self, slot: int) -> Tensor:
        """What this rank's fragment of a main parameter is where nothing is known but the weight, 1-D; only to be read.

        Of borrowed weights it is what they were at the last ``weights.refresh_``.
        """
        assert self.main is not None
        part = _part(self.layout.fragment(slot, self.rank))
        return self._main_of_weights(self.main[part], part)

    def _main_of_weights(self, main: Tensor, part: slice) -> Tensor:
        return torch.zeros_like(main) if main.dtype is torch.int16 else self.workplace.current_param(part)

    def gradient_runs(self, wanted: Sequence[bool]) -> list[Tensor]:
        """The parts of the reduced gradient shard that belong to the slots that are ``wanted``, as few 1-D views."""
        self._forget_moved()
        key = tuple(wanted)
        if key not in self._runs:
            if len(self._runs) == _NUM_PLANS:
                self._runs.clear()
            self._runs[key] = self._runs_of(self.gradients.shard, key)
        return self._runs[key]

    def fetch_(self, step: Step) -> None:
        """Begin to bring to the workplace what ``update_`` needs, once gradients are reduced.

        Args:
            step: With its tensors on the parameters' device.
        """
        self.weights.refresh_()
        self._takes_edits = self._absorbs_edits and self.weights.may_be_edited()
        self.workplace.fetch_(step, self.group_index, with_param=self._takes_edits or not self._absorbs_edits)

    def update_(self, present: Sequence[bool]) -> tuple[list[Tensor], Tensor | None]:
        """Apply the update rule to this rank's shard, as the step has it that ``fetch_`` was given.

        Args:
            present: Per slot whether its parameter has a gradient; the others, and their state, stay as they are.

        Returns:
            The parameters of which this rank has updated fragments, and if they came out of the same pass the squared
            norms of those, fp64 [num_params, 4] in the order of NORMS, at the workplace.
        """
        step = self.workplace.arrive()
        if self._takes_edits:
            self._absorb_edits_()
        plan = self._plan(tuple(present))
        self.steps.add_(plan.taken if step.found_inf is None else plan.taken * (1 - step.found_inf))
        if not all(present):
            labels: dict[tuple[int, bool], int] = {}
            self.histories = [labels.setdefault(key, len(labels)) for key in zip(self.histories, present, strict=True)]
        if plan.update is None:
            return [], None
        squares = plan.update(step, self.group_index)
        self.workplace.deliver_(plan.spans)
        return plan.params, squares

    @property
    def _moments(self) -> list[Tensor]:
        moments = (self.exp_avg, self.exp_avg_sq, self.max_exp_avg_sq)
        return [moment for moment in moments if moment is not None]

    def _plan(self, present: tuple[bool, ...]) -> _Plan:
        """What a step needs; nothing that grows with the number of slots is done twice for the same ones."""
        key = (present, *self.histories)
        self._forget_moved()
        plan = self._plans.pop(key, None)  # put back as the latest
        if plan is None:
            if len(self._plans) == _NUM_PLANS:
                del self._plans[next(iter(self._plans))]
            operands = self._operands(present)
            taken = torch.tensor([float(here) for here in present], dtype=torch.float32)
            taken = taken.to(self.steps.device, non_blocking=True)  # or the host would wait for the device
            update = kernels.prepare(operands) if operands else None
            params = [self.members[fragment.slot].param for fragment in self._fragments_of(present)]
            plan = _Plan(update, params, taken, self._spans_of(present))
        self._plans[key] = plan
        return plan

    def _forget_moved(self) -> None:
        """Forget what was made ready if our tensors have moved, as by Tensor.share_memory_()."""
        at_work = (self.workplace.param, self.workplace.grad, self.steps, self.main)
        tensors = (self.weights.shard, self.gradients.shard, *at_work, *self._moments)
        places = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        if places != self._places:
            self._plans.clear()
            self._runs.clear()
            self._places = places

    def _fragments_of(self, present: Sequence[bool]) -> list[Fragment]:
        return [fragment for fragment in self.layout.fragments(self.rank) if present[fragment.slot]]

    def _runs_of(self, shard: Tensor, present: Sequence[bool]) -> list[Tensor]:
        """The parts of a shard that belong to slots that are present, neighbours joined."""
        runs: list[tuple[int, int]] = []
        for fragment in self._fragments_of(present):
            start, stop = fragment.shard_start, fragment.shard_start + fragment.numel
            runs.append((runs.pop()[0], stop) if runs and runs[-1][1] == start else (start, stop))
        return [shard[start:stop] for start, stop in runs]

    def _spans_of(self, present: Sequence[bool]) -> list[slice]:
        """The ranges of a shard with the slots that are present and no others, neighbours joined over padding."""
        spans: list[slice] = []
        joins = False
        for fragment in self.layout.fragments(self.rank):
            if present[fragment.slot]:
                start = spans.pop().start if joins else fragment.shard_start
                spans.append(slice(start, fragment.shard_start + fragment.numel))
            joins = present[fragment.slot]
        return spans

    def _operands(self, present: Sequence[bool]) -> list[Operands]:
        """This rank's fragments of the slots that are present, in order."""
        param = self.workplace.param
        return [self._operands_at(fragment, param[_part(fragment)]) for fragment in self._fragments_of(present)]

    def _operands_at(self, fragment: Fragment, param: Tensor) -> Operands:
        part = _part(fragment)
        return Operands(
            param=param,
            grad=self.workplace.grad[part],
            exp_avg=self.exp_avg[part],
            exp_avg_sq=self.exp_avg_sq[part],
            max_exp_avg_sq=None if self.max_exp_avg_sq is None else self.max_exp_avg_sq[part],
            main=None if self.main is None else self.main[part],
            step=self.steps[fragment.slot],
            first_element=self._first_element(fragment) if self.storage.is_stochastic else None,
            history=self.histories[fragment.slot],
        )

    def _first_element(self, fragment: Fragment) -> int:
        return self.members[fragment.slot].first_element + fragment.param_start

    def operands_of(self, slot: int) -> Operands:
        """This rank's fragment of one parameter, as it is after a step, at the workplace."""
        fragment = self.layout.fragment(slot, self.rank)
        return self._operands_at(fragment, self.workplace.current_param(_part(fragment)))

    def value_of(self, slot: int) -> Tensor:
        """This rank's fragment of what the rule acts on, for one parameter; fp32 or wider, at the workplace."""
        part = _part(self.layout.fragment(slot, self.rank))
        return value_of(self.workplace.current_param(part), None if self.main is None else self.main[part])

    @property
    def _absorbs_edits(self) -> bool:
        return self.main is not None and self.main.dtype is not torch.int16

    def _absorb_edits_(self) -> None:
        """Let weights that were edited in place since the last step win over the fp32 main parameter.

        ``model.load_state_dict`` and ``p.copy_`` write the model's narrow weights and know nothing of the wider copy.
        Only elements that no longer are the image of the main parameter are taken over, so that swapping weights out
        and back in loses no precision; nor are those that are its image by torch's rounding, as others save them. A
        remainder needs no such care: it is less than half of the weight's last digit.
        """
        assert self.main is not None
        shard = self.workplace.param
        edited = (image(self.main, shard.dtype) != shard) & (self.main.to(shard.dtype) != shard)
        self.main.copy_(torch.where(edited, shard.to(self.main.dtype), self.main))

    def announce_update(self, present: Sequence[bool]) -> list[Tensor]:
        """Let autograd know that parameters have changed, so that a backward through an older graph fails.

        Args:
            present: Per slot whether it was updated.

        Returns:
            The parameters that were.
        """
        updated = self._params if all(present) else list(compress(self._params, present))
        increment_version(updated)
        if self._absorbs_edits:
            self.weights.note_update()
        return updated

    def reread_histories(self) -> None:
        """Derive ``histories`` from the step counts, after these were loaded."""
        self.histories = [int(step) for step in self.steps.tolist()]


def fetched(buckets: Iterable[Bucket], step: Step) -> Iterator[Bucket]:
    """Begin to bring to their workplaces what buckets need, and yield them in order, to be updated.

    Args:
        buckets: With their gradients reduced as they come; where copies take time, the next one is asked for first.
        step: What to do to them; where ``found_inf`` is 1 no step is counted either.
    """
    waiting: deque[Bucket] = deque()
    for bucket in buckets:
        bucket.fetch_(step)
        waiting.append(bucket)
        if len(waiting) > bucket.workplace.num_ahead:
            yield waiting.popleft()
    yield from waiting


def _part(fragment: Fragment) -> slice:
    """Where it is in the shard."""
    return slice(fragment.shard_start, fragment.shard_start + fragment.numel)
