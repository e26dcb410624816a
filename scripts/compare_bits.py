"""Train the same with two versions of the package, and name the first bit that differs.

    python scripts/compare_bits.py HEAD .                     what the working tree changes: 1, 2, 3 and 4 ranks
    python scripts/compare_bits.py main ../other --quick      1 and 2 ranks
    python scripts/compare_bits.py HEAD . --scenario hsdp --scenario remainder

OLD and NEW are folders or git refs. After every step each rank hashes what it holds: parameters, state and metrics.
Each version then loads the checkpoints that the other has saved, on another number of ranks. Scenarios use the public
API alone, so that whatever is behind it may move. The exit status is 1 if anything differs.
"""

import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch._dynamo  # imported late by optimizers: once here, and not by every rank
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
import typer
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.append(str(CHECKOUT))  # last: where ranks run, PYTHONPATH has the version that is asked for

from bench import harness  # noqa: E402 - which lies beside this file, whatever version of the package is asked for

import sharded_dadamw  # noqa: E402
from sharded_dadamw import (  # noqa: E402
    DecoupledAdamW,
    Exchange,
    GradientResidency,
    MainParameter,
    Moments,
    ShardedDecoupledAdamW,
    ShardingConfig,
    StateResidency,
)
from sharded_dadamw.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402

SAME = "same"
STEPS, STEPS_AFTER_LOADING = 20, 3
INFINITE_AT = 7  # the step in which a gradient is infinite, where that makes a step void
MESHES = {1: (1, 1), 2: (2, 1), 3: (1, 3), 4: (2, 2)}  # replicas and shards, by the number of ranks
sharded = partial(ShardingConfig, bucket_cap_mb=1e-3)  # so that there are several buckets


@dataclass(frozen=True)
class Scenario:
    """One way to train. Without a `config` it is `DecoupledAdamW`'s."""

    config: ShardingConfig | None
    dtype: torch.dtype = torch.float32
    layout: str = "plain"
    amsgrad: bool = False
    clips: bool = False
    micro_batches: int = 1
    is_attached: bool = False
    is_uneven: bool = False  # groups of their own, a frozen layer, a layer left out now and then, a scheduler
    is_saved: bool = False


REMAINDER = sharded(main_parameter=MainParameter.REMAINDER, moments=Moments.BF16)
SHARDED_GRADIENTS = sharded(gradient_residency=GradientResidency.SHARDED, exchange=Exchange.RANK_ORDER)
NARROW_WIRE = sharded(wire_dtype=torch.bfloat16, skip_nonfinite=True)
AS_PARAMETERS = sharded(main_parameter=MainParameter.NONE, moments=Moments.LIKE_PARAMETERS)
SCENARIOS = {
    "fp32": Scenario(sharded()),
    "remainder": Scenario(REMAINDER, torch.bfloat16, is_saved=True),
    "amsgrad-clip-accumulate": Scenario(sharded(), amsgrad=True, clips=True, micro_batches=2, is_saved=True),
    "sharded-gradients-attached": Scenario(SHARDED_GRADIENTS, is_attached=True, clips=True, micro_batches=2),
    "attached": Scenario(sharded(exchange=Exchange.RANK_ORDER), torch.bfloat16, is_attached=True),
    "no-overlap": Scenario(sharded(overlap=False), micro_batches=2),
    "mesh": Scenario(sharded(), layout="mesh", clips=True),
    "hsdp": Scenario(sharded(), layout="hsdp", clips=True, is_saved=True),
    "fsdp2-decoupled": Scenario(None, layout="fsdp2", clips=True, amsgrad=True, is_saved=True),
    "fsdp1-decoupled": Scenario(None, layout="fsdp1", clips=True),
    "decoupled": Scenario(None, clips=True, is_uneven=True),
    "decoupled-bf16": Scenario(None, torch.bfloat16, amsgrad=True),
    "under-ddp": Scenario(sharded(reduce_gradients=False), layout="ddp", clips=True),
    "host": Scenario(sharded(state_residency=StateResidency.HOST), torch.bfloat16, clips=True),
    "uneven": Scenario(sharded(), clips=True, is_uneven=True, is_saved=True),
    "uneven-sharded-gradients": Scenario(SHARDED_GRADIENTS, torch.bfloat16, is_uneven=True),
    "rank-order": Scenario(sharded(exchange=Exchange.RANK_ORDER)),
    "backend": Scenario(sharded(exchange=Exchange.BACKEND)),
    "narrow-wire": Scenario(NARROW_WIRE),
    "fp64": Scenario(sharded(skip_nonfinite=True), torch.float64, clips=True),
    "fp16": Scenario(sharded(moments=Moments.BF16), torch.float16, amsgrad=True),
    "as-parameters": Scenario(AS_PARAMETERS, torch.bfloat16),
}


class Model(nn.Module):
    """Layers of odd sizes, one of an even size, and an element of which most ranks hold nothing.

    Gradients come of elementwise arithmetic: a matrix product may round otherwise where memory is aligned otherwise.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(Layer(*size) for size in [(5, 7), (11, 13), (131, 67), (64, 64)])
        self.gain = nn.Parameter(torch.full((1,), 1.1))

    def forward(self, seed: int, skips: bool = False, has_infinity: bool = False) -> Tensor:
        noise = torch.Generator().manual_seed(seed)
        layers = [layer for index, layer in enumerate(self.layers) if not (skips and index == 1)]
        return self.gain.sum() * torch.stack([layer(noise, has_infinity) for layer in layers]).sum()


class Layer(nn.Linear):
    """Weight and bias are drawn towards noise."""

    def forward(self, noise: torch.Generator, has_infinity: bool) -> Tensor:
        loss = self.bias.new_zeros(())
        for param in (self.weight, self.bias):
            target = torch.randn(param.shape, generator=noise).to(param.dtype)
            if has_infinity:
                target.view(-1)[-1] = torch.inf
            loss = loss + (param - target).square().sum() / 64
        return loss


def optimizer_of(scenario: Scenario, params: Any, group: Any = None) -> Any:
    law: dict[str, Any] = {"lr": 1e-2, "weight_decay": 2e-4, "amsgrad": scenario.amsgrad}
    if scenario.config is None:
        return DecoupledAdamW(params, **law, norm_group=group)
    return ShardedDecoupledAdamW(params, **law, process_group=group, config=scenario.config)


class Training:
    """One scenario on this rank. Everything is collective."""

    def __init__(self, scenario: Scenario, seed: int = 0) -> None:
        self.scenario = scenario
        bare = Model(seed).to(scenario.dtype)
        mesh = init_device_mesh("cpu", MESHES[dist.get_world_size()], mesh_dim_names=("replicate", "shard"))
        self.model: nn.Module = bare
        if scenario.is_uneven:
            bare.layers[2].requires_grad_(False)
        if scenario.layout in ("fsdp2", "hsdp"):
            for module in (*bare.layers, bare):
                fully_shard(module, mesh=mesh if scenario.layout == "hsdp" else None)
        elif scenario.layout == "fsdp1":
            self.model = FullyShardedDataParallel(bare, use_orig_params=True, device_id=torch.device("cpu"))
        elif scenario.layout == "ddp":
            self.model = DistributedDataParallel(bare)
        self.params = dict(self.model.named_parameters())
        params: Any = self.params.items()
        if scenario.is_uneven:
            halves = [[pair for pair in params if (".weight" in pair[0]) == matrices] for matrices in (True, False)]
            own: list[dict[str, Any]] = [{"lr": 3e-2, "weight_decay": 4e-4}, {"betas": (0.8, 0.98), "eps": 1e-6}]
            params = [{"params": half, **hyper} for half, hyper in zip(halves, own, strict=True)]
        groups = {"mesh": mesh, "fsdp1": dist.group.WORLD}  # of which FSDP1's parameters tell nothing
        self.optimizer = optimizer_of(scenario, params, groups.get(scenario.layout))
        self.scheduler = CosineAnnealingLR(self.optimizer, T_max=2 * STEPS) if scenario.is_uneven else None
        if scenario.is_attached:
            self.optimizer.attach(self.model)

    def step(self, step: int) -> dict[str, str]:
        """Take a step, and hash all there is to tell of it, by name: causes before what follows from them."""
        scenario, optimizer = self.scenario, self.optimizer
        skips = scenario.is_uneven and step % 3 == 1
        is_infinite = step == INFINITE_AT and scenario.config is not None and scenario.config.skip_nonfinite
        found: dict[str, Any] = {}
        for micro_batch in range(scenario.micro_batches):
            is_last = micro_batch == scenario.micro_batches - 1
            with nullcontext() if is_last else optimizer.no_sync():
                loss = self.model(100 * step + 10 * micro_batch + dist.get_rank(), skips, is_infinite)
                loss.backward()
            found[f"loss of micro-batch {micro_batch}"] = loss
        if scenario.clips:
            found["norm before clipping"] = optimizer.clip_grad_norm_(2.0)
        optimizer.step()
        metrics = optimizer.metrics()
        if self.scheduler is not None:
            self.scheduler.step()
        optimizer.zero_grad()
        if scenario.is_attached:  # this forward has to wait for parameters that are on their way
            with torch.no_grad():
                found["loss after the step"] = self.model(step)
            optimizer.synchronize()
        return hashes({**found, **self.at_rest(), **metrics})

    def at_rest(self) -> dict[str, Any]:
        """Parameters and state that this rank holds, by name, and each group's hyperparameters."""
        found: dict[str, Any] = dict(self.params)
        for name, param in self.params.items():
            state = self.optimizer.state.get(param, {})
            if state and state["step"] > 0:  # before the first update, versions differ in whether there is any
                found.update({f"{key} of {name}": state[key] for key in sorted(state)})
        for index, group in enumerate(self.optimizer.param_groups):
            found[f"group {index}"] = [group[key] for key in ("lr", "initial_lr", "betas", "eps", "weight_decay")]
        return found

    def save(self, folder: Path) -> None:
        """Save it twice: by the package's own function, and by torch's."""
        parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        save_checkpoint(folder / "ours", step=STEPS, **parts)
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder / "stock")

    def load(self, folder: Path, *, by_torch: bool) -> None:
        """Load one of the two."""
        if not by_torch:
            load_checkpoint(folder / "ours", model=self.model, optimizer=self.optimizer, scheduler=self.scheduler)
            return
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder / "stock")
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)


def hashes(values: dict[str, Any]) -> dict[str, str]:
    return {name: hashlib.blake2b(bits_of(value), digest_size=12).hexdigest() for name, value in values.items()}


def bits_of(value: Any) -> bytes:
    """Dtype, shape and every bit of a tensor, of what this rank holds of it."""
    if not isinstance(value, Tensor):
        return repr(value).encode()
    if hasattr(value, "__tensor_flatten__"):  # a DTensor
        return b"".join(bits_of(getattr(value, part)) for part in value.__tensor_flatten__()[0])
    value = value.detach().contiguous()
    return f"{value.dtype} {tuple(value.shape)} ".encode() + value.view(-1).view(torch.uint8).numpy().tobytes()


# --- in a process per version, and in its ranks ---


@dataclass(frozen=True)
class Job:
    """What one version is to do, and the folders into which it and the other version write."""

    checkout: str
    names: list[str]
    sizes: list[int]
    results: str
    results_of_other: str


def record(job_as_json: str) -> None:
    """Do a job with the package that is imported here, in ranks that are forked from here."""
    job = Job(**json.loads(job_as_json))
    found = Path(sharded_dadamw.__file__).resolve()
    if not found.is_relative_to(job.checkout):
        raise SystemExit(f"expected the package of {job.checkout}, got {found}")
    warm_up(job)
    for work in (train, load):
        for num_ranks in job.sizes:
            with tempfile.TemporaryDirectory() as folder:
                args = (num_ranks, job, work, f"file://{folder}/rendezvous")
                mp.start_processes(run_rank, args, nprocs=num_ranks, start_method="fork")  # type: ignore[attr-defined]
        Path(job.results, work.__name__).touch()
        while not Path(job.results_of_other, work.__name__).exists():  # if the other fails, this process is ended
            time.sleep(0.1)


def warm_up(job: Job) -> None:
    """Compile once, before ranks are forked, what each of them would compile otherwise."""
    torch.set_num_threads(1)  # a process with threads cannot be forked
    for scenario in map(SCENARIOS.__getitem__, job.names):
        param = nn.Parameter(torch.zeros(64, 64, dtype=scenario.dtype))
        optimizer = optimizer_of(scenario, [param])
        param.grad = torch.zeros_like(param, dtype=param.grad_dtype)
        if scenario.clips:
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()


def run_rank(rank: int, num_ranks: int, job: Job, work: Any, rendezvous: str) -> None:
    """Do work on one rank, and write down what comes of it."""
    records: dict[str, Any] = {}
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=num_ranks)
    try:
        for name, steps in work(job, num_ranks):
            records[name] = steps
        dist.barrier()
    except Exception as error:
        error.add_note(f"on {num_ranks} ranks with {job.checkout}, {work.__name__}: after {list(records)}")
        raise
    finally:
        dist.destroy_process_group()
    Path(job.results, f"{work.__name__}-{num_ranks}-{rank}.json").write_text(json.dumps(records))


def train(job: Job, num_ranks: int) -> Iterator[tuple[str, Any]]:
    """Train in every scenario, and save where that is to be saved."""
    for name in job.names:
        training = Training(SCENARIOS[name])
        yield name, [training.step(step) for step in range(1, 1 + STEPS)]
        if SCENARIOS[name].is_saved:
            training.save(Path(job.results, name, str(num_ranks)))


def load(job: Job, num_ranks: int) -> Iterator[tuple[str, Any]]:
    """Load what the other version has saved on another number of ranks, and go on from there."""
    source = job.sizes[(job.sizes.index(num_ranks) + 1) % len(job.sizes)]
    saved = [name for name in job.names if SCENARIOS[name].is_saved]
    for name, by_torch in itertools.product(saved, (False, True)):
        training = Training(SCENARIOS[name], seed=1)
        training.load(Path(job.results_of_other, name, str(source)), by_torch=by_torch)
        loaded = hashes(training.at_rest())
        steps = range(1 + STEPS, 1 + STEPS + STEPS_AFTER_LOADING)
        yield f"{name}, loaded" + " by torch" * by_torch, [loaded, *(training.step(step) for step in steps)]


# --- in the process that was started ---


@contextmanager
def checkout_of(version: str) -> Iterator[str]:
    """A folder as it is, or a git ref in a worktree that is there meanwhile."""
    if Path(version).is_dir():
        yield str(Path(version).resolve())
        return
    with tempfile.TemporaryDirectory() as folder:
        worktree = str(Path(folder).resolve() / "worktree")
        git = ["git", "-C", str(CHECKOUT), "worktree"]
        done = subprocess.run([*git, "add", "--detach", worktree, version], capture_output=True, text=True)
        if done.returncode:
            raise typer.BadParameter(f"expected a folder or a git ref, got {version}: {done.stderr.strip()}")
        try:
            yield worktree
        finally:
            subprocess.run([*git, "remove", "--force", worktree], check=True)


def run_both(jobs: Sequence[Job]) -> None:
    """Run each version's package with the scenarios of this file, side by side; where one fails, end the other.

    Kernels are compiled afresh: numba's cache sees a change to the file that a kernel is in, and to no other.
    """
    command = [sys.executable, "-c", "import sys, compare_bits; compare_bits.record(sys.argv[1])"]
    processes = []
    try:
        for job in jobs:
            paths = os.pathsep.join([job.checkout, str(CHECKOUT / "scripts")])
            environment = {**os.environ, "PYTHONPATH": paths, "NUMBA_CACHE_DIR": f"{job.results}/numba"}
            processes.append(subprocess.Popen([*command, json.dumps(asdict(job))], cwd=job.checkout, env=environment))
        while any(process.poll() is None for process in processes):
            time.sleep(0.1)
            if failed := [job.checkout for job, process in zip(jobs, processes, strict=True) if process.poll()]:
                raise SystemExit(f"failed, as said above: {', '.join(failed)}")
    finally:
        for process in processes:
            process.kill()  # its ranks end with it
            process.wait()


def verdicts(jobs: Sequence[Job], work: str, num_ranks: int) -> dict[str, str]:
    """For each scenario whether the records are the same, or else the first step and name where they are not."""
    old, new = (
        [json.loads(Path(job.results, f"{work}-{num_ranks}-{rank}.json").read_text()) for rank in range(num_ranks)]
        for job in jobs
    )
    found = dict.fromkeys(old[0], SAME)
    for name in found:
        for step in reversed(range(len(old[0][name]))):
            pairs = [(rank, old[rank][name][step], new[rank][name][step]) for rank in range(num_ranks)]
            different = [
                f"{key}, rank {rank}" for rank, a, b in pairs for key in {**a, **b} if a.get(key) != b.get(key)
            ]
            if different:
                number = STEPS + step if work == load.__name__ else 1 + step
                found[name] = f"step {number}: {different[0]} and {len(different) - 1} more"
    return found


def main(
    old: Annotated[str, typer.Argument(help="A folder with a checkout, or a git ref.")],
    new: Annotated[str, typer.Argument(help="Another.")],
    quick: Annotated[bool, typer.Option("--quick", help="1 and 2 ranks only.")] = False,
    scenario: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
) -> None:
    """Compare every bit of parameters, state and metrics between two versions of the package."""
    if unknown := set(scenario or []) - SCENARIOS.keys():
        raise typer.BadParameter(f"expected --scenario of {', '.join(SCENARIOS)}, got {', '.join(unknown)}")
    names = list(scenario or SCENARIOS)
    sizes = [1, 2] if quick else list(MESHES)
    rows: dict[str, dict[str, str]] = {}
    with ExitStack() as stack:
        checkouts = [stack.enter_context(checkout_of(version)) for version in (old, new)]
        results = [stack.enter_context(tempfile.TemporaryDirectory()) for _ in checkouts]
        jobs = [Job(checkouts[i], names, sizes, results[i], results[1 - i]) for i in range(2)]
        run_both(jobs)
        for work, num_ranks in itertools.product((train, load), sizes):
            for name, verdict in verdicts(jobs, work.__name__, num_ranks).items():
                rows.setdefault(name, {})[f"on {num_ranks}"] = verdict
    harness.say(*harness.Report([{"scenario": name, **found} for name, found in rows.items()]).table)
    raise typer.Exit(any(verdict != SAME for found in rows.values() for verdict in found.values()))


if __name__ == "__main__":
    typer.run(main)
