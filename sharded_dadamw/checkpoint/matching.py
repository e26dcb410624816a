"""Whether what was saved fits a run, and what was read as the run takes it.

Everything that is compared here is compared before anything is read, and raises by name. Parameters, and groups of
them, are found by name, in whatever order they were saved; a main parameter changes its form where it has to.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.optim import Optimizer

from sharded_dadamw.checkpoint.manifest import IS_DECOUPLED
from sharded_dadamw.checkpoint.named_state import name_of, tied
from sharded_dadamw.checkpoint.names import canonical_name
from sharded_dadamw.checkpoint.saved_entries import SavedEntries, part_of, placeholders
from sharded_dadamw.layout.placement import like_parameter, local
from sharded_dadamw.state.fragment_tensor import FragmentTensor
from sharded_dadamw.update.precision import join, remainder_of


def _holds_nothing(value: Any) -> bool:
    """Whether it has no entry in a checkpoint, such as the extra state of a module that has none."""
    return isinstance(value, Mapping) and all(map(_holds_nothing, value.values()))


def _match_names(live: Iterable[str], saved: Iterable[str], folder: Path) -> dict[str, str]:
    """Which saved name every live one has: the same, or the same without what wrappers add."""
    saved = dict.fromkeys(saved)
    canonical = {canonical_name(name): name for name in saved}
    names = {name: name if name in saved else canonical.get(canonical_name(name)) for name in live}
    missing = [name for name, found in names.items() if found is None]
    left_over = sorted(saved.keys() - set(names.values()))
    doubled = [name for name, found in names.items() if name != found and found in names]
    if doubled and not missing:
        raise ValueError(
            f"model: expected {folder} to have {doubled[0]} and {names[doubled[0]]}, got one weight of that name; "
            "rename one of them"
        )
    if missing or left_over:
        raise ValueError(
            f"model: expected {folder} to have what the model has; "
            + "; ".join(
                f"{len(some)} {what}, the first is {some[0]}"
                for some, what in ((missing, "missing"), (left_over, "left over"))
                if some
            )
        )
    return {name: found for name, found in names.items() if found is not None}


def match_model(
    saved: SavedEntries, model: nn.Module, state: Mapping[str, Any], entries: dict[str, Any]
) -> dict[str, str]:
    """Add what to read of a model to ``entries``; returns by live name the one under which it is stored.

    Args:
        saved: What there is.
        model: Whose ties count.
        state: Its live state, by name.
        entries: By flat name, what to read each entry into.

    Raises:
        ValueError: A name is missing or left over, a tensor does not fit, or ties differ; names it.
    """
    held = [name for name, value in state.items() if name in saved.under("model") or not _holds_nothing(value)]
    names = _match_names(held, saved.under("model"), saved.folder)
    names = {live: saved.first(name) for live, name in names.items()}
    for live in held:
        value, node = state[live], saved.under("model")[names[live]]
        if not isinstance(value, Tensor):
            entries.update(placeholders(saved, node))
        elif not isinstance(node, str):
            raise ValueError(f"model.{live}: expected a tensor, got something else in {saved.folder}")
        elif node not in entries:
            entries[node] = saved.target(node, value)
    for same in tied(model):
        stored = dict.fromkeys(names[name] for name in same if name in names)
        if len(stored) > 1:
            saved.tie(list(stored))
    return {live: saved.first(name) for live, name in names.items()}


_OTHER_FORM = {"main_param": ("main_remainder", torch.float32), "main_remainder": ("main_param", torch.int16)}
"""The forms of a main parameter: which one is the other, and the dtype of this one."""


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    """Values of this rank's part of a tensor as that is: a fragment, a DTensor or whole."""
    if isinstance(tensor, FragmentTensor):
        return tensor.holding(values)
    return like_parameter(values.view(local(tensor).shape), tensor)


def _empty(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Host memory for values of another dtype of this rank's part of a tensor."""
    return _like(tensor, torch.empty_like(part_of(tensor), dtype=dtype, device="cpu"))


def _in_own_form(live: Tensor, saved: Tensor | None, weight: Tensor) -> Tensor:
    """A main parameter that was saved in the other form or, where none was, as the weight is; no bit is lost.

    Args:
        live: The live one.
        saved: What was read.
        weight: The weight that was read.
    """
    part = part_of(weight)
    if isinstance(live, FragmentTensor):
        _, start, stop = live.span
        part = part[start:stop]
    if live.dtype is not torch.int16:
        return _like(live, part.to(live.dtype) if saved is None else join(part, part_of(saved)))
    return _like(
        live, torch.zeros_like(part, dtype=live.dtype) if saved is None else remainder_of(part_of(saved), part)
    )


def _as_weight(saved: Tensor, weight: Tensor) -> Tensor:
    """A main parameter as the fp32 weight that it is; ``weight`` is the saved bf16 one, widened."""
    return saved if saved.dtype is torch.float32 else _like(weight, join(part_of(weight).bfloat16(), part_of(saved)))


_SCALES = {None: "", True: " (which does not scale with lr)", False: " (which scales with lr)"}


def _match_laws(saved: SavedEntries, live: str) -> None:
    """Look whether weight decay means the same: the entry has one name and the numbers differ by a factor of lr."""
    was, now = IS_DECOUPLED.get(saved.optimizer), IS_DECOUPLED.get(live)
    if not saved.decays or saved.optimizer in ("", live) or was == now:
        return
    if was is not None and now is not None:
        target = "NEW --from torch" if now else "NEW.pt --from sharded-dadamw"
        hint = f"convert it: sharded-dadamw convert {saved.folder} {target}"
    else:
        hint = "nothing is known of how these compare, so pass optimizer=None to load the rest"
    raise ValueError(
        f"weight_decay: expected that of {live}{_SCALES[now]}, got that of {saved.optimizer}{_SCALES[was]} in "
        f"{saved.folder}; {hint}"
    )


def _match_groups(saved: SavedEntries, groups: Iterable[Mapping[str, Any]], names: Mapping[str, str]) -> list[int]:
    """Which saved group every live one is: that with the same parameters."""
    ours = [{names[name] for name in group["params"]} for group in groups]
    theirs = [{saved.first(name) for name in group} for group in saved.groups]
    if len(ours) != len(theirs):
        raise ValueError(f"param_groups: expected {len(ours)}, got {len(theirs)} in {saved.folder}")
    left, numbers = list(range(len(theirs))), []
    for index, group in enumerate(ours):
        number = max(left, key=lambda number: (theirs[number] == group, len(group & theirs[number]), number == index))
        if differing := sorted(group ^ theirs[number]):
            is_ours = differing[0] in group
            raise ValueError(
                f"param_groups[{index}]: {differing[0]} is {'not ' * is_ours}in this group in {saved.folder}, and "
                f"{'not ' * (not is_ours)}here; build the optimizer with the groups of the saved one"
            )
        left.remove(number)
        numbers.append(number)
    return numbers


def match_optimizer(
    saved: SavedEntries,
    optimizer: Optimizer,
    weights: Mapping[str, Any],
    live: Mapping[str, Any],
    names: Mapping[str, str],
    entries: dict[str, Any],
) -> list[int]:
    """Add what to read of an optimizer to ``entries``; returns for every live group the number of the saved one.

    Args:
        saved: What there is.
        optimizer: Which one takes it.
        weights: The live weights it updates, by name.
        live: Its live state and groups, by names.
        names: What :func:`match_model` returned.
        entries: By flat name, what to read each entry into.

    Raises:
        ValueError: Groups or the entries of a parameter differ, weight decay means something else, or a tensor does not
            fit; names it.
    """
    _match_laws(saved, name_of(optimizer))
    groups: list[dict[str, Any]] = live["param_groups"]
    numbers = _match_groups(saved, groups, names)
    for number in numbers:
        for node in saved.under("optimizer", "param_groups", number).values():
            entries.update(placeholders(saved, node))
    without_main = []
    for name in (name for group in groups for name in group["params"]):
        known, own, weight = saved.under("optimizer", "state", names[name]), live["state"].get(name, {}), weights[name]
        mains = known.keys() & _OTHER_FORM.keys()
        needed = own.keys() - _OTHER_FORM.keys()  # the weight itself will do for a main parameter
        if known and own and needed != known.keys() - mains:
            raise ValueError(
                f"optimizer state of {name}: expected entries {sorted(own)}, got {sorted(known)} in {saved.folder}"
            )
        for key, entry in known.items():
            value = own.get(key)
            if value is None and key in mains:
                other, dtype = _OTHER_FORM[key]
                is_wide = weight.dtype is torch.float32 and not isinstance(weight, ShardedTensor)
                like = own.get(other, weight if is_wide else None)
                if like is None:
                    without_main.append(name)
                    continue
                value = _empty(like, dtype)
            elif value is None and isinstance(empty := saved.placeholder(entry), Tensor):
                is_like = empty.shape == weight.size() and not isinstance(weight, ShardedTensor)
                value = torch.empty_like(weight, dtype=empty.dtype) if is_like else empty
            entries[entry] = saved.target(entry, value) if isinstance(value, Tensor) else None
    if without_main:
        warnings.warn(
            f"the main parameters of {len(without_main)} parameters, such as {without_main[0]}, are left out, since "
            "this optimizer keeps none: it goes on from weights that were rounded",
            stacklevel=2,
        )
    return numbers


def collect_optimizer(
    saved: SavedEntries,
    live: Mapping[str, Any],
    numbers: Iterable[int],
    names: Mapping[str, str],
    entries: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What was read, as it is taken.

    Args:
        saved: What there was.
        live: The optimizer's live state and groups, by names.
        numbers: What :func:`match_optimizer` returned.
        names: What :func:`match_model` returned.
        entries: By flat name, what each entry was read into.

    Returns:
        The state dict for ``set_optimizer_state_dict``; and, by the name under which they are stored, fp32 weights of
        which bf16 ones and main parameters were saved.
    """
    state, merged, wide = {}, [], {}
    for number, group in zip(numbers, live["param_groups"], strict=True):
        kept = {key: group[key] for key in ("params", "param_names") if key in group}
        merged.append({**group, **saved.collect(entries, "optimizer", "param_groups", number), **kept})
        for name in group["params"]:
            known, own = saved.under("optimizer", "state", names[name]), live["state"].get(name, {})
            if not known:
                continue
            read = {key: entries[entry] for key, entry in known.items() if entry in entries}
            weight = entries[saved.under("model")[names[name]]]
            for key, (other, _) in _OTHER_FORM.items():
                if key in own and key not in read:
                    read[key] = _in_own_form(own[key], read.pop(other, None), weight)
                elif key in read and not own.keys() & _OTHER_FORM.keys():
                    wide[names[name]] = _as_weight(read.pop(key), weight)
            state[name] = read
    return {"state": state, "param_groups": merged}, wide
