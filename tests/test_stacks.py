"""The examples of `launch/stacks`, run with the stacks themselves: each trains and resumes like one process with AdamW.

A difference of weights is taken over the largest movement of a weight. Rounding is 2e-5 of it; a clip, a mean or a
decay that is wrong is 0.05 or more. Each stack is imported once, in a process of its own that ranks are forks of.
"""

import contextlib
import importlib
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.stacks import common
from sharded_dadamw import ShardedDecoupledAdamW
from tests import deepspeed_client, forked

pytestmark = pytest.mark.clients

STACKS = {
    "torchrun_loop": "torch",
    "transformers_trainer": "transformers",
    "transformers_fsdp2": "transformers",
    "lora_trainer": "peft",
    "accelerate_loop": "accelerate",
    "accelerate_fsdp2": "accelerate",
    "lightning_trainer": "lightning",
    "lightning_fsdp2": "lightning",
    "fabric_loop": "lightning",
    "torchtitan_fsdp2": "torchtitan",
    "olmo_core_fsdp2": "olmo_core",
    "deepspeed_loop": "deepspeed",
    "llm_foundry": "llmfoundry",
}
"""Examples, and what each needs."""
AGAIN_ON_TWO = ("transformers_trainer", "torchtitan_fsdp2", "deepspeed_loop", "llm_foundry")
"""Those that also resume on as many ranks, of whole state dicts, of a folder of shards, and of DeepSpeed's files."""
WITH_MODELS_OF_THEIR_OWN = ("transformers_trainer", "transformers_fsdp2", "lora_trainer", "llm_foundry")
LOGS_NO_NORM = "llm_foundry"
"""Composer logs norms of clipped gradients, which tests/test_composer.py compares."""
NOT_ON_ONE = "deepspeed_loop"
"""DeepSpeed's ZeRO resumes on as many ranks alone."""


class Bench:
    """Where ranks of the examples run, and what they come to."""

    def __init__(self, importer: Callable[[str], forked.Importer], folder: Path) -> None:
        self.importer, self.folder = importer, folder

    def call(self, stack: str, function: Any, *arguments: Any, names: Any = ({},), example: str = "") -> forked.Ended:
        """Call a function of this module where a stack has been imported."""
        if find_spec(stack) is None:
            pytest.skip(f"needs {stack}; docs/stacks.md says what to install")
        modules = ["tests.composer_client"] if stack == "llmfoundry" else []  # it knows what Composer's imports need
        modules += [f"launch.stacks.{example}"] if example else []
        own = {"peft": "transformers", "accelerate": "transformers"}.get(stack, stack)  # each imports the other
        late = {"transformers": ["deepspeed"], "deepspeed": deepspeed_client.MODULES}.get(
            own, []
        )  # what they import late
        modules += late if find_spec("deepspeed") else []
        where = self.folder / "logs"
        return self.importer(own).run(modules, f"{__name__}:{function.__name__}", arguments, names, where)

    def start(self, example: str, ranks: int, *options: str, change: Any = None) -> forked.Ended:
        """Run as torchrun does, without the time that torchrun takes."""
        (self.folder / "result.pt").unlink(missing_ok=True)
        arguments = (example, change, ["--folder", str(self.folder), *options])
        names = forked.names_for(ranks, TORCHELASTIC_RUN_ID="test")
        return self.call(STACKS[example], train, *arguments, names=names, example=example)

    def run(self, example: str, ranks: int, *options: str) -> Any:
        ended = self.start(example, ranks, *options)
        assert ended.codes == [0] * ranks, ended.output
        return torch.load(self.folder / "result.pt")

    def control(self, example: str) -> dict[str, Any]:
        if example not in WITH_MODELS_OF_THEIR_OWN:
            return common_control()
        path = self.folder / "control.pt"
        ended = self.call(STACKS[example], train_alone, example, path, example=example)
        assert ended.codes == [0], ended.output
        found: dict[str, Any] = torch.load(path)
        return found


@cache
def common_control() -> dict[str, Any]:
    """What one process comes to with the model, data and schedule that most examples have."""
    return common.control(common.build(), common.loss_of, 4)


@pytest.fixture(scope="module")
def importer() -> Iterator[Callable[[str], forked.Importer]]:
    with contextlib.ExitStack() as started:
        yield cache(lambda stack: started.enter_context(forked.importer()))


@pytest.fixture
def bench(importer: Callable[[str], forked.Importer], tmp_path: Path) -> Bench:
    return Bench(importer, tmp_path)


def train(example: str, change: Callable[[Any], None] | None, options: list[str]) -> None:
    module = importlib.import_module(f"launch.stacks.{example}")
    if change is not None:
        change(module)
    if example == "deepspeed_loop":
        deepspeed_client.compile_nothing()
    sys.argv = [example, *options]
    module.main()


def train_alone(example: str, path: Path) -> None:
    module = importlib.import_module(f"launch.stacks.{example}")
    factor = getattr(module, "factor", common.factor)
    torch.save(common.control(module.build(), module.loss_of, 4, factor), path)


def gap(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of weights over the largest movement; the two may name them with and without a prefix."""
    start, reached = other["start"], other["weights"]
    assert len(one["weights"]) == len(reached)
    moved = max((reached[name] - start[name]).abs().max() for name in reached)
    pairs = zip(one["weights"].values(), reached.values(), strict=True)
    return float(max((a - b).abs().max() for a, b in pairs) / moved)


@pytest.mark.parametrize("example", STACKS)
def test_it_trains_and_resumes_like_one_process_with_adamw(example: str, bench: Bench) -> None:
    whole, expected = bench.run(example, 2), bench.control(example)
    assert gap(whole, expected) < 2e-5
    assert statistics.median(expected["norms"]) > common.MAX_NORM
    if example != LOGS_NO_NORM:
        assert whole["norms"] == pytest.approx(expected["norms"], rel=1e-4)  # as logged: some stacks round them
    if example in AGAIN_ON_TWO:
        resumed = bench.run(example, 2, "--resume")
        assert all(torch.equal(weight, whole["weights"][name]) for name, weight in resumed["weights"].items())
    if example != NOT_ON_ONE:
        assert gap(bench.run(example, 1, "--resume", "--micro-batches", "4"), expected) < 2e-5


@pytest.mark.parametrize("example", ["transformers_trainer", "accelerate_loop", "lightning_trainer"])
def test_under_the_stacks_own_ddp_it_trains_alike(example: str, bench: Bench) -> None:
    assert gap(bench.run(example, 2, "--ddp"), bench.control(example)) < 2e-5


# The commonest mistake, the stack's DDP beside the default config.


def with_transformers_own_trainer(example: Any) -> None:
    own = {"_get_train_sampler": example.InOrder._get_train_sampler}
    example.InOrder = type("InOrder", (importlib.import_module("transformers").Trainer,), own)
    example.ShardingConfig = lambda **_: None


def with_fabrics_own_strategy(example: Any) -> None:
    example.ShardedStrategy = lambda: "ddp"


def test_ddp_beside_the_default_config_is_named_and_is_right_or_an_error(bench: Bench) -> None:
    trainers = bench.start("transformers_trainer", 2, "--ddp", change=with_transformers_own_trainer)
    fabrics = bench.start("fabric_loop", 2, change=with_fabrics_own_strategy)
    for said in trainers.outputs + fabrics.outputs:
        assert "DistributedDataParallel, pass ShardingConfig(reduce_gradients=False)" in said
    assert 0 not in trainers.codes  # where it saves, rank 0 alone does
    assert re.search(r"torch.save, or pickle, on state_dict\(\).*consolidate_state_dict\(\)", trainers.output)
    assert fabrics.codes == [0, 0], fabrics.output
    assert gap(torch.load(bench.folder / "result.pt"), bench.control("fabric_loop")) < 2e-5


# What stacks can be asked for and ours is not.


def refusals_of_accelerate() -> None:
    ours = importlib.import_module("sharded_dadamw.stacks.accelerate")
    accelerator = importlib.import_module("accelerate").Accelerator(cpu=True)
    model = common.build()
    model, _ = ours.prepare(accelerator, model, ShardedDecoupledAdamW(model.parameters()))
    with pytest.raises(ValueError, match="by their norm alone"):
        accelerator.clip_grad_value_(model.parameters(), 1.0)


def refusals_of_lightning() -> None:
    """Clips by value, and an optimizer that does not average where there is no DDP."""
    fabric = importlib.import_module("sharded_dadamw.stacks.fabric")
    lightning = importlib.import_module("sharded_dadamw.stacks.lightning")
    model = common.build()
    optimizer, others = ShardedDecoupledAdamW(model.parameters()), torch.optim.AdamW(common.build().parameters())
    with pytest.raises(ValueError, match="by their norm alone"):
        fabric.ShardedStrategy().clip_gradients_value(model, optimizer, 1.0)
    with pytest.raises(TypeError, match="expected ShardedDecoupledAdamW, got AdamW"):
        fabric.ShardedStrategy().setup_optimizer(others)
    precision = importlib.import_module("lightning.pytorch.plugins").Precision()
    strategy = lightning.ShardedStrategy(precision_plugin=precision)
    strategy.configure_ddp()
    with pytest.raises(ValueError, match="by their norm alone"):
        strategy.precision_plugin.clip_gradients(optimizer, 1.0, "value")
    strategy.optimizers = [others]
    lightning.DDPStrategy.setup_optimizers = lambda *_: None  # which asks a module for them
    with pytest.raises(TypeError, match="expected ShardedDecoupledAdamW, got AdamW"):
        strategy.setup_optimizers(None)


def refusals_of_torchtitan() -> None:
    """Names of other optimizers are its own business."""
    optimizers = importlib.import_module("sharded_dadamw.stacks.torchtitan").DecoupledOptimizers
    assert optimizers._resolve_optimizer_factory("AdamW") is torch.optim.AdamW
    with pytest.raises(NotImplementedError, match="Lion"):
        optimizers._resolve_optimizer_factory("Lion")


@pytest.mark.parametrize("refusals", [refusals_of_accelerate, refusals_of_lightning, refusals_of_torchtitan])
def test_what_is_not_ours_to_do_is_refused(refusals: Callable[[], None], bench: Bench) -> None:
    ended = bench.call(refusals.__name__.removeprefix("refusals_of_"), refusals)
    assert ended.codes == [0], ended.output
