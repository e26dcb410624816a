"""The command `sharded-dadamw`, as a user types it."""

import importlib
import importlib.util
import json
import os
import resource
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
from tests import test_interchange
from tests.harm import Calls

pytest.importorskip("typer")

from typer.testing import CliRunner

from sharded_dadamw.cli import app, commands


def run(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def convert(path: Path, target: object, source: str = "sharded-dadamw", *options: object, code: int = 0) -> str:
    return run("convert", path, target, "--from", source, *options, code=code)


def stepped(kind: Any = DecoupledAdamW) -> tuple[nn.Module, Any]:
    return test_interchange.stepped(kind, weight_decay=1e-4)


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
        model[3].bias[0] += 1
    save_checkpoint(tmp_path / "two", step=1, model=model, optimizer=optimizer)
    assert run("diff", tmp_path / "one", tmp_path / "one" / "step_00000001") == "the same"
    assert run("diff", tmp_path / "one", tmp_path / "two", code=1).startswith("step 1: param of 3.bias is ")
    assert "expected a checkpoint, a folder" in run("diff", tmp_path / "one", tmp_path / "three", code=2)


def test_inspect_of_what_is_not_ours_says_so(files: dict[str, Path], tmp_path: Path) -> None:
    for path in (files["torch.distributed.checkpoint"], files["torch.save"], tmp_path / "gone"):
        said = run("inspect", path, code=1)
        got = "one without manifest.json" if path.is_dir() else "no folder"
        assert said == f"error: {path}: expected a complete checkpoint, got {got}"


def test_convert_knows_our_state_without_a_manifest(files: dict[str, Path], tmp_path: Path) -> None:
    (files["sharded_dadamw"] / "manifest.json").unlink()
    for path, source in zip(files.values(), (Source.TORCH, Source.COMPOSER, Source.ZERO_REDUNDANCY), strict=True):
        said = convert(path, tmp_path / "out", source.value, code=1)
        assert said == f"error: {path}: expected a checkpoint of {source.value}, got ours; it is from sharded-dadamw"


def test_what_looks_like_markup_is_printed_as_it_was_typed(files: dict[str, Path], tmp_path: Path) -> None:
    for name in ("run[lr=3e-4]", "run[/c]", "run:smile:"):
        assert f"{tmp_path / name}: state of 6 parameters" in convert(files["torch.save"], tmp_path / name)
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
    assert "checksums hold tied 0.weight, tied.weight group 0 6 parameters: lr 0.01, initial_lr 0.01, betas" in said
    assert run("inspect", run_folder.parent) == said  # of a run's folder
    assert "checksums hold" in run("inspect", run_folder / "step_00000009")
    assert "state of 6 parameters" in convert(run_folder, run_folder / "x.pt")  # of tied weights once
    assert len(read_state(run_folder / "x.pt", Source.TORCH)[0]["state"]) == 6
    data = run_folder / "step_00000010" / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    assert "__0_0.distcp: expected checksum" in run("inspect", run_folder, code=1)
    data.write_bytes(content[:-1])
    assert f"expected {len(content)} bytes, got {len(content) - 1}" in run("inspect", run_folder, code=1)


@pytest.mark.parametrize("target", ["out", "out.pt"])
def test_convert_writes_what_the_name_says(files: dict[str, Path], target: str, tmp_path: Path) -> None:
    said = convert(files["torch.save"], tmp_path / target)
    assert "state of 6 parameters in 1 groups" in said and "decays by 0.0001 a step at the peak lr, 0.01" in said
    if target == "out.pt":
        held = torch.load(tmp_path / target)
        assert held["param_groups"][0]["weight_decay"] == pytest.approx(1e-4 / 1e-2)
        assert len(held["state"]) == 6 and held["state"][0]["step"] == 3
    else:
        state, _ = read_state(tmp_path / target, Source.OURS)
        assert state["param_groups"][0]["weight_decay"] == 1e-4
        assert len(state["state"]) == 6 and state["state"]["0.weight"]["step"] == 3


@pytest.mark.parametrize("target", ["x.pt", "link.pt", "sub/../x.pt"])
def test_convert_onto_the_file_itself_replaces_it_when_all_is_written(
    files: dict[str, Path], target: str, tmp_path: Path
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.pt").symlink_to("x.pt")
    before = torch.load(files["torch.save"])["optimizer"]["state"]
    convert(files["torch.save"], tmp_path / target)
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
        said = convert(files["torch.save"], tmp_path / target, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert said.startswith("error: ") and f"{tmp_path / target} " in said
    assert "cannot be written" in said or "was not written" in said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("target", ["nowhere/out.pt", "out.safetensors", "x.pt/out.pt", "x.pt/out"])
def test_a_target_that_cannot_be_written_is_one_sentence(files: dict[str, Path], target: str, tmp_path: Path) -> None:
    assert convert(files["torch.save"], tmp_path / target, code=1).startswith("error: ")


def test_convert_multiplies_torchs_decay_by_the_peak(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = stepped(AdamW)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.pt")
    for options, why in (
        (["sharded-dadamw"], "got one without its mark; it is from torch or composer"),
        *((["torch", "--peak-lr", wrong], "peak_lr: expected a finite number > 0, got") for wrong in ("0", "inf")),
    ):
        assert why in convert(tmp_path / "x.pt", tmp_path / "none", *options, code=1)
    convert(tmp_path / "x.pt", tmp_path / "a", "torch")
    convert(tmp_path / "x.pt", tmp_path / "b", "zero-redundancy", "--peak-lr", "0.5")
    convert(tmp_path / "x.pt", tmp_path / "c", "composer")
    decays = [Manifest.read(tmp_path / name).param_groups[0]["weight_decay"] for name in "abc"]
    assert decays == [pytest.approx(1e-6), pytest.approx(5e-5), 1e-4]
    assert "it is to be converted from torch" not in caplog.text
    optimizer.param_groups[0]["weight_decay"] = 0.1
    torch.save(optimizer.state_dict(), tmp_path / "y.pt")
    convert(tmp_path / "y.pt", tmp_path / "d", "composer")
    assert "param_groups[0] decays by 0.1 a step: if torch's AdamW wrote it, it is to be" in caplog.text


def test_a_folder_with_a_file_missing_or_cut_short_names_it(files: dict[str, Path], tmp_path: Path) -> None:
    (data,) = files["torch.distributed.checkpoint"].glob("*.distcp")
    data.write_bytes(data.read_bytes()[:-2000])
    assert data.name in convert(data.parent, tmp_path / "y.pt", code=1)
    data.unlink()
    assert f"{data.name} cannot be read" in convert(data.parent, tmp_path / "y.pt", code=1)


def test_names_and_weights_are_taken_from_files_of_their_own(tmp_path: Path) -> None:
    """But names from none that sorts them: layers of one shape would have each other's state."""
    safetensors = pytest.importorskip("safetensors.torch")
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(11)))
    optimizer = AdamW(model.parameters())
    model(torch.randn(3, 2)).square().mean().backward()
    optimizer.step()
    path, names, sorts = tmp_path / "x.pt", tmp_path / "names.txt", tmp_path / "model.safetensors"
    torch.save(optimizer.state_dict(), path)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    safetensors.save_file(model.state_dict(), sorts)
    index = tmp_path / "model.safetensors.index.json"
    files = {name: f"{number % 2}.safetensors" for number, name in enumerate(model.state_dict())}
    for file in ("0.safetensors", "1.safetensors"):
        safetensors.save_file({n: model.state_dict()[n] for n in files if files[n] == file}, tmp_path / file)
    index.write_text(json.dumps({"weight_map": files}))
    names.write_text("\n".join(f"module.{name}" for name, _ in model.named_parameters()))
    for options in ((), ("--weights", sorts), ("--weights", index)):
        assert "names for the 11 parameters" in convert(path, tmp_path / "a", "torch", *options, code=1)
    sorted_ones = (("--weights", path, "--names", names) for path in (sorts, index))
    told = (("--weights", tmp_path / "model.pt"), *sorted_ones, ("--names", names))
    for number, options in enumerate(told):
        convert(path, tmp_path / str(number), "torch", *options)
        state, weights = read_state(tmp_path / str(number), Source.OURS)
        for saved, (name, param) in zip(
            optimizer.state_dict()["state"].values(), model.named_parameters(), strict=True
        ):
            assert torch.equal(state["state"][name]["exp_avg"], saved["exp_avg"])
            assert torch.equal(weights[name], param) if "--weights" in options else weights == {}
    (tmp_path / "1.safetensors").unlink()
    said = convert(path, tmp_path / "b", "torch", "--weights", index, "--names", names, code=1)
    assert f"expected a .safetensors file, got {index}: " in said and "1.safetensors" in said


def test_convert_reads_deepspeed(tmp_path: Path) -> None:
    convert(test_interchange.FakeDeepSpeed(tmp_path / "ds", 2).write(), tmp_path / "out", "deepspeed")
    assert Manifest.read(tmp_path / "out").aliases == [["a.weight", "tied.weight"]]


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    torch.save({"optimizer": Calls(os.system, f"touch {tmp_path / 'marker'}")}, tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("no archive")
    (tmp_path / "text.safetensors").write_text("no header")
    others = [("text.safetensors", "safetensors")] if importlib.util.find_spec("safetensors") else []
    (tmp_path / "folder").mkdir()
    folder = ("folder", "expected a folder of torch.distributed.checkpoint, got one without .metadata")
    for name, why in (("evil.pt", "no data"), ("text.pt", "torch.save"), ("gone", "got"), folder, *others):
        said = convert(tmp_path / name, "out", "torch", code=1)
        assert said.startswith("error: ") and why in said
    assert not (tmp_path / "marker").exists()


def test_without_its_extra_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(SystemExit, match=r"needs typer; install it with: pip install 'sharded_dadamw\[cli\]'"):
        importlib.reload(commands)
