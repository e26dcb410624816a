"""``DecoupledAdamW`` on a GPU: the host never waits, a step can be captured in a CUDA graph, and costs few launches."""

import copy
import gc
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR
from torch.profiler import ProfilerActivity, profile

from sharded_dadamw import DecoupledAdamW
from tests.forms import BF16, F16, F32, UNIT
from tests.gpu.probes import DEVICE, no_host_sync
from tests.models import Groups, draw_gradient, make_groups, named

NUM_STEPS = 8

SCHEDULES: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "LambdaLR": lambda o: LambdaLR(o, lambda step: 1.0 / (1 + step)),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, T_max=64),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))


def moved(groups: Groups, device: str, dtype: torch.dtype | None = None) -> Groups:
    """Copies of parameters on a device, with the strides they have."""
    return [
        {
            **group,
            "params": [
                (name, nn.Parameter(p.detach().clone().to(device, dtype), p.requires_grad))
                for name, p in group["params"]
            ],
        }
        for group in groups
    ]


def gradients_of(params: dict[str, nn.Parameter], step: int) -> dict[str, Tensor]:
    return {
        name: draw_gradient(p.detach().cpu(), step, index).to(p.device)
        for index, (name, p) in enumerate(params.items())
    }


def assign(params: dict[str, nn.Parameter], gradients: dict[str, Tensor]) -> None:
    for name, p in params.items():
        p.grad = gradients[name].clone() if name in gradients and p.requires_grad else None


def everything(optimizer: Optimizer, params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Parameters and state."""
    values = {name: p.detach() for name, p in params.items()}
    for name, p in params.items():
        values.update({f"{name}.{key}": value for key, value in optimizer.state.get(p, {}).items()})
    return values


def assert_same_bits(some: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert list(some) == list(others)
    different = [name for name in some if not torch.equal(some[name], others[name])]
    assert different == []


# --- the host ---


@dataclass(frozen=True)
class Setup:
    """What to train, and how; the defaults are the plainest."""

    parameters: str = "odd sizes"
    dtype: torch.dtype | None = None
    amsgrad: bool = False
    lr_on_device: bool = False
    some_are_missing: bool = False


@every_schedule
@pytest.mark.parametrize(
    "setup",
    [
        pytest.param(Setup(), id="fp32"),
        pytest.param(Setup(amsgrad=True), id="amsgrad"),
        pytest.param(Setup("several groups"), id="several groups"),
        pytest.param(Setup(dtype=BF16), id="bf16"),
        pytest.param(Setup(dtype=F16, amsgrad=True), id="fp16, amsgrad"),
        pytest.param(Setup("mixed dtypes"), id="mixed dtypes, fp64 among them"),
        pytest.param(Setup("non-contiguous"), id="non-contiguous"),
        pytest.param(Setup("frozen"), id="frozen"),
        pytest.param(Setup("several groups", lr_on_device=True), id="lr on the device"),
        pytest.param(Setup("several groups", some_are_missing=True), id="gradients missing now and then"),
    ],
)
def test_a_step_never_waits_for_the_device(setup: Setup, schedule: Callable[[Optimizer], LRScheduler]) -> None:
    """From the second step on; with an lr that changes, and gradients in a new place, in every one."""
    groups = moved(make_groups(setup.parameters, seed=0), DEVICE, setup.dtype)
    params = named(groups)
    if setup.lr_on_device:
        for group in groups:
            group["lr"] = torch.tensor(3e-3, device=DEVICE)
    optimizer = DecoupledAdamW(groups, lr=3e-3, amsgrad=setup.amsgrad)
    scheduler = schedule(optimizer)
    gradients = [gradients_of(params, step) for step in range(NUM_STEPS)]
    if setup.some_are_missing:
        for step, of_step in enumerate(gradients):
            for index, name in enumerate(params):
                if (step + index) % 3 == 0:
                    del of_step[name]

    def step_with(of_step: dict[str, Tensor]) -> None:
        assign(params, of_step)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    step_with(gradients[0])
    with no_host_sync():
        for of_step in gradients[1:]:
            step_with(of_step)
    torch.cuda.synchronize()


def test_a_wait_for_the_device_is_noticed() -> None:
    """Else the test above would prove nothing."""
    value = torch.ones((), device=DEVICE)
    with pytest.raises(RuntimeError, match="synchroniz"), no_host_sync():
        value.item()


def test_zero_grad_frees_the_gradients() -> None:
    """Nothing that a step has made ready for the next keeps them."""
    params = [nn.Parameter(torch.ones(size, 1024, device=DEVICE)) for size in (4096, 1, 3)]
    optimizer = DecoupledAdamW(params)

    def step() -> list[weakref.ref[Tensor]]:
        for p in params:
            p.grad = torch.ones_like(p)
        references = [weakref.ref(p.grad) for p in params if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        return references

    assert [reference() for reference in step()] == [None] * len(params)
    held = torch.cuda.memory_allocated()
    for _ in range(3):
        assert [reference() for reference in step()] == [None] * len(params)
        assert torch.cuda.memory_allocated() == held
    state = sum(value.nbytes for of_param in optimizer.state.values() for value in of_param.values())
    assert state == 2 * sum(p.nbytes for p in params) + 4 * len(params)


def test_a_step_over_ten_thousand_parameters_launches_few_kernels() -> None:
    """One for the update, one for its norms, and those of torch that count the steps: each takes 110 tensors."""
    params = [nn.Parameter(torch.ones(13, device=DEVICE)) for _ in range(10_000)]
    optimizer = DecoupledAdamW(params)
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(2):
        optimizer.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        optimizer.step()
        torch.cuda.synchronize()
    events = profiler.events()
    assert events is not None
    launched = [event.name for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    ours = [kernel for name in launched for kernel in ("_update_kernel", "_sum_kernel") if kernel in name]
    assert sorted(ours) == ["_sum_kernel", "_update_kernel"]
    assert len(launched) - len(ours) <= math.ceil(len(params) / 110), sorted(set(launched))


# --- results ---


@every_schedule
@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("parameters", ["odd sizes", "several groups", "frozen"])
def test_a_gpu_trains_as_a_cpu_does_within_rounding(
    parameters: str, amsgrad: bool, schedule: Callable[[Optimizer], LRScheduler]
) -> None:
    """Both are within ``tests/forms.py``'s bounds of the law in each step, so within twice their sum of one another.

    A gradient is at most 5 here, and an update at most 10 lr.
    """
    lr = 3e-3
    groups = make_groups(parameters, seed=0)
    runs = []
    for device in (DEVICE, "cpu"):
        here = moved(groups, device)
        params = named(here)
        optimizer = DecoupledAdamW(here, lr=lr, weight_decay=2e-4, amsgrad=amsgrad)
        scheduler = schedule(optimizer)
        for step in range(NUM_STEPS):
            assign(params, gradients_of(params, step))
            optimizer.step()
            scheduler.step()
        runs.append(everything(optimizer, params))
    ours, theirs = runs
    assert list(ours) == list(theirs)
    once = 2 * NUM_STEPS * UNIT
    for name, value in ours.items():
        rtol, atol = {
            "step": (0.0, 0.0),
            "exp_avg": (0.0, 4 * once * 5),
            "exp_avg_sq": (7 * once, 0.0),
            "max_exp_avg_sq": (7 * once, 0.0),
        }.get(name.partition(".")[2], (once, 24 * once * 10 * 1e-2))
        torch.testing.assert_close(value.cpu(), theirs[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
def test_a_learning_rate_on_the_device_trains_to_the_same_bits_as_a_number(amsgrad: bool, dtype: torch.dtype) -> None:
    """Of values that fp32 holds exactly: a tensor cannot hold others."""
    runs = []
    for lr in (2.0**-8, torch.tensor(2.0**-8, device=DEVICE)):
        groups = moved(make_groups("odd sizes", seed=0), DEVICE, dtype)
        params = named(groups)
        optimizer = DecoupledAdamW(groups, lr=lr, weight_decay=2e-4, amsgrad=amsgrad)
        scheduler = LambdaLR(optimizer, lambda step: 2.0**-step)
        for step in range(NUM_STEPS):
            assign(params, gradients_of(params, step))
            optimizer.step()
            scheduler.step()
        runs.append(everything(optimizer, params))
    assert_same_bits(*runs)


# --- CUDA graphs ---


class Graphed:
    """A model, its optimizer with an lr on the device, and one training step over a fixed batch."""

    def __init__(self, schedule: Callable[[Optimizer], LRScheduler], dtype: torch.dtype, amsgrad: bool) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(24, 65), nn.GELU(), nn.Linear(65, 3)).to(DEVICE, dtype)
        self.params = dict(self.model.named_parameters())
        self.batch = torch.zeros(32, 24, device=DEVICE, dtype=dtype)
        biases = [p for name, p in self.params.items() if name.endswith("bias")]
        weights = [p for name, p in self.params.items() if not name.endswith("bias")]
        self.optimizer = DecoupledAdamW(
            [
                {"params": weights, "lr": torch.tensor(2e-2, device=DEVICE)},
                {"params": biases, "lr": torch.tensor(1e-2, device=DEVICE), "weight_decay": 0.0},
            ],
            weight_decay=2e-4,
            amsgrad=amsgrad,
        )
        self.scheduler = schedule(self.optimizer)

    def load(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.batch.copy_(torch.randn(self.batch.shape, generator=draw).to(self.batch.dtype))

    def backward(self) -> None:
        self.optimizer.zero_grad()
        (self.model(self.batch).float() - 1).square().mean().backward()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()


class Pair:
    """Two of the same, one to train eagerly, one to train by graphs."""

    def __init__(self, schedule: Callable[[Optimizer], LRScheduler], dtype: torch.dtype, amsgrad: bool) -> None:
        self.eager, self.captured = (Graphed(schedule, dtype, amsgrad) for _ in range(2))
        self.rates: list[float] = []
        self.kept: list[list[Tensor | None]] = []

    def advance(self, num_times: int, captured_step: Callable[[], Any], *, eager_steps: int = 1) -> None:
        """Steps of both, each time on a batch and at learning rates of its own, after which they must be equal."""
        for _ in range(num_times):
            for one in (self.eager, self.captured):
                one.load(len(self.rates))
            for _ in range(eager_steps):
                self.eager.step()
            captured_step()
            self.rates.append(float(self.captured.optimizer.param_groups[0]["lr"]))
            assert len(set(self.rates)) == len(self.rates), "the learning rate was to change"
            for one in (self.eager, self.captured):
                one.scheduler.step()
            assert_same_bits(
                everything(self.captured.optimizer, self.captured.params),
                everything(self.eager.optimizer, self.eager.params),
            )

    def step_elsewhere(self) -> None:
        """A step on gradients at addresses that were never used before, and never will be again."""
        self.captured.step()
        self.kept.append([p.grad for p in self.captured.params.values()])


def on_a_side_stream(step: Callable[[], Any]) -> Callable[[], None]:
    """As torch asks for before a capture of a backward."""

    def aside() -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)

    return aside


def fill_free_memory() -> list[Tensor]:
    """Overwrites what small blocks of memory were given back, on the device and of the host's that it can read."""
    torch.cuda.synchronize()
    zeros = [torch.zeros(64, dtype=torch.int64, device=DEVICE) for _ in range(10_000)]
    for numel in (32, 64, 128, 256):
        zeros += [torch.zeros(numel, dtype=torch.int64, pin_memory=True) for _ in range(32)]
    return zeros


graphed = pytest.mark.parametrize(
    ("schedule", "dtype", "amsgrad"),
    [
        pytest.param(SCHEDULES["LambdaLR"], F32, False, id="LambdaLR, fp32"),
        pytest.param(SCHEDULES["CosineAnnealingLR"], F32, True, id="CosineAnnealingLR, fp32, amsgrad"),
        pytest.param(SCHEDULES["LambdaLR"], BF16, False, id="LambdaLR, bf16"),
        pytest.param(
            lambda o: OneCycleLR(o, max_lr=[2e-2, 1e-2], total_steps=50, cycle_momentum=False),
            F32,
            False,
            id="OneCycleLR, fp32",
        ),
    ],
)


@graphed
def test_a_captured_training_step_replays_to_the_bits_of_eager_steps_while_the_lr_changes(
    schedule: Callable[[Optimizer], LRScheduler], dtype: torch.dtype, amsgrad: bool
) -> None:
    """Forward, backward and step in one graph; between replays a scheduler writes the lr."""
    pair = Pair(schedule, dtype, amsgrad)
    pair.advance(3, on_a_side_stream(pair.captured.step))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pair.captured.step()
    pair.advance(NUM_STEPS, graph.replay)
    pair.advance(3, pair.step_elsewhere)
    filler = fill_free_memory()
    pair.advance(NUM_STEPS, graph.replay)  # does what it did, whatever was stepped on in between
    del filler


@graphed
def test_a_captured_step_alone_replays_to_the_bits_of_eager_steps_while_the_lr_changes(
    schedule: Callable[[Optimizer], LRScheduler], dtype: torch.dtype, amsgrad: bool
) -> None:
    """Gradients are computed eagerly, and copied to where the graph expects them."""
    pair = Pair(schedule, dtype, amsgrad)
    fixed = {name: torch.zeros_like(p) for name, p in pair.captured.params.items()}

    def step_in_place(step: Callable[[], Any]) -> None:
        pair.captured.backward()
        for name, p in pair.captured.params.items():
            assert p.grad is not None
            p.grad = fixed[name].copy_(p.grad)
        step()

    pair.advance(3, lambda: step_in_place(pair.captured.optimizer.step))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pair.captured.optimizer.step()
    pair.advance(NUM_STEPS, lambda: step_in_place(graph.replay))
    pair.advance(3, pair.step_elsewhere)
    filler = fill_free_memory()
    pair.advance(NUM_STEPS, lambda: step_in_place(graph.replay))
    del filler


def test_several_steps_in_one_graph_are_as_many_eager_ones() -> None:
    """Each with gradients at addresses of its own."""
    pair = Pair(SCHEDULES["LambdaLR"], F32, False)
    pair.advance(3, on_a_side_stream(pair.captured.step))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            pair.step_elsewhere()
    pair.advance(NUM_STEPS, graph.replay, eager_steps=3)


def test_several_graphs_of_one_optimizer_do_not_disturb_each_other() -> None:
    """One for each shape of batch, say."""
    pair = Pair(SCHEDULES["LambdaLR"], F32, False)
    pair.advance(3, on_a_side_stream(pair.captured.step))
    graphs = [torch.cuda.CUDAGraph() for _ in range(3)]
    for graph in graphs:
        with torch.cuda.graph(graph):
            pair.captured.step()
    filler = fill_free_memory()
    for graph in (*graphs, *graphs):
        pair.advance(2, graph.replay)
    del filler


def test_a_copied_optimizer_steps_on_its_own_parameters() -> None:
    """What was made ready for the original's memory is not taken along."""
    params = [nn.Parameter(torch.ones(100, device=DEVICE))]
    optimizer = DecoupledAdamW(params, lr=0.1)

    def step(parameters: list[nn.Parameter], one: Optimizer) -> None:
        parameters[0].grad = torch.ones_like(parameters[0])
        one.step()

    step(params, optimizer)
    other_params, other = copy.deepcopy((params, optimizer))
    before = params[0].detach().clone()
    step(other_params, other)
    assert torch.equal(params[0], before) and not torch.equal(other_params[0], before)
    step(params, optimizer)
    assert torch.equal(params[0], other_params[0])
