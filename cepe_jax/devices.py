"""The devices at hand: their kind, their memory, and the mesh that a command puts them in."""

import os
import re
import resource
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import jax

from cepe_jax.sharding import make_mesh


def describe() -> str:
    """Return the number and the kind of all devices, as `8 x TPU v5 lite`."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


@dataclass(frozen=True)
class Devices:
    """The mesh of a command that infers."""

    tensor: int = 1  # devices that share the weights and the prompt, by heads
    context: int = 0  # devices that share the contexts; 0 = all that `tensor` leaves

    def __post_init__(self):
        if self.tensor < 1 or self.context < 0:
            raise ValueError(f"{self}: give numbers of devices above 0")


def on_devices(sizes: Devices) -> AbstractContextManager:
    """Return a context in which the devices, if they are several, are one mesh."""
    devices = jax.device_count()
    context = sizes.context or max(devices // sizes.tensor, 1)
    if context * sizes.tensor != devices:
        raise ValueError(
            f"mesh.context {context} x mesh.tensor {sizes.tensor} are not the {devices} devices that there are: change "
            f"one of them"
        )
    mesh = make_mesh(memory=context, tensor=sizes.tensor)
    return nullcontext() if devices == 1 else jax.set_mesh(mesh)


def own_devices() -> list[jax.Device]:
    """Return this process's devices of the present mesh; without a mesh, the first one."""
    mesh = jax.sharding.get_mesh()
    return jax.local_devices()[:1] if mesh.empty else list(mesh.local_devices)


def free_bytes() -> int:
    """Return the bytes that each of `own_devices` can still take. A CPU does not tell: it has a share of the host's."""
    devices = own_devices()
    if all(known := [device.memory_stats() for device in devices]):
        return min(stats["bytes_limit"] - stats["bytes_in_use"] for stats in known)
    linux = Path("/proc/meminfo")
    if linux.exists():
        available = int(re.search(r"MemAvailable: *(\d+) kB", linux.read_text())[1]) * 1024
    else:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return available // len(devices)


def peak_memory() -> int:
    """Return the most bytes in use so far: on the fullest device, or in this process if devices do not count."""
    counted = [stats["peak_bytes_in_use"] for device in jax.local_devices() if (stats := device.memory_stats())]
    return max(counted) if counted else _process_peak()


def _process_peak() -> int:
    """Return the peak of this process alone: `ru_maxrss` includes that of the process which started it."""
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak_memory() -> None:
    """Reset the peak of this process, on Linux. The peaks of devices stay."""
    if (forget := Path("/proc/self/clear_refs")).exists():
        forget.write_text("5")  # man 5 proc: resets VmHWM
