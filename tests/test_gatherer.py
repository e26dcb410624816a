"""After `attach`, `step` returns with parameters in flight, and nobody can tell but by the clock.

The control is the same optimizer without `attach`. Ranks are simulated: a gather arrives when it is waited for and not
before, so whoever reads without waiting sees what was there before the step, every time. Compiled code and threads run
on processes, whose gathers go on by themselves where they are messages.
"""

import copy
import gc
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sharded_dadamw import Exchange, ShardedDecoupledAdamW, ShardingConfig
from sharded_dadamw.comm.pending import Pending
from tests import pool
from tests.harness import ONE_EACH, SHARDED, assert_equal, everything_of, ranks, same_gradients, small, values_of
from tests.models import InOrder, whole_state_dict
from tests.simulated import started

WIDTH = 6


def build(
    model: nn.Module, group: Any, *, attached: nn.Module | bool, cap: float = ONE_EACH, **config: Any
) -> ShardedDecoupledAdamW:
    settings = ShardingConfig(bucket_cap_mb=cap, **config)
    optimizer = ShardedDecoupledAdamW(
        model.named_parameters(), lr=0.05, weight_decay=1e-4, process_group=group, config=settings
    )
    if attached:
        optimizer.attach(model if attached is True else attached)
    return optimizer


# --- models ----------------------------------------------------------------------------------------------------------


class Line(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:  # of our own, because torch compiles none of its own in place
        return F.linear(x, self.weight, self.bias)


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, 16), nn.GELU(), Line(16, 16), nn.Tanh(), nn.Linear(16, WIDTH))
        self.unused = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self):
            x = layer(x)
        return x


class First(nn.Module):
    """What another module returns first, called with the same several times."""

    def __init__(self, inner: nn.Module, num_times: int) -> None:
        super().__init__()
        self.inner, self.num_times = inner, num_times

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(*[x] * self.num_times)[0]


class Checkpointed(nn.Sequential):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__(*linears())
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        for layer in self:
            x = checkpoint(layer, x, use_reentrant=self.use_reentrant)
        return x


def parametrized() -> nn.Module:
    model = linears()
    nn.utils.parametrizations.orthogonal(model[0])
    return nn.utils.parametrizations.weight_norm(model[1]) and model


def linears(tie: bool = False) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    if tie:
        model[1].weight = model[0].weight
    return model


def encoder(**settings: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, **settings)
    return nn.TransformerEncoder(layer, 2)


def reads_elsewhere() -> nn.Module:
    """A hook reads the weights of a module that is never called."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    other = model[0].never_called = nn.Linear(WIDTH, WIDTH)
    model[0].register_forward_hook(lambda _module, _args, out: out + F.linear(out, other.weight) + other.bias)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": Mlp,
    "tied": lambda: linears(tie=True),
    "lstm": lambda: First(nn.LSTM(WIDTH, WIDTH, num_layers=2), 1),
    "attention": lambda: First(nn.MultiheadAttention(WIDTH, 2), 3),
    "encoder": encoder,
    "parametrized": parametrized,
    "checkpointed": lambda: Checkpointed(use_reentrant=False),
    "checkpointed, reentrant": lambda: Checkpointed(use_reentrant=True),
    "reads elsewhere": reads_elsewhere,
    "mlp in bf16": lambda: Mlp().bfloat16(),
    "frozen": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH).requires_grad_(False), nn.Linear(WIDTH, WIDTH)),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(3)
    return MODELS[name]()


def data_of(rank: int, step: int) -> Tensor:
    return torch.randn(4, 3, WIDTH, generator=torch.Generator().manual_seed(100 * step + rank))


def train(
    model: nn.Module, optimizer: ShardedDecoupledAdamW, rank: int, *, steps: Sequence[int], clip: bool = False
) -> list[Tensor]:
    losses = []
    dtype = next(p.dtype for p in model.parameters())
    for step in steps:
        loss = model(data_of(rank, step).to(dtype)).square().mean()
        losses.append(loss.detach())
        loss.backward()
        if clip:
            optimizer.clip_grad_norm_(0.1)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def in_flight(group: Any, **config: Any) -> tuple[Any, ShardedDecoupledAdamW]:
    """A model right after a step."""
    model = made("mlp")
    optimizer = build(model, group, attached=True, **config)
    train(model, optimizer, group.rank(), steps=[0])
    return model, optimizer


def pending(model: nn.Module) -> list[str]:
    """The names of the parameters that are in flight."""
    return [name for name, p in model.named_parameters() if type(p).__module__.startswith("sharded_dadamw")]


# --- training --------------------------------------------------------------------------------------------------------


def under_autocast(model: nn.Module, optimizer: ShardedDecoupledAdamW, rank: int) -> None:
    with torch.autocast("cpu"):
        train(model, optimizer, rank, steps=range(4))


def report(model: nn.Module, optimizer: ShardedDecoupledAdamW, rank: int) -> list[Any]:
    """Metrics are the same and wait for nothing."""
    told: list[Any] = []
    for step in range(3):
        model(data_of(rank, step)).square().mean().backward()
        optimizer.clip_grad_norm_(0.1)
        optimizer.step()
        before = pending(model)
        told += sorted(optimizer.metrics().items())
        assert pending(model) == before
        optimizer.zero_grad()
    return told


def step_twice(model: nn.Module, optimizer: ShardedDecoupledAdamW, rank: int) -> None:
    """Without a forward between."""
    for step in range(3):
        for index, param in enumerate(model.parameters()):
            param.grad = torch.full(param.shape, 0.1 * step + index + rank)
        if step == 1:
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()


def add_and_save(model: nn.Module, optimizer: ShardedDecoupledAdamW, rank: int) -> None:
    """A group is added, and state is saved and loaded, in flight."""
    more = nn.Parameter(torch.full((3, 3), 0.5))
    train(model, optimizer, rank, steps=[0])
    optimizer.add_param_group({"params": [("more", more)]})
    train(model, optimizer, rank, steps=[1])
    state = whole_state_dict(optimizer, 2)
    train(model, optimizer, rank, steps=[2])
    optimizer.load_state_dict(state)
    train(model, optimizer, rank, steps=[3])


@pytest.mark.parametrize(
    ("name", "use", "config", "num_ranks"),
    [
        *(pytest.param(name, partial(train, steps=range(3)), {}, 2, id=name) for name in MODELS),
        pytest.param("mlp", partial(train, steps=range(4), clip=True), {"cap": 1e-3}, 3, id="clipped, on three ranks"),
        pytest.param("mlp", under_autocast, {"cap": 16.0}, 2, id="autocast, one bucket"),
        pytest.param("mlp", partial(train, steps=range(4)), {"reduce_gradients": False}, 2, id="DDP"),
        *(pytest.param("mlp", use, {}, 2, id=use.__name__) for use in (report, step_twice, add_and_save)),
    ],
)
@ranks()
def test_training_is_the_same_bit_for_bit(
    group: Any, name: str, use: Callable[..., Any], config: dict[str, Any]
) -> None:
    """Parameters are left in flight by `use(model, optimizer, rank)`, and all else is as without `attach`."""
    results = []
    for attached in (False, True):
        model: Any = made(name)
        if "reduce_gradients" in config:
            model = DistributedDataParallel(model, process_group=group, find_unused_parameters=True)
        optimizer = build(model, group, attached=attached, **config)
        told = use(model, optimizer, group.rank())
        assert bool(pending(model)) == attached
        results.append([told, *everything_of(model, optimizer)])
        assert not pending(model)
    assert_equal(*results)


def _hears(model: nn.Module) -> list[Any]:
    mode = _HearsOperations()
    with mode:
        out = model(data_of(0, 5))
    return [out, [name for name in mode.heard if not name.startswith("profiler")]]


# --- ways to read ----------------------------------------------------------------------------------------------------


def _evaluated(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        return model.eval()(data_of(0, 77)).clone()


def _edited(model: Any) -> list[Tensor]:
    with torch.no_grad():
        model[0].weight.mul_(2)
        model[2].weight[1] = 7.0
        model[2].bias += 1
    return list(model.parameters())


def _averaged_by_foreach(model: nn.Module) -> list[Tensor]:
    average = [torch.ones_like(param) for param in model.parameters()]
    torch._foreach_lerp_(average, list(model.parameters()), 0.25)
    return average


def _shuffled(model: Any) -> list[Tensor]:
    torch.utils.swap_tensors(model[0].weight, other := nn.Parameter(torch.ones(16, WIDTH)))
    return [other.detach(), model[0].weight.detach(), model[2].weight.detach()]


def _per_sample(model: Any) -> list[Tensor]:
    params = dict(model.named_parameters())  # not detached: transforms get them as they are

    def loss_of(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, (x,)).square().mean()

    grads = torch.func.vmap(torch.func.grad(loss_of), in_dims=(None, 0))(params, data_of(0, 5))
    return [grads[name] for name in sorted(grads)]


class _HearsOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.heard.append(str(func))
        return func(*args, **(kwargs or {}))


READINGS: dict[str, Callable[[Any], Any]] = {
    "forward": lambda m: m(data_of(0, 5)),
    "forward of one layer": lambda m: m[2](torch.ones(16)),
    "evaluation in inference mode": _evaluated,
    "state_dict": lambda m: list(m.state_dict().values()),
    "data": lambda m: [p.data.clone() for p in m.parameters()],
    "torch.func": _per_sample,
    "under a mode for operations": _hears,
    "deepcopy": lambda m: [*copy.deepcopy(m).parameters(), copy.deepcopy(m)(data_of(0, 5))],
    "copy of a parameter": lambda m: copy.copy(m[2].weight),
    "its own class": lambda m: type(m[2].weight)(m[2].weight.data.clone()),
    "pickle": lambda m: [p.clone() for p in pickle.loads(pickle.dumps(m)).parameters()],
    "edits by hand": _edited,
    "print": lambda m: [str(m[2].weight), f"{m[4].bias}", repr(m.unused)],
    "data_ptr": lambda m: [m[2].weight.data_ptr() and m[2].weight.data.clone()],
    "operators": lambda m: torch.ops.aten.mm.default(m[2].weight, m[2].weight),
    "average of weights by foreach": _averaged_by_foreach,
    "swap_tensors": _shuffled,
    "a keyword": lambda m: F.linear(input=torch.ones(16), weight=m[2].weight, bias=m[2].bias),
    "out": lambda m: torch.mul(m.unused.data, 3, out=m.unused.data),
}


@ranks(2)
def test_evaluation_takes_the_same_fast_path(group: Any) -> None:
    """By which padding comes out as zeros."""
    results = []
    for attached in (False, True):
        torch.manual_seed(3)
        model = encoder(batch_first=True)
        optimizer = build(model, group, attached=attached)
        train(model, optimizer, group.rank(), steps=range(2))
        padding = torch.tensor([[False, False, True]] * 4)
        with torch.no_grad():
            results.append(model.eval()(data_of(0, 77), src_key_padding_mask=padding))
        assert not results[-1][padding].any(), "torch's fast path was not taken"
    assert_equal(*results)


@pytest.mark.parametrize("name", READINGS)
@ranks(2)
def test_whoever_reads_waits(group: Any, name: str) -> None:
    results = []
    for attached in (False, True):
        model = made("mlp")
        optimizer = build(model, group, attached=attached)
        train(model, optimizer, group.rank(), steps=[0])
        assert bool(pending(model)) == attached
        read = READINGS[name](model)
        results.append([read, [param.detach().clone() for param in model.parameters()]])
        assert not pending(model)
        values = read if isinstance(read, list) else [read]
        assert all(type(value) in (Tensor, nn.Parameter) for value in values if isinstance(value, Tensor))
    assert_equal(*results)


# --- who waits for what ----------------------------------------------------------------------------------------------


@ranks(2)
def test_what_reads_no_elements_does_not_wait(group: Any) -> None:
    model, optimizer = in_flight(group)
    for param in model.parameters():
        assert isinstance(param, nn.Parameter) and param.requires_grad and param.grad is None
        assert param.dtype == torch.float32 and param.is_floating_point() and param.device.type == "cpu"
        assert len({param, param}) == 1
        param.grad = torch.ones(param.shape)
        assert param.grad.sum() == param.shape.numel()
        del param.grad
    model.zero_grad()
    optimizer.zero_grad(set_to_none=False)
    optimizer.zero_grad()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    model.train()
    assert optimizer.param_groups and optimizer.state_dict()
    assert len(pending(model)) == 7


@ranks(2)
def test_each_layer_waits_for_its_own_buckets_only(group: Any) -> None:
    model, _ = in_flight(group)
    seen = []
    for layer in model:
        layer.register_forward_hook(lambda *_: seen.append(pending(model)))
    model(data_of(0, 0))
    _, *second, third, fourth = [f"{layer}.{name}" for layer in (0, 2, 4) for name in ("weight", "bias")][1:]
    last = [third, fourth]
    assert seen == [[*second, *last], [*second, *last], last, last, []]  # none is the model's own, which came first


@ranks(2, pool.on_ranks)
def test_several_threads_may_read_at_once(group: Any) -> None:
    model, _ = in_flight(group, exchange=Exchange.RANK_ORDER)
    together = threading.Barrier(8)
    sums: list[float] = []

    def read() -> None:
        together.wait()
        sums.append(sum(float(param.sum()) for param in model.parameters()))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sums) == 8 and set(sums) == {sum(float(param.sum()) for param in model.parameters())}


# --- steps, and what comes between -----------------------------------------------------------------------------------


@ranks(2)
def test_parameters_that_were_lost_cannot_be_read(group: Any) -> None:
    def fail(_: Pending) -> None:
        raise ConnectionError("the network is gone")

    model, optimizer = in_flight(group, cap=16.0)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ConnectionError, match="gone"):
        patch.setattr(Pending, "wait", fail)
        model(data_of(0, 0))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="parameters were lost"):
            model(data_of(0, 0))
    with pytest.raises(RuntimeError, match="parameters were lost"):
        optimizer.synchronize()


# --- lifetimes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("and_the_model", [False, True])
@ranks(2)
def test_deleting_the_optimizer_in_flight_finishes_it_and_the_model_goes_on(group: Any, and_the_model: bool) -> None:
    """Or nobody has it any more: then the other rank still gets what it waits for."""
    results = []
    for attached in (False, True):
        model: Any = made("mlp")
        optimizer = build(model, group, attached=attached)
        train(model, optimizer, group.rank(), steps=range(2))
        if and_the_model and group.rank() == 1:
            del optimizer, model
            gc.collect()
            continue
        assert bool(pending(model)) == attached
        if not and_the_model:
            del optimizer
            gc.collect()
            assert not pending(model)
        results.append([model(data_of(0, 1)), [param.detach().clone() for param in model.parameters()]])
    assert_equal(results[:1], results[1:])


@pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="no fork here")
@ranks(2, pool.on_ranks)
def test_a_forked_process_finds_parameters_at_rest(group: Any) -> None:
    model, _optimizer = in_flight(group, exchange=Exchange.RANK_ORDER)
    assert pending(model)
    child = os.fork()
    if child == 0:
        os._exit(1 if pending(model) else 0)
    assert os.waitpid(child, 0)[1] == 0 and not pending(model)


SCRIPT = """
import sys, time, torch, torch.distributed as dist
from sharded_dadamw import ShardedDecoupledAdamW
from sharded_dadamw.buckets.bucket import Bucket
rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
model = torch.nn.Linear(2000, 2000)
optimizer = ShardedDecoupledAdamW(model.named_parameters())
optimizer.attach(model)
update = Bucket.update_
for step in range(2):
    model(torch.ones(1, 2000)).sum().backward()
    if rank == step == 1:  # the other rank is at its end by then
        Bucket.update_ = lambda *args: (time.sleep(2), update(*args))[1]
    optimizer.step()
    optimizer.zero_grad()
raise SystemExit(3)
"""


@pytest.mark.clients
def test_a_process_may_end_in_flight() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    root = str(Path(__file__).parent.parent)
    processes = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(rank), port], cwd=root, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [3, 3], errors
    assert not any("Traceback" in text for text in errors), errors


# --- attach and remove -----------------------------------------------------------------------------------------------


@ranks(2)
def test_remove_undoes_attach_and_only_what_is_attached_is_left_in_flight(group: Any) -> None:
    model: Any = made("mlp")
    optimizer = build(model, group, attached=False)
    before = [dict(module._forward_pre_hooks) for module in model.modules()]
    handles = [optimizer.attach(model[2])]
    train(model, optimizer, group.rank(), steps=[0])
    assert pending(model) == ["2.weight", "2.bias"]
    handles.append(optimizer.attach(model[4]))
    train(model, optimizer, group.rank(), steps=[1])
    assert pending(model) == ["2.weight", "2.bias", "4.weight", "4.bias"]
    for handle in [*handles, *handles]:
        handle.remove()
    assert not pending(model)
    assert [dict(module._forward_pre_hooks) for module in model.modules()] == before
    train(model, optimizer, group.rank(), steps=[0])
    assert not pending(model)


class Own(nn.Parameter):
    pass


@same_gradients
@ranks(2)
def test_classes_of_their_own_are_left_alone(group: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].weight = Own(torch.ones(3, 3))
    loose = torch.ones(4, requires_grad=True)
    optimizer = ShardedDecoupledAdamW([*model.parameters()], process_group=group)
    optimizer.add_param_group({"params": [loose]})
    optimizer.attach(model)
    for param in (*model.parameters(), loose):
        param.grad = torch.ones(param.shape)
    optimizer.step()
    assert type(model[0].weight) is Own and not pending(model) and type(loose) is Tensor
    assert all(torch.equal(param[:1], param[-1:]) for param in (model[0].weight, loose)), "or not all has come"


@ranks(1)
def test_what_cannot_be_attached_is_refused(group: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    optimizer = ShardedDecoupledAdamW(model.parameters(), process_group=group)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        optimizer.attach(model.forward)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="this optimizer updates"):
        optimizer.attach(nn.Linear(3, 3))
    model.append(torch.jit.script(nn.Linear(3, 3)))
    with pytest.raises(TypeError, match=r"1: expected a module that runs in Python.*C\+\+"):
        optimizer.attach(model)
    assert not model[0]._forward_pre_hooks


@ranks(2)
def test_attaching_on_one_rank_alone_is_an_error_on_all(group: Any) -> None:
    model = made("mlp")
    optimizer = build(model, group, attached=group.rank() == 0)
    with pytest.raises(RuntimeError, match="number of attached models: rank 0 has 1, rank 1 has 0"):
        train(model, optimizer, group.rank(), steps=[0])


@ranks(1)
def test_one_rank_has_nothing_to_wait_for(group: Any) -> None:
    assert not pending(in_flight(group)[0])


# --- the order of reading --------------------------------------------------------------------------------------------


@ranks(2)
def test_buckets_go_out_as_they_were_registered_and_then_as_forward_reads_them_on_rank_0(group: Any) -> None:
    model = InOrder(4, (0, 1, 2, 3) if group.rank() == 1 else (2, 1, 0, 3), WIDTH, bias=False)
    optimizer = build(model, group, attached=True)
    places = {param.data_ptr(): name.split(".")[1] for name, param in model.named_parameters()}
    rounds = []
    for step in range(4):  # the order of backward is learnt in the second one, the first that overlaps
        with started(group) as calls:
            train(model, optimizer, group.rank(), steps=[step], clip=step != 1)
        gathered = [data[0][0][0].data_ptr() for what, data in calls if what == "all-gather"]
        rounds.append("".join(places.get(place, "") for place in gathered))
    assert rounds == ["0123", "0123", "2103", "2103"]


# --- torch.compile ---------------------------------------------------------------------------------------------------


@ranks(2, pool.on_ranks)
def test_a_compiled_training_step_breaks_its_graph_and_has_the_same_bits(group: Any) -> None:
    results = []
    for what in ("nothing", "all", "the step"):
        model, optimizer = small(group, gradient_residency=SHARDED)
        take_step: Any = optimizer.step if what != "the step" else torch.compile(optimizer.step, backend="aot_eager")

        def train_on(x: Tensor, model: Any = model, optimizer: Any = optimizer, take_step: Any = take_step) -> None:
            model(x).square().mean().backward()
            take_step()
            optimizer.zero_grad()

        train_on = torch.compile(train_on, backend="aot_eager") if what == "all" else train_on
        for step in range(3):
            train_on(torch.randn(5, 8, generator=torch.Generator().manual_seed(10 * step + group.rank())))
        torch.compiler.reset()
        results.append(values_of(model))
    assert_equal(results[:1] * 2, results[1:])


COMPILED: dict[str, Callable[[Any], Any]] = {
    "the whole": lambda model: torch.compile(model, backend="aot_eager"),
    "a layer": lambda model: setattr(model, "2", torch.compile(model[2], backend="aot_eager")) or model,
    "in place": lambda model: model.compile(backend="aot_eager") or model,
    "a layer in place": lambda model: model[2].compile(backend="aot_eager") or model,
    "forward": lambda model: setattr(model, "forward", torch.compile(model.forward, backend="aot_eager")) or model,
}


@pytest.mark.parametrize("how", COMPILED)
@ranks(2, pool.on_ranks)
def test_compiled_code_trains_to_the_same_bits_and_is_compiled_once(group: Any, how: str) -> None:
    results = []
    for attached in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = made("mlp")
        optimizer = build(model, group, attached=False, exchange=Exchange.RANK_ORDER)
        compiled = COMPILED[how](model)
        if attached:
            handle = optimizer.attach(compiled)
        with torch._dynamo.config.patch(error_on_recompile=True):
            losses = train(compiled, optimizer, group.rank(), steps=range(4))
            assert bool(pending(model)) == attached and not torch._dynamo.utils.counters["graph_break"]
            losses.append(compiled(data_of(0, 0)))
            assert not pending(model), "somebody has not waited"
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, torch._dynamo.utils.counters
            if attached:
                handle.remove()
                compiled(data_of(0, 0))
        results.append([*losses, *everything_of(model, optimizer)])
    assert_equal(*results)


@ranks(2)
def test_code_that_is_compiled_after_attaching_is_slower_but_right(group: Any) -> None:
    results = []
    for attached in (False, True):
        torch._dynamo.reset()
        model = made("mlp")
        optimizer = build(model, group, attached=attached)
        compiled: Any = torch.compile(model, backend="eager")
        losses = train(compiled, optimizer, group.rank(), steps=range(3))
        results.append([*losses, *everything_of(model, optimizer)])
    assert_equal(*results)
