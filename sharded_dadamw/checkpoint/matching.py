"""Whether what was saved fits a run, and what was read as the run takes it.

Everything that is compared here is compared before anything is read, and raises by name. Parameters are found by name,
in whatever order their group has them; a main parameter changes its form where it has to.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.optim import Optimizer

from sharded_dadamw.checkpoint.entries import Entries, nested
from sharded_dadamw.checkpoint.names import IS_DECOUPLED, canonical_name, name_of, tied
from sharded_dadamw.checkpoint.run import holds_nothing
from sharded_dadamw.comm.dtensors import like_parameter
from sharded_dadamw.layout.placement import local
from sharded_dadamw.state.fingerprint import Fingerprint
from sharded_dadamw.state.fragment_tensor import FragmentTensor
from sharded_dadamw.update.hyperparameters import FREE_OF_LR
from sharded_dadamw.update.precision import join, remainder_of
from sharded_dadamw.update.storage import MAINS

_OTHER_FORM = dict(zip(MAINS, reversed(MAINS), strict=True))
"""The forms of a main parameter: which one is the other."""

_DECAYS = {None: "", True: " (which does not scale with lr)", False: " (which scales with lr)"}


class Match:
    """The part of a checkpoint that a run takes: which entries, into what they are read, and what becomes of them.

    Making one compares everything by name and reads nothing. Live tensors are left as they are.

    Attributes:
        entries: By flat name, what to read each entry into: host memory, or None for what is no tensor.
        stored_names: By live name the one under which a weight is stored.
    """

    def __init__(
        self,
        saved: Entries,
        model: nn.Module,
        weights: Mapping[str, Any],
        optimizer: Optimizer | None,
        state: Mapping[str, Any] | None,
    ) -> None:
        """Compare what was saved with ``weights`` and ``state``, the live ones, by name; ``model`` has their ties.

        A difference is a ValueError that names it.
        """
        self.entries: dict[str, Any] = {}
        self._saved = saved
        self._weights = weights
        self._state = state
        self._first = {name: names[0] for names in saved.manifest.aliases for name in names}
        self._twins: list[tuple[str, str]] = []
        self.stored_names: dict[str, str] = {}
        ties = tied(model)
        self._match_weights(ties)
        self._tie(ties)
        if optimizer is not None and state is not None:
            _require_same_decay(saved, name_of(optimizer))
            self._match_groups(state["param_groups"])
            self._match_state(state)

    def wrong(self, loaded: Fingerprint) -> str | None:
        """Return which tensor is not what was saved, by the fingerprint of what was loaded by its stored names.

        Of each parameter are compared the tensors that have the form and the dtype in which they were saved.
        """
        saved = Fingerprint.of_dict(self._saved.manifest.fingerprint)
        for live, name in self.stored_names.items():
            known, own = self._state_of(live)
            theirs, ours = saved.tensors.get(name, {}), loaded.tensors.get(name, {})
            values = {"param": self._weights[live], **own}
            for kind, entry in {"param": self._saved.under("model")[name], **known}.items():
                key, value = "main" if kind in MAINS else kind, values.get(kind)
                is_same = isinstance(value, Tensor) and value.dtype is self._saved.dtype(entry)
                if is_same and key in theirs and key in ours and theirs[key] != ours[key]:
                    return f"{key} of {live}"
        return None

    def collect(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what has been read as the run takes it: the model's state dict, and the optimizer's by names.

        Weights that are tied here and differ there are a ValueError that names them.
        """
        saved, entries, nodes = self._saved, self.entries, self._saved.under("model")
        for one, other in self._twins:
            if not torch.equal(_part_of(entries[nodes[one]]), _part_of(entries[nodes[other]])):
                raise ValueError(f"model: {one} and {other} are tied, and two different weights in {saved.folder}")
        weights = {live: nested(nodes[stored], entries) for live, stored in self.stored_names.items()}
        state, groups, wide = {}, [], {}
        for number, group in enumerate(self._state["param_groups"] if self._state else ()):
            kept = {key: group[key] for key in ("params", "param_names") if key in group}
            if IS_DECOUPLED.get(saved.manifest.optimizer):  # which tells what its weight decay means
                kept["decoupled_weight_decay"] = FREE_OF_LR
            groups.append({**group, **nested(saved.under("optimizer", "param_groups", number), entries), **kept})
            for name in group["params"]:
                known, own = self._state_of(name)
                if not known:
                    continue
                read = {key: entries[entry] for key, entry in known.items() if entry in entries}
                weight = entries[nodes[self.stored_names[name]]]
                for key, other in _OTHER_FORM.items():
                    if key in own and key not in read:
                        read[key] = _in_own_form(own[key], read.pop(other, None), weight)
                    elif key in read and not own.keys() & _OTHER_FORM.keys():
                        wide[self.stored_names[name]] = _as_weight(read.pop(key), weight)
                state[name] = read
        weights |= {live: wide[stored] for live, stored in self.stored_names.items() if stored in wide}
        return {**self._weights, **weights}, {"state": state, "param_groups": groups}

    def _state_of(self, name: str) -> tuple[dict[str, str], Mapping[str, Any]]:
        """Return what is saved and what is live of a parameter's state, by kind."""
        assert self._state is not None
        return self._saved.under("optimizer", "state", self.stored_names[name]), self._state["state"].get(name, {})

    def _match_weights(self, ties: Sequence[Sequence[str]]) -> None:
        saved, nodes = self._saved, self._saved.under("model")
        held = [name for name, value in self._weights.items() if name in nodes or not holds_nothing(value)]
        for live, name in _match_names(held, nodes, saved.folder, ties).items():
            self.stored_names[live] = self._first.get(name, name)
            value, node = self._weights[live], nodes[self.stored_names[live]]
            if not isinstance(value, Tensor):
                self.entries.update(saved.wholes(node))
            elif not isinstance(node, str):
                raise ValueError(f"model.{live}: expected a tensor, got something else in {saved.folder}")
            elif node not in self.entries:
                self.entries[node] = saved.target(node, value)

    def _tie(self, ties: Iterable[Iterable[str]]) -> None:
        """Take weights that are tied here and were stored apart for one, as which they have to turn out when read."""
        has_state = self._saved.under("optimizer", "state")
        for same in ties:
            stored = dict.fromkeys(self.stored_names[name] for name in same if name in self.stored_names)
            first, *others = sorted(stored, key=lambda name: name not in has_state) or [""]
            self._first |= {name: first for name in self._first if self._first[name] in others}
            self._first |= dict.fromkeys(others, first)
            self._twins += [(first, other) for other in others]
        self.stored_names = {live: self._first.get(name, name) for live, name in self.stored_names.items()}

    def _match_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Check that live groups have the parameters of the saved ones, in the same order of groups."""
        saved, theirs = self._saved, self._saved.manifest.param_groups
        if len(groups) != len(theirs):
            raise ValueError(f"param_groups: expected {len(groups)}, got {len(theirs)} in {saved.folder}")
        for index, (group, their) in enumerate(zip(groups, theirs, strict=True)):
            ours = {self.stored_names[name] for name in group["params"]}
            if differing := sorted(ours ^ {self._first.get(name, name) for name in their["params"]}):
                is_ours = differing[0] in ours
                raise ValueError(
                    f"param_groups[{index}]: {differing[0]} is {'not ' * is_ours}in this group in {saved.folder}, and "
                    f"{'not ' * (not is_ours)}here; build the optimizer with the groups of the saved one, in that order"
                )
            self.entries.update(saved.wholes(saved.under("optimizer", "param_groups", index)))

    def _match_state(self, live: Mapping[str, Any]) -> None:
        saved, without_main = self._saved, []
        for name in (name for group in live["param_groups"] for name in group["params"]):
            (known, own), weight = self._state_of(name), self._weights[name]
            mains = known.keys() & _OTHER_FORM.keys()
            needed = own.keys() - _OTHER_FORM.keys()  # the weight itself will do for a main parameter
            if known and own and needed != known.keys() - mains:
                raise ValueError(
                    f"optimizer state of {name}: expected entries {sorted(own)}, got {sorted(known)} in {saved.folder}"
                )
            for key, entry in known.items():
                value = own.get(key)
                if value is None and key in mains:
                    is_wide = weight.dtype is torch.float32 and not isinstance(weight, ShardedTensor)
                    like = own.get(_OTHER_FORM[key], weight if is_wide else None)
                    if like is None:
                        without_main.append(name)
                        continue
                    value = _like(like, torch.empty_like(_part_of(like), dtype=MAINS[key], device="cpu"))
                elif value is None and isinstance(empty := saved.whole(entry), Tensor):
                    is_like = empty.shape == weight.size() and not isinstance(weight, ShardedTensor)
                    value = torch.empty_like(weight, dtype=empty.dtype) if is_like else empty
                self.entries[entry] = saved.target(entry, value) if isinstance(value, Tensor) else None
        if without_main:
            warnings.warn(
                f"the main parameters of {len(without_main)} parameters, such as {without_main[0]}, are left out, "
                "since this optimizer keeps none: it goes on from weights that were rounded",
                stacklevel=2,
            )


def _match_names(
    live: Iterable[str], saved: Iterable[str], folder: Path, ties: Iterable[Sequence[str]]
) -> dict[str, str]:
    """Return which saved name every live one has: the same, the same without what wrappers add, or that of its tie."""
    names = dict.fromkeys(saved)
    canonical = {canonical_name(name): name for name in names}
    found = {name: name if name in names else canonical.get(canonical_name(name)) for name in live}
    doubled = [name for name, its in found.items() if name != its and its in found]
    for same in ties:  # of which others save one alone
        there = next((found[name] for name in same if found.get(name)), None)
        found |= {name: found[name] or there for name in same if name in found}
    missing = [name for name, its in found.items() if its is None]
    left_over = sorted(names.keys() - set(found.values()))
    if doubled and not missing:
        raise ValueError(
            f"model: expected {folder} to have {doubled[0]} and {found[doubled[0]]}, got one weight of that name; "
            "rename one of them"
        )
    differences = [
        f"{len(some)} {what}, the first is {some[0]}"
        for some, what in ((missing, "missing"), (left_over, "left over"))
        if some
    ]
    if differences:
        raise ValueError(f"model: expected {folder} to have what the model has; {'; '.join(differences)}")
    return {name: its for name, its in found.items() if its is not None}


def _require_same_decay(saved: Entries, live: str) -> None:
    """Check that weight decay means the same: its entry has one name, and the numbers differ by a factor of lr."""
    name = saved.manifest.optimizer
    was, now = IS_DECOUPLED.get(name), IS_DECOUPLED.get(live)
    decays = any(group.get("weight_decay") for group in saved.manifest.param_groups)
    if not decays or name in ("", live) or was == now:
        return
    if was is not None and now is not None:
        target = "NEW --from torch" if now else "NEW.pt --from sharded-dadamw"
        hint = f"convert it: sharded-dadamw convert {saved.folder} {target}"
    else:
        hint = "nothing is known of how these compare, so pass optimizer=None to load the rest"
    raise ValueError(
        f"weight_decay: expected that of {live}{_DECAYS[now]}, got that of {name}{_DECAYS[was]} in {saved.folder}; "
        f"{hint}"
    )


# --- forms of a tensor -----------------------------------------------------------------------------------------------


def _part_of(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, 1-D; of a fragment that was read, what was read."""
    if isinstance(tensor, FragmentTensor):
        return tensor.fragment if tensor.loaded is None else tensor.loaded
    if isinstance(tensor, ShardedTensor):
        return torch.cat([shard.tensor.reshape(-1) for shard in tensor.local_shards()] or [torch.empty(0)])
    return local(tensor).reshape(-1)


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    """Return values of this rank's part of a tensor as that is: a fragment, a DTensor or whole."""
    if isinstance(tensor, FragmentTensor):
        return tensor.holding(values)
    return like_parameter(values.view(local(tensor).shape), tensor)


def _in_own_form(live: Tensor, saved: Tensor | None, weight: Tensor) -> Tensor:
    """Return a main parameter that was saved in the other form or, where none was, as the weight is; no bit is lost."""
    part = _part_of(weight)
    if isinstance(live, FragmentTensor):
        _, start, stop = live.span
        part = part[start:stop]
    if live.dtype is not torch.int16:
        values = part.to(live.dtype) if saved is None else join(part, _part_of(saved))
    else:
        values = torch.zeros_like(part, dtype=live.dtype) if saved is None else remainder_of(_part_of(saved), part)
    return _like(live, values)


def _as_weight(saved: Tensor, weight: Tensor) -> Tensor:
    """Return a main parameter as the fp32 weight that it is; ``weight`` is the saved bf16 one, widened."""
    return saved if saved.dtype is torch.float32 else _like(weight, join(_part_of(weight).bfloat16(), _part_of(saved)))
