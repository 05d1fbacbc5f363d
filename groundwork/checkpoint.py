"""Checkpoints that are whole or not there: a directory, written aside, sealed, then renamed.

The order of events is the promise. Tensors (safetensors) and documents (JSON) are written into
`.tmp-<step>` and synced; the manifest with every file's sha256 comes last; one rename gives the
directory its name; only then do old ones go. A process killed at any point leaves the previous
checkpoint as it was. Nothing that is read here is a pickle.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from groundwork.errors import CheckpointError
from groundwork.files import sync

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PREFIX = "step-"
TEMPORARY = ".tmp-"
REPLACED = ".replaced-"


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint in memory: groups of tensors and JSON documents, by name."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    documents: dict[str, Any]


def save(
    folder: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    documents: dict[str, Any],
    keep: int,
) -> Path:
    """Write folder/step-<step> whole or not at all, then prune to the newest `keep`.

    Where the disk is full the oldest make room for it, all but the newest of them.
    Raises CheckpointError when it cannot be written; at least the newest is then untouched.
    """
    final = folder / f"{PREFIX}{step}"
    needed = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
    while True:
        try:
            _write(folder, final, step, tensors, documents)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(folder / f"{TEMPORARY}{step}", ignore_errors=True)
            there = _newest_first(folder)
            older = there[1:]
            if _is_full(error) and older and _remove(older[-1]):
                logger.warning("The disk is full: %s is removed to save %s.", older[-1], final)
                continue
            raise CheckpointError(
                f"Checkpoint {final} was not saved ({error}); it needs about {needed:,} bytes. "
                f"{f'{there[0].name} is untouched. ' if there else ''}"
                "Free some space, or set another --out."
            ) from error
        break
    for path in _newest_first(folder)[keep:]:
        _remove(path)
    return final


def _write(
    folder: Path,
    final: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    documents: dict[str, Any],
) -> None:
    """Write everything aside, seal it, give it its name."""
    temporary = folder / f"{TEMPORARY}{step}"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    manifest: dict[str, str] = {}
    for name, group in tensors.items():
        path = temporary / f"{name}.safetensors"
        save_file({key: _plain(value) for key, value in group.items()}, path)
        manifest[path.name] = _seal(path)
    for name, document in documents.items():
        path = temporary / f"{name}.json"
        path.write_text(json.dumps(document, indent=1), encoding="utf-8")
        manifest[path.name] = _seal(path)
    path = temporary / MANIFEST
    path.write_text(json.dumps({"step": step, "sha256": manifest}, indent=1), encoding="utf-8")
    _seal(path)
    sync(temporary)
    # One of this step that is there already goes aside whole, and is gone when the new one is
    # there: a kill in between leaves one of the two under a name that `sweep` mends.
    aside = folder / f"{REPLACED}{step}"
    if final.exists():
        final.replace(aside)
    temporary.replace(final)
    sync(folder)
    shutil.rmtree(aside, ignore_errors=True)


def _is_full(error: Exception) -> bool:
    """Tell whether a disk, or what one may take of it, is full."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in numbers
    return any(f"os error {number})" in str(error) for number in numbers)  # safetensors' own


def bring(path: Path, folder: Path) -> Path:
    """Have a checkpoint in another folder, too, as links where the disk is the same.

    Nothing ever writes into a checkpoint's files. Raises CheckpointError.
    """
    final, temporary = folder / path.name, folder / f"{TEMPORARY}{path.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(path, temporary, copy_function=_link_or_copy)
        temporary.replace(final)
        sync(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{path} could not be brought to {folder} ({error}).") from error
    return final


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        sync(Path(target))


def latest(
    folder: Path, wanted: Callable[[Checkpoint], bool] = lambda _: True
) -> Checkpoint | None:
    """Read the newest checkpoint that is whole and `wanted`; None where there is none.

    A damaged one is named in a warning and the next older one is taken.
    """
    for path in _newest_first(folder):
        try:
            found = load(path)
        except CheckpointError as error:
            logger.warning("%s Trying the one before it.", error)
            continue
        if wanted(found):
            return found
    return None


def load(path: Path) -> Checkpoint:
    """Read one checkpoint after checking every file against its manifest.

    Raises CheckpointError naming the file that is missing or damaged.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        step, hashes = int(manifest["step"]), dict(manifest["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not a whole checkpoint: its {MANIFEST} {error}."
        ) from error
    tensors: dict[str, dict[str, Tensor]] = {}
    documents: dict[str, Any] = {}
    for name, expected in hashes.items():
        file = path / Path(name).name
        try:
            found = _sha256(file)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
        if found != expected:
            raise CheckpointError(f"{file} is damaged: its sha256 is not the manifest's.")
        if file.suffix == ".safetensors":
            tensors[file.stem] = load_file(file)
        elif file.suffix == ".json":
            documents[file.stem] = json.loads(file.read_text(encoding="utf-8"))
        else:
            raise CheckpointError(f"{file} is of a kind that checkpoints do not hold.")
    return Checkpoint(path, step, tensors, documents)


def sweep(folder: Path) -> None:
    """Remove what a killed save left behind."""
    if folder.is_dir():
        for path in folder.glob(f"{REPLACED}*"):
            final = folder / f"{PREFIX}{path.name.removeprefix(REPLACED)}"
            if final.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.replace(final)
        for path in folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(path, ignore_errors=True)


def _newest_first(folder: Path) -> list[Path]:
    found = []
    for path in folder.glob(f"{PREFIX}*"):
        number = path.name.removeprefix(PREFIX)
        if number.isdigit() and path.is_dir():
            found.append((int(number), path))
    return [path for _, path in sorted(found, reverse=True)]


def _remove(path: Path) -> bool:
    """Remove an old checkpoint; tell whether it is gone."""
    try:
        # Renamed first, so that a kill while it goes never leaves half of one to be found.
        doomed = path.with_name(f"{TEMPORARY}old-{path.name}")
        path.replace(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        logger.warning("The old checkpoint %s could not be removed: %s", path, error)
        return False
    return True


def _plain(tensor: Tensor) -> Tensor:
    # safetensors takes neither channels_last nor tensors that share memory.
    tensor = tensor.detach()
    if tensor.device.type == "cpu":
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.cpu().contiguous()


def _seal(path: Path) -> str:
    sync(path)
    return _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
