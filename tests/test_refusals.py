"""Bad input: one clear error on every rank, naming the first difference and both sides; no hang; nothing changed.

A case runs on all ranks at once. Where one rank alone is wrong the others must not wait for it: the pool would call
that a hang. Each rank reports the error that it saw and whether its parameters still are as they were, byte for byte
and in the same memory. Every case is wrong on one rank, which is now the first and now another.

Every message is quoted by a test: one that triggers it, here where one call on one rank does. A message is what an
exception of the package is made from, as it stands in the source. A test quotes it that has 12 letters of it in a row,
or all between two values, in a text of its own.
"""

import ast
import copy
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.two_tensor import TwoTensor

import sharded_dadamw
from sharded_dadamw import DecoupledAdamW, MainParameter, ShardedDecoupledAdamW, ShardingConfig
from sharded_dadamw.checkpoint import save_checkpoint
from sharded_dadamw.interchange import from_torch
from sharded_dadamw.plan import plan
from tests.harness import Pair, Params, give_gradients, ranks
from tests.models import F64
from tests.simulated import on_ranks


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


VALUE, TYPE, EITHER = ("ValueError",), ("TypeError",), ("ValueError", "TypeError")
NAN, INF = float("nan"), float("inf")

# what the rank that is wrong says, a regular expression: its arguments
BAD_ARGUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    r"lr: expected a finite number >= 0, got -0\.001": lambda: dict(lr=-1e-3),
    "lr|fast": lambda: dict(lr="fast"),
    "lr: expected a float or a tensor of one element, got one of 2": lambda: dict(lr=torch.tensor([1.0, 2.0])),
    "eps: .*-1e-08": lambda: dict(eps=-1e-8),
    r"weight_decay: expected a finite number >= 0, got -0\.1": lambda: dict(weight_decay=-0.1),
    r"betas: .*1\.0": lambda: dict(betas=(0.9, 1.0)),
    r"betas: expected two numbers in \[0, 1\), got \(0\.9,\)": lambda: dict(betas=(0.9,)),
    r"betas: .*2\.0": lambda: dict(params=[{"params": list(plain_params().items()), "betas": (0.9, 2.0)}]),
    "initial_lr: .*-1": lambda: dict(params=[{"params": list(plain_params().items()), "initial_lr": -1.0}]),
    "maximize: expected False, got True; decoupled AdamW does not have": lambda: dict(
        params=[{"params": list(plain_params().items()), "maximize": True}]
    ),
    r"max_grad_norm: expected a number > 0, or None for no clipping, got 0\.0": lambda: dict(max_grad_norm=0.0),
    "max_grad_norm: .*nan": lambda: dict(max_grad_norm=NAN),
    "metrics_in_step: expected True or False, got 1": lambda: dict(metrics_in_step=1),
    "empty parameter list": lambda: dict(params=[]),
    "'params'": lambda: dict(params=[{"lr": 1e-3}]),
    "non-leaf": lambda: dict(params=with_param("odd", plain_params()["bias"] * 2)),
    "odd: expected a dense parameter, got layout torch.sparse_coo": lambda: dict(
        params=with_param("odd", nn.Parameter(torch.eye(3).to_sparse()))
    ),
    r"odd: expected a dtype of \(torch.float32, torch.bfloat16.* got torch.complex64": lambda: dict(
        params=with_param("odd", nn.Parameter(torch.zeros(3, dtype=torch.complex64)))
    ),
    "odd: expected memory, got a meta tensor; materialise the model": lambda: dict(
        params=with_param("odd", nn.Parameter(torch.zeros(3, device="meta")))
    ),
    r"param_groups\[0\]\['params'\]\[0\]: .*meta": lambda: dict(params=[nn.Parameter(torch.zeros(3, device="meta"))]),
    "again is the same parameter as bias; pass it once": lambda: dict(
        params=[("bias", p := nn.Parameter(torch.zeros(3))), ("again", p)]
    ),
    "again is the same parameter as empty": lambda: dict(
        params=[("empty", p := nn.Parameter(torch.zeros(0))), ("again", p)]
    ),
    "more than one parameter group": lambda: dict(
        params=[{"params": [("bias", p := nn.Parameter(torch.zeros(3)))]}, {"params": [("again", p)]}]
    ),
    "second shares memory with first": lambda: dict(
        params=[("first", nn.Parameter((whole := torch.zeros(10))[:6])), ("second", nn.Parameter(whole[5:]))]
    ),
    "main_parameter: .*float16.*REMAINDER": lambda: dict(
        params=with_param("odd", nn.Parameter(torch.zeros(8, dtype=torch.float16))),
        config=ShardingConfig(main_parameter=MainParameter.REMAINDER),
    ),
    "config: expected a ShardingConfig, or a mapping": lambda: dict(config=[1.0]),
}


def construct(group: Any, case: str, wrong_ranks: list[int]) -> Seen:
    arguments: dict[str, Any] = {"params": list(plain_params().items())}
    if group is None or group.rank() in wrong_ranks:
        arguments |= BAD_ARGUMENTS[case]()
    params = arguments["params"]
    if not isinstance(params, list):
        flat = []
    elif params and isinstance(params[0], dict):
        flat = [p for g in params for _, p in g.get("params", ())]
    else:
        flat = [entry[1] if isinstance(entry, tuple) else entry for entry in params]
    return attempt(lambda: ShardedDecoupledAdamW(process_group=group, **arguments), flat)


@pytest.mark.filterwarnings("ignore:.*duplicate parameters.*")
@pytest.mark.parametrize(("said", "wrong_rank"), [*zip(BAD_ARGUMENTS, itertools.cycle([1, 0]))])
def test_a_bad_argument_is_refused_by_all_quoting_the_rank_that_has_it(said: str, wrong_rank: int) -> None:
    assert_refused([construct(None, said, [0])], (*EITHER, "KeyError"), said)
    if wrong_rank == 0:
        assert_refused(on_ranks(2, construct, said, [0, 1]), (*EITHER, "KeyError"), said)
    seen = on_ranks(2, construct, said, [wrong_rank])
    assert_refused([seen[wrong_rank]], (*EITHER, "KeyError"), said)
    assert_refused(
        [seen[1 - wrong_rank]], (*EITHER, "RuntimeError"), f"rank {wrong_rank} refused its arguments of", said
    )


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


@pytest.mark.parametrize("verb", ["construct", "step", "clip"])
@ranks(3)
def test_a_destroyed_group_is_refused_whenever_it_is_needed(_: Any, verb: str) -> None:
    mine, params = dist.new_group([0, 1]), plain_params()
    if dist.get_rank() > 1:
        return

    def build() -> Any:
        return ShardedDecoupledAdamW(params.items(), process_group=mine)

    optimizer = None if verb == "construct" else build()
    dist.destroy_process_group(mine)
    give_gradients(params, 0)
    act = {"construct": build, "step": lambda: optimizer.step(), "clip": lambda: optimizer.clip_grad_norm_(1.0)}[verb]
    said = "process_group.*destroyed" if verb == "construct" else "destroyed"
    assert_refused([attempt(act, list(params.values()))], ("ValueError", "RuntimeError"), said)


@ranks(4)
def test_a_mesh_with_three_axes_and_a_group_that_this_rank_is_not_in_are_refused(_: Any) -> None:
    axes = ("stage", "replicate", "shard")
    mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=axes)
    others, params = dist.new_group([0, 1]), plain_params()
    for group, said in ((mesh, ("3", *axes)), (others, ("process_group.*(not a member|outside)",))):
        if group is mesh or dist.get_rank() > 1:
            build = partial(ShardedDecoupledAdamW, params.items(), process_group=group)
            assert_refused([attempt(build, list(params.values()))], EITHER, *said)


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


# --- ranks that built different things ---


def rebuilt(**shapes: Any) -> list[tuple[str, nn.Parameter]]:
    params: dict[str, Any] = plain_params()
    for name, value in shapes.items():
        params[name] = nn.Parameter(value) if type(value) is Tensor else value
    return [(name, p) for name, p in params.items() if p is not None]


def in_two_groups(lr: float | None = None) -> list[dict[str, Any]]:
    params = list(plain_params().items())
    return [{"params": params[:2]}, {"params": params[2:]} | ({} if lr is None else {"lr": lr})]


Build = Callable[[], tuple[Any, dict[str, Any]]]


def plainly(**arguments: Any) -> Build:
    return lambda: (rebuilt(), arguments)


def configured(**settings: Any) -> Build:
    return plainly(config=ShardingConfig(**settings))


# name: (what the wrong rank builds, what everybody must say, what the right ones build if not the plain parameters)
DIFFERENT_BUILDS: dict[str, tuple[Build, tuple[str, ...]] | tuple[Build, tuple[str, ...], Build]] = {
    "a missing layer": (lambda: (rebuilt(scale=None), {}), ("scale|2 parameters.*3 parameters",)),
    "the same size in another shape": (lambda: (rebuilt(weight=torch.zeros(3, 5)), {}), ("weight", r"5, 3", r"3, 5")),
    "a layer of another dtype": (
        lambda: (rebuilt(bias=torch.zeros(3, dtype=F64)), {}),
        ("bias", "float32", "float64"),
    ),
    "another order": (lambda: (rebuilt()[::-1], {}), ("weight", "scale")),
    "another name": (
        lambda: ([("kernel", each) if name == "weight" else (name, each) for name, each in rebuilt()], {}),
        ("weight", "kernel"),
    ),
    "a frozen layer": (
        lambda: (rebuilt(bias=nn.Parameter(torch.zeros(3), requires_grad=False)), {}),
        ("bias", "frozen", "trainable"),
    ),
    "another grouping": (lambda: (in_two_groups(), {}), ("group",)),
    "another lr in the second group": (
        lambda: (in_two_groups(5e-3), {}),
        (r"param_groups\[1\]", "lr", r"0\.001", r"0\.005"),
        lambda: (in_two_groups(1e-3), {}),
    ),
    "a tensor lr that differs in the seventh digit": (
        plainly(lr=torch.tensor(1.0000005e-3)),
        ("lr",),
        plainly(lr=torch.tensor(1e-3)),
    ),
    "other betas": (plainly(betas=(0.9, 0.96)), ("beta", r"0\.95", r"0\.96")),
    "amsgrad": (plainly(amsgrad=True), ("amsgrad", "True", "False")),
    "another bucket size": (
        configured(bucket_cap_mb=3.0),
        ("bucket_cap_mb", r"2\.0", r"3\.0"),
        configured(bucket_cap_mb=2.0),
    ),
    "another main parameter": (
        configured(main_parameter=MainParameter.NONE),
        ("main_parameter", "FP32", "NONE"),
    ),
}


@pytest.mark.parametrize(
    ("case", "num_ranks", "wrong_rank"),
    [(case, *ranks) for case, ranks in zip(DIFFERENT_BUILDS, itertools.cycle([(2, 1), (3, 2), (2, 0)]))],
)
@ranks()
def test_ranks_that_build_different_things_all_say_what_differs(group: Any, case: str, wrong_rank: int) -> str:
    wrong, said, *right = DIFFERENT_BUILDS[case]
    params, arguments = (wrong if group.rank() == wrong_rank else (right or [plainly()])[0])()
    flat = [p for g in params for _, p in g["params"]] if isinstance(params[0], dict) else [p for _, p in params]
    seen = attempt(lambda: ShardedDecoupledAdamW(params, process_group=group, **arguments), flat)
    assert_refused([seen], VALUE, *said, "rank 0", f"rank {wrong_rank or 1}")
    return seen.message


@pytest.mark.parametrize(
    ("kind", "said"), [("another shape", ("extra", "4", "5")), ("a bad lr on one rank", (r"-1\.0",))]
)
@ranks(2)
def test_a_group_added_differently_is_refused_everywhere_and_training_goes_on(
    group: Any, kind: str, said: tuple[str, ...]
) -> None:
    pair = Pair(group)
    extra = nn.Parameter(torch.ones(4 if kind == "another shape" and group.rank() == 1 else 5))
    lr = -1.0 if kind == "a bad lr on one rank" and group.rank() == 1 else 1e-3
    seen = attempt(lambda: pair.optimizer.add_param_group({"params": [("extra", extra)], "lr": lr}), [extra])
    assert_refused([seen], VALUE, *said)
    assert len(pair.optimizer.param_groups) == 1
    pair.train(0)


# --- disagreement at a step ---


def put(owner: Any, key: str, value: Any) -> Callable[[], object]:
    """Put a value in the place of another; returns how to put that back."""
    get, put_into = (dict.__getitem__, dict.__setitem__) if isinstance(owner, dict) else (getattr, setattr)
    saved = get(owner, key)
    put_into(owner, key, value)
    return lambda: put_into(owner, key, saved)


def with_entry(key: str, value: Any) -> Callable[[Any, Params], Callable[[], object]]:
    return lambda optimizer, params: put(optimizer.param_groups[0], key, value)


# name: (how the wrong rank is spoilt, which returns how to repair it; what everybody must say)
SPOILT_STEPS: dict[str, tuple[Callable[[Any, Params], Callable[[], object]], tuple[str, ...]]] = {
    "no gradient for one parameter": (lambda o, params: put(params["p1"], "grad", None), ("p1", "None", "tensor")),
    "another lr": (with_entry("lr", 0.5), ("lr", r"0\.01", r"0\.5")),
    "a tensor lr that differs in the seventh digit": (with_entry("lr", torch.tensor(0.010000005)), ("lr",)),
    "other betas": (with_entry("betas", (0.5, 0.95)), ("beta", r"0\.9", r"0\.5")),
    "another initial_lr": (with_entry("initial_lr", 0.75), ("initial_lr", r"0\.01", r"0\.75")),
    "an unfrozen parameter": (lambda o, params: put(params["p0"], "requires_grad", True), ("p0",)),
    "a sparse gradient": (
        lambda o, params: put(params["p2"], "grad", params["p2"].grad.to_sparse()),  # type: ignore[union-attr]
        ("p2", "got layout torch.sparse_coo; build embeddings with sparse=False"),
    ),
    "a parameter cast out of its buffer": (
        lambda o, params: put(params["p1"], "data", params["p1"].data.double()),
        ("p1",),
    ),
}


WRONG_BY_THEMSELVES = ("a sparse gradient", "a parameter cast out of its buffer")


def spoilt_step(group: Any, case: str, wrong_ranks: list[int], verb: str, overlap: bool) -> Seen:
    """A step that goes wrong, then the repair, then steps that must be those of the control.

    With overlap gradients are averaged before ranks compare, and have to be dropped where they disagree.
    """
    pair = Pair(group, "frozen", ShardingConfig(overlap=overlap), lr=1e-2, amsgrad=True)
    params, optimizer = pair.params, pair.optimizer
    pair.train(0)
    pair.give(1)
    repair = SPOILT_STEPS[case][0](optimizer, params) if group.rank() in wrong_ranks else lambda: None
    state = copy.deepcopy([optimizer.state.get(p) for p in params.values()])
    act = optimizer.step if verb == "step" else lambda: optimizer.clip_grad_norm_(1e9)
    seen = attempt(act, list(params.values()))
    assert str(state) == str([optimizer.state.get(p) for p in params.values()]), "state has changed"
    repair()
    if overlap:
        optimizer.zero_grad()
        pair.give(1)
    pair.step()
    pair.train(2)
    return seen


@pytest.mark.parametrize(
    ("case", "wrong_rank", "verb", "overlap"),
    [
        *((case, *how) for case, how in zip(SPOILT_STEPS, itertools.cycle([(0, "step", True), (1, "clip", False)]))),
        *((case, *how) for case, how in zip(SPOILT_STEPS, itertools.cycle([(1, "clip", True), (1, "step", False)]))),
    ],
)
def test_a_step_that_one_rank_takes_differently_is_refused_by_all_and_nothing_is_lost(
    case: str, wrong_rank: int, verb: str, overlap: bool
) -> None:
    seen = on_ranks(2, spoilt_step, case, [wrong_rank], verb, overlap)
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


def clip_and_step(optimizer: Any, *arguments: Any) -> None:
    optimizer.clip_grad_norm_(*arguments)
    optimizer.step()


def step_without_eps(optimizer: Any) -> None:
    del optimizer.param_groups[0]["eps"]
    optimizer.step()


# (what every rank says, what rank 1 does, what rank 0 does)
OUT_OF_STEP: dict[str, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "clip where others step": ("clip", lambda o: o.clip_grad_norm_(1.0), lambda o: o.step()),
    "clipped by one rank only": ("clip", lambda o: clip_and_step(o, 1.0), lambda o: o.step()),
    "another max_norm": ("max_norm", lambda o: clip_and_step(o, 2.0), lambda o: clip_and_step(o, 1.0)),
    "another norm_type": ("norm_type", lambda o: clip_and_step(o, 1.0, INF), lambda o: clip_and_step(o, 1.0)),
    "negative max_norm": ("max_norm", lambda o: o.clip_grad_norm_(-1.0), lambda o: o.clip_grad_norm_(1.0)),
    "an error of any kind": ("'eps'", step_without_eps, lambda o: o.step()),
}


@pytest.mark.parametrize("case", OUT_OF_STEP)
@ranks(2)
def test_a_rank_that_is_out_of_step_is_an_error_on_all(group: Any, case: str) -> None:
    """Rank 1 does something else than rank 0 at the same time. More such calls are in tests/test_overlap.py."""
    params = plain_params()
    optimizer = ShardedDecoupledAdamW(params.items(), lr=1e-2, process_group=group)
    give_gradients(params, 0, group.rank())
    said, odd, others = OUT_OF_STEP[case]
    seen = attempt(lambda: (odd if group.rank() == 1 else others)(optimizer), list(params.values()))
    assert_refused([seen], ("RuntimeError", "ValueError", "KeyError"), said)
    if case == "an error of any kind":
        assert (seen.error == "KeyError") if group.rank() else "rank 1 has refused (KeyError: 'eps')" in seen.message


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("forward", r"the order in which optimizers of one process group.*1\.weight of optimizer 1, 0\.weight"),
        ("step", "the number of the optimizer, as they were built: rank 0 has 0, rank 1 has 1"),
    ],
)
@ranks(2)
def test_optimizers_that_ranks_come_to_in_another_order_are_an_error_until_all_gradients_are_dropped(
    group: Any, what: str, said: str
) -> None:
    """Their gradients have equal sizes, so no transport can tell them apart."""
    torch.manual_seed(1)
    model: Any = nn.ModuleList(nn.Linear(3, 2, bias=False) for _ in range(2))
    twin = copy.deepcopy(model)

    def build(towers: Any) -> list[Any]:
        named = list(towers.named_parameters())
        return [ShardedDecoupledAdamW([each], lr=1e-2, process_group=group) for each in named]

    def run(towers: Any, optimizers: list[Any], step: int, wrong: str = "") -> None:
        orders = {each: (1, -1)[group.rank() if each == wrong else 0] for each in ("forward", "step")}
        x = torch.full((1, 3), 1.0 + group.rank() + step)
        sum((number + 1.0) * towers[number](x).sum() for number in (1, 0)[:: orders["forward"]]).backward()
        for optimizer in optimizers[:: orders["step"]]:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()

    ours, control = build(model), build(twin)
    for step in (0, 1, 2):
        if step == 1:
            before = [p.detach().clone() for p in model.parameters()]
            with pytest.raises(RuntimeError, match=said):
                run(model, ours, step, what)
            for optimizer in ours:
                if what == "forward":
                    with pytest.raises(RuntimeError, match=r"of one process group|zero_grad"):
                        optimizer.step()
            assert all(map(torch.equal, before, model.parameters()))
            for optimizer in ours:
                optimizer.zero_grad()
        run(model, ours, step)
        run(twin, control, step)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


@pytest.mark.parametrize(
    ("asked", "said"),
    [({"max_grad_norm": 1.0}, r"max_grad_norm=1\.0"), ({"metrics_in_step": True}, r"step\(\) with metrics_in_step")],
)
@ranks(2)
def test_what_one_rank_alone_was_built_to_do_in_each_step_is_an_error_on_all(
    group: Any, asked: dict[str, Any], said: str
) -> str:
    params = plain_params()
    optimizer = ShardedDecoupledAdamW(params.items(), process_group=group, **(asked if group.rank() == 0 else {}))
    give_gradients(params, 0, group.rank())
    seen = attempt(optimizer.step, list(params.values()))
    assert_refused([seen], ("RuntimeError",), "the call: rank 0 has .*" + said)
    return seen.message


# --- messages, each of which says what was expected, what came, and what to call ---

PACKAGE = Path(sharded_dadamw.__file__).parent
SHORTEST, LONG = 8, 12
"""Letters of a message that can be told from others, and how many in a row make a quotation."""


def optimizer(**arguments: Any) -> Any:
    return ShardedDecoupledAdamW([("a", nn.Parameter(torch.ones(3)))], **arguments)


def named(kind: Any, names: str) -> Any:
    return kind([(name, nn.Parameter(torch.ones(3))) for name in names])


def adamw(group: dict[str, Any] | None = None, state: Any = None) -> dict[str, Any]:
    """A state dict of torch's AdamW for one parameter."""
    param = nn.Parameter(torch.ones(3))
    theirs = torch.optim.AdamW([param], lr=1e-3)
    param.grad = torch.ones(3)
    theirs.step()
    found: dict[str, Any] = theirs.state_dict()
    found["param_groups"][0].update(group or {})
    if state is not None:
        found["state"][0] = state if not isinstance(state, dict) else found["state"][0] | state
    return found


def without(key: str) -> dict[str, Any]:
    found = adamw()
    del found["param_groups"][0][key]
    return found


MESSAGES: dict[str, Callable[[], Any]] = {
    "bucket_cap_mb: expected a number of MiB, got 'big'": lambda: ShardingConfig(bucket_cap_mb="big"),  # type: ignore[arg-type]
    "bucket_cap_mb: expected a finite number > 0 (MiB), got nan": lambda: ShardingConfig(bucket_cap_mb=float("nan")),
    "bucket_cap_mb: expected a finite number > 0 (MiB), got 0.0": lambda: ShardingConfig(bucket_cap_mb=0.0),
    "overlap: expected True or False, got 1": lambda: ShardingConfig(overlap=1),  # type: ignore[arg-type]
    "moments: expected one of Moments.FP32": lambda: ShardingConfig(moments="bf16"),  # type: ignore[arg-type]
    "config: expected settings among bucket_cap_mb": lambda: ShardingConfig.of({"buckets": 1}),
    "exchange: expected one of Exchange.FASTEST": lambda: ShardingConfig.of({"exchange": "telepathy"}),
    "wire_dtype: expected a torch.dtype or None, got 'nn'": lambda: ShardingConfig.of({"wire_dtype": "nn"}),
    "process_group: expected a ProcessGroup, a DeviceMesh or None, got 'gloo'": lambda: optimizer(process_group="gloo"),
    "parameters per group: expected [1], got [2]": lambda: optimizer().load_state_dict(
        ShardedDecoupledAdamW([nn.Parameter(torch.ones(3)) for _ in range(2)]).state_dict()
    ),
    "param_groups: expected the state of b in the place of a, since": lambda: named(
        ShardedDecoupledAdamW, "ba"
    ).load_state_dict(named(DecoupledAdamW, "ab").state_dict()),
    "state of a: expected the parameter's shape [2, 2], got [3]; state is loaded in the order of": lambda: (
        DecoupledAdamW([("a", nn.Parameter(torch.ones(2, 2)))]).load_state_dict(adamw({"weight_decay": 0.0}))
    ),
    "step: expected a whole number from 0 on, got -1": lambda: save_checkpoint(
        "nowhere", step=-1, model=(model := nn.Linear(2, 2)), optimizer=DecoupledAdamW(model.parameters())
    ),
    "param_groups[0]: expected AdamW with bias correction, got one without": lambda: from_torch(
        adamw({"bias_correction": False}), ["a"]
    ),
    "param_groups[0]: expected the hyperparameters of AdamW, got a group without eps": lambda: from_torch(
        without("eps"), ["a"]
    ),
    "param_groups[0]: expected initial_lr beside an lr of 0, got none": lambda: from_torch(adamw({"lr": 0.0}), ["a"]),
    "expected names for the 1 parameters, which this state dict only numbers": lambda: from_torch(adamw()),
    "state of a: expected a dict of tensors, got list": lambda: from_torch(adamw(state=[1]), ["a"]),
    "state of a: expected AdamW's exp_avg": lambda: from_torch(adamw(state={"momentum": torch.ones(3)}), ["a"]),
    "state of a, exp_avg_sq: expected a tensor of numbers, got 1": lambda: from_torch(
        adamw(state={"exp_avg_sq": 1}), ["a"]
    ),
    "state of a: expected the parameter's shape [4], got [3]": lambda: from_torch(adamw(), [("a", torch.ones(4))]),
    "model: expected one of": lambda: plan("a model of mine", ranks=2),
    "ranks: expected a multiple of the 8 ranks per host, or fewer, got 12": lambda: plan(nn.Linear(64, 64), ranks=12),
    "mesh: expected replicas x shards = 8 ranks, got 3 x 3": lambda: plan(nn.Linear(64, 64), ranks=8, mesh=(3, 3)),
}


@pytest.mark.parametrize("said", MESSAGES)
def test_each_says_what_was_expected_and_what_came(said: str) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError), match=re.escape(said)):
        MESSAGES[said]()


def text_of(node: ast.expr) -> str:
    """The literal text of an expression, with line ends where values go."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "\n"


def messages() -> Iterator[tuple[str, str]]:
    """Where an exception is made, and from what text, if it has enough of its own."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args and ast.unparse(node.func).endswith("Error"):
                text = text_of(node.args[-1])
                if max(map(len, text.split("\n"))) >= SHORTEST:
                    yield f"{path.relative_to(PACKAGE)}:{node.lineno}", text


def without_common_words(text: str) -> str:
    return re.sub(r"expected |, got | cannot be ", "\n", text)


def quoted() -> str:
    """All texts in tests, as they read: without what only a regular expression has."""
    texts: set[str] = set()
    for path in Path(__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value.replace("\\", ""))
    return without_common_words("\n".join(texts))


def is_quoted(message: str, texts: str) -> bool:
    pieces = [piece for piece in without_common_words(message).split("\n") if len(piece) >= SHORTEST]
    starts = [(piece, start) for piece in pieces for start in range(max(1, len(piece) - LONG + 1))]
    return not pieces or any(piece[start : start + LONG] in texts for piece, start in starts)


def test_every_message_is_quoted_by_a_test() -> None:
    texts = quoted()
    missing = {where: text for where, text in messages() if not is_quoted(text, texts)}
    unknown = {where: text for where, text in missing.items() if not any(each in text for each in OF_DAMAGE)}
    assert not unknown, unknown
    assert all(any(each in text for text in missing.values()) for each in OF_DAMAGE), "some are quoted by now"


OF_DAMAGE = (
    *("a copy here", "process run", "which file", "strided ten", "what a tens"),
    *("of entries", "latin1 tex", "holds data"),
)
"""Messages of damaged files, all of which test_checkpoint_faults damages, and of ranks that cannot share memory."""
