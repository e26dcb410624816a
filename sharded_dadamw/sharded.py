"""``ShardedDecoupledAdamW``: builds the parts, sequences a step, and keeps the torch.optim contract.

    backward    hooks move each gradient into its bucket and launch its reduce-scatter;
                backward ends when all means are there                                     (reducer, comm)
    step        ranks compare what they are about to do, then bucket by bucket:            (step_agreement, handshake)
                    one fused update of this rank's shard                                  (kernels)
                    all-gather the parameters in place, while the next bucket is updated   (gatherer, comm)
    forward     where the model is attached, layers wait for the parameters they read      (gatherer)

With ``overlap=False``, in the first step and on one rank, full gradients are averaged in ``step``, one bucket ahead.

This module conducts and touches no element itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import ParamsT

from sharded_dadamw.base import DecoupledOptimizer, checked_defaults, evaluate, without_graph
from sharded_dadamw.buckets.shards import Shards, refuse_other_optimizers, with_lists
from sharded_dadamw.config import ShardingConfig
from sharded_dadamw.norms.held import HeldInBuckets
from sharded_dadamw.schedule.clock import StepClock, StepCost
from sharded_dadamw.schedule.gatherer import Attachment, Gatherer
from sharded_dadamw.schedule.joining import JoinableOptimizer, Joining
from sharded_dadamw.schedule.reducer import Reducer, fetched
from sharded_dadamw.schedule.step_agreement import Agreed, Asked, StepAgreement
from sharded_dadamw.state.state_dict import ShownState, fragments_of, gather_state, load_into


class ShardedDecoupledAdamW(DecoupledOptimizer, JoinableOptimizer):
    """``DecoupledAdamW`` with its state, and its work, spread over the ranks of a group.

    Every rank holds the same parameters, end to end in flat buckets. It keeps the moments, and the fp32 main parameters
    of narrower ones, of an equal shard of every bucket, averages gradients by reduce-scatter, updates its shard and
    all-gathers the parameters in place. Given equal averages the result is the unsharded optimizer's, bit for bit.

    The constructor is collective. It checks that ranks were given the same things, broadcasts rank 0's parameters, and
    makes ``p.data`` of trainable ones views of flat buffers: move the model to its device and dtype before.

    ``optimizer.state[p]`` holds ``step`` (0-d fp32) and of what there is of ``exp_avg``, ``exp_avg_sq``,
    ``max_exp_avg_sq``, ``main_param`` and ``main_remainder`` this rank's part of the flattened whole, in rank order. It
    may be changed in place. Put a tensor in the place of one, and the next ``step`` copies it there. A main parameter
    that was changed to what does not round to its weight yields to that. Remove all entries of a parameter, and its
    state begins anew, but for a main parameter.

    A parameter whose ``grad`` is None on all ranks stays as it is. Gradients are averaged in place by the end of
    backward: call it once per step outside ``no_sync``, and ``zero_grad`` before the next. Averages may be multiplied
    by one number that all ranks share, and not be changed otherwise. With ``GradientResidency.SHARDED`` only this
    rank's shard of the mean is kept, ``p.grad`` is None or zeros once it is reduced, and means of several backwards add
    up.

    ``micro_batches`` are the numbers, a range, of this rank's backward passes of a step, counted over all ranks.

    Source: ZeRO, arXiv:1910.02054, stages 1 and 2.
    """

    _reports_whole = True
    _step_supports_amp_scaling = True
    """Tells ``torch.amp.GradScaler`` to always call ``step``, and to leave scale and flag in attributes."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 1e-5,
        amsgrad: bool = False,
        *,
        process_group: dist.ProcessGroup | DeviceMesh | None = None,
        config: ShardingConfig | Mapping[str, Any] | None = None,
        norm_group: dist.ProcessGroup | DeviceMesh | None = None,
        max_grad_norm: float | None = None,
        metrics_in_step: bool = False,
    ) -> None:
        """Shard over a group. Collective: call it on every rank of the group, with the same arguments.

        ``lr`` to ``amsgrad`` and the last three are as in ``DecoupledAdamW``.

        Args:
            params: Parameters, (name, parameter) pairs for messages and metrics, or group dicts of either.
            process_group: The ranks that hold the same parameters, or of DTensors the same parts: a group, a 1-D mesh,
                or a 2-D mesh of replicas and shards in this order. None: the mesh axis along which DTensors are
                replicated, else the default group, which is one rank where torch.distributed is not initialised.
            config: How to shard: a ``ShardingConfig``, a mapping as ``ShardingConfig.of`` takes it, or None for the
                defaults.

        Raises:
            TypeError: An argument of the wrong type, here or on another rank.
            ValueError: A value out of range or a parameter that cannot be sharded, here or on another rank; or ranks
                were given different things. Raised on every rank, before any parameter is touched.
        """
        self._is_built = False
        self.config = ShardingConfig()
        self._consolidated: dict[int, dict[str, Tensor]] = {}  # never another one: proxies of the optimizer share it
        self.param_groups: list[dict[str, Any]] = []
        params, given, refusal = with_lists(params)
        with refusal:
            self.config = ShardingConfig.of(config)
            self._start_norms(norm_group is not None, max_grad_norm, metrics_in_step)
            super().__init__(params, checked_defaults(lr, betas, eps, weight_decay, amsgrad))
            self.amsgrad = amsgrad
            self._norms.connect(norm_group, self._device)
        self._shards = Shards(given, self.param_groups, process_group, self.config, refusal)
        self.micro_batches = self._shards.micro_batches
        self._joining = Joining(self._shards)
        self._reducer = Reducer(self._shards.collectives, self.config, self._joining.announce)
        self._gatherer = Gatherer(self._shards.collectives)
        self._shown = ShownState()
        self.register_state_dict_post_hook(_show_fragments)  # ahead of others' hooks, which see them
        self._agreement = StepAgreement(self._shards, self._reducer)
        self._clock = StepClock(self._shards.collectives)
        self._take_in()
        refuse_other_optimizers(self, self._shards)
        self._is_built = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and shard it. Collective.

        Raises:
            TypeError: As the constructor.
            ValueError: As the constructor; the optimizer then is as it was, on every rank.
        """
        if not self._is_built:  # the base class's constructor calls this for each group; all are sharded together later
            super().add_param_group(param_group)
            return
        self._gatherer.finish()
        self._reducer.catch_up()
        self._shards.add(self.param_groups, partial(super().add_param_group, param_group))
        self._take_in()

    def _take_in(self) -> None:
        """Have new buckets reduced from now on, and show their state."""
        for bucket in self._shards.buckets[len(self._reducer.buckets()) :]:
            self._reducer.watch(bucket)
            self._shown.show(bucket, self.state)

    def _take_back_state(self) -> None:
        """Have what others have put into ``state``, or removed, count. What was gathered before is then out of date."""
        if self._shown.take_back(self.state):
            self._consolidated.clear()

    def _settle(self) -> None:
        self._gatherer.finish()
        self._take_back_state()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @without_graph
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Average gradients, update this rank's shard, and gather the parameters. Collective.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            The closure's loss.

        Raises:
            RuntimeError: Called inside ``no_sync()``; gradients of the last step were not cleared; a parameter was
                moved out of the optimizer's buffers; what was put into ``state`` does not fit; the process group is
                gone; or ranks disagree about gradients, what was done to them, a hyperparameter or the loss scale: on
                every rank, and on an accelerator at the next step. No parameter or state has then been changed; drop
                averaged gradients by ``zero_grad``.
            ValueError: A gradient is sparse, or in another dtype than its parameter.
        """
        loss = evaluate(closure)
        agreed = self._agree()
        self._warn_above_peak(agreed.hypers)
        clip = None if self._max_grad_norm is None else self._clip_within_step(self._norm(agreed, 2.0))
        report = self._begin_report(agreed.hypers, self._void(agreed), clip)
        step = report.step
        with self._gatherer.publishing():  # whatever is raised inside, all-gathers are finished on the way out
            with closing(self._reducer.reduce_each(last_first=self._gatherer.num_attached > 0)) as reduced_buckets:
                self._clock.start()
                for bucket in fetched(reduced_buckets, step):  # its shard is the mean
                    self._clock.lap("reduce_s")
                    params, squares = bucket.update_(step, agreed.present[bucket])
                    report.add(params, squares, step.hypers[bucket.group_index])
                    self._clock.lap("update_s")
                    self._gatherer.publish(bucket)
                    self._clock.lap("gather_s")
            self._reducer.end_step()
            for bucket in self._shards.buckets:
                report.updated += bucket.announce_update(agreed.present[bucket])
        self._warn_if_idle(report.updated)
        self._clock.stop()
        self._norms.end_step(self._held())
        self._clip.clear()
        self._joining.end_step(agreed.present)
        self._consolidated.clear()
        return loss

    def _agree(self, to_clip: tuple[float, float] | None = None) -> Agreed:
        """Have all ranks agree on a step or a clip, with parameters sharded that were unfrozen. Collective."""
        self._shards.collectives.check_alive()
        with self._joining.agreeing("step()" if to_clip is None else "clip_grad_norm_()", self._clip):
            self._gatherer.finish()
            self._note_peaks()
            objection, adds = self._joining.objection(self._reducer), self._norms.in_step
            try:
                self._take_back_state()
            except (TypeError, ValueError) as error:
                objection = objection or str(error)
            asked = Asked(self._gatherer.num_attached, objection, self._clip, adds, to_clip)
            if to_clip is None:
                found_inf, grad_scale = self._scalers_flag(), getattr(self, "grad_scale", None)
                if found_inf is not None and self._norms.given is not None:
                    self._norms.given.all_reduce_(found_inf, dist.ReduceOp.MAX)
                asked = replace(asked, max_grad_norm=self._max_grad_norm, found_inf=found_inf, grad_scale=grad_scale)
            while (agreed := self._agreement.reach(asked, self.param_groups)).unfrozen:
                self._shards.add_unfrozen(self.param_groups)
                self._take_in()
        return agreed

    @property
    def last_step(self) -> StepCost:
        """What the most recent step cost this rank."""
        return self._clock.last

    def _void(self, agreed: Agreed) -> Tensor | None:
        """Return 1 where the step is void, 0-d fp32; None where nothing can make it so. May be collective."""
        if not self.config.skip_nonfinite:
            return agreed.void
        if not self._clip:
            self._average()
        largest = self._clip.norm if self._clip else self._held().gradient_norm(agreed.present, math.inf)
        is_void = (~largest.isfinite()).to(torch.float32)
        return is_void if agreed.void is None else torch.maximum(is_void, agreed.void)

    def _average(self) -> None:
        """Average what is not averaged yet of all gradients. Collective."""
        self._clock.start()
        self._reducer.reduce_all()
        self._clock.lap("reduce_s")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients: to None, or to zeros in place. A parameter left at None is left alone by ``step``."""
        with torch._C.DisableTorchFunctionSubclass():  # of parameters in flight, which would be asked one by one
            self._reducer.catch_up()
            super().zero_grad(set_to_none)
            self._reducer.drop()

    def attach(self, model: nn.Module) -> Attachment:
        """Let ``step`` return while the parameters of ``model`` are still being gathered, behind its next forward.

        A module's forward then first waits for the buckets of its own parameters, and whoever else reads a parameter
        waits for everything in flight; results are the same. Call it on all ranks or on none, with the module that
        training calls, after it was compiled where it is to be. Buckets with parameters outside of attached models,
        DTensors, and parameters of a class of their own are finished within ``step``.

        Call ``synchronize`` before ``destroy_process_group``, and before a read that cannot be made to wait: by a
        ``p.detach()`` or ``state_dict()`` taken before ``step``, a CUDA graph, another stream than the first to read,
        or C++ that is given a parameter outside of its module, as by ``torch.func``.

        Args:
            model: A module that has parameters of this optimizer.

        Returns:
            A handle: ``remove()`` undoes it.

        Raises:
            TypeError: ``model`` is no module, or has scripted ones in it.
            ValueError: None of its parameters is this optimizer's.
        """
        return self._gatherer.attach(model, self.state)

    def synchronize(self) -> None:
        """Wait until all parameters are what the last step made of them; only after ``attach`` can they be otherwise.

        Raises:
            RuntimeError: They have been lost on their way.
        """
        self._gatherer.finish()

    def no_sync(self) -> AbstractContextManager[None]:
        """A context for all backward passes of a step but the last: they accumulate, and exchange nothing.

        ``step`` and ``clip_grad_norm_`` raise inside. With sharded gradients, the buffers of all buckets then exist.

        Raises:
            RuntimeError: With ``reduce_gradients=False``: what reduces gradients has a ``no_sync`` of its own.
        """
        return self._reducer.no_sync()

    def _norm_to_clip(self, max_norm: float, norm_type: float) -> Tensor:
        norm = self._norm(self._agree((max_norm, norm_type)), norm_type)
        self._joining.clips_now.append((max_norm, norm_type))
        return norm

    def _norm(self, agreed: Agreed, norm_type: float) -> Tensor:
        """Return the norm of the averaged gradients over all parameters and ranks, 0-d fp32. Collective."""
        owners = self._norms.owners(self._held())
        self._average()
        return self._held().gradient_norm(agreed.present, norm_type, owners)

    def _held(self) -> HeldInBuckets:
        return HeldInBuckets(self._shards)

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state (moments, main parameters) on this rank, as allocated."""
        return sum(shard.nbytes for bucket in self._shards.buckets for shard in bucket.state_shards.values())

    def state_dict(self) -> dict[str, Any]:
        """The state in torch's format; not collective.

        Each tensor has the shape of the whole, and holds the fragment that this rank has, as a view of the live state:
        see ``state.fragment_tensor``. ``torch.distributed.checkpoint`` saves and loads that at any number of ranks;
        ``torch.save`` refuses it. Tensors are whole on one rank, and once after ``consolidate_state_dict`` on its rank.

        Raises:
            RuntimeError: ``param_groups`` hold other parameters than were added to them, or in another order.
        """
        self._agreement.require_own_parameters(self.param_groups)
        self._take_back_state()
        return super().state_dict()

    @without_graph
    def consolidate_state_dict(self, to: int = 0) -> None:
        """Gather the whole state in host memory of one rank, whose next ``state_dict()`` returns it. Collective.

        The other ranks' ``state_dict()`` stays what it was. A step, load or checkpoint lets go of what was gathered.

        Args:
            to: Number of the rank within the process group.

        Raises:
            ValueError: There is no such rank; or, on this rank alone, what was put into ``state`` does not fit.
            RuntimeError: The process group is gone.
        """
        self._shards.collectives.check_alive()
        self._settle()
        self._consolidated.update(gather_state(self._shards.buckets, self._shards.collectives, to=to))
        self._clock.skip_bytes()

    @without_graph
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` has returned on this rank, or whole tensors from anywhere; all or nothing.

        Whole tensors may come from this class on any number of ranks, from ``DecoupledAdamW``,
        torch's AdamW or Composer's optimizer. Fragments of another number of ranks are read by
        ``sharded_dadamw.checkpoint.load_checkpoint``, or by ``torch.distributed.checkpoint`` into ``state_dict()``.
        Hyperparameters are taken over, ``initial_lr`` included. State is copied into place, and never rounded. A main
        parameter of which nothing was saved is taken from the weight as it is at the next step.

        Raises:
            ValueError: Fragments come from another rank or layout, or an entry is missing, surplus, has another shape
                or a dtype that would be rounded; names the first difference. Nothing has then been changed.

        Warns:
            UserWarning: There is state of parameters that were frozen when the optimizer was built, and it is left out.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        self._check_loaded(state_dict["param_groups"])
        load_into(self._shards.buckets, self.param_groups, self._shards.frozen, state_dict)
        self._shown.restore(self.state)
        self._consolidated.clear()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse copying and pickling.

        Raises:
            TypeError: Always; says what to do instead.
        """
        raise TypeError(
            "ShardedDecoupledAdamW cannot be copied or pickled: it holds a process group, and buffers that the "
            "model's parameters are views of. Copy the model, build a new optimizer on the copy, and load this one's "
            "state_dict() into it"
        )


def _show_fragments(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """Put into a state dict of torch's what ``ShardedDecoupledAdamW.state_dict`` returns."""
    shards = optimizer._shards
    state_dict["state"].update(fragments_of(shards.buckets, shards.collectives) | optimizer._consolidated)
    optimizer._consolidated.clear()
