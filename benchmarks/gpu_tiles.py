"""The tiles part of gpu_check.py: what each choice of tiles makes of the fused search's scan; and compiling for all its
parts by several processes. Not run by itself.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from gpu_search import APPROXIMATE, K, check_fused, fixed_tiles, kernels_ms

from recollect.memory_backends import make_backend
from recollect.memory_backends.triton_topk import TILES, interpreted


def time_tiles(device: torch.device, memories: int, keys: int, queries: int, dim: int) -> list[dict[str, Any]]:
    """Milliseconds of the scan, and the registers that a thread takes and spills, by tiles; only on a card."""
    if device.type != "cuda" or interpreted():
        return []
    from recollect.memory_backends.triton_kernels import scan_blocks

    backend = make_backend("exact", num_memories=memories, capacity=keys, dim=dim, device=device)
    backend.add(torch.randn(memories, keys, dim, device=device))
    asked = torch.randn(memories, queries, dim, device=device)
    rows = []
    for block_q, block_n, warps, stages in TILES:
        tiles = {"BLOCK_Q": block_q, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}
        built = _built(scan_blocks)
        try:
            with fixed_tiles(tiles):
                backend.search(asked, K)
                spent = min((kernels_ms(backend, asked) for _ in range(3)), key=lambda times: sum(times.values()))
        except Exception as error:  # such as more shared memory than the card has
            rows.append({**tiles, "status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]})
            continue
        scan = sum(time for name, time in spent.items() if "scan_blocks" in name)
        row: dict[str, Any] = {**tiles, "status": "ok", "scan_ms": scan, "search_ms": sum(spent.values())}
        for kernel in [one for key, one in _built(scan_blocks).items() if key not in built][:1]:
            row |= {"registers": kernel.n_regs, "spilled": kernel.n_spills, "shared_bytes": kernel.metadata.shared}
        rows.append(row)
    return rows


def _built(kernel: Any) -> dict[Any, Any]:
    """What Triton has built of a kernel in this process, on this device."""
    return {key: one for caches in kernel.device_caches.values() for key, one in caches[0].items()}


def compile_ahead(script: Path, processes: int) -> None:
    """Fills the folder where Triton keeps what it compiled, by several processes that each run a share of the work.

    A share that fails is no harm: what it lacks is compiled, or fails and is told, where it is used.
    """
    commands = [[sys.executable, str(script), "--share", f"{share}/{processes}"] for share in range(processes)]
    for process in [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]:
        process.wait()


def compile_share(device: torch.device, sizes: list[tuple[int, int, int, int]], share: int, shares: int) -> None:
    """Runs every kernel of a share of the searches and cases once."""
    work = [(size, spec, tiles) for size in sizes for spec in ("exact", *APPROXIMATE) for tiles in TILES]
    for (_, keys, queries, dim), spec, (block_q, block_n, warps, stages) in work[share::shares]:
        tiles = {"BLOCK_Q": block_q, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}
        with fixed_tiles(tiles):
            backend = make_backend(spec, num_memories=2, capacity=keys, dim=dim, device=device)
            backend.add(torch.randn(2, keys, dim, device=device))
            backend.search(torch.randn(2, queries, dim, device=device), K)
    check_fused(device, small=False, share=share, shares=shares)
