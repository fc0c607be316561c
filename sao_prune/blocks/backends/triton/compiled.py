"""Kernels compiled without a device, and what they need of one."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .launch import Arguments, tile_options
from .tiles import Tile

_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32"}


@dataclass(frozen=True)
class Resources:
    """Registers a thread, bytes spilled from them a thread, bytes of shared memory a program, instructions in use."""

    registers: int
    spills: int
    shared: int
    instruction: str


def resources(kernel: str, arguments: Arguments, tile: Tile, capability: int) -> Resources:
    """Compile a kernel for a compute capability such as 80 or 90 and read what the assembler reports.

    Args:
        kernel: ``product`` or ``weight_gradient``.
        arguments: as `launch.product_arguments` and `launch.weight_arguments` give them; tensors may be on any device,
            the meta device as well.
        tile: the sizes.
        capability: compute capability times ten.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from . import kernels

    function = getattr(kernels, kernel)
    run_time, constants, _ = arguments
    options = tile_options(tile, sweep=kernel == "product")
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in options}
    given = {**run_time, **constants, **options}
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        value = given[name]
        if isinstance(value, Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif name in run_time and value != 1:
            signature[name] = "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constexprs[(i,)] = value
    source = ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=attributes)
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
    ptx = done.asm["ptx"]
    registers, stack = _usage(done.asm["cubin"])
    # Only spills need a stack here; how many, the assembler says when it is asked again.
    spills = _spills(ptx, capability) if stack else 0
    instruction = "wgmma" if "wgmma" in ptx else "mma" if "mma.sync" in ptx else "fma"
    return Resources(registers, spills, done.metadata.shared, instruction)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {what: max(map(int, re.findall(rf"{what}:(\d+)", log))) for what in ("REG", "STACK", "LOCAL")}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _spills(ptx: str, capability: int) -> int:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        arch = f"sm_{capability}{'a' if capability >= 90 else ''}"
        to = str(path.with_suffix(".cubin"))
        command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={arch}", str(path), "-o", to]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
