"""What both optimizers share: groups that are checked, a loss scaler's flag, and the report of the last step."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache, wraps
from typing import Any, ClassVar, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import AdamW, Optimizer

from sharded_dadamw.comm.calls import enter
from sharded_dadamw.comm.collectives import Collectives
from sharded_dadamw.norms.clipping import PendingClip, checked_max_grad_norm
from sharded_dadamw.norms.composer import MetricFunctions, cannot_replace
from sharded_dadamw.norms.held import Held
from sharded_dadamw.norms.norm_ranks import NormRanks
from sharded_dadamw.norms.step_report import StepReport, named_values
from sharded_dadamw.state.fingerprint import Fingerprint, Fingerprints, parts_of
from sharded_dadamw.update.adamw import Step
from sharded_dadamw.update.hyperparameters import (
    FREE_OF_LR,
    HIGH_WEIGHT_DECAY,
    Hyperparameters,
    check_group,
)

log = logging.getLogger("sharded_dadamw")
P = ParamSpec("P")
T = TypeVar("T")

_NOT_TRIED = "2.15"
_ROUNDING = 1e-4
"""By how much an lr may exceed the peak of its schedule for being computed in fp32."""


def checked_defaults(
    lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float, amsgrad: bool
) -> dict[str, Any]:
    """Return what a parameter group has by default, with the entries of torch's AdamW; warns of a high decay."""
    check_group({"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
    _warn_if_high(weight_decay)
    beta1, beta2 = betas
    model = AdamW([torch.empty(0)], lr, (float(beta1), float(beta2)), eps, weight_decay, amsgrad)
    return {**model.defaults, "decoupled_weight_decay": FREE_OF_LR}


def without_graph(call: Callable[P, T]) -> Callable[P, T]:
    """Have a method build no graph, and allocate tensors that training can write into.

    Within ``torch.inference_mode``, where some evaluate, save and clip, it would allocate others.
    """

    @wraps(call)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        # Only from within: to leave it turns on what a caller may have turned off, such as threads of backward.
        leaving = torch.inference_mode(mode=False) if torch.is_inference_mode_enabled() else nullcontext()
        with leaving, torch.no_grad():
            return call(*args, **kwargs)

    return called


def evaluate(closure: Callable[[], float] | None) -> float | None:
    """Call the closure of ``step``, if there is one; it builds a graph though ``step`` does not."""
    with torch.enable_grad():
        return None if closure is None else closure()


def _require_order(saved: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a state dict that has parameters of these groups in other places, which are what counts."""
    if not all(isinstance(key, int) for group in saved for key in group["params"]):
        return  # by torch's functions, which went by names
    theirs, ours = ([name for group in each for name in group.get("param_names", ())] for each in (saved, groups))
    moved = set(theirs) & set(ours)
    for their, our in zip(theirs, ours, strict=False):
        if their != our and {their, our} <= moved and len(theirs) == len(ours):
            raise ValueError(
                f"param_groups: expected the state of {our} in the place of {their}, since state goes by the order "
                "of parameters; give them to the optimizer in the order in which they were saved, or load by torch's "
                "set_optimizer_state_dict"
            )


@cache
def _meet_torch() -> None:
    """Have dynamo break its graph where it meets this package, and say once if this torch is newer than those tried."""
    torch._dynamo.trace_rules.add(__package__)  # any torch.optim.Optimizer has imported dynamo
    if torch.__version__ >= _NOT_TRIED:
        log.info("torch %s was not tried with sharded_dadamw; older than %s was", torch.__version__, _NOT_TRIED)


class DecoupledOptimizer(Optimizer):
    """The part of the contract that does not depend on where parameters and state are.

    Attributes:
        metric_functions: Per metric what it is, as in Composer's optimizer; read only.
    """

    metric_functions = MetricFunctions()
    _clip: PendingClip
    _reports_whole: ClassVar[bool]
    """Whether Composer's protocol is given norms of whole parameters, or of what this rank holds of them."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a class that brings metric functions, which nothing would call."""
        super().__init_subclass__(**kwargs)
        if "metric_functions" in vars(cls):
            raise cannot_replace()

    def _start_norms(self, needs_names: bool, max_grad_norm: float | None, metrics_in_step: bool) -> None:
        """Begin before the first step; with ``norm_group``, parameters need names."""
        self._max_grad_norm = checked_max_grad_norm(max_grad_norm)
        self._may_warn = self._is_first_step = True
        self._norms = NormRanks(needs_names=needs_names, in_step=metrics_in_step)
        self._clip = PendingClip()  # never another one: proxies of the optimizer share it
        self._fingerprints = Fingerprints()  # likewise

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; entries it lacks take the constructor's values, and ``initial_lr`` its own lr.

        Raises:
            TypeError: As the constructor.
            ValueError: As the constructor, or a parameter is in a group already.
        """
        _meet_torch()
        self._check_group(param_group)
        self._norms.start_anew()
        # float(): a tensor lr that a scheduler changes in place must not take its own reference along.
        param_group.setdefault("initial_lr", float(param_group.get("lr", self.defaults["lr"])))
        param_group["decoupled_weight_decay"] = FREE_OF_LR
        super().add_param_group(param_group)
        if self._norms.needs_names and "param_names" not in self.param_groups[-1]:
            del self.param_groups[-1]
            raise ValueError(
                "expected (name, parameter) pairs, such as model.named_parameters(), beside norm_group: names tell "
                "which parameters of two ranks are one"
            )

    def _check_group(self, group: Mapping[str, Any]) -> None:
        """Refuse a group, or warn of it; what it lacks are the constructor's values."""
        merged = {**self.defaults, **group}
        check_group(merged)
        if merged["weight_decay"] != self.defaults["weight_decay"]:  # of which the constructor has warned
            _warn_if_high(merged["weight_decay"])

    def _check_loaded(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Refuse groups of a state dict, or warn of them."""
        _require_order(groups, self.param_groups)
        for index, group in enumerate(groups):
            self._check_group(group)
            weight_decay = float(group.get("weight_decay", 0.0))
            if weight_decay > HIGH_WEIGHT_DECAY and group.get("decoupled_weight_decay") != FREE_OF_LR:
                raise ValueError(
                    f"param_groups[{index}]['weight_decay']: expected one that does not scale with lr, got "
                    f"{weight_decay:g}, which is probably that of torch.optim.AdamW. Convert such a state, and load it "
                    "by torch's set_optimizer_state_dict: sharded_dadamw.interchange.from_torch(state_dict, "
                    "model.named_parameters()); one of Composer's optimizer by from_composer"
                )

    def _note_peaks(self) -> None:
        """Take the lr of groups whose ``initial_lr`` was taken away for the peak of a schedule that begins now."""
        for group in self.param_groups:
            if "initial_lr" not in group:
                group["initial_lr"] = float(group["lr"])

    def _warn_above_peak(self, hypers: Sequence[Hyperparameters]) -> None:
        """Warn once of a step whose lr is above the peak of its schedule."""
        for index, hyper in enumerate(hypers if self._may_warn else ()):
            if (
                hyper.weight_decay
                and not isinstance(hyper.lr, Tensor)
                and hyper.lr > hyper.initial_lr * (1 + _ROUNDING)
            ):
                log.warning(
                    "param_groups[%d]: lr=%g is above initial_lr=%g, which should be the peak of the schedule: the "
                    "weights decay %g times as fast as weight_decay says. Set the group's initial_lr.",
                    index,
                    hyper.lr,
                    hyper.initial_lr,
                    hyper.multiplier,
                )
                self._may_warn = False
                return

    def _warn_if_idle(self, updated: Sequence[Tensor]) -> None:
        """Warn of a first step that had nothing to update, though there is something to train."""
        if (
            self._is_first_step
            and not updated
            and any(param.requires_grad and param.numel() for group in self.param_groups for param in group["params"])
        ):
            log.warning(
                "step() found no gradient, and has updated nothing. If there was a backward pass, the model has other "
                "parameters now than this optimizer, as after model.load_state_dict(..., assign=True): build the "
                "optimizer after that"
            )
        self._is_first_step = False

    @property
    def _device(self) -> torch.device:
        """Where norms are computed."""
        return next((param.device for group in self.param_groups for param in group["params"]), torch.device("cpu"))

    def _scalers_flag(self) -> Tensor | None:
        """A copy of the loss scaler's non-finite flag, 0-d fp32; it hands over a plain 0 where it saw no gradient."""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None:
            return None
        return torch.as_tensor(found_inf, device=self._device).to(torch.float32, copy=True).reshape(())

    def _with_loss_scale(self, divisor: Tensor | None) -> Tensor | None:
        """Return what gradients are to be divided by, their loss scale included, 0-d fp32; None means 1."""
        if (grad_scale := getattr(self, "grad_scale", None)) is None:
            return divisor
        scale: Tensor = grad_scale.to(self._device, torch.float32).reshape(())
        return scale if divisor is None else divisor * scale

    def _clip_within_step(self, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Clip the step that is under way by ``max_grad_norm``, after whatever clip waited for it.

        ``norm`` is that of the gradients as they are, their loss scale included. Returns, for the report, the norm
        after earlier clips, and what all clips multiply gradients by.
        """
        assert self._max_grad_norm is not None
        scale = self._with_loss_scale(None)
        before = self._clip.add(norm if scale is None else norm / scale, max_norm=self._max_grad_norm)
        return before, self._clip.coefficient

    def _begin_report(
        self, hypers: Sequence[Hyperparameters], void: Tensor | None, clip: tuple[Tensor, Tensor] | None
    ) -> StepReport:
        """Begin the report of a step, with what its updates are to be told."""
        step = Step(hypers, self._with_loss_scale(self._clip.use() if self._clip else None), void)
        self._norms.report = self._norms.report.next(step, clip)
        return self._norms.report

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients: to None, or to zeros in place. A parameter left at None is left alone by ``step``."""
        super().zero_grad(set_to_none)
        self._clip.clear()

    def _settle(self) -> None:
        """Have parameters and state be what they are meant to be, before they are read."""

    @abstractmethod
    def _held(self) -> Held:
        """Return what this rank holds of the parameters."""

    @abstractmethod
    def _norm_to_clip(self, max_norm: float, norm_type: float) -> Tensor:
        """Return the norm of the gradients as they are, 0-d fp32, if they can be clipped so. Collective."""

    @without_graph
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Clip the gradients by their norm over all parameters and ranks. Collective where anything is sharded.

        Call it between the last backward and ``step``, in place of torch's, which would see this rank's gradients only.
        Gradients are averaged where ``step`` averages them, and else stay as they are; ``step`` uses them clipped.

        Args:
            max_norm: The norm that gradients must not exceed.
            norm_type: 2 or inf.
            error_if_nonfinite: Wait for the norm, and raise if it is nan or infinite.

        Returns:
            0-d fp32: the norm of the (averaged) gradients before this clipping, the same bits on every rank.

        Raises:
            RuntimeError: The norm is not finite and ``error_if_nonfinite`` is set; or as ``step``, where that averages.
            ValueError: ``max_norm`` is negative or nan, or ``norm_type`` is neither 2 nor inf; or the ranks over which
                to add up are not known.
        """
        max_norm, norm_type = float(max_norm), float(norm_type)
        enter("clip_grad_norm_()")
        norm = self._norm_to_clip(max_norm, norm_type)
        return self._clip.add(norm, max_norm=max_norm, norm_type=norm_type, error_if_nonfinite=error_if_nonfinite)

    @without_graph
    def metrics(self) -> dict[str, Tensor]:
        """Everything about the most recent step. Collective: one all-reduce, and an exchange of names the first time.

        Call it on every rank, after ``step`` and before ``zero_grad``. With ``metrics_in_step`` the step has added up:
        then any rank may call it alone, until the next step. A parameter that had no gradient in that step has gradient
        and update 0, and before the first step all have.

        Returns:
            0-d fp32 tensors on the parameters' device, the same keys in the same order on every rank:
            ``l2_norm/{moment,param,update,grad}/NAME`` for every trainable parameter of any rank, and the same with
            ``global`` for NAME over all of them; ``effective_decay/group_I``, the fraction by which the step shrank the
            weights of a group; with ``max_grad_norm`` set, ``grad_norm``, the norm of the gradients before the step
            clipped them, and ``clip_coefficient``, what it multiplied them by; ``skipped_steps``, the number of steps
            so far that a non-finite gradient made void.

        Raises:
            RuntimeError: The update was made by a kernel that does not measure (in fp64, or without numba or Triton),
                and a gradient that would have to be measured now is gone; or there was no step yet
                with ``metrics_in_step``.
            ValueError: The ranks over which to add up are not known; pass ``norm_group``.
        """
        enter("metrics()", "with metrics_in_step=True one rank may call it alone")
        return named_values(self._norms.report, self._norms.table(self._held()), len(self.param_groups))

    @without_graph
    def fingerprint(self, process_group: dist.ProcessGroup | DeviceMesh | None = None) -> Fingerprint:
        """A 64-bit number of every parameter and of its state, the same in every layout and on any number of ranks.

        Collective: one all-reduce, and an exchange of names the first time. Waits for the device. Call it between a
        ``step`` and the next one. Ranks that hold the same elements are compared: replicas of whole parameters, rows of
        a 2-D mesh, HSDP. How a number is formed is in docs/same_run.md.

        Args:
            process_group: The ranks that are compared, and over which is added up. None: those over which norms are,
                which ``DecoupledAdamW`` is to be told of where plain parameters are replicated.

        Raises:
            RuntimeError: Ranks that should hold the same values do not; names rank, parameter and tensor. Everywhere.
            ValueError: Of a parameter is not known which of its elements lie where: FSDP1's.
        """
        enter("fingerprint()")
        return self._fingerprint(self._norms.ranks(self._held()) if process_group is None else process_group)

    def _fingerprint(
        self, ranks: Collectives | dist.ProcessGroup | DeviceMesh, names: Mapping[int, str] | None = None
    ) -> Fingerprint:
        """As ``fingerprint``, with other names of parameters, by their ids."""
        self._settle()
        return self._fingerprints.make(parts_of(self._held(), names), ranks, self._device)

    @without_graph
    def report_per_parameter_metrics(
        self, param: Tensor, name: str, optimizer_metrics: dict[str, Any]
    ) -> dict[str, Any]:
        """Add the metrics of one parameter's last update. Composer's protocol.

        ``DecoupledAdamW`` reports norms of what this rank holds of the parameter.
        ``ShardedDecoupledAdamW`` reports those of the whole, the same on every rank; call it there
        on all ranks or on none: the first call after a step is collective.

        Args:
            param: A parameter.
            name: What to call it.
            optimizer_metrics: Gets ``l2_norm/{moment,param,update,grad}/NAME``, 0-d fp32 tensors. Nothing where the
                last step has not updated the parameter.

        Returns:
            ``optimizer_metrics``.

        Raises:
            RuntimeError: As ``metrics``.
        """
        report = self._norms.report
        if report.values is None:
            enter("report_per_parameter_metrics()")
            held = self._held()
            if self._reports_whole:
                table = self._norms.table(held)
                squares, places = table.squares, {id(each): table.row_of[id(each)] for each in report.updated}
            else:
                held.make_measurable(report)
                here, squares = report.squares_of(report.updated_here(), held.look, held.device)
                places = {id(updated): place for place, updated in enumerate(here)}
            norms = squares.sqrt().to(torch.float32).unbind()
            report.values = {key: norms[place] for key, place in places.items()}
        return self._norms.composer.report(report, param, name, optimizer_metrics)

    @without_graph
    def pre_reduce_metrics(self, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        """Turn norms that were reported into squares that can be added up. Composer's protocol.

        Collective the first time: ranks find out who holds the same elements, of which one counts them.

        Args:
            optimizer_metrics: What was reported; changed. Norms (``l2_norm...``) are squared, in fp64, and 0 where
                another rank counts the same elements; others stay as they are.

        Returns:
            ``optimizer_metrics``.
        """
        enter("pre_reduce_metrics()")
        owners = self._norms.owners(self._held(), for_composer=True)
        counted = owners.first_here if self._reports_whole else owners.counted
        return self._norms.composer.pre_reduce(self._norms.report, counted, optimizer_metrics)

    @without_graph
    def dist_reduce_metrics(self, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        """Add up over ranks what ``pre_reduce_metrics`` returned. Composer's protocol.

        Collective: one all-reduce for everything, and an exchange of names where some are new. Waits for the device.

        Args:
            optimizer_metrics: May lack what other ranks have; changed.

        Returns:
            ``optimizer_metrics``, 0-d fp32, sorted, with the same keys on every rank: norms, and of what is not called
            ``l2_norm...`` the mean over the ranks that had it.
        """
        enter("dist_reduce_metrics()")
        held = self._held()
        ranks = self._norms.ranks(held, for_composer=True)
        return self._norms.composer.dist_reduce(ranks, held.device, optimizer_metrics)


def _warn_if_high(weight_decay: float) -> None:
    if weight_decay >= HIGH_WEIGHT_DECAY:
        log.warning(
            "weight_decay=%g is high for a decay that does not scale with lr: every step at the peak of the schedule "
            "multiplies the weights by %g. Multiply a value meant for torch.optim.AdamW by lr.",
            weight_decay,
            1.0 - weight_decay,
        )
