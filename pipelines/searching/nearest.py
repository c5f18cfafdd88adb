"""Nearest neighbours by faiss: exact while a query can afford to read every vector, a graph beyond."""

import numpy as np

EXACT_UP_TO = 200_000
"""Entries. Exact search reads them all: of 2,048 dimensions 1.6 GB, a fifth of a second for a query. A graph (HNSW) visits some
thousands, finds nearly all of the true nearest, and takes long to build: it is worth that only for more."""

NEIGHBOURS, BUILD_WIDTH, SEARCH_WIDTH = 32, 200, 256  # of the graph: M, efConstruction, efSearch


def build(vectors: np.ndarray, exact_up_to: int = EXACT_UP_TO):
    """A faiss index of unit vectors [N, D] by inner product, which is their cosine."""
    import faiss

    count, dimension = vectors.shape
    if count <= exact_up_to:
        index = faiss.IndexFlatIP(dimension)
    else:
        index = faiss.IndexHNSWFlat(dimension, NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = BUILD_WIDTH
        index.hnsw.efSearch = SEARCH_WIDTH
    index.add(np.ascontiguousarray(vectors, np.float32))
    return index


def search(index, vector: np.ndarray, top: int) -> list[tuple[int, float]]:
    """(row, cosine) of the nearest, best first."""
    scores, rows = index.search(vector[None], min(top, index.ntotal))
    return [(int(row), float(score)) for row, score in zip(rows[0], scores[0], strict=True) if row >= 0]
