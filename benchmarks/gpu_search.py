"""The search parts of gpu_check.py: the fused search against the oracle, its time against floors and peers, its memory.

Not run by itself. Everything works on any device: on a CPU the kernels run in Triton's interpreter, at toy sizes.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from recollect.memory_backends import BackendUnavailable, MemoryBackendError, UnsupportedOperation, make_backend
from recollect.memory_backends import triton_topk as fused_module
from recollect.memory_backends.key_ring import KeyRing
from recollect.memory_backends.triton_keys import FIRST_PASSES
from recollect.memory_backends.triton_search import FusedSearch

K = 32
TARGET_SIZE = (64, 65536, 512, 128)
"""Memories, keys, queries and dimension that the targets are for."""
APPROXIMATE = (
    "approx-topk",
    *(f"approx-topk:first_pass={kind},recall_target=0.99" for kind in ("bfloat16", "int8", "float8")),
)
TARGETS = {
    "exact over bare bf16 matmul": (2.0, "at most"),
    "torch fp32 matmul and topk over exact": (4.0, "at least"),
    "faiss knn_gpu over exact": (4.0, "at least"),
    "peak extra memory over score matrix": (0.05, "at most"),
}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def side_by_side(functions: dict[str, Callable[[], Any]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median milliseconds of each function, taken in turn so that drift meets all of them alike."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 2):
        for name, function in functions.items():
            synchronise(device)
            start = time.perf_counter()
            function()
            synchronise(device)
            if turn >= 2:
                taken[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in taken.items()}


def distributions(memories: int, keys: int, dim: int, device: torch.device) -> dict[str, Tensor]:
    """Keys (M, n, D) of kinds that a search meets, or that break one."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    plain = random(memories, keys, dim)
    huge = plain.clone()
    huge[:, keys // 3] = 3e20
    drift = plain * 0.3 + random(memories, keys, dim).cumsum(1) / keys**0.5 + random(1, 1, dim)
    return {
        "random": plain,
        "clustered": random(memories, 50, dim).repeat(1, -(-keys // 50), 1)[:, :keys] + 0.05 * plain,
        "tied": random(memories, -(-keys // 8), dim).repeat(1, 8, 1)[:, :keys],
        "equal": plain[:, :1].expand_as(plain).contiguous(),
        "one huge": huge,
        "zeros": torch.zeros_like(plain),
        "attention-like": torch.nn.functional.normalize(drift, dim=-1),
    }


@contextlib.contextmanager
def fixed_tiles(tiles: dict[str, int] | None = None) -> Iterator[None]:
    """Scans with one choice of tiles, that of all cards or this one: to tune every case of a check takes minutes."""
    before = fused_module.TUNED, fused_module.UNTUNED_TILES
    fused_module.TUNED, fused_module.UNTUNED_TILES = False, tiles or before[1]
    try:
        yield
    finally:
        fused_module.TUNED, fused_module.UNTUNED_TILES = before


def check_fused(device: torch.device, *, small: bool, share: int = 0, shares: int = 1) -> list[dict[str, Any]]:
    """The kernels' answers are those of a plain fp32 search, for kinds of keys, metrics, types, sizes; or the part of
    these cases that falls to one of several `shares`."""
    keys, queries, memories = (600, 2, 2) if small else (5000, 64, 3)
    cases = [(kind, "inner_product", "float16", 64, K) for kind in distributions(1, 8, 4, torch.device("cpu"))]
    cases += [("random", "l2", first_pass, 128, K) for first_pass in FIRST_PASSES]
    cases += [("attention-like", "inner_product", first_pass, 128, K) for first_pass in FIRST_PASSES]
    cases += [("attention-like", "l2", "bfloat16", 24, 1), ("random", "inner_product", "float16", 24, 256)]
    rows = []
    with fixed_tiles():
        for kind, metric, first_pass, dim, k in (cases[::3] if small else cases)[share::shares]:
            stored = distributions(memories, keys, dim, device)[kind]
            row = {"keys": kind, "metric": metric, "first_pass": first_pass, "dim": dim, "k": k}
            try:
                rows.append(row | _check_one(stored, metric, first_pass, queries, k))
            except Exception as error:  # a kernel that does not compile here is a finding, and the others go on
                rows.append(row | {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:500]})
    return rows


def _check_one(stored: Tensor, metric: str, first_pass: Any, queries: int, k: int) -> dict[str, Any]:
    memories, keys, dim = stored.shape
    ring = KeyRing(memories, keys, dim, device=stored.device)
    fused = FusedSearch(ring, metric, first_pass=first_pass)
    which = torch.arange(memories)
    fused.add(stored, ring.append(stored, which), which)
    asked = torch.randn(memories, queries, dim, device=stored.device)
    lengths = [keys - 37 * memory for memory in range(memories)]  # which end inside a block
    scores, slots = fused_module.triton_topk(fused.keys, ring, asked, k, list(range(memories)), lengths)
    worst = 0.0
    for memory, length in enumerate(lengths):
        held, own = stored[memory, :length].double(), asked[memory].double()
        true = -torch.cdist(own, held).square() if metric == "l2" else own @ held.T
        best = true.topk(k).values
        scale = best.abs().amax().clamp(min=1e-30)
        named = true.gather(1, slots[memory])
        worst = max(worst, *(float(((one - best).abs() / scale).max()) for one in (named, scores[memory].double())))
        if int(slots[memory].min()) < 0 or any(len(set(row)) < k for row in slots[memory].tolist()):
            worst = float("inf")
    return {"status": "ok" if worst < 1e-4 else "failed", "worst_relative_difference": worst}


def time_search(
    device: torch.device, *, memories: int, keys: int, queries: int, dim: int, rounds: int, peers: bool = True
) -> dict[str, Any]:
    """Exact search against floors, plain torch and peers; recall of reduced first passes; memory beyond its inputs."""
    settings: dict[str, Any] = {"num_memories": memories, "capacity": keys, "dim": dim, "device": device}
    backend = make_backend("exact", **settings)
    stored = torch.randn(memories, keys, dim, device=device)
    backend.add(stored)
    asked = torch.randn(memories, queries, dim, device=device)
    half_keys, half_asked = stored.bfloat16(), asked.bfloat16()
    room, half_room = asked.new_empty(queries, keys), half_asked.new_empty(queries, keys)

    def one_by_one(a: Tensor, b: Tensor, out: Tensor, then: Callable[[Tensor], Any] = lambda scores: None) -> None:
        # One memory at a time, into one buffer: all the scores at once may not fit.
        for row in range(memories):
            torch.matmul(a[row], b[row].T, out=out)
            then(out)

    whole_room = half_asked.new_empty(memories, queries, keys)
    functions: dict[str, Callable[[], Any]] = {
        "matmul_bf16_batched": lambda: torch.bmm(half_asked, half_keys.mT, out=whole_room),
        "matmul_fp32": lambda: one_by_one(asked, stored, room),
        "matmul_bf16": lambda: one_by_one(half_asked, half_keys, half_room),
        "matmul_topk_fp32": lambda: one_by_one(asked, stored, room, lambda scores: scores.topk(K)),
        "matmul_topk_bf16": lambda: one_by_one(half_asked, half_keys, half_room, lambda scores: scores.topk(K)),
        "exact": lambda: backend.search(asked, K),
    }
    skipped, recalls = {}, {}
    truth = backend.search(asked, K).scores[..., -1:] - 1e-4
    for spec in APPROXIMATE:
        try:
            other = make_backend(spec, **settings)
            other.add(stored)
            recalls[spec] = float((other.search(asked, K).scores >= truth).float().mean())
            functions[spec] = partial(other.search, asked, K)
        except Exception as error:  # such as a type that the card lacks
            skipped[spec] = f"{type(error).__name__}: {error}"[:300]
    if peers:
        functions.update(_peers(stored, asked, skipped))
    milliseconds = side_by_side(functions, device, rounds)
    exact = milliseconds["exact"]
    extra, waits = None, None
    if device.type == "cuda":
        extra, waits = _extra_memory(backend, asked, keys), _waits(backend, asked, stored)
    ratios = {
        "exact over bare bf16 matmul": exact / min(milliseconds["matmul_bf16"], milliseconds["matmul_bf16_batched"]),
        "exact over bare fp32 matmul": exact / milliseconds["matmul_fp32"],
        "torch fp32 matmul and topk over exact": milliseconds["matmul_topk_fp32"] / exact,
        "torch bf16 matmul and topk over exact": milliseconds["matmul_topk_bf16"] / exact,
        "peak extra memory over score matrix": extra,
    }
    for name in ("faiss knn_gpu", "cuvs-brute-force"):
        if name in milliseconds:
            ratios[f"{name} over exact"] = milliseconds[name] / exact
    return {
        "memories": memories,
        "keys": keys,
        "queries": queries,
        "dim": dim,
        "kernel": backend.kernel,
        "milliseconds": milliseconds,
        "ratios": ratios,
        "recall": recalls,
        "skipped": skipped,
        "waits_for_the_device": waits,
        "kernels_ms": kernels_ms(backend, asked) if device.type == "cuda" else None,
        "index_bytes_over_key_bytes": backend.stats().index_bytes / backend.stats().key_bytes,
    }


def _peers(stored: Tensor, asked: Tensor, skipped: dict[str, str]) -> dict[str, Callable[[], Any]]:
    """faiss's `knn_gpu` and cuVS's brute force over the same tensors, where they can run."""
    found: dict[str, Callable[[], Any]] = {}
    memories, keys, dim = stored.shape
    try:
        import faiss
        import faiss.contrib.torch_utils  # lets knn_gpu take tensors

        from recollect.memory_backends.faiss_support import gpu_resources

        resources = gpu_resources(faiss, "faiss-flat")

        def knn() -> None:
            for row in range(memories):
                faiss.knn_gpu(resources, asked[row], stored[row], K, metric=faiss.METRIC_INNER_PRODUCT)

        knn()
        found["faiss knn_gpu"] = knn
    except (ImportError, MemoryBackendError, RuntimeError) as error:
        skipped["faiss knn_gpu"] = str(error)[:300]
    try:
        cuvs = make_backend("cuvs-brute-force", num_memories=memories, capacity=keys, dim=dim, device=stored.device)
        cuvs.add(stored)
        cuvs.search(asked, K)
        found["cuvs-brute-force"] = lambda: cuvs.search(asked, K)
    except (MemoryBackendError, RuntimeError) as error:
        skipped["cuvs-brute-force"] = str(error)[:300]
    return found


def _extra_memory(backend: Any, asked: Tensor, keys: int) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    backend.search(asked, K)
    return (torch.cuda.max_memory_allocated() - before) / (asked.shape[0] * asked.shape[1] * keys * 4)


def _waits(backend: Any, asked: Tensor, stored: Tensor) -> dict[str, int]:
    """How often a search, an append and a gather make the host wait for the device."""
    slots = backend.search(asked, K).slots
    # Keys of their own: twins of what is held, 128 slots apart, open every block that they lie in.
    fresh = torch.randn_like(stored[:, : asked.shape[1]])
    calls: dict[str, Callable[[], Any]] = {
        "search": lambda: backend.search(asked, K),
        "add": lambda: backend.add(fresh),
        "gather_keys": lambda: backend.gather_keys(slots),
    }
    counted = {}
    for name, call in calls.items():
        call()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counted[name] = sum("synchroniz" in str(warning.message) for warning in caught)
    return counted


def kernels_ms(backend: Any, asked: Tensor) -> dict[str, float]:
    """Milliseconds of one search by kernel, the longest ten."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        backend.search(asked, K)
        torch.cuda.synchronize()
    spent = {event.key[:80]: event.self_device_time_total / 1000 for event in profile.key_averages()}
    return dict(sorted(spent.items(), key=lambda item: -item[1])[:10])


def time_indexes(device: torch.device, *, memories: int, keys: int, queries: int, dim: int) -> list[dict[str, Any]]:
    """Indexes that live on a card: recall and milliseconds of a search beside exact search, and of an append."""
    rows = []
    on_card = {"device": device} if device.type == "cuda" else {}
    stored, asked = torch.randn(memories, keys, dim, device=device), torch.randn(memories, queries, dim, device=device)
    exact = make_backend("exact", num_memories=memories, capacity=keys, dim=dim, **on_card)
    exact.add(stored)
    truth = exact.search(asked, K).scores[..., -1:] - 1e-4
    specs = [f"{name}:device=cuda" for name in ("faiss-flat", "faiss-ivf", "faiss-ivfpq")]
    for spec in [*specs, "cuvs-brute-force", "cuvs-cagra", "cuvs-cagra:itopk_size=256,search_width=4"]:
        place = on_card if spec.startswith("cuvs") else {}
        try:
            backend = make_backend(spec, num_memories=memories, capacity=keys, dim=dim, **place)
            backend.add(stored)
            backend.wait()
            found = backend.search(asked, K)
            true = torch.einsum("mqd,mqkd->mqk", asked, exact.gather_keys(found.slots))
            recall = float((true.masked_fill(found.slots < 0, -torch.inf) >= truth).float().mean())
            calls = {"search": partial(backend.search, asked, K), "add": partial(backend.add, stored[:, :queries])}
            milliseconds = side_by_side(calls, device, 3)
        except (BackendUnavailable, UnsupportedOperation) as error:
            rows.append({"spec": spec, "status": "skipped", "reason": str(error)})
            continue
        except Exception as error:  # of a library that this project could not run before
            rows.append({"spec": spec, "status": "failed", "reason": f"{type(error).__name__}: {error}"[:500]})
            continue
        status = "ok" if recall >= type(backend).recall_floor else "failed"
        rows.append({"spec": spec, "status": status, "recall": recall, "milliseconds": milliseconds})
    return rows
