"""Files that are made up to do harm: pickles that would call something, and values that have no end."""

import io
import sys
import zipfile
from collections.abc import Callable
from typing import Any


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., Any], *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.call


def archive(pickled: bytes) -> io.BytesIO:
    """A file of `torch.save` with this pickle in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as records:
        for name, data in (("data.pkl", pickled), ("byteorder", sys.byteorder.encode()), ("version", b"3")):
            records.writestr(f"x/{name}", data)
    return file


def nested(pair: Callable[[Any], Any]) -> Any:
    """60 deep, and each twice in the next: whoever follows every way down takes 2 ** 60 steps."""
    value: Any = pair(1)
    for _ in range(60):
        value = pair(value)
    return value
