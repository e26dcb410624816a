"""A plan to be read, and to be looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

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
KINDS = ("parameters", "gradients", "main", "moments", "in_flight", "staging")


def lines_of(plan: Plan) -> Iterator[str]:
    """The plan as text, line by line; GB are 1e9 bytes."""
    replicas, shards = plan.mesh
    on = f"{plan.ranks:,} ranks, {plan.per_host} per host"
    on += f", {replicas} replicas of {shards} shards" if replicas > 1 else ""
    yield f"{plan.model}: {plan.num_parameters:,} parameters in {plan.settings['parameters']}, on {on}, {plan.gpu}"
    yield f"  {', '.join(_SETTINGS[name].format(plan.settings[name]) for name in _SETTINGS)}"
    yield ""
    rows = [["GB on the device of each rank", *(kind.replace("_", " ") for kind in KINDS), "total", "in host memory"]]
    for name, phase in plan.phases.items():
        held = asdict(phase.device)
        rows.append([f"  {name}", *(_gb(held[kind]) for kind in KINDS), _gb(phase.device.total), _gb(phase.host.total)])
    yield from _table(rows)
    yield ""
    more = f", {_gb(plan.activations)} of it activations" if plan.activations else " and activations"
    yield f"at most {_gb(plan.peak)} GB{more}, of {_gb(plan.memory)} GB: {'fits' if plan.fits else 'DOES NOT FIT'}"
    if plan.smallest is None:
        yield "  no number of ranks is enough; FSDP2, which shards parameters as well, is in docs/layouts.md"
    else:
        yield f"  fewest ranks on which it fits: {plan.smallest:,}"
    by_ranks = ", ".join(f"{ranks:,}: {_gb(held.total)}" for ranks, held in plan.by_ranks.items())
    yield f"  GB without what is in flight, by the ranks that share the state: {by_ranks}"
    yield f"  FSDP2 with DecoupledAdamW, all in fp32: {_gb(plan.fsdp2)} GB at rest"
    yield f"a checkpoint: {_gb(plan.checkpoint)} GB, {_gb(plan.checkpoint / plan.ranks)} of each rank"
    yield ""
    yield from _times(plan)
    yield ""
    peak, step = max(phase.device.total for phase in plan.phases.values()), plan.time.step
    rows = [["what other settings would change", "GB", "in host memory", "ms per step"]]
    host = max(phase.host.total for phase in plan.phases.values())
    for other in plan.alternatives:
        ms = "" if other.step is None or step is None else f"{1e3 * (other.step - step):+,.1f}"
        rows.append(
            [f"  {other.setting}", f"{(other.peak - peak) / 1e9:+,.2f}", f"{(other.host - host) / 1e9:+,.2f}", ms]
        )
    yield from _table(rows)
    yield ""
    yield "not in these figures"
    yield from (f"  {text}" for text in plan.unknown)


def _times(plan: Plan) -> Iterator[str]:
    time, sent = plan.time, plan.sent
    rows = [["of one step, each rank", "GB sent", "ms", "of which compute waits"]]
    exposed = {
        "average gradients": time.exposed_reduce,
        "update": time.update,
        "gather parameters": time.exposed_gather,
    }
    for name, num_bytes, seconds in (
        ("average gradients", sent.reduce + sent.replicas, time.reduce),
        ("update", None, time.update),
        ("gather parameters", sent.gather, time.gather),
    ):
        waits = exposed[name] if time.step is not None else None
        rows.append(
            [
                f"  {name}",
                "" if num_bytes is None else _gb(num_bytes),
                f"{1e3 * seconds:,.1f}",
                "?" if waits is None else f"{1e3 * waits:,.1f}",
            ]
        )
    yield from _table(rows)
    links = f"{_gb(plan.links['intra'])} GB within a host, {_gb(plan.links['inter'])} GB between hosts"
    yield f"  by link: {links}; {plan.num_buckets:,} buckets"
    if time.step is not None and time.compute is not None:
        of_it = f"{1e3 * time.compute:,.1f} of it forward and backward ({time.compute / time.step:.1%})"
        yield f"  a step: {1e3 * time.step:,.1f} ms, {of_it}"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.2f}"
