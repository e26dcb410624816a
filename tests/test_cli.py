"""The command `sharded-dadamw`, as a user types it."""

import importlib.util
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import save as dcp_save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.optim import AdamW

from sharded_dadamw import DecoupledAdamW
from sharded_dadamw.checkpoint import save_checkpoint
from sharded_dadamw.checkpoint.folder import Manifest
from sharded_dadamw.interchange.convert import Source, read_state, write_state
from tests.harm import Calls
from tests.test_interchange import FakeDeepSpeed

pytest.importorskip("typer")

from typer.testing import CliRunner

from sharded_dadamw.cli import app

CHECKOUT = Path(__file__).resolve().parent.parent
HYPER: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-4)


def run(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def stepped(kind: type[torch.optim.Optimizer] = DecoupledAdamW) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 3))
    optimizer = kind(model.named_parameters(), **HYPER)
    model(torch.randn(4, 6)).square().mean().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """The same state in every form that there is."""
    model, optimizer = stepped()
    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    paths = {
        "sharded_dadamw": tmp_path / "ours",
        "torch.distributed.checkpoint": tmp_path / "folder",
        "torch.save": tmp_path / "x.pt",
    }
    write_state(paths["sharded_dadamw"], state, model.state_dict())
    dcp_save({"optim": state, "model": model.state_dict()}, checkpoint_id=tmp_path / "folder", no_dist=True)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, paths["torch.save"])
    return paths


def test_diff_says_the_same_or_where_two_runs_part(tmp_path: Path) -> None:
    model, optimizer = stepped()
    save_checkpoint(tmp_path / "one", step=1, model=model, optimizer=optimizer)
    with torch.no_grad():
        model[1].bias[0] += 1
    save_checkpoint(tmp_path / "two", step=1, model=model, optimizer=optimizer)
    assert run("diff", tmp_path / "one", tmp_path / "one" / "step_00000001") == "the same"
    assert run("diff", tmp_path / "one", tmp_path / "two", code=1).startswith("step 1: param of 1.bias is ")
    assert "expected a checkpoint, a folder" in run("diff", tmp_path / "one", tmp_path / "three", code=2)


def test_inspect_of_what_is_not_ours_says_so(files: dict[str, Path], tmp_path: Path) -> None:
    for path in (files["torch.distributed.checkpoint"], files["torch.save"], tmp_path / "gone"):
        said = run("inspect", path, code=1)
        assert said == f"error: {path}: expected a complete checkpoint, got one without manifest.json"


def test_convert_knows_our_state_without_a_manifest(files: dict[str, Path], tmp_path: Path) -> None:
    (files["sharded_dadamw"] / "manifest.json").unlink()
    for path, source in zip(files.values(), (Source.TORCH, Source.COMPOSER, Source.ZERO_REDUNDANCY), strict=True):
        said = run("convert", path, tmp_path / "out", "--from", source.value, code=1)
        assert said == f"error: {path}: expected a checkpoint of {source.value}, got ours; it is from sharded-dadamw"


def test_what_looks_like_markup_is_printed_as_it_was_typed(files: dict[str, Path], tmp_path: Path) -> None:
    for name in ("run[lr=3e-4]", "run[/c]", "run:smile:"):
        said = run("convert", files["torch.save"], tmp_path / name, "--from", "sharded-dadamw")
        assert f"{tmp_path / name}: state of 4 parameters" in said
        assert str(tmp_path / name) in run("inspect", tmp_path / name)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A folder of two checkpoints with manifests, in which a weight and its state have two names."""
    model, optimizer = stepped()
    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    state["state"]["tied.weight"] = state["state"]["0.weight"]
    weights = {**model.state_dict(), "tied.weight": model[0].weight.detach()}
    for step in (9, 10):
        write_state(tmp_path / "checkpoints" / f"step_{step:08d}", state, weights)
    return tmp_path / "checkpoints"


def test_inspect_tells_what_the_manifest_says_and_compares_checksums(run_folder: Path) -> None:
    said = run("inspect", run_folder)
    assert said.startswith(f"{run_folder}/step_00000010 step 10 ranks 1 bytes ")
    assert "optimizer DecoupledAdamW written by torch " in said
    assert "checksums hold tied 0.weight, tied.weight group 0 4 parameters: lr 0.01, initial_lr 0.01, betas" in said
    assert run("inspect", run_folder.parent) == said  # of a run's folder
    assert "checksums hold" in run("inspect", run_folder / "step_00000009")
    data = run_folder / "step_00000010" / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    assert "__0_0.distcp: expected checksum" in run("inspect", run_folder, code=1)
    data.write_bytes(content[:-1])
    assert f"expected {len(content)} bytes, got {len(content) - 1}" in run("inspect", run_folder, code=1)


def test_convert_takes_the_state_of_tied_weights_once(run_folder: Path) -> None:
    said = run("convert", run_folder, run_folder / "x.pt", "--from", "sharded-dadamw")
    assert "state of 4 parameters" in said
    assert len(read_state(run_folder / "x.pt", Source.TORCH)[0]["state"]) == 4


@pytest.mark.parametrize("target", ["out", "out.pt"])
def test_convert_writes_what_the_name_says(files: dict[str, Path], target: str, tmp_path: Path) -> None:
    said = run("convert", files["torch.save"], tmp_path / target, "--from", "sharded-dadamw")
    assert "state of 4 parameters in 1 groups" in said and "decays by 0.0001 a step at the peak lr, 0.01" in said
    if target == "out.pt":
        held = torch.load(tmp_path / target)
        assert held["param_groups"][0]["weight_decay"] == pytest.approx(1e-4 / 1e-2)
        assert len(held["state"]) == 4 and held["state"][0]["step"] == 1
    else:
        state, _ = read_state(tmp_path / target, Source.OURS)
        assert state["param_groups"][0]["weight_decay"] == 1e-4
        assert len(state["state"]) == 4 and state["state"]["0.weight"]["step"] == 1


@pytest.mark.parametrize("target", ["x.pt", "link.pt", "sub/../x.pt"])
def test_convert_onto_the_file_itself_replaces_it_when_all_is_written(
    files: dict[str, Path], target: str, tmp_path: Path
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.pt").symlink_to("x.pt")
    before = torch.load(files["torch.save"])["optimizer"]["state"]
    run("convert", files["torch.save"], tmp_path / target, "--from", "sharded-dadamw")
    after = torch.load(files["torch.save"])["state"]
    assert all(torch.equal(after[key]["exp_avg"], before[key]["exp_avg"]) for key in before)
    assert (tmp_path / "link.pt").is_symlink()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("target", ["x.pt", "new.pt", "folder/x.pt", "folder/new"])
def test_a_disk_that_is_full_damages_nothing(files: dict[str, Path], target: str, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        said = run("convert", files["torch.save"], tmp_path / target, "--from", "sharded-dadamw", code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert said.startswith("error: ") and f"{tmp_path / target} " in said
    assert "cannot be written" in said or "was not written" in said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("target", ["nowhere/out.pt", "out.safetensors", "x.pt/out.pt", "x.pt/out"])
def test_a_target_that_cannot_be_written_is_one_sentence(files: dict[str, Path], target: str, tmp_path: Path) -> None:
    said = run("convert", files["torch.save"], tmp_path / target, "--from", "sharded-dadamw", code=1)
    assert said.startswith("error: ") and "Traceback" not in said


def test_convert_multiplies_torchs_decay_by_the_peak(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = stepped(AdamW)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.pt")
    for options, why in (
        (["sharded-dadamw"], "got one without its mark; it is from torch or composer"),
        *((["torch", "--peak-lr", wrong], "peak_lr: expected a finite number > 0, got") for wrong in ("0", "inf")),
    ):
        assert why in run("convert", tmp_path / "x.pt", tmp_path / "none", "--from", *options, code=1)
    run("convert", tmp_path / "x.pt", tmp_path / "a", "--from", "torch")
    run("convert", tmp_path / "x.pt", tmp_path / "b", "--from", "zero-redundancy", "--peak-lr", "0.5")
    run("convert", tmp_path / "x.pt", tmp_path / "c", "--from", "composer")
    decays = [Manifest.read(tmp_path / name).param_groups[0]["weight_decay"] for name in "abc"]
    assert decays == [pytest.approx(1e-6), pytest.approx(5e-5), 1e-4]
    assert "it is to be converted from torch" not in caplog.text
    optimizer.param_groups[0]["weight_decay"] = 0.1
    torch.save(optimizer.state_dict(), tmp_path / "y.pt")
    run("convert", tmp_path / "y.pt", tmp_path / "d", "--from", "composer")
    assert "param_groups[0] decays by 0.1 a step: if torch's AdamW wrote it, it is to be" in caplog.text


def test_convert_takes_names_and_weights_from_files_of_their_own(tmp_path: Path) -> None:
    model, _ = stepped()
    optimizer = AdamW(model.parameters(), **HYPER)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "x.pt")
    assert "names for the 4 parameters" in run("convert", tmp_path / "x.pt", tmp_path / "a", "--from", "torch", code=1)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    run("convert", tmp_path / "x.pt", tmp_path / "a", "--from", "torch", "--weights", tmp_path / "model.pt")
    (tmp_path / "names.txt").write_text("\n".join(f"module.{name}" for name, _ in model.named_parameters()))
    run("convert", tmp_path / "x.pt", tmp_path / "b", "--from", "torch", "--names", tmp_path / "names.txt")
    (one, weights), (other, nothing) = (read_state(tmp_path / name, Source.OURS) for name in "ab")
    assert weights.keys() == model.state_dict().keys() and nothing == {}
    assert one["state"].keys() == other["state"].keys() == model.state_dict().keys()


def test_a_folder_with_a_file_missing_or_cut_short_names_it(files: dict[str, Path], tmp_path: Path) -> None:
    (data,) = files["torch.distributed.checkpoint"].glob("*.distcp")
    command = ("convert", files["torch.distributed.checkpoint"], tmp_path / "y.pt", "--from", "sharded-dadamw")
    data.write_bytes(data.read_bytes()[:-2000])
    assert data.name in run(*command, code=1)
    data.unlink()
    assert f"{data.name} cannot be read" in run(*command, code=1)


def test_names_are_not_taken_from_a_file_that_sorts_them(tmp_path: Path) -> None:
    """Layers of one shape would then have each other's state."""
    safetensors = pytest.importorskip("safetensors.torch")
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(11)))
    optimizer = AdamW(model.parameters(), **HYPER)
    model(torch.randn(3, 2)).square().mean().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "x.pt")
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    command = (
        "convert",
        tmp_path / "x.pt",
        tmp_path / "a",
        "--from",
        "torch",
        "--weights",
        tmp_path / "model.safetensors",
    )
    assert "names for the 11 parameters" in run(*command, code=1)
    (tmp_path / "names.txt").write_text("\n".join(name for name, _ in model.named_parameters()))
    run(*command, "--names", tmp_path / "names.txt")
    state, weights = read_state(tmp_path / "a", Source.OURS)
    for index, (name, param) in enumerate(model.named_parameters()):
        assert torch.equal(weights[name], param)
        assert torch.equal(state["state"][name]["exp_avg"], optimizer.state_dict()["state"][index]["exp_avg"])


def test_convert_reads_deepspeed(tmp_path: Path) -> None:
    run("convert", FakeDeepSpeed(tmp_path / "ds", 2).write(), tmp_path / "out", "--from", "deepspeed")
    assert Manifest.read(tmp_path / "out").aliases == [["a.weight", "tied.weight"]]


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    torch.save({"optimizer": Calls(os.system, f"touch {tmp_path / 'marker'}")}, tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("no archive")
    (tmp_path / "text.safetensors").write_text("no header")
    others = [("text.safetensors", "safetensors")] if importlib.util.find_spec("safetensors") else []
    (tmp_path / "folder").mkdir()
    folder = ("folder", "expected a folder of torch.distributed.checkpoint, got one without .metadata")
    for name, why in (("evil.pt", "no data"), ("text.pt", "torch.save"), ("gone", "got"), folder, *others):
        said = run("convert", tmp_path / name, "--from", "torch", "out", code=1)
        assert said.startswith("error: ") and why in said and "Traceback" not in said
    assert not (tmp_path / "marker").exists()


def test_without_its_extra_the_command_says_what_to_install() -> None:
    hide = "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'typer' else f(n, *a)"
    done = subprocess.run(
        [sys.executable, "-c", f"{hide}; import sharded_dadamw.cli"], cwd=CHECKOUT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "error: sharded-dadamw needs typer; install it with: pip install 'sharded_dadamw[cli]'"
    )
