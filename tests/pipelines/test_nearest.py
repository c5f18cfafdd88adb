"""The nearest neighbours of a query among the vectors of an index."""

import numpy as np

from pipelines.searching import nearest


def test_large_indexes_are_graphs_that_find_nearly_what_exact_search_does():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((3000, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    exact, graph = nearest.build(vectors), nearest.build(vectors, exact_up_to=2999)
    assert type(exact) is not type(graph)
    shares = []
    for query in vectors[:50] + 0.1 * rng.standard_normal((50, 16)).astype(np.float32):
        scores = vectors @ query
        order = np.argsort(-scores)[:10]
        found = nearest.search(exact, query, 10)
        assert [row for row, _ in found] == order.tolist()
        np.testing.assert_allclose([score for _, score in found], scores[order], atol=1e-5)
        shares.append(len({row for row, _ in nearest.search(graph, query, 10)} & set(order.tolist())) / 10)
    assert np.mean(shares) > 0.95
    assert len(nearest.search(exact, vectors[0], 5000)) == 3000
