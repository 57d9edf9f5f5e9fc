"""The machines of a cluster: which may measure beside each other, and which must not measure at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import EngineError

_KIND = (("cpu", "processor"), ("cores", "usable cores"), ("accelerator", "accelerator"), ("python", "Python"))
"""What two machines must share for times, and figures to the last digit, to be compared."""


@dataclass(frozen=True)
class Machine:
    """One node of a cluster.

    Attributes:
        node: its id in the cluster.
        name: for people; unique in the cluster.
        cpus, gpus: that the cluster's scheduler may give away.
        described: by `node.describe_node`.
    """

    node: str
    name: str
    cpus: int
    gpus: int
    described: Mapping[str, Any]

    @property
    def hardware(self) -> Mapping[str, Any]:
        """As `environment.describe_machine` has it."""
        hardware: Mapping[str, Any] = self.described["machine"]
        return hardware

    @property
    def host(self) -> str:
        """Equal for nodes that share one running kernel."""
        return str(self.described["host"])

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for machines that are alike."""
        return kind_of(self.hardware)


def kind_of(hardware: Mapping[str, Any]) -> tuple[Any, ...]:
    """What is equal for machines that are alike."""
    return tuple(hardware.get(name) for name, _ in _KIND)


def name_machines(found: Sequence[tuple[str, int, int, Mapping[str, Any]]]) -> list[Machine]:
    """Machines from (node, cpus, gpus, description): called by host name, with part of the id where hosts repeat."""
    hosts = Counter(str(described["host_name"]) for *_, described in found)
    machines = []
    for node, cpus, gpus, described in found:
        name = str(described["host_name"])
        machines.append(Machine(node, name if hosts[name] == 1 else f"{name}/{node[:6]}", cpus, gpus, described))
    return machines


def check_versions(machine: Machine, here: Mapping[str, Any]) -> None:
    """Raises EngineError where a machine would measure with another recollect, code or library than this one.

    Args:
        machine: of the cluster.
        here: `node.describe_node` of the machine that the run was started on.
    """
    there = machine.described
    found = []
    if there["recollect"] != here["recollect"]:
        found.append(f"recollect {there['recollect']} (here {here['recollect']})")
    elif (there["code"], there["training"]) != (here["code"], here["training"]):
        found.append(f"other code of recollect {there['recollect']} ({_code(there)}; here {_code(here)})")
    libraries, own = there["libraries"], here["libraries"]
    for name in own:
        if libraries.get(name) != own[name]:
            found.append(f"{name} {libraries[name]} (here {own[name]})" if name in libraries else f"no {name}")
    if found:
        raise EngineError(
            f"machine {machine.name} has {', '.join(found)}: figures would not compare. Install the same versions on "
            "every machine of the cluster, or take this one out of it"
        )


def _code(described: Mapping[str, Any]) -> str:
    commit = described.get("commit")
    changed = " with changes" if described.get("uncommitted_changes") else ""
    return f"commit {str(commit)[:12]}{changed}" if commit else f"digest {str(described['code'])[:12]}"


def choose_kind(
    machines: Sequence[Machine], former: Mapping[str, Any] | None, here: Mapping[str, Any]
) -> tuple[list[Machine], list[Machine]]:
    """The machines that measure, all alike, and those that are left out.

    Args:
        machines: all of the cluster.
        former: hardware that earlier results come from: its kind comes first, so that they are gone on with.
        here: hardware of this machine: its kind comes first among kinds with equally many machines.
    """
    counts = Counter(machine.kind for machine in machines)
    wanted = [] if former is None else [kind_of(former)]
    kinds = sorted(counts, key=lambda kind: (kind not in wanted, -counts[kind], kind != kind_of(here)))
    chosen = [machine for machine in machines if machine.kind == kinds[0]]
    return chosen, [machine for machine in machines if machine.kind != kinds[0]]


def unlike(machines: Sequence[Machine]) -> list[str]:
    """What differs between machines, one line for each that is not like the first."""
    found = []
    for machine in machines[1:]:
        parts = []
        for name, words in _KIND:
            one, other = machines[0].hardware.get(name), machine.hardware.get(name)
            if one != other:
                parts.append(f"{words} {one} against {other}")
        if parts:
            found.append(f"{machines[0].name} and {machine.name}: {'; '.join(parts)}")
    return found


def apart(machines: Sequence[Machine], *, hosts: bool = True) -> list[Machine]:
    """Those that can have a machine to themselves: as many CPUs in the cluster as most have, and one of each host.

    Args:
        machines: alike.
        hosts: False takes two nodes of one host for two machines.
    """
    counts = Counter(machine.cpus for machine in machines)
    usual = max(counts, key=lambda cpus: (counts[cpus], cpus))
    chosen: dict[str, Machine] = {}
    for machine in machines:
        if machine.cpus == usual:
            chosen.setdefault(machine.host if hosts else machine.node, machine)
    return list(chosen.values())


__all__ = ["Machine", "apart", "check_versions", "choose_kind", "kind_of", "name_machines", "unlike"]
