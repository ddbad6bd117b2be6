"""Devices that are not at hand, for whose programs a compiler runs on a CPU machine: TPUs and GPUs.

The TPU's compiler comes with `jax[tpu]`. The GPU's comes with `.[gpu-compiler]`, versions that fit each other: XLA asks
cuDNN about every attention call, and cuDNN links a driver. A C compiler makes a stub of one, which says that there is
no device.
"""

import ctypes
import functools
import math
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from cepe_jax.benchmarks.hlo import cudnn_workspaces
from cepe_jax.cost import CHIPS, Chip

EXAMPLES = "v5e:4x4, v6e:8x8, v4:4x4x4 or v5p:2x4x4, or hosts x GPUs of a host, as h100:1x8 or a100:4x8"


class Gpu(NamedTuple):
    """The properties of a GPU that its compiler asks for and `Chip` lacks (XLA: gpu/target_config/specs)."""

    capability: str  # a GpuComputeCapability as text
    cores: int  # streaming multiprocessors
    lanes: int  # fp32 lanes of one
    clock: float  # GHz
    shared_per_core: int  # bytes
    shared_per_block: int  # bytes, for a kernel that asks for it
    l2_cache: int  # bytes
    links: int  # NVLinks


HOPPER = Gpu("major: 9 feature_extension: ACCELERATED_FEATURES", 132, 128, 1.98, 233472, 232448, 52428800, 18)
GPUS = {"a100": Gpu("major: 8", 108, 64, 1.41, 167936, 166912, 41943040, 12), "h100": HOPPER, "h200": HOPPER}
CUDNN = (9, 25, 1)  # pinned: 9.28 asks more of a device than jax 0.12.0.1 says of it
# XLA leaves cuDNN's calls as they are unless a device is at hand, or this tells it to ask cuDNN about the target.
ASK_CUDNN = {"xla_gpu_cudnn_deviceless_compilation_mode": "CUDNN_DEVICELESS_COMPILATION_ALWAYS"}
# The functions of a driver that cuDNN links: these succeed, and those say that there is no device.
LOADS = "cuLibraryLoadData", "cuLibraryGetKernel", "cuKernelGetFunction"
REFUSES = """
cuInit cuDeviceGet cuDeviceGetCount cuGetErrorName cuCtxGetCurrent cuCtxGetLimit cuCtxPopCurrent cuCtxPushCurrent
cuStreamGetCtx cuLinkCreate cuLinkAddData cuLinkComplete cuLinkDestroy cuLaunchKernel cuLaunchKernelEx
cuLaunchCooperativeKernel cuLibraryLoadFromFile cuKernelGetAttribute cuOccupancyMaxPotentialClusterSize
cuModuleGetFunction cuModuleLoadData cuModuleUnload cuTensorMapEncodeIm2col cuTensorMapEncodeTiled
"""


@dataclass(frozen=True)
class Topology:
    """Devices, their chip, and what their compiler is told."""

    devices: list
    chip: Chip
    platform: Literal["tpu", "gpu"]
    hosts: int = 1  # whose chips are not linked; a slice of TPUs counts as one
    options: dict[str, str] = field(default_factory=dict)


def topology_of(text: str) -> Topology:
    """Return the devices of a topology such as v5e:4x4 or h100:1x8; ValueError if its compiler knows none."""
    name, _, shape = text.partition(":")
    if name not in CHIPS or not re.fullmatch(r"[1-9]\d*x[1-9]\d*" if name in GPUS else r"\d+(x\d+)+", shape):
        raise ValueError(f"topology {text!r}: give a chip and a shape, {EXAMPLES}")
    try:
        return (_gpus if name in GPUS else _tpus)(name, shape)
    except Exception as error:  # of the compiler's own kinds, or it is not there
        needed = ".[gpu-compiler] and a C compiler" if name in GPUS else ".[tpu]"
        reason = str(error).splitlines()[0]
        raise ValueError(f"topology {text}: {reason}: give one that exists, and install {needed}") from None


def _tpus(name: str, shape: str) -> Topology:
    # libtpu asks the machine it runs on for these, and waits where that is no TPU's host.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    options = {"chip_config_name": "megacore"} if name == "v4" else {}  # else a chip is two devices
    if math.prod(map(int, shape.split("x"))) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    found = topologies.get_topology_desc(f"{name}:{shape}", platform="tpu", **options)
    return Topology(found.devices, CHIPS[name], "tpu")


def _gpus(name: str, shape: str) -> Topology:
    load_stub_driver()
    hosts, _, per_host = shape.partition("x")
    found = topologies.get_topology_desc(
        platform="cuda", target_config=target_config(name), topology=f"1x{int(hosts)}x{int(per_host)}"
    )
    check_asks_cudnn(found.devices[0])
    return Topology(found.devices, CHIPS[name], "gpu", int(hosts), ASK_CUDNN)


def check_asks_cudnn(device) -> None:
    """Raise ValueError if cuDNN is not asked about its calls: then nothing is known of them, and they have no room."""

    def total(q_BTNH):
        return jax.nn.dot_product_attention(q_BTNH, q_BTNH, q_BTNH, implementation="cudnn").sum()

    q_BTNH = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16, sharding=SingleDeviceSharding(device))
    compiled = jax.jit(jax.grad(total)).lower(q_BTNH).compile(compiler_options=ASK_CUDNN)
    if not any(cudnn_workspaces(compiled.as_text())):
        raise ValueError("cuDNN was not asked about attention")


def target_config(name: str) -> str:
    """Return a GpuTargetConfigProto as text."""
    gpu, chip, cudnn = GPUS[name], CHIPS[name], ".".join(map(str, CUDNN))
    return f"""platform_name: "CUDA" device_description_str: "{name}"
    dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} patch: {CUDNN[2]} }}
    gpu_device_info {{
      name: "{name}" device_vendor: "NVIDIA Corporation" cuda_compute_capability {{ {gpu.capability} }}
      core_count: {gpu.cores} fpus_per_core: {gpu.lanes} clock_rate_ghz: {gpu.clock} l2_cache_size: {gpu.l2_cache}
      shared_memory_per_core: {gpu.shared_per_core} shared_memory_per_block_optin: {gpu.shared_per_block}
      device_memory_size: {int(chip.hbm)} memory_bandwidth: {int(chip.bandwidth)}
      device_interconnect_info {{ active_links: {gpu.links} }} dnn_version: "{cudnn}" driver_version: "13.0.0"
      runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0" device_address_bits: 64 threads_per_warp: 32
      threads_per_block_limit: 1024 threads_per_core_limit: 2048 registers_per_core_limit: 65536
      registers_per_block_limit: 65536 shared_memory_per_block: 49152 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024
      thread_dim_limit_z: 64 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
    }}"""


@functools.cache
def load_stub_driver() -> None:
    """Make and load a libcuda.so.1 in the place of the driver that cuDNN links."""
    source = "static int module;\n" + "".join(f"int {name}(void) {{ return 100; }}\n" for name in REFUSES.split())
    source += "".join(f"int {name}(void **out) {{ *out = &module; return 0; }}\n" for name in LOADS)
    source += "int cuLibraryUnload(void) { return 0; }\nint cuKernelSetAttribute(void) { return 0; }\n"
    source += 'int cuGetErrorString(int error, const char **text) { *text = "no device"; return 0; }\n'
    source += "int cuDriverGetVersion(int *version) { *version = 13000; return 0; }\n"
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"
        command = "cc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-x", "c", "-", "-o", library
        subprocess.run(command, input=source.encode(), check=True)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
