"""Which attention a model takes on a device, and why: the fastest flash kernel that is there, else SDPA.

PyTorch has FlashAttention 2 built in, and runs FA3 or FA4 in its place where their packages are installed. One of them
is in force in a process at a time (`activate`).
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn import attention as torch_attention
from torch.nn.attention._fa4 import register_flash_attention_fa4

from skvr_dist.config.model import FLASH_KERNELS, AttentionName
from skvr_dist.errors import UserError

LARGEST_HEAD = 256
"""Elements of the largest head of all three kernels, forwards and backwards; sizes are multiples of 8."""
LARGEST_HEAD_OF_FA4 = 128
"""Elements of the largest head that FA4 can do on all GPUs that it is for; some can do 256."""
LONGEST_FROM_ARENA = 1024
"""Positions of a sequence up to which our kernel is taken for donors of each sequence: up to there it is the fastest on
an H100 (docs/attention.md)."""
_MOST_ERROR = 0.05
"""Of a flash kernel that is tried, relative: many times what rounding to bf16 makes."""
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


@dataclass(frozen=True)
class Choice:
    """What attention is computed with."""

    name: AttentionName
    """One of `skvr_dist.model.attention.BACKENDS`."""
    reason: str
    """Why, in words."""

    def __str__(self) -> str:
        return f"attention: {self.name} ({self.reason})"


@dataclass(frozen=True)
class _Package:
    """What PyTorch runs instead of its own kernel."""

    implementation: str
    """Its name in `torch.nn.attention`."""
    distribution: str
    module: str
    generations: tuple[int, ...]
    """Major compute capabilities that it has kernels for."""
    install: str
    """How to get it, in words."""


@dataclass(frozen=True)
class _Obstacle:
    """Why a kernel cannot be taken, in words."""

    words: str
    way_out: str = ""
    """What would take it out of the way, if anything does."""

    def __str__(self) -> str:
        return self.words

    def refusal(self, wanted: str) -> UserError:
        """Of a kernel that was asked for."""
        way_out = f"{self.way_out}, or " if self.way_out else ""
        return UserError(f"model.attention is {wanted}, but {self.words}; {way_out}use auto or sdpa")


_PACKAGES = {
    "fa4": _Package(
        "FA4", "flash-attn-4", "flash_attn.cute", (9, 10), "install it with `pip install --pre flash-attn-4`"
    ),
    "fa3": _Package(
        "FA3",
        "flash-attn-3",
        "flash_attn_interface",
        (9,),
        "install it, which compiles its kernels, from the folder hopper of the flash-attention repository",
    ),
}


def require_installed(wanted: AttentionName) -> None:
    """Check that the package of a kernel is there; looks at no device.

    Args:
        wanted: the value of `model.attention`.

    Raises:
        UserError: it is not, with the way to get it.
    """
    obstacle = None
    if wanted in _PACKAGES:
        obstacle = _package_obstacle(_PACKAGES[wanted])
    elif wanted == "routed":
        obstacle = _kernels_obstacle()
    if obstacle:
        raise obstacle.refusal(wanted)


@functools.cache
def resolve(wanted: AttentionName, device: torch.device, dtype: torch.dtype, head_dim: int) -> Choice:
    """The attention that `model.attention` means on a device; looked up once.

    Raises:
        UserError: a flash kernel is asked for that cannot be had, with what is missing and how to get it.
    """
    if wanted in ("sdpa", "eager"):
        return Choice(wanted, "as model.attention says")
    if wanted == "routed":
        if obstacle := _arena_obstacle(device, dtype, head_dim):
            raise obstacle.refusal(wanted)
        return Choice(wanted, "as model.attention says")
    unfit = _unfit(device, dtype, head_dim)
    passed_over: dict[str, _Obstacle] = {}
    for name in FLASH_KERNELS if wanted in ("auto", "flash") else (wanted,):
        obstacle = unfit or _obstacle(name, device, dtype, head_dim)
        if obstacle is None:
            reasons = [_version(name), f"{_DTYPES[dtype]} on {torch.cuda.get_device_name(device)}"]
            return Choice(name, "; ".join(reasons + [f"not {other}: {why}" for other, why in passed_over.items()]))
        passed_over[name] = obstacle
    in_all = _Obstacle("; ".join(f"not {name}: {why}" for name, why in passed_over.items()))
    obstacle = unfit or passed_over.get(wanted, in_all)
    if wanted == "auto":
        return Choice("sdpa", str(obstacle))
    raise obstacle.refusal(wanted)


@functools.cache
def takes_arena(
    wanted: AttentionName, device: torch.device, dtype: torch.dtype, head_dim: int, sequence: int, rows: int
) -> bool:
    """Whether our kernel computes attention in training: where it is asked for, and where `auto` prefers it.

    Args:
        wanted: the value of `model.attention`.
        sequence: positions of a sequence.
        rows: R, of donors.

    Raises:
        UserError: it is asked for, and cannot be had.
    """
    if wanted == "routed":
        return resolve(wanted, device, dtype, head_dim).name == wanted
    return _prefers_arena(wanted, device, dtype, sequence, rows) and _arena_obstacle(device, dtype, head_dim) is None


def why_no_arena(
    wanted: AttentionName, device: torch.device, dtype: torch.dtype, head_dim: int, sequence: int, rows: int
) -> str | None:
    """Why our kernel does not compute attention in training where `auto` prefers it; arguments as for `takes_arena`."""
    if not _prefers_arena(wanted, device, dtype, sequence, rows):
        return None
    obstacle = _arena_obstacle(device, dtype, head_dim)
    return None if obstacle is None else str(obstacle)


def _prefers_arena(wanted: AttentionName, device: torch.device, dtype: torch.dtype, sequence: int, rows: int) -> bool:
    """Whether `auto` would take our kernel if it can be had: where it was measured, and the fastest."""
    if wanted != "auto" or rows == 1 or sequence > LONGEST_FROM_ARENA or device.type != "cuda":
        return False
    return dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def _arena_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> _Obstacle | None:
    """Why our kernel cannot be taken, if so; on a GPU it is tried."""
    if obstacle := _kernels_obstacle():
        return obstacle
    try:
        from skvr_kernels import require_possible

        require_possible(head_dim, dtype, device)
    except ValueError as error:
        return _Obstacle(str(error))
    except Exception as error:  # Triton does not import
        return _Obstacle(f"skvr_kernels does not import ({_first_line(error)})")
    if device.type != "cuda":
        return None
    try:
        _try_arena(device, dtype, head_dim)
    except Exception as error:  # of any kind: of the compiler, of the driver
        return _Obstacle(f"skvr_kernels does not run here ({_first_line(error)})")
    return None


def _kernels_obstacle() -> _Obstacle | None:
    """Why `skvr_kernels` is not there, if so; neither it nor Triton is imported."""
    return _missing("skvr_kernels", "skvr_kernels", "install it with `pip install ./kernels`") or _missing(
        "triton", "triton, which skvr_kernels needs", "take a build of torch for GPUs, which brings it along"
    )


def _try_arena(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Run our kernels forwards and backwards on a few tokens."""
    import skvr_kernels

    with torch.inference_mode(False), torch.enable_grad():
        arena = skvr_kernels.Arena(1, 1, 128, 1, head_dim, dtype=dtype, device=device)
        kv = torch.zeros(1, 128, 1, head_dim, dtype=dtype, device=device, requires_grad=True)
        slot = torch.zeros(1, dtype=torch.int64, device=device)
        token = skvr_kernels.write(arena, slot, kv, kv, skvr_kernels.arena_token(device))
        joined = skvr_kernels.Documents.joined(1, 128, device)
        out, _ = skvr_kernels.attend(arena, slot, kv, joined, token)
        out.sum().backward()


def activate(name: str) -> None:
    """Let PyTorch run a kernel wherever it runs flash attention, from now on; backward passes under way as well.

    Args:
        name: one of `skvr_dist.model.attention.BACKENDS`; those that are no flash kernels change nothing.
    """
    if name not in FLASH_KERNELS:
        return
    _put_in_force(_PACKAGES[name].implementation if name in _PACKAGES else None)


def _put_in_force(wanted: str | None) -> None:
    """Of an implementation that PyTorch knows; None: its own."""
    if torch_attention.current_flash_attention_impl() == wanted:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel of PyTorch is overridden, which is what is wanted
        if wanted == "FA4":
            by_way_of_ours = functools.partial(register_flash_attention_fa4, "skvr_dist.model.fa4")
            torch_attention.register_flash_attention_impl(wanted, register_fn=by_way_of_ours)
        if wanted:
            torch_attention.activate_flash_attention_impl(wanted)
        else:
            torch_attention.restore_flash_attention_impl()


def resolve_beside(choice: Choice, device: torch.device, dtype: torch.dtype, head_dim: int) -> Choice:
    """The attention of another model of the same process, which has head sizes of its own.

    The same kernel, or SDPA where that cannot do these heads: a second flash kernel would be in force for both.
    """
    try:
        return resolve(choice.name, device, dtype, head_dim)
    except UserError as error:
        return Choice("sdpa", str(error))


def _unfit(device: torch.device, dtype: torch.dtype, head_dim: int) -> _Obstacle | None:
    """Why no flash kernel can be taken at all, if so."""
    if device.type != "cuda":
        return _Obstacle("flash kernels are for GPUs")
    if dtype not in (torch.bfloat16, torch.float16):
        return _Obstacle(f"{_DTYPES.get(dtype, dtype)} is not for flash kernels, which take bf16")
    if head_dim % 8 or head_dim > LARGEST_HEAD:
        return _Obstacle(
            f"head_dim {head_dim} is not for flash kernels, which take multiples of 8 up to {LARGEST_HEAD}"
        )
    return None


def _obstacle(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> _Obstacle | None:
    """Why a flash kernel cannot be taken, if so; one that is installed is tried."""
    capability = torch.cuda.get_device_capability(device)
    on = f"compute capability {capability[0]}.{capability[1]} of {torch.cuda.get_device_name(device)}"
    if name not in _PACKAGES:
        return _obstacle_of_fa2(capability, on, head_dim)
    package = _PACKAGES[name]
    if capability[0] not in package.generations:
        return _Obstacle(f"it has no kernels for {on}")
    if capability[0] == 10 and LARGEST_HEAD_OF_FA4 < head_dim < LARGEST_HEAD:
        return _Obstacle(f"it has no kernels for head_dim {head_dim} on {on}, only up to 128, and 256")
    return _package_obstacle(package) or _failure(name, device, dtype, head_dim)


def _obstacle_of_fa2(capability: tuple[int, int], on: str, head_dim: int) -> _Obstacle | None:
    """Why PyTorch's own kernel cannot be taken, if so.

    Args:
        on: the GPU, in words.
    """
    if capability < (8, 0):
        return _Obstacle(f"it has no kernels for {on}, only from 8.0 on")
    # As PyTorch says itself: too little shared memory for the backward pass.
    if (capability in ((8, 6), (8, 9)) or capability[0] == 12) and 192 < head_dim <= 224:
        return _Obstacle(f"it has no backward pass for head_dim {head_dim} on {on}")
    if not torch.backends.cuda.is_flash_attention_available():
        return _Obstacle("this build of torch is without it")
    return None


def _failure(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> _Obstacle | None:
    """What comes of running a kernel forwards and backwards on a few tokens, if it is not what it should be.

    These packages compile when they are first run, with whatever driver and compiler are there, and change from one
    pre-release to the next: better now than in the first step.
    """
    before = torch_attention.current_flash_attention_impl()
    try:
        activate(name)
        _try_flash(device, dtype, head_dim)
    except Exception as error:  # of any kind: of imports, of the compiler, of the driver
        _put_in_force(before)
        way_out = _PACKAGES[name].install if isinstance(error, ImportError) else ""
        return _Obstacle(f"{_version(name)} does not run here ({_first_line(error)})", way_out)
    return None


def _try_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Run the kernel in force on a few tokens, two query heads on one, and compare it with the formula in float32.

    Raises:
        ArithmeticError: it computes something else.
    """
    tokens, generator = 128, torch.Generator(device).manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad():
        *inputs, gradient = (
            torch.randn(1, tokens, heads, head_dim, generator=generator, device=device).to(dtype).requires_grad_()
            for heads in (2, 1, 1, 2)
        )
        out, *_ = torch.ops.aten._flash_attention_forward(*inputs, None, None, tokens, tokens, 0.0, True, False)
        found = [out, *torch.autograd.grad(out, inputs, gradient)]
        q, k, v = (x.float().expand(-1, -1, 2, -1).transpose(1, 2) for x in inputs)
        with torch_attention.sdpa_kernel(torch_attention.SDPBackend.MATH):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        wanted = [out, *torch.autograd.grad(out, inputs, gradient.float())]
    for name, one, other in zip(("output", "dq", "dk", "dv"), found, wanted, strict=True):
        error = ((one.float() - other.float()).norm() / other.float().norm()).item()
        if not error <= _MOST_ERROR:
            raise ArithmeticError(f"{name} differs by {error:.1%} from the formula's")


def _package_obstacle(package: _Package) -> _Obstacle | None:
    """Why a flash kernel's package is not there, if so."""
    return _missing(package.module, package.distribution, package.install)


def _missing(module: str, package: str, install: str) -> _Obstacle | None:
    """Why a module is not there, if so; it is not imported, only the packages around it.

    Args:
        package: what to call it.
        install: how to get it, in words.
    """
    try:
        if importlib.util.find_spec(module) is not None:
            return None
    except Exception as error:
        if not isinstance(error, ModuleNotFoundError) or not f"{module}.".startswith(f"{error.name}."):
            around = module.rpartition(".")[0]
            return _Obstacle(
                f"the package {package} cannot be reached, since {around} does not import ({_first_line(error)})",
                f"mend or remove what brings {around}",
            )
    return _Obstacle(f"the package {package} is not installed", install)


def _first_line(error: Exception) -> str:
    words = (str(error).strip() or "no reason given").splitlines()[0]
    return f"{type(error).__name__}: {words}"


def _version(name: str) -> str:
    """Where a kernel comes from."""
    if name not in _PACKAGES:
        return f"built into torch {torch.__version__}"
    distribution = _PACKAGES[name].distribution
    try:
        return f"{distribution} {importlib.metadata.version(distribution)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{distribution} of unknown version"
