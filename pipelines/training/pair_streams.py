"""Streams of contrastive batches: this rank's share of every batch, made ahead of training."""

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster import storage
from cluster.workers import Worker
from moca_core.data.codec import to_bytes
from moca_core.data.pairs import collate_pairs
from moca_core.data.render import Renderer, load_tokenizer
from moca_core.data.schema import row_to_pair
from moca_core.spec import BackboneSpec
from pipelines.tables import read_rows
from pipelines.training.plan import hold_out, locate, pair_plan, validation_plan
from pipelines.training.stream import open_stream

if TYPE_CHECKING:
    from pipelines.steps.finetune import FinetuneConfig
    from pipelines.training.job import Stream, Training
    from pipelines.training.loop import Objective


def training_over_pairs(worker: Worker, job: dict[str, Any], spec: BackboneSpec, objective: "Objective") -> "Training":
    """This rank's streams of pairs: those to train on, drawn by weight, and those held out, task by task."""
    import torch

    from cluster import collectives
    from moca_core.objective import pair_statistics
    from pipelines.training.backward import InChunks, whole_batches
    from pipelines.training.job import Training

    config, cluster = job["config"], job["cluster"]
    sizes = {name: sum(rows) for name, rows in job["rows_per_file"].items()}
    split = {name: held_out_pairs(name, size, config) for name, size in sizes.items()}
    kept, held_out = ({name: rows[side] for name, rows in split.items()} for side in (0, 1))
    fetch = {name: job[name] for name in ("files", "rows_per_file", "rows_per_group")}
    make = partial(make_batch, config=config, spec=spec, tokenizer=job["tokenizer"], **fetch)

    def addresses(steps: range) -> list[dict]:
        plan = pair_plan(
            {name: len(rows) for name, rows in kept.items()},
            job["weights"],
            config.batch_size,
            steps,
            worker.rank,
            worker.world_size,
            config.seed,
            task_batches=config.task_batches,
        )
        return [a | {"pairs": [(name, int(kept[name][row])) for name, row in a["pairs"]]} for a in plan]

    def stream(plan: list[dict]) -> "Stream":
        return open_stream(plan, make, tasks=cluster.data_tasks_per_worker)

    return Training(
        objective,
        open_at=lambda steps: stream(addresses(steps)),
        open_validation=lambda: stream(validation_plan(held_out, config.batch_size, worker.rank, worker.world_size)),
        describe=lambda step: [wheres(address, **fetch) for address in addresses(range(step, step + 1))],
        explain=lambda observed: pair_statistics.read(torch.from_numpy(observed["pairs"]), sorted(sizes)),
        backward_pass=InChunks(cluster.tokens_per_forward, collectives.max_over_ranks)
        if cluster.tokens_per_forward
        else whole_batches,
    )


def held_out_pairs(task: str, size: int, config: "FinetuneConfig") -> tuple[np.ndarray, np.ndarray]:
    """(rows of a task to train on, rows held out)."""
    return hold_out(size, config.validation_fraction, config.batch_size, (config.seed, task))


def make_batch(
    address: dict,
    *,
    config: "FinetuneConfig",
    spec: BackboneSpec,
    tokenizer: str,
    files: dict[str, list[str]],
    rows_per_file: dict[str, list[int]],
    rows_per_group: int,
) -> bytes:
    """This rank's share of a contrastive batch: in the data workers, ahead of training."""
    renderer = Renderer(load_tokenizer(storage.localize(tokenizer)), spec, config.max_tokens)
    pairs = [row_to_pair(row) for row in pair_rows(address, files, rows_per_file, rows_per_group)]
    key = (config.seed, address["step"])
    batch = collate_pairs(
        pairs,
        renderer,
        num_positives=config.num_positives,
        num_negatives=config.num_negatives,
        sources=sorted(files),
        key=key,
    )
    return to_bytes(batch)


def wheres(
    address: dict, *, files: dict[str, list[str]], rows_per_file: dict[str, list[int]], rows_per_group: int
) -> list[str]:
    """Task, file and row of the pairs at an address."""
    rows = pair_rows(address, files, rows_per_file, rows_per_group)
    return [f"{row['source']} ({row['where']})" for row in rows]


def pair_rows(
    address: dict, files: dict[str, list[str]], rows_per_file: dict[str, list[int]], rows_per_group: int
) -> list[dict]:
    rows = []
    for source, place in address["pairs"]:
        file, row = locate(place, rows_per_file[source])
        rows += read_rows(files[source][file], [row], rows_per_group)
    return rows
