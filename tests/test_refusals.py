"""Bad input: one clear error on every rank, naming the first difference and both sides; no hang; nothing changed.

A case runs on all ranks at once. Where one rank alone is wrong the others must not wait for it: the pool would call
that a hang. Each rank reports the error that it saw and whether its parameters still are as they were, byte for byte
and in the same memory. Every case is wrong on one rank, which is now the first and now another.
"""

import contextlib
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.two_tensor import TwoTensor

from sharded_dadamw import DecoupledAdamW, MainParameter, Moments, ShardedDecoupledAdamW, ShardingConfig
from tests.models import BF16, F32, F64, draw_gradient, make_groups, mean_in_rank_order, named
from tests.simulated import on_ranks

Params = dict[str, nn.Parameter]


@dataclass(frozen=True)
class Seen:
    """What one rank saw of an attempt."""

    error: str | None
    message: str
    unchanged: bool

    def __str__(self) -> str:
        return f"{self.error}: {self.message} (parameters {'unchanged' if self.unchanged else 'CHANGED'})"


def attempt(action: Callable[[], Any], params: list[Tensor]) -> Seen:
    """Runs an action that is expected to be refused."""
    dense = [p for p in params if isinstance(p, Tensor) and p.layout == torch.strided and p.device.type != "meta"]
    before = [(p.detach().clone(), p.data_ptr(), p.dtype, p.shape, p.requires_grad) for p in dense]
    error: Exception | None = None
    try:
        action()
    except Exception as caught:
        error = caught
    unchanged = all(
        torch.equal(p, value) and (p.data_ptr(), p.dtype, p.shape, p.requires_grad) == facts
        for p, (value, *rest) in zip(dense, before, strict=True)
        for facts in [tuple(rest)]
    )
    return Seen(None if error is None else type(error).__name__, str(error), unchanged)


def assert_refused(seen: list[Seen], errors: tuple[str, ...], *said: str) -> None:
    """Every rank refused, with one of `errors`, saying every one of `said` (regular expressions)."""
    __tracebackhide__ = True
    for rank, one in enumerate(seen):
        assert one.error in errors, f"rank {rank}: expected {errors}, got {one}"
        assert one.unchanged, f"rank {rank}: {one}"
        for expression in said:
            assert re.search(expression, one.message), f"rank {rank}: expected {expression!r} in {one}"


def plain_params(seed: int = 0) -> Params:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (5, 3), "bias": (3,), "scale": ()}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


# --- arguments that are wrong by themselves ---


def with_param(name: str, param: Any) -> list[tuple[str, Any]]:
    return [*plain_params().items(), (name, param)]


def shared_memory() -> list[tuple[str, Any]]:
    whole = torch.zeros(10)
    return [("first", nn.Parameter(whole[:6])), ("second", nn.Parameter(whole[5:]))]


def twice() -> list[tuple[str, Any]]:
    params = plain_params()
    return [*params.items(), ("again", params["bias"])]


def twice_in_groups() -> list[dict[str, Any]]:
    params = plain_params()
    return [{"params": list(params.items())}, {"params": [("again", params["bias"])]}]


VALUE, TYPE, EITHER = ("ValueError",), ("TypeError",), ("ValueError", "TypeError")
NAN, INF = float("nan"), float("inf")

# name: (arguments, errors of the rank that is wrong, what that rank says)
BAD_ARGUMENTS: dict[str, tuple[Callable[[], dict[str, Any]], tuple[str, ...], str]] = {
    "negative lr": (lambda: dict(lr=-1e-3), VALUE, r"lr.*-0\.001"),
    "nan lr": (lambda: dict(lr=NAN), VALUE, r"lr.*nan"),
    "infinite lr": (lambda: dict(lr=INF), VALUE, r"lr.*inf"),
    "lr is a word": (lambda: dict(lr="fast"), EITHER, r"lr|fast"),
    "lr is None": (lambda: dict(lr=None), EITHER, r"lr|None"),
    "lr of two elements": (lambda: dict(lr=torch.tensor([1.0, 2.0])), EITHER, "lr"),
    "negative eps": (lambda: dict(eps=-1e-8), VALUE, "eps"),
    "nan eps": (lambda: dict(eps=NAN), VALUE, "eps"),
    "negative weight_decay": (lambda: dict(weight_decay=-0.1), VALUE, r"weight_decay.*-0\.1"),
    "nan weight_decay": (lambda: dict(weight_decay=NAN), VALUE, "weight_decay"),
    "beta of 1": (lambda: dict(betas=(0.9, 1.0)), VALUE, r"beta.*1\.0"),
    "negative beta": (lambda: dict(betas=(-0.1, 0.9)), VALUE, r"beta.*-0\.1"),
    "nan beta": (lambda: dict(betas=(0.9, NAN)), VALUE, r"beta"),
    "one beta": (lambda: dict(betas=(0.9,)), VALUE, "beta"),
    "betas is a number": (lambda: dict(betas=0.9), EITHER, "beta|iterable"),
    "bad lr in one group": (
        lambda: dict(params=[{"params": list(plain_params().items()), "lr": -2.0}]),
        VALUE,
        r"lr.*-2\.0",
    ),
    "bad betas in one group": (
        lambda: dict(params=[{"params": list(plain_params().items()), "betas": (0.9, 2.0)}]),
        VALUE,
        r"beta.*2\.0",
    ),
    "no parameters": (lambda: dict(params=[]), VALUE, "(?i)empty|no param"),
    "a group without params": (lambda: dict(params=[{"lr": 1e-3}]), (*EITHER, "KeyError"), "params"),
    "params is a tensor": (lambda: dict(params=torch.zeros(3)), TYPE, "params|[Pp]arameter|iterable"),
    "params is None": (lambda: dict(params=None), TYPE, "None|iterable"),
    "a word among the parameters": (lambda: dict(params=["weight"]), (*EITHER, "AttributeError"), "(?i)tensor|str"),
    "a non-leaf tensor": (lambda: dict(params=with_param("odd", plain_params()["bias"] * 2)), EITHER, "leaf"),
    "a sparse parameter": (
        lambda: dict(params=with_param("odd", nn.Parameter(torch.eye(3).to_sparse()))),
        EITHER,
        "odd.*sparse",
    ),
    "a complex parameter": (
        lambda: dict(params=with_param("odd", nn.Parameter(torch.zeros(3, dtype=torch.complex64)))),
        EITHER,
        "odd.*complex64",
    ),
    "a parameter without memory": (
        lambda: dict(params=with_param("odd", nn.Parameter(torch.zeros(3, device="meta")))),
        EITHER,
        "odd.*meta",
    ),
    "everything without memory": (
        lambda: dict(params=[nn.Parameter(torch.zeros(3, device="meta"))]),
        EITHER,
        "meta",
    ),
    "a parameter twice": (
        lambda: dict(params=twice()),
        EITHER,
        r"again is the same parameter as bias; pass it once|again.*twice|duplicate",
    ),
    "an empty parameter twice": (
        lambda: dict(params=[("empty", p := nn.Parameter(torch.zeros(0))), ("again", p)]),
        EITHER,
        r"again is the same parameter as empty|again.*twice|duplicate",
    ),
    "a parameter in two groups": (lambda: dict(params=twice_in_groups()), EITHER, "again|more than one"),
    "two parameters that share memory": (
        lambda: dict(params=shared_memory()),
        VALUE,
        "(?s)first.*memory|second.*memory",
    ),
    "config of another type": (lambda: dict(config=[1.0]), TYPE, "config: expected a ShardingConfig, or a mapping"),
}


def construct(group: Any, case: str, wrong_ranks: list[int]) -> Seen:
    arguments: dict[str, Any] = {"params": list(plain_params().items())}
    if group is None or group.rank() in wrong_ranks:
        arguments |= BAD_ARGUMENTS[case][0]()
    params = arguments["params"]
    if not isinstance(params, list):
        flat = []
    elif params and isinstance(params[0], dict):
        flat = [p for g in params for _, p in g.get("params", ())]
    else:
        flat = [entry[1] if isinstance(entry, tuple) else entry for entry in params]
    with contextlib.suppress(UserWarning):
        return attempt(lambda: ShardedDecoupledAdamW(process_group=group, **arguments), flat)
    raise AssertionError


@pytest.mark.filterwarnings("ignore:.*duplicate parameters.*")
@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_a_bad_argument_is_refused_on_one_rank(case: str) -> None:
    _, errors, said = BAD_ARGUMENTS[case]
    assert_refused([construct(None, case, [0])], errors, said)


@pytest.mark.parametrize("case", list(BAD_ARGUMENTS)[::4])
def test_a_bad_argument_is_refused_on_every_rank(case: str) -> None:
    _, errors, said = BAD_ARGUMENTS[case]
    assert_refused(on_ranks(2, construct, case, [0, 1]), errors, said)


@pytest.mark.parametrize(("case", "wrong_rank"), [*zip(BAD_ARGUMENTS, itertools.cycle([1, 0]))])
def test_a_bad_argument_on_one_rank_alone_is_refused_by_all_quoting_that_rank(case: str, wrong_rank: int) -> None:
    _, errors, said = BAD_ARGUMENTS[case]
    seen = on_ranks(2, construct, case, [wrong_rank], timeout_s=30.0)
    assert_refused([seen[wrong_rank]], errors, said)
    assert_refused(
        [seen[1 - wrong_rank]], (*EITHER, "RuntimeError"), f"rank {wrong_rank} refused its arguments of", said
    )


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (dict(bucket_cap_mb=0.0), ValueError, r"bucket_cap_mb.*0"),
        (dict(bucket_cap_mb=-1.0), ValueError, r"bucket_cap_mb.*-1"),
        (dict(bucket_cap_mb=INF), ValueError, r"bucket_cap_mb.*inf"),
        (dict(bucket_cap_mb=None), (TypeError, ValueError), "bucket_cap_mb"),
        (dict(reduce_gradients=1), TypeError, r"reduce_gradients.*1"),
        (dict(main_parameter=BF16), TypeError, r"main_parameter.*MainParameter\.FP32.*bfloat16"),
    ],
)
def test_a_setting_without_a_meaning_is_refused(arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        ShardingConfig(**arguments)


def test_a_parameter_that_wraps_others_is_refused() -> None:
    wrapped = nn.Parameter(TwoTensor(torch.zeros(3), torch.zeros(3)))
    seen = attempt(lambda: ShardedDecoupledAdamW([("weight", wrapped)]), [])
    assert_refused([seen], ("TypeError",), "weight", "TwoTensor", "DecoupledAdamW")


@pytest.mark.parametrize("kind", ["wrapped", "fp8"])
def test_what_is_frozen_and_cannot_be_sharded_is_left_alone_until_it_is_unfrozen(kind: str) -> None:
    value = TwoTensor(torch.ones(3), torch.ones(3)) if kind == "wrapped" else torch.ones(3).to(torch.float8_e4m3fn)
    odd, plain = nn.Parameter(value, requires_grad=False), nn.Parameter(torch.zeros(3))
    optimizer = ShardedDecoupledAdamW([("odd", odd), ("plain", plain)])
    plain.grad = torch.ones(3)
    optimizer.step()
    optimizer.zero_grad()
    assert plain.all() and len(optimizer.state_dict()["state"]) == 1
    odd.requires_grad_(True)
    plain.grad, before = torch.ones(3), plain.detach().clone()
    with pytest.raises(TypeError, match="odd: expected a"):
        optimizer.step()
    assert torch.equal(plain, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second kind of device")
def test_parameters_on_two_devices_are_refused() -> None:
    params = [("here", nn.Parameter(torch.zeros(3))), ("there", nn.Parameter(torch.zeros(3, device="cuda")))]
    seen = attempt(lambda: ShardedDecoupledAdamW(params), [p for _, p in params])
    assert_refused([seen], VALUE, "there.*cpu.*cuda|there.*cuda.*cpu")


# --- process groups ---


def on_a_destroyed_group(_: Any) -> Seen | None:
    mine = dist.new_group([0, 1])
    if dist.get_rank() > 1:
        return None
    dist.destroy_process_group(mine)
    params = plain_params()
    return attempt(lambda: ShardedDecoupledAdamW(params.items(), process_group=mine), list(params.values()))


def test_a_destroyed_group_is_refused_at_construction() -> None:
    assert_refused(on_ranks(4, on_a_destroyed_group)[:2], VALUE, "process_group.*destroyed")


def destroyed_before_the_step(_: Any, verb: str) -> Seen | None:
    mine = dist.new_group([0, 1])
    if dist.get_rank() > 1:
        return None
    params = plain_params()
    optimizer = ShardedDecoupledAdamW(params.items(), process_group=mine)
    dist.destroy_process_group(mine)
    for index, p in enumerate(params.values()):
        p.grad = draw_gradient(p, 0, index)
    act = optimizer.step if verb == "step" else lambda: optimizer.clip_grad_norm_(1.0)
    return attempt(act, list(params.values()))


@pytest.mark.parametrize("verb", ["step", "clip"])
def test_a_group_destroyed_before_the_step_is_an_error_at_the_step(verb: str) -> None:
    assert_refused(on_ranks(4, destroyed_before_the_step, verb)[:2], ("RuntimeError",), "destroyed")


def on_a_mesh(_: Any, shape: tuple[int, ...], axes: tuple[str, ...]) -> Seen:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("stage", "replicate", "shard"))
    params = plain_params()
    return attempt(lambda: ShardedDecoupledAdamW(params.items(), process_group=mesh[axes]), list(params.values()))


def test_a_mesh_with_three_axes_is_refused_and_its_axes_named() -> None:
    axes = ("stage", "replicate", "shard")
    assert_refused(on_ranks(4, on_a_mesh, (1, 2, 2), axes), VALUE, "3", *axes)


def on_a_mesh_of(group: Any, ranks: list[list[int]]) -> Seen | list[float]:
    mesh = DeviceMesh("cpu", ranks, mesh_dim_names=("replicate", "shard"))
    params = plain_params()

    def stepped() -> None:
        optimizer = ShardedDecoupledAdamW(params.items(), process_group=mesh, lr=1e-2)
        for param in params.values():
            param.grad = torch.arange(param.numel(), dtype=param.dtype).view_as(param) * (1 + group.rank())
        optimizer.step()

    seen = attempt(stepped, list(params.values()))
    return seen if seen.error else [float(param.detach().double().sum()) for param in params.values()]


@pytest.mark.parametrize("ranks", [[[1, 0], [2, 3]], [[3, 1], [0, 2]], [[0, 3], [2, 1]]])
def test_a_mesh_whose_shards_would_not_meet_their_replicas_is_refused(ranks: list[list[int]]) -> None:
    assert_refused(on_ranks(4, on_a_mesh_of, ranks), VALUE, "process_group", re.escape(str(ranks)))


@pytest.mark.parametrize("ranks", [[[0, 2], [1, 3]], [[3, 2], [1, 0]]])
def test_a_mesh_may_have_its_ranks_in_another_order_of_rows_and_columns(ranks: list[list[int]]) -> None:
    expected = on_ranks(4, on_a_mesh_of, [[0, 1], [2, 3]])
    assert on_ranks(4, on_a_mesh_of, ranks) == expected and len(set(map(str, expected))) == 1


def on_something_else(group: Any, kind: str) -> Seen:
    params = plain_params()
    thing: Any = {"a number": 2, "a word": "gloo", "the module": dist}[kind]
    return attempt(lambda: ShardedDecoupledAdamW(params.items(), process_group=thing), list(params.values()))


@pytest.mark.parametrize("kind", ["a number", "a word", "the module"])
def test_something_that_is_no_process_group_is_refused(kind: str) -> None:
    assert_refused(on_ranks(2, on_something_else, kind), TYPE, "process_group")


def outside_of_the_group(group: Any) -> Seen | None:
    others = dist.new_group([0, 1])
    if dist.get_rank() < 2:
        return None
    params = plain_params()
    return attempt(lambda: ShardedDecoupledAdamW(params.items(), process_group=others), list(params.values()))


def test_a_group_that_this_rank_is_not_in_is_refused() -> None:
    first, second, third, fourth = on_ranks(4, outside_of_the_group)
    assert first is None and second is None
    assert_refused([third, fourth], EITHER, "process_group.*(not a member|outside)")


def sharded_already(group: Any) -> Seen:
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = DeviceMesh.from_group(group, "cpu")
    param = nn.Parameter(distribute_tensor(torch.zeros(8, 2), mesh, [Shard(0)]))
    return attempt(lambda: ShardedDecoupledAdamW([("spread", param)], process_group=group), [])


def test_a_parameter_that_is_sharded_already_is_refused() -> None:
    assert_refused(on_ranks(2, sharded_already), EITHER, "spread.*DTensor.*DecoupledAdamW")


# --- ranks that built different things ---

Build = tuple[Any, dict[str, Any]]


def rebuilt(**shapes: Any) -> list[tuple[str, nn.Parameter]]:
    params: dict[str, Any] = plain_params()
    for name, value in shapes.items():
        params[name] = nn.Parameter(value) if isinstance(value, Tensor) else value
    return [(name, p) for name, p in params.items() if p is not None]


def reordered() -> list[tuple[str, nn.Parameter]]:
    params = plain_params()
    return [(name, params[name]) for name in ("bias", "weight", "scale")]


def renamed() -> list[tuple[str, nn.Parameter]]:
    return [("kernel" if name == "weight" else name, p) for name, p in plain_params().items()]


def frozen_bias() -> list[tuple[str, nn.Parameter]]:
    params = plain_params()
    params["bias"].requires_grad_(False)
    return list(params.items())


def in_two_groups(lr: float | None = None) -> list[dict[str, Any]]:
    params = list(plain_params().items())
    return [{"params": params[:2]}, {"params": params[2:]} | ({} if lr is None else {"lr": lr})]


# name: (what the right ranks build, what the wrong one builds, what everybody must say)
DIFFERENT_BUILDS: dict[str, tuple[Callable[[], Build], Callable[[], Build], tuple[str, ...]]] = {
    "an extra layer": (
        lambda: (rebuilt(), {}),
        lambda: (rebuilt(extra=torch.zeros(4)), {}),
        ("extra|3.*4|4.*3",),
    ),
    "a missing layer": (
        lambda: (rebuilt(), {}),
        lambda: (rebuilt(scale=None), {}),
        ("scale|2 parameters.*3 parameters",),
    ),
    "a layer of another shape": (
        lambda: (rebuilt(), {}),
        lambda: (rebuilt(weight=torch.zeros(5, 4)), {}),
        ("weight", r"5, 3", r"5, 4"),
    ),
    "the same size in another shape": (
        lambda: (rebuilt(), {}),
        lambda: (rebuilt(weight=torch.zeros(3, 5)), {}),
        ("weight", r"5, 3", r"3, 5"),
    ),
    "a layer of another dtype": (
        lambda: (rebuilt(), {}),
        lambda: (rebuilt(bias=torch.zeros(3, dtype=F64)), {}),
        ("bias", "float32", "float64"),
    ),
    "another order": (lambda: (rebuilt(), {}), lambda: (reordered(), {}), ("weight", "bias")),
    "another name": (lambda: (rebuilt(), {}), lambda: (renamed(), {}), ("weight", "kernel")),
    "a frozen layer": (lambda: (rebuilt(), {}), lambda: (frozen_bias(), {}), ("bias", "frozen", "trainable")),
    "another grouping": (lambda: (rebuilt(), {}), lambda: (in_two_groups(), {}), ("group",)),
    "another lr": (
        lambda: (rebuilt(), dict(lr=1e-3)),
        lambda: (rebuilt(), dict(lr=2e-3)),
        ("lr", r"0\.001", r"0\.002"),
    ),
    "another lr in the second group": (
        lambda: (in_two_groups(1e-3), {}),
        lambda: (in_two_groups(5e-3), {}),
        (r"param_groups\[1\]", "lr", r"0\.001", r"0\.005"),
    ),
    "a tensor lr that differs in the seventh digit": (
        lambda: (rebuilt(), dict(lr=torch.tensor(1e-3))),
        lambda: (rebuilt(), dict(lr=torch.tensor(1.0000005e-3))),
        ("lr",),
    ),
    "other betas": (
        lambda: (rebuilt(), dict(betas=(0.9, 0.95))),
        lambda: (rebuilt(), dict(betas=(0.9, 0.96))),
        ("beta", r"0\.95", r"0\.96"),
    ),
    "another eps": (lambda: (rebuilt(), {}), lambda: (rebuilt(), dict(eps=1e-6)), ("eps", "1e-08", "1e-06")),
    "another weight_decay": (
        lambda: (rebuilt(), {}),
        lambda: (rebuilt(), dict(weight_decay=2e-5)),
        ("weight_decay", "1e-05", "2e-05"),
    ),
    "amsgrad": (lambda: (rebuilt(), {}), lambda: (rebuilt(), dict(amsgrad=True)), ("amsgrad", "True", "False")),
    "another bucket size": (
        lambda: (rebuilt(), dict(config=ShardingConfig(bucket_cap_mb=2.0))),
        lambda: (rebuilt(), dict(config=ShardingConfig(bucket_cap_mb=3.0))),
        ("bucket_cap_mb", r"2\.0", r"3\.0"),
    ),
    "another main parameter": (
        lambda: (rebuilt(), {}),
        lambda: (rebuilt(), dict(config=ShardingConfig(main_parameter=MainParameter.NONE))),
        ("main_parameter", "FP32", "NONE"),
    ),
    "another storage of moments": (
        lambda: (rebuilt(), {}),
        lambda: (rebuilt(), dict(config=ShardingConfig(moments=Moments.BF16))),
        ("moments", "FP32", "BF16"),
    ),
    "reduction by others": (
        lambda: (rebuilt(), {}),
        lambda: (rebuilt(), dict(config=ShardingConfig(reduce_gradients=False))),
        ("reduce_gradients", "True", "False"),
    ),
}


def build_differently(group: Any, case: str, wrong_rank: int) -> Seen:
    right, wrong, _ = DIFFERENT_BUILDS[case]
    params, arguments = (wrong if group.rank() == wrong_rank else right)()
    flat = [p for g in params for _, p in g["params"]] if isinstance(params[0], dict) else [p for _, p in params]
    return attempt(lambda: ShardedDecoupledAdamW(params, process_group=group, **arguments), flat)


@pytest.mark.parametrize(
    ("case", "num_ranks", "wrong_rank"),
    [(case, *ranks) for case, ranks in zip(DIFFERENT_BUILDS, itertools.cycle([(2, 1), (3, 2), (2, 0)]))],
)
def test_ranks_that_build_different_things_all_say_what_differs(case: str, num_ranks: int, wrong_rank: int) -> None:
    seen = on_ranks(num_ranks, build_differently, case, wrong_rank)
    other = wrong_rank if wrong_rank else 1
    assert_refused(seen, VALUE, *DIFFERENT_BUILDS[case][2], "rank 0", f"rank {other}")
    assert len({one.message for one in seen}) == 1, "ranks tell different stories"


def add_group_differently(group: Any, kind: str) -> list[Any]:
    params, control_params = plain_params(), plain_params()
    extra = nn.Parameter(torch.ones(4 if kind == "another shape" and group.rank() == 1 else 5))
    optimizer = ShardedDecoupledAdamW(params.items(), lr=1e-2, process_group=group)
    control = DecoupledAdamW(control_params.items(), lr=1e-2)
    lr = -1.0 if kind == "a bad lr on one rank" and group.rank() == 1 else 1e-3
    seen = attempt(lambda: optimizer.add_param_group({"params": [("extra", extra)], "lr": lr}), [extra])
    num_groups = len(optimizer.param_groups)
    train_both(group, params, optimizer, control_params, control, step=0)
    return [seen, num_groups]


def train_both(
    group: Any, params: Params, optimizer: ShardedDecoupledAdamW, control_params: Params, control: Any, step: int
) -> None:
    for index, (p, c) in enumerate(zip(params.values(), control_params.values(), strict=True)):
        p.grad = draw_gradient(p, step, group.rank(), index)
        c.grad = mean_in_rank_order([draw_gradient(p, step, r, index) for r in range(group.size())])
    optimizer.step()
    control.step()
    optimizer.zero_grad()
    for name, p in params.items():
        assert torch.equal(p, control_params[name]), f"{name} differs after the refusal"


@pytest.mark.parametrize(
    ("kind", "said"), [("another shape", ("extra", "4", "5")), ("a bad lr on one rank", (r"-1\.0",))]
)
def test_a_group_added_differently_is_refused_everywhere_and_training_goes_on(kind: str, said: tuple[str, ...]) -> None:
    results = on_ranks(2, add_group_differently, kind)
    assert_refused([seen for seen, _ in results], VALUE, *said)
    assert [num_groups for _, num_groups in results] == [1, 1]


# --- disagreement at a step ---


def without_gradient(optimizer: Any, params: Params) -> Callable[[], None]:
    saved = params["bias"].grad
    params["bias"].grad = None
    return lambda: setattr(params["bias"], "grad", saved)


def with_entry(key: str, value: Any) -> Callable[[Any, Params], Callable[[], None]]:
    def spoil(optimizer: Any, params: Params) -> Callable[[], None]:
        group = optimizer.param_groups[0]
        saved = group[key]
        group[key] = value
        return lambda: group.__setitem__(key, saved)

    return spoil


def sparse_gradient(optimizer: Any, params: Params) -> Callable[[], None]:
    saved = params["weight"].grad
    assert saved is not None
    params["weight"].grad = saved.to_sparse()
    return lambda: setattr(params["weight"], "grad", saved)


def cast(optimizer: Any, params: Params) -> Callable[[], None]:
    home = params["bias"].data
    params["bias"].data = home.double()
    return lambda: setattr(params["bias"], "data", home)


def thawed(optimizer: Any, params: Params) -> Callable[[], None]:
    params["ice"].requires_grad_(True)

    def freeze() -> None:
        params["ice"].requires_grad_(False)

    return freeze


# name: (how the wrong rank is spoilt, which returns how to repair it; what everybody must say)
SPOILT_STEPS: dict[str, tuple[Callable[[Any, Params], Callable[[], None]], tuple[str, ...]]] = {
    "no gradient for one parameter": (without_gradient, ("bias", "None", "tensor")),
    "another lr": (with_entry("lr", 0.5), ("lr", r"0\.01", r"0\.5")),
    "a tensor lr that differs in the seventh digit": (with_entry("lr", torch.tensor(0.010000005)), ("lr",)),
    "other betas": (with_entry("betas", (0.5, 0.95)), ("beta", r"0\.9", r"0\.5")),
    "another weight_decay": (with_entry("weight_decay", 0.25), ("weight_decay", "1e-05", r"0\.25")),
    "another eps": (with_entry("eps", 1e-3), ("eps", "1e-08", r"0\.001")),
    "another initial_lr": (with_entry("initial_lr", 0.75), ("initial_lr", r"0\.01", r"0\.75")),
    "an unfrozen parameter": (thawed, ("ice",)),
    "a sparse gradient": (sparse_gradient, ("weight", "sparse")),
    "a parameter cast out of its buffer": (cast, ("bias",)),
}


WRONG_BY_THEMSELVES = ("a sparse gradient", "a parameter cast out of its buffer")


def spoilt_step(group: Any, case: str, wrong_ranks: list[int], verb: str, overlap: bool) -> Seen:
    """A step that goes wrong, then the repair, then steps that must be those of the control.

    With overlap gradients are averaged before ranks compare, and have to be dropped where they disagree.
    """
    rank = group.rank()
    params, control_params = plain_params(), plain_params()
    for some in (params, control_params):
        some["ice"] = nn.Parameter(torch.ones(3), requires_grad=False)
    config = ShardingConfig(overlap=overlap)
    optimizer = ShardedDecoupledAdamW(params.items(), lr=1e-2, amsgrad=True, process_group=group, config=config)
    control = DecoupledAdamW(control_params.items(), lr=1e-2, amsgrad=True)

    def give(step: int) -> None:
        for index, (name, p) in enumerate(params.items()):
            if name != "ice":
                p.grad = draw_gradient(p, step, rank, index)
                control_params[name].grad = mean_in_rank_order(
                    [draw_gradient(p, step, r, index) for r in range(group.size())]
                )

    def finish() -> None:
        optimizer.step()
        control.step()
        optimizer.zero_grad()

    give(0)
    finish()
    give(1)
    repair = SPOILT_STEPS[case][0](optimizer, params) if rank in wrong_ranks else lambda: None
    state = {name: {k: v.clone() for k, v in optimizer.state[p].items()} for name, p in params.items() if name != "ice"}
    act = optimizer.step if verb == "step" else lambda: optimizer.clip_grad_norm_(1e9)
    seen = attempt(
        act, [p for name, p in params.items() if not (case.startswith("a parameter moved") and name == "bias")]
    )
    for name, entries in state.items():
        for key, value in entries.items():
            assert torch.equal(optimizer.state[params[name]][key], value), f"{key} of {name} changed"
    repair()
    if overlap:
        optimizer.zero_grad()
        give(1)
    finish()
    give(2)
    finish()
    for name, p in params.items():
        assert torch.equal(p, control_params[name]), f"{name}: something was lost in the refused {verb}"
    return seen


@pytest.mark.parametrize(
    ("wrong_rank", "verb", "overlap"), [(0, "step", True), (1, "clip", False), (1, "step", False), (1, "clip", True)]
)
@pytest.mark.parametrize("case", SPOILT_STEPS)
def test_a_step_that_one_rank_takes_differently_is_refused_by_all_and_nothing_is_lost(
    case: str, wrong_rank: int, verb: str, overlap: bool
) -> None:
    seen = on_ranks(2, spoilt_step, case, [wrong_rank], verb, overlap, timeout_s=30.0)
    assert_refused(seen, ("RuntimeError", "ValueError", "TypeError"), *SPOILT_STEPS[case][1])
    # A rank that is wrong by itself says what is wrong; the other, and both where they merely differ, name the rank.
    assert f"rank {wrong_rank}" in seen[1 - wrong_rank].message
    if case not in WRONG_BY_THEMSELVES:
        assert seen[0].message == seen[1].message and "rank 0" in seen[0].message and "rank 1" in seen[0].message


@pytest.mark.parametrize("case", ["no gradient for one parameter", "another lr"])
def test_of_three_ranks_the_one_that_differs_is_named(case: str) -> None:
    for one in on_ranks(3, spoilt_step, case, [2], "step", True):
        assert "rank 2" in one.message and "rank 0" in one.message


@pytest.mark.parametrize("case", WRONG_BY_THEMSELVES)
def test_a_step_that_every_rank_takes_wrongly_is_refused_by_all(case: str) -> None:
    seen = on_ranks(2, spoilt_step, case, [0, 1], "step", False)
    assert_refused(seen, ("RuntimeError", "ValueError", "TypeError"), *SPOILT_STEPS[case][1])


def step_without_eps(group: Any) -> Seen:
    params = plain_params()
    optimizer = ShardedDecoupledAdamW(params.items(), process_group=group)
    if group.rank() == 1:
        del optimizer.param_groups[0]["eps"]
    return attempt(optimizer.step, list(params.values()))


def test_an_error_of_any_kind_on_one_rank_reaches_the_others() -> None:
    on_rank_0, on_rank_1 = on_ranks(2, step_without_eps)
    assert (on_rank_1.error, on_rank_1.message) == ("KeyError", "'eps'")
    assert on_rank_0.error == "RuntimeError" and "rank 1 has refused (KeyError: 'eps')" in on_rank_0.message


def out_of_step(group: Any, case: str) -> Seen:
    """Rank 1 does something else than rank 0 at the same time."""
    params = plain_params()
    optimizer = ShardedDecoupledAdamW(params.items(), lr=1e-2, process_group=group)
    odd = group.rank() == 1

    def give(step: int) -> None:
        for index, p in enumerate(params.values()):
            p.grad = draw_gradient(p, step, group.rank(), index)

    give(0)
    action: Callable[[], Any] = optimizer.step
    if case == "used gradients":
        optimizer.step()
        if not odd:
            optimizer.zero_grad()
            give(1)
    elif case == "inside no_sync" and odd:

        def action() -> None:
            with optimizer.no_sync():
                optimizer.step()

    elif case == "clip where others step" and odd:

        def action() -> None:
            optimizer.clip_grad_norm_(1.0)

    elif case == "another max_norm":

        def action() -> None:
            optimizer.clip_grad_norm_(2.0 if odd else 1.0)
            optimizer.step()

    elif case == "another norm_type":

        def action() -> None:
            optimizer.clip_grad_norm_(1.0, norm_type=float("inf") if odd else 2.0)
            optimizer.step()

    elif case == "clipped by one rank only":
        # Both reach step() at last, but rank 1 alone has clipped.
        def action() -> None:
            if odd:
                optimizer.clip_grad_norm_(1.0)
            optimizer.step()

    elif case == "negative max_norm":

        def action() -> None:
            optimizer.clip_grad_norm_(-1.0 if odd else 1.0)

    return attempt(action, list(params.values()))


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("used gradients", "zero_grad"),
        ("inside no_sync", "no_sync"),
        ("clip where others step", "clip"),
        ("clipped by one rank only", "clip"),
        ("another max_norm", "max_norm"),
        ("another norm_type", "norm_type"),
        ("negative max_norm", "max_norm"),
    ],
)
def test_a_rank_that_is_out_of_step_is_an_error_on_all(case: str, said: str) -> None:
    seen = on_ranks(2, out_of_step, case, timeout_s=30.0)
    assert_refused(seen, ("RuntimeError", "ValueError"), said)


def alone_in_the_closure(group: Any) -> list[str | None]:
    """The ranks whose closures work must not be told by a hang."""
    params = {name: p for name, p in named(make_groups("tiny", 0)).items()}
    optimizer = ShardedDecoupledAdamW(params.items(), process_group=group)
    for index, p in enumerate(params.values()):
        p.grad = draw_gradient(p, 0, group.rank(), index)
    assert all(p.dtype == F32 for p in params.values())
    seen = attempt(lambda: optimizer.step(lambda: 1.0), [])
    return [seen.error]


def test_closures_may_differ_as_long_as_gradients_agree() -> None:
    assert on_ranks(2, alone_in_the_closure) == [[None], [None]]
