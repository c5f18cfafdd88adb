"""Streams of packed rows: this rank's micro-batches of every step, masked ahead of training."""

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.workers import Worker
from moca_core.data.codec import from_bytes, to_bytes
from moca_core.data.masking import blank, mask, next_token
from moca_core.rng import generator
from moca_core.spec import BackboneSpec
from pipelines.tables import read_rows, read_table
from pipelines.training.plan import hold_out, locate, row_plan
from pipelines.training.stream import open_stream

if TYPE_CHECKING:
    from pipelines.steps.pretrain import PretrainConfig
    from pipelines.training.job import Stream, Training
    from pipelines.training.loop import Objective


def training_over_rows(worker: Worker, job: dict[str, Any], spec: BackboneSpec, objective: "Objective") -> "Training":
    """This rank's streams of packed rows: those to train on, and those held out."""
    from pipelines.training.job import Training
    from pipelines.training.reconstructions import ROWS, Reconstructions

    config: PretrainConfig = job["config"]
    costs = read_table(job["index"])["cost_flops"].to_numpy()
    assert len(costs) == sum(job["rows_per_file"]), f"{len(costs)} rows in the index, {job['rows_per_file']} in files"
    kept, held_out = rows_of(len(costs), config)
    fetch = {name: job[name] for name in ("files", "rows_per_file", "rows_per_group")}
    make = partial(make_batch, config=config, spec=spec, **fetch)

    def addresses(
        rows: np.ndarray, steps: range, rank: int = worker.rank, ranks: int = worker.world_size
    ) -> list[dict]:
        plan = row_plan(costs[rows], config.rows_per_step, steps, rank, ranks, config.seed)
        return [a | {"row": None if a["row"] is None else int(rows[a["row"]])} for a in plan]

    def stream(rows: np.ndarray, steps: range) -> "Stream":
        return open_stream(addresses(rows, steps), make, tasks=job["cluster"].data_tasks_per_worker)

    first = addresses(held_out if len(held_out) else kept, range(ROWS), 0, 1)  # the same on any number of ranks
    looked_at = list({address["row"]: address for address in first}.values())[:ROWS]
    shown = [lambda a=address: from_bytes(make(a)) for address in looked_at]
    return Training(
        objective,
        open_at=partial(stream, kept),
        open_validation=partial(stream, held_out, range(len(held_out) // config.rows_per_step)),
        watch=Reconstructions(job, spec, worker.rank, shown).after,
        describe=lambda step: [piece_ids(a, **fetch) for a in addresses(kept, range(step, step + 1))],
    )


def rows_of(num_rows: int, config: "PretrainConfig") -> tuple[np.ndarray, np.ndarray]:
    """(rows to train on, rows held out), both sorted. A smaller `data_fraction` takes some of what a larger one takes, and holds out
    the same."""
    kept, held_out = hold_out(num_rows, config.validation_fraction, config.rows_per_step, (config.seed,))
    drawn = generator(config.seed, "data").permutation(len(kept))
    return np.sort(kept[drawn[: round(config.data_fraction * len(kept))]]), held_out


def make_batch(
    address: dict,
    *,
    config: "PretrainConfig",
    spec: BackboneSpec,
    files: list[str],
    rows_per_file: list[int],
    rows_per_group: int,
) -> bytes:
    """The masked micro-batch at an address: in the data workers, ahead of training."""
    if address["row"] is None:
        return to_bytes(blank(spec))
    file, row = locate(address["row"], rows_per_file)
    (packed,) = read_rows(files[file], [row], rows_per_group)
    epoch = address["epoch"]
    if config.objective == "next_token":
        return to_bytes(next_token(packed, spec, seed=config.seed, epoch=epoch))
    ratios = {"mlm_ratio": config.mlm_ratio, "mae_ratio": config.mae_ratio}
    return to_bytes(mask(packed, spec, seed=config.seed, epoch=epoch, **ratios))


def piece_ids(address: dict, *, files: list[str], rows_per_file: list[int], rows_per_group: int) -> list[str]:
    """What the row at an address is made of: documents by their id, and which piece of them."""
    if address["row"] is None:
        return []
    file, row = locate(address["row"], rows_per_file)
    return read_rows(files[file], [row], rows_per_group)[0]["piece_ids"]
