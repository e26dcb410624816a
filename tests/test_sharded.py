"""Sharded equals unsharded, bit for bit, given equal reduced gradients; state and wire have the bytes they should.

`tests/harness.py` has the control. Sizes and numbers of ranks meet in the layout of a bucket, which
tests/test_layout.py proves for all; schedules, dtypes and clipping know nothing of ranks. So each scenario names the
few numbers of ranks on which it runs. Ranks are simulated, but where DDP, a process's memory or its wire is tested.
"""

import math
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sharded_dadamw import Exchange, MainParameter, Moments, ShardedDecoupledAdamW, ShardingConfig
from tests import pool
from tests.harness import (
    ALL_IN_ONE,
    AS_UNSHARDED,
    ONE_EACH,
    SOME_EACH,
    Report,
    Scenario,
    assert_equal,
    assert_state_is_the_controls,
    give_gradients,
    on_numbers_of_ranks,
    ranks,
    scenario,
    train_beside_control,
)
from tests.models import BF16, F32, F64, make_groups, named, whole_state_dict
from tests.simulated import on_ranks

ALIGNMENT = 64  # elements


@on_numbers_of_ranks(
    # sizes and buckets
    ("odd sizes in one bucket", scenario(), (1, 2, 3, 4)),
    ("odd sizes, a few per bucket", scenario(bucket_cap_mb=SOME_EACH), (4,)),
    ("a bias smaller than the rank count", scenario("tiny"), (3, 4)),
    ("nothing but a scalar and an empty parameter", scenario("empty and scalar", num_steps=3), (1, 3)),
    (
        "a scaler beside a bucket without elements",
        scenario("empty and scalar", bucket_cap_mb=ONE_EACH, loss_scale=8.0, clip=(1e3, 2.0)),
        (2,),
    ),
    ("more than is exchanged at once", scenario("large", num_steps=2), (3,)),
    ("non-contiguous parameters", scenario("non-contiguous", num_steps=4), (2,)),
    ("aligned sizes", scenario("aligned", num_steps=4), (4,)),
    # dtypes, groups and schedules
    ("mixed dtypes with fp32 main parameters", scenario("mixed dtypes"), (2, 3)),
    ("bf16 with fp32 main parameters and amsgrad", scenario("bf16", amsgrad=True), (3,)),
    ("bf16 without main parameters and amsgrad", scenario("bf16", amsgrad=True, **AS_UNSHARDED), (2,)),
    ("bf16 with remainders", scenario("bf16", main_parameter=MainParameter.REMAINDER, num_steps=30), (1, 3)),
    ("fp16 with fp32 main parameters", scenario("fp16"), (2,)),
    ("fp16 without main parameters", scenario("fp16", **AS_UNSHARDED), (3,)),
    ("amsgrad", scenario(amsgrad=True), (1, 4)),
    ("several groups, LinearLR", scenario("several groups", schedule="LinearLR"), (2,)),
    ("several groups, CyclicLR", scenario("several groups", schedule="CyclicLR"), (3,)),
    ("several groups, OneCycleLR", scenario("several groups", schedule="OneCycleLR", num_steps=20), (3,)),
    ("gradients assigned by hand", scenario("mixed dtypes", assign=True), (2, 3)),
    # who has no gradient is untouched, decay included
    ("frozen parameters", scenario("frozen"), (3,)),
    ("frozen columns", scenario("frozen columns", num_steps=2), (2,)),
    ("unused ones alternating", scenario(without_gradient="alternating"), (2,)),
    ("unused ones, assigned by hand", scenario(without_gradient="alternating", assign=True), (2,)),
    ("unused ones in several dtypes and groups", scenario("mixed dtypes", without_gradient="alternating"), (3,)),
    ("one never used", scenario("several groups", without_gradient="one never"), (4,)),
    ("some used late, scheduled", scenario(without_gradient="some late", schedule="OneCycleLR", num_steps=24), (2,)),
    ("steps without any gradient", scenario("several groups", without_gradient="everybody sometimes"), (1, 3)),
    (
        "unused ones, accumulated and clipped",
        scenario(without_gradient="alternating", num_passes=2, clip=(0.5, 2.0)),
        (3,),
    ),
    ("unused ones, reduced by others", scenario(without_gradient="alternating", reduce_gradients=False), (2,)),
    # passes in no_sync() add up locally and are reduced once
    ("five passes, mixed dtypes", scenario("mixed dtypes", num_passes=5, num_steps=4), (4,)),
    ("three passes, a few per bucket", scenario(num_passes=3, bucket_cap_mb=SOME_EACH), (3,)),
    ("three passes assigned by hand", scenario(num_passes=3, assign=True), (2,)),
    # clips are by the true norm
    ("clipped", scenario(clip=(0.5, 2.0)), (1, 3)),
    ("clipped by the inf-norm", scenario("several groups", clip=(0.01, math.inf)), (3,)),
    (
        "clipped, several groups, amsgrad, scheduled",
        scenario("several groups", clip=(0.1, 2.0), amsgrad=True, schedule="StepLR"),
        (4,),
    ),
    ("clipped without any gradient", scenario(clip=(0.5, 2.0), without_gradient="everybody sometimes"), (2,)),
    ("clipped, reduced by others", scenario(clip=(0.1, 2.0), reduce_gradients=False), (3,)),
    # gradients that others reduce are only read
    ("reduced by others", scenario(reduce_gradients=False), (1, 3)),
    ("reduced by others, mixed dtypes", scenario("mixed dtypes", reduce_gradients=False, assign=True), (2,)),
    # a loss scale, of powers of two, leaves no trace, and a step with an infinity changes no byte on any rank
    ("scaled", scenario(loss_scale=2.0**10), (1, 2)),
    ("scaled, fp16", scenario("fp16", loss_scale=2.0**10), (1,)),
    ("scaled, an infinity, clipped", scenario(loss_scale=2.0**10, overflows={0: 0}, clip=(1e6, 2.0)), (1,)),
    ("scaled, infinities on the second rank", scenario(loss_scale=2.0**10, overflows={0: 1, 3: 1}), (2,)),
    (
        "scaled, an infinity on the third rank, bf16, amsgrad",
        scenario("bf16", loss_scale=2.0**10, overflows={2: 2}, amsgrad=True, bucket_cap_mb=SOME_EACH),
        (3,),
    ),
    (
        "scaled, an infinity in means of others",
        scenario(loss_scale=2.0**10, overflows={2: 0}, clip=(1e6, 2.0), reduce_gradients=False),
        (2,),
    ),
    ("skipped infinities on either rank", scenario(skip_nonfinite=True, overflows={1: 0, 3: 1}), (2,)),
    # real models through real backward: embedding and head are tied, a layer is frozen and one is never used
    ("tied language model", scenario("tied language model"), (1,)),
    (
        "tied language model, two passes, clipped",
        scenario("tied language model", bucket_cap_mb=SOME_EACH, num_passes=2, clip=(0.1, 2.0), schedule="LinearLR"),
        (3,),
    ),
    ("attention, bf16", scenario("attention", num_steps=4, dtype=BF16), (4,)),
)
def test_sharded_equals_unsharded(case: Scenario, num_ranks: int) -> None:
    assert_state_is_the_controls(on_ranks(num_ranks, train_beside_control, case))


@on_numbers_of_ranks(
    *(
        (str(exchange), scenario("mixed dtypes", bucket_cap_mb=SOME_EACH, clip=(0.05, 2.0), exchange=exchange), (3,))
        for exchange in (Exchange.FASTEST, Exchange.RANK_ORDER)
    ),
    *(
        (f"DDP {ddp}", scenario("tied language model", ddp=ddp, num_passes=2, reduce_gradients=False), (2 + index % 2,))
        for index, ddp in enumerate(
            {"find_unused_parameters": True, "bucket_cap_mb": 1, "gradient_as_bucket_view": view, "last": last}
            for view, last in ((False, False), (True, False), (True, True), (False, True))
        )
    ),
)
def test_processes_do_as_simulated_ranks_under_ddp_too(case: Scenario, num_ranks: int) -> None:
    assert_state_is_the_controls(pool.on_ranks(num_ranks, train_beside_control, case))


def train_on_world(group: Any) -> Report:
    """Without process_group the optimizer takes the default group."""
    return train_beside_control(group, scenario(num_steps=3, clip=(1e9, 2.0)), lambda _: None)


def train_on_mesh(group: Any) -> Report:
    """A mesh with one axis is as good as its group."""
    make = lambda group: DeviceMesh.from_group(group, "cpu", mesh_dim_names=("dp",))  # noqa: E731
    return train_beside_control(group, scenario(num_steps=3), make)


def train_on_last_two(_: Any) -> Report | None:
    """A group whose ranks are not the world's first: group ranks and global ranks differ."""
    subgroup = dist.new_group([2, 3])
    return None if dist.get_rank() < 2 else train_beside_control(subgroup, scenario(num_steps=3))


@pytest.mark.parametrize(("train", "num_ranks"), [(train_on_world, 4), (train_on_mesh, 2), (train_on_last_two, 4)])
def test_ranks_are_those_of_the_group_the_mesh_or_the_world(train: Any, num_ranks: int) -> None:
    reports = [report for report in on_ranks(num_ranks, train) if report is not None]
    assert len(reports) == (2 if train is train_on_last_two else num_ranks)
    assert_state_is_the_controls(reports)


# --- bytes ---


def make_as(parameters: str, dtype: torch.dtype | None) -> dict[str, nn.Parameter]:
    params = named(make_groups(parameters, seed=0))
    return {name: nn.Parameter(p.detach().to(dtype or p.dtype), p.requires_grad) for name, p in params.items()}


def bytes_held(
    group: Any, parameters: str, dtype: torch.dtype, precision: dict[str, Any], amsgrad: bool, cap: float
) -> tuple[int, int, int]:
    """(state_bytes, bytes of the storages that the state's tensors really occupy, number of trained elements)."""
    params = make_as(parameters, dtype)
    config = ShardingConfig(bucket_cap_mb=cap, **precision)
    optimizer = ShardedDecoupledAdamW(params.items(), amsgrad=amsgrad, process_group=group, config=config)
    own = {p.untyped_storage().data_ptr() for p in params.values() if p.numel()}
    storages = {}
    for state in optimizer.state.values():
        for key, value in state.items():
            if key != "step" and value.numel():
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    assert not own & set(storages), "state lives in the parameters' memory"
    return optimizer.state_bytes, sum(storages.values()), sum(p.numel() for p in params.values() if p.requires_grad)


REMAINDER = dict(main_parameter=MainParameter.REMAINDER)
IN_BF16 = dict(moments=Moments.BF16)


@pytest.mark.parametrize(
    ("dtype", "precision", "amsgrad", "bytes_per_param", "num_ranks"),
    [
        *(pytest.param(F32, {}, False, 8, num_ranks, id=f"fp32, {num_ranks} ranks") for num_ranks in (1, 2, 3, 4)),
        pytest.param(F32, IN_BF16, True, 6, 4, id="fp32 with bf16 moments, amsgrad"),
        pytest.param(BF16, {}, True, 16, 4, id="bf16 with fp32 main, amsgrad"),
        pytest.param(BF16, REMAINDER, False, 10, 4, id="bf16 with remainder"),
        pytest.param(BF16, REMAINDER | IN_BF16, False, 6, 4, id="bf16 with remainder and bf16 moments"),
        pytest.param(BF16, AS_UNSHARDED, False, 4, 4, id="bf16 without main"),
        pytest.param(F64, IN_BF16, False, 16, 4, id="fp64"),
    ],
)
def test_state_is_divided_by_the_number_of_ranks(
    dtype: torch.dtype, precision: dict[str, Any], amsgrad: bool, bytes_per_param: int, num_ranks: int
) -> None:
    """Sizes without padding: bytes per parameter / N, to the byte."""
    for reported, held, numel in on_ranks(num_ranks, bytes_held, "aligned", dtype, precision, amsgrad, ALL_IN_ONE):
        assert reported == held == bytes_per_param * numel // num_ranks


@pytest.mark.parametrize(
    ("parameters", "cap", "num_buckets", "dtype", "bytes_per_param", "num_ranks"),
    [
        ("odd sizes", ALL_IN_ONE, 1, BF16, 12, 3),
        ("odd sizes", ONE_EACH, 11, F32, 8, 4),
        ("tiny", ALL_IN_ONE, 1, F32, 8, 4),
        ("frozen", ALL_IN_ONE, 1, F32, 8, 3),  # which cost nothing
    ],
)
def test_odd_sizes_cost_at_most_one_alignment_unit_of_state_per_bucket(
    parameters: str, cap: float, num_buckets: int, dtype: torch.dtype, bytes_per_param: int, num_ranks: int
) -> None:
    results = on_ranks(num_ranks, bytes_held, parameters, dtype, {}, False, cap)
    for reported, held, numel in results:
        assert reported <= bytes_per_param * (numel / num_ranks + num_buckets * ALIGNMENT)
        assert held <= reported, "more is held than reported"
    assert sum(reported for reported, _, _ in results) >= bytes_per_param * results[0][2]


@pytest.mark.parametrize(
    ("parameters", "dtype", "reduces", "clip", "cap", "num_buckets", "num_ranks"),
    [
        *(("aligned", F32, True, False, ALL_IN_ONE, 0, num_ranks) for num_ranks in (1, 4)),
        ("aligned", BF16, True, True, ALL_IN_ONE, 0, 3),
        ("aligned", F64, True, False, ALL_IN_ONE, 0, 4),
        ("aligned", F32, False, True, ALL_IN_ONE, 0, 3),
        ("aligned", BF16, False, False, ALL_IN_ONE, 0, 2),
        ("odd sizes", None, True, False, ALL_IN_ONE, 1, 4),
        ("odd sizes", None, True, False, ONE_EACH, 11, 3),
    ],
)
@ranks()
def test_a_step_sends_each_gradient_and_each_parameter_once(
    group: Any, parameters: str, dtype: Any, reduces: bool, clip: bool, cap: float, num_buckets: int
) -> int:
    """(N-1)/N * (gradient + parameter bytes): to the byte without padding, else with an alignment unit per bucket."""
    params = make_as(parameters, dtype)
    config = ShardingConfig(reduce_gradients=reduces, bucket_cap_mb=cap)
    optimizer = ShardedDecoupledAdamW(params.items(), process_group=group, config=config)
    for step in range(3):
        give_gradients(params, step, group.rank() if reduces else 0)
        if clip:
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    cost, num_ranks = optimizer.last_step, group.size()
    assert min(cost.reduce_s, cost.update_s, cost.gather_s) >= 0.0
    exact = (num_ranks - 1) / num_ranks * (2 if reduces else 1) * sum(p.nbytes for p in params.values())
    assert exact <= cost.wire_bytes <= exact + (num_ranks - 1) * 8 * ALIGNMENT * num_buckets
    return cost.wire_bytes  # ranks share the load equally


def written_bytes() -> int:
    """Bytes this process has handed to write(): on Linux gloo's sockets are among them."""
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("wchar"))


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="only Linux counts the bytes a process writes")
@pytest.mark.parametrize("num_ranks", [2, 3])
@ranks(run=pool.on_ranks)
def test_the_operating_system_counts_the_same_bytes(group: Any) -> None:
    param = nn.Parameter(torch.zeros(3 * 2**18))
    config = ShardingConfig(exchange=Exchange.RANK_ORDER)
    optimizer = ShardedDecoupledAdamW([param], process_group=group, config=config)
    for _ in range(2):
        param.grad = torch.ones_like(param)
        before = written_bytes()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        written = written_bytes() - before
        optimizer.zero_grad()
    # Headers of messages, and the few words by which ranks agree that they are doing the same thing.
    assert 0 <= written - optimizer.last_step.wire_bytes <= 32 * 1024


def train_on(group: Any, shape: tuple[int, int] | None) -> Any:
    """Gradients are small integers, so that their means are the same in whatever order they are added."""
    mesh = None if shape is None else init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    params = [nn.Parameter(torch.ones(n, 3)) for n in (50, 7, 201)]
    frozen = nn.Parameter(torch.full((5,), float(dist.get_rank())), requires_grad=False)
    named = [(str(n), p) for n, p in enumerate([*params, frozen])]
    config = ShardingConfig(bucket_cap_mb=0.002)
    optimizer = ShardedDecoupledAdamW(named, lr=0.1, weight_decay=0.1, process_group=mesh or group, config=config)
    norms = []
    for step in range(3):
        for p in params:
            p.grad = torch.arange(p.numel()).reshape(p.shape).remainder(5 + step) * float(1 + dist.get_rank())
        norms.append(optimizer.clip_grad_norm_(1.0))
        optimizer.step()
        norms += optimizer.metrics().values()
        optimizer.zero_grad()
    whole = whole_state_dict(optimizer, 4 if shape is None else shape[1])["state"]
    state = [tensor for _, of_param in sorted(whole.items()) for tensor in of_param.values()]
    return [p.detach().clone() for p in [*params, frozen]], state, norms, optimizer.state_bytes


@pytest.mark.parametrize("shape", [(2, 2), (4, 1), (1, 4)], ids=str)
@ranks(4)
def test_replicas_of_shards_train_as_shards_on_all_ranks_do(group: Any, shape: tuple[int, int]) -> list[Any]:
    (*whole, norms, _), (*found, said, state_bytes) = (train_on(group, each) for each in (None, shape))
    assert_equal(whole, found)
    for ours, theirs in zip(said, norms, strict=True):  # which are added up in another order
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0.0)
    assert state_bytes >= 8 * 258 * 3 / shape[1]
    return [param.tolist() for param in whole[0]]
