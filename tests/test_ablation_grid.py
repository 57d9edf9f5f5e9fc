"""Grids: what a file may say, how variants inherit, and that every fault is told before anything is trained."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from ablation_grids import TINY, VARIANTS, write_corpus, write_grid

from recollect.memory_backends.base import MemoryBackend
from recollect.model.configuration import ModelConfig
from recollect.suites.ablation.grid import SHIPPED, load_grid, shipped_grids
from recollect.suites.ablation.options import SCALES, AblateError, AblateOptions
from recollect.suites.ablation.plan import Planner
from recollect.suites.ablation.runner import plan_ablation
from recollect.suites.ablation.schedule import open_tasks
from recollect.suites.ablation.settings import model_config, training_identity, training_options


def check(path: str, scale: str = "small") -> None:
    """Everything that can be wrong with a grid without a corpus."""
    options = AblateOptions(grids=(path,), scale=scale)
    Planner(options, (), matched=lambda grid, variant, resolved: {}).check([load_grid(path, scale)])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", shipped_grids())
def test_shipped_grids_are_sound_at_every_scale(name: str, scale: str) -> None:
    check(name, scale)
    assert load_grid(name, scale).name == name


def test_shipped_grids_cover_what_the_paper_ablates() -> None:
    grids = {name: load_grid(name, "gpu") for name in shipped_grids()}
    wanted = {"memory", "gate", "normalisation", "search-pairs", "layers", "neighbours", "context", "stored-key"}
    assert wanted | {"eviction", "baselines", "domains"} <= set(grids)
    gates = {variant.tables["model"].get("gate", "head") for variant in grids["gate"].variants}
    assert len(gates) == 10
    sizes = {variant.tables["model"]["memory_size"] for variant in grids["memory"].variants}
    assert {0, 512, 2048, 8192, 32768, 131072, 262144} <= sizes
    assert {variant.tables["model"]["k"] for variant in grids["neighbours"].variants} == {1, 8, 32, 128, 256}
    systems = {variant.system for variant in grids["baselines"].variants}
    assert systems == {"model", "knn-lm", "spalm", "training-free"}


def test_shipped_grids_are_installed_with_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    assert "grids/*.toml" in project["tool"]["setuptools"]["package-data"]["recollect.suites"]
    assert (SHIPPED / "base.toml").is_file()


FAULTS = {
    "colour = 1\n": "unknown key 'colour'",
    "model.gaet = 'token'\n": "model.gaet is unknown .did you mean 'gate'",
    "model.gate = 'tokn'\n": "gate='tokn'",
    "model.memory_layers = [7]\n": "layers 0 to 2",
    "model.k = 128\n": "k=128",
    "training.step = 3\n": "training.step is unknown .did you mean 'steps'",
    "training.steps = '3'\n": "training",
    "training.steps = 0\n": "steps=0",
    "training.seed = 3\n": "training.seed is unknown",
    "training.backend = 'exakt'\n": "exakt",
    "training.backend = 'faiss-ivf:nprob=3'\n": "nprob",
    "training.matrix_learning_rate = -1.0\n": "matrix_learning_rate",
    "evaluation.memry_size = 3\n": "evaluation.memry_size is unknown",
    "evaluation.k = 1000\n": "k=1000",
    "evaluation.rows = 0\n": "evaluation.rows is 0",
    "evaluation.precision = 'half'\n": "precision",
    "evaluation.documents = 'short'\n": "documents",
    "evaluation.model.width = 8\n": "evaluation.model.width is unknown",
    "model.memory_layers = [0, 1]\nevaluation.fill_tokens = 32\n": "one memory layer",
    "from = 'memry'\n": "names 'memry'.*did you mean 'memory'",
    "from = 'none'\nstart_from = 'memory'\n": "both from and start_from",
    "start_from = 'memory'\nmodel.width = 64\n": "width is 64",
    "reference = 'nothing'\n": "reference names 'nothing'",
    "system = 'knn'\n": "system 'knn' is unknown",
    "system = 'knn-lm'\n": "own memory off",
    "from = 'none'\nsystem = 'knn-lm'\noptions.neighbours = 3\n": "options.neighbours is unknown",
    "from = 'none'\nsystem = 'knn-lm'\noptions.k = 0\n": "k=0",
    "from = 'none'\nsystem = 'training-free'\noptions.memory_layers = [9]\n": "layers 0 to 2",
    "from = 'none'\nsystem = 'training-free'\n": "options.memory_layers",
    "options.k = 3\n": "options belong to a system",
    "probes.stalenes = {}\n": "no probe 'stalenes'",
    "probes.staleness.pears = 3\n": "probes.staleness.pears is unknown",
    "scales.tiny.model.k = 3\n": "scale 'tiny'",
    "scales.small.models.k = 3\n": "unknown key 'models'",
    "only = 'large'\n": "scale 'large'",
    "match_cost = { to = 'memory', vary = 'model.xl_cache', of = 'money', values = [16] }\n": "money",
    "match_cost = { to = 'memory', vary = 'xl_cache', of = 'time', values = [16] }\n": "vary",
    "match_cost = { to = 'memory', vary = 'model.xl_cache', of = 'time', values = [32, 16] }\n": "rise",
    "match_cost = { to = 'memory' }\n": "lacks",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_variant_is_told_before_anything_is_trained(fault: str, tmp_path: Path) -> None:
    path = write_grid(tmp_path, VARIANTS + '\n[[variants]]\nname = "faulty"\n' + fault)
    with pytest.raises(AblateError, match=FAULTS[fault]) as caught:
        check(path)
    assert "faulty" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("reference", "referense"), "unknown key 'referense'.*did you mean 'reference'"),
        (("seeds = 1", "seeds = 0"), "seeds is 0"),
        (('"none"', '"nune"'), "names 'nune'"),
        (("[training]", "[trainings]"), "unknown key 'trainings'"),
        (("seconds = 1.0", "second = 1.0"), "unknown key 'second'"),
        (("steps = 8", "steps = "), "is not TOML"),
        (("seeds = 1", 'extends = "nowhere"'), "no such grid"),
        (("seeds = 1", 'extends = "tiny"'), "leads back to itself"),
    ],
)
def test_a_faulty_grid_is_told(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    path = write_grid(tmp_path, head=TINY.replace(*change, 1))
    with pytest.raises(AblateError, match=message):
        check(path)


def test_unknown_grids_and_scales_offer_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(AblateError, match="did you mean 'memory'"):
        load_grid("memry", "small")
    with pytest.raises(AblateError, match="no scale 'huge'; it has small, gpu"):
        load_grid("memory", "huge")
    with pytest.raises(AblateError, match="no grid file"):
        load_grid(str(tmp_path / "absent.toml"), "small")


def test_variants_inherit_along_from_and_scales_win_over_the_common_values(tmp_path: Path) -> None:
    more = """
[[variants]]
name = "child"
from = "memory k 2"
model.k = 3
scales.small.model.k = 4
evaluation.memory_size = 32
"""
    child = load_grid(write_grid(tmp_path, VARIANTS + more), "small").variant("child")
    assert child.tables["model"]["k"] == 4
    assert child.tables["evaluation"] == {"rows": 2, "max_tokens": 256, "k": 2, "memory_size": 32}
    assert child.changes == {"model.k": 4, "evaluation.memory_size": 32}


def test_circles_are_told(tmp_path: Path) -> None:
    circle = '[[variants]]\nname = "none"\nfrom = "other"\n[[variants]]\nname = "other"\nfrom = "none"\n'
    with pytest.raises(AblateError, match="leads back to itself"):
        load_grid(write_grid(tmp_path, circle), "small")


def test_without_a_memory_what_belongs_to_one_does_not_count() -> None:
    plain = model_config({"preset": "tiny", "memory_size": 0}, "here")
    assert plain == model_config({"preset": "tiny", "memory_layers": [], "k": 2, "gate": "token"}, "here")
    assert plain.memory_layers == ()


def test_identity_is_of_what_decides_the_weights_alone() -> None:
    config = model_config({"preset": "tiny"}, "here")

    def identity(**values: object) -> object:
        return training_identity(training_options(values, config, "here", seed=0, threads=1, device=None))

    assert identity() == identity(validate_every=3, save_every=7, snapshots=[2]) == identity(steps=3000)
    assert identity() != identity(steps=7)
    other = model_config({"preset": "tiny", "k": 3}, "here")
    assert identity() != training_identity(training_options({}, other, "here", seed=0, threads=1, device=None))
    # A value that a later release adds leaves identities as they are: only what differs from its default is in them.
    assert (
        "layers"
        not in training_identity(training_options({}, ModelConfig(), "here", seed=0, threads=1, device=None))["model"]
    )


def test_nothing_is_planned_twice_and_seeds_come_first(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    first, second = write_grid(tmp_path), write_grid(tmp_path, name="other")
    options = AblateOptions(grids=(first, second), corpora=(f"a={corpus}",), seeds=2, output=tmp_path / "out")
    grids, sections, plan = plan_ablation(options)
    assert [grid.name for grid in grids] == ["tiny", "other"]
    assert [section.name for section in sections] == ["a"]
    assert len(plan.rows) == 2 * 2 * 3
    assert len(plan.trainings) == 2 * 2  # none and memory, for two seeds, for both grids together
    assert len(plan.evaluations) == 2 * 3
    assert not (tmp_path / "out").exists()


def test_the_reference_is_trained_first_and_early_seeds_before_later_ones(tmp_path: Path) -> None:
    more = """
[[variants]]
name = "dear reference"
reference = "dear reference"
training.steps = 80

[[variants]]
name = "compared with it"
reference = "dear reference"
training.steps = 4
"""
    path = write_grid(tmp_path, VARIANTS + more)
    options = AblateOptions(grids=(path,), corpora=(write_corpus(tmp_path / "c"),), seeds=2, output=tmp_path / "out")
    plan = plan_ablation(options)[2]
    plan.rows.sort(key=lambda row: row.variant)  # whatever the order in which rows were planned
    labels = [(job.options.seed, job.label) for job, _ in open_tasks(plan, tmp_path / "out")]
    names = ["tiny/none", "tiny/dear reference", "tiny/compared with it", "tiny/memory"]
    assert labels == [(seed, name) for seed in (0, 1) for name in names]


def test_planning_loads_no_index_and_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a plan made a memory")

    monkeypatch.setattr(MemoryBackend, "__init__", refuse)
    plan_ablation(AblateOptions(grids=(write_grid(tmp_path),), corpora=(write_corpus(tmp_path / "c"),)))


def test_text_that_cannot_fill_the_memory_is_told(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    path = write_grid(tmp_path, VARIANTS + '[[variants]]\nname = "long"\nevaluation.fill_tokens = 100000\n')
    with pytest.raises(ValueError, match="longest test document"):
        plan_ablation(AblateOptions(grids=(path,), corpora=(corpus,), output=tmp_path / "out"))


@pytest.mark.parametrize(
    ("corpora", "message"),
    [(("x=a", "x=b"), "no such corpus|named 'x'"), (("bad name=a",), "is no name")],
)
def test_corpora_are_named_once(corpora: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        plan_ablation(AblateOptions(grids=(write_grid(tmp_path),), corpora=corpora))


def test_the_grid_that_the_documentation_shows_is_sound(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "grids.md").read_text(encoding="utf-8")
    path = tmp_path / "my_grid.toml"
    path.write_text(page.split("```toml\n")[1].split("```")[0], encoding="utf-8")
    for scale in SCALES:
        check(str(path), scale)
