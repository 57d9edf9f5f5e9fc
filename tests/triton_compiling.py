"""Compiles the kernels of the fused search for an H100, which needs no card; run by `test_triton.py` by itself.

The interpreter runs what the compiler refuses (types that differ between branches, names that it does not know), so
that a test in the interpreter alone would not tell that a kernel cannot be built. Prints a line for each kernel.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from recollect.memory_backends import triton_candidates, triton_kernels
from recollect.memory_backends.triton_topk import power_of_two, shape_for

HOPPER = GPUTarget("cuda", 90, 32)
TYPES = {
    "fp32": "query_scales key_scales bias firsts seconds block_bounds query_bounds scores",
    "i32": "rows lengths singles opened counts wanted any_failed",
    "i64": "candidates slots",
}
POINTERS = {name: f"*{kind}" for kind, names in TYPES.items() for name in names.split()}


def compiled(kernel: Any, constants: dict[str, Any], kind: str, *, warps: int = 4, stages: int = 2) -> str:
    """The PTX of a kernel whose queries and keys are of some kind."""
    names = kernel.arg_names
    given = {**POINTERS, "queries": f"*{kind}", "keys": f"*{kind}", "guard": "fp32"}
    signature = {name: "constexpr" if name in constants else given.get(name, "i32") for name in names}
    aligned = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(names) if signature[name].startswith("*")}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, aligned)
    return str(triton.compile(source, target=HOPPER, options={"num_warps": warps, "num_stages": stages}).asm["ptx"])


def main() -> None:
    shape = shape_for(65536, 32, fewest=16384)
    rooms = {"ROUNDS": shape.rounds, "SINGLES": shape.singles, "OPENED": shape.opened}
    scan = {
        "HINT": 256,
        "P": 128,
        "BLOCK_D": 128,
        "ROUNDS": shape.rounds,
        "UPCAST": False,
        "BLOCK_Q": 64,
        "BLOCK_N": 64,
    }
    for kind, changes in (
        ("fp16", {}),
        ("bf16", {"P": 512, "BLOCK_D": 256, "HAS_BIAS": True}),
        ("i8", {"QUANTISED": True, "HAS_SCALES": True}),
        ("fp8e4nv", {"HAS_SCALES": True, "SECOND": False}),
    ):
        switches = {"SECOND": True, "HAS_SCALES": False, "QUANTISED": False, "HAS_BIAS": False}
        code = compiled(triton_kernels.scan_blocks, {**scan, **switches, **changes}, kind)
        print("scan_blocks", kind, "matrix units" if "wgmma" in code else "none")
    blocks = power_of_two(65536 // shape.rounds)
    for second in (True, False):
        switches = {
            "SECOND": second,
            "HAS_BIAS": not second,
            "GROUPS": 32,
            "BLOCKS": blocks,
            "QUERIES": 1,
            "MASKED": second,
        }
        compiled(triton_candidates.select_candidates, {**rooms, **switches}, "fp32")
    for distance in (True, False):
        sizes = {"D": 100, "P": 128, "BLOCK_C": 32, "MEMBERS": min(32, shape.rounds), "DISTANCE": distance}
        compiled(triton_candidates.score_candidates, {**rooms, **sizes}, "fp32")
    compiled(triton_candidates.keep_best, {**rooms, "K": 32, "WIDTH": 128, "QUERIES": 1}, "fp32", warps=1)
    print("candidates compiled")


if __name__ == "__main__":
    main()
