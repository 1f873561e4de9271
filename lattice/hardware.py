"""The device to use; and GPUs that one may not have: memory, peak and bandwidths, from NVIDIA's data sheets.

https://www.nvidia.com/en-us/data-center/h100/ and the pages of the others; dense bfloat16 on tensor cores;
NVLink in one direction, which is half of what is stated. Between nodes: the network cards of a DGX with eight
of them, one a GPU, from the data sheets of DGX A100 (200 Gb/s each), DGX H100 and DGX H200 (400 Gb/s each).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lattice.graphs import stance
from lattice.launch import Agreed, Launch

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
PROCESSORS = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class GPU:
    memory: float
    """Bytes."""
    peak: float
    """Dense bfloat16 operations a second."""
    name: str
    """What torch calls it, in full: a part of one, or one on another board, has another peak."""
    link: float
    """Bytes a second in one direction to the GPUs of its node."""
    network: float
    """Bytes a second in one direction of a GPU's network card."""
    node: int = 8
    """GPUs of a node."""


GPUS: dict[str, GPU] = {
    "a100-40gb": GPU(40 * 2**30, 312e12, "NVIDIA A100-SXM4-40GB", 300e9, 25e9),
    "a100-80gb": GPU(80 * 2**30, 312e12, "NVIDIA A100-SXM4-80GB", 300e9, 25e9),
    "h100-80gb": GPU(80 * 2**30, 989e12, "NVIDIA H100 80GB HBM3", 450e9, 50e9),
    "h200-141gb": GPU(143771 * 2**20, 989e12, "NVIDIA H200", 450e9, 50e9),
}


def peak_of(device: torch.device) -> float | None:
    """Dense bfloat16 operations a second of a device in the table; None of another."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((gpu.peak for gpu in GPUS.values() if gpu.name == name), None)


def describe(device: torch.device) -> str:
    """In words, for results."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def vendor() -> str:
    """Of the processor, as it names itself: GenuineIntel, AuthenticAMD; empty where that is not known."""
    return _of_processor().get("vendor_id", "")


def _processor() -> str:
    """A virtual machine may hide its name, but not its generation."""
    said = _of_processor()
    name = said.get("model name") or platform.processor() or platform.machine()
    if "cpu family" not in said:
        return name
    return f"{name} (family {said['cpu family']}, model {said.get('model', 'unknown')})"


def _of_processor() -> dict[str, str]:
    """What Linux says of the first one; nothing elsewhere."""
    try:
        first = PROCESSORS.read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def visible_gpus() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(index) for index in range(count)] if given is None else given.split(",")[:count]


def choose_device(name: str, option: str = "run.device", *, launch: Launch | None = None) -> torch.device:
    """`auto` is a GPU where there is one; of several ranks on a host, each takes its own. Raises ValueError,
    naming the option, for a device that is not there, or that all ranks of a host would share."""
    launch = launch or Launch()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{launch.local_rank}"
    elif name.startswith("cuda:") and launch.local_size > 1:
        raise Agreed(
            f"{option} = '{name}': the {launch.local_size} processes of this host would share that GPU; must "
            "be auto or cuda, with which each takes its own, or cpu"
        )
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{option} = '{name}': not available here: {reason}") from error
    return device


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Within, torch takes kernels that give the same bits each time, and raises RuntimeError where it has
    none; outside it is as it was. To be entered before the first matrix product on a GPU."""
    if not on:
        yield
        return
    before, mode = torch.backends.cudnn.deterministic, torch.get_deterministic_debug_mode()
    workspace = os.environ.get(CUBLAS_WORKSPACE)
    os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")  # else torch refuses matrix products
    torch.backends.cudnn.deterministic = True
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.backends.cudnn.deterministic = before
        if workspace is None:
            del os.environ[CUBLAS_WORKSPACE]


@contextmanager
def any_length() -> Iterator[None]:
    """Within, unless gradients are asked for, nothing is prepared for a length by itself: compiled layers run
    as they are written, and attention is not computed by cuDNN, if there is another way.

    The few lengths of training are worth a graph each (seconds), and cuDNN's plan for each (40 ms,
    docs/performance.md; torch prefers it on GPUs of compute capability 9.0 and later). Decoding has another
    length at every token, and evaluation at every batch. FlexAttention, whose one kernel takes all lengths,
    stays compiled (lattice/attention_mask.py)."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        yield
        return
    with stance("force_eager"), _without_cudnn():
        yield


@contextmanager
def _without_cudnn() -> Iterator[None]:
    switch: Any = torch.backends.cuda
    if not _chosen_among_others(switch):
        yield
        return
    switch.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        switch.enable_cudnn_sdp(True)


def _chosen_among_others(switch: Any) -> bool:
    others = switch.flash_sdp_enabled() or switch.mem_efficient_sdp_enabled() or switch.math_sdp_enabled()
    return bool(others and switch.cudnn_sdp_enabled())
