"""One rank's fragment of a state tensor, in the shape of the whole, as ``state_dict()`` hands it out.

To ``torch.distributed.checkpoint`` it is the parameter's state, by name and in its global shape, of which this rank
holds some boxes; so whoever loads it may be cut in any other way, or not at all. Nothing is gathered or copied to make
one. It is a ``DTensor``, since that is what torch's own tools ask for where tensors are spread over ranks:

    dcp.save, dcp.async_save             each rank writes its boxes            (__create_write_items__)
    dcp.load                             reads them into memory of their own   (__create_chunk_list__)
    load_state_dict                      takes them over, all or nothing       (``loaded``)
    full_tensor(), full_state_dict=True  gathers one tensor at a time          (``redistribute``)
    arithmetic, torch.save, to_local()   an error: it would be of this rank's fragment alone
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from sharded_dadamw.comm.collectives import Collectives
from sharded_dadamw.layout.boxes import Box, boxes_of
from sharded_dadamw.state.piece import Piece
from sharded_dadamw.update.precision import takes

_SENT_AS = {torch.int16: torch.float16}
"""Dtypes that backends do not send, and others of that size, as which their bits arrive unchanged."""


class FragmentTensor(DTensor):
    """A tensor of which this rank holds a range of the flattened elements of its local part.

    The local part is all of it, unless the parameter is a DTensor itself. See the module for what can be done with it.
    """

    _piece: Piece
    _offsets: tuple[int, ...]
    _ranks: weakref.ReferenceType[Collectives]
    _loaded: Tensor | None

    @classmethod
    def of(cls, piece: Piece, *, like: Tensor, mesh: DeviceMesh, ranks: Collectives) -> FragmentTensor:
        """Wrap what this rank holds, without copying it; cut and spread like the parameter, where that is a DTensor.

        Else ``mesh`` has the ranks that hold the same local part, as do ``ranks``, for ``redistribute``.
        """
        placements: Any = (Replicate(),)
        offsets: tuple[int, ...] = (0,) * len(piece.shape)
        if isinstance(like, DTensor) and piece.shape:
            mesh, placements = like.device_mesh, like.placements
            offsets = tuple(like.__create_chunk_list__()[0].offsets)
        spec = _spec_of(mesh, placements, piece.shape, piece.live.dtype)
        made = cls(piece.live.view(-1), spec, requires_grad=False)
        made._piece, made._offsets, made._ranks, made._loaded = piece, offsets, weakref.ref(ranks), None
        return made

    @property
    def loaded(self) -> Tensor | None:
        """1-D: what ``torch.distributed.checkpoint`` has loaded for this fragment; None if it was not asked to."""
        return self._loaded

    @property
    def fragment(self) -> Tensor:
        """1-D: this rank's elements."""
        return self._local_tensor

    @property
    def span(self) -> tuple[tuple[int, ...], int, int]:
        """Which elements these are: the offsets of the local part, and the range within it."""
        return self._offsets, self._piece.start, self._piece.start + self._local_tensor.numel()

    def __create_write_items__(self, fqn: str, object: object) -> list[WriteItem]:
        """This rank's boxes, as ``torch.distributed.checkpoint`` saves them."""
        properties = TensorProperties.create_from_tensor(self._local_tensor)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in (map(self._chunk, self._boxes()) if self._piece.writes else ())
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """This rank's boxes, as ``torch.distributed.checkpoint`` loads them: into memory apart from the live state."""
        self._loaded = torch.empty_like(self._local_tensor, device="cpu")
        return [self._chunk(box) for box in self._boxes()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """The memory of one of the boxes."""
        for box in self._boxes():
            if self._chunk(box).offsets == index.offset:
                values = self._local_tensor if self._loaded is None else self._loaded
                view = values[box.start : box.start + box.numel].view(box.sizes)
                if self._loaded is None:
                    return view
                target = view.as_subclass(_Target)
                target.entry = self._piece.name
                return target
        raise ValueError(f"{self._piece.name}: this rank has no box at {index.offset}")

    def _boxes(self) -> list[Box]:
        part_shape = self._piece.part_shape
        if not math.prod(part_shape):  # or nothing would be known of its name
            return [Box((0,) * len(part_shape), part_shape, 0)] if self._piece.writes else []
        _, start, stop = self.span
        return boxes_of(part_shape, start, stop)

    def _chunk(self, box: Box) -> ChunkStorageMetadata:
        offsets = [first + offset for first, offset in zip(self._offsets, box.offsets, strict=True)]
        return ChunkStorageMetadata(torch.Size(offsets), torch.Size(box.sizes))

    def redistribute(self, *args: Any, **kwargs: Any) -> DTensor:
        """Gather the local part, then go on as any DTensor. Collective; needs memory for one tensor."""
        ranks = self._ranks()
        if ranks is None:
            raise RuntimeError(f"{self._piece.name}: the optimizer of this state is gone; gather before that")
        # State may be in host memory, while the ranks reach each other from an accelerator.
        part = torch.zeros(math.prod(self._piece.part_shape), dtype=self.dtype, device=self.device_mesh.device_type)
        _, start, stop = self.span
        part[start:stop].copy_(self._local_tensor)
        # Of an element's bytes those of ranks that do not have it are 0, and all that do have it have the same.
        ranks.everyone.all_reduce_(part.view(torch.uint8), dist.ReduceOp.MAX)
        whole: Any = DTensor.from_local(
            part.view(_SENT_AS.get(self.dtype, self.dtype)).view(self._piece.part_shape),
            self.device_mesh,
            self.placements,
            run_check=False,
            shape=self.shape,
            stride=self.stride(),
        )
        moved: Any = whole.redistribute(*args, **kwargs)
        spread: DTensor = moved.view(self.dtype) if self.dtype in _SENT_AS else moved
        return spread

    def to_local(self, **kwargs: Any) -> NoReturn:
        """Refuse to pass for the whole."""
        raise self._refusal("to_local()")

    def _refusal(self, doing: str) -> RuntimeError:
        _, start, stop = self.span
        return RuntimeError(
            f"{doing} on state_dict() of ShardedDecoupledAdamW, in which each rank has its own part of every tensor: "
            f"of {self._piece.name} elements [{start}:{stop}] of {math.prod(self._piece.part_shape)}. Save with "
            "sharded_dadamw.checkpoint or torch.distributed.checkpoint, or gather all of it, on every rank: "
            "consolidate_state_dict(), full_state_dict=True, or full_tensor()"
        )

    def holding(self, fragment: Tensor, loaded: Tensor | None = None) -> FragmentTensor:
        """The same range with other values, 1-D, perhaps of another dtype, and what was loaded for it."""
        spec = _spec_of(self.device_mesh, self.placements, self.shape, fragment.dtype)
        made = type(self)(fragment, spec, requires_grad=False)
        made.__dict__.update(self.__dict__, _loaded=loaded)
        return made

    def _with(self, change: Callable[[Tensor], Tensor]) -> FragmentTensor:
        return self.holding(change(self._local_tensor), None if self._loaded is None else change(self._loaded))

    def __deepcopy__(self, memo: dict[int, Any]) -> FragmentTensor:
        """A copy with memory of its own."""
        if id(self) not in memo:
            memo[id(self)] = self._with(torch.clone)
        return memo[id(self)]  # type: ignore[no-any-return]

    def __repr__(self, **kwargs: Any) -> Any:  # type: ignore[override]
        """Which elements of what."""
        _, start, stop = self.span
        return f"FragmentTensor({self._piece.name}, {list(self.shape)}, {self.dtype}, [{start}:{stop}] on this rank)"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse ``torch.save`` and ``pickle``: one rank's file would not be the state."""
        raise self._refusal("torch.save, or pickle,")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What can be asked of it, what copies it as it is, and an error for all that would compute with it."""
        kwargs = kwargs or {}
        own = next(arg for arg in (*args, *kwargs.values()) if isinstance(arg, cls))
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            name = f".{func.__self__.__name__}"
        if name in _ANSWERS:
            return _ANSWERS[name](own, *args[1:], **kwargs)
        if name.removeprefix(".") not in _METADATA:
            raise own._refusal(name)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


class _Target(Tensor):
    """Where a box is loaded into; ``copy_`` alone is asked of it, and must not round."""

    entry: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made: Any = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        own = args[0] if args and isinstance(args[0], cls) else None
        if own is None:
            return made
        if func is Tensor.copy_ and not takes(own.dtype, args[1]):
            raise ValueError(f"{own.entry}: expected {own.dtype}, got {args[1].dtype}, which would be rounded")
        if isinstance(made, cls):
            made.entry = own.entry
        return made


_METADATA = frozenset(
    [
        *("shape", "dtype", "device", "layout", "requires_grad", "ndim", "is_leaf", "grad_fn", "grad", "_version"),
        *("nbytes", "itemsize", "is_cpu", "is_cuda", "is_sparse", "is_quantized", "is_nested"),
        *("size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "storage_offset"),
        *("is_contiguous", "is_floating_point", "is_complex", "get_device", "is_pinned", "is_shared"),
        *("__hash__", "__len__"),
    ]
)


def _to(own: FragmentTensor, *args: Any, **kwargs: Any) -> FragmentTensor:
    with torch._C.DisableTorchFunctionSubclass():
        device, dtype, *_ = torch._C._nn._parse_to(*args, **{k: v for k, v in kwargs.items() if k != "copy"})
    if dtype not in (None, own.dtype):
        raise own._refusal(f"to({dtype})")
    if device in (None, own.device) and not kwargs.get("copy"):
        return own
    return own._with(lambda fragment: fragment.to(device or fragment.device, copy=True))


def _new_empty(own: FragmentTensor, size: Sequence[int], *, device: Any = None) -> FragmentTensor:
    if tuple(size) not in (tuple(own.shape), ()):
        raise own._refusal(f"new_empty({tuple(size)})")
    return own._with(lambda fragment: torch.empty_like(fragment, device=device))


_ANSWERS: dict[str, Callable[..., Any]] = {
    # It has no memory of its shape; so torch's broadcast_from_rank0 makes a tensor that has, and writes into that.
    ".is_meta": lambda own: True,
    "data_ptr": lambda own: 0,  # as of any tensor that has no memory but in tensors of its own
    "detach": lambda own: own,
    "contiguous": lambda own: own,
    "clone": lambda own, **kwargs: copy.deepcopy(own),
    "to": _to,
    "cpu": lambda own, **kwargs: _to(own, "cpu"),
    "new_empty": _new_empty,
}


def _spec_of(mesh: DeviceMesh, placements: Any, shape: Sequence[int], dtype: torch.dtype) -> DTensorSpec:
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    return DTensorSpec(mesh, tuple(placements), tensor_meta=TensorMeta(torch.Size(shape), tuple(strides), dtype))
