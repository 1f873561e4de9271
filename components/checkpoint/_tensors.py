"""Nested tensors to and from safetensors files, through torch.distributed.checkpoint (DCP).

DCP's own format is not used: its FileSystemReader unpickles the metadata file, so that whoever can write to
a checkpoint can run code in the process that loads it. Its Hugging Face reader and writer keep everything
in safetensors files, which hold a JSON header and plain numbers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lattice.components.checkpoint._manifest import CheckpointError, CorruptCheckpoint

if TYPE_CHECKING:
    from lattice.components.checkpoint._ranks import Ranks

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


def prepare_writing(path: Path, flat: dict[str, Tensor], ranks: Ranks) -> Callable[[], None]:
    """Copies the tensors, which may then be changed, and returns what writes the copy when it is called.

    Every rank calls it and writes its own shards; it returns on all once the last one has written. Of tensors
    that all ranks hold whole, one rank writes each.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    # A filter rather than `catch_warnings`: this is for another thread, and the context manager would swap
    # the filters of all threads.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
    alone = ranks.group is None
    writer = HuggingFaceStorageWriter(
        path=str(path),
        fqn_to_index_mapping=_file_numbers(flat, _FILE_BYTES * ranks.size),
        thread_count=1,
        save_distributed=not alone,
    )
    copy = writer.stage(cast("dict[str, Any]", flat))

    def write() -> None:
        save(copy, storage_writer=writer, process_group=ranks.group, no_dist=alone)

    return write


def written_files(path: Path, ranks: Ranks) -> list[Path]:
    """The files in `path` that this rank wrote."""
    mine = "*" if ranks.group is None else f"shard-{ranks.rank + 1:05d}-*"
    return list(path.glob(mine))


def _file_numbers(flat: dict[str, Tensor], limit: int) -> dict[str, int]:
    """Name -> number of the file it goes to, from 1. A number stands for `limit` bytes over all ranks, each
    of which writes its part of them to a file of its own."""
    numbers, number, filled = {}, 1, 0
    for name, tensor in flat.items():
        size = tensor.numel() * tensor.element_size()
        if filled and filled + size > limit:
            number, filled = number + 1, 0
        numbers[name] = number
        filled += size
    return numbers or {"": 1}  # the writer takes the largest number, also of no tensors at all


def prepare_reading(path: Path, tensors: dict[str, Any]) -> Callable[[], None]:
    """What fills `tensors` in place when it is called, each rank its own shards, whatever ranks and layout
    they were saved with. Raises CheckpointError if what is stored differs in a name, a shape or a number
    format. Top-level entries that `tensors` lacks are not read.

    This is DCP's `load` without its collectives, which unpickle the plans that ranks send each other.
    """
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    flat = flatten(tensors)
    reader = HuggingFaceStorageReader(str(path))
    try:
        metadata = reader.read_metadata()
    except Exception as error:  # whatever a header that somebody made up leads to
        raise CorruptCheckpoint(f"{path} holds a file that is no safetensors file: {error}") from error
    stored: dict[str, Any] = {
        name: entry
        for name, entry in metadata.state_dict_metadata.items()
        if any(f"{name}.".startswith(f"{key}.") for key in tensors)
    }
    _check_whole(path, stored)
    _compare(
        path,
        {name: _described(entry.size, entry.properties.dtype) for name, entry in stored.items()},
        {name: _described(tensor.shape, tensor.dtype) for name, tensor in flat.items()},
    )

    def fill() -> None:
        planner = DefaultLoadPlanner()
        planner.set_up_planner(cast("dict[str, Any]", flat), metadata, True)
        reader.set_up_storage_reader(metadata, True)
        reader.read_data(planner.create_local_plan(), planner).wait()

    return fill


def _check_whole(path: Path, stored: dict[str, Any]) -> None:
    """Raises CorruptCheckpoint for a tensor of which a shard is missing: reading would leave a gap."""
    for name, entry in stored.items():
        elements = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
        if elements != math.prod(entry.size):
            raise CorruptCheckpoint(
                f"{path} holds {elements} of the {math.prod(entry.size)} elements of {name}"
            )


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
