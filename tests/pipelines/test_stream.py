"""What training reads: the same packs under the same masks however many ranks read them, and wherever they start."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cluster import storage
from moca_core.data.image_files import ImageBounds
from moca_core.data.masking import IGNORED, mask
from moca_core.data.render import Renderer, load_tokenizer
from moca_core.data.rows import document_sequences, pack_sequences, packed_row
from moca_core.data.schema import PACKED
from moca_core.data.validate import valid_documents
from moca_core.spec import BackboneSpec
from moca_core.types import Document, MaskedBatch, Segment
from pipelines.runner.record import Artifact
from pipelines.steps.pretrain import PretrainConfig
from pipelines.tables import table_writer
from pipelines.training.plan import row_plan
from pipelines.training.row_streams import make_batch
from pipelines.training.stream import open_stream
from tests.pipelines.conftest import png, words

ROWS_PER_STEP, STEPS = 4, 17  # more than two epochs of the rows below, whose number 4 does not divide
CONFIG = PretrainConfig(steps=STEPS, rows_per_step=ROWS_PER_STEP, seed=11)

pytestmark = pytest.mark.usefixtures("ray_session")


class Packed:
    """Packed rows in two files, every sequence of them known by its tokens."""

    def __init__(self, folder: Path, base: Artifact) -> None:
        self.spec = BackboneSpec.from_dict(base.result["spec"])
        renderer = Renderer(load_tokenizer(base.path("tokenizer.json")), self.spec, 96)
        documents = [
            Document(
                "s", (Segment(text=f"{n} {words(25 + n, n)}"), Segment(image=png(n)), Segment(text=words(9, n + 99)))
            )
            for n in range(36)
        ]
        assert list(valid_documents(documents, ImageBounds())) == documents
        pieces = [piece for document in documents for piece in document_sequences(document, renderer)]
        self.rows = pack_sequences(pieces, self.spec, 96)
        assert len(self.rows) % ROWS_PER_STEP and 20 < len(self.rows) < STEPS * ROWS_PER_STEP / 2
        self.costs = np.array([row["cost_flops"] for row in self.rows])
        self.files, self.rows_per_file = [], []
        for number, rows in enumerate((self.rows[:13], self.rows[13:])):
            self.files.append(storage.join(str(folder), f"part-{number:05d}.parquet"))
            self.rows_per_file.append(len(rows))
            with table_writer(self.files[-1], PACKED, 1) as writer:
                writer.write(pa.Table.from_pylist(rows, schema=PACKED))
        self.pieces = {piece["piece_id"]: piece for piece in pieces}
        self.names = {tuple(piece["input_ids"].tolist()): piece["piece_id"] for piece in pieces}
        assert len(self.names) == len(pieces)

    def batches(self, steps: range, rank: int, world_size: int) -> Iterator[tuple[int, list[MaskedBatch]]]:
        plan = row_plan(self.costs, ROWS_PER_STEP, steps, rank, world_size, CONFIG.seed)
        fetch = {"files": self.files, "rows_per_file": self.rows_per_file, "rows_per_group": 1}
        return open_stream(plan, partial(make_batch, config=CONFIG, spec=self.spec, **fetch), tasks=2)

    def read(self, world_size: int, steps: range = range(STEPS)) -> dict[int, dict[tuple, list]]:
        """{step: {names of the sequences of a pack: [its masks]}} over all ranks, one after the other."""
        seen: dict[int, dict[tuple, list]] = defaultdict(lambda: defaultdict(list))
        for rank in range(world_size):
            given = []
            for step, batches in self.batches(steps, rank, world_size):
                given.append(step)
                assert len(batches) == ROWS_PER_STEP // world_size
                for batch in batches:
                    names, masks = self.unmasked(batch)
                    seen[step][names].append(masks)
            assert given == list(steps)
        return {step: dict(packs) for step, packs in seen.items()}

    def unmasked(self, batch: MaskedBatch) -> tuple[tuple, tuple]:
        """The names of the sequences of a batch, and all that was drawn for them."""
        stream = batch.stream
        ids = np.where(batch.labels == IGNORED, stream.input_ids, batch.labels)
        assert (stream.input_ids[batch.labels != IGNORED] == self.spec.mask_token_id).all()
        ends = list(pairwise(stream.cu_seqlens.tolist()))
        names = tuple(self.names[tuple(ids[start:end].tolist())] for start, end in ends)
        groups = np.cumsum([0, *[(ids[start:end] == self.spec.image_token_id).sum() for start, end in ends]])
        masks = tuple(
            (batch.labels[start:end].tobytes(), batch.masked_groups[first:last].tobytes())
            for (start, end), (first, last) in zip(ends, pairwise(groups.tolist()), strict=True)
        )
        assert len(batch.masked_groups) == groups[-1]
        return names, (masks, batch.noise_seeds.tolist(), stream.pixels.tobytes())


@pytest.fixture(scope="module")
def packed(ray_session, base: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return Packed(tmp_path_factory.mktemp("packed"), base)


@pytest.fixture(scope="module")
def alone(packed: Packed) -> dict[int, dict[tuple, list]]:
    """What one rank reads from the first step to the last."""
    return packed.read(1)


def test_every_pack_of_an_epoch_is_read_once(packed: Packed, alone) -> None:
    rows = [names for step in range(STEPS) for names, given in alone[step].items() for _ in given]
    assert len(rows) == STEPS * ROWS_PER_STEP
    count = len(packed.rows)
    everything = Counter(tuple(row["piece_ids"]) for row in packed.rows)
    whole_steps = count // ROWS_PER_STEP  # the step after them is of two epochs
    first = Counter(rows[: whole_steps * ROWS_PER_STEP])
    assert set(first.values()) == {1} and first <= everything
    times = Counter(rows)
    assert set(times) == set(everything) and max(times.values()) - min(times.values()) <= 1


def test_masks_are_new_in_every_epoch_and_about_as_many_as_asked_for(packed: Packed, alone) -> None:
    by_pack = defaultdict(list)
    for step in range(STEPS):
        for names, given in alone[step].items():
            by_pack[names] += given
    again = [given for given in by_pack.values() if len(given) > 1]
    assert len(again) > 10 and all(len({masks for masks, _, _ in given}) == len(given) for given in again)
    assert all(len({pixels for _, _, pixels in given}) == 1 for given in again)
    labels = np.concatenate([np.frombuffer(m[0], np.int64) for g in by_pack.values() for ms, _, _ in g for m in ms])
    groups = np.concatenate([np.frombuffer(m[1], bool) for g in by_pack.values() for ms, _, _ in g for m in ms])
    assert (
        0.2 < (labels != IGNORED).mean() < 0.4 and 0.4 < groups.mean() < 0.6
    )  # image and special tokens are no labels


def test_a_mask_is_that_of_its_sequence_alone(packed: Packed, alone) -> None:
    """Whatever else is in the pack."""
    several = [(names, masks) for step in range(7) for names, ((masks, *_),) in alone[step].items() if len(names) > 1]
    assert several  # and all of the first epoch
    for name, (labels, groups) in ((n, m) for names, masks in several for n, m in zip(names, masks, strict=True)):
        row = packed_row([packed.pieces[name]], packed.spec)
        drawn = mask(
            row, packed.spec, seed=CONFIG.seed, epoch=0, mlm_ratio=CONFIG.mlm_ratio, mae_ratio=CONFIG.mae_ratio
        )
        assert (labels, groups) == (drawn.labels.tobytes(), drawn.masked_groups.tobytes())


@pytest.mark.parametrize("world_size", [2, 4])
def test_other_numbers_of_ranks_read_the_same(packed: Packed, alone, world_size: int) -> None:
    steps = range(6, 13)  # past the end of the first epoch
    assert packed.read(world_size, steps) == {step: alone[step] for step in steps}


def test_who_starts_in_the_middle_reads_what_was_left(packed: Packed, alone) -> None:
    """Another number of ranks goes on from any step, as after a failure."""
    assert packed.read(4, range(5)) | packed.read(2, range(5, STEPS)) == alone


def test_an_empty_plan_is_an_empty_stream(packed: Packed) -> None:
    assert list(packed.batches(range(3, 3), 0, 1)) == []
