"""A plan to be read, and to be looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from sharded_dadamw.plan.memory import KINDS
from sharded_dadamw.plan.report import Plan

_SETTINGS = {
    "main_parameter": "main parameters {}",
    "moments": "moments {}",
    "gradients": "gradients in {}",
    "gradient_residency": "kept {}",
    "state_residency": "state on the {}",
    "exchange": "exchange {}",
    "bucket_cap_mb": "buckets of {} MiB",
}
_UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3}


def lines_of(plan: Plan) -> Iterator[str]:
    """The plan as text, line by line; a GB is 1e9 bytes, and small models are told in MB."""
    unit = next((unit for unit in _UNITS if plan.peak >= _UNITS[unit]), "kB")
    in_unit = partial(_in_unit, unit)
    replicas, shards = plan.mesh
    on = f"{plan.ranks:,} ranks, {plan.per_host} per host"
    on += f", {replicas} replicas of {shards} shards" if replicas > 1 else ""
    if plan.settings["micro_batches"] != "None":
        on += f", {plan.settings['micro_batches']} micro-batches per step"
    yield f"{plan.model}: {plan.num_parameters:,} parameters in {plan.settings['parameters']}, on {on}, {plan.gpu}"
    yield f"  {', '.join(_SETTINGS[name].format(plan.settings[name]) for name in _SETTINGS)}"
    yield ""
    kinds = [kind.replace("_", " ") for kind in KINDS]
    rows = [[f"{unit} on the device of each rank", *kinds, "total", "in host memory"]]
    for name, phase in plan.phases.items():
        held = [*phase.device, phase.device.total, phase.host.total]
        rows.append([f"  {name}", *map(in_unit, held)])
    yield from table(rows)
    yield ""
    more = f", {in_unit(plan.activations)} of it activations" if plan.activations else " and activations"
    fits = "fits" if plan.fits else "DOES NOT FIT"
    yield f"at most {in_unit(plan.peak)} {unit}{more}, of {in_unit(plan.memory)} {unit}: {fits}"
    if plan.smallest is None:
        yield "  no number of ranks is enough; FSDP2, which shards parameters as well, is in docs/layouts.md"
    else:
        yield f"  fewest ranks on which it fits: {plan.smallest:,}"
    by_ranks = ", ".join(f"{ranks:,}: {in_unit(held.total)}" for ranks, held in plan.by_ranks.items())
    yield f"  {unit} without what is in flight, by the ranks that share the state: {by_ranks}"
    yield f"  FSDP2 with DecoupledAdamW, all in fp32: {in_unit(plan.fsdp2)} {unit} at rest"
    yield f"a checkpoint: {in_unit(plan.checkpoint)} {unit}, {in_unit(plan.checkpoint / plan.ranks)} of each rank"
    yield ""
    yield from _times(plan, unit)
    yield ""
    rows = [["what other settings would change", unit, "in host memory", "ms per step"]]
    for other in plan.alternatives:
        changed = other.peak + plan.activations - plan.peak, other.host - plan.host
        changes = [f"{num_bytes / _UNITS[unit]:+,.2f}" for num_bytes in changed]
        ms = "" if other.step is None or plan.time.step is None else f"{1e3 * (other.step - plan.time.step):+,.1f}"
        rows.append([f"  {other.setting}", *changes, ms])
    yield from table(rows)
    yield ""
    yield "not in these figures"
    yield from (f"  {text}" for text in plan.unknown)


def _times(plan: Plan, unit: str) -> Iterator[str]:
    time, sent, in_unit = plan.time, plan.sent, partial(_in_unit, unit)
    rows = [["of one step, each rank", f"{unit} sent", "ms", "of which compute waits"]]
    for name, num_bytes, seconds, waits in (
        ("average gradients", in_unit(sent.reduce + sent.replicas), time.reduce, time.exposed_reduce),
        ("update", "", time.update, None if time.step is None else time.update),
        ("gather parameters", in_unit(sent.gather), time.gather, time.exposed_gather),
    ):
        exposed = "?" if waits is None else f"{1e3 * waits:,.1f}"
        rows.append([f"  {name}", num_bytes, f"{1e3 * seconds:,.1f}", exposed])
    yield from table(rows)
    links = f"{in_unit(plan.links['intra'])} {unit} within a host, {in_unit(plan.links['inter'])} {unit} between hosts"
    yield f"  by link: {links}; {plan.num_buckets:,} buckets"
    if time.step is not None and time.compute is not None:
        slower = time.step - time.compute - sum(filter(None, (time.update, time.exposed_reduce, time.exposed_gather)))
        of_it = f"{1e3 * time.compute:,.1f} of it forward and backward ({time.compute / time.step:.1%}), "
        of_it += f"{1e3 * slower:,.1f} since these are slower while something is sent"
        yield f"  a step: {1e3 * time.step:,.1f} ms, {of_it}"


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows of cells as lines, the first column flush left and the others flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()


def _in_unit(unit: str, num_bytes: float) -> str:
    return f"{num_bytes / _UNITS[unit]:,.2f}"
