"""Vector indices: faiss, read and mapped, and hnswlib."""

from pathlib import Path
from typing import Any

import faiss
import hnswlib
import numpy as np

from tests.engines.programs.common import main

COUNT, DIMENSIONS = 100_000, 128


def _vectors(count: int) -> Any:
    return np.random.default_rng(0).standard_normal((count, DIMENSIONS), dtype=np.float32)


def build(directory: Path, divide: int) -> None:
    """The same vectors in each."""
    vectors = _vectors(COUNT // divide)
    coarse = faiss.IndexFlatL2(DIMENSIONS)
    index = faiss.IndexIVFFlat(coarse, DIMENSIONS, 64)
    index.train(vectors[:10_000])
    index.add(vectors)
    faiss.write_index(index, str(directory / "vectors.faiss"))
    graph = hnswlib.Index("l2", DIMENSIONS)
    graph.init_index(20_000, M=8, ef_construction=40, random_seed=0)
    graph.add_items(vectors[:20_000], num_threads=1)
    graph.save_index(str(directory / "vectors.hnsw"))


def searched(directory: Path, flags: int) -> tuple[object, bytes]:
    """faiss."""
    index = faiss.read_index(str(directory / "vectors.faiss"), flags)
    return index, index.search(_vectors(8), 4)[1].tobytes()


def graph(directory: Path) -> tuple[object, bytes]:
    """hnswlib."""
    index = hnswlib.Index("l2", DIMENSIONS)
    index.load_index(str(directory / "vectors.hnsw"))
    return index, index.knn_query(_vectors(8), k=4)[0].tobytes()


if __name__ == "__main__":
    main(
        build,
        {
            "faiss": ("*.faiss", lambda directory: searched(directory, 0)),
            "faiss-mmap": (
                "*.faiss",
                lambda directory: searched(directory, faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY),
            ),
            "hnswlib": ("*.hnsw", graph),
        },
    )
