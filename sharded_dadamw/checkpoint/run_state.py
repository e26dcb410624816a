"""What a rank has beside weights and optimizer state: random generators, its place in the data, its scheduler.

Each rank packs its own into one tensor of bytes, so that it comes back exactly as it was, whatever its structure.
"""

from __future__ import annotations

import hashlib
import io
import random
import sys
from typing import Any

import torch
from torch import Tensor

RANKS = "ranks"
"""The entry of a checkpoint under which every rank's own state is, by rank."""

_MASK = (1 << 63) - 1


def pack(label: str, value: Any) -> Tensor:
    """Serialise plain data: numbers, texts, None, tensors, and containers of them.

    Args:
        label: What it is called in messages.
        value: To be serialised.

    Returns:
        [n] uint8.

    Raises:
        ValueError: It is not plain data, so that reading it back could run code.
    """
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # anything in it may object to being pickled, in its own way
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{label}: expected numbers, texts, tensors, and lists, tuples and dicts of them, got "
            f"{type(value).__name__} that torch.load(weights_only=True) would refuse ({reason}); leave out or convert "
            "what is none of these"
        ) from error
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def unpack(packed: Tensor) -> Any:
    """What :func:`pack` was given; nothing in it is run."""
    return torch.load(io.BytesIO(bytes(packed.tolist())), map_location="cpu", weights_only=True)


def random_state() -> dict[str, Any]:
    """The state of Python's, torch's and, if it has been imported, NumPy's global generators, as plain data."""
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
