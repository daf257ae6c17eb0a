"""`python -m dpo_testing.compiled_kernels`: compile Triton's kernels for GPUs, which needs none.

Prints a JSON object: name, GPU and values' type → the widest access to memory in bits, and bytes of shared memory.
TRITON_INTERPRET must be off.
"""

import json
import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dpo_api.sizing.head import ALIGNMENT
from dpo_trainer.kernels import head, rotary, swiglu

CAPABILITIES = (80, 90, 100)
TYPES = ("bf16", "fp32")


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int, warps: int) -> Any:
    """The kernel for a GPU, if addresses and sizes are multiples of 16, as Triton finds out when it is launched."""
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in types},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def kernels(values: str) -> dict[str, tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Name → kernel, types of its arguments, constants, warps."""
    pointers = {"peaks": "*fp32", "masses": "*fp32", "places": "*i64", "logits": f"*{values}"}
    sizes = {"ALIGNMENT": ALIGNMENT, "BLOCK": head.BLOCK}
    integers = {"stride": "i32", "columns": "i32"}
    found = {
        "statistics": (head._statistics, {**pointers, "targets": "*fp32", **integers}, sizes, head._WARPS),
        "slope": (head._slope, {**pointers, **integers}, sizes, head._WARPS),
    }
    for name, backward in (("swiglu", False), ("swiglu back", True)):
        types = {"x": f"*{values}", "out": f"*{values}", "width": "i32"}
        constants = {"BACKWARD": backward, "BLOCK": swiglu.BLOCK}
        if backward:
            types["grad"] = f"*{values}"
        else:
            constants["grad"] = None  # type: ignore[assignment]
        found[name] = (swiglu._swiglu, types, constants, 8)
    turn = {"x": f"*{values}", "out": f"*{values}", "cosines": "*fp32", "sines": "*fp32"}
    turn |= dict.fromkeys(("direction", "x_row", "x_head", "heads", "half", "still"), "i32")
    for name, sums, gathers in (("turn", False, False), ("turn keys", False, True), ("turn back", True, True)):
        types, constants = dict(turn), {"SUMS": sums, "GATHERS": gathers, "HEADS": 32, "HALF": 64, "STILL": 1}
        for argument, given in (("starts", sums), ("sources", gathers)):
            if given:
                types[argument] = "*i64"
            else:
                constants[argument] = None  # type: ignore[assignment]
        found[name] = (rotary._turn, types, constants, 4)
    return found


def main() -> None:
    """Compile everything."""
    found: dict[str, dict[str, int]] = {}
    for capability in CAPABILITIES:
        for values in TYPES:
            for name, (kernel, types, constants, warps) in kernels(values).items():
                done = compiled(kernel, types, constants, capability, warps)
                assert len(done.asm["cubin"]) > 0
                widths = [
                    int(times or 1) * int(bits)
                    for times, bits in re.findall(r"ld\.global(?:\.\w+::\w+)*(?:\.v(\d))?\.b(\d+)", done.asm["ptx"])
                ]
                found[f"{name}, sm_{capability}, {values}"] = {"bits": max(widths), "shared": done.metadata.shared}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
