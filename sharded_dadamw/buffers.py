"""The flat tensors of one bucket, the parameters that live in them as views, and the update of one shard.

    param_buffer  [num_ranks * n]   p.data of every parameter is a view of it
    gradients     [num_ranks * n]   p.grad of every parameter that has one is a view of it
    main, exp_avg, exp_avg_sq, max_exp_avg_sq  [n]   this rank's shard only

``main`` is what the update acts on: an fp32 copy of the parameter shard where the parameters are narrower, and the
parameter shard itself where they are not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from sharded_dadamw import kernels
from sharded_dadamw.gradients import ForeignGradients, OwnGradients
from sharded_dadamw.layout import BucketLayout, segments
from sharded_dadamw.parameters import NamedParameter
from sharded_dadamw.update import Hyperparameters


class Bucket:
    """One bucket on one rank: parameters of one group, dtype and device.

    Constructing it moves the parameters into the flat buffer (``p.data`` becomes a contiguous view, ``p`` stays the
    same object) and allocates the state.

    Attributes:
        layout: Where everything lies.
        rank: This rank.
        group_index: The parameter group whose hyperparameters hold for the whole bucket.
        members: The parameters, in slot order.
        histories: Per slot a number that is equal for slots with equal step counts; known without asking the device.
        gradients: Their gradients.
    """

    def __init__(
        self,
        layout: BucketLayout,
        members: Sequence[NamedParameter],
        *,
        rank: int,
        group_index: int,
        amsgrad: bool,
        main_dtype: torch.dtype | None,
        owns_gradients: bool,
    ) -> None:
        """Allocate buffers and state, and move ``members`` in.

        Args:
            layout: Sizes must be those of ``members``.
            members: Parameters of one dtype on one device, in slot order.
            rank: Which shard is ours.
            group_index: Position of their parameter group.
            amsgrad: Whether to hold ``max_exp_avg_sq``.
            main_dtype: Dtype of the main parameter where the parameters are narrower; None for no main parameter.
            owns_gradients: Whether gradients live here too. If not, ``p.grad`` is read where it is.
        """
        first = members[0].param
        self.layout = layout
        self.rank = rank
        self.group_index = group_index
        self.members = tuple(members)
        self.histories = [0] * len(members)
        start, stop = layout.shard_range(rank)

        self.param_buffer = torch.zeros(layout.numel, dtype=first.dtype, device=first.device)
        self.param_shard = self.param_buffer[start:stop]
        self._param_views = [
            self.param_buffer[offset : offset + member.param.numel()].view(member.param.shape)
            for member, offset in zip(members, layout.offsets, strict=True)
        ]
        where = OwnGradients if owns_gradients else ForeignGradients
        self.gradients: OwnGradients | ForeignGradients = where(members, layout, rank, self._param_views)
        for member, view in zip(members, self._param_views, strict=True):
            view.copy_(member.param.data)
            member.param.data = view
        self._versions = self._read_versions()

        self.has_main = main_dtype is not None and first.dtype.itemsize < main_dtype.itemsize
        self.main = self.param_shard.to(main_dtype) if self.has_main else self.param_shard
        self.exp_avg = torch.zeros_like(self.main)
        self.exp_avg_sq = torch.zeros_like(self.main)
        self.max_exp_avg_sq = torch.zeros_like(self.main) if amsgrad else None
        self.steps = torch.zeros(len(members), dtype=torch.float32, device=first.device)

    def _read_versions(self) -> list[int]:
        return [member.param._version for member in self.members]

    @property
    def shards(self) -> dict[str, Tensor]:
        """The state tensors [n] of this rank, by their names in ``optimizer.state``."""
        shards = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        if self.max_exp_avg_sq is not None:
            shards["max_exp_avg_sq"] = self.max_exp_avg_sq
        if self.has_main:
            shards["main_param"] = self.main
        return shards

    def state_of(self, slot: int) -> dict[str, Tensor]:
        """The state of one parameter on this rank, all views: ``step`` [] and its 1-D fragments of the shards."""
        fragment = self.layout.fragment(slot, self.rank)
        stop = fragment.shard_start + fragment.numel
        state = {"step": self.steps[slot]}
        state.update({name: shard[fragment.shard_start : stop] for name, shard in self.shards.items()})
        return state

    def misplaced(self) -> list[NamedParameter]:
        """The parameters that have been moved out of the flat buffer."""
        return [
            member
            for member, view in zip(self.members, self._param_views, strict=True)
            if member.param.data_ptr() != view.data_ptr()
            or member.param.dtype != view.dtype
            or member.param.shape != view.shape
        ]

    def reset_main_(self) -> None:
        """Take the main parameter from the parameter buffer, after that was filled with other weights."""
        if self.has_main:
            self.main.copy_(self.param_shard)

    def gradient_runs(self, present: Sequence[bool]) -> list[Tensor]:
        """The parts of the reduced gradient shard that belong to the slots that are ``present``, as 1-D views."""
        runs = segments(self.layout, self.rank, [0 if here else None for here in present])
        return [self.gradients.shard[run.start : run.stop] for run in runs]

    def update_(
        self,
        present: Sequence[bool],
        hyper: Hyperparameters,
        *,
        grad_divisor: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Apply the law to this rank's shard, once its gradients are reduced, and publish it in the parameter buffer.

        Args:
            present: Per slot whether its parameter has a gradient; the others, and their state, stay as they are.
            hyper: The group's scalars.
            grad_divisor: 0-d fp32 by which gradients are divided; None means 1.
            found_inf: 0-d fp32; where it is 1 nothing changes and no step is counted. None means 0.
        """
        self._absorb_edits_()
        self._count_step_(present, found_inf)
        histories = [history if here else None for history, here in zip(self.histories, present, strict=True)]
        runs = segments(self.layout, self.rank, histories)
        grads = self.gradients.shard.to(self.main.dtype)
        maxima = self.max_exp_avg_sq
        kernels.adamw_(
            [self.main[run.start : run.stop] for run in runs],
            [grads[run.start : run.stop] for run in runs],
            [self.exp_avg[run.start : run.stop] for run in runs],
            [self.exp_avg_sq[run.start : run.stop] for run in runs],
            [] if maxima is None else [maxima[run.start : run.stop] for run in runs],
            [self.steps[run.slot] for run in runs],
            hyper=hyper,
            grad_divisor=grad_divisor,
            found_inf=found_inf,
        )
        if self.has_main:
            self.param_shard.copy_(self.main)

    def _absorb_edits_(self) -> None:
        """Let weights that were edited in place since the last step win over the main parameter.

        ``model.load_state_dict`` and ``p.copy_`` write the model's narrow weights and know nothing of the wider copy.
        Only elements that no longer are the image of the main parameter are taken over, so that swapping weights out
        and back in loses no precision.
        """
        if self.has_main and self._read_versions() != self._versions:
            edited = self.main.to(self.param_shard.dtype) != self.param_shard
            self.main.copy_(torch.where(edited, self.param_shard.to(self.main.dtype), self.main))

    def announce_update(self, present: Sequence[bool]) -> None:
        """Let autograd know that parameters have changed, so that a backward through an older graph fails.

        Args:
            present: Per slot whether it was updated.
        """
        increment_version([member.param for member, here in zip(self.members, present, strict=True) if here])
        self._versions = self._read_versions()

    def _count_step_(self, present: Sequence[bool], found_inf: Tensor | None) -> None:
        """Advance the step count of every slot that is about to be updated, unless the update will be skipped."""
        taken: Tensor | float = 1.0 if found_inf is None else 1 - found_inf
        if all(present):
            self.steps.add_(taken)
            return
        mask = torch.tensor([float(p) for p in present], dtype=torch.float32, device=self.steps.device)
        self.steps.add_(mask * taken)
        labels: dict[tuple[int, bool], int] = {}
        self.histories = [labels.setdefault(key, len(labels)) for key in zip(self.histories, present, strict=True)]

    def reread_histories(self) -> None:
        """Derive ``histories`` from the step counts, after these were loaded."""
        self.histories = [int(step) for step in self.steps.tolist()]
