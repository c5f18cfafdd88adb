"""At a few moments of pre-training: what the model makes of the same masked rows, drawn and kept."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cluster import storage
from moca_core.data.masking import blank
from moca_core.data.render import load_tokenizer
from moca_core.reconstruction import Question, ask, images_of, passage_of
from moca_core.spec import BackboneSpec
from moca_core.types import MaskedBatch
from pipelines.pictures.reconstructions import FOLDER, Moment, draw_moment

if TYPE_CHECKING:
    from cluster.engine import Engine
    from cluster.tracking import Run

ROWS, IMAGES_PER_ROW = 4, 2


def moments_of(steps: int, count: int) -> list[int]:
    """Before the first step, after the last, and after halves of it, as most happens early: at most `count` of them."""
    if not count:
        return []
    return sorted({0, *(round(steps / 2**k) for k in range(count - 1))})


class Reconstructions:
    """Pictures at the moments that the settings ask for.

    All ranks pass as many batches through the engine (under ZeRO-3 they need each other's weights), rank 0 the rows that are looked at,
    the others blank ones. Nothing of training is touched: no gradient, no random number, no row of its stream.
    """

    def __init__(
        self, job: dict[str, Any], spec: BackboneSpec, rank: int, rows: list[Callable[[], MaskedBatch]]
    ) -> None:
        """`rows` are read when they are first needed, on rank 0 alone."""
        self.moments = moments_of(job["config"].steps, job["config"].reconstructions)
        self.job, self.spec, self.rank, self.rows = job, spec, rank, rows
        self._questions: list[Question] | None = None

    def after(self, done: int, engine: "Engine", log: "Run | None") -> None:
        """Collective. Draws, if this is one of the moments."""
        if done not in self.moments:
            return
        with torch.no_grad():
            answers = [engine.forward(question) for question in self.questions]
        if self.rank:
            return
        tokenizer = load_tokenizer(storage.localize(self.job["tokenizer"]))
        pairs = list(zip(self.questions, answers, strict=True))
        images = [image for pair in pairs for image in images_of(*pair, self.spec, IMAGES_PER_ROW)]
        passages = [passage_of(*pair, tokenizer, self.spec) for pair in pairs]
        moment = Moment(done, images, [passage for passage in passages if passage])
        self._keep(moment, log)

    @property
    def questions(self) -> list[Question]:
        """Of rank 0 about the rows that are looked at, of others about nothing, as many."""
        if self._questions is None:
            nothing = Question(blank(self.spec), np.empty(0, dtype=np.int64))
            self._questions = [nothing if self.rank else ask(read(), self.spec) for read in self.rows]
        return self._questions

    def _keep(self, moment: Moment, log: "Run | None") -> None:
        name = f"step_{moment.step:08d}"
        picture = draw_moment(moment, self.job["config"].steps)
        storage.write_atomic(storage.join(self.job["uri"], FOLDER, f"{name}.npz"), moment.to_bytes())
        storage.write_atomic(storage.join(self.job["uri"], FOLDER, f"{name}.png"), picture)
        if log is not None:
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, f"{name}.png").write_bytes(picture)
                log.log_artifact(f"{folder}/{name}.png", FOLDER)
