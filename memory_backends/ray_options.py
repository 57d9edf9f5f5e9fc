"""The options of the backend `ray`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from recollect.memory_backends.errors import InvalidSpec, UnknownBackend
from recollect.memory_backends.options import IN_MEMORY, KeyStorageOptions
from recollect.memory_backends.ray_session import LOCAL, Placement
from recollect.memory_backends.registry import canonical_spec, capabilities_of, classes_of

NAME = "ray"
BACKEND = "exact"
WHERE = "where shards run changes no answer; tests/test_ray.py"


@dataclass(frozen=True)
class RayOptions(KeyStorageOptions):
    """Options of `ray`; `backend` is kept in its canonical form."""

    shards: int = field(default=2, metadata={"help": "processes that the keys are spread over", "unseen": WHERE})
    backend: str = field(
        default=BACKEND,
        metadata={"help": "registry string, in quotes, of what holds each shard; may change in its search options"},
    )
    keys: Literal["caller", "store"] = field(
        default="caller",
        metadata={
            "help": "where raw keys lie, from which lost shards are filled: with the caller, or in the durable store "
            "that `store` names"
        },
    )
    store: str = field(
        default="",
        metadata={"help": "with keys=store: a folder or an object store's address that every shard can reach"},
    )
    address: str = field(
        default=LOCAL,
        metadata={
            "help": "local runs Ray on this machine; else the address of a cluster, such as 10.0.0.1:6379, or auto"
        },
    )
    partial: bool = field(
        default=False,
        metadata={
            "help": "while a shard is away, answer from the others with a warning, instead of waiting for it",
            "unseen": "only while a shard is away; tests/test_ray_faults.py",
        },
    )
    deadline_seconds: float = field(
        default=30.0,
        metadata={
            "help": "how long a search waits for a shard that neither answers nor takes keys, before it raises",
            "unseen": "only while a shard is away; tests/test_ray_faults.py",
        },
    )
    cpus_per_shard: float = field(
        default=0.0,
        metadata={
            "help": "cores that Ray reserves for each shard and that it uses; 0 reserves none, and shards share the "
            "cores of their machine",
            "unseen": WHERE,
        },
    )
    gpus_per_shard: float = field(
        default=0.0,
        metadata={"help": "GPUs for each shard, which then lives there; 0 for the CPU", "unseen": WHERE},
    )
    resources: str = field(
        default="",
        metadata={"help": "resources of the cluster that each shard needs, such as 'big_memory=1,site_a=0.5'"},
    )
    placement: Literal["spread", "pack"] = field(
        default="spread",
        metadata={
            "help": "spread: over the cluster's machines; pack: on the caller's, as room allows",
            "unseen": WHERE,
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shards < 1:
            raise ValueError(f"shards={self.shards} is below 1")
        if self.deadline_seconds <= 0:
            raise ValueError(f"deadline_seconds={self.deadline_seconds:g} is not above 0")
        if (self.keys == "store") != bool(self.store):
            raise ValueError(
                f"keys={self.keys} and store={self.store!r} do not go together: write keys=store,store='a folder or "
                "address', or leave both out"
            )
        if self.store and (self.storage != "float32" or self.keys_in != IN_MEMORY):
            raise ValueError("keys=store keeps whole keys in the store: leave out storage and keys_in")
        for name in ("cpus_per_shard", "gpus_per_shard"):
            amount = getattr(self, name)
            if amount < 0 or (amount > 1 and amount != int(amount)):
                raise ValueError(f"{name}={amount:g} is neither a part of one nor a whole number of at least 0")
        if not self.address or self.address.startswith("ray://"):
            raise ValueError(
                f"address={self.address!r} does not do: write local, auto, or the head's own address such as "
                "10.0.0.1:6379 (through a Ray client, ray://, keys would take a detour)"
            )
        parse_resources(self.resources)
        try:
            canonical = canonical_spec(self.backend)
        except (InvalidSpec, UnknownBackend) as error:
            raise InvalidSpec(f"{NAME!r}: backend={self.backend!r}: {error}") from error
        if any(cls.one_shared for cls in classes_of(canonical)):
            raise InvalidSpec(
                f"{NAME!r}: backend={self.backend!r} spreads its keys itself: name what each shard should hold them in"
            )
        if self.gpus_per_shard and "cuda" not in capabilities_of(canonical).devices:
            raise InvalidSpec(
                f"{NAME!r}: gpus_per_shard={self.gpus_per_shard:g}, and backend={canonical!r} can't live on a GPU"
            )
        object.__setattr__(self, "backend", canonical)

    @property
    def where(self) -> Placement:
        """What Ray is asked for, for each shard."""
        return Placement(
            self.cpus_per_shard, self.gpus_per_shard, parse_resources(self.resources), self.placement == "spread"
        )


def parse_resources(text: str) -> tuple[tuple[str, float], ...]:
    """Names and amounts of resources written as 'name=1,other=0.5'.

    Raises:
        ValueError: it is not so written.
    """
    found = {}
    for part in filter(None, text.split(",")):
        name, _, amount = (piece.strip() for piece in part.partition("="))
        try:
            found[name] = float(amount)
        except ValueError:
            raise ValueError(f"resources={text!r} is not understood at {part!r}: write 'name=1,other=0.5'") from None
        if not name or not found[name] > 0:
            raise ValueError(f"resources={text!r}: {part!r} needs a name and an amount above 0")
    return tuple(sorted(found.items()))
