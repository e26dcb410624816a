"""What there is to save of a run: state by the names of the bare model, and what each rank has beside it.

What is neither weight nor optimizer state, such as the random generators and the place in the data, each rank packs
into one tensor of bytes.
"""

from __future__ import annotations

import copy
import hashlib
import io
import random
import sys
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import _get_fqns, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.utils._pytree import tree_map, tree_map_only

from sharded_dadamw.base import DecoupledOptimizer
from sharded_dadamw.checkpoint.names import tied
from sharded_dadamw.checkpoint.pickles import load_torch
from sharded_dadamw.comm.collectives import Collectives
from sharded_dadamw.comm.connect import connect
from sharded_dadamw.state.fingerprint import Fingerprint

RANKS = "ranks"
"""The entry of a checkpoint under which every rank's own state is, by rank."""

_MASK = (1 << 63) - 1


def ranks_of(model: nn.Module, process_group: dist.ProcessGroup | DeviceMesh | None) -> Collectives:
    """Return the verbs between the ranks that hold a model, on its device; by default all."""
    params = model.parameters() if isinstance(model, nn.Module) else iter(())  # what is none is refused on all ranks
    device = next((p.device for p in params), torch.device("cpu"))
    return connect(process_group, device, exchange=None)


def refuse_parts(model: nn.Module, optimizers: Iterable[Optimizer]) -> Exception | None:
    """Return what is wrong with a model and optimizers of its parameters; None if nothing is."""
    if not isinstance(model, nn.Module):
        return TypeError(f"model: expected a torch.nn.Module, got {model!r:.80}")
    known = {id(param) for param in model.parameters()}
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            return TypeError(f"optimizer: expected a torch.optim.Optimizer, got {optimizer!r:.80}")
        strange = [param for group in optimizer.param_groups for param in group["params"] if id(param) not in known]
        if strange:
            return ValueError(
                f"optimizer: expected parameters of the model, got {len(strange)} that it does not have, the first of "
                f"shape {list(strange[0].shape)}; pass the model that the optimizer was built for"
            )
    return None


def model_state(model: nn.Module) -> tuple[dict[str, Any], list[list[str]]]:
    """Return what to save of a model, tied weights under their first name alone, and which names are tied."""
    state = get_model_state_dict(model)
    aliases = [same for same in ([name for name in names if name in state] for names in tied(model)) if len(same) > 1]
    for _, *others in aliases:
        for name in others:
            del state[name]
    return state, aliases


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], bool]:
    """Return an optimizer's state by names, and whether it has ever stepped. The optimizer is left as it is.

    torch's function has an optimizer without state take a step with zero gradients. Its first real step would then be
    corrected for the bias of a second, so what that leaves behind in the optimizer is removed.
    """
    has_stepped = bool(optimizer.state)
    if isinstance(optimizer, DecoupledOptimizer):
        optimizer.state_dict()  # the next one is of fragments, on the rank, too, to which the whole was consolidated
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    state["param_groups"] = _with_own_numbers(state["param_groups"])
    if not has_stepped:
        optimizer.state.clear()
    return state, has_stepped


def fingerprint_of(
    model: nn.Module, optimizer: Optimizer, ranks: Collectives, *, called: Mapping[str, str] = MappingProxyType({})
) -> Fingerprint | None:
    """Return an optimizer's fingerprint by names of the bare model, or by what they are ``called``. Collective.

    None where it cannot have one: it is none of ours, or FSDP1 has flattened its parameters. Replicas that differ are a
    RuntimeError.
    """
    if not isinstance(optimizer, DecoupledOptimizer):
        return None
    names = {id(param): next(iter(_get_fqns(model, name))) for name, param in model.named_parameters()}
    try:
        return optimizer._fingerprint(ranks, {key: called.get(name, name) for key, name in names.items()})
    except ValueError:
        return None


def require_plain(weights: Mapping[str, Any], groups: Iterable[Mapping[str, Any]]) -> None:
    """Check that what is saved beside tensors could be read back without running code; a ValueError names what not."""
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            pack(f"model, {name}", value)
            if not holds_nothing(value):  # which has no entry, and is no difference either
                _require_entries(f"model, {name}", value)
    for index, group in enumerate(groups):
        for key, value in group.items():
            if not isinstance(value, Tensor):
                pack(f"param_groups[{index}][{key!r}]", value)
                _require_entries(f"param_groups[{index}][{key!r}]", value)


def holds_nothing(value: Any) -> bool:
    """Return whether a value has no entry in a checkpoint, such as the extra state of a module that has none."""
    return isinstance(value, Mapping) and all(map(holds_nothing, value.values()))


def _require_entries(label: str, value: Any) -> None:
    """Check that nothing would be lost: torch.distributed.checkpoint makes texts of keys, and drops empty dicts."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    if isinstance(value, Mapping) and not value:
        raise ValueError(f"{label}: expected dicts with something in them, got an empty one, which would be lost")
    for key, item in items:
        if isinstance(value, Mapping) and not isinstance(key, str):
            raise ValueError(f"{label}: expected texts as keys of dicts, got {key!r}, which would come back as a text")
        _require_entries(label, item)


def on_host(state: dict[str, Any]) -> dict[str, Any]:
    """Copy a state dict into host memory that it shares with nothing."""

    def copied(value: Any) -> Any:
        return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)

    return tree_map(copied, state)  # type: ignore[no-any-return]


def _with_own_numbers(value: Any) -> Any:
    """Return the same with Python's numbers for NumPy's, which schedules compute, and torch does not load."""
    numpy = sys.modules.get("numpy")
    return value if numpy is None else tree_map_only(numpy.generic, lambda number: number.item(), value)


def pack(label: str, value: Any) -> Tensor:
    """Serialise numbers, NumPy's too, texts, None, tensors, and containers of them into [n] uint8.

    Anything else is a ValueError, which calls it ``label``, since reading it back could run code.
    """
    file = io.BytesIO()
    try:
        torch.save(_with_own_numbers(value), file)
        load_torch(file, placeholders=False)
    except Exception as error:  # anything in it may object to being pickled, in its own way
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{label}: expected numbers, texts, tensors, and lists, tuples and dicts of them, got "
            f"{type(value).__name__} that could not be read back safely ({reason}); leave out or convert what is none "
            "of these"
        ) from error
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def unpack(packed: Tensor) -> Any:
    """Return what ``pack`` was given; nothing in it is run."""
    return load_torch(io.BytesIO(bytes(packed.tolist())), placeholders=False)


def random_state() -> dict[str, Any]:
    """Return the state of Python's, torch's and, if it has been imported, NumPy's global generators, as plain data."""
    state: dict[str, Any] = {
        "seed": torch.initial_seed() & _MASK,
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()  # of the current device, which is this rank's
    if (numpy := sys.modules.get("numpy")) is not None:
        kind, key, position, has_gauss, gauss = numpy.random.get_state()
        state["numpy"] = (str(kind), key.tolist(), int(position), int(has_gauss), float(gauss))
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators where they were; those that were not there then, or are not now, are left alone."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "numpy" in state and (numpy := sys.modules.get("numpy")) is not None:
        kind, key, position, has_gauss, gauss = state["numpy"]
        numpy.random.set_state((kind, numpy.array(key, dtype=numpy.uint32), position, has_gauss, gauss))


def seed_from(state: dict[str, Any], step: int, rank: int) -> None:
    """Seed the generators of a rank that the saved run did not have: from rank 0's seed, the step and the rank."""
    text = f"{state['seed']} {step} {rank}".encode()
    seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") & _MASK
    random.seed(seed)
    torch.manual_seed(seed)  # of CUDA's generators too
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed & 0xFFFFFFFF)
