"""``DecoupledAdamW``: the update rule on parameters as they lie, a drop-in for Composer's optimizer of that name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from operator import attrgetter, is_, itemgetter
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import AdamW
from torch.optim.optimizer import ParamsT

from sharded_dadamw.base import DecoupledOptimizer, checked_defaults, evaluate, without_graph
from sharded_dadamw.comm.dtensors import local_gradient
from sharded_dadamw.kernels.ready import Columns, ReadyUpdate, ReadyUpdates
from sharded_dadamw.layout.placement import is_of_fsdp1, local
from sharded_dadamw.norms.clipping import ClipOf, check_clip
from sharded_dadamw.norms.held import HeldAsTheyLie
from sharded_dadamw.state.in_place import drop_strangers, fill_in, unshare, without_mains
from sharded_dadamw.update.adamw import Step
from sharded_dadamw.update.hyperparameters import FREE_OF_LR, Hyperparameters, read_groups
from sharded_dadamw.update.storage import moments_of

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
"""Types of parameters that are not spread over ranks."""
_ToUpdate = tuple[list[Tensor], list[Tensor]]
"""Parameters of one group that a step updates, and their gradients."""

_grad, _requires_grad = attrgetter("grad"), attrgetter("requires_grad")


class DecoupledAdamW(DecoupledOptimizer, AdamW):
    """AdamW whose weight decay does not scale with the learning rate.

    Each step multiplies every weight by ``1 - weight_decay * lr / initial_lr``: the decay follows the learning-rate
    schedule, but not the learning rate's size. torch's AdamW multiplies by ``1 - lr * weight_decay``, so a setting for
    torch converts by ``weight_decay = peak_lr * torch_weight_decay``.

    ``initial_lr`` is put into every parameter group; LR schedulers keep it. ``OneCycleLR`` overwrites it and writes
    ``max_lr`` as well; the larger of the two is then the reference.

    State per trainable parameter, made when its group is added: ``step`` (0-d fp32), ``exp_avg``, ``exp_avg_sq`` and,
    with amsgrad, ``max_exp_avg_sq`` (shape and dtype of the parameter). For what is unfrozen, moved or swapped later it
    is made at the next ``step`` or ``state_dict``.

    Parameters may be plain, or what FSDP1, FSDP2, HSDP or tensor parallelism made of them, also mixed: the update
    rule is elementwise, so each rank updates the parts that it holds. Norms are those of the whole: added up over the
    ranks that hold other parts, with each element counted once.

    Under ``torch.amp.GradScaler`` gradients are unscaled within the update, and a non-finite one on any rank that holds
    a part leaves every byte as it was.

    Source of the rule: MosaicML Composer, ``composer.optim.DecoupledAdamW``; Loshchilov & Hutter, arXiv:1711.05101.
    """

    _clip: ClipOf
    _reports_whole = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 1e-5,
        amsgrad: bool = False,
        *,
        norm_group: dist.ProcessGroup | DeviceMesh | None = None,
        max_grad_norm: float | None = None,
        metrics_in_step: bool = False,
    ) -> None:
        """Take parameters, (name, parameter) pairs, or group dicts of either.

        Args:
            params: What to optimize.
            lr: Learning rate; a float or a one-element CPU tensor.
            betas: Coefficients of the moving averages of the gradient and of its square.
            eps: Added to the denominator.
            weight_decay: Fraction of a weight that decays away per step at the schedule's peak; warns from 1e-3 up.
            amsgrad: Use the running maximum of ``exp_avg_sq`` in the denominator.
            norm_group: The ranks over which norms are added up, a group or a 1-D mesh. None: those among which the
                parameters are sharded, which FSDP1's do not tell: for those, the group over which it shards. Stages of
                a pipeline have to say: all ranks of all stages, with parameters whose names differ between stages, and
                groups added on every stage or on none.
            max_grad_norm: What every ``step`` clips the gradients to, as ``clip_grad_norm_`` just before it, their loss
                scale taken off; ``metrics`` then has ``grad_norm`` and ``clip_coefficient``. After a
                ``clip_grad_norm_`` it clips what that has left. None: no clipping. Where parameters are sharded, steps
                are collective with it.
            metrics_in_step: Add up the norms of ``metrics`` over ranks in every ``step``, in one all-reduce, so that
                ``metrics`` is not collective, and rank 0 may call it alone. Where parameters are sharded, steps are
                collective with it.

        Raises:
            TypeError: ``lr`` is a tensor on an accelerator, or ``params`` holds something that is not a tensor.
            ValueError: A hyperparameter is out of range, ``params`` is empty, or it has no names and ``norm_group`` is
                given.
        """
        defaults = checked_defaults(lr, betas, eps, weight_decay, amsgrad)
        self._start_norms(norm_group is not None, max_grad_norm, metrics_in_step)
        self._clip, self._updates = ClipOf(), ReadyUpdates()
        super().__init__(params, lr, defaults["betas"], eps, weight_decay, amsgrad)
        self.defaults = defaults
        self.amsgrad = amsgrad
        self._norms.connect(norm_group, self._device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and make its state; entries it lacks take the constructor's values, ``initial_lr`` its own lr.

        Raises:
            TypeError: As the constructor.
            ValueError: As the constructor, or a parameter is in a group already.
        """
        super().add_param_group(param_group)
        self._updates.forget()
        self._fill_in_state(self.param_groups[-1])

    @staticmethod
    def adamw(
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        max_exp_avg_sqs: list[Tensor],
        state_steps: list[Tensor],
        *,
        amsgrad: bool,
        beta1: float,
        beta2: float,
        lr: float,
        initial_lr: float,
        weight_decay: float,
        eps: float,
    ) -> None:
        """Apply the update rule to lists of tensors of any shapes, with Composer's signature.

        ``params``, the moments and, with amsgrad, ``max_exp_avg_sqs`` are updated in place. ``grads`` and
        ``state_steps``, the number of this update counted from 1, 0-d each, are only read. ``initial_lr`` is the peak
        of the schedule, where 0 means full decay, and ``weight_decay`` the decay there.
        """
        columns = Columns(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs if amsgrad else [], state_steps)
        hyper = Hyperparameters(lr, initial_lr, beta1, beta2, eps, weight_decay, amsgrad)
        ReadyUpdate(columns, [])(columns, Step([hyper]), 0)

    @property
    def _step_supports_amp_scaling(self) -> bool:  # type: ignore[override]
        """Tells ``torch.amp.GradScaler`` to always call ``step``, and to leave scale and flag in attributes.

        Not for FSDP1, whose own scaler then would not hear of the other ranks' gradients.
        """
        return not any(is_of_fsdp1(param) for group in self.param_groups for param in group["params"])

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @without_graph
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; the others, and their state, stay as they are.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            The closure's loss.

        Raises:
            RuntimeError: A gradient is sparse.
            ValueError: A group's decay is 1 or more.
        """
        loss = evaluate(closure)
        self._note_peaks()
        hypers = read_groups(self.param_groups)
        self._warn_above_peak(hypers)
        to_update = self._to_update()
        found_inf = self._scalers_flag()
        if found_inf is not None:
            self._norms.ranks(self._held()).all_reduce_(found_inf, dist.ReduceOp.MAX)
        if self._clip:
            self._clip.keep_for(_gradients_of(to_update), to_clip=False)
        clip = None if self._max_grad_norm is None else self._clip_within_step(self._norm(to_update, 2.0))
        if clip is not None:
            self._clip.remember(_gradients_of(to_update))
        report = self._begin_report(hypers, found_inf, clip)
        counted = 1.0 if found_inf is None else (found_inf == 0).to(torch.float32)
        for index, (params, grads) in enumerate(to_update):
            if not params:
                continue
            columns, update = self._make_ready(index, params, grads)
            torch._foreach_add_(update.counts, counted)
            for places, squares in update(columns, report.step, index):
                report.add([params[place] for place in places], squares, hypers[index])
            report.updated += params
            increment_version(params)  # torch's kernel leaves out what makes a backward through an old graph fail
        self._warn_if_idle(report.updated)
        self._norms.end_step(self._held())
        return loss

    def _to_update(self) -> list[_ToUpdate]:
        """Return per group the parameters that a step updates, and their gradients, of which none may be sparse."""
        to_update = [_with_gradients(group) for group in self.param_groups]
        for params, grads in to_update:
            for param, grad in zip(params, grads, strict=True):
                if grad.layout != torch.strided:
                    name = next(held.member.name for held in self._held().holdings() if held.member.param is param)
                    raise RuntimeError(f"gradient of {name}: expected a dense tensor, got layout {grad.layout}")
        return to_update

    def _make_ready(self, index: int, params: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[Columns, ReadyUpdate]:
        """Return this rank's parts of parameters of one group with their state, and the update that is for them."""
        group = self.param_groups[index]
        columns = self._columns(params, grads, amsgrad=group["amsgrad"])
        update = None if columns is None else self._updates.find(index, columns)
        if columns is None or update is None:
            self._fill_in_state(group)
            columns = self._columns(params, grads, amsgrad=group["amsgrad"])
            assert columns is not None
            update = self._updates.make(index, columns)
        return columns, update

    def _columns(self, params: Sequence[Tensor], grads: Sequence[Tensor], *, amsgrad: bool) -> Columns | None:
        """Return this rank's parts of parameters with their state; None where there is some that has none."""
        states = [*map(self.state.__getitem__, params)]
        try:
            steps, *moments = [[*map(itemgetter(key), states)] for key in ("step", *moments_of(amsgrad))]
        except KeyError:
            return None
        if not _PLAIN.issuperset(map(type, params)):
            grads = [*map(local_gradient, params)]
            params, *moments = [[*map(local, tensors)] for tensors in (params, *moments)]
        return Columns(params, grads, moments[0], moments[1], moments[2] if amsgrad else [], steps)

    @without_graph
    def _fill_in_state(self, group: Mapping[str, Any]) -> None:
        """Make the state that trainable parameters of a group lack."""
        if not group["params"]:  # torch's loading functions leave nothing else in such a group
            return
        if fill_in(self.state, group):
            self._updates.forget()  # of parameters that others have been put in place of

    def _norm_to_clip(self, max_norm: float, norm_type: float) -> Tensor:
        check_clip(max_norm, norm_type)
        to_update = self._to_update()
        if self._clip:
            self._clip.keep_for(_gradients_of(to_update), to_clip=True)
        norm = self._norm(to_update, norm_type)
        self._clip.remember(_gradients_of(to_update))
        return norm

    def _norm(self, to_update: Sequence[_ToUpdate], norm_type: float) -> Tensor:
        """Return the norm of gradients over all parameters and ranks, 0-d fp32. Collective."""
        params = [param for of_group, _ in to_update for param in of_group]
        held = self._held()
        return held.gradient_norm(params, norm_type, self._norms.owners(held))

    def _held(self) -> HeldAsTheyLie:
        return HeldAsTheyLie(self.param_groups, self.state, self._device)

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled and copied; the copy knows that it had ``norm_group``, but not which."""
        own = {
            "_needs_names": self._norms.needs_names,
            "_max_grad_norm": self._max_grad_norm,
            "_metrics_in_step": self._norms.in_step,
        }
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what pickling and copying leave, which is not what was made ready for other tensors."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for group in self.param_groups:  # whose decay was checked
            group["decoupled_weight_decay"] = FREE_OF_LR
        if not hasattr(self, "_norms"):  # torch calls this for a loaded state, too
            needs_names, in_step = state.get("_needs_names", False), state.get("_metrics_in_step", False)
            self._start_norms(needs_names, state.get("_max_grad_norm"), in_step)
            self._clip, self._updates = ClipOf(), ReadyUpdates()
        self._updates.forget()

    def state_dict(self) -> dict[str, Any]:
        """Return the state in torch's format, of every parameter that is trainable or was."""
        drop_strangers(self.state, self._held().params())
        for group in self.param_groups:
            self._fill_in_state(group)
        return super().state_dict()

    @without_graph
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, of torch's AdamW or of Composer's optimizer.

        Moments take the dtype of their parameter, as in torch. Main parameters, which a whole state dict of
        ``ShardedDecoupledAdamW`` may have, are left out. The tensors in it are copied, unless they are this optimizer's
        own. After an error nothing has changed.

        Raises:
            TypeError: As the constructor, for a hyperparameter in it.
            ValueError: It is one rank's fragments, does not fit the groups or the shapes of parameters, has a
                hyperparameter out of range, or a weight decay above 1e-3 that nothing tells to be free of lr.
        """
        state = without_mains(state_dict["state"])
        self._check_loaded(state_dict["param_groups"])
        before: dict[str, Any] = {"state": self.state, "param_groups": self.param_groups}
        super().load_state_dict({**state_dict, "state": state})
        try:
            for group, ours in zip(self.param_groups, before["param_groups"], strict=True):
                if "param_names" in ours:
                    group["param_names"] = ours["param_names"]
                self._fill_in_state(group)
        except ValueError:
            self.__setstate__(before)
            raise
        unshare(self.state, state, before["state"])
        for group in self.param_groups:
            self._fill_in_state(group)


def _with_gradients(group: Mapping[str, Any]) -> _ToUpdate:
    """Return the parameters of a group that a step updates, and their gradients."""
    params: list[Tensor] = group["params"]
    grads = [*map(_grad, params)]
    if any(map(is_, grads, repeat(None))) or not all(map(_requires_grad, params)):
        pairs = [(p, grad) for p, grad in zip(params, grads, strict=True) if grad is not None and p.requires_grad]
        params, grads = [param for param, _ in pairs], [grad for _, grad in pairs]
    return params, grads


def _gradients_of(to_update: Sequence[_ToUpdate]) -> list[Tensor]:
    return [grad for _, grads in to_update for grad in grads]
