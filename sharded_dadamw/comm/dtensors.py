"""This rank's part of a tensor that is spread over ranks, laid out like a parameter's, and such a tensor of parts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sharded_dadamw.layout.placement import local


def local_gradient(param: Tensor) -> Tensor:
    """This rank's part of a gradient, laid out like its parameter. Collective where that is still unsummed."""
    grad: Any = param.grad
    placements = getattr(param, "placements", None)
    if placements is not None and grad.placements != placements:
        grad = grad.redistribute(grad.device_mesh, placements)
    return local(grad)


def like_parameter(part: Tensor, param: Any, *, copies: bool = False) -> Tensor:
    """This rank's part of something with the shape of a parameter, as that is: whole, or as a DTensor.

    With ``copies`` it is a copy; a tensor that is whole goes to host memory then.
    """
    if not hasattr(param, "to_local"):
        return part.to("cpu", copy=True) if copies else part
    distributed: Tensor = type(param).from_local(
        part.clone() if copies else part,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )
    return distributed
