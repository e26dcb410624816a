"""What others wrote is read, and what they would have run is not."""

import argparse
import builtins
import collections
import io
import os
import pickle
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_dadamw.checkpoint.pickles import Placeholder, load_torch
from sharded_dadamw.interchange import Source, read_state
from tests.harm import Calls, archive, nested

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


class Bag(dict[str, int]):
    """A class that is not there when it is read, as far as the reader is concerned."""


def load(pickled: bytes) -> Any:
    return load_torch(archive(pickled))


def trap(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w').close()"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_pickle_that_carries_code_is_refused_and_not_run(protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    carriers = [
        Calls(os.system, f"touch {marker}"),
        Calls(builtins.eval, trap(marker)),
        Calls(builtins.exec, trap(marker)),
        Calls(subprocess.check_call, ["touch", str(marker)]),
        Calls(builtins.__import__, "antigravity"),
        Calls(builtins.open, str(marker), "w"),
    ]
    for carrier in carriers:
        data = pickle.dumps({"state": [carrier]}, protocol)
        with pytest.raises(ValueError, match="no data"):
            load(data)
    assert not marker.exists()


NO_LENGTHS = (pickle.BINBYTES8, pickle.BYTEARRAY8, pickle.BINUNICODE8)


@pytest.mark.parametrize(
    "program, why",
    [
        (b"\x80\x02cos\nsystem\nU\x01x\x85R.", ", which is no data"),  # REDUCE
        (b"(Vx\nios\nsystem\n.", "no data"),  # INST
        (b"(cos\nsystem\nVx\no.", "no data"),  # OBJ
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "no data"),  # STACK_GLOBAL, not even called
        (b"\x80\x04\x8c\x05torch\x8c\x0ehub.os.system1\x93\x8c\x01x\x85R.", None),  # a dotted name is not followed
        (b"\x80\x02\x82\x01.", "it names extension 1, which is no data"),  # an extension code
        (b"\x80\x02ctorch\nfloat32\n)R.", "not callable"),  # data is not called
        (
            b"\x80\x02ccollections\nOrderedDict\n}U\x01xK\x01sb.",
            "it sets up an object of",
        ),  # a class is not set up, so not patched
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}U\x0c__defaults__Ns\x86b.", "sets up"),  # nor a function
        *((b"\x80\x05" + code + struct.pack("<Q", 1 << 62) + b"x.", "") for code in NO_LENGTHS),
        (b"\x80\x02U\x07storageQ.", "it refers to something outside of itself"),  # a reference
        (
            b"\x80\x02c__builtin__\nlist\nc__builtin__\nxrange\nJ\xff\xff\xff\x7f\x85R\x85R.",
            None,
        ),  # a list of 2**31 numbers
        (b"\x80\x02c__builtin__\ntuple\nc__builtin__\nxrange\nJ\xff\xff\xff\x7f\x85R\x85\x81.", None),
        (b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.", None),
        (b"\x80\x02c__builtin__\nstr\n]\x85R.", None),
        (b"\x80\x02U\x01x0.", None),  # nothing left
        (b"\x80\x02(", None),  # cut short
        (b"", None),
    ],
)
def test_programs_made_by_hand_end_in_an_error_or_in_nothing(program: bytes, why: str | None) -> None:
    try:
        found = load(program)
    except ValueError as error:
        assert why is None or why in str(error)
    else:
        assert why is None and isinstance(found, Placeholder)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_data_comes_back(protocol: int) -> None:
    data = {
        "a": [1, 2.5, "x", b"bytes", None, True, (1, (2,)), 1j],
        "d": collections.OrderedDict(x=1),
        "c": collections.Counter("xx"),
        "s": {1, (2, (3, 4)), frozenset({5})},
        "e": torch.bfloat16,
        "f": torch.Size([2, 3]),
        "i": torch.device("cpu"),
        (1, "x"): 1 << 300,
    }
    assert load(pickle.dumps(data, protocol)) == data


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_numpys_numbers_are_numbers(protocol: int) -> None:
    numpy = pytest.importorskip("numpy")
    kinds = ("float64", "float32", "float16", "int64", "int32", "uint8", "bool_", ">f8", ">i4")
    numbers = [numpy.dtype(kind.rstrip("_")).type(1) for kind in kinds]
    numbers += [numpy.float32(0.1), numpy.int64(-7), numpy.frombuffer(b"\x3f\xf8" + bytes(6), ">f8")[0]]
    loaded = load(pickle.dumps(numbers, protocol))
    assert [float(number) for number in loaded] == [float(number) for number in numbers]
    assert {type(number) for number in loaded} == {float, int, bool}
    assert isinstance(load(pickle.dumps(numpy.datetime64(1, "s"), protocol)), Placeholder)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_class_of_others_becomes_a_placeholder(protocol: int) -> None:
    bag = Bag(x=1)
    bag.extra = [bag]  # type: ignore[attr-defined]
    counted: Any = collections.defaultdict(list, x=[1])
    first, second, third, fourth = load(pickle.dumps([bag, argparse.Namespace(y=2), 7, counted], protocol))
    assert third == 7 and all(isinstance(each, Placeholder) for each in (first, second, fourth))


def tensors() -> dict[str, Tensor]:
    base = torch.randn(6, 5)
    return {
        "plain": base,
        "transposed": base.t(),
        "slice": base[2:, 1:3],
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
        "bool": torch.tensor([True, False]),
        "bf16": torch.randn(3).bfloat16(),
        "float8": torch.randn(4).to(torch.float8_e4m3fn),
        "uint16": torch.arange(5).to(torch.uint16),
        "complex": torch.randn(2, dtype=torch.complex64),
    }


def bits(tensor: Tensor) -> list[int]:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist() if tensor.numel() else []


@pytest.mark.parametrize("mapped", [True, False])
def test_tensors_of_a_torch_file_come_back_bit_for_bit(mapped: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    saved = tensors()
    module = nn.Linear(3, 2)
    torch.save({"tensors": saved, "model": module.state_dict(), "parameter": module.weight}, path)
    with path.open("rb") as file:
        loaded: Any = load_torch(path if mapped else file)
    for name, tensor in saved.items():
        assert loaded["tensors"][name].dtype == tensor.dtype and loaded["tensors"][name].shape == tensor.shape
        assert bits(loaded["tensors"][name]) == bits(tensor), name
    assert torch.equal(loaded["model"]["bias"], module.bias) and torch.equal(loaded["parameter"], module.weight)
    assert loaded["tensors"]["plain"].data_ptr() == loaded["tensors"]["transposed"].data_ptr()  # one storage still
    loaded["tensors"]["plain"].zero_()  # is a private copy of what the file holds
    assert torch.equal(torch.load(path)["tensors"]["plain"], saved["plain"])


def rewritten(
    path: Path, change: Callable[[str, bytes], bytes | None] = lambda name, data: data, how: int = zipfile.ZIP_STORED
) -> Path:
    """The archive with its records changed, or left out where the change is None."""
    target = path.with_name("changed.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", how) as new:
        for info in old.infolist():
            data = change(info.filename.partition("/")[2], old.read(info))
            if data is not None:
                new.writestr(info.filename, data)
    return target


def with_record(path: Path, record: str) -> Path:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(record, b"")
    return path


def of_old_torch(path: Path) -> Path:
    torch.save({"x": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    return path


def in_record(record: str, change: Callable[[bytes], bytes | None]) -> Callable[[Path], Path]:
    return lambda path: rewritten(path, lambda name, data: change(data) if name == record else data)


DAMAGED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a short storage": (in_record("data/0", lambda data: data[:5]), "storage 0 should have 64 bytes and has 5"),
    "no storage": (in_record("data/0", lambda data: None), "storage 0 should have 64 bytes and has 0"),
    "no pickle": (in_record("data.pkl", lambda data: None), "some other archive"),
    "half a pickle": (in_record("data.pkl", lambda data: data[:-9]), "data alone"),
    "a tensor of 20 beyond 16": (
        in_record("data.pkl", lambda data: data.replace(b"K\x04K", b"K\x05K", 1)),
        "resize storage",
    ),
    "larger inside": (lambda path: rewritten(path, how=zipfile.ZIP_DEFLATED), "larger inside"),
    # By constants.pkl torch.load knows a script module, and runs it; and one of two records it would not look at.
    "a script module": (lambda path: with_record(path, "x/constants.pkl"), "other archive"),
    "a storage twice": (lambda path: with_record(path, "x/data/0"), "other archive"),
    "a pickle twice": (lambda path: with_record(path, "y/data.pkl"), "other archive"),
    "of old torch": (of_old_torch, "save it again"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_torch_file_is_refused(kind: str, mapped: bool, tmp_path: Path) -> None:
    torch.save({"x": torch.randn(4, 4)}, tmp_path / "x.pt")
    damage, why = DAMAGED[kind]
    changed = damage(tmp_path / "x.pt")
    with pytest.raises(ValueError, match=why):
        load_torch(changed if mapped else io.BytesIO(changed.read_bytes()))


def test_what_stands_in_itself_many_times_takes_no_time(tmp_path: Path) -> None:
    """Following every way down would take 2 ** 60 steps, and a message with all of it as much memory."""
    dicts, lists, tuples = (nested(pair) for pair in (lambda x: {"a": x, "b": x}, lambda x: [x, x], lambda x: (x, x)))
    dicts["itself"] = dicts
    group = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "params": [0], "param_names": ["a"]}
    entries = {"step": 1, "exp_avg": lists, "exp_avg_sq": torch.ones(1)}
    for contents in (
        dicts,
        {"state": {0: entries}, "param_groups": [group]},
        *({"state": {}, "param_groups": [{**group, key: tuples}]} for key in group),
    ):
        torch.save(contents, tmp_path / "x.pt")
        with pytest.raises(ValueError) as error:
            read_state(tmp_path / "x.pt", Source.TORCH)
        assert len(str(error.value)) < 1000
    with pytest.raises(ValueError, match="not callable"):
        load(pickle.dumps(lists, 2)[:-1] + b")R.")


DOUBLED = b"K\x01" + b"q\x00h\x00\x86" * 60  # 1 in tuples of two that are the same: 2**60 of it, in 60 objects
CHAINED = b"K\x01" + b"\x85" * 100_000  # 1 in a tuple in a tuple and so on: whoever recurses runs out of stack


@pytest.mark.parametrize("key", [DOUBLED, CHAINED], ids=["doubled", "chained"])
@pytest.mark.parametrize(
    "before, after",
    [(b"}", b"Ns"), (b"}(", b"Nu"), (b"(", b"Nd"), (b"\x8f(", b"\x90"), (b"(", b"\x91")],
    ids=["SETITEM", "SETITEMS", "DICT", "ADDITEMS", "FROZENSET"],
)
def test_keys_whose_hash_would_never_end_are_refused(key: bytes, before: bytes, after: bytes) -> None:
    with pytest.raises(ValueError, match="tuples of tuples"):
        load(b"\x80\x04" + before + key + after + b".")


@pytest.mark.parametrize("kind", [torch.Size, set, collections.Counter])
def test_a_tensor_whose_one_element_stands_for_many_is_not_gone_through(kind: Any, tmp_path: Path) -> None:
    torch.save(Calls(kind, torch.ones(1, dtype=torch.int64).expand(1 << 20)), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="expected a list of things, got Tensor"):
        load_torch(tmp_path / "x.pt")


def test_flipped_bits_end_in_an_error_or_in_plain_data(tmp_path: Path) -> None:
    torch.save({"a": tensors()["plain"], "b": [1, {"c": 2.0}]}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        damaged = bytearray(pickled)
        place, bit = (int(torch.randint(high, (), generator=generator)) for high in (len(damaged), 8))
        damaged[place] ^= 1 << bit
        try:
            load(bytes(damaged))
        except ValueError:
            continue
