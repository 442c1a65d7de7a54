"""The CUDA kernels without nvcc: libfastops_emulated plans every call as usual, but hands its launches here; NVRTC
compiles the kernel from the sources in the package on first use, and the driver starts it.

Needs cuda-core and NVRTC (`pip install fastops[nvrtc]`; torch's CUDA builds bring NVRTC along). Compiled kernels are
kept in FASTOPS_CUDA_CACHE, default ~/.cache/fastops/cuda, by source, architecture and compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import tempfile
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

SOURCES = Path(__file__).parent / "lib" / "src"


def why_not() -> str | None:
    """What is missing for compiling, or None."""
    try:  # looked for, not imported: that waits for the first kernel
        there = all(find_spec(name) is not None for name in ("cuda.core", "cuda.bindings.nvrtc"))
    except ImportError:
        there = False
    if not there:
        return "cuda-core is not installed (pip install fastops[nvrtc])"
    if not (SOURCES / "cuda").is_dir():
        return f"the kernels' sources are missing ({SOURCES})"
    return None


def expression(launch: str) -> str:
    """The kernel, as C++ names it, in the signature of the function that starts it."""
    found = re.search(r"kKernel = &?(.+?)[;,] Args = ", launch)
    if found is None:
        raise RuntimeError(f"no kernel in {launch!r}")
    return found[1].replace("(anonymous namespace)::", "")


@cache
def _text() -> dict[str, str]:
    """Every source by its path."""
    folders = (SOURCES / "cuda", SOURCES / "core", SOURCES / "include")
    files = sorted(f for folder in folders for f in folder.rglob("*") if f.is_file())
    return {str(f.relative_to(SOURCES)): f.read_text() for f in files}


@cache
def source_of(kernel: str) -> str:
    """The .cu file whose kernel it is: with everything its template arguments may name."""
    name = kernel.split("<")[0].rsplit("::", 1)[-1]
    for path, text in _text().items():
        if re.search(rf"FASTOPS_KERNEL\(.*\)\n{name}\(", text):
            users = [p for p, t in _text().items() if p.endswith(".cu") and f'#include "{path}"' in t]
            return users[0] if users else path
    raise RuntimeError(f"no source defines {kernel}")


@cache
def _digest() -> str:
    return hashlib.sha256(json.dumps(_text(), sort_keys=True).encode()).hexdigest()


def folder() -> Path:
    """Where compiled kernels are kept."""
    given = os.environ.get("FASTOPS_CUDA_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fastops" / "cuda"


def compile_kernel(kernel: str, arch: str) -> tuple[bytes, str]:
    """(cubin, the kernel's symbol in it) for arch "80", "90a", ...; from the cache where it is there.

    Raises:
        RuntimeError: NVRTC's words.
    """
    import cuda.bindings.nvrtc as nvrtc
    from cuda.core import Program, ProgramOptions

    compiler = ".".join(map(str, nvrtc.nvrtcVersion()[1:]))
    key = hashlib.sha256("\n".join((_digest(), kernel, arch, compiler)).encode()).hexdigest()
    place = folder() / f"{key}.cubin"
    try:
        symbol, _, code = place.read_bytes().partition(b"\0")
        if code:
            return code, symbol.decode()
    except OSError:
        pass
    options = ProgramOptions(
        arch=f"sm_{arch}", std="c++17", device_as_default_execution_space=True,
        include_path=[str(SOURCES), str(SOURCES / "include"), str(SOURCES / "cuda" / "nvrtc")],
    )  # fmt: skip
    # A compiler may name things from where the launch stands, without their namespace.
    text = f'#include "{source_of(kernel)}"\nusing namespace fastops::cuda;\n'
    program = Program(text, "c++", options)
    try:
        made = program.compile("cubin", name_expressions=(kernel,))
    except Exception as error:
        raise RuntimeError(f"NVRTC does not compile {kernel} for sm_{arch}: {error}") from error
    symbol = made.symbol_mapping[kernel]
    symbol, code = (symbol if isinstance(symbol, bytes) else symbol.encode()), bytes(made.code)
    folder().mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder(), delete=False) as file:  # never half a file under the final name
        file.write(symbol + b"\0" + code)
    os.replace(file.name, place)
    return code, symbol.decode()


@cache
def device_facts(index: int) -> tuple[int, int]:
    """(compute capability times ten, multiprocessors) of a GPU."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor, torch.cuda.get_device_properties(index).multi_processor_count


START = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_int64), ctypes.c_int32, ctypes.c_int32, ctypes.c_size_t,
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p,
)  # fmt: skip

FACTS = ctypes.CFUNCTYPE(None, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.c_int32))

Grid = tuple[tuple[int, ...], int, int, int]  # blocks, blocks of a cluster along x, threads, bytes of shared memory


def launch_config(grid: Grid, stream: int) -> Any:
    """The driver's form of a grid."""
    from cuda.bindings import driver

    blocks, cluster, threads, shared = grid
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = blocks
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared
    config.hStream = driver.CUstream(stream)
    if cluster > 1:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        dim = attribute.value.clusterDim
        dim.x, dim.y, dim.z = cluster, 1, 1
        config.attrs, config.numAttrs = [attribute], 1
    return config


class Launcher:
    """Starts kernels on the current device."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self._functions: dict[tuple[str, int], Any] = {}

    @cached_property
    def hooks(self) -> tuple[int, int]:
        """What fastops_cuda_env.start points at, and what gives a device's facts; alive as long as the launcher."""
        self._callbacks = START(self._start), FACTS(self._facts)
        start, facts = (ctypes.cast(f, ctypes.c_void_p).value or 0 for f in self._callbacks)
        return start, facts

    def _start(self, launch: bytes, grid: Any, *rest: int) -> int:
        cluster, threads, shared, args, _, stream = rest
        try:
            self.launch(expression(launch.decode()), (tuple(grid[:3]), cluster, threads, shared), args, stream or 0)
        except Exception as error:  # through C: kept for whoever made the call
            self.error = error
            return 1
        return 0

    def _facts(self, device: int, arch: Any, sm_count: Any) -> None:
        arch[0], sm_count[0] = self.facts(device)

    def facts(self, device: int) -> tuple[int, int]:
        return device_facts(device)

    def launch(self, kernel: str, grid: Grid, args: int, stream: int) -> None:
        from cuda.bindings import driver

        function = self.function(kernel, grid[3])
        pointer = (ctypes.c_void_p * 1)(args)
        (status,) = driver.cuLaunchKernelEx(launch_config(grid, stream), function, ctypes.addressof(pointer), 0)
        _good(status, f"the start of {kernel}")

    def function(self, kernel: str, shared: int) -> Any:
        from cuda.bindings import driver

        device = torch.cuda.current_device()
        key = (kernel, device)
        if key not in self._functions:
            arch, _ = self.facts(device)
            code, symbol = compile_kernel(kernel, "90a" if arch == 90 else str(arch))
            status, module = driver.cuModuleLoadData(code)
            _good(status, f"loading {kernel}")
            status, function = driver.cuModuleGetFunction(module, symbol.encode())
            _good(status, f"finding {kernel}")
            self._functions[key] = function
        function = self._functions[key]
        if shared > 48 << 10:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            (status,) = driver.cuFuncSetAttribute(function, attribute, shared)
            _good(status, f"{shared} bytes of shared memory for {kernel}")
        return function


def _good(status: Any, what: str) -> None:
    if int(status):
        raise RuntimeError(f"{what}: {status}")
