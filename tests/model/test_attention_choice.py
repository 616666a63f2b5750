"""Which attention is taken on which GPU, with which packages; and what is said where one is asked for in vain."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support import flash_on_cpu
from torch.nn.attention import _fa4

from skvr_dist.errors import UserError
from skvr_dist.model import attention_choice
from skvr_dist.model.attention_choice import (
    _Obstacle,
    activate,
    require_installed,
    resolve,
    resolve_beside,
    takes_arena,
)

CUDA, BF16 = torch.device("cuda", 0), torch.bfloat16
H100, A100, B200, RTX4090, V100 = "NVIDIA H100", "NVIDIA A100", "NVIDIA B200", "NVIDIA RTX 4090", "Tesla V100"
CAPABILITIES = {H100: (9, 0), A100: (8, 0), B200: (10, 0), RTX4090: (8, 9), V100: (7, 0)}
MODULES = {"fa4": "flash_attn.cute", "fa3": "flash_attn_interface"}
OURS = ["skvr_kernels", "triton"]
FAILURE, MISSING = attention_choice._failure, attention_choice._missing


def forget() -> None:
    """What was found on the machine before."""
    for each in (resolve, takes_arena, attention_choice._arena_obstacle):
        each.cache_clear()


class Machine:
    """A machine with a GPU and packages, as far as the choice looks at it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch

    def have(self, gpu: str, *packages: str, broken: str = "") -> None:
        """Stand for a machine: its GPU, the kernels that are installed, and one of them that fails when it is run."""
        forget()
        installed = [module for name in packages for module in ([MODULES[name]] if name in MODULES else OURS)]
        self.patch.setattr(torch.cuda, "get_device_capability", lambda _: CAPABILITIES[gpu])
        self.patch.setattr(torch.cuda, "get_device_name", lambda _: gpu)
        self.patch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        self.patch.setattr(
            attention_choice,
            "_missing",
            lambda module, *words: None if module in installed else MISSING("nowhere", *words),
        )
        self.patch.setattr(attention_choice, "_version", lambda name: f"{name} of a test")
        failure = _Obstacle("its package does not run here (RuntimeError: no driver)")
        self.patch.setattr(attention_choice, "_failure", lambda name, *_: failure if name == broken else None)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    yield Machine(monkeypatch)
    forget()


@pytest.mark.parametrize(
    ("gpu", "packages", "head_dim", "taken"),
    [
        (H100, ("fa4", "fa3"), 128, "fa4"),
        (H100, ("fa3",), 128, "fa3"),
        (H100, (), 128, "fa2"),
        (A100, ("fa4", "fa3"), 128, "fa2"),
        (B200, ("fa4", "fa3"), 128, "fa4"),
        (B200, ("fa4",), 192, "fa2"),
        (B200, ("fa4",), 256, "fa4"),
        (RTX4090, (), 192, "fa2"),
        (RTX4090, (), 208, "sdpa"),
        (RTX4090, (), 256, "fa2"),
        (V100, (), 128, "sdpa"),
        (H100, ("fa4",), 264, "sdpa"),
        (H100, ("fa4",), 100, "sdpa"),
    ],
)
def test_auto_takes_the_fastest_that_is_there(
    gpu: str, packages: tuple[str, ...], head_dim: int, taken: str, machine: Machine
) -> None:
    machine.have(gpu, *packages)
    assert resolve("auto", CUDA, BF16, head_dim).name == taken
    if taken == "sdpa":
        with pytest.raises(UserError, match=r"model\.attention is flash, but .*; use auto or sdpa"):
            resolve("flash", CUDA, BF16, head_dim)
    else:
        assert resolve("flash", CUDA, BF16, head_dim).name == resolve(taken, CUDA, BF16, head_dim).name == taken


def test_the_line_of_a_run_says_why(machine: Machine) -> None:
    machine.have(H100, "fa4")
    assert str(resolve("auto", CUDA, BF16, 128)) == "attention: fa4 (fa4 of a test; bf16 on NVIDIA H100)"
    fp32 = resolve("auto", CUDA, torch.float32, 128)
    assert str(fp32) == "attention: sdpa (fp32 is not for flash kernels, which take bf16)"
    machine.have(H100, "fa4", broken="fa4")
    assert str(resolve("auto", CUDA, BF16, 128)) == (
        "attention: fa2 (fa2 of a test; bf16 on NVIDIA H100; not fa4: its package does not run here (RuntimeError: no "
        "driver); not fa3: the package flash-attn-3 is not installed)"
    )
    assert str(resolve("sdpa", CUDA, BF16, 128)) == "attention: sdpa (as model.attention says)"
    assert str(resolve("auto", torch.device("cpu"), BF16, 128)) == "attention: sdpa (flash kernels are for GPUs)"


@pytest.mark.parametrize(
    ("wanted", "gpu", "options", "sentence"),
    [
        (
            "fa4",
            H100,
            {},
            "model.attention is fa4, but the package flash-attn-4 is not installed; install it with `pip install --pre "
            "flash-attn-4`, or use auto or sdpa",
        ),
        (
            "fa3",
            A100,
            {},
            "model.attention is fa3, but it has no kernels for compute capability 8.0 of NVIDIA A100; use auto or sdpa",
        ),
        (
            "fa2",
            H100,
            {"head_dim": 320},
            "model.attention is fa2, but head_dim 320 is not for flash kernels, which take multiples of 8 up to 256; "
            "use auto or sdpa",
        ),
        (
            "fa2",
            H100,
            {"device": torch.device("cpu")},
            "model.attention is fa2, but flash kernels are for GPUs; use auto or sdpa",
        ),
    ],
)
def test_a_kernel_that_cannot_be_had_is_refused(
    wanted: Any, gpu: str, options: dict[str, Any], sentence: str, machine: Machine
) -> None:
    machine.have(gpu)
    with pytest.raises(UserError) as refused:
        resolve(wanted, options.get("device", CUDA), BF16, options.get("head_dim", 128))
    assert str(refused.value) == sentence


def test_a_missing_package_is_refused_before_anything_starts() -> None:
    for name, module in MODULES.items():
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            with pytest.raises(UserError, match=f"model.attention is {name}, but the package .* is not installed"):
                require_installed(name)  # type: ignore[arg-type]
    for name in ("auto", "flash", "fa2", "sdpa", "eager"):
        require_installed(name)  # type: ignore[arg-type]


def test_a_package_that_is_there_and_does_not_import_is_called_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A flash-attn that was built for another torch lies around FA4."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn/__init__.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    with pytest.raises(UserError) as refused:
        require_installed("fa4")
    assert str(refused.value) == (
        "model.attention is fa4, but the package flash-attn-4 cannot be reached, since flash_attn does not import "
        "(ImportError: undefined symbol); mend or remove what brings flash_attn, or use auto or sdpa"
    )


def test_what_a_package_needs_and_lacks_comes_with_the_way_to_get_it(machine: Machine) -> None:
    machine.have(H100, "fa4")

    def import_cutlass(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'cutlass'")

    machine.patch.setattr(attention_choice, "activate", import_cutlass)
    machine.patch.setattr(attention_choice, "_failure", FAILURE)
    with pytest.raises(UserError) as refused:
        resolve("fa4", CUDA, BF16, 128)
    assert str(refused.value) == (
        "model.attention is fa4, but fa4 of a test does not run here (ModuleNotFoundError: No module named 'cutlass'); "
        "install it with `pip install --pre flash-attn-4`, or use auto or sdpa"
    )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "None"),
        ({0: 1.1}, "fa4 of a test does not run here (ArithmeticError: output differs by 10.0% from the formula's)"),
        ({1: 0.0}, "fa4 of a test does not run here (ArithmeticError: dq differs by 100.0% from the formula's)"),
        ({3: float("nan")}, "fa4 of a test does not run here (ArithmeticError: dv differs by nan% from the formula's)"),
    ],
)
def test_a_flash_kernel_is_compared_with_the_formula_before_it_is_taken(
    wrong: dict[int, float], said: str, machine: Machine
) -> None:
    forward, backward = flash_on_cpu._forward, flash_on_cpu._backward

    def wrong_forward(*arguments: Any) -> tuple[Any, ...]:
        out, *others = forward(*arguments)
        return out * wrong.get(0, 1.0), *others

    def wrong_backward(*arguments: Any, **also: Any) -> tuple[Any, ...]:
        return tuple(x * wrong.get(place, 1.0) for place, x in enumerate(backward(*arguments, **also), start=1))

    machine.patch.setattr(flash_on_cpu, "_forward", wrong_forward)
    machine.patch.setattr(flash_on_cpu, "_backward", wrong_backward)
    flash_on_cpu.give_to_torch(machine.patch)
    machine.have(H100)
    machine.patch.setattr(attention_choice, "activate", lambda name: None)
    assert str(FAILURE("fa4", torch.device("cpu"), BF16, 64)) == said


@pytest.mark.parametrize("results", [2, 4, 5])
def test_torch_takes_the_output_and_its_sums_from_any_release_of_fa4(
    results: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 4.0.0b19 there are two results, then four, then five; PyTorch before 2.14 unpacks two."""
    interface = ModuleType("flash_attn.cute.interface")
    interface._flash_attn_fwd = lambda q, k, v, **options: (q, k[..., 0], *[None] * (results - 2))  # type: ignore[attr-defined]
    interface._flash_attn_bwd = lambda q, k, v, *others, **options: (q, k, v)  # type: ignore[attr-defined]
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    monkeypatch.delitem(sys.modules, "skvr_dist.model.fa4", raising=False)
    _fa4._fa4_import_module.cache_clear()
    try:
        activate("fa4")
        q, k, v = torch.rand(3, 1, 4, 2, 8).unbind()
        out, sums = _fa4._fa4_run_forward(q, k, v, None, None, 4, 4, None, True, None, None, None)
        assert out is q and torch.equal(sums, k[..., 0])
        assert _fa4._fa4_run_backward(q, q, k, v, out, sums, None, None, None, True, None, None) == (q, k, v)
    finally:
        activate("fa2")
        _fa4._fa4_import_module.cache_clear()
        sys.modules.pop("skvr_dist.model.fa4", None)


@pytest.mark.parametrize(
    ("works", "obstacle"),
    [
        ("import", "skvr_kernels does not import (ImportError: libtriton.so: undefined symbol)"),
        ("run", "skvr_kernels does not run here (RuntimeError: out of resource: shared memory)"),
    ],
)
def test_our_kernel_is_tried_before_it_is_taken(works: str, obstacle: str, machine: Machine) -> None:
    machine.have(H100, "routed")

    def fails(*_: object) -> None:
        raise RuntimeError("out of resource: shared memory")

    class DoesNotImport:
        def __getattr__(self, name: str) -> object:
            raise ImportError("libtriton.so: undefined symbol")

    class Imports:
        require_possible = staticmethod(lambda *_: None)

    machine.patch.setitem(sys.modules, "skvr_kernels", DoesNotImport() if works == "import" else Imports())
    machine.patch.setattr(attention_choice, "_try_arena", fails)
    assert not takes_arena("auto", CUDA, BF16, 128, 1024, rows=8)
    with pytest.raises(UserError) as refused:
        resolve("routed", CUDA, BF16, 128)
    assert str(refused.value) == f"model.attention is routed, but {obstacle}; use auto or sdpa"


def test_a_second_model_takes_the_same_kernel_or_none(machine: Machine) -> None:
    machine.have(B200, "fa4")
    own = resolve("auto", CUDA, BF16, 128)
    assert [resolve_beside(own, CUDA, BF16, size).name for size in (64, 192)] == ["fa4", "sdpa"]


def test_kernels_are_put_in_force_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    in_force: list[str | None] = [None]
    calls = torch.nn.attention
    monkeypatch.setattr(calls, "current_flash_attention_impl", lambda: in_force[-1])
    monkeypatch.setattr(calls, "activate_flash_attention_impl", in_force.append)
    monkeypatch.setattr(calls, "restore_flash_attention_impl", lambda: in_force.append(None))
    for name in ("fa2", "sdpa", "fa4", "fa4", "eager", "fa3", "fa2", "fa2"):
        activate(name)
    assert in_force == [None, "FA4", "FA3", None]
