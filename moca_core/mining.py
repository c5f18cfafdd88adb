"""Hard negatives: the nearest of a corpus by exact search, and the choice among them. Arrays and numbers of entries, nothing else."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from moca_core.rng import generator


@dataclass(frozen=True)
class Nearest:
    """The k best entries of every query, best first, equal scores in order of entries; -1 with a score of -inf where there are fewer.

    `barred_scores` [F] are what the barred entries would have scored.
    """

    scores: np.ndarray  # [Q, k] float32
    entries: np.ndarray  # [Q, k] int64
    barred_scores: np.ndarray  # [F] float32


@torch.inference_mode()
def nearest(
    queries: np.ndarray,
    blocks: Iterable[np.ndarray],
    k: int,
    barred: tuple[np.ndarray, np.ndarray],
    device: str | None = None,
) -> Nearest:
    """Exact search by inner product. queries: [Q, D]; blocks: the corpus in order, [N_b, D] each; barred: (rows [F], entries [F]).

    One block is in memory at a time: with b rows in the largest, about 4 (Q D + b D + 3 Q b + 6 Q k) bytes.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    asked = torch.from_numpy(queries).to(place)
    by_entry = np.argsort(barred[1], kind="stable")
    rows, entries = barred[0][by_entry], barred[1][by_entry]
    barred_scores = np.empty(len(rows), dtype=np.float32)
    best = torch.full((len(queries), k), -torch.inf, device=place)
    best_entries = torch.full((len(queries), k), -1, device=place)
    first = 0
    for block in blocks:
        scores = asked @ torch.from_numpy(block).to(place).T
        here = slice(*np.searchsorted(entries, [first, first + len(block)]))
        at = torch.from_numpy(rows[here]).to(place), torch.from_numpy(entries[here] - first).to(place)
        barred_scores[by_entry[here]] = scores[at].cpu().numpy()
        scores[at] = -torch.inf
        columns = _top_columns(scores, min(k, len(block)))
        both = torch.cat([best, scores.gather(1, columns)], 1)
        numbers = torch.cat([best_entries, columns + first], 1)
        best, order = (t[:, :k] for t in both.sort(dim=1, descending=True, stable=True))
        best_entries = numbers.gather(1, order)
        first += len(block)
    best_entries[best == -torch.inf] = -1
    return Nearest(best.cpu().numpy(), best_entries.cpu().numpy(), barred_scores)


def _top_columns(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Columns [Q, k] of the k highest scores of every row, in order of columns; of equal scores the first columns."""
    values, columns = scores.topk(k, dim=1)
    last = values[:, -1:]
    # topk keeps any of several equal scores: where not all of them fit, the row is sorted.
    torn = (scores == last).sum(1) > (values == last).sum(1)
    columns[torn] = scores[torn].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return columns.sort(dim=1).values


def best_of(rows: np.ndarray, scores: np.ndarray, num_rows: int) -> np.ndarray:
    """The highest of the `scores` [F] of every row, [num_rows]."""
    best = np.full(num_rows, -np.inf, dtype=np.float32)
    np.maximum.at(best, rows, scores)
    return best


@dataclass(frozen=True)
class Choice:
    """Which of the nearest become negatives: `kept` [Q, k]; those passed over by rank, and as likely right answers."""

    kept: np.ndarray
    skipped: np.ndarray
    too_near: np.ndarray


def choose(
    found: Nearest,
    positive: np.ndarray,
    *,
    negatives: int,
    skip_top: int,
    max_positive_share: float | None,
    sample: tuple[str | int, ...] | None = None,
) -> Choice:
    """At most `negatives` of every query's nearest, from rank `skip_top` on. positive: [Q], the score of the right answer.

    What scores above `max_positive_share` of that is taken for a right answer nobody marked (NV-Retriever, arXiv 2407.15831: TopK-PercPos).
    Of a score below 0 the share is as far below it as the share of its opposite is below that. `sample` is a key to draw by; without
    it the nearest are kept.
    """
    there = found.entries >= 0
    skipped = there & (np.arange(found.entries.shape[1]) < skip_top)
    too_near = np.zeros_like(there)
    if max_positive_share is not None:
        ceiling = positive - (1 - max_positive_share) * np.abs(positive)
        too_near = there & ~skipped & (found.scores > ceiling[:, None])
    left = there & ~skipped & ~too_near
    if sample is None:
        kept = left & (np.cumsum(left, axis=1) <= negatives)
    else:
        kept = np.zeros_like(left)
        for row, ranks in enumerate(map(np.flatnonzero, left)):
            kept[row, generator(*sample, row).permutation(ranks)[:negatives]] = True
    return Choice(kept, skipped, too_near)
