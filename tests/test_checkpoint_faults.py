"""What can go wrong with a checkpoint: disks, files, saves that die or go on behind training, files made to harm."""

import copy
import errno
import os
import pickle
import random
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from sharded_dadamw.checkpoint import Saving, checkpoints, load_checkpoint, save_checkpoint
from sharded_dadamw.checkpoint import dcp as checkpoint_dcp
from sharded_dadamw.checkpoint.folder import FileSum, Manifest, clear
from sharded_dadamw.interchange import Source, read_state
from tests import pool
from tests.harm import Calls, nested
from tests.harness import ranks
from tests.runs import build, differences, fit, run, whole


@contextmanager
def writing(before_each: Callable[[int], None]) -> Iterator[None]:
    """Calls `before_each(bytes written so far)` before anything is written to a file of a checkpoint."""
    kind = checkpoint_dcp._SummedFile
    original = kind.write

    def write(self: Any, data: Any) -> int:
        before_each(self.known.size)
        return original(self, data)

    kind.write = write  # type: ignore[method-assign]
    try:
        yield
    finally:
        kind.write = original  # type: ignore[method-assign]


def no_space(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def slow(_: int) -> None:
    time.sleep(0.005)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def saved(root: Path, *steps: int, **arguments: Any) -> tuple[Any, dict[int, dict[str, Tensor]]]:
    """A run that saves at each of `steps`, and what it was like then."""
    parts = build("DecoupledAdamW", None)
    then = {}
    for step in steps:
        fit(*parts, 1)
        save_checkpoint(root, step=step, **run(None, *parts), **arguments)
        then[step] = whole(*parts[:2])
    return parts, then


# --- a disk that is full ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("failing_rank", "asynchronous"), [(0, False), (3, True)])
@ranks(4, pool.on_ranks)
def test_a_full_disk_is_an_error_on_all_ranks_and_training_and_saving_go_on(
    group: Any, failing_rank: int, asynchronous: bool, tmp_path: Path
) -> None:
    parts = build("ours", group)
    fit(*parts, 1)
    save_checkpoint(tmp_path, step=1, **run(group, *parts))
    before = contents(tmp_path)
    fit(*parts, 1)

    def save() -> Saving:
        return save_checkpoint(tmp_path, step=2, **run(group, *parts), keep_last=1, asynchronous=asynchronous)

    said = rf"step_00000002 was not written; rank {failing_rank}: .*No space left"
    with (
        writing(no_space if dist.get_rank(group) == failing_rank else lambda _: None),
        pytest.raises(OSError, match=said) as failure,
    ):
        save().wait()
    assert failure.value.errno == errno.ENOSPC
    dist.barrier(group)
    assert contents(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    dist.barrier(group)
    fit(*parts, 1)
    save().wait()
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000002"]


# --- files that are not as they were ---------------------------------------------------------------------------------


def damage(folder: Path, random: random.Random) -> None:
    """One random corruption of a file, or of two."""
    path, other = random.sample(sorted(folder.iterdir()), 2)
    data = bytearray(path.read_bytes())
    kind = random.choice(["delete", "swap", *["bytes"] * 7])
    if kind == "delete":
        path.unlink()
    elif kind == "swap":
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)
    else:
        first = random.randrange(len(data))
        last = random.choice([first + 1, first + random.randrange(200), len(data)])
        part = data[first:last]
        data[first:last] = random.choice([b"", part * 2, bytes(len(part)), bytes(byte ^ 1 for byte in part)])
        path.write_bytes(data)


def test_of_a_hundred_random_corruptions_every_one_is_refused_or_harmless(tmp_path: Path) -> None:
    (tmp_path / "sound").mkdir()
    _, then = saved(tmp_path / "sound", 1)
    model, optimizer, schedule = build("DecoupledAdamW", None, seed=1)
    fit(model, optimizer, schedule, 1)
    before, num_refused = whole(model, optimizer), 0
    for seed in range(100):
        root = tmp_path / str(seed)
        shutil.copytree(tmp_path / "sound", root)
        damage(root / "step_00000001", random.Random(seed))
        try:
            load_checkpoint(root, **run(None, model, optimizer, schedule))
        except ValueError as refusal:
            num_refused += 1
            assert "step_00000001" in str(refusal) and differences(whole(model, optimizer), before) == []
        else:
            assert differences(whole(model, optimizer), then[1]) == []
            model, optimizer, schedule = build("DecoupledAdamW", None, seed=1)
            fit(model, optimizer, schedule, 1)
            before = whole(model, optimizer)
        shutil.rmtree(root)
    assert num_refused >= 80  # zeroing zeros, and turning a file's own bytes around, changes nothing


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def replace_word(path: Path) -> None:
    path.write_text(path.read_text().replace('"lr"', '"rl"'))


TORN: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: os.truncate(f / "__0_0.distcp", 100), r"__0_0.distcp: expected \d+ bytes, got 100"),
    "bit flipped": (lambda f: flip_last_bit(f / "__0_0.distcp"), r"__0_0.distcp: expected checksum"),
    "metadata": (lambda f: flip_last_bit(f / ".metadata"), r".metadata: expected checksum"),
    "missing": (lambda f: (f / "__0_0.distcp").unlink(), r"__0_0.distcp: expected \d+ bytes; the file cannot be read"),
    "a pipe": (
        lambda f: ((f / "fingerprint.json").unlink(), os.mkfifo(f / "fingerprint.json")),
        r"fingerprint.json: .*expected a file, got something else",
    ),
    "a name elsewhere": (lambda f: sign(f, **{"../x": FileSum(0, 0)}), "expected names of files in the folder"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"got one without manifest.json"),
    "manifest": (lambda f: os.truncate(f / "manifest.json", 90), r"manifest.json: .* has been damaged"),
    "manifest's words": (lambda f: replace_word(f / "manifest.json"), r"manifest.json: .* has been damaged"),
    "of another step": (
        lambda f: shutil.copytree(f.with_name("step_00000001"), f, dirs_exist_ok=True),
        r"expected the manifest of step_00000002, got that of step 1",
    ),
}


@pytest.mark.parametrize("kind", list(TORN))
def test_what_is_damaged_is_named_and_the_one_before_it_offered(kind: str, tmp_path: Path) -> None:
    parts, then = saved(tmp_path, 1, 2)
    tear, said = TORN[kind]
    tear(tmp_path / "step_00000002")
    with pytest.raises(ValueError, match=rf"step_00000002.*{said}.*; pass .*step_00000001 to go on from there"):
        load_checkpoint(tmp_path, **run(None, *parts))
    assert differences(whole(*parts[:2]), then[2]) == []
    with pytest.warns(UserWarning, match=rf"{said}.*going on from .*step_00000001 instead"):
        resumed = load_checkpoint(tmp_path, **run(None, *parts), fall_back=True)
    assert resumed is not None and resumed.step == 1 and differences(whole(*parts[:2]), then[1]) == []


@ranks(2)
def test_where_no_folder_can_be_made_is_named_on_every_rank(group: Any, tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    arguments = run(group, *build("ours", group))
    with pytest.raises(ValueError, match=r"root: expected a folder, or one that is not there yet, got .* is a file$"):
        save_checkpoint(tmp_path / "a file", step=1, **arguments)
    with pytest.raises(OSError, match=r"a file/run cannot be written: .*; give a folder in which this user may"):
        save_checkpoint(tmp_path / "a file" / "run", step=1, **arguments)


NO_ROOTS: dict[str, tuple[str, str]] = {
    # what is given, and what the error says of it
    "weights.pt": ("weights.pt", "got a file$"),
    "a file in a checkpoint": ("run/step_00000001/manifest.json", "got a file; give .*step_00000001, the checkpoint"),
    "a folder of torch's": ("dcp", "got one of torch.distributed.checkpoint.save, without manifest.json"),
    "another program's folder": ("deepspeed", "got a folder with latest in it$"),
    "the folder above": ("", "got a folder with .* in it; give .*run$"),
    "a step that is not there": ("run/step_5", "there is no such folder"),
    "a link to a disk that is gone": ("symlinked", "step_00000009: there is no such folder, or this rank does not see"),
}


@pytest.mark.parametrize("kind", NO_ROOTS)
def test_what_is_no_folder_of_checkpoints_is_not_taken_for_one_without_any_yet(kind: str, tmp_path: Path) -> None:
    parts, then = saved(tmp_path / "run", 1)
    (tmp_path / "weights.pt").touch()
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").touch()
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "latest").touch()
    shutil.copytree(tmp_path / "run", tmp_path / "symlinked")
    (tmp_path / "symlinked" / "step_00000009").symlink_to(tmp_path / "gone")
    name, said = NO_ROOTS[kind]
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        load_checkpoint(tmp_path / name, **run(None, *parts))
    assert differences(whole(*parts[:2]), then[1]) == []


def test_a_folder_that_is_empty_but_for_what_dead_saves_left_has_no_checkpoint_yet(tmp_path: Path) -> None:
    parts = build("AdamW", None)
    before = copy.deepcopy(parts[0].state_dict())
    for root, leftover in (("not there", None), (".", None), (".", ".step_00000003.5f0c9a1e")):
        if leftover is not None:
            (tmp_path / leftover).mkdir()
        assert load_checkpoint(tmp_path / root, **run(None, *parts)) is None
    assert not parts[1].state and differences(before, parts[0].state_dict()) == []


@pytest.mark.filterwarnings("ignore:.*going on from")
@ranks(3)
def test_a_file_that_one_rank_finds_damaged_is_refused_by_all(group: Any, tmp_path: Path) -> None:
    parts = build("ours", group)
    for step in (1, 2):
        fit(*parts, 1)
        save_checkpoint(tmp_path, step=step, **run(group, *parts))
    for name in ("__1_0.distcp", "__0_0.distcp"):
        if dist.get_rank(group) == 0:
            flip_last_bit(tmp_path / "step_00000002" / name)
        dist.barrier(group)
        with pytest.raises(ValueError, match=r"distcp: expected checksum.*pass"):
            load_checkpoint(tmp_path, **run(group, *parts))
        resumed = load_checkpoint(tmp_path, **run(group, *parts), fall_back=True)
        assert resumed is not None and resumed.path.name == "step_00000001"


# --- old ones, dead ones, the same one again -------------------------------------------------------------------------


def test_old_ones_go_once_the_new_one_is_complete(tmp_path: Path) -> None:
    parts, _ = saved(tmp_path, 1, 2, 3, 4, keep_last=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000003", "step_00000004"]
    seen: list[int] = []
    with writing(lambda _: seen.append(len(checkpoints(tmp_path)))):
        save_checkpoint(tmp_path, step=5, **run(None, *parts), keep_last=1)
    assert set(seen) == {2} and [path.name for path in tmp_path.iterdir()] == ["step_00000005"]


def test_later_ones_are_left_alone_and_do_not_count(tmp_path: Path) -> None:
    parts, then = saved(tmp_path, 1, 2, 9)
    for path, step in ((tmp_path, 9), (tmp_path / "step_00000002", 2)):
        resumed = load_checkpoint(path, **run(None, *parts))
        assert resumed is not None and resumed.step == step and differences(whole(*parts[:2]), then[step]) == []
    save_checkpoint(tmp_path, step=3, **run(None, *parts), keep_last=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000002", "step_00000003", "step_00000009"]


def test_what_dead_saves_left_is_never_loaded_and_cleared_by_the_next(tmp_path: Path) -> None:
    parts, _ = saved(tmp_path, 1)
    shutil.copytree(tmp_path / "step_00000001", tmp_path / ".step_00000002.0a1b2c3d")
    (tmp_path / "notes").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000001"]
    resumed = load_checkpoint(tmp_path, **run(None, *parts))
    assert resumed is not None and resumed.step == 1
    save_checkpoint(tmp_path, step=2, **run(None, *parts))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step_00000001", "step_00000002"]


def test_a_save_whose_files_another_removes_fails_and_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, _ = saved(tmp_path, 1)

    def begin_another(size: int) -> None:
        if size == 0:
            clear(tmp_path)

    def remove_a_file_only(path: Path, **_: Any) -> None:
        next(iter(path.glob("*.distcp")), path / "none").unlink(missing_ok=True)

    with monkeypatch.context() as patches, writing(begin_another), pytest.raises(OSError, match="another job may"):
        patches.setattr(shutil, "rmtree", remove_a_file_only)
        save_checkpoint(tmp_path, step=2, **run(None, *parts), keep_last=1)
    (tmp_path / "step_00000002").symlink_to(tmp_path / "gone")  # which is in nobody's way
    save_checkpoint(tmp_path, step=2, **run(None, *parts))
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000001", "step_00000002"]
    (tmp_path / "step_00000003").symlink_to(tmp_path / "gone")  # and which counts for nothing
    save_checkpoint(tmp_path, step=4, **run(None, *parts), keep_last=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000002", "step_00000004"]


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    _, then = saved(tmp_path, 1, 1)
    again = build("DecoupledAdamW", None, seed=1)
    load_checkpoint(tmp_path, **run(None, *again))
    assert differences(whole(*again[:2]), then[1]) == []
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


# --- saves behind training -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "num_ranks"), [("AdamW", 1), ("ours", 4), ("fsdp2", 4)])
@ranks(None, pool.on_ranks)
def test_a_step_right_after_does_not_change_what_is_written(group: Any, kind: str, tmp_path: Path) -> None:
    parts = build(kind, group)
    fit(*parts, 1)
    then = whole(*parts[:2])
    with writing(slow):
        saving = save_checkpoint(tmp_path, step=1, **run(group, *parts), asynchronous=True)
        fit(*parts, 2)
        assert not saving.done and not saving.path.exists()
        saving.wait()
    again = build(kind, group, seed=1)
    load_checkpoint(tmp_path, **run(group, *again))
    assert differences(whole(*again[:2]), then) == []


def test_the_second_save_and_a_load_wait_for_the_first(tmp_path: Path) -> None:
    parts = build("DecoupledAdamW", None)
    fit(*parts, 1)
    arguments = run(None, *parts)
    with writing(slow):
        first = save_checkpoint(tmp_path, step=1, **arguments, asynchronous=True)
        second = save_checkpoint(tmp_path, step=2, **arguments, asynchronous=True)
        assert first.done and not second.done
        resumed = load_checkpoint(tmp_path, **arguments)
        assert resumed is not None and resumed.step == 2 and second.done


@pytest.mark.parametrize("rank_0_waits", [False, True])
@ranks(4, pool.on_ranks)
def test_a_failure_behind_training_is_raised_on_all_ranks_by_the_next_save(
    group: Any, rank_0_waits: bool, tmp_path: Path
) -> None:
    """Even if rank 0 has heard of it, it is told again with the others, or they would part."""
    parts = build("ours", group)
    with writing(no_space if dist.get_rank(group) == 1 else lambda _: None):
        first = save_checkpoint(tmp_path, step=1, **run(group, *parts), asynchronous=True)
        if rank_0_waits and dist.get_rank(group) == 0:
            with pytest.raises(OSError):
                first.wait()
        while not first.done:
            time.sleep(0.01)
    with pytest.raises((OSError, ValueError), match="step_00000001 was not written; rank 1"):
        save_checkpoint(tmp_path, step=2, **run(group, *parts))
    assert not (tmp_path / "step_00000002").exists()
    assert save_checkpoint(tmp_path, step=3, **run(group, *parts)).wait().name == "step_00000003"


@ranks(2, pool.on_ranks)
def test_only_all_ranks_together_save_behind_training(group: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected all 4 ranks"):
        save_checkpoint(tmp_path, step=1, **run(group, *build("ours", group)), asynchronous=True)


# --- files made up to harm -------------------------------------------------------------------------------------------


def sign(folder: Path, **others: Any) -> None:
    """Make the manifest fit files that somebody has changed, and have it name others."""
    manifest = Manifest.read(folder)
    (folder / "manifest.json").unlink()
    sums = dict(others)
    for name in manifest.files:
        file = checkpoint_dcp._SummedFile(folder / "sum")
        file.write((folder / name).read_bytes())
        file.close()
        (folder / "sum").unlink()
        sums[name] = file.known
    replace(manifest, files=sums).write(folder)


def nested_place(value: Any) -> MetadataIndex:
    place = MetadataIndex.__new__(MetadataIndex)
    vars(place).update(fqn=value, offset=value, index=None)
    return place


def named(name: str) -> bytes:
    return b"ctorch.distributed.checkpoint.metadata\n" + name.encode() + b"\n"


ENDLESS = nested(lambda value: (value, value))
LISTS = pickle.dumps(nested(lambda value: [value, value]), 2)[2:-1]
PLACES = pickle.dumps(nested(nested_place), 2)[2:-1]
HOSTILE = {  # and see tests/test_torch_file.py, of the same unpickler
    "a place as a key": b"}" + PLACES + b"K\x00s",
    "an argument": named("_MEM_FORMAT_ENCODING") + LISTS + b"\x85R",
    "a state": named("TensorProperties") + b")\x81(NN\x89" + LISTS + b"\x89tb",
    "a memo of no memory": b"K\x01r" + struct.pack("<I", 0xFFFFFFFF),
}
ENTRY = "model.embedding.weight"
FAKES: dict[str, tuple[dict[str, dict[str, Any]] | bytes | None, str]] = {
    # what is changed of the entry, its only chunk, its path and the first place in a file, or is there instead, or
    # that a pipe is; and what the error says
    "a chunk outside": ({"chunk": {"offsets": torch.Size([1, 0])}}, "beyond its tensor"),
    "a size of no memory": (
        {"entry": {"size": torch.Size([1 << 60, 6])}, "chunk": {"sizes": torch.Size([1 << 60, 6])}},
        r"embedding\.weight",
    ),
    "an entry below another": ({"paths": {ENTRY: ("model", "decoder.weight", "x")}}, "apart from each other"),
    "an entry above another": ({"paths": {"model.middle.0.bias": ("model",)}}, "apart from each other"),
    "a part alone": ({"entry": {"chunks": []}}, "all of it|elements in chunks"),
    "another file": ({"place": {"relative_path": "unlisted"}}, "in the files of the checkpoint"),
    "no path": ({"paths": {ENTRY: 5}}, "keys that lead"),
    "no place": ({"place": {"offset": -5}}, "a place in a file"),
    "no shape": ({"entry": {"size": "x"}}, "expected a shape"),
    "a shape without end": ({"entry": {"size": ENDLESS}}, r"\.metadata: .*expected"),
    "a path without end": ({"paths": {ENTRY: ENDLESS}}, r"\.metadata: .*expected"),
    "a file without end": ({"place": {"relative_path": ENDLESS}}, r"\.metadata: .*expected"),
    **{kind: (b"\x80\x02" + program + b".", r"\.metadata: expected") for kind, program in HOSTILE.items()},
    "nothing in it": (pickle.dumps(dcp.metadata.Metadata.__new__(dcp.metadata.Metadata)), "no attribute"),
    "a pipe": (None, "expected a file"),
}


@pytest.mark.parametrize("kind", FAKES)
def test_metadata_that_torch_would_not_have_written_are_one_clear_error(kind: str, tmp_path: Path) -> None:
    """Of a checkpoint of ours, and of anybody's: without a manifest."""
    parts, then = saved(tmp_path, 1)
    folder = tmp_path / "step_00000001"
    shutil.copy(folder / "__0_0.distcp", folder / "unlisted")
    metadata = dcp.FileSystemReader(folder).read_metadata()
    known: Any = metadata.state_dict_metadata[ENTRY]
    place = next(iter(metadata.storage_data.values()))
    changed, said = FAKES[kind]
    if isinstance(changed, dict):
        parts_of_it = {"chunk": vars(known.chunks[0]), "entry": vars(known), "place": vars(place)}
        for what, change in changed.items():
            {**parts_of_it, "paths": metadata.planner_data}[what].update(change)
        changed = pickle.dumps(metadata)
    if changed is None:
        (folder / ".metadata").unlink()
        os.mkfifo(folder / ".metadata")
    else:
        (folder / ".metadata").write_bytes(changed)
        sign(folder)
    with pytest.raises(ValueError, match=said):
        load_checkpoint(folder, **run(None, *parts))
    assert differences(whole(*parts[:2]), then[1]) == []
    if "another" not in kind:  # of which a folder without a manifest does not know
        (folder / "manifest.json").unlink()
        with pytest.raises(ValueError, match=said):
            read_state(folder, Source.OURS)


def test_a_checkpoint_of_a_later_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as later:
        later.setattr("sharded_dadamw.checkpoint.folder.FORMAT", 2)
        parts, _ = saved(tmp_path, 1)
    with pytest.raises(ValueError, match="expected format 1; load it with the version that wrote it"):
        load_checkpoint(tmp_path, **run(None, *parts))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs to know what a descriptor is of")
def test_a_checkpoint_gets_its_name_after_all_of_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, bool]] = []  # and whether the checkpoint had its name
    real = os.fsync
    final = tmp_path / "step_00000001"

    def fsync(descriptor: int) -> None:
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), final.exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    saved(tmp_path, 1)
    names = {Path(name).name.removesuffix(".tmp") for name, is_there in synced if not is_there}
    assert {"__0_0.distcp", ".metadata", "manifest.json"} < names
    assert any(name.startswith(".step_00000001") for name in names)
    assert synced[-1] == (str(tmp_path), True)


@pytest.mark.parametrize("where", ["metadata", "an entry"])
def test_a_pickle_that_carries_code_is_refused_and_never_run(where: str, tmp_path: Path) -> None:
    parts, then = saved(tmp_path, 1)
    folder, mark = tmp_path / "step_00000001", tmp_path / "mark"
    metadata, code = dcp.FileSystemReader(folder).read_metadata(), Calls(os.mkdir, str(mark))
    if where == "metadata":
        metadata.planner_data["harm"] = code
    else:
        (info,) = (info for at, info in metadata.storage_data.items() if at.fqn == "optimizer.param_groups.0.lr")
        with (folder / info.relative_path).open("ab") as file:
            info.offset = file.tell()
            torch.save(code, file)
            info.length = file.tell() - info.offset
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(folder)
    said = {"metadata": r"\.metadata", "an entry": r"an entry cannot be read: optimizer\.param_groups\.0\.lr"}[where]
    with pytest.raises(ValueError, match=rf"{said}.*mkdir, which is no data"):
        load_checkpoint(tmp_path, **run(None, *parts))
    assert not mark.exists() and differences(whole(*parts[:2]), then[1]) == []
    if where == "an entry":  # torch's own reading would have run it
        dcp.load({"optimizer": {"param_groups": [{"lr": 0.0}]}}, checkpoint_id=folder, no_dist=True)
        assert mark.exists()
