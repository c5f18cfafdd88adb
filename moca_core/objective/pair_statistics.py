"""What a contrastive batch looked like, by task: sums over queries that add up over micro-batches, ranks and steps.

Shapes: R (query, right answer) pairs, each with a weight by which those of a query count as one; C candidates of all ranks.
"""

from collections.abc import Sequence

import torch

from moca_core.loss.infonce import Compared

SCALARS = ("queries", "accuracy", "negatives", "masked", "temperature")
BINS = 100  # of similarities, over [-1, 1]: narrow ones, as vectors of a new model lie close together
BLOCK = 1 << 21  # similarities that are sorted into bins at a time: what that takes is 20 bytes each


@torch.no_grad()
def pair_statistics(
    compared: Compared,
    *,
    target: torch.Tensor,
    temperature: torch.Tensor,
    weight: torch.Tensor,
    source: torch.Tensor,
    tasks: int,
) -> torch.Tensor:
    """[tasks, columns] float64: SCALARS, then the bins of similarities to right answers, then those to negatives.

    All but `compared` are [R]: the column of the right answer, temperature, weight, and task of its query. "negatives" are the
    candidates in the denominator besides the right answer, "masked" the others but for the query's own right answers. Nothing is read
    back from the device.
    """
    rows, candidates = compared.logits.shape
    logits, own, weight = compared.logits.detach(), target[:, None], weight.double()
    right, wrong = weight.new_zeros(2, tasks * BINS)
    _add(right, logits.gather(1, own), temperature, weight[:, None], source)
    negatives = []
    step = max(1, BLOCK // candidates)
    for block in (slice(start, start + step) for start in range(0, rows, step)):
        negative = (logits[block] > float("-inf")).scatter_(1, own[block], False)
        negatives.append(negative.sum(1))
        _add(wrong, logits[block], temperature[block], negative * weight[block, None], source[block])
    allowed = torch.cat(negatives)
    masked = candidates - (1 / weight).round() - allowed  # a query of weight 1/n has n right answers
    values = torch.stack([torch.ones_like(weight), compared.won, allowed, masked, temperature], dim=1)
    sums = weight.new_zeros(tasks, len(SCALARS)).index_add_(0, source, values * weight[:, None])
    return torch.cat([sums, right.view(tasks, BINS), wrong.view(tasks, BINS)], dim=1)


def _add(
    counts: torch.Tensor, logits: torch.Tensor, temperature: torch.Tensor, weight: torch.Tensor, source: torch.Tensor
) -> None:
    """Adds weights [r, c] to the bins that their similarities fall in, those of their rows' tasks."""
    place = ((logits * temperature[:, None] + 1) * (BINS / 2)).nan_to_num(0).clamp(0, BINS - 1).long()
    counts.scatter_add_(0, (place + source[:, None] * BINS).flatten(), weight.flatten())


def read(sums: torch.Tensor, tasks: Sequence[str]) -> dict[str, float]:
    """Means per query of each task that was seen: "accuracy/TASK", "negatives/TASK", "masked/TASK" (the share of the candidates
    which are not its own right answers), "temperature/TASK"; and "queries/TASK", how many there were."""
    named = {}
    for task, row in zip(tasks, sums[:, : len(SCALARS)].tolist(), strict=True):
        queries, accuracy, negatives, masked, temperature = row
        if queries:
            named[f"queries/{task}"] = round(queries)
            named[f"accuracy/{task}"] = accuracy / queries
            named[f"negatives/{task}"] = negatives / queries
            named[f"masked/{task}"] = masked / max(1.0, masked + negatives)
            named[f"temperature/{task}"] = temperature / queries
    return named


def histograms(sums: torch.Tensor, tasks: Sequence[str]) -> dict[str, tuple[list[float], list[float]]]:
    """{task: (right answers, negatives)} of each task that was seen, in equal bins of similarity over [-1, 1]."""
    right, wrong = (part.tolist() for part in sums[:, len(SCALARS) :].split(BINS, dim=1))
    seen = sums[:, 0].tolist()
    return {task: (right[n], wrong[n]) for n, task in enumerate(tasks) if seen[n]}
