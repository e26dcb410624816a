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
from sharded_dadamw.update.precision import takes

_SENT_AS = {torch.int16: torch.float16}
"""Dtypes that backends do not send, and others of that size, as which their bits arrive unchanged."""


class FragmentTensor(DTensor):
    """A tensor of which this rank holds a range of the flattened elements of its local part.

    The local part is all of it, unless the parameter is a DTensor itself. See the module for what can be done with it.
    """

    _name: str
    _start: int
    _part_shape: tuple[int, ...]
    _part_offsets: tuple[int, ...]
    _writes: bool
    _loaded: Tensor | None
    _ranks: weakref.ReferenceType[Collectives] | None

    @classmethod
    def of(
        cls,
        fragment: Tensor,
        *,
        name: str,
        shape: Sequence[int],
        start: int,
        like: Tensor,
        part_shape: Sequence[int],
        mesh: DeviceMesh,
        ranks: Collectives,
        writes: bool = True,
    ) -> FragmentTensor:
        """Wrap a fragment, without copying it.

        Args:
            fragment: 1-D: this rank's elements.
            name: What messages call it.
            shape: Of the whole.
            start: Number of the first element within the flattened local part.
            like: The parameter; where it is a DTensor, this is cut and spread alike.
            part_shape: Of the local part.
            mesh: The ranks that hold the same local part, for a parameter that is no DTensor.
            ranks: The same, for ``redistribute``.
            writes: Whether it falls to this rank to save it; False where another one has the same elements.
        """
        placements: Any = (Replicate(),)
        offsets: tuple[int, ...] = (0,) * len(shape)
        if isinstance(like, DTensor) and shape:
            mesh, placements = like.device_mesh, like.placements
            offsets = tuple(like.__create_chunk_list__()[0].offsets)
        return cls._make(
            fragment,
            _spec_of(mesh, placements, shape, fragment.dtype),
            dict(
                _name=name,
                _start=start,
                _part_shape=tuple(part_shape),
                _part_offsets=offsets,
                _writes=writes,
                _loaded=None,
                _ranks=weakref.ref(ranks),
            ),
        )

    @classmethod
    def _make(cls, fragment: Tensor, spec: DTensorSpec, attributes: dict[str, Any]) -> FragmentTensor:
        made: Any = cls(fragment, spec, requires_grad=False)
        made.__dict__.update(attributes)
        tensor: FragmentTensor = made
        return tensor

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
        return self._part_offsets, self._start, self._start + self._local_tensor.numel()

    def __create_write_items__(self, fqn: str, object: object) -> list[WriteItem]:
        """This rank's boxes, as ``torch.distributed.checkpoint`` saves them."""
        properties = TensorProperties.create_from_tensor(self._local_tensor)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in (map(self._chunk, self._boxes()) if self._writes else ())
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
                target.entry = self._name
                return target
        raise ValueError(f"{self._name}: this rank has no box at {index.offset}")

    def _boxes(self) -> list[Box]:
        if not math.prod(self._part_shape):  # or nothing would be known of its name
            return [Box((0,) * len(self._part_shape), self._part_shape, 0)] if self._writes else []
        _, start, stop = self.span
        return boxes_of(self._part_shape, start, stop)

    def _chunk(self, box: Box) -> ChunkStorageMetadata:
        offsets = [first + offset for first, offset in zip(self._part_offsets, box.offsets, strict=True)]
        return ChunkStorageMetadata(torch.Size(offsets), torch.Size(box.sizes))

    def redistribute(self, *args: Any, **kwargs: Any) -> DTensor:
        """Gather the local part, then go on as any DTensor. Collective; needs memory for one tensor.

        Raises:
            RuntimeError: The optimizer that it came from is gone.
        """
        ranks = None if self._ranks is None else self._ranks()
        if ranks is None:
            raise RuntimeError(f"{self._name}: the optimizer that this state came from is gone; gather before that")
        numel = math.prod(self._part_shape)
        # State may be in host memory, while the ranks reach each other from an accelerator.
        part = torch.zeros(numel, dtype=self.dtype, device=self.device_mesh.device_type)
        _, start, stop = self.span
        part[start:stop].copy_(self._local_tensor)
        # Of an element's bytes those of ranks that do not have it are 0, and all that do have it have the same.
        ranks.everyone.all_reduce_(part.view(torch.uint8), dist.ReduceOp.MAX).wait()
        whole: Any = DTensor.from_local(
            part.view(_SENT_AS.get(self.dtype, self.dtype)).view(self._part_shape),
            self.device_mesh,
            self.placements,
            run_check=False,
            shape=self.shape,
            stride=self.stride(),
        )
        moved: Any = whole.redistribute(*args, **kwargs)
        spread: DTensor = moved.view(self.dtype) if self.dtype in _SENT_AS else moved
        return spread

    def full_tensor(self, **kwargs: Any) -> Tensor:
        """The whole, on every rank. Collective."""
        whole: Any = self.redistribute(placements=[Replicate()] * self.device_mesh.ndim)
        full: Tensor = whole.to_local()
        return full

    def to_local(self, **kwargs: Any) -> NoReturn:
        """Refuse to pass for the whole.

        Raises:
            RuntimeError: Always.
        """
        raise self._refusal("to_local()")

    def _refusal(self, doing: str) -> RuntimeError:
        _, start, stop = self.span
        return RuntimeError(
            f"{doing} on state_dict() of ShardedDecoupledAdamW, in which each rank has its own part of every tensor: "
            f"of {self._name} elements [{start}:{stop}] of {math.prod(self._part_shape)}. Save with "
            "sharded_dadamw.checkpoint or torch.distributed.checkpoint, or gather all of it, on every rank: "
            "consolidate_state_dict(), full_state_dict=True, or full_tensor()"
        )

    def holding(self, fragment: Tensor) -> FragmentTensor:
        """The same range with other values, perhaps of another dtype.

        Args:
            fragment: 1-D: this rank's elements.
        """
        spec = _spec_of(self.device_mesh, self.placements, self.shape, fragment.dtype)
        return self._make(fragment, spec, {**self.__dict__, "_loaded": None})

    def _with(self, change: Callable[[Tensor], Tensor]) -> FragmentTensor:
        made = self.holding(change(self._local_tensor))
        made._loaded = None if self._loaded is None else change(self._loaded)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> FragmentTensor:
        """A copy with memory of its own."""
        if id(self) not in memo:
            memo[id(self)] = self._with(torch.clone)
        made: FragmentTensor = memo[id(self)]
        return made

    def __repr__(self, **kwargs: Any) -> Any:  # type: ignore[override]
        """Which elements of what."""
        _, start, stop = self.span
        return f"FragmentTensor({self._name}, {list(self.shape)}, {self.dtype}, [{start}:{stop}] on this rank)"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse ``torch.save`` and ``pickle``.

        Raises:
            RuntimeError: Always; one rank's file would not be the state.
        """
        raise self._refusal("torch.save, or pickle,")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What can be asked of it, what copies it as it is, and an error for all that would compute with it."""
        kwargs = kwargs or {}
        own = next(arg for arg in (*args, *kwargs.values()) if isinstance(arg, cls))
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            if func.__self__.__name__ == "is_meta":  # it has no memory of its shape; so torch's broadcast_from_rank0
                return True  # makes a tensor that has, instead of writing into this one's
            if func.__self__.__name__ not in _ASKED:
                raise own._refusal(f".{func.__self__.__name__}")
        elif name in _ANSWERS:
            return _ANSWERS[name](own, *args[1:], **kwargs)
        elif name not in _METHODS:
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


_ASKED = frozenset(
    [
        *("shape", "dtype", "device", "layout", "requires_grad", "ndim", "is_leaf", "grad_fn", "grad", "_version"),
        *("nbytes", "itemsize", "is_cpu", "is_cuda", "is_sparse", "is_quantized", "is_nested"),
    ]
)
_METHODS = frozenset(
    [
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


def _empty(own: FragmentTensor, size: Any = None, **kwargs: Any) -> FragmentTensor:
    if size is not None and tuple(size) not in (tuple(own.shape), ()):
        raise own._refusal(f"new_empty({tuple(size)})")
    device = kwargs.get("device")
    return own._with(lambda fragment: torch.empty_like(fragment, device=device))


def _zeros(own: FragmentTensor, **kwargs: Any) -> FragmentTensor:
    return _empty(own, **kwargs)._with(Tensor.zero_)


def _copy_(own: FragmentTensor, source: FragmentTensor, non_blocking: bool = False) -> FragmentTensor:
    if not isinstance(source, FragmentTensor) or source.span != own.span:
        raise own._refusal("copy_ of another range")
    own.fragment.copy_(source.fragment, non_blocking=non_blocking)
    return own


def _share_memory_(own: FragmentTensor) -> FragmentTensor:
    own.fragment.share_memory_()
    return own


_ANSWERS: dict[str, Callable[..., Any]] = {
    "data_ptr": lambda own: 0,  # as of any tensor that has no memory but in tensors of its own
    "detach": lambda own: own,
    "contiguous": lambda own: own,
    "clone": lambda own, **kwargs: copy.deepcopy(own),
    "to": _to,
    "cpu": lambda own, **kwargs: _to(own, "cpu"),
    "new_empty": _empty,
    "empty_like": _empty,
    "zeros_like": _zeros,
    "copy_": _copy_,
    "share_memory_": _share_memory_,
    "pin_memory": lambda own, **kwargs: own._with(Tensor.pin_memory),
}


def _spec_of(mesh: DeviceMesh, placements: Any, shape: Sequence[int], dtype: torch.dtype) -> DTensorSpec:
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    return DTensorSpec(mesh, tuple(placements), tensor_meta=TensorMeta(torch.Size(shape), tuple(strides), dtype))
