"""``DecoupledAdamW``: the law on whole parameters, a drop-in for Composer's optimizer of that name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import AdamW
from torch.optim.optimizer import ParamsT

from sharded_dadamw import kernels
from sharded_dadamw.operands import Form, Operands, Update
from sharded_dadamw.storage import LARGEST_BETA2_FOR_NEAREST
from sharded_dadamw.update import Hyperparameters, check_group

log = logging.getLogger("sharded_dadamw")

SHARD = "shard"
"""Under this key the state dict of one rank says which shards it holds. It stands among the state, where a tool that
would take shards for whole tensors stumbles over it, instead of dropping it and losing the other ranks' shards."""

_HIGH_WEIGHT_DECAY = 1e-3

_Place = tuple[Any, ...]
"""The form of tensors, their size and where they lie: an update made ready for some does for others in their place."""
_Copies = list[tuple[Tensor, Tensor]]
"""Tensors, each with the copy that was updated in its place."""


class DecoupledAdamW(AdamW):
    """AdamW whose weight decay does not scale with the learning rate.

    Each step multiplies every weight by ``1 - weight_decay * lr / initial_lr``: the decay follows the learning-rate
    schedule, but not the learning rate's size. torch's AdamW multiplies by ``1 - lr * weight_decay``, so a setting for
    torch converts by ``weight_decay = peak_lr * torch_weight_decay``.

    ``initial_lr`` is put into every parameter group; LR schedulers keep it. ``OneCycleLR`` overwrites it and writes
    ``max_lr`` as well; the larger of the two is then the reference.

    State per parameter, made at its first step: ``step`` (0-d fp32), ``exp_avg``, ``exp_avg_sq`` and, with amsgrad,
    ``max_exp_avg_sq`` (shape and dtype of the parameter).

    Source of the law: MosaicML Composer, ``composer.optim.DecoupledAdamW``; Loshchilov & Hutter, arXiv:1711.05101.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 1e-5,
        amsgrad: bool = False,
    ) -> None:
        """Take parameters, (name, parameter) pairs, or group dicts of either.

        Args:
            params: What to optimize.
            lr: Learning rate; a float or a one-element CPU tensor.
            betas: Coefficients of the moving averages of the gradient and of its square.
            eps: Added to the denominator.
            weight_decay: Fraction of a weight that decays away per step at the schedule's peak; warns from 1e-3 up.
            amsgrad: Use the running maximum of ``exp_avg_sq`` in the denominator.

        Raises:
            TypeError: ``lr`` is a tensor on an accelerator, or ``params`` holds something that is not a tensor.
            ValueError: A hyperparameter is out of range, or ``params`` is empty.
        """
        check_group({"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        _warn_if_high(weight_decay)
        beta1, beta2 = betas
        self._ready_updates: dict[int, tuple[list[_Place], list[Update]]] = {}
        self._captured_updates: list[list[Update]] = []
        super().__init__(params, lr, (float(beta1), float(beta2)), eps, weight_decay, amsgrad)
        self.amsgrad = amsgrad

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; entries it lacks take the constructor's values, and ``initial_lr`` its own lr.

        Raises:
            TypeError: As the constructor.
            ValueError: As the constructor, or a parameter is in a group already.
        """
        self._check_group(param_group)
        # float(): a tensor lr that a scheduler changes in place must not take its own reference along.
        param_group.setdefault("initial_lr", float(param_group.get("lr", self.defaults["lr"])))
        super().add_param_group(param_group)

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
        """Apply the law to lists of tensors, in place, with Composer's signature.

        Args:
            params: Tensors of any shape; decayed and updated.
            grads: Their gradients; only read.
            exp_avgs: Moving averages of the gradients; updated.
            exp_avg_sqs: Moving averages of the squared gradients; updated.
            max_exp_avg_sqs: Running maxima of those; updated. Empty without amsgrad.
            state_steps: 0-d each: the number of this update, counted from 1.
            amsgrad: Whether the maxima go into the denominator.
            beta1: Coefficient of ``exp_avgs``.
            beta2: Coefficient of ``exp_avg_sqs``.
            lr: Learning rate of this step.
            initial_lr: Peak of the schedule; 0 means full decay.
            weight_decay: Decay at the peak.
            eps: Added to the denominator.
        """
        maxima = max_exp_avg_sqs if amsgrad else [None] * len(params)
        columns = zip(params, grads, exp_avgs, exp_avg_sqs, maxima, state_steps, strict=True)
        alike = [
            _alike_in_memory(Operands(param, grad, exp_avg, exp_avg_sq, maximum, None, step))
            for param, grad, exp_avg, exp_avg_sq, maximum, step in columns
        ]
        fragments = [fragment for fragment, _ in alike]
        for update in _prepare(fragments, [_place(fragment) for fragment in fragments]):
            update(Hyperparameters(lr, initial_lr, beta1, beta2, eps, weight_decay, amsgrad))
        for _, copies in alike:
            _put_back_(copies)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; the others, and their state, stay as they are.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            The closure's loss.

        Raises:
            RuntimeError: A gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            if "initial_lr" not in group:
                group["initial_lr"] = float(group["lr"])
            hyper = Hyperparameters.from_group(group)
            params = [p for p in group["params"] if p.grad is not None and p.requires_grad]
            fragments = []
            for param in params:
                if param.grad.layout != torch.strided:
                    raise RuntimeError(f"DecoupledAdamW: expected dense gradients, got layout {param.grad.layout}")
                state = self._state_of(param, hyper)
                fragments.append(
                    Operands(
                        param=_local(param),
                        grad=_local_gradient(param),
                        exp_avg=_local(state["exp_avg"]),
                        exp_avg_sq=_local(state["exp_avg_sq"]),
                        max_exp_avg_sq=_local(state["max_exp_avg_sq"]) if hyper.amsgrad else None,
                        main=None,
                        step=state["step"],
                    )
                )
            if fragments:
                torch._foreach_add_([fragment.step for fragment in fragments], 1)
            self._update_(index, fragments, hyper)
            increment_version(params)  # torch's kernel leaves out what makes a backward through an old graph fail
        return loss

    def _update_(self, group_index: int, fragments: Sequence[Operands], hyper: Hyperparameters) -> None:
        """Apply the law to a group, with what an earlier step has made ready if everything is still where it was."""
        alike = [_alike_in_memory(fragment) for fragment in fragments]
        places = [_place(fragment) for fragment, _ in alike]
        ready_places, updates = self._ready_updates.get(group_index, ([], []))
        if ready_places != places:
            updates = _prepare([fragment for fragment, _ in alike], places)
            # What refers to tensors would keep gradients in memory that zero_grad() is to free.
            if not any(update.keeps_tensors for update in updates):
                self._ready_updates[group_index] = places, updates
        for update in updates:
            update(hyper)
        for _, copies in alike:
            _put_back_(copies)
        if fragments and fragments[0].param.is_cuda and torch.cuda.is_current_stream_capturing():
            self._captured_updates.append(updates)  # a graph's replays read what these hold on the device

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what pickling and copying leave, which is not what was made ready for other tensors."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._ready_updates, self._captured_updates = {}, []

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, of torch's AdamW or of Composer's optimizer.

        Raises:
            TypeError: As the constructor, for a hyperparameter in it.
            ValueError: It is one rank's shards, does not fit the groups, or has a hyperparameter out of range.
        """
        if SHARD in state_dict["state"]:
            raise ValueError(
                "expected the whole state, got one rank's shards from ShardedDecoupledAdamW.state_dict(); load them "
                "into a ShardedDecoupledAdamW on the same rank of an equally large group"
            )
        for group in state_dict["param_groups"]:
            self._check_group(group)
        super().load_state_dict(state_dict)

    def _check_group(self, group: dict[str, Any]) -> None:
        """Refuse a group that is added or loaded, or warn of it; what it lacks are the constructor's values."""
        merged = {**self.defaults, **group}
        check_group(merged)
        if merged["weight_decay"] != self.defaults["weight_decay"]:  # of which the constructor has warned
            _warn_if_high(merged["weight_decay"])

    def _state_of(self, param: Tensor, hyper: Hyperparameters) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        if "step" not in state:
            if param.dtype.itemsize < 4 and hyper.beta2 > LARGEST_BETA2_FOR_NEAREST:
                _warn_of_freezing(param.dtype, hyper.beta2)
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        if state["step"].device != param.device:  # state dicts of torch's AdamW keep it on the CPU
            state["step"] = state["step"].to(param.device)
        if state["step"].dtype is not torch.float32:  # saved where the default dtype was fp64, or as an integer
            state["step"] = state["step"].to(torch.float32)
        if hyper.amsgrad and "max_exp_avg_sq" not in state:
            state["max_exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state


@cache
def _warn_of_freezing(dtype: torch.dtype, beta2: float) -> None:
    log.warning(
        "beta2=%g is high for moments in %s that are rounded to the nearest: a step of exp_avg_sq is then below half "
        "its last digit, and it never falls again. ShardedDecoupledAdamW, on one rank too, keeps them in fp32, or "
        "rounds them stochastically.",
        beta2,
        dtype,
    )


def _warn_if_high(weight_decay: float) -> None:
    if weight_decay >= _HIGH_WEIGHT_DECAY:
        log.warning(
            "weight_decay=%g is high for a decay that does not scale with lr: every step at the peak of the schedule "
            "multiplies the weights by %g. Multiply a value meant for torch.optim.AdamW by lr.",
            weight_decay,
            1.0 - weight_decay,
        )


def _prepare(fragments: Sequence[Operands], places: Sequence[_Place]) -> list[Update]:
    """Updates of fragments of any forms: one for each form."""
    by_form: dict[Form, list[Operands]] = {}
    for fragment, (form, *_) in zip(fragments, places, strict=True):
        by_form.setdefault(form, []).append(fragment)
    return [kernels.prepare(alike) for alike in by_form.values()]


def _alike_in_memory(fragment: Operands) -> tuple[Operands, _Copies]:
    """The same with its elements in one order in memory, which kernels need, and what had to be copied for that.

    Raises:
        ValueError: The tensors differ in shape; torch's kernel would write past the end of the smaller ones.
    """
    param, shape, all_contiguous = fragment.param, fragment.param.shape, True
    for tensor in fragment.tensors:
        if tensor is not None:
            if tensor.shape != shape:
                shapes = [list(each.shape) for each in fragment.tensors if each is not None]
                raise ValueError(f"expected tensors of one shape, got {shapes}")
            all_contiguous = all_contiguous and tensor.is_contiguous()
    if all_contiguous:
        return fragment, []
    model = param if _is_dense(param) else param.contiguous()
    copies: _Copies = []

    def alike(tensor: Tensor) -> Tensor:
        if tensor.stride() == model.stride():
            return tensor
        copies.append((tensor, torch.empty_like(model, dtype=tensor.dtype).copy_(tensor)))
        return copies[-1][1]

    maximum = fragment.max_exp_avg_sq
    laid_out = replace(
        fragment,
        param=alike(fragment.param),
        grad=alike(fragment.grad),
        exp_avg=alike(fragment.exp_avg),
        exp_avg_sq=alike(fragment.exp_avg_sq),
        max_exp_avg_sq=None if maximum is None else alike(maximum),
    )
    return laid_out, [(original, copy) for original, copy in copies if original is not fragment.grad]


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one run of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _put_back_(copies: _Copies) -> None:
    for original, copy in copies:
        original.copy_(copy)


def _place(fragment: Operands) -> _Place:
    return fragment.form, fragment.param.numel(), *fragment.addresses()


def _local_gradient(param: Tensor) -> Tensor:
    """This rank's part of a gradient, laid out like its parameter: tensor parallelism may leave it unsummed."""
    grad: Any = param.grad
    placements = getattr(param, "placements", None)
    if placements is not None and grad.placements != placements:
        grad = grad.redistribute(grad.device_mesh, placements)
    return _local(grad)


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, as FSDP2 makes them; any other tensor as it is. The law is elementwise."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
