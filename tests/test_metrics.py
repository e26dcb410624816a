"""What optimizers say about a step, and clipping: against the law in fp64, and as users and Composer call it.

The same numbers in every layout are in `tests/test_layouts.py`; here are plain parameters, and everything that is not a
number: keys, hooks, collectives, errors.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from sharded_dadamw import DecoupledAdamW, ShardedDecoupledAdamW, ShardingConfig
from tests.harness import ranks
from tests.layouts import (
    Control,
    Model,
    assert_close,
    fsdp2_over,
    grid,
    line,
    loss_of,
    of_parameters,
    root_sum_square,
)
from tests.models import (
    F32,
    F64,
    Groups,
    TiedLanguageModel,
    draw_gradient,
    mains_of,
    make_groups,
    mean_in_rank_order,
    named,
)
from tests.simulated import on_ranks, outcomes

pytestmark = pytest.mark.filterwarnings("ignore:gradients are the same on all ranks")  # as they are in some tests

DEFAULTS: dict[str, Any] = dict(lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=2e-4, amsgrad=False)
KINDS = ("moment", "param", "update", "grad")

Params = dict[str, nn.Parameter]


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics, which are 0-d plain tensors without a graph, as numbers."""
    for key, value in metrics.items():
        assert type(value) is Tensor and value.shape == () and not value.requires_grad, f"{key}: {value!r}"
        assert value.dtype in (F32, F64), f"{key} is {value.dtype}"
    return {key: float(value) for key, value in metrics.items()}


def build(kind: str, params: Any, group: Any = None, **options: Any) -> DecoupledAdamW:
    if kind == "unsharded":
        return DecoupledAdamW(params, **DEFAULTS | options)
    config = ShardingConfig(bucket_cap_mb=1e-3)
    return ShardedDecoupledAdamW(params, **DEFAULTS | dict(process_group=group, config=config) | options)


def assign(params: Params, gradients: Mapping[str, Tensor]) -> None:
    for name, p in params.items():
        p.grad = gradients[name].clone() if name in gradients else None


def drawn(params: Params, step: int, rank: int = 0, without: Sequence[str] = ()) -> dict[str, Tensor]:
    return {
        name: draw_gradient(p, step, rank, index)
        for index, (name, p) in enumerate(params.items())
        if p.requires_grad and name not in without
    }


both = pytest.mark.parametrize("kind", ["unsharded", "sharded"])


def small(kind: str, **options: Any) -> tuple[Params, DecoupledAdamW, Control]:
    """Three parameters in two groups, on one rank, with an optimizer and the control."""
    draw = torch.Generator().manual_seed(5)
    params = {name: nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in SHAPES.items()}
    first, *rest = params.items()
    groups: Groups = [{"params": [first], "lr": 1e-2}, {"params": rest, "weight_decay": 7e-4}]
    control = Control([{**DEFAULTS, **options, **group} for group in groups])
    for group in control.groups:
        group["initial_lr"] = group["lr"]
    return params, build(kind, groups, **options), control


SHAPES = {"weight": (37, 11), "bias": (37,), "scale": (5,)}


# --- the numbers ---


def metrics_of_steps(group: Any, kind: str, parameters: str, clip: float | None, alternating: bool) -> list[Any]:
    """Per step: metrics, the norm that clipping returned, and the mean gradients."""
    rank = 0 if group is None else group.rank()
    num_ranks = 1 if group is None else group.size()
    groups = make_groups(parameters, seed=0)
    params = named(groups)
    optimizer = build(kind, groups, group)
    happened = []
    for step in range(4):
        without = [name for index, name in enumerate(params) if alternating and (step + index) % 3 == 0]
        per_rank = [drawn(params, step, r, without) for r in range(num_ranks)]
        assign(params, per_rank[rank])
        norm = math.nan if clip is None else float(optimizer.clip_grad_norm_(clip))
        optimizer.step()
        if group is None:
            for name, gradient in per_rank[0].items():
                assert torch.equal(params[name].grad, gradient), f"{name}.grad was rewritten"  # type: ignore[arg-type]
        mean = {name: mean_in_rank_order([local[name] for local in per_rank]) for name in per_rank[0]}
        happened.append((numbers(optimizer.metrics()), norm, mean if rank == 0 else None))
        optimizer.zero_grad()
    return happened


@pytest.mark.parametrize("kind", [DecoupledAdamW, ShardedDecoupledAdamW])
@pytest.mark.parametrize("asks_before", [False, True])
def test_what_was_frozen_after_it_was_updated_counts_whenever_norms_are_asked_for(kind: Any, asks_before: bool) -> None:
    params = {name: nn.Parameter(torch.ones(4)) for name in "ab"}
    optimizer = kind(params.items())
    if asks_before:
        optimizer.metrics()
    for param in params.values():
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.zero_grad()
    params["a"].requires_grad_(False)
    params["b"].grad = torch.ones_like(params["b"])
    optimizer.step()
    assert float(optimizer.metrics()["l2_norm/moment/a"]) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("layout", "parameters", "clip", "alternating"),
    [
        ("unsharded", "tiny", None, False),
        ("unsharded", "odd sizes", 0.3, True),
        ("unsharded", "frozen", 0.3, True),
        ("unsharded", "large", 0.3, True),
        (3, "odd sizes", 0.3, True),
        (2, "several groups", 0.3, True),
        (4, "tiny", None, False),
        (2, "large", 0.3, True),
        (2, "non-contiguous", 0.3, True),
        # With main parameters: bf16 alone rounds by more than any tolerance.
        (3, "mixed dtypes", 0.3, True),
        (4, "bf16", 0.3, True),
    ],
)
def test_metrics_are_those_of_the_law(layout: Any, parameters: str, clip: float | None, alternating: bool) -> None:
    """1e-6: a few roundings to fp32, which largely cancel in a norm; 1e-9: a moment of one element, near zero."""
    if layout == "unsharded":
        runs = [metrics_of_steps(None, layout, parameters, clip, alternating)]
    else:
        runs = on_ranks(layout, metrics_of_steps, "sharded", parameters, clip, alternating)
    control = Control([{**DEFAULTS, **group} for group in mains_of(make_groups(parameters, seed=0))])
    for group in control.groups:
        group["initial_lr"] = group["lr"]
    for step, (metrics, norm, gradients) in enumerate(runs[0]):
        expected = control.step(gradients, math.inf if clip is None else clip)
        assert_close(metrics, expected, f"step {step}", atol=1e-9)
        if clip is not None:
            assert norm == pytest.approx(control.norm, rel=1e-6)
        for of_rank in runs[1:]:
            assert list(of_rank[step][0].items()) == list(metrics.items()), "other bits, or another order of keys"


@both
def test_the_update_norm_is_that_of_what_the_step_took_off_the_parameter(kind: str) -> None:
    """Measured on the parameter itself. lr is large, so that rounding the parameter does not drown the update.

    A large gradient, and then small ones: amsgrad's maximum keeps updates small.
    """
    params, optimizer, _ = small(kind, amsgrad=True)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = 0.5
    for step in range(4):
        before = {name: p.detach().double() for name, p in params.items()}
        assign(params, {name: g * (1.0 if step == 0 else 0.01) for name, g in drawn(params, 0).items()})
        optimizer.step()
        metrics = numbers(optimizer.metrics())
        for name, p in params.items():
            taken = torch.linalg.vector_norm(before[name] - p.detach().double()).item()
            assert metrics[f"l2_norm/update/{name}"] == pytest.approx(taken, rel=1e-6)


@both
def test_metrics_describe_the_step_whatever_has_changed_in_the_groups_since(kind: str) -> None:
    params, optimizer, control = small(kind)
    scheduler = LambdaLR(optimizer, lambda step: (1.0, 0.3, 0.6, 0.1)[step])
    peaks = [group["lr"] for group in control.groups]
    for step in range(3):
        for group, peak in zip(control.groups, peaks, strict=True):
            group["lr"] = peak * (1.0, 0.3, 0.6)[step]
        gradients = drawn(params, step)
        assign(params, gradients)
        optimizer.step()
        scheduler.step()
        saved = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
        for group in optimizer.param_groups:
            group.update(weight_decay=0.5, betas=(0.1, 0.2), eps=1.0, initial_lr=77.0)
        expected = control.step(gradients)
        assert_close(numbers(optimizer.metrics()), expected, f"step {step}")
        reported: dict[str, Any] = {}
        for name, p in params.items():
            optimizer.report_per_parameter_metrics(p, name, reported)
        assert_close(numbers(reported), of_parameters(expected), f"step {step}")
        for group, old in zip(optimizer.param_groups, saved, strict=True):
            group.update(old)


@both
def test_asking_for_metrics_says_the_same_each_time_and_changes_no_bit_of_training(kind: str) -> None:
    asked_params, asked, _ = small(kind, amsgrad=True)
    params, optimizer, _ = small(kind, amsgrad=True)
    for step in range(3):
        for each, of_each in ((asked_params, asked), (params, optimizer)):
            assign(each, drawn(each, step))
            of_each.step()
            if of_each is asked:
                first = numbers(asked.metrics())
                asked.report_per_parameter_metrics(each["bias"], "bias", {})
                assert list(numbers(asked.metrics()).items()) == list(first.items())
            of_each.zero_grad()
    assert all(torch.equal(p, asked_params[name]) for name, p in params.items())


@both
def test_before_the_first_step_there_are_the_parameters_and_nothing_else(kind: str) -> None:
    params, optimizer, _ = small(kind)
    metrics = numbers(optimizer.metrics())
    for name, p in params.items():
        assert metrics[f"l2_norm/param/{name}"] == pytest.approx(torch.linalg.vector_norm(p).item(), rel=1e-6)
        assert [metrics[f"l2_norm/{kind}/{name}"] for kind in ("moment", "update", "grad")] == [0, 0, 0]
    assign(params, drawn(params, 0))
    optimizer.step()
    assert list(optimizer.metrics()) == list(metrics)


@both
def test_frozen_parameters_are_left_out_and_unnamed_ones_called_by_their_place(kind: str) -> None:
    draw = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(n, generator=draw), requires_grad=n != 4) for n in (3, 4, 5)]
    optimizer = build(kind, [{"params": made[:2]}, {"params": made[2:]}])
    for p in (made[0], made[2]):
        p.grad = torch.ones_like(p)
    optimizer.step()
    names = ["param_groups[0]['params'][0]", "param_groups[1]['params'][0]"]
    keys = [f"l2_norm/{norm}/{name}" for name in [*names, "global"] for norm in KINDS]
    assert list(optimizer.metrics()) == [
        *keys,
        "effective_decay/group_0",
        "effective_decay/group_1",
        "skipped_steps",
    ]


@both
def test_a_group_added_later_is_reported_too(kind: str) -> None:
    params, optimizer, _ = small(kind)
    assign(params, drawn(params, 0))
    optimizer.step()
    optimizer.metrics()
    optimizer.zero_grad()
    late = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [("late", late)], "lr": 0.25, "weight_decay": 0.0})
    assign({**params, "late": late}, drawn({**params, "late": late}, 1))
    optimizer.step()
    metrics = numbers(optimizer.metrics())
    assert metrics["l2_norm/update/late"] > 0.1
    assert list(metrics)[-4:-1] == [f"effective_decay/group_{index}" for index in range(3)]


def test_a_copy_of_an_optimizer_has_metrics_of_its_own() -> None:
    params, optimizer, control = small("unsharded")
    model = nn.ParameterDict(params)
    assign(params, drawn(params, 0))
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    control.step(drawn(params, 0), 1.0)
    optimizer.metrics()
    optimizer.zero_grad()
    twin_model, twin = copy.deepcopy((model, optimizer))
    assign(dict(twin_model.items()), drawn(params, 1))
    twin.step()
    assert_close(numbers(twin.metrics()), control.step(drawn(params, 1)), "the copy")


# --- many elements ---


def test_the_norm_of_twenty_million_elements_is_right_to_one_in_a_million() -> None:
    """A running sum in fp32 would stop growing; the end, which fills no block, holds a large part of the norm."""
    param = nn.Parameter(torch.zeros(20_000_003))
    param.grad = torch.rand(param.shape, generator=torch.Generator().manual_seed(0)).square_()
    param.grad[-5:] = 1500.0
    expected = root_sum_square(torch.linalg.vector_norm(part.double()).item() for part in param.grad.split(1 << 20))
    assert DecoupledAdamW([param]).clip_grad_norm_(1e9).item() == pytest.approx(expected, rel=1e-6)


# --- steps that a loss scaler skips ---


@ranks(2)
def test_a_skipped_step_is_counted_and_has_an_update_of_zero(group: Any) -> None:
    """In the second of three, one rank has found an inf."""
    params = named(make_groups("odd sizes", seed=0))
    optimizer = build("sharded", params.items(), group)
    seen = []
    for step in range(3):
        assign(params, drawn(params, step, group.rank()))
        optimizer.found_inf = torch.tensor(float(step == 1 and group.rank() == group.size() - 1))
        optimizer.step()
        del optimizer.found_inf
        seen.append(numbers(optimizer.metrics()))
        optimizer.zero_grad()
    first, skipped, last = seen
    assert [metrics["skipped_steps"] for metrics in seen] == [0, 1, 1]
    for key, value in skipped.items():
        if "/update/" in key:
            assert value == 0.0 and (first[key] > 0) == (last[key] > 0), key
        elif "/param/" in key or "/moment/" in key:
            assert value == pytest.approx(first[key], rel=1e-6), key
    assert last["l2_norm/update/global"] > 0


def scaled_and_not(group: Any) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Metrics under a loss scaler, which meets an inf in step 1, and of the same steps without it."""
    scaler = ShardedGradScaler("cpu", init_scale=2.0**10, growth_interval=100, process_group=group)
    seen: list[list[dict[str, float]]] = [[], []]
    for which in (0, 1):
        params = named(make_groups("several groups", seed=0))
        optimizer = build("sharded", params.items(), group)
        for step in range(4):
            if which == 1 and step == 1:
                continue
            gradients = drawn(params, step, group.rank())
            if which == 0:
                scale = scaler.scale(torch.ones(()))
                gradients = {name: g * scale for name, g in gradients.items()}
                if step == 1 and group.rank() == 0:
                    gradients["a"][0, 0] = math.inf
            assign(params, gradients)
            if which == 0:
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            if step != 1:
                seen[which].append(numbers(optimizer.metrics()))
            optimizer.zero_grad()
    return seen[0], seen[1]


def test_under_a_loss_scaler_metrics_are_those_of_unscaled_gradients() -> None:
    """The scale is a power of two: to the bit."""
    for scaled, plain in on_ranks(2, scaled_and_not):
        assert [metrics.pop("skipped_steps") for metrics in scaled] == [0, 1, 1]
        assert [metrics.pop("skipped_steps") for metrics in plain] == [0, 0, 0]
        assert scaled == plain


# --- keys that ranks could disagree about ---


def keys_with_unused_parameters(group: Any, kind: str) -> tuple[list[str], list[str], list[str]]:
    """Keys of metrics, and through Composer's protocol, and the names of all trainable parameters."""
    model = TiedLanguageModel()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    if kind == "FSDP2":
        fully_shard(model, mesh=line(group))
    optimizer = build("unsharded" if kind == "FSDP2" else "sharded", model.named_parameters(), group)
    keys: list[list[str]] = []
    for step in range(2):
        model.loss(step + 10 * group.rank()).backward()
        optimizer.clip_grad_norm_(0.1)
        optimizer.step()
        collected: dict[str, Any] = {}
        for name, p in model.named_parameters():
            if p.grad is not None and p.requires_grad:
                collected.update(optimizer.report_per_parameter_metrics(p, name, collected))
        reduced = optimizer.dist_reduce_metrics(optimizer.pre_reduce_metrics(collected))
        keys = [list(optimizer.metrics()), list(reduced)]
        optimizer.zero_grad()
    return keys[0], keys[1], names


@pytest.mark.parametrize(("num_ranks", "kind"), [(3, "sharded"), (2, "FSDP2")])
def test_unused_frozen_and_tied_parameters_do_not_make_ranks_disagree(num_ranks: int, kind: str) -> None:
    first, *others = on_ranks(num_ranks, keys_with_unused_parameters, kind)
    assert all(other == first for other in others)
    keys, reduced, names = first
    assert keys[: 4 * len(names)] == [f"l2_norm/{norm}/{name}" for name in names for norm in KINDS]
    used = [name for name in names if not name.startswith("unused")]
    assert reduced == sorted(f"l2_norm/{norm}/{name}" for name in used for norm in KINDS)


def one_rank_reports_less(group: Any) -> tuple[dict[str, float], list[str]]:
    """FSDP1 leaves nothing of some parameters on some ranks, and those have nothing to report."""
    model = fsdp2_over(line(group), Model())
    optimizer = build("unsharded", model.named_parameters())
    loss_of(model, 0, 0, 1).backward()
    optimizer.step()
    whole = numbers(optimizer.metrics())
    collected: dict[str, Any] = {}
    for name, p in model.named_parameters():
        assert isinstance(p, DTensor)
        if p.to_local().numel():
            optimizer.report_per_parameter_metrics(p, name, collected)
    num_reported = len(collected)
    reduced = numbers(optimizer.dist_reduce_metrics(optimizer.pre_reduce_metrics(collected)))
    assert_close(reduced, dict(sorted(of_parameters(whole).items())), "reduced")
    return reduced, [str(num_reported)]


def test_what_only_some_ranks_report_is_reduced_over_those() -> None:
    (first, num_first), (second, num_second) = on_ranks(2, one_rank_reports_less)
    assert list(first.items()) == list(second.items())
    assert num_first != num_second, "one rank was to have nothing of the gain"


# --- collectives ---


@contextmanager
def counted(group: Any) -> Iterator[Counter[str]]:
    """The collectives that are started on a group of simulated ranks in here."""
    calls: Counter[str] = Counter()
    post = group._post

    def counting(what: str, *args: Any, **kwargs: Any) -> Any:
        calls[what.split(" ")[0]] += 1
        return post(what, *args, **kwargs)

    group._post = counting
    try:
        yield calls
    finally:
        del group._post


def collectives_of(group: Any, layout: str, ask: bool) -> dict[str, list[dict[str, int]]]:
    """Per call the collectives in each of three steps."""
    if layout == "FSDP2":
        model = fsdp2_over(line(group), Model())
        optimizer = build("unsharded", model.named_parameters())
    else:
        model = Model()
        optimizer = build(layout, model.named_parameters(), group)
    happened: dict[str, list[dict[str, int]]] = {}

    def count(what: str, call: Callable[[], Any]) -> None:
        with counted(group) as calls:
            call()
        happened.setdefault(what, []).append(dict(calls))

    def report() -> None:
        for name, p in model.named_parameters():
            optimizer.report_per_parameter_metrics(p, name, collected)

    for step in range(3):
        loss_of(model, step, group.rank(), group.size()).backward()
        collected: dict[str, Any] = {}
        count("clip_grad_norm_", lambda: optimizer.clip_grad_norm_(1.0))
        count("step", optimizer.step)
        if ask:
            count("report", report)
            count("pre_reduce_metrics", lambda: optimizer.pre_reduce_metrics(collected))  # noqa: B023
            count("dist_reduce_metrics", lambda: optimizer.dist_reduce_metrics(collected))  # noqa: B023
            count("metrics", optimizer.metrics)
        optimizer.zero_grad()
    return happened


ONE = {"all-reduce": 1}


@pytest.mark.parametrize("layout", ["unsharded", "FSDP2", "sharded"])
def test_one_all_reduce_for_metrics_one_for_a_norm_and_none_more_for_a_step(layout: str) -> None:
    """The first time, ranks exchange names besides."""
    asked = on_ranks(2, collectives_of, layout, True)
    not_asked = on_ranks(2, collectives_of, layout, False)
    one = {} if layout == "unsharded" else ONE
    for calls, without in zip(asked, not_asked, strict=True):
        assert calls["step"] == without["step"]
        assert calls["clip_grad_norm_"][1:] == without["clip_grad_norm_"][1:]
        assert calls["dist_reduce_metrics"][1:] == [one, one]
        assert calls["pre_reduce_metrics"][1:] == [{}, {}]
        assert calls["metrics"][1:] == [one, one]
        if layout == "sharded":
            assert calls["report"][1:] == [ONE, ONE]
            assert calls["clip_grad_norm_"][1:] == [{"all-reduce": 2}] * 2  # the norm and agreement
            assert [step["all-reduce"] for step in calls["step"]] == [1] * 3
        else:
            assert calls["report"] == [{}] * 3
            assert calls["step"] == [{}] * 3
            assert calls["clip_grad_norm_"][1:] == [one, one]


# --- Composer's protocol ---


@both
def test_a_parameter_that_was_never_updated_adds_nothing(kind: str) -> None:
    params, optimizer, _ = small(kind)
    stranger = nn.Parameter(torch.ones(3))
    metrics: dict[str, Any] = {"l2_norm/grad/other": torch.ones(())}
    for p in (params["weight"], stranger):
        assert optimizer.report_per_parameter_metrics(p, "weight", metrics) is metrics
        assert list(metrics) == ["l2_norm/grad/other"]
    assign(params, drawn(params, 0))
    optimizer.step()
    optimizer.report_per_parameter_metrics(stranger, "stranger", metrics)
    assert list(metrics) == ["l2_norm/grad/other"]
    optimizer.report_per_parameter_metrics(params["weight"], "weight", metrics)
    assert list(metrics) == ["l2_norm/grad/other", *(f"l2_norm/{norm}/weight" for norm in KINDS)]


def test_norms_that_the_caller_adds_are_squared_and_summed_with_ours() -> None:
    params, optimizer, _ = small("unsharded")
    assign(params, drawn(params, 0))
    optimizer.step()
    metrics = optimizer.report_per_parameter_metrics(params["bias"], "bias", {"l2_norm/grad/other": 3.0, "loss": 2.0})
    squares = optimizer.pre_reduce_metrics(dict(metrics))
    assert float(squares["l2_norm/grad/other"]) == 9.0 and float(squares["loss"]) == 2.0
    reduced = optimizer.dist_reduce_metrics(squares)
    assert list(reduced) == sorted(metrics)
    for key, value in metrics.items():
        assert float(reduced[key]) == pytest.approx(float(value), rel=1e-6)


@both
def test_metric_functions_say_what_each_metric_is_and_cannot_be_replaced(kind: str) -> None:
    params, optimizer, _ = small(kind)
    assign(params, drawn(params, 0))
    optimizer.step()
    assert list(optimizer.metric_functions) == [f"l2_norm/{norm}" for norm in KINDS]
    assert type(optimizer).metric_functions is optimizer.metric_functions
    found = numbers(optimizer.report_per_parameter_metrics(params["bias"], "bias", {}))
    functions = {norm: optimizer.metric_functions[f"l2_norm/{norm}"] for norm in ("moment", "param", "grad")}
    for norm, function in functions.items():
        value = float(function(params["bias"], optimizer.state[params["bias"]], torch.zeros(())))
        assert found[f"l2_norm/{norm}/bias"] == pytest.approx(value, rel=1e-6)
    with pytest.raises(AttributeError, match="metric_functions cannot be replaced"):
        optimizer.metric_functions = {}  # type: ignore[misc]
    with pytest.raises(AttributeError, match="metric_functions cannot be replaced"):
        type("Other", (type(optimizer),), {"metric_functions": {}})
    with pytest.raises(TypeError):
        optimizer.metric_functions["mean/param"] = functions["param"]  # type: ignore[index]


# --- clipping ---


@both
def test_the_norm_may_be_the_largest_element_of_all_parameters(kind: str) -> None:
    params, optimizer, control = small(kind)
    gradients = drawn(params, 0)
    assign(params, gradients)
    norm = optimizer.clip_grad_norm_(0.01, norm_type=math.inf)
    optimizer.step()
    expected = control.step(gradients, 0.01, math.inf)
    assert norm.dtype == F32 and norm.shape == ()
    assert norm.item() == pytest.approx(control.norm, rel=1e-6)
    assert_close(numbers(optimizer.metrics()), expected, "clipped")


def test_a_second_clipping_starts_from_the_first() -> None:
    params, optimizer, _ = small("unsharded")
    assign(params, drawn(params, 0))
    norm = optimizer.clip_grad_norm_(0.5)
    assert norm > 0.5, "the test wants something to clip"
    assert optimizer.clip_grad_norm_(0.2).item() == pytest.approx(0.5, rel=1e-5)
    optimizer.step()
    metrics = numbers(optimizer.metrics())
    assert metrics["l2_norm/grad/global"] == pytest.approx(0.2, rel=1e-5)


FORGET: dict[str, Callable[[Any, nn.Module], None]] = {
    "optimizer.zero_grad": lambda optimizer, model: optimizer.zero_grad(),
    "optimizer.zero_grad, in place": lambda optimizer, model: optimizer.zero_grad(set_to_none=False),
    "model.zero_grad": lambda optimizer, model: model.zero_grad(),
}


@pytest.mark.parametrize("forget", FORGET.values(), ids=FORGET)
@both
def test_a_clip_goes_with_the_gradients_it_was_made_for(kind: str, forget: Callable[[Any, nn.Module], None]) -> None:
    """Whoever drops the gradients drops the clip: the step after that is as if there had been none."""
    params, optimizer, _ = small(kind)
    plain_params, plain, _ = small(kind)
    model = nn.ParameterDict(params)
    for step in range(2):
        sum((p * drawn(params, 7)[name]).sum() for name, p in params.items()).backward()  # type: ignore[union-attr]
        optimizer.clip_grad_norm_(1e-3)
        forget(optimizer, model)
        gradients = drawn(params, step)
        sum((p * gradients[name]).sum() for name, p in params.items()).backward()  # type: ignore[union-attr]
        assign(plain_params, gradients)
        optimizer.step()
        plain.step()
        assert numbers(optimizer.metrics()) == numbers(plain.metrics())
        optimizer.zero_grad()
        plain.zero_grad()
    assert all(torch.equal(p, plain_params[name]) for name, p in params.items())


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda p: p.grad.mul_(2.0), id="scaled"),
        pytest.param(lambda p: (p * 2.0).sum().backward(), id="more backward"),
        pytest.param(lambda p: setattr(p, "grad", p.grad * 2.0), id="replaced"),
    ],
)
def test_gradients_that_change_between_clipping_and_the_step_are_an_error(
    change: Callable[[nn.Parameter], None],
) -> None:
    params, optimizer, _ = small("unsharded")
    assign(params, drawn(params, 0))
    optimizer.clip_grad_norm_(0.1)
    change(params["bias"])
    before = {name: p.detach().clone() for name, p in params.items()}
    with pytest.raises(RuntimeError, match="changed between clip_grad_norm_"):
        optimizer.step()
    with pytest.warns(UserWarning, match="clipped anew without what that clip made"):
        optimizer.clip_grad_norm_(0.1)
    assert all(torch.equal(p, before[name]) for name, p in params.items()), "nothing was to change"
    optimizer.zero_grad()
    assign(params, drawn(params, 1))
    optimizer.step()


@both
def test_a_norm_that_is_not_finite_is_an_error_if_asked_for(kind: str) -> None:
    params, optimizer, _ = small(kind)
    gradients = drawn(params, 0)
    gradients["bias"][3] = math.nan
    assign(params, gradients)
    with pytest.raises(RuntimeError, match="norm of order 2"):
        optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)
    for norm_type, expected in ((2.0, "nan"), (math.inf, "inf")):
        optimizer.zero_grad()
        assign(params, gradients)
        assert str(optimizer.clip_grad_norm_(1.0, norm_type=norm_type).item()) == expected


@both
def test_what_no_gradient_can_be_clipped_by_is_refused(kind: str) -> None:
    params, optimizer, _ = small(kind)
    assign(params, drawn(params, 0))
    with pytest.raises(ValueError, match="max_norm: expected a number >= 0"):
        optimizer.clip_grad_norm_(-1.0)
    with pytest.raises(ValueError, match="norm_type: expected 2 or inf"):
        optimizer.clip_grad_norm_(1.0, norm_type=1.0)
    optimizer.step()


# --- stages of a pipeline ---


def through_protocol(optimizer: DecoupledAdamW, params: Mapping[str, Tensor]) -> dict[str, float]:
    collected: dict[str, Any] = {}
    for name, p in params.items():
        optimizer.report_per_parameter_metrics(p, name, collected)
    return numbers(optimizer.dist_reduce_metrics(optimizer.pre_reduce_metrics(collected)))


def parameters_of_stage(which: int) -> Params:
    draw = torch.Generator().manual_seed(which)
    shapes = [(13, 5), (7,), (3, 3)][: 2 + which]
    return {f"{which}.{i}": nn.Parameter(torch.randn(shape, generator=draw)) for i, shape in enumerate(shapes)}


def stage(group: Any, kind: str) -> list[tuple[dict[str, float], float]]:
    """Each stage has parameters of its own; sharded, it is on two data-parallel ranks."""
    mesh = grid("pipeline", "dp") if kind == "sharded" else None
    which = group.rank() if mesh is None else mesh["pipeline"].get_local_rank()
    params = parameters_of_stage(which)
    optimizer = build(kind, params.items(), norm_group=group, **({} if mesh is None else {"process_group": mesh["dp"]}))
    seen = []
    for step in range(2):
        assign(params, drawn(params, step, which))  # the same on both data-parallel ranks: their mean is exact
        norm = optimizer.clip_grad_norm_(0.2)
        optimizer.step()
        seen.append((numbers(optimizer.metrics()), float(norm)))
        reduced = through_protocol(optimizer, params)
        assert_close(reduced, dict(sorted(of_parameters(seen[-1][0]).items())), f"step {step}")
        optimizer.zero_grad()
    return seen


@pytest.mark.parametrize(("kind", "num_ranks"), [("unsharded", 2), ("sharded", 4)])
def test_pipeline_stages_add_up_over_the_group_they_are_given(kind: str, num_ranks: int) -> None:
    stages = [parameters_of_stage(which) for which in (0, 1)]
    pairs = [pair for params in stages for pair in params.items()]
    control = Control([{**DEFAULTS, "params": pairs, "initial_lr": DEFAULTS["lr"]}])
    first, *others = on_ranks(num_ranks, stage, kind)
    assert all(other == first for other in others)
    for step, (metrics, norm) in enumerate(first):
        gradients = [drawn(params, step, which) for which, params in enumerate(stages)]
        assert_close(metrics, control.step({**gradients[0], **gradients[1]}, 0.2), f"step {step}")
        assert norm == pytest.approx(control.norm, rel=1e-6)


@both
@ranks(2)
def test_beside_norm_group_parameters_need_names(group: Any, kind: str) -> None:
    options = {} if kind == "unsharded" else {"process_group": group}
    with pytest.raises(ValueError, match="named_parameters"):
        build(kind, [nn.Parameter(torch.ones(3))], norm_group=group, **options)


@pytest.mark.parametrize("layout", ["sharded", "FSDP2"])
@ranks(2)
def test_one_rank_may_ask_alone_where_steps_add_up(group: Any, layout: str) -> None:
    """Also after zero_grad; it gets what all ranks get together of a twin."""
    of_twin: list[dict[str, Tensor]] = []
    for in_step in (False, True):
        model: nn.Module = fsdp2_over(line(group), Model()) if layout == "FSDP2" else Model()
        kind = "unsharded" if layout == "FSDP2" else "sharded"
        own_group = None if layout == "FSDP2" else group
        optimizer = build(kind, model.named_parameters(), own_group, metrics_in_step=in_step, max_grad_norm=0.1)
        if in_step:
            with pytest.raises(RuntimeError, match=r"expected a step\(\) before metrics\(\)"):
                optimizer.metrics()
        for step in range(3):
            loss_of(model, step, group.rank(), group.size()).backward()
            optimizer.step()
            if not in_step:
                of_twin.append(optimizer.metrics())
            optimizer.zero_grad()
            if in_step and group.rank() == 0:
                with counted(group) as calls:
                    alone, together = optimizer.metrics(), of_twin[step]
                assert not calls and list(alone) == list(together)
                assert all(torch.equal(alone[key], together[key]) for key in together)


def add_up_on_rank_0_only(group: Any) -> None:
    model = Model()
    optimizer = build("sharded", model.named_parameters(), group, metrics_in_step=group.rank() == 0)
    loss_of(model, 0, group.rank(), group.size()).backward()
    optimizer.step()


def test_ranks_that_disagree_about_it_say_so() -> None:
    for outcome in outcomes(2, add_up_on_rank_0_only):
        assert outcome.error == "RuntimeError" and "the call: rank 0 has step() with metrics_in_step" in outcome.message
