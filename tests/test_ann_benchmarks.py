"""The layout of ann-benchmarks: what is written, what is read of others, ground truth, and backends run on a file."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recollect.model.ann_benchmarks import AnnBenchmarkFile, augmented, load_ann_benchmarks, write_ann_benchmarks
from recollect.model.distances import distances_of
from recollect.model.documents import CorpusError

RANDOM = np.random.default_rng(0)
TRAIN = RANDOM.normal(size=(200, 8)).astype(np.float32) * RANDOM.uniform(0.5, 2, size=(200, 1)).astype(np.float32)
TEST = RANDOM.normal(size=(20, 8)).astype(np.float32)


def as_others_measure(distance: str, one: np.ndarray, other: np.ndarray) -> float:
    """One pair, written out from the definitions of ann-benchmarks and VIBE."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    if distance == "euclidean":
        return float(np.linalg.norm(one - other))
    if distance == "ip":
        return float(-np.dot(one, other))
    return float(1 - np.dot(one, other) / (np.linalg.norm(one) * np.linalg.norm(other)))


@pytest.mark.parametrize(
    ("metric", "augment", "distance", "dimension"),
    [
        ("cosine", True, "angular", 8),
        ("l2", True, "euclidean", 8),
        ("inner_product", False, "ip", 8),
        ("inner_product", True, "angular", 9),
    ],
)
def test_layout_and_ground_truth(tmp_path: Path, metric: str, augment: bool, distance: str, dimension: int) -> None:
    path = tmp_path / "file.hdf5"
    written = write_ann_benchmarks(path, TRAIN, TEST, k=10, metric=metric, augment=augment)
    with h5py.File(path) as file:
        assert file.attrs["distance"] == distance
        assert int(file.attrs["dimension"]) == dimension == file["train"].shape[1]
        assert (file.attrs["type"], file.attrs["point_type"]) == ("dense", "float")
        assert file["train"].dtype == file["test"].dtype == file["distances"].dtype == np.float32
        assert file["neighbors"].shape == file["distances"].shape == (20, 10)
        train, test, neighbors, distances = (file[n][...] for n in ("train", "test", "neighbors", "distances"))
    for query in range(len(test)):
        measured = [as_others_measure(distance, test[query], key) for key in train]
        np.testing.assert_array_equal(neighbors[query], np.argsort(measured, kind="stable")[:10])
        np.testing.assert_allclose(distances[query], np.sort(measured)[:10], rtol=1e-4, atol=1e-5)
    loaded = load_ann_benchmarks(path)
    np.testing.assert_array_equal(loaded.train, written.train)
    np.testing.assert_array_equal(loaded.neighbors, written.neighbors)
    assert (loaded.distance, loaded.dimension, loaded.point_type) == (distance, dimension, "float")


@given(seed=st.integers(0, 1000))
def test_augmented_angle_orders_as_the_inner_product(seed: int) -> None:
    random = np.random.default_rng(seed)
    keys = random.normal(size=(30, 4)).astype(np.float32) * random.uniform(0.1, 3, size=(30, 1)).astype(np.float32)
    queries = random.normal(size=(5, 4)).astype(np.float32)
    longer_keys, longer_queries = augmented(keys, queries)
    lengths = np.linalg.norm(longer_keys, axis=1)
    np.testing.assert_allclose(lengths, lengths.max(), rtol=1e-5)
    products = queries @ keys.T
    angles = distances_of("angular", longer_queries, longer_keys)
    order = np.argsort(angles, axis=1)
    assert (np.diff(np.take_along_axis(products, order, axis=1), axis=1) <= 1e-4).all()


@pytest.mark.parametrize("rows", [1, 7, 200, 1000])
def test_keys_are_read_in_parts(tmp_path: Path, rows: int) -> None:
    written = write_ann_benchmarks(tmp_path / "file.hdf5", TRAIN, TEST, k=10, metric="l2")
    with AnnBenchmarkFile(tmp_path / "file.hdf5") as file:
        parts = list(file.train_chunks(rows))
        assert (file.name, file.keys, file.queries, file.dimension, file.neighbors_known) == ("file", 200, 20, 8, 10)
        np.testing.assert_array_equal(file.test(), TEST)
        np.testing.assert_array_equal(file.truth(3)[0], written.neighbors[:, :3])
        np.testing.assert_array_equal(file.train(5, 9), TRAIN[5:9])
        with pytest.raises(CorpusError, match="k is 11: the file holds 10 true neighbours"):
            file.check_k(11)
    assert [start for start, _ in parts] == list(range(0, 200, rows))
    np.testing.assert_array_equal(np.concatenate([keys for _, keys in parts]), TRAIN)


def test_the_queries_to_train_on_are_counted(tmp_path: Path) -> None:
    """VIBE gives some files queries to train on."""
    write_ann_benchmarks(tmp_path / "file.hdf5", TRAIN, TEST, k=10)
    with h5py.File(tmp_path / "file.hdf5", "a") as file:
        file.create_dataset("learn", data=np.zeros((33, 9), dtype=np.float32))
        file.create_dataset("avg_distances", data=np.zeros(20))
    with AnnBenchmarkFile(tmp_path / "file.hdf5") as read:
        assert read.learn_queries == 33


def test_files_of_others(tmp_path: Path) -> None:
    """Old files lack `dimension` and `type`, and keep words as bytes and vectors in other types."""
    path = tmp_path / "old.hdf5"
    with h5py.File(path, "w") as file:
        file.attrs["distance"] = np.bytes_("angular")
        file.attrs["point_type"] = np.bytes_("float")
        file.create_dataset("train", data=TRAIN.astype(np.float64))
        file.create_dataset("test", data=TEST.astype(np.float64))
        file.create_dataset("neighbors", data=np.zeros((20, 1), dtype="i"))
        file.create_dataset("distances", data=np.zeros((20, 1), dtype="f"))
    loaded = load_ann_benchmarks(path)
    assert (loaded.distance, loaded.metric, loaded.train.dtype) == ("angular", "cosine", np.float32)
    for distance, metric in (("dot", "inner_product"), ("normalized", "inner_product"), ("euclidean", "l2")):
        with h5py.File(path, "a") as file:
            file.attrs["distance"] = distance
        assert load_ann_benchmarks(path).metric == metric


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("hamming", "with distance 'hamming'"),
        ("sparse", "is sparse"),
        ("missing", "it has no neighbors"),
        ("outside", "neighbours outside its 200 keys"),
        ("shape", "does not fit together"),
        ("cut", "cannot be read as HDF5"),
        ("text", "cannot be read as HDF5"),
        ("bits", "no backend searches packed bits"),
    ],
)
def test_bad_files(tmp_path: Path, damage: str, message: str) -> None:
    path = tmp_path / "file.hdf5"
    write_ann_benchmarks(path, TRAIN, TEST, k=10)
    if damage in ("cut", "text"):
        path.write_bytes(path.read_bytes()[:500] if damage == "cut" else b"train,test\n")
    else:
        with h5py.File(path, "a") as file:
            if damage == "hamming":
                file.attrs["distance"] = "hamming"
            elif damage == "bits":
                file.attrs["point_type"] = "binary"
            elif damage == "sparse":
                file.attrs["type"] = "sparse"
            elif damage == "missing":
                del file["neighbors"]
            elif damage == "outside":
                file["neighbors"][0, 0] = 200
            else:
                del file["test"]
                file["test"] = TEST[:, :3]
    with pytest.raises(CorpusError, match=message):
        load_ann_benchmarks(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no such file"):
        load_ann_benchmarks(tmp_path / "none.hdf5")


def test_bad_arguments(tmp_path: Path) -> None:
    path = tmp_path / "file.hdf5"
    with pytest.raises(CorpusError, match="unknown metric 'dot'"):
        write_ann_benchmarks(path, TRAIN, TEST, metric="dot")
    with pytest.raises(CorpusError, match="k is 201, and there are 200 keys"):
        write_ann_benchmarks(path, TRAIN, TEST, k=201)
    with pytest.raises(CorpusError, match="do not fit"):
        write_ann_benchmarks(path, TRAIN, TEST[:, :4], k=2)
    with pytest.raises(CorpusError, match="not finite"):
        write_ann_benchmarks(path, np.full_like(TRAIN, np.nan), TEST, k=2)
    assert not path.exists()
