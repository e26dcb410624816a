"""State dicts of a sharded optimizer: one rank's fragments or whole tensors, and back, if they fit."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from sharded_dadamw.buckets.bucket import Bucket
from sharded_dadamw.comm.calls import enter
from sharded_dadamw.comm.collectives import BackendVerbs, Collectives
from sharded_dadamw.comm.dtensors import like_parameter
from sharded_dadamw.layout.parameters import NamedParameter
from sharded_dadamw.layout.placement import local
from sharded_dadamw.state.in_place import is_fragment
from sharded_dadamw.state.piece import Piece, pieces_of
from sharded_dadamw.update.precision import takes
from sharded_dadamw.update.storage import MAINS

_Pairs = list[tuple[Tensor, Tensor]]
"""Live tensors, each with the saved one that belongs into it, of its shape or a 0; the live one can hold its values."""


class ShownState:
    """What ``optimizer.state`` shows of buckets, whose tensors others may replace or take away.

    It is changed in place and never replaced, since proxies of an optimizer share it.
    """

    def __init__(self) -> None:
        self._pieces: dict[Tensor, tuple[str, dict[str, Piece]]] = {}  # by parameter its name and what there is of it
        self._entries: list[dict[str, Tensor]] = []
        self._tensors: list[Tensor] = []

    def show(self, bucket: Bucket, state: MutableMapping[Tensor, Any]) -> None:
        """Put the live tensors of a bucket into ``state``."""
        for slot, member in enumerate(bucket.members):
            pieces = pieces_of(bucket, slot)
            self._pieces[member.param] = member.name, pieces
            self._entries.append(_live(pieces))
            self._tensors += self._entries[-1].values()
            state[member.param] = self._entries[-1]

    def take_back(self, state: MutableMapping[Tensor, Any]) -> bool:
        """Copy what is in the place of live tensors into them, and clear those of parameters that have no entry.

        ``state`` then shows live tensors again. Main parameters are not cleared, and yield to weights that they do not
        round to. Returns whether there was anything. A ValueError names what does not fit, and nothing has changed.
        """
        if self._are_as_shown(state):
            return False
        pairs: _Pairs = []
        for param, (name, pieces) in self._pieces.items():
            entry = state.get(param)
            if not entry:
                pairs += [(piece.live, piece.live.new_zeros(())) for key, piece in pieces.items() if key not in MAINS]
            elif entry.keys() != pieces.keys():
                raise ValueError(f"state of {name}: expected entries {sorted(pieces)}, or none, got {sorted(entry)}")
            else:
                pairs += [pair for key, piece in pieces.items() for pair in _match_replaced(piece, entry[key])]
        _copy(pairs)
        self.restore(state)
        return bool(pairs)

    def _are_as_shown(self, state: MutableMapping[Tensor, Any]) -> bool:
        """Whether ``state`` is what was put there; no parameter is looked up, which takes 1 us each."""
        shown = chain(self._pieces, self._entries)
        if len(state) != len(self._entries) or not all(map(is_, chain(state, state.values()), shown)):
            return False
        values = [*chain.from_iterable(map(dict.values, self._entries))]
        return len(values) == len(self._tensors) and all(map(is_, values, self._tensors))

    def restore(self, state: MutableMapping[Tensor, Any]) -> None:
        """Have ``state`` show the live tensors, and nothing else of their parameters."""
        self._entries = [_live(pieces) for _, pieces in self._pieces.values()]
        for param, entry in zip(self._pieces, self._entries, strict=True):
            state.pop(param, None)  # so that they are in this order
            state[param] = entry


def _copy(pairs: _Pairs) -> None:
    """Copy values into live tensors; some may be live ones themselves, as where two parameters swap theirs."""
    written = {live.untyped_storage().data_ptr() for live, _ in pairs}
    apart = [value.clone() if value.untyped_storage().data_ptr() in written else value for _, value in pairs]
    for (live, _), value in zip(pairs, apart, strict=True):
        live.copy_(value)


def _live(pieces: Mapping[str, Piece]) -> dict[str, Tensor]:
    return {key: piece.live for key, piece in pieces.items()}


def _match_replaced(piece: Piece, value: Any) -> _Pairs:
    """As ``_match_piece``, of a value in the place of this rank's fragment, and perhaps of its shape."""
    if torch.is_tensor(value) and value.shape == piece.live.shape and takes(piece.live.dtype, value):
        return [] if value.data_ptr() == piece.live.data_ptr() else [(piece.live, value)]
    return _match_piece(piece, value)


def fragments_of(buckets: Sequence[Bucket], collectives: Collectives) -> dict[int, dict[str, Tensor]]:
    """This rank's state by parameter index, each tensor in the shape of the whole. Not collective, and copies nothing.

    They are views of the live state, as ``FragmentTensor``; on one rank,
    which has all, plain tensors or the DTensors that the parameters are.
    """
    wrap: Callable[..., Tensor] = _as_plain
    if collectives.num_ranks > 1:
        # Importing DTensors takes a second, and who never saves can do without.
        made_of: Any = importlib.import_module("sharded_dadamw.state.fragment_tensor").FragmentTensor.of
        ranks = collectives.everyone
        assert isinstance(ranks, BackendVerbs)
        # Meshes of equal ranks are equal to torch, which then takes the group of one for the other's; but for the name.
        name = (ranks.group.group_name,)
        mesh = DeviceMesh.from_group(ranks.group, ranks.device.type, mesh_dim_names=name)
        wrap = partial(made_of, mesh=mesh, ranks=collectives)
    state = {
        member.index: {key: wrap(piece, like=member.param) for key, piece in pieces_of(bucket, slot).items()}
        for bucket in buckets
        for slot, member in enumerate(bucket.members)
    }
    return dict(sorted(state.items()))


def _as_plain(piece: Piece, *, like: Tensor) -> Tensor:
    part = piece.live.view(piece.part_shape)
    return like_parameter(part, like) if piece.shape == tuple(like.shape) else part


def gather_state(buckets: Sequence[Bucket], collectives: Collectives, *, to: int) -> dict[int, dict[str, Tensor]]:
    """The state of whole parameters, for rank ``to``. Collective; needs memory for one more flat buffer at a time.

    Returns:
        Per parameter index ``step`` [] and, in the parameter's shape, the other state: copies in host memory; DTensors
        where the parameter is one. Empty on the other ranks.
    """
    enter("consolidate_state_dict()")
    if not 0 <= to < collectives.num_ranks:
        raise ValueError(f"to: expected a rank in [0, {collectives.num_ranks}), got {to}")
    keep = to == collectives.rank
    state: dict[int, dict[str, Tensor]] = {}
    for bucket in buckets:
        layout = bucket.layout
        if keep:
            for slot, member in enumerate(bucket.members):
                state[member.index] = {"step": bucket.counts[slot].to("cpu", copy=True)}
        for name, shard in bucket.state_shards.items():
            buffer = torch.empty(layout.numel, dtype=shard.dtype, device=bucket.weights.shard.device)
            buffer[slice(*layout.shard_range(bucket.rank))].copy_(shard)
            collectives.all_gather_(buffer.view(torch.uint8)).wait()  # bytes: not every backend knows int16
            if keep:
                for member, part in zip(bucket.members, bucket.arrangement.views(buffer), strict=True):
                    state[member.index][name] = like_parameter(part, member.param, copies=True)
    return dict(sorted(state.items()))


def load_into(
    buckets: Sequence[Bucket],
    groups: Sequence[dict[str, Any]],
    frozen: Sequence[NamedParameter],
    state_dict: Mapping[str, Any],
) -> None:
    """Copy saved state into that of buckets, and saved hyperparameters into their groups; all or nothing.

    The state dict may be what ``state_dict()`` returned, and perhaps ``torch.distributed.checkpoint`` has loaded since:
    this rank's fragments; or whole tensors, from any number of ranks, from ``DecoupledAdamW``, torch's AdamW or
    Composer's optimizer. Fragments that were left out of a partial load stay as they are, but for main parameters:
    where nothing was saved of one, it is taken from the weight. A ValueError names the first difference; a warning says
    that there is state of ``frozen`` parameters, which have no bucket.
    """
    saved_groups = state_dict["param_groups"]
    sizes, saved_sizes = ([len(group["params"]) for group in side] for side in (groups, saved_groups))
    if sizes != saved_sizes:
        raise ValueError(f"parameters per group: expected {sizes}, got {saved_sizes}")
    for index, (group, saved_group) in enumerate(zip(groups, saved_groups, strict=True)):
        if group["amsgrad"] != saved_group.get("amsgrad", group["amsgrad"]):
            raise ValueError(
                f"param_groups[{index}]['amsgrad']: expected {group['amsgrad']}, got {saved_group['amsgrad']}"
            )
    saved = [state_dict["state"].get(key, {}) for group in saved_groups for key in group["params"]]
    pairs: _Pairs = []
    for bucket in buckets:
        bucket.weights.refresh_()
        for slot, member in enumerate(bucket.members):
            pairs += _match(bucket, slot, saved[member.index])
    if dropped := [member.name for member in frozen if saved[member.index]]:
        warnings.warn(
            f"the state of {len(dropped)} parameters, such as {dropped[0]}, is left out, since they were frozen when "
            "the optimizer was built; unfreeze them before that to go on with it",
            stacklevel=4,  # who called load_state_dict, behind the decorator of that
        )
    _copy(pairs)
    for group, saved_group in zip(groups, saved_groups, strict=True):
        for key, value in saved_group.items():
            if key not in ("params", "param_names", "decoupled_weight_decay"):
                group[key] = copy.deepcopy(value)


def _match(bucket: Bucket, slot: int, saved: Mapping[str, Any]) -> _Pairs:
    name = bucket.members[slot].name
    pieces = pieces_of(bucket, slot)
    # Whoever saved it may have kept no main parameter: ours is then the weight. Or it was never stepped: all zeros.
    # What ours was by then is another run's, even where both runs' weights round to the same.
    missing = [key for key in pieces if key not in saved and saved and key not in MAINS]
    surplus = [key for key in saved if key not in pieces and key not in MAINS]
    if missing or surplus:
        raise ValueError(f"state of {name}: expected entries {sorted(pieces)}, got {sorted(saved)}")
    mains, saved_mains = ({key for key in side if key in MAINS} for side in (pieces, saved))
    if mains and saved_mains and mains != saved_mains:
        raise ValueError(
            f"state of {name}: expected {mains.pop()}, got {saved_mains.pop()}; choose the main_parameter of the "
            "ShardingConfig that saved it, or use load_checkpoint, which has the weight too and converts"
        )
    is_loaded = any(is_fragment(value) and value.loaded is not None for value in saved.values())
    pairs: _Pairs = []
    for key, piece in pieces.items():
        matched = _match_piece(piece, saved[key]) if key in saved else []
        if key in MAINS and not matched and (key not in saved or is_loaded):
            matched = [(piece.live, bucket.main_of_weight(slot))]
        elif key not in saved:
            matched = [(piece.live, piece.live.new_zeros(()))]
        pairs += matched
    return pairs


def _match_piece(piece: Piece, saved: Any) -> _Pairs:
    """The pair of a live tensor and what was saved; none where that is the live tensor itself."""
    name, live, stop = f"state of {piece.name}", piece.live, piece.start + piece.live.numel()
    if is_fragment(saved):
        _, saved_start, saved_stop = saved.span
        if (tuple(saved.shape), saved_start, saved_stop) != (piece.shape, piece.start, stop):
            raise ValueError(
                f"{name}: expected elements [{piece.start}:{stop}] of {list(piece.shape)}, got "
                f"[{saved_start}:{saved_stop}] of {list(saved.shape)}, another rank's or another layout's; go through "
                "torch.distributed.checkpoint, or load whole tensors"
            )
        values = saved.fragment if saved.loaded is None else saved.loaded
    else:
        whole = local(torch.as_tensor(saved))
        if tuple(whole.shape) != piece.part_shape:
            raise ValueError(f"{name}: expected {list(piece.part_shape)}, got {list(whole.shape)}")
        values = whole.reshape(-1)[piece.start : stop]
    if not takes(live.dtype, values if live.dim() else values.view(())):
        raise ValueError(f"{name}: expected {live.dtype}, got {values.dtype}, which would be rounded")
    is_live = values.numel() > 0 and values.data_ptr() == live.data_ptr()
    return [] if is_live else [(live, values.view(live.shape))]
