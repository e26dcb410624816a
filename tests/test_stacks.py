"""The examples of `launch/stacks`, run with the stacks themselves: each trains and resumes like one process with AdamW.

A difference of weights is taken over the largest movement of a weight. Rounding is 2e-5 of it; a clip, a mean or a
decay that is wrong is 0.05 or more.
"""

import importlib
import os
import re
import socket
import statistics
import subprocess
import sys
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.stacks import common
from sharded_dadamw import DecoupledAdamW, Moments, ShardedDecoupledAdamW

pytestmark = pytest.mark.clients

CHECKOUT = Path(__file__).resolve().parent.parent
STACKS = {
    "torchrun_loop": "torch",
    "transformers_trainer": "transformers",
    "transformers_fsdp2": "transformers",
    "lora_trainer": "peft",
    "accelerate_loop": "accelerate",
    "accelerate_fsdp2": "accelerate",
    "lightning_trainer": "lightning",
    "fabric_loop": "lightning",
    "torchtitan_fsdp2": "torchtitan",
    "olmo_core_fsdp2": "olmo_core",
    "deepspeed_loop": "deepspeed",
}
"""Examples, and what each needs."""
AGAIN_ON_TWO = ("transformers_trainer", "torchtitan_fsdp2", "deepspeed_loop")
"""Those that also resume on as many ranks, of whole state dicts, of a folder of shards, and of DeepSpeed's files."""
NOT_ON_ONE = "deepspeed_loop"
"""DeepSpeed's ZeRO resumes on as many ranks alone."""
UNDER_DDP = ("transformers_trainer", "lightning_trainer")
STILL_UNDER_DDP = {
    "transformers_trainer": (
        "from transformers import Trainer\n"
        "own = {'_get_train_sampler': example.InOrder._get_train_sampler}\n"
        "example.InOrder = type('InOrder', (Trainer,), own)\n"
        "example.ShardingConfig = lambda **_: None",
        r"torch.save, or pickle, on state_dict\(\).*consolidate_state_dict\(\)",
    ),
    "fabric_loop": ("example.ShardedStrategy = lambda: 'ddp'", None),
}
"""What makes of an example the commonest mistake, the stack's DDP beside the default config; and how that ends."""


def start(example: str, folder: Path, ranks: int, *options: str, change: str = "") -> tuple[list[int], list[str]]:
    """Run as torchrun does, without the time that torchrun takes; returns each rank's exit code and what it printed."""
    pytest.importorskip(STACKS[example], reason=f"pip install {STACKS[example]}")
    (folder / "result.pt").unlink(missing_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    of_all = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    of_all |= {"MASTER_PORT": str(port), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    of_all |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    program = f"from launch.stacks import {example} as example\n{change}\nexample.main()"
    command = [sys.executable, "-c", program, "--folder", str(folder), *options]
    logs = [folder / f"rank {rank}.log" for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        environment = os.environ | of_all | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("w") as file:
            processes.append(subprocess.Popen(command, cwd=CHECKOUT, env=environment, stdout=file, stderr=file))
    try:
        codes = [process.wait(240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return codes, [log.read_text() for log in logs]


def run(example: str, folder: Path, ranks: int, *options: str) -> Any:
    codes, logs = start(example, folder, ranks, *options)
    assert codes == [0] * ranks, "".join(logs)
    return torch.load(folder / "result.pt")


@cache
def control(example: str) -> dict[str, Any]:
    module = importlib.import_module(f"launch.stacks.{example}")
    return common.control(module.build(), module.loss_of, 4)


def gap(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of weights over the largest movement; the two may name them with and without a prefix."""
    start, reached = other["start"], other["weights"]
    assert len(one["weights"]) == len(reached)
    moved = max((reached[name] - start[name]).abs().max() for name in reached)
    pairs = zip(one["weights"].values(), reached.values(), strict=True)
    return float(max((a - b).abs().max() for a, b in pairs) / moved)


@pytest.mark.parametrize("example", STACKS)
def test_it_trains_and_resumes_like_one_process_with_adamw(example: str, tmp_path: Path) -> None:
    whole = run(example, tmp_path, 2)
    expected = control(example)
    assert gap(whole, expected) < 2e-5
    assert whole["norms"] == pytest.approx(expected["norms"], rel=1e-4)  # as logged: some stacks round them
    assert statistics.median(whole["norms"]) > common.MAX_NORM
    if example in AGAIN_ON_TWO:
        resumed = run(example, tmp_path, 2, "--resume")
        assert all(torch.equal(weight, whole["weights"][name]) for name, weight in resumed["weights"].items())
    if example == NOT_ON_ONE:
        return
    alone = run(example, tmp_path, 1, "--resume", "--micro-batches", "4")
    assert gap(alone, expected) < 2e-5


@pytest.mark.parametrize("example", UNDER_DDP)
def test_under_the_stacks_own_ddp_it_trains_alike(example: str, tmp_path: Path) -> None:
    assert gap(run(example, tmp_path, 2, "--ddp"), control(example)) < 2e-5


@pytest.mark.parametrize("example", STILL_UNDER_DDP)
def test_ddp_beside_the_default_config_is_named_and_is_right_or_an_error(example: str, tmp_path: Path) -> None:
    change, error = STILL_UNDER_DDP[example]
    options = ["--ddp"] if example == "transformers_trainer" else []
    codes, logs = start(example, tmp_path, 2, *options, change=change)
    assert all("DistributedDataParallel, pass ShardingConfig(reduce_gradients=False)" in log for log in logs)
    if error is None:
        assert codes == [0, 0], "".join(logs)
        assert gap(torch.load(tmp_path / "result.pt"), control(example)) < 2e-5
    else:
        assert 0 not in codes
        assert any(re.search(error, log) for log in logs), "".join(logs)  # where it saves, rank 0 alone does


def test_a_clip_by_value_is_refused() -> None:
    accelerate = pytest.importorskip("accelerate")
    fabric = pytest.importorskip("sharded_dadamw.stacks.fabric", exc_type=ImportError)
    lightning = importlib.import_module("sharded_dadamw.stacks.lightning")
    precision = importlib.import_module("lightning.pytorch.plugins").Precision()
    ours = importlib.import_module("sharded_dadamw.stacks.accelerate")
    model = common.build()
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = ours.prepare(accelerator, model, ShardedDecoupledAdamW(model.parameters()))
    with pytest.raises(ValueError, match="by their norm alone"):
        accelerator.clip_grad_value_(model.parameters(), 1.0)
    with pytest.raises(ValueError, match="by their norm alone"):
        fabric.ShardedStrategy().clip_gradients_value(model, optimizer, 1.0)
    strategy = lightning.ShardedStrategy(precision_plugin=precision)
    strategy.configure_ddp()
    with pytest.raises(ValueError, match="by their norm alone"):
        strategy.precision_plugin.clip_gradients(optimizer, 1.0, "value")


def test_a_strategy_without_ddp_refuses_an_optimizer_that_does_not_average(monkeypatch: pytest.MonkeyPatch) -> None:
    fabric = pytest.importorskip("sharded_dadamw.stacks.fabric", exc_type=ImportError)
    lightning = importlib.import_module("sharded_dadamw.stacks.lightning")
    optimizer = torch.optim.AdamW(common.build().parameters())
    with pytest.raises(TypeError, match="expected ShardedDecoupledAdamW, got AdamW"):
        fabric.ShardedStrategy().setup_optimizer(optimizer)
    strategy = lightning.ShardedStrategy()
    strategy.optimizers = [optimizer]
    monkeypatch.setattr(lightning.DDPStrategy, "setup_optimizers", lambda *_: None)  # which asks a module for them
    with pytest.raises(TypeError, match="expected ShardedDecoupledAdamW, got AdamW"):
        strategy.setup_optimizers(None)


def test_names_of_other_optimizers_are_torchtitans_business() -> None:
    module = pytest.importorskip("sharded_dadamw.stacks.torchtitan", exc_type=ImportError)
    assert module.DecoupledOptimizers._resolve_optimizer_factory("AdamW") is torch.optim.AdamW
    with pytest.raises(NotImplementedError, match="Lion"):
        module.DecoupledOptimizers._resolve_optimizer_factory("Lion")


def test_llm_foundrys_registry_finds_both_and_builds_one_of_yaml() -> None:
    [entry] = entry_points(group="llmfoundry_optimizers", name="sharded_decoupled_adamw")
    settings = {"lr": 1e-3, "weight_decay": 1e-6, "config": {"moments": "bf16", "reduce_gradients": False}}
    assert entry.load()(params=common.build().parameters(), **settings).config.moments is Moments.BF16
    [entry] = entry_points(group="llmfoundry_optimizers", name="decoupled_adamw_free_of_lr")
    assert entry.load() is DecoupledAdamW
