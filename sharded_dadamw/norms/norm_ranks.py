"""Over which ranks an optimizer adds up norms, and those of its last step."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from sharded_dadamw.comm.collectives import Collectives
from sharded_dadamw.comm.connect import connect, connect_over
from sharded_dadamw.kernels.operands import NORMS
from sharded_dadamw.layout.placement import is_of_fsdp1
from sharded_dadamw.norms.composer import ComposerProtocol
from sharded_dadamw.norms.held import Held, NormOwners
from sharded_dadamw.norms.step_report import StepReport, Table


class NormRanks:
    """The report of the last step, and the ranks over which norms are added up.

    It is changed in place and never replaced, since proxies of an optimizer share it: Lightning and Fabric hand out
    objects of a class made from the optimizer's, with the attributes it had then. Such an object takes calls of its
    own, but leaves ``step`` to the optimizer, and each must see what the other has left.

    Attributes:
        given: The ranks that the caller has named, who may know better than the parameters.
        needs_names: Whether he has, or had for the optimizer of which this one's is a copy.
        in_step: Whether steps add up norms, so that nothing is left to be done with other ranks.
    """

    def __init__(self, *, needs_names: bool, in_step: bool) -> None:
        if not isinstance(in_step, bool):
            raise TypeError(f"metrics_in_step: expected True or False, got {in_step!r}")
        self.in_step = in_step
        self.report = StepReport()
        self.given: Collectives | None = None
        self.needs_names = needs_names
        self.composer = ComposerProtocol()
        self._ranks: Collectives | None = None
        self._owners: NormOwners | None = None
        self._ranked: Sequence[Tensor] = []
        self._is_guess = False

    def connect(self, norm_group: dist.ProcessGroup | DeviceMesh | None, device: torch.device) -> None:
        """Add up over these ranks, unless they are None."""
        if norm_group is not None:
            self.given = connect(norm_group, device, exchange=None, called="norm_group")

    def start_anew(self) -> None:
        """Forget all parameters, since there are to be others, but not how many steps were skipped."""
        # Who clears groups and adds others wants the parameters freed that the report refers to.
        self.report = StepReport(num_skipped=self.report.num_skipped)
        self._ranks, self._owners, self._ranked = None, None, []

    def ranks(self, held: Held, *, for_composer: bool = False) -> Collectives:
        """Return the ranks over which norms are added up, found anew where parameters have changed.

        FSDP1's do not tell; ``for_composer`` they are all ranks, over which Composer's own optimizer adds up.
        """
        params = held.params()
        if len(params) != len(self._ranked) or not all(map(is_, params, self._ranked)):
            self._ranks, self._owners, self._ranked = None, None, params
        if self._ranks is None:
            self._is_guess = self.given is None and any(map(is_of_fsdp1, params))
            self._ranks = self._find_ranks(held)
        if self._is_guess and not for_composer:
            raise ValueError(
                "expected norm_group, since FSDP1's parameters do not tell over which ranks they are sharded; pass "
                "DecoupledAdamW(model.named_parameters(), norm_group=model.process_group), or use FSDP2 "
                "(fully_shard)"
            )
        return self._ranks

    def owners(self, held: Held, *, for_composer: bool = False) -> NormOwners:
        """Return who counts what. Collective where parameters have changed."""
        ranks = self.ranks(held, for_composer=for_composer)
        if self._owners is None:
            self._owners = held.find_owners(ranks)
        return self._owners

    def end_step(self, held: Held) -> None:
        """Add up norms, if steps do so. Collective."""
        if self.in_step:
            self.report.table = self._add_up(held)

    def table(self, held: Held) -> Table:
        """Add up the squares of all parameters of all ranks. Collective, one all-reduce, unless a step has done it."""
        if not self.in_step:
            return self._add_up(held)
        if self.report.table is None:
            raise RuntimeError(
                "expected a step() before metrics(), since it adds up the norms (metrics_in_step=True); got none since "
                "the optimizer was built or a group was added"
            )
        return self.report.table

    def _add_up(self, held: Held) -> Table:
        held.make_measurable(self.report)
        owners, params, device = self.owners(held), held.params(), held.device
        rows = {row for row, was_reported in enumerate(owners.reported) if was_reported}
        rows |= {owners.row_of[id(param)] for param in params if held.is_reported(param)}
        squares = torch.zeros(len(owners.names), len(NORMS), dtype=torch.float64, device=device)
        here, parts = self.report.squares_of([p for p in params if owners.row_of[id(p)] in rows], held.look, device)
        counted = [(place, owners.row_of[id(p)]) for place, p in enumerate(here) if id(p) in owners.counted]
        if counted:
            sources, targets = torch.tensor(counted).to(device, non_blocking=True).unbind(1)
            squares[targets] = parts[sources]
        owners.collectives.all_reduce_(squares, dist.ReduceOp.SUM)
        return Table(squares, sorted(rows), owners.names, owners.row_of)

    def _find_ranks(self, held: Held) -> Collectives:
        if self.given is None:
            if self.needs_names:
                raise ValueError("expected norm_group, which this copy of an optimizer lost; build a new one with it")
            if self._is_guess:
                return connect(None, held.device, exchange=None)
            return connect_over(held.spread_over(), held.device, also=held.axis)
        spread = [*held.spread_over(), held.axis.everyone.group]
        if not all(group is None or self.given.include(group) for group in spread):
            raise ValueError(
                "norm_group: expected all ranks of all stages, got a group that lacks ranks among which this stage's "
                "parameters are spread; pass the default group, or one of all these ranks"
            )
        return self.given
