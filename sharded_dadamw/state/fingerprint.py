"""The fingerprint of an optimizer: a 64-bit number of every tensor, the same however it is sharded.

Each rank sums what it holds (``sharded_dadamw.kernels.fingerprint``), of equal parts the first rank that has one counts
it, and one all-reduce adds up. The same all-reduce tells whether equal parts have equal sums: beside each sum goes a
check, to which the first of ``m`` ranks adds ``1 - m`` times its own and the others theirs, which makes 0.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from sharded_dadamw.comm.collectives import Collectives
from sharded_dadamw.comm.connect import connect
from sharded_dadamw.kernels.fingerprint import Span, signed, sums_of
from sharded_dadamw.layout.indices import Rows, rows_of
from sharded_dadamw.layout.parameters import NamedParameter, has_plain_memory
from sharded_dadamw.layout.placement import is_of_fsdp1
from sharded_dadamw.norms.held import Held
from sharded_dadamw.update.storage import MAINS

TENSORS = ("param", "main", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")
"""What a parameter's fingerprint may have, in the order in which differences are told."""

FORMULA = 2
"""How the numbers are made, as docs/same_run.md has it; those of another formula cannot be compared."""

_WORD = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The 64-bit numbers of an optimizer's tensors; two are equal if all values are.

    Attributes:
        tensors: By the parameter's name, in the order of groups, the number of each tensor of it that there is:
            ``param``; ``main``, the main parameter as fp32 in either form; ``exp_avg``, ``exp_avg_sq``,
            ``max_exp_avg_sq`` and ``step``. In [0, 2**64).
    """

    tensors: Mapping[str, Mapping[str, int]]

    @property
    def all(self) -> int:
        """One number for all of them, names included, whatever the order of parameters."""
        words = [(name, key, word) for name, its in self.tensors.items() for key, word in its.items()]
        lines = "".join(f"{name}\n{key}\n{word:016x}\n" for name, key, word in sorted(words))
        return int.from_bytes(hashlib.blake2b(lines.encode(), digest_size=8).digest(), "big")

    def __str__(self) -> str:
        """The one number, in 16 hexadecimal digits."""
        return f"{self.all:016x}"

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can hold: ``formula``, ``all`` and ``tensors``, with numbers as 16 hexadecimal digits."""
        words = {name: {key: f"{word:016x}" for key, word in its.items()} for name, its in self.tensors.items()}
        return {"formula": FORMULA, "all": str(self), "tensors": words}

    @classmethod
    def of_dict(cls, saved: Mapping[str, Any]) -> Fingerprint:
        """Return the one that ``as_dict`` made this of; a ValueError if it did not."""
        try:
            words = {FORMULA: saved["tensors"]}[saved["formula"]].items()
            return cls({name: {key: int(word, 16) for key, word in its.items()} for name, its in words})
        except (LookupError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"expected a fingerprint by formula {FORMULA}, got {saved!r:.80}") from error

    def difference(self, other: Fingerprint) -> tuple[str, str] | None:
        """Return the first parameter, and which of its tensors, that differs or that only one has; None without one."""
        for name in dict.fromkeys((*self.tensors, *other.tensors)):
            ours, theirs = self.tensors.get(name, {}), other.tensors.get(name, {})
            for key in dict.fromkeys((*TENSORS, *ours, *theirs)):  # a later version may have others
                if ours.get(key) != theirs.get(key):
                    return name, key
        return None


class Part(NamedTuple):
    """What this rank holds of one tensor: equal names and keys mean one tensor, equal parts the same elements of it."""

    name: str
    key: str
    part: str
    spans: Sequence[Span]


class Fingerprints:
    """Makes the fingerprints of one optimizer; keeps who counts what, for as long as parts stay what they are."""

    def __init__(self) -> None:
        self._asked: Callable[[], object] = lambda: None  # a group, weakly, as BackendVerbs does
        self._connected = Collectives()
        self._known: tuple[Collectives, list[tuple[str, str, str]]] | None = None
        self._rows: dict[tuple[str, str], int] = {}
        self._holders: dict[tuple[str, str, str], list[int]] = {}

    def make(
        self,
        parts: Iterable[Part],
        ranks: Collectives | dist.ProcessGroup | DeviceMesh,
        device: torch.device,
    ) -> Fingerprint:
        """Add up over ranks. Collective: one all-reduce, and an exchange of names where they are new.

        Ranks that should have the same values and have others are a RuntimeError; it names rank, parameter and tensor.
        """
        if not isinstance(ranks, Collectives):
            if self._asked() is not ranks:
                self._asked, self._connected = weakref.ref(ranks), connect(ranks, device, exchange=None)
            ranks = self._connected
        parts = list(parts)
        self._meet(ranks, [(part.name, part.key, part.part) for part in parts])
        sums = _sums_of(parts, device)
        cells = [[0, 0] for _ in self._rows]
        for part, word in zip(parts, sums, strict=True):
            holders, cell = self._holders[part[:3]], cells[self._rows[part[:2]]]
            is_first = holders[0] == ranks.rank
            cell[0] += word * is_first
            cell[1] += word * (1 - len(holders) * is_first)
        table = torch.tensor([[signed(word & _WORD) for word in cell] for cell in cells], dtype=torch.int64).to(device)
        ranks.all_reduce_(table, dist.ReduceOp.SUM)
        words = table.tolist()
        if suspects := [tensor for tensor, row in self._rows.items() if words[row][1]]:
            raise RuntimeError(_describe(suspects, parts, sums, ranks))
        tensors: dict[str, dict[str, int]] = {}
        for (name, key), row in self._rows.items():
            tensors.setdefault(name, {})[key] = words[row][0] & _WORD
        return Fingerprint(tensors)

    def _meet(self, ranks: Collectives, labels: list[tuple[str, str, str]]) -> None:
        """Exchange what every rank holds. Collective where parts have changed."""
        if self._known == (ranks, labels):
            return
        rows: dict[tuple[str, str], int] = {}
        holders: dict[tuple[str, str, str], list[int]] = {}
        for rank, text in enumerate(ranks.gather_texts(json.dumps(labels))):
            for name, key, part in json.loads(text):
                rows.setdefault((name, key), len(rows))
                holders.setdefault((name, key, part), []).append(rank)
        self._known, self._rows, self._holders = (ranks, labels), rows, holders


def _sums_of(parts: Sequence[Part], device: torch.device) -> list[int]:
    """The sum of each part, in [0, 2**64); of offloaded state beside the host."""
    spans = [span for part in parts for span in part.spans]
    sums = torch.zeros(len(spans), dtype=torch.int64)
    for kind in {span.values.device for span in spans}:
        here = [at for at, span in enumerate(spans) if span.values.device == kind]
        sums[here] = sums_of([spans[at] for at in here]).cpu()
    words = iter(sums.tolist())
    return [sum(islice(words, len(part.spans))) & _WORD for part in parts]


def _describe(
    suspects: Sequence[tuple[str, str]], parts: Sequence[Part], sums: Sequence[int], ranks: Collectives
) -> str:
    """Exchange the sums of tensors that differ, and say where the first one does. Collective."""
    suspected = set(suspects)
    mine = {
        json.dumps(part[:3]): word for part, word in zip(parts, sums, strict=True) if (part.name, part.key) in suspected
    }
    by_part: dict[str, dict[int, int]] = {}
    for rank, text in enumerate(ranks.gather_texts(json.dumps(mine))):
        for label, word in json.loads(text).items():
            by_part.setdefault(label, {})[rank] = word
    label, words = next((label, words) for label, words in by_part.items() if len(set(words.values())) > 1)
    name, key, _ = json.loads(label)
    usual = Counter(words.values()).most_common(1)[0][0]  # of two ranks the first one's
    odd, others = ([rank for rank, word in words.items() if (word == usual) == same] for same in (False, True))
    return (
        f"replicas differ: {key} of {name} on {_ranks(odd)} is not what it is on {_ranks(others)}; "
        f"{len(suspects)} tensors differ. Memory of {_ranks(odd if len(others) > 1 else [*odd, *others])} has changed, "
        "or a rank did not make the same steps: go back to a checkpoint from before"
    )


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, sorted(ranks)))}"


# --- what there is on this rank --------------------------------------------------------------------------------------


def parts_of(held: Held, names: Mapping[int, str] | None = None) -> Iterator[Part]:
    """Yield this rank's parts of an optimizer's tensors.

    ``names`` are those of parameters by their ids, if they are to be called otherwise. What FSDP1 has flattened, or
    quantisation has wrapped, is a ValueError.
    """
    for member, start, stop, state in held.holdings():
        if member.is_left_alone:
            continue
        name = member.name if names is None else names[id(member.param)]
        if is_of_fsdp1(member.param) or not has_plain_memory(member.local):
            raise ValueError(
                f"{name}: expected a parameter of which is known which of its elements lie where, got one that FSDP1 "
                "has flattened, or one that wraps others; for a fingerprint use FSDP2 (fully_shard), and plain ones"
            )
        whole, where = _flat(member.local), member.placement.part
        yield Part(name, "param", where, _spans(member, whole, None, 0))
        flat = {"main" if key in MAINS else key: _flat(value) for key, value in state.items()}
        for key in TENSORS[1:]:
            if key == "step" and key in flat:
                yield Part(name, key, "", [Span(flat[key].float(), None, Rows(0, 1, 1, 0, 1, 0))])
            elif key in flat:
                values, remainder = flat[key], None
                if values.dtype is torch.int16:
                    values, remainder = whole[start:stop].to(values.device), values
                yield Part(name, key, f"{where}[{start}:{stop}]", _spans(member, values, remainder, start))


def _flat(tensor: Tensor) -> Tensor:
    """Its elements end to end in memory. ``reshape(-1)`` of one column of a matrix is 1-D, and not contiguous."""
    return tensor.contiguous().view(-1)


def _spans(member: NamedParameter, values: Tensor, remainder: Tensor | None, start: int) -> list[Span]:
    """Elements of this rank's part of a parameter, 1-D, with their places in the whole."""
    values = values.detach()
    shape, sizes = tuple(member.param.shape), member.placement.local_shape
    offsets: Sequence[int] = (0,) * len(shape)
    if member.placement.is_borrowed and values.numel():
        offsets = tuple(member.param.__create_chunk_list__()[0].offsets)  # type: ignore[attr-defined]
    spans = []
    for rows in rows_of(shape, offsets, sizes, start, start + values.numel()):
        taken = slice(rows.place, rows.place + rows.stop - rows.start)
        spans.append(Span(values[taken], None if remainder is None else remainder[taken], rows))
    return spans
