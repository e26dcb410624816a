"""MosaicML Composer's Trainer with our optimizers in place of its own: a client that was not written for us.

Its OptimizerMonitor asks the optimizer for the norms of every parameter at the end of a batch, when the scheduler has
moved on already. The Trainer clips and saves, and rebuilds the optimizer's groups when it wraps a model. On one rank
and on two (DistributedDataParallel, FSDP1, FSDP2) every norm must be logged that Composer's own optimizer logs, each
with the value of a single process. Composer's own logs the same, but for updates.

The ranks make all their runs in one go, and the tests look at what they left. A single process takes each batch in two
microbatches of the samples that two ranks would take: it adds up the same gradients.
"""

import importlib
import importlib.util
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sharded_dadamw import DecoupledAdamW, Moments, ShardingConfig
from sharded_dadamw.checkpoint.names import canonical_name
from sharded_dadamw.interchange import Source, from_composer, read_state
from tests import forked
from tests.test_interchange import assert_goes_on, assert_same_state

if importlib.util.find_spec("composer") is None:
    pytest.skip(
        "Composer is not installed; scripts/test.sh does it, or: pip install --no-deps mosaicml==0.32.1, "
        "and pip install -e '.[composer]'",
        allow_module_level=True,
    )

pytestmark = pytest.mark.clients

MAX_NORM = 0.5
NUM_STEPS = 6
HALF = NUM_STEPS // 2
LIKE_ONE = ["decoupled plain", "decoupled fsdp1", "decoupled fsdp2", "sharded plain"]
OURS = [*LIKE_ONE, "decoupled fsdp1 flat"]
"""The last one's parameters are other ones, whose norms are tests/test_layouts.py's."""
RANKS = (1, 2)

Results = dict[int, list[dict[str, Any]]]
Norms = dict[str, list[float]]


@pytest.fixture(scope="module")
def composer() -> Iterator[forked.Importer]:
    with forked.importer() as started:
        yield started


@pytest.fixture(scope="module")
def folder(composer: forked.Importer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `tests.composer_client.do_all` has been, on each number of ranks."""
    folder = tmp_path_factory.mktemp("composer")
    alone = {"NODE_RANK": "0"}
    names = [alone, *forked.names_for(2, **alone)]
    ended = composer.run(["tests.composer_client"], "tests.composer_client:do_all", (folder,), names, folder / "logs")
    assert ended.codes == [0] * len(names), ended.output
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    """By number of ranks, and then by rank."""
    return {n: [torch.load(folder / f"{n} ranks" / f"rank{rank}.pt") for rank in range(n)] for n in RANKS}


def without_wrappers(norms: Norms) -> Norms:
    """Each wrapper puts something of its own into the names of parameters."""
    found = {}
    for key, values in norms.items():
        _, kind, name = key.split("/")
        words = [word for word in name.split(".") if word not in ("module", "_fsdp_wrapped_module")]
        found[f"{kind} {'.'.join(words)}"] = values
    return found


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("name", OURS)
def test_all_ranks_log_all_norms_of_clipped_gradients_and_a_resumed_run_goes_on_bit_for_bit(
    results: Results, name: str, num_ranks: int
) -> None:
    """On two ranks the whole run was saved ahead of its first step too, for which torch steps with zeros at lr 0."""
    _, layout = name.split(" ", 1)
    # Composer's own fails to reduce norms of FSDP2's parameters over two ranks; they are called the same on one.
    theirs = results[1 if layout == "fsdp2" else num_ranks][0][f"composer {layout}"]["whole"]["norms"]
    first = results[num_ranks][0][name]["whole"]
    for rank in results[num_ranks]:
        whole, part = rank[name]["whole"], rank[name]["second half"]
        assert whole["norms"] == first["norms"] and whole["losses"] == first["losses"]
        assert whole["norms"].keys() == theirs.keys()
        assert {len(values) for values in whole["norms"].values()} == {NUM_STEPS}
        assert whole["norms"]["l2_norm/grad/global"] == pytest.approx([MAX_NORM] * NUM_STEPS, rel=1e-5)
        assert part["losses"] == whole["losses"][HALF:]
        assert part["norms"] == {key: values[HALF:] for key, values in whole["norms"].items()}


@pytest.mark.parametrize(
    "name, num_ranks", [("decoupled plain", 2)] + [(name, n) for name in OURS[1:-1] for n in RANKS]
)
def test_every_norm_is_the_single_processes(results: Results, name: str, num_ranks: int) -> None:
    """Under DDP bit for bit: neither the order of two halves of a batch nor dividing by two rounds."""
    alone, run = results[1][0]["decoupled plain"]["whole"], results[num_ranks][0][name]["whole"]
    expected, got = without_wrappers(alone["norms"]), without_wrappers(run["norms"])
    assert got.keys() == expected.keys()
    for key, values in expected.items():
        assert got[key] == pytest.approx(values, rel=1e-6), key
    if name == "decoupled plain":
        assert got == expected
        for before, after in zip(alone["steps"], run["steps"], strict=True):
            assert all(torch.equal(seen["after"], after[f"module.{key}"]["after"]) for key, seen in before.items())


@pytest.mark.parametrize("num_ranks", RANKS)
def test_a_checkpoint_of_composers_own_optimizer_goes_on_with_ours(results: Results, num_ranks: int) -> None:
    """By the same law, rounded otherwise. The norms of updates differ: theirs have the sign of the decay wrong."""
    theirs, ours = (results[num_ranks][0]["composer plain"][part] for part in ("whole", "second half"))
    assert ours["losses"] == pytest.approx(theirs["losses"][HALF:], rel=1e-5)
    for key, values in theirs["norms"].items():
        if "/update/" not in key:
            assert ours["norms"][key] == pytest.approx(values[HALF:], rel=1e-5), key


def test_a_checkpoint_of_composers_trainer_is_imported(folder: Path, results: Results) -> None:
    path = folder / "1 ranks" / "to import"
    state, weights = read_state(path, Source.COMPOSER)
    next_step = results[1][0]["composer plain ungrouped"]["whole"]["steps"][HALF]
    seen = {canonical_name(name): of_it for name, of_it in next_step.items()}
    saved = torch.load(path, weights_only=False)["state"]["optimizers"]["DecoupledAdamW"]
    for name, entries in saved["state"].items():
        assert all(torch.equal(state["state"][canonical_name(name)][key], value) for key, value in entries.items())
    group = state["param_groups"][0]
    assert (group["weight_decay"], group["initial_lr"]) == (1e-3, 1e-2) and group["lr"] < 1e-2
    assert weights.keys() == seen.keys() and all(torch.equal(weights[name], seen[name]["before"]) for name in seen)
    layers = nn.Sequential(nn.Linear(7, 12), nn.GELU(), nn.LayerNorm(12), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3))
    grads, after = ({name: of_it[key] for name, of_it in seen.items()} for key in ("grad", "after"))
    assert_goes_on(state, weights, grads, after, layers)
    assert_same_state(from_composer(saved), state)


def build_of_yaml() -> None:
    """Both of LLM Foundry's names, with arguments as its YAML has them; the parameters are where Composer trains."""
    composers = importlib.import_module("sharded_dadamw.stacks.composer")
    [sharded], [decoupled] = (
        entry_points(group="llmfoundry_optimizers", name=name)
        for name in ("sharded_decoupled_adamw", "decoupled_adamw_free_of_lr")
    )
    assert decoupled.load() is DecoupledAdamW and sharded.load() is composers.ShardedDecoupledAdamW
    moved: list[torch.Tensor] = []
    composers.get_device = lambda: SimpleNamespace(tensor_to_device=lambda tensor: moved.append(tensor) or tensor)
    model = nn.Linear(4, 4)
    groups = [{"params": dict(model.named_parameters()).values()}]
    config = sharded.load()(params=groups, lr=1e-3, weight_decay=1e-6, config={"moments": "bf16"}).config
    assert config == ShardingConfig(reduce_gradients=False, moments=Moments.BF16) and len(moved) == 2
    given = ShardingConfig(moments=Moments.BF16)
    assert sharded.load()(params=model.parameters(), config=given).config == given


def test_llm_foundrys_registry_finds_both_and_builds_one_of_yaml(composer: forked.Importer, tmp_path: Path) -> None:
    ended = composer.run(["tests.composer_client"], f"{__name__}:build_of_yaml", (), [{"NODE_RANK": "0"}], tmp_path)
    assert ended.codes == [0], ended.output
