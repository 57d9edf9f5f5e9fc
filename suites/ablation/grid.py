"""Reading a grid: a TOML file that declares variants of a model, and the scales at which they run.

    name = "gate"
    question = "Which gate joins memory and local attention best?"
    extends = "base"                     # another grid's [model], [training], [evaluation] and [scales] come first
    reference = "head"                   # every figure is also shown as a difference to this variant
    seeds = 3

    [model]                              # `ModelConfig`, starting from its preset "laptop" or the one named by `preset`
    [training]                           # `TrainingOptions`
    [evaluation]                         # `EvaluationSettings`
    [scales.small.model]                 # what only one scale has; likewise .training and .evaluation
    [[variants]]
    name = "token"
    summary = "..."
    model.gate = "token"

A variant's keys: `model`, `training`, `evaluation` change the grid's values; `from` takes over another variant's
values first (what then differs at evaluation alone shares its checkpoint); `start_from` fine-tunes that variant's
checkpoint; `system` names how it is evaluated (`systems.py`) with `options`; `match_cost` sets one size so that the
variant costs as much as another (`matching.py`); `probes.<name>` adds figures (`probe_types.py`); `reference` takes
the place of the grid's; `scales.<scale>` holds changes for one scale; `only` names the scales that have it.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .options import AblateError

SHIPPED = Path(__file__).resolve().parent.parent / "grids"
"""The folder of the grids that come with the package."""

TABLES = ("model", "training", "evaluation")
_GRID_KEYS = ("name", "question", "extends", "reference", "seeds", "paper", "scales", "variants", *TABLES)
_SCALE_KEYS = ("seconds", *TABLES)
_VARIANT_KEYS = (
    "name",
    "summary",
    "from",
    "start_from",
    "system",
    "options",
    "match_cost",
    "probes",
    "reference",
    "scales",
    "only",
    *TABLES,
)
_MATCH_KEYS = ("to", "vary", "of", "values")
SYSTEMS = ("model", "knn-lm", "spalm", "training-free")
"""Ways to evaluate a checkpoint; see `systems.py`."""
MATCHED = ("time", "bytes")


@dataclass(frozen=True)
class MatchCost:
    """A size to be set so that a variant costs what another costs.

    Attributes:
        to: the variant whose cost is the measure.
        vary: dotted name of the value to set, such as 'model.xl_cache'.
        of: 'time' (of a training step) or 'bytes' (of memory and caches for each sequence).
        values: the values to choose from, rising.
    """

    to: str
    vary: str
    of: str
    values: tuple[int, ...]


@dataclass(frozen=True)
class Variant:
    """One variant at one scale, as the file has it, `from` and `start_from` resolved into `tables`.

    Attributes:
        name, summary: for people.
        tables: its values of model, training and evaluation, complete but for the defaults of the classes.
        changes: what it says itself, dotted names.
        parent: the variant that `from` or `start_from` names.
        start_from: the variant whose checkpoint is fine-tuned.
        system: how it is evaluated.
        options: the system's options.
        match_cost: None, or what is set by cost.
        probes: options by name.
        reference: the variant that it is compared with.
    """

    name: str
    summary: str
    tables: dict[str, dict[str, Any]]
    changes: dict[str, Any]
    parent: str | None
    start_from: str | None
    system: str
    options: dict[str, Any]
    match_cost: MatchCost | None
    probes: dict[str, dict[str, Any]]
    reference: str

    def where(self, grid: Grid) -> str:
        """How messages call it."""
        return f"grid {grid.name!r}, variant {self.name!r}"


@dataclass(frozen=True)
class Grid:
    """A grid at one scale.

    Attributes:
        seconds: what one training of the scale's own model takes, for the estimate; None where the file does not say.
        paper: name of the paper's table that the report shows beside it; empty for none.
    """

    name: str
    question: str
    scale: str
    reference: str
    seeds: int
    variants: tuple[Variant, ...]
    text: str
    paper: str = ""
    seconds: float | None = None
    path: Path = field(default_factory=Path)

    def variant(self, name: str) -> Variant:
        """The variant of that name."""
        return next(variant for variant in self.variants if variant.name == name)


def shipped_grids() -> tuple[str, ...]:
    """Names of the grids that come with the package."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.toml") if path.stem != "base"))


def load_grid(name: str, scale: str) -> Grid:
    """Reads a shipped grid, or a file, at one scale.

    Raises:
        AblateError: there is no such grid or scale, the file is not TOML, or a key or name in it is unknown.
    """
    path = _find(name)
    content = _read(path)
    tables, seconds, scales = _inherited(path, content, scale, seen=())
    if scale not in scales:
        raise AblateError(f"{path} has no scale {scale!r}; it has {_listed(scales)}")
    raw = content.get("variants", [])
    if not isinstance(raw, list) or not raw or not all(isinstance(item, dict) for item in raw):
        raise AblateError(f"{path} has no [[variants]]: a grid is made of them")
    chosen = {}
    for number, item in enumerate(raw, start=1):
        label = _text(item, "name", f"{path}, variant {number}")
        if label in chosen:
            raise AblateError(f"{path} has two variants named {label!r}")
        _check_keys(item, _VARIANT_KEYS, f"{path}, variant {label!r}")
        for name, values in item.get("scales", {}).items():
            _check_keys(values, (*TABLES, "options"), f"{path}, variant {label!r}, scale {name!r}")
        only = item.get("only", list(scales))
        only = [only] if isinstance(only, str) else only
        for wanted in (*only, *item.get("scales", {})):
            if wanted not in scales:
                raise AblateError(f"{path}, variant {label!r} names the scale {wanted!r}; it has {_listed(scales)}")
        if scale in only:
            chosen[label] = item
    title = _text(content, "name", str(path))
    reference = _known(_text(content, "reference", str(path)), chosen, f"{path}: reference")
    made = {label: _variant(path, chosen, label, tables, scale, reference) for label in chosen}
    seeds = content.get("seeds", 3)
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
        raise AblateError(f"{path}: seeds is {seeds!r}; want how many, 1 or more")
    return Grid(
        name=title,
        question=_text(content, "question", str(path)),
        scale=scale,
        reference=reference,
        seeds=seeds,
        variants=tuple(made.values()),
        text=path.read_text(encoding="utf-8"),
        paper=str(content.get("paper", "")),
        seconds=seconds,
        path=path,
    )


def _find(name: str) -> Path:
    if name.endswith(".toml") or "/" in name:
        path = Path(name).expanduser()
        if not path.is_file():
            raise AblateError(f"there is no grid file {name!r}")
        return path
    path = SHIPPED / f"{name}.toml"
    if not path.is_file() or name == "base":
        raise AblateError(
            f"there is no shipped grid {name!r}{_hint(name, shipped_grids())}; there are "
            f"{', '.join(shipped_grids())}, and any path that ends in .toml"
        )
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise AblateError(f"{path} is not TOML: {error}") from error
    _check_keys(content, _GRID_KEYS, str(path))
    for scale, values in content.get("scales", {}).items():
        _check_keys(values, _SCALE_KEYS, f"{path}, scale {scale!r}")
    return content


def _inherited(
    path: Path, content: dict[str, Any], scale: str, seen: tuple[Path, ...]
) -> tuple[dict[str, dict[str, Any]], float | None, tuple[str, ...]]:
    """Tables, seconds and names of the scales, those of `extends` first."""
    tables: dict[str, dict[str, Any]] = {name: {} for name in TABLES}
    seconds: float | None = None
    scales: tuple[str, ...] = ()
    other = content.get("extends")
    if other is not None:
        beside = path.parent / f"{other}.toml"
        parent = beside if beside.is_file() else SHIPPED / f"{other}.toml"
        if parent in (*seen, path):
            raise AblateError(f"{path}: extends = {other!r} leads back to itself")
        if not parent.is_file():
            raise AblateError(f"{path}: extends = {other!r}, and there is no such grid beside it or shipped")
        tables, seconds, scales = _inherited(parent, _read(parent), scale, (*seen, path))
    own = content.get("scales", {})
    for part in (content, own.get(scale, {})):
        _merge(tables, part, str(path))
    return tables, own.get(scale, {}).get("seconds", seconds), tuple(dict.fromkeys((*scales, *own)))


def _merge(tables: dict[str, dict[str, Any]], part: Mapping[str, Any], where: str) -> None:
    """Lays the tables of `part` over `tables`; the table `evaluation.model` is merged by its keys too."""
    for name in TABLES:
        values = part.get(name, {})
        if not isinstance(values, dict):
            raise AblateError(f"{where}: {name} is {values!r}; want a table")
        for key, value in values.items():
            if isinstance(value, dict):
                value = {**tables[name].get(key, {}), **value}
            tables[name][key] = value


def _variant(
    path: Path,
    chosen: dict[str, dict[str, Any]],
    label: str,
    base: dict[str, dict[str, Any]],
    scale: str,
    reference: str,
) -> Variant:
    item, where = chosen[label], f"{path}, variant {label!r}"
    tables, chain = {name: dict(values) for name, values in base.items()}, _ancestors(path, chosen, label)
    for ancestor in (*reversed(chain), label):
        _merge(tables, chosen[ancestor], f"{path}, variant {ancestor!r}")
        _merge(tables, chosen[ancestor].get("scales", {}).get(scale, {}), f"{path}, variant {ancestor!r}")
    own: dict[str, dict[str, Any]] = {name: {} for name in TABLES}
    for part in (item, item.get("scales", {}).get(scale, {})):
        _merge(own, part, where)
    line = [label, *chain]
    system = next((chosen[name]["system"] for name in line if "system" in chosen[name]), "model")
    if system not in SYSTEMS:
        raise AblateError(
            f"{where}: system {system!r} is unknown{_hint(system, SYSTEMS)}; choose of {_listed(SYSTEMS)}"
        )
    probes = item.get("probes", {})
    if not isinstance(probes, dict) or not all(isinstance(value, dict) for value in probes.values()):
        raise AblateError(
            f"{where}: probes is {probes!r}; want a table of options for each, such as probes.staleness = {{}}"
        )
    matched = next((chosen[name]["match_cost"] for name in line if "match_cost" in chosen[name]), None)
    return Variant(
        name=label,
        summary=str(item.get("summary", "")),
        tables=tables,
        changes=_dotted(own),
        parent=item.get("from", item.get("start_from")),
        start_from=item.get("start_from"),
        system=system,
        options=_options(chosen, line, scale),
        match_cost=None if matched is None else _match(matched, chosen, where),
        probes=probes,
        reference=_known(item.get("reference", reference), chosen, f"{where}: reference"),
    )


def _options(chosen: dict[str, dict[str, Any]], line: list[str], scale: str) -> dict[str, Any]:
    """The system's options, those of ancestors first."""
    found: dict[str, Any] = {}
    for name in reversed(line):
        found |= chosen[name].get("options", {})
        found |= chosen[name].get("scales", {}).get(scale, {}).get("options", {})
    return found


def _ancestors(path: Path, chosen: dict[str, dict[str, Any]], label: str) -> list[str]:
    """The variants that `from` and `start_from` lead to, nearest first."""
    chain: list[str] = []
    current = label
    while True:
        item, where = chosen[current], f"{path}, variant {current!r}"
        if "from" in item and "start_from" in item:
            raise AblateError(f"{where} has both from and start_from: start_from takes over that variant's values too")
        name = item.get("from", item.get("start_from"))
        if name is None:
            return chain
        key = "from" if "from" in item else "start_from"
        if name in (label, *chain):
            raise AblateError(f"{where}: {key} = {name!r} leads back to itself")
        chain.append(_known(name, chosen, f"{where}: {key}"))
        current = name


def _match(values: Any, chosen: dict[str, dict[str, Any]], where: str) -> MatchCost:
    if not isinstance(values, dict):
        raise AblateError(f"{where}: match_cost is {values!r}; want a table with {', '.join(_MATCH_KEYS)}")
    _check_keys(values, _MATCH_KEYS, f"{where}, match_cost")
    missing = [key for key in _MATCH_KEYS if key not in values]
    if missing:
        raise AblateError(f"{where}, match_cost lacks {', '.join(missing)}")
    table, _, key = str(values["vary"]).partition(".")
    if table != "model" or not key:
        raise AblateError(f"{where}, match_cost: vary is {values['vary']!r}; want a value such as 'model.xl_cache'")
    if values["of"] not in MATCHED:
        raise AblateError(f"{where}, match_cost: of is {values['of']!r}; choose of {_listed(MATCHED)}")
    sizes = values["values"]
    if not isinstance(sizes, list) or not sizes or sorted(set(sizes)) != sizes:
        raise AblateError(f"{where}, match_cost: values is {sizes!r}; want whole numbers that rise")
    to = _known(values["to"], chosen, f"{where}, match_cost: to")
    return MatchCost(to, str(values["vary"]), str(values["of"]), tuple(int(size) for size in sizes))


def _dotted(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, dict):
            flat |= _dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _check_keys(values: Any, known: Iterable[str], where: str) -> None:
    if not isinstance(values, dict):
        raise AblateError(f"{where} is {values!r}; want a table")
    known = tuple(known)
    for key in values:
        if key not in known:
            raise AblateError(f"{where}: unknown key {key!r}{_hint(key, known)}; the keys are {', '.join(known)}")


def _known(name: Any, known: Iterable[str], what: str) -> str:
    known = tuple(known)
    if name not in known:
        raise AblateError(
            f"{what} names {name!r}, which is no variant{_hint(str(name), known)}; there are {_listed(known)}"
        )
    return str(name)


def _text(values: Mapping[str, Any], key: str, where: str) -> str:
    value = values.get(key)
    if not isinstance(value, str) or not value:
        raise AblateError(f"{where}: {key} is {value!r}; want text")
    return value


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
