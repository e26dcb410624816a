"""The flat tensors of one bucket, and the parameters and gradients that live in them as views.

    param_buffer  [num_ranks * n]   p.data of every parameter is a view of it
    grad_buffer   [num_ranks * n]   p.grad of every parameter that has one is a view of it
    main, exp_avg, exp_avg_sq, max_exp_avg_sq  [n]   this rank's shard only

``main`` is what the update acts on: an fp32 copy of the parameter shard where the parameters are narrower, and the
parameter shard itself where they are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

from sharded_dadamw.layout import BucketLayout
from sharded_dadamw.parameters import NamedParameter


class Gradients(Enum):
    """What a bucket's gradient memory means right now."""

    LOCAL = "this rank's own gradients, accumulating"
    REDUCED = "this rank's slice is the mean over ranks; the other slices are still local"
    CONSUMED = "a step has used them; zero_grad() makes room for new ones"


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
        gradients: What the gradient memory means right now.
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
        self.gradients = Gradients.LOCAL
        self._marked: list[tuple[Tensor, int]] = []
        start, stop = layout.shard_range(rank)

        self.param_buffer = torch.zeros(layout.numel, dtype=first.dtype, device=first.device)
        self.param_shard = self.param_buffer[start:stop]
        self._param_views = self._views(self.param_buffer)
        self.grad_buffer: Tensor | None = None
        self._grad_views: list[Tensor] = []
        if owns_gradients:
            self.grad_buffer = torch.zeros_like(self.param_buffer)
            self.grad_shard = self.grad_buffer[start:stop]
            self._grad_views = self._views(self.grad_buffer)
        else:
            self.grad_shard = torch.zeros_like(self.param_shard)
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

    def _views(self, buffer: Tensor) -> list[Tensor]:
        return [
            buffer[offset : offset + member.param.numel()].view(member.param.shape)
            for member, offset in zip(self.members, self.layout.offsets, strict=True)
        ]

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

    def holds_gradient(self, slot: int) -> bool:
        """Whether ``p.grad`` of a slot is its view of the gradient buffer."""
        grad = self.members[slot].param.grad
        return grad is not None and bool(self._grad_views) and grad.data_ptr() == self._grad_views[slot].data_ptr()

    def mark_gradients(self, meaning: Gradients) -> None:
        """Say what the gradients mean from now on, and remember which they are, so that their end is noticed."""
        self.gradients = meaning
        # Gradients that live elsewhere are used up by a step; holding on to them would only hold their memory.
        forget = meaning is Gradients.LOCAL or (meaning is Gradients.CONSUMED and self.grad_buffer is None)
        self._marked = [] if forget else self._present_gradients()

    def _present_gradients(self) -> list[tuple[Tensor, int]]:
        """The gradients that exist, each with the count of in-place changes to its memory."""
        grads = (member.param.grad for member in self.members)
        return [(grad, grad._version) for grad in grads if grad is not None and grad.numel()]

    @property
    def has_reduced_gradients(self) -> bool:
        """Whether there are gradients, and their mean over ranks is in ``grad_shard``."""
        return self.gradients is Gradients.REDUCED and bool(self._marked)

    def marked_gradients_ended(self, *, arriving: int | None = None) -> bool:
        """Whether the gradients last marked were dropped or cleared, by ``zero_grad`` of the model or by hand.

        Args:
            arriving: The slot to which backward has just delivered a gradient, or None.
        """
        if self.gradients is Gradients.LOCAL:
            return False
        if not self._marked:
            return self.gradients is Gradients.CONSUMED or arriving is not None or bool(self._present_gradients())
        kept = {id(grad): version for grad, version in self._marked}
        present = [(grad, kept[id(grad)]) for grad, _ in self._present_gradients() if id(grad) in kept]
        if self.grad_buffer is None:
            return len(present) < len(kept) or any(grad._version != version for grad, version in present)
        # Views share one count with their buffer. Clearing counts once for each gradient that is still there, and
        # backward once, for the gradient to which it has added.
        added = arriving is not None and id(self.members[arriving].param.grad) in kept
        return all(grad._version - version >= len(present) + added for grad, version in present)

    def adopt_gradient(self, slot: int) -> None:
        """Move one parameter's gradient into the flat buffer, where it is not there already.

        Raises:
            ValueError: The gradient is sparse, or in another dtype than the parameter.
        """
        member, view = self.members[slot], self._grad_views[slot]
        grad = member.param.grad
        if grad is None:
            return
        _check_gradient(member, grad)
        if self.holds_gradient(slot):
            return
        view.copy_(grad.detach())  # backward with create_graph must not draw the buffer into its graph
        member.param.grad = view

    def copy_own_gradients(self) -> None:
        """Copy this rank's fragments of gradients that live elsewhere into ``grad_shard``.

        Raises:
            ValueError: A gradient is sparse, or in another dtype than its parameter.
        """
        for fragment in self.layout.fragments(self.rank):
            member = self.members[fragment.slot]
            grad = member.param.grad
            if grad is not None:
                _check_gradient(member, grad)
                own = grad.reshape(-1)[fragment.param_start : fragment.param_start + fragment.numel]
                self.grad_shard[fragment.shard_start : fragment.shard_start + fragment.numel].copy_(own)

    def reset_main_(self) -> None:
        """Take the main parameter from the parameter buffer, after that was filled with other weights."""
        if self.has_main:
            self.main.copy_(self.param_shard)

    def absorb_edits_(self) -> None:
        """Let weights that were edited in place since the last step win over the main parameter.

        ``model.load_state_dict`` and ``p.copy_`` write the model's narrow weights and know nothing of the wider copy.
        Only elements that no longer are the image of the main parameter are taken over, so that swapping weights out
        and back in loses no precision.
        """
        versions = self._read_versions()
        if versions != self._versions and self.has_main:
            edited = self.main.to(self.param_shard.dtype) != self.param_shard
            self.main.copy_(torch.where(edited, self.param_shard.to(self.main.dtype), self.main))
        self._versions = versions

    def publish_(self) -> None:
        """Round the main parameter into this rank's slice of the parameter buffer, where they are two tensors."""
        if self.has_main:
            self.param_shard.copy_(self.main)

    def count_step_(self, present: Sequence[bool], found_inf: Tensor | None) -> None:
        """Advance the step count of every slot that is about to be updated.

        Args:
            present: Per slot whether it has a gradient.
            found_inf: 0-d fp32; 1 where the update is going to be skipped, so that nothing advances. None means 0.
        """
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


def _check_gradient(member: NamedParameter, grad: Tensor) -> None:
    if grad.layout != torch.strided:
        raise ValueError(f"gradient of {member.name}: expected a dense tensor, got layout {grad.layout}")
    if grad.dtype != member.param.dtype:
        raise ValueError(f"gradient of {member.name}: expected {member.param.dtype}, got {grad.dtype}")
