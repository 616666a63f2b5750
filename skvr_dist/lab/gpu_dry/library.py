"""Builds the runtime and the driver that run nothing, for the CUDA build of PyTorch that is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from skvr_dist.errors import UserError

RUNTIME, DRIVER = "libdry.so", "libcuda.so.1"
_HERE = Path(__file__).parent
_TORCH_LIBRARIES = ("libc10_cuda", "libtorch_cuda", "libtorch_cuda_linalg", "libtorch_python")
_TAKEN_OVER = re.compile(r"@(libcudart|libcublas|libcublasLt|libcudnn)\.so|^nccl[A-Z]")
# Of the driver Triton and cuda-bindings load these by name; PyTorch's own calls are found in its library.
# fmt: off
_DRIVER_FUNCTIONS = [
    "cuInit", "cuCtxGetLimit", "cuCtxSetLimit", "cuCtxCreate_v4", "cuCtxSetCurrent", "cuCtxPushCurrent_v2",
    "cuCtxPopCurrent_v2", "cuCtxSynchronize", "cuDeviceGetName", "cuDeviceTotalMem_v2", "cuEventCreate",
    "cuEventRecord", "cuFuncSetAttribute", "cuFuncSetCacheConfig", "cuLaunchCooperativeKernel", "cuLinkAddData_v2",
    "cuLinkComplete", "cuLinkCreate_v2", "cuMemAlloc_v2", "cuMemFree_v2", "cuMemFreeHost", "cuMemHostAlloc",
    "cuMemcpyDtoHAsync_v2", "cuMemcpyDtoH_v2", "cuMemcpyHtoDAsync_v2", "cuMemcpyHtoD_v2", "cuMemsetD8Async",
    "cuMemsetD8_v2", "cuModuleGetGlobal_v2", "cuModuleLoad", "cuModuleLoadDataEx", "cuModuleUnload",
    "cuOccupancyMaxActiveBlocksPerMultiprocessor", "cuStreamSynchronize", "cuTensorMapEncodeIm2col",
    "cuTensorMapEncodeTiled",
]
# fmt: on


def require_cuda_build() -> Path:
    """The headers of CUDA that belong to the PyTorch that is installed.

    Raises:
        UserError: it is built without CUDA, or a header or a tool is missing.
    """
    import torch

    if torch.version.cuda is None:
        raise UserError(
            f"PyTorch {torch.__version__} is built without CUDA; run this in an environment with a build for "
            f"CUDA, which `make cuda-env` makes (5 GB; no GPU is needed)"
        )
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            raise UserError(f"{tool} is not installed; install gcc and binutils")
    packages = Path(torch.__file__).parents[1]
    for header in ("cuda_runtime_api.h", "crt/host_defines.h"):
        if not list(packages.glob(f"nvidia/*/include/{header}")):
            raise UserError(
                f"no package of NVIDIA's in {packages} has {header}; pip install nvidia-cuda-crt, in the version of "
                f"nvidia-cuda-runtime"
            )
    return next(packages.glob("nvidia/*/include/cuda_runtime_api.h")).parent


def build(folder: Path) -> None:
    """Build `RUNTIME` and `DRIVER` in a folder.

    Raises:
        UserError: as `require_cuda_build`; or a compiler refuses.
    """
    import torch

    headers = require_cuda_build()
    libraries = Path(torch.__file__).parent / "lib"
    wanted = {name.split("@")[0] for library in _TORCH_LIBRARIES for name in _asked_of(libraries / f"{library}.so")}
    rest = folder / "rest.c"
    rest.write_text("extern void dry_count(const char *);\n" + _stubs(wanted - _defined("runtime.c"), "dry_count"))
    _compile([_HERE / "runtime.c", rest], folder / RUNTIME, f"-I{headers}", "-fno-builtin")
    of_driver = {name for name in _undefined(libraries / "libcaffe2_nvrtc.so") if re.fullmatch(r"cu[A-Z]\w*", name)}
    driver = folder / "driver.c"
    stubs = _stubs({*of_driver, *_DRIVER_FUNCTIONS} - _defined("driver.c"), "count")
    driver.write_text((_HERE / "driver.c").read_text() + stubs)
    _compile([driver], folder / DRIVER, f"-Wl,-soname,{DRIVER}")


def _undefined(library: Path) -> list[str]:
    """Names that a library needs of others."""
    lines = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    return [line.split()[-1] for line in lines.stdout.splitlines()]


def _asked_of(library: Path) -> list[str]:
    return [name for name in _undefined(library) if _TAKEN_OVER.search(name)]


def _defined(source: str) -> set[str]:
    """Functions that a source defines."""
    return set(re.findall(r"^\w[\w \*]*?\b(\w+)\(", (_HERE / source).read_text(), re.MULTILINE))


def _stubs(names: set[str], counting: str) -> str:
    return "".join(f'int {name}() {{ {counting}("{name}"); return 0; }}\n' for name in sorted(names))


def _compile(sources: list[Path], library: Path, *options: str) -> None:
    command = ["gcc", "-O1", "-fPIC", "-w", "-shared", "-pthread", *options, *map(str, sources), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"gcc cannot build {library.name}: {done.stderr.strip().splitlines()[-1]}; use a newer gcc")
