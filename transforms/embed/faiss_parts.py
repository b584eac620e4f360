"""FAISS, and nothing else: what an index is made of, its training, its parts on disk, memory-mapped.

Numbers come in as NumPy arrays; files are local paths. How vectors are found, kept and named is `index`'s business.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from schemas.errors import ModelError, TamisError
from transforms.embed.exact import Metric
from transforms.embed.vectors import FloatArray, IntArray

KINDS = ("flat", "ivf", "hnsw")
_CODECS = {"float32": "Flat", "float16": "SQfp16", "int8": "SQ8"}
# k-means wants 39 to 256 points a centroid (FAISS warns outside); more do not make lists better.
_POINTS_A_LIST, _LEAST_POINTS = 64, 39
_CODEC_POINTS = 16_384
_FACTORY_POINTS = 262_144


@dataclass(frozen=True)
class IndexSpec:
    """What index to build.

    Attributes:
        kind: `flat`, `ivf`, `hnsw`, or a FAISS factory string (`IVF256,PQ48`).
        codec: How vectors are kept in it: float32, float16 or int8 (for the three kinds).
        lists: IVF lists; None takes four times the root of the number of vectors.
        neighbours: HNSW links a vector.
        construction: HNSW breadth while building.
        probe: What is looked at in a search: IVF lists, HNSW breadth; None takes the least that reaches `recall`.
        recall: Recall that `probe` is chosen for.
        at: Cut-off of that recall.
        queries: Vectors of the output it is measured with.
        part_mb: Megabytes of vectors a part: what building holds in memory.
        train_mb: Megabytes of vectors trained on, at most.
        seed: Of the training, and of which vectors are drawn.
        threads: Of FAISS, while building. With more than one a graph is another every time.
    """

    kind: str = "ivf"
    codec: str = "float32"
    lists: int | None = None
    neighbours: int = 32
    construction: int = 200
    probe: int | None = None
    recall: float = 0.95
    at: int = 10
    queries: int = 200
    part_mb: int = 256
    train_mb: int = 512
    seed: int = 0
    threads: int = 1

    @property
    def deciding(self) -> dict[str, Any]:
        """What decides the files (and not only how fast they come)."""
        return {k: v for k, v in asdict(self).items() if k != "threads"}

    def number_of_lists(self, vectors: int, dimension: int) -> int:
        """IVF lists for so many vectors: as asked, or as many as the training sample can carry."""
        points = self._sample_limit(vectors, dimension)
        if self.lists:
            return min(self.lists, points)
        return max(1, min(round(4 * vectors**0.5), points // _LEAST_POINTS))

    def factory(self, vectors: int, dimension: int) -> str:
        """The FAISS factory string.

        Raises:
            TamisError: The codec is not known.
        """
        if self.kind not in KINDS:
            return self.kind
        if self.codec not in _CODECS:
            raise TamisError(f"no codec '{self.codec}'; choose one of: {', '.join(_CODECS)}")
        codec = _CODECS[self.codec]
        if self.kind == "ivf":
            return f"IVF{self.number_of_lists(vectors, dimension)},{codec}"
        return codec if self.kind == "flat" else f"HNSW{self.neighbours},{codec}"

    def sample_size(self, vectors: int, dimension: int) -> int:
        """How many vectors are trained on."""
        if self.kind not in KINDS:
            wanted = _FACTORY_POINTS
        elif self.kind == "ivf":
            wanted = max(_POINTS_A_LIST * self.number_of_lists(vectors, dimension), _CODEC_POINTS)
        else:
            wanted = _CODEC_POINTS
        return min(wanted, self._sample_limit(vectors, dimension))

    def part_vectors(self, dimension: int) -> int:
        """Vectors a part."""
        return max(1, self.part_mb * 1_000_000 // (4 * dimension))

    def _sample_limit(self, vectors: int, dimension: int) -> int:
        return min(vectors, max(_LEAST_POINTS, self.train_mb * 1_000_000 // (4 * dimension)))


def load_faiss(threads: int | None = None) -> Any:
    """FAISS, or one line on how to get it.

    Args:
        threads: Of this process from now on; None leaves them as they are.

    Raises:
        ModelError: It is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ModelError("an index needs faiss; run: pip install 'tamis[models]'") from error
    if threads is not None:
        faiss.omp_set_num_threads(threads)
    return faiss


def new_index(spec: IndexSpec, vectors: int, dimension: int, metric: Metric) -> Any:
    """An empty index.

    Raises:
        TamisError: FAISS cannot make what `spec.kind` asks for.
    """
    faiss = load_faiss(spec.threads)
    measure = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    factory = spec.factory(vectors, dimension)
    try:
        index = faiss.index_factory(dimension, factory, measure)
    except RuntimeError as error:
        why = str(error).splitlines()[-1][:200]
        raise TamisError(
            f"--index '{spec.kind}' is neither {', '.join(KINDS)} nor a FAISS factory string: {why}"
        ) from error
    if spec.kind == "hnsw":
        index.hnsw.efConstruction = spec.construction
    coarse = _coarse(index)
    if coarse is not None:
        coarse.cp.seed = spec.seed & 0x7FFFFFFF
        coarse.cp.min_points_per_centroid = (
            1  # so small that FAISS warns is small enough to be searched whole
        )
    return index


def train(index: Any, sample: FloatArray) -> None:
    """Train an index that needs it.

    Raises:
        TamisError: The sample is too small for what was asked for.
    """
    if index.is_trained:
        return
    try:
        index.train(sample)
    except RuntimeError as error:
        why = str(error).splitlines()[-1][:200]
        raise TamisError(f"the index cannot be trained on {len(sample)} vectors: {why}") from error


def copy_of(index: Any) -> Any:
    """A trained, empty index of its own."""
    return load_faiss().clone_index(index)


def write(index: Any, path: Path) -> None:
    """Write an index to a local file."""
    load_faiss().write_index(index, str(path))


def read(path: Path, *, mapped: bool) -> Any:
    """Read an index; `mapped` leaves its vectors and lists on disk until they are looked at.

    Raises:
        TamisError: The file is damaged.
    """
    faiss = load_faiss()
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
    except RuntimeError as error:
        raise TamisError(
            f"the index file {path.name} cannot be read; build it again with `tamis index`"
        ) from error


def search(index: Any, queries: FloatArray, k: int, metric: Metric) -> tuple[FloatArray, IntArray]:
    """Scores (higher is nearer) and numbers within the part, both (q, k); number -1 and -inf where there are fewer."""
    k = min(k, max(1, index.ntotal))
    scores, numbers = index.search(np.ascontiguousarray(queries, np.float32), k)
    if metric == "l2":
        scores = -scores
    scores[numbers < 0] = -np.inf
    return scores, numbers.astype(np.int64)


def set_probe(index: Any, probe: int) -> None:
    """Set how much of an index a search looks at: IVF lists, or HNSW breadth."""
    faiss = load_faiss()
    coarse = _coarse(index)
    if coarse is not None:
        faiss.ParameterSpace().set_index_parameter(index, "nprobe", float(min(probe, coarse.nlist)))
    elif hasattr(index, "hnsw"):
        index.hnsw.efSearch = probe


def probes(index: Any) -> list[int]:
    """What `probe` may sensibly be, ascending; empty where an index has no such setting."""
    coarse = _coarse(index)
    if coarse is not None:
        steps = [2**i for i in range(coarse.nlist.bit_length()) if 2**i < coarse.nlist]
        return [*steps, int(coarse.nlist)]
    if hasattr(index, "hnsw"):
        return [16, 32, 64, 128, 256, 512, 1024]
    return []


def add(index: Any, blocks: Iterable[FloatArray]) -> int:
    """Add vectors block by block; returns how many."""
    for vectors in blocks:
        index.add(np.ascontiguousarray(vectors, np.float32))
    return int(index.ntotal)


def _coarse(index: Any) -> Any:
    faiss = load_faiss()
    try:
        return faiss.extract_index_ivf(index)
    except RuntimeError:
        return None
