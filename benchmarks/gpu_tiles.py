"""The tiles part of gpu_check.py: what each choice of tiles makes of the fused search's scan. Not run by itself."""

from __future__ import annotations

from typing import Any

import torch
from gpu_search import K, fixed_tiles, kernels_ms

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
