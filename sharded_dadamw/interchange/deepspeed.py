"""Checkpoint folders of DeepSpeed's ZeRO stages 1 and 2, read without DeepSpeed.

    FOLDER/latest                                           the name of the newest TAG
    FOLDER/TAG/mp_rank_00_model_states.pt                   weights; names and shapes in the order of the flat groups
    FOLDER/TAG/[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt        rank R's part of every flat group

A flat group is the group's parameters laid end to end, each followed by what `param_alignment_paddings` says, with
padding at the very end; rank R has the R-th of equal parts, and of the fp32 values without the padding at the end.

        | param 0      |pad| param 1                  | param 2   |pad
        | rank 0             | rank 1             | rank 2             |
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharded_dadamw.checkpoint.names import canonical_name
from sharded_dadamw.checkpoint.pickles import load_torch
from sharded_dadamw.interchange.contents import State
from sharded_dadamw.interchange.files import read_text
from sharded_dadamw.interchange.state_dicts import checked_entries, imported_group, unstepped
from sharded_dadamw.update.storage import MOMENTS

_PARTITION = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_\d+_)?mp_rank_(\d+)_model_states\.pt")
_FP32 = "single_partition_of_fp32_groups"
_STAGE_3 = (
    "expected ZeRO stage 1 or 2, got stage 3, whose weights are spread over ranks as well; load it in DeepSpeed and "
    "save it from stage 1 or 2"
)


def from_deepspeed(path: str | os.PathLike[str], *, peak_lr: float | None = None) -> tuple[State, dict[str, Tensor]]:
    """Read state and weights from a checkpoint of DeepSpeed's ZeRO stage 1 or 2 over AdamW.

    Needs memory for the state, and for one kind of state of one group again.

    Args:
        path: The folder that was given to `save_checkpoint`, of which the newest tag is taken, or that of a tag.
        peak_lr: As in `from_torch`; DeepSpeed's own schedulers leave no `initial_lr`.

    Returns:
        The form in the middle (see `interchange`), in which parameters narrower than fp32 have a `main_param`; and the
        model's state dict, under canonical names, frozen parameters and buffers included, in the model's dtypes. Of
        tied parameters one has the state, as in DeepSpeed, and all are among the weights.

    Raises:
        ValueError: If it is no such folder, is not whole, holds more than data, or is of stage 3, of a model that is
            itself spread over ranks, or of another optimizer than AdamW.
    """
    folder, model, partitions = _opened(path)
    weights = {canonical_name(n): t for n, t in model["module"].items() if isinstance(t, Tensor)}
    order = {name: index for index, name in enumerate(weights)}
    by_rank = [partition["base_optimizer_state"] for partition in partitions]
    groups = by_rank[0]["param_groups"]
    if len(groups) != len(model["param_shapes"]):
        raise ValueError(f"{folder}: expected {len(model['param_shapes'])} parameter groups, got {len(groups)}")
    if _is_adam(model) and any(group["weight_decay"] for group in groups):
        raise ValueError(f"{folder}: expected AdamW's weight decay, got Adam's (adam_w_mode is off)")
    state: dict[str, dict[str, Tensor]] = {}
    ours = []
    for index, (group, named) in enumerate(zip(groups, model["param_shapes"], strict=True)):
        where = f"{folder}, param_groups[{index}]"
        shapes = {canonical_name(str(name)): torch.Size(shape) for name, shape in named.items()}
        missing = sorted(set(shapes) - set(order))
        if missing:
            raise ValueError(f"{where}: expected the weights of every parameter, got none of {missing[0]}")
        names = sorted(shapes, key=order.__getitem__)  # round_robin_gradients lays them otherwise
        ours.append(imported_group(group, where, names, coupled=True, peak_lr=peak_lr))
        amsgrad = ours[-1]["amsgrad"]
        entries = [_entries(base, index) for base in by_rank]
        kinds = [key for key in entries[0] if key != "step"]
        if set(kinds) - set(MOMENTS) or (kinds and not {"exp_avg", "exp_avg_sq"} <= set(kinds)):
            raise ValueError(
                f"{where}: expected AdamW's exp_avg and exp_avg_sq, got another optimizer's "
                f"{', '.join(map(str, kinds))}"
            )
        steps = {float(of_rank["step"]) for of_rank in entries if of_rank.get("step") is not None}
        if len(steps) > 1:
            raise ValueError(f"{folder}: expected the same step on every rank, got {sorted(steps)}")
        parts = {kind: [of_rank.get(kind) for of_rank in entries] for kind in kinds}
        parts[_FP32] = [partition[_FP32][index] for partition in partitions]
        paddings = partitions[0].get("param_alignment_paddings")
        after = paddings[index] if paddings is not None else [0] * len(shapes)
        whole = {kind: _unflattened(where, kind, of_ranks, shapes, after) for kind, of_ranks in parts.items()}
        for name in names:
            found = {"step": max(steps, default=0.0), **{kind: whole[kind][name] for kind in kinds}}
            main = whole[_FP32][name]
            state[name] = checked_entries(name, found, amsgrad) if kinds else unstepped(main, amsgrad)
            if weights[name].dtype.itemsize < torch.float32.itemsize:
                state[name]["main_param"] = main
    return {"state": dict(sorted(state.items(), key=lambda item: order[item[0]])), "param_groups": ours}, weights


def _entries(base: Mapping[str, Any], group: int) -> dict[str, Any]:
    """Return `step` and flat tensors of a rank's part of a group, [padded]; nothing before the first step.

    Some optimizers keep the number of updates beside each tensor and others in the group.
    """
    options = base["param_groups"][group]
    entries = base["state"].get(options["params"][0], {}) if options["params"] else {}
    return {**({"step": options["step"]} if entries and "step" in options else {}), **entries}


def _opened(path: str | os.PathLike[str]) -> tuple[Path, Mapping[str, Any], list[Mapping[str, Any]]]:
    """Return the folder, what its model's file holds, and each rank's `optimizer_state_dict`; tensors are mapped."""
    folder = Path(path)
    if (folder / "latest").is_file():
        tag = read_text(folder / "latest").strip()
        if tag not in {entry.name for entry in folder.iterdir() if entry.is_dir()}:
            raise ValueError(f"{folder / 'latest'}: expected the name of a folder beside it, got {reprlib.repr(tag)}")
        folder = folder / tag
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    models = [match for name in names if (match := _MODEL.fullmatch(name))]
    found = [match for name in names if (match := _PARTITION.fullmatch(name))]
    if not models:
        raise ValueError(f"expected a checkpoint folder of DeepSpeed's, with a file *_model_states.pt, got {folder}")
    pieces = {int(match[2]) for match in found} | {int(match[1]) for match in models}
    if any("expert" in name for name in names) or pieces != {0}:
        raise ValueError(
            f"{folder}: expected a whole model on every rank, got one that is spread over ranks (tensor or pipeline "
            "parallel, or experts)"
        )
    if "mp_rank_00_model_states.pt" not in names:
        raise ValueError(f"{folder}: {_STAGE_3}")
    if not found:
        raise ValueError(f"{folder}: expected partitions of the optimizer's state, *_optim_states.pt, got none of them")
    by_rank = {int(match[1]): folder / match[0] for match in found}
    counts = _partition(by_rank[min(by_rank)])["partition_count"]
    num_ranks = max(counts) if isinstance(counts, Sequence) else int(counts)
    if set(by_rank) != set(range(num_ranks)):
        missing = ", ".join(map(str, sorted(set(range(num_ranks)) - set(by_rank))))
        got = f"none of rank {missing}" if missing else f"{len(by_rank)}, of which some are left from another save"
        raise ValueError(f"{folder}: expected files of {num_ranks} ranks, one of each, got {got}")
    model = load_torch(folder / "mp_rank_00_model_states.pt")
    if not isinstance(model, Mapping) or not isinstance(model.get("param_shapes"), list) or not model.get("module"):
        raise ValueError(f"{folder}: expected names and shapes of the parameters in the model's file, got none")
    return folder, model, [_partition(by_rank[rank]) for rank in range(num_ranks)]


def _partition(path: Path) -> Mapping[str, Any]:
    contents = load_torch(path)
    state = contents.get("optimizer_state_dict") if isinstance(contents, Mapping) else None
    if isinstance(state, Mapping) and (state.get("zero_stage", 1) == 3 or "fp32_flat_groups" in state):
        raise ValueError(f"{path}: {_STAGE_3}")
    if not isinstance(state, Mapping) or not {_FP32, "partition_count", "base_optimizer_state"} <= state.keys():
        raise ValueError(f"{path}: expected a partition of DeepSpeed's optimizer state, got something else")
    if not isinstance(state["base_optimizer_state"], Mapping):
        raise ValueError(
            f"{path}: expected the optimizer's hyperparameters beside its state, got a checkpoint saved with "
            "elastic_checkpoint, which has none; save it without"
        )
    return state


def _is_adam(model: Mapping[str, Any]) -> bool:
    """Return whether it is not AdamW, which DeepSpeed's own optimizer says in the configuration only."""
    found: Any = model
    for key in ("ds_config", "optimizer", "params", "adam_w_mode"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found is False


def _unflattened(
    where: str, kind: str, parts: Sequence[Any], shapes: Mapping[str, torch.Size], paddings: Sequence[int]
) -> dict[str, Tensor]:
    """Return the parameters of one kind of one group, each [shape], cut out of all ranks' parts."""
    if not all(isinstance(part, Tensor) for part in parts):
        raise ValueError(f"{where}: expected {kind} on every rank, got some without")
    flat = torch.cat([part.reshape(-1) for part in parts])
    cut = {}
    offset = 0
    for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
        numel = shape.numel()
        if offset + numel > flat.numel():
            raise ValueError(
                f"{where}, {kind} of {name}: expected {numel} elements from {offset} on, got {flat.numel()} in all"
            )
        cut[name] = flat[offset : offset + numel].view(shape).clone()
        offset += numel + padding
    return cut
