"""What optimizers say about a step, and clipping: against the law in fp64, and as users and Composer call it.

The same numbers in every layout are in `tests/test_layouts.py`; here are plain parameters, and everything that is not a
number: keys, hooks, collectives, errors.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
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
from tests.simulated import on_ranks, started

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


def through_protocol(optimizer: DecoupledAdamW, params: Mapping[str, Tensor]) -> dict[str, float]:
    collected: dict[str, Any] = {}
    for name, p in params.items():
        optimizer.report_per_parameter_metrics(p, name, collected)
    return numbers(optimizer.dist_reduce_metrics(optimizer.pre_reduce_metrics(collected)))


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


def metrics_of_steps(
    group: Any, kind: str, parameters: str, clip: tuple[float, float] | None, alternating: bool
) -> list[Any]:
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
        norm = math.nan if clip is None else float(optimizer.clip_grad_norm_(*clip))
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
    ("num_ranks", "parameters", "clip", "alternating"),
    [
        (None, "tiny", None, False),
        (None, "odd sizes", (0.3, 2.0), True),
        (None, "frozen", (0.01, math.inf), True),
        (3, "odd sizes", (0.3, 2.0), True),
        (2, "several groups", (0.01, math.inf), True),
        (4, "tiny", None, False),
        (2, "large", (0.3, 2.0), True),
        (2, "non-contiguous", (0.3, 2.0), True),
        # With main parameters: bf16 alone rounds by more than any tolerance.
        (3, "mixed dtypes", (0.3, 2.0), True),
        (4, "bf16", (0.3, 2.0), True),
    ],
)
def test_metrics_are_those_of_the_law(
    num_ranks: int | None, parameters: str, clip: tuple[float, float] | None, alternating: bool
) -> None:
    """1e-6: a few roundings to fp32, which largely cancel in a norm; 1e-9: a moment of one element, near zero."""
    if num_ranks is None:
        runs = [metrics_of_steps(None, "unsharded", parameters, clip, alternating)]
    else:
        runs = on_ranks(num_ranks, metrics_of_steps, "sharded", parameters, clip, alternating)
    control = Control([{**DEFAULTS, **group} for group in mains_of(make_groups(parameters, seed=0))])
    for group in control.groups:
        group["initial_lr"] = group["lr"]
    for step, (metrics, norm, gradients) in enumerate(runs[0]):
        expected = control.step(gradients, *clip or ())
        assert_close(metrics, expected, f"step {step}", atol=1e-9)
        if clip is not None:
            assert norm == pytest.approx(control.norm, rel=1e-6)
        for of_rank in runs[1:]:
            assert list(of_rank[step][0].items()) == list(metrics.items()), "other bits, or another order of keys"


@ranks(2)
def test_under_a_loss_scaler_metrics_are_those_of_unscaled_gradients_and_of_a_skipped_step_zero(group: Any) -> None:
    """One rank has an inf in step 1. The scale is a power of two, so that numbers are the same to the bit."""
    scaler = ShardedGradScaler("cpu", init_scale=2.0**10, growth_interval=100, process_group=group)
    seen: list[list[dict[str, float]]] = [[], []]
    for which in (0, 1):
        params = named(make_groups("several groups", seed=0))
        optimizer = build("sharded", params.items(), group)
        for step in range(4):
            gradients = drawn(params, step, group.rank())
            if which == 0:
                scale = scaler.scale(torch.ones(()))
                gradients = {name: g * scale for name, g in gradients.items()}
                if step == 1 and group.rank() == 1:
                    gradients["a"][0, 0] = math.inf
            assign(params, gradients)
            if which == 0:
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
            elif step != 1:
                optimizer.step()
            seen[which].append(numbers(optimizer.metrics()))
            optimizer.zero_grad()
    scaled, plain = seen
    assert [metrics.pop("skipped_steps") for metrics in scaled] == [0, 1, 1, 1]
    assert [metrics.pop("skipped_steps") for metrics in plain] == [0, 0, 0, 0]
    for key, value in scaled.pop(1).items():
        if "/update/" in key:
            assert value == 0.0, key
        elif "/param/" in key or "/moment/" in key:
            assert value == pytest.approx(plain[0][key], rel=1e-6), key
    del plain[1]
    assert scaled == plain


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


# --- many elements ---


def test_the_norm_of_twenty_million_elements_is_right_to_one_in_a_million() -> None:
    """A running sum in fp32 would stop growing; the end, which fills no block, holds a large part of the norm."""
    param = nn.Parameter(torch.zeros(20_000_003))
    param.grad = torch.rand(param.shape, generator=torch.Generator().manual_seed(0)).square_()
    param.grad[-5:] = 1500.0
    expected = root_sum_square(torch.linalg.vector_norm(part.double()).item() for part in param.grad.split(1 << 20))
    assert DecoupledAdamW([param]).clip_grad_norm_(1e9).item() == pytest.approx(expected, rel=1e-6)


# --- keys that ranks could disagree about ---


@pytest.mark.parametrize(("num_ranks", "kind"), [(3, "sharded"), (2, "FSDP2")])
@ranks()
def test_unused_frozen_and_tied_parameters_do_not_make_ranks_disagree(group: Any, kind: str) -> list[str]:
    """About the keys of metrics, and about those that go through Composer's protocol."""
    model = TiedLanguageModel()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    if kind == "FSDP2":
        fully_shard(model, mesh=line(group))
    optimizer = build("unsharded" if kind == "FSDP2" else "sharded", model.named_parameters(), group)
    for step in range(2):
        model.loss(step + 10 * group.rank()).backward()
        optimizer.clip_grad_norm_(0.1)
        optimizer.step()
        used = {name: p for name, p in model.named_parameters() if p.grad is not None and p.requires_grad}
        reduced, keys = through_protocol(optimizer, used), list(optimizer.metrics())
        optimizer.zero_grad()
    assert keys[: 4 * len(names)] == [f"l2_norm/{norm}/{name}" for name in names for norm in KINDS]
    reported = [name for name in names if not name.startswith("unused")]
    assert list(reduced) == sorted(f"l2_norm/{norm}/{name}" for name in reported for norm in KINDS)
    return keys


# --- collectives ---


@pytest.mark.parametrize("layout", ["unsharded", "FSDP2", "sharded"])
@ranks(2)
def test_one_all_reduce_for_metrics_one_for_a_norm_and_none_more_for_a_step(group: Any, layout: str) -> None:
    """The first time, ranks exchange names besides."""
    model = fsdp2_over(line(group), Model()) if layout == "FSDP2" else Model()
    optimizer = build("sharded" if layout == "sharded" else "unsharded", model.named_parameters(), group)
    collected: dict[str, Any] = {}
    calls: dict[str, Callable[[], Any]] = {
        "clip_grad_norm_": lambda: optimizer.clip_grad_norm_(1.0),
        "step": optimizer.step,
        "report": lambda: [
            optimizer.report_per_parameter_metrics(p, n, collected) for n, p in model.named_parameters()
        ],
        "pre_reduce_metrics": lambda: optimizer.pre_reduce_metrics(collected),
        "dist_reduce_metrics": lambda: optimizer.dist_reduce_metrics(collected),
        "metrics": optimizer.metrics,
    }
    seen: dict[str, list[dict[str, int]]] = {what: [] for what in calls}
    for step in range(3):
        loss_of(model, step, group.rank(), group.size()).backward()
        collected.clear()
        for what, call in calls.items():
            with started(group) as started_here:
                call()
            seen[what].append(dict(Counter(verb for verb, _ in started_here)))
        optimizer.zero_grad()
    one = {} if layout == "unsharded" else {"all-reduce": 1}
    assert seen["dist_reduce_metrics"][1:] == seen["metrics"][1:] == [one, one]
    assert seen["pre_reduce_metrics"][1:] == [{}, {}]
    if layout == "sharded":
        assert seen["report"][1:] == [one, one]
        assert seen["clip_grad_norm_"][1:] == [{"all-reduce": 2}] * 2  # the norm and agreement
        assert [step["all-reduce"] for step in seen["step"]] == [1] * 3
    else:
        assert seen["report"] == seen["step"] == [{}] * 3
        assert seen["clip_grad_norm_"][1:] == [one, one]


# --- Composer's protocol ---


@both
def test_norms_that_the_caller_adds_are_squared_and_summed_with_ours(kind: str) -> None:
    """A parameter that was never updated adds nothing."""
    params, optimizer, _ = small(kind)
    metrics: dict[str, Any] = {"l2_norm/grad/other": 3.0, "loss": 2.0}
    assert optimizer.report_per_parameter_metrics(params["bias"], "bias", metrics) is metrics
    assign(params, drawn(params, 0))
    optimizer.step()
    optimizer.report_per_parameter_metrics(nn.Parameter(torch.ones(3)), "stranger", metrics)
    assert list(metrics) == ["l2_norm/grad/other", "loss"]
    optimizer.report_per_parameter_metrics(params["bias"], "bias", metrics)
    squares = optimizer.pre_reduce_metrics(dict(metrics))
    assert float(squares["l2_norm/grad/other"]) == 9.0 and float(squares["loss"]) == 2.0
    reduced = optimizer.dist_reduce_metrics(squares)
    assert list(reduced) == sorted(metrics) and len(metrics) == 2 + len(KINDS)
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


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.grad.mul_(2.0),
        lambda p: (p * 2.0).sum().backward(),
        lambda p: setattr(p, "grad", p.grad * 2.0),
    ],
    ids=["scaled", "more backward", "replaced"],
)
def test_gradients_that_change_between_clipping_and_the_step_are_an_error(change: Callable[[Any], None]) -> None:
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
    optimizer.step()


@both
def test_a_norm_that_is_not_finite_is_an_error_if_asked_for(kind: str) -> None:
    params, optimizer, _ = small(kind)
    gradients = drawn(params, 0)
    for value, norm_type, said in ((math.nan, 2.0, "nan"), (math.nan, math.inf, "inf"), (math.inf, 2.0, "inf")):
        optimizer.zero_grad()
        gradients["bias"][3] = value
        assign(params, gradients)
        with pytest.raises(RuntimeError, match=f"(?s)norm of order {norm_type:g}.*{said}.*error_if_nonfinite"):
            optimizer.clip_grad_norm_(1.0, norm_type, error_if_nonfinite=True)
        assert str(optimizer.clip_grad_norm_(1.0, norm_type=norm_type).item()) == said


@both
def test_what_no_gradient_can_be_clipped_by_is_refused(kind: str) -> None:
    params, optimizer, _ = small(kind)
    assign(params, drawn(params, 0))
    for max_norm in (-1.0, math.nan):
        with pytest.raises(ValueError, match="max_norm: expected a number >= 0"):
            optimizer.clip_grad_norm_(max_norm)
    for norm_type in (1.0, 0.0):
        with pytest.raises(ValueError, match="norm_type: expected 2 or inf"):
            optimizer.clip_grad_norm_(1.0, norm_type=norm_type)
    optimizer.step()


# --- stages of a pipeline ---


def parameters_of_stage(which: int) -> Params:
    draw = torch.Generator().manual_seed(which)
    shapes = [(13, 5), (7,), (3, 3)][: 2 + which]
    return {f"{which}.{i}": nn.Parameter(torch.randn(shape, generator=draw)) for i, shape in enumerate(shapes)}


@pytest.mark.parametrize(("kind", "num_ranks"), [("unsharded", 2), ("sharded", 4)])
@ranks()
def test_pipeline_stages_add_up_over_the_group_they_are_given(group: Any, kind: str) -> list[Any]:
    """Each stage has parameters of its own; sharded, it is on two data-parallel ranks."""
    mesh = grid("pipeline", "dp") if kind == "sharded" else None
    which = group.rank() if mesh is None else mesh["pipeline"].get_local_rank()
    stages = [parameters_of_stage(number) for number in (0, 1)]
    pairs = [pair for params in stages for pair in params.items()]
    control = Control([{**DEFAULTS, "params": pairs, "initial_lr": DEFAULTS["lr"]}])
    params = stages[which]
    optimizer = build(kind, params.items(), norm_group=group, **({} if mesh is None else {"process_group": mesh["dp"]}))
    seen = []
    for step in range(2):
        gradients = [drawn(of_stage, step, number) for number, of_stage in enumerate(stages)]
        assign(params, gradients[which])  # the same on both data-parallel ranks: their mean is exact
        norm = float(optimizer.clip_grad_norm_(0.2))
        optimizer.step()
        metrics = numbers(optimizer.metrics())
        reduced = through_protocol(optimizer, params)
        assert_close(reduced, dict(sorted(of_parameters(metrics).items())), f"step {step}")
        assert_close(metrics, control.step({**gradients[0], **gradients[1]}, 0.2), f"step {step}")
        assert norm == pytest.approx(control.norm, rel=1e-6)
        optimizer.zero_grad()
        seen += [norm, metrics]
    return seen


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
                with started(group) as calls:
                    alone, together = optimizer.metrics(), of_twin[step]
                assert not calls and list(alone) == list(together)
                assert all(torch.equal(alone[key], together[key]) for key in together)
