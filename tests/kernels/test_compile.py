"""Every Triton kernel compiles for sm_80 and sm_90 without a GPU, in the sizes that run, and spills nothing."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

import peft_suite.kernels.triton as package  # noqa: E402
from peft_suite.kernels.triton.common import CompileCase  # noqa: E402

MODULES = [info.name for info in pkgutil.iter_modules(package.__path__) if info.name != "common"]
CASES: list[CompileCase] = [
    case for name in MODULES for case in importlib.import_module(f"peft_suite.kernels.triton.{name}").compile_cases()
]
# run-time sizes that may be multiplied with a program number in 32 bits: they count positions inside one cloud
INSIDE_A_CLOUD = {"%chunk", "%per_split"}


def compiled(case: CompileCase, arch: int) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(case.kernel, dict(case.signature), dict(case.constexprs))
    options = {"num_warps": case.num_warps, **case.options}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(ptx: str, arch: int, folder: Path) -> tuple[int, int]:
    """Registers a thread and spilled bytes (stores and loads) that the bundled ptxas reports."""
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    target = f"sm_{arch}a" if arch == 90 else f"sm_{arch}"
    # the second one reads the newer PTX versions that the first may not know
    for name in ("ptxas", "ptxas-blackwell"):
        program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        command = [str(program), "-v", f"-arch={target}", str(source), "-o", str(folder / "kernel.cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "Unsupported .version" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    registers = re.search(r"Used (\d+) registers", done.stderr)
    assert registers is not None, done.stderr
    return int(registers[1]), sum(int(count) for count in re.findall(r"(\d+) bytes spill", done.stderr))


def narrow_products(ttir: str) -> list[str]:
    """32-bit products of a value made from the program number with anything but a constant."""
    constants: set[str] = set()
    numbered: set[str] = set()
    found = []
    for line in ttir.splitlines():
        match = re.match(r"\s*(%[\w#]+)(?::\d+)? = ([\w.]+)(.*)", line)
        if match is None:
            continue
        name, op, rest = match.groups()
        operands = re.findall(r"%[\w#]+", rest)
        if op == "arith.constant":
            constants.add(name)
        elif op == "tt.get_program_id":
            numbered.add(name)
        elif op == "tt.load":
            continue
        elif any(operand in numbered for operand in operands):
            numbered.add(name)
            free = [operand for operand in operands if operand not in numbered | constants | INSIDE_A_CLOUD]
            two = len([operand for operand in operands if operand in numbered]) > 1
            if op == "arith.muli" and re.search(r": (tensor<[\dx]+)?i32>?", rest) and (free or two):
                found.append(line.strip())
        elif operands and all(operand in constants for operand in operands):
            constants.add(name)
    return found


def test_narrow_products_are_seen() -> None:
    bad = """
        %pid = tt.get_program_id x : i32 loc(#loc1)
        %four = arith.constant 4 : i32 loc(#loc2)
        %row = arith.muli %pid, %four : i32 loc(#loc3)
        %far = arith.muli %row, %Q : i32 loc(#loc4)
        %wide = arith.extsi %row : i32 to i64 loc(#loc5)
        %good = arith.muli %wide, %N : i64 loc(#loc6)
    """
    assert [line.split()[0] for line in narrow_products(bad)] == ["%far"]


def test_every_module_has_cases() -> None:
    assert CASES
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_compiles_without_spills(case: CompileCase, arch: int, tmp_path: Path) -> None:
    kernel = compiled(case, arch)
    _, spilled = resources(kernel.asm["ptx"], arch, tmp_path)
    assert spilled <= case.max_spill_bytes
    assert "enable_fp_fusion" in case.options
    if not case.options["enable_fp_fusion"]:
        assert "fma.rn.f32" not in kernel.asm["ptx"]
    if arch == 90:
        assert narrow_products(kernel.asm["ttir"]) == []
