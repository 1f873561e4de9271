"""Nested tensors to and from safetensors files, through torch.distributed.checkpoint (DCP).

DCP's own format is not used: its FileSystemReader unpickles the metadata file, so that whoever can write to
a checkpoint can run code in the process that loads it. Its Hugging Face reader and writer keep everything
in safetensors files, which hold a JSON header and plain numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lattice.components.checkpoint._manifest import CheckpointError, CorruptCheckpoint

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_FILE_BYTES = 2 << 30
"""A file is serialised in memory before it is written: this bounds what that takes beside the copy."""
_SHOWN = 5


def flatten(tensors: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Nested dicts as one dict, names joined by dots. Raises TypeError for a leaf that is no tensor and
    ValueError for two leaves of one name."""
    flat: dict[str, Tensor] = {}
    for name, value in _leaves(tensors, prefix):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}, not a tensor: put it into the facts")
        if name in flat:
            raise ValueError(f"two tensors have the name {name}")
        flat[name] = value
    return flat


def _leaves(tensors: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tensors.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def start_writing(path: Path, tensors: dict[str, Any], group: ProcessGroup | None) -> Future[Any]:
    """Copies the tensors and starts writing the copy. On return they may be changed.

    With several ranks every rank calls this and writes its own shards, and the future resolves on all once
    the last one has written; of tensors that all ranks hold whole, one rank writes each.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import async_save

    _quiet()
    flat = flatten(tensors)
    writer = HuggingFaceStorageWriter(
        path=str(path),
        fqn_to_index_mapping=_file_numbers(flat),
        thread_count=1,
        save_distributed=group is not None,
    )
    saving = async_save(flat, storage_writer=writer, process_group=group, no_dist=group is None)
    return cast("Future[Any]", saving)


def _file_numbers(flat: dict[str, Tensor]) -> dict[str, int]:
    """Name -> number of the file it goes to, from 1."""
    numbers, number, filled = {}, 1, 0
    for name, tensor in flat.items():
        size = tensor.numel() * tensor.element_size()
        if filled and filled + size > _FILE_BYTES:
            number, filled = number + 1, 0
        numbers[name] = number
        filled += size
    return numbers or {"": 1}  # the writer takes the largest number, also of no tensors at all


def read(path: Path, tensors: dict[str, Any], group: ProcessGroup | None) -> None:
    """Fills `tensors` in place. Raises CheckpointError, with nothing changed, if what is stored differs in
    a name, a shape or a number format. Top-level entries that `tensors` lacks are not read."""
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    _quiet()
    flat = flatten(tensors)
    reader = HuggingFaceStorageReader(str(path))
    try:
        metadata = reader.read_metadata().state_dict_metadata
    # The reader trusts what it finds in a header: it raises whatever a wrong one leads to.
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path} holds a file that is no safetensors file: {error}") from error
    stored = {
        name: _described(cast(Any, entry).size, cast(Any, entry).properties.dtype)
        for name, entry in metadata.items()
        if any(f"{name}.".startswith(f"{key}.") for key in tensors)
    }
    _compare(path, stored, {name: _described(tensor.shape, tensor.dtype) for name, tensor in flat.items()})
    if flat:
        state = cast("dict[str, Any]", flat)
        load(state, storage_reader=reader, process_group=group, no_dist=group is None)


def _described(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{tuple(shape)} {str(dtype).removeprefix('torch.')}"


def _compare(path: Path, stored: dict[str, str], wanted: dict[str, str]) -> None:
    names = list(wanted) + [name for name in stored if name not in wanted]
    differing = [
        f"{name} is {stored.get(name, 'missing')} in the checkpoint and {wanted.get(name, 'missing')} here"
        for name in names
        if stored.get(name) != wanted.get(name)
    ]
    if differing:
        more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise CheckpointError(
            f"the checkpoint is of another model: {'; '.join(differing[:_SHOWN])}{more} ({path})"
        )


def _quiet() -> None:
    # A filter rather than `catch_warnings`: DCP warns in its own thread, and the context manager would swap
    # the filters of all threads.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
