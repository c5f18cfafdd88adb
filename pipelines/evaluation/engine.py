"""The engine of evaluation: models and tasks in, rankings out. The step of the pipeline and the command both run it."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from cluster import storage
from cluster.batch import Pool, run_units
from cluster.workers import run_tasks
from moca_core.types import Attention
from pipelines.evaluation.embedding import Embed, Reader, missing_units, write_index
from pipelines.evaluation.scoring import VERSION, ScoringUnit, index_file, ranking_file, score
from pipelines.evaluation.tasks import SIDES, StoredTask


@dataclass(frozen=True)
class Evaluated:
    """`rankings`: {model: {task: its file}}; `embedded`: contents that had no vector before."""

    readers: tuple[Reader, ...]
    tasks: tuple[StoredTask, ...]
    rankings: dict[str, dict[str, str]]
    embedded: int


def open_models(models: dict[str, str], max_tokens: int | None, pool: Pool) -> tuple[Reader, ...]:
    """{label: URI of a model folder} as what reads with it. Needs `connect` first."""
    described = run_tasks(describe, [(model,) for model in models.values()], cpus=1, gpus=0)
    precision = "bfloat16" if pool.gpus else "float32"  # as the embedder chooses
    return tuple(
        Reader(label, model, digest, attention, max_tokens, precision)
        for (label, model), (digest, attention) in zip(models.items(), described, strict=True)
    )


def evaluate(
    readers: tuple[Reader, ...],
    tasks: Iterable[StoredTask],
    *,
    uri: str,
    vectors_uri: str,
    pool: Pool,
    say: Callable[[str], None],
) -> Evaluated:
    """Ranks the candidates of every task with every model. Rankings go below `uri`, vectors below `vectors_uri`.

    What an earlier run left in `vectors_uri` is not embedded again, whatever its models and tasks were called. A run that was killed
    goes on where it was. Needs `connect` first.
    """
    tasks = tuple(tasks)
    embedded = embed(readers, tasks, uri=uri, vectors_uri=vectors_uri, pool=pool, say=say)
    for space in {reader.space(side, task.prompts) for reader in readers for task in tasks for side in SIDES}:
        write_index(vectors_uri, space, storage.join(uri, index_file(space)))
    units = [ScoringUnit(reader, task) for reader in readers for task in tasks]
    say(f"ranking: {len(tasks)} task(s) by {len(readers)} model(s)")
    fn = partial(score, units=units, uri=uri, vectors_uri=vectors_uri)
    identity = [VERSION, *((unit.reader.label, unit.reader.key, unit.task.digest()) for unit in units)]
    finish(fn, len(units), identity, uri, say)
    storage.delete(storage.join(uri, "index"))
    rankings = {r.label: {task.name: ranking_file(r.label, task.name) for task in tasks} for r in readers}
    return Evaluated(readers, tasks, rankings, embedded)


def embed(
    readers: Iterable[Reader],
    tasks: Iterable[StoredTask],
    *,
    uri: str,
    vectors_uri: str,
    pool: Pool,
    say: Callable[[str], None],
) -> int:
    """Fills in what vectors are missing; how many they were."""
    units = missing_units(readers, tasks, vectors_uri)
    missing = sum(len(unit.rows) for unit in units)
    say(f"embedding: {missing} contents in {len(units)} unit(s); what else is asked and offered has its vectors")
    done = finish(partial(Embed, units, vectors_uri), len(units), [u.name for u in units], uri, say, pool)
    return sum(unit["embedded"] for unit in done)


def finish(
    fn: Callable, count: int, identity: list, uri: str, say: Callable[[str], None], pool: Pool | None = None
) -> list[dict]:
    """The results of all units. The marks of those that finished outlive a killed run, which finds them by what identifies the units."""
    name = hashlib.sha256(repr(identity).encode()).hexdigest()[:32]
    done = run_units(fn, count, state_uri=storage.join(uri, "state", name), say=say, pool=pool)
    storage.delete(storage.join(uri, "state"))  # those of killed runs too, which had other units
    return done


def describe(model_uri: str) -> tuple[str, Attention]:
    """(digest, attention) of a model. Raises ValueError where there is none."""
    from pathlib import Path

    from transformers import AutoConfig

    from moca_core.attention import declared_attention
    from moca_core.folder import model_digest

    folder = storage.localize(model_uri)
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"{model_uri}: no config.json there; the folder of a model is needed, as the export step writes it"
        )
    return model_digest(folder), declared_attention(AutoConfig.from_pretrained(folder))
