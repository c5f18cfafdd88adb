"""What mining found: figures of a task, and examples for a person."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from moca_core.data.answers import REASONS, Barred
from moca_core.types import Content, Pair

if TYPE_CHECKING:
    from moca_core.mining import Choice, Nearest

EXAMPLE_CHARACTERS = 300


@dataclass(frozen=True)
class Mined:
    """Sums over pairs. `looked_at` are the answers within the top_k ranks, right ones among them; `dropped` of those by reason.

    `without` counts the pairs that nothing was found for.
    """

    pairs: int = 0
    negatives: int = 0
    without: int = 0
    looked_at: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    positive_similarity: float = 0.0
    negative_similarity: float = 0.0

    @staticmethod
    def of(found: "Nearest", choice: "Choice", positive: np.ndarray, barred: Barred) -> "Mined":
        near = found.barred_scores >= found.scores[barred.rows, -1]  # they would have been among the top_k
        dropped = {reason: int((near & (barred.reasons == n)).sum()) for n, reason in enumerate(REASONS)}
        dropped |= {"skipped_top": int(choice.skipped.sum()), "too_near": int(choice.too_near.sum())}
        return Mined(
            pairs=len(positive),
            negatives=int(choice.kept.sum()),
            without=int((~choice.kept.any(axis=1)).sum()),
            looked_at=int((found.entries >= 0).sum() + near.sum()),
            dropped=dropped,
            positive_similarity=float(positive.sum(dtype=np.float64)),
            negative_similarity=float(found.scores[choice.kept].sum(dtype=np.float64)),
        )

    @staticmethod
    def total(parts: Iterable["Mined"]) -> "Mined":
        """Of several parts of a task."""
        values = [vars(part) for part in parts]
        dropped = sum((Counter(value["dropped"]) for value in values), Counter())
        return Mined(
            **{name: sum(v[name] for v in values) for name in values[0] if name != "dropped"}, dropped=dict(dropped)
        )

    def means(self) -> dict[str, float]:
        """Per pair, per answer looked at, per similarity; without a similarity of nothing."""
        shares = {f"dropped/{reason}": count / max(1, self.looked_at) for reason, count in sorted(self.dropped.items())}
        means = {"negatives": self.negatives / self.pairs, "without": self.without / self.pairs, **shares}
        means["similarity/positive"] = self.positive_similarity / self.pairs
        if self.negatives:
            means["similarity/mined"] = self.negative_similarity / self.negatives
        return means

    def line(self) -> str:
        """For the log."""
        means = self.means()
        dropped = ", ".join(
            f"{name.removeprefix('dropped/')} {share:.1%}"
            for name, share in means.items()
            if name.startswith("dropped/") and share
        )
        mined = f", mined {means['similarity/mined']:.3f}" if self.negatives else ""
        return (
            f"{self.pairs} pairs, {means['negatives']:.2f} negatives each ({means['without']:.1%} have none); "
            f"similarity: right {means['similarity/positive']:.3f}{mined}; dropped of what is near: {dropped or 'nothing'}"
        )


def example(pair: Pair, positive: float, mined: list[tuple[float, Content]]) -> str:
    """A pair and its mined negatives with their scores, as Markdown."""
    lines = [
        f"**{in_words(pair.query)}**\n",
        *(f"- right (best {positive:.3f}): {in_words(c)}" for c in pair.positives),
    ]
    lines += [f"- mined {score:.3f}: {in_words(content)}" for score, content in mined] or ["- nothing mined"]
    return "\n".join(lines) + "\n"


def in_words(content: Content) -> str:
    """A content on one line: its text shortened, its images by their size."""
    parts = [f"[image, {len(s.image) / 1000:.0f} kB]" if s.text is None else " ".join(s.text.split()) for s in content]
    words = " ".join(parts)
    return words if len(words) <= EXAMPLE_CHARACTERS else words[:EXAMPLE_CHARACTERS] + " ..."
