"""Whether two runs are the same, by the fingerprints in their checkpoints or in their metrics."""

from __future__ import annotations

import json
import os
from pathlib import Path

from sharded_dadamw.checkpoint.folder import FINGERPRINT, Manifest, found_at
from sharded_dadamw.state.fingerprint import Fingerprint


def difference(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> str | None:
    """Say in a sentence where two runs first differ: at which step, and in which tensor of which parameter.

    World sizes, layouts and forms of main parameters make no difference; only steps that both have are compared.

    Args:
        one: A checkpoint, a folder of them, that of a run which has such a folder, or a file of lines of JSON that have
            a ``step`` and a ``fingerprint``.
        other: Another one.

    Returns:
        None where they are the same.

    Raises:
        ValueError: There is no fingerprint, or none of the same step; or a file is damaged, or not there.
        OSError: A file cannot be read.
    """
    ours, theirs = fingerprints(one), fingerprints(other)
    steps = sorted(ours.keys() & theirs.keys())
    if not steps:
        last = [max(side) for side in (ours, theirs)]
        raise ValueError(
            f"expected fingerprints of the same step, got step {last[0]} in {one} and {last[1]} in {other}"
        )
    for step in steps:
        if (found := ours[step].difference(theirs[step])) is not None:
            name, key = found
            words = [side[step].tensors.get(name, {}).get(key) for side in (ours, theirs)]
            shown = ["nothing" if word is None else f"{word:016x}" for word in words]
            return f"step {step}: {key} of {name} is {shown[0]} in {one} and {shown[1]} in {other}"
    return None


def fingerprints(path: str | os.PathLike[str]) -> dict[int, Fingerprint]:
    """Return by step what fingerprints a checkpoint has, a folder of them, or a file of metrics; at least one.

    Raises:
        ValueError: There is none; or a file is damaged, or not there.
        OSError: The file cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: expected a checkpoint, a folder of them, or a metrics.jsonl, got no file or folder")
    found = _of_metrics(path) if path.is_file() else _of_checkpoints(path)
    if not found:
        raise ValueError(
            f"{path}: expected a checkpoint with a fingerprint, a folder of them, or a metrics.jsonl with fingerprints "
            "(launch/train.py --fingerprint-every), got none; load and save an older checkpoint for it to get one"
        )
    return found


def _of_checkpoints(path: Path) -> dict[int, Fingerprint]:
    found = {}
    for folder in found_at(path):
        known = Manifest.read(folder)
        file = known.files.get(FINGERPRINT)
        if file is not None and (wrong := file.wrong(folder / FINGERPRINT, read=True)) is not None:
            raise ValueError(wrong)
        if known.fingerprint:
            found[known.step] = Fingerprint.of_dict(known.fingerprint)
    return found


def _of_metrics(path: Path) -> dict[int, Fingerprint]:
    found = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
            if "fingerprint" in record:
                found[int(record["step"])] = Fingerprint.of_dict(record["fingerprint"])
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: expected a line of metrics, got another: {error}") from error
    return found
