"""Tasks of mteb, by name: run by mteb itself with our embedder, one process a model and task.

mteb/KEY/TASK.json      what mteb found, kept under what it depends on
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from cluster import storage
from cluster.batch import Pool
from moca_core.benchmarks import Prompts
from pipelines.evaluation.embedding import VERSION, Reader, load_embedder
from pipelines.evaluation.engine import finish

BATCH = 256


@dataclass(frozen=True)
class MtebUnit:
    reader: Reader
    task: str
    prompts: Prompts

    def file(self) -> str:
        from importlib.metadata import version

        identity = (VERSION, self.reader.key, self.prompts, version("mteb"))
        return f"mteb/{hashlib.sha256(repr(identity).encode()).hexdigest()[:32]}/{self.task}.json"


def task_names(names: Iterable[str]) -> list[str]:
    """The tasks that these name, each once: tasks, or benchmarks, of which the public ones. Raises ValueError for what is neither."""
    import mteb

    found = []
    for name in names:
        try:
            found += [task.metadata.name for task in mteb.get_benchmark(name).tasks if task.metadata.is_public]
        except KeyError as no_benchmark:
            try:
                found.append(mteb.get_task(name).metadata.name)
            except KeyError as no_task:
                said = " ".join(str(error.args[0]) for error in (no_task, no_benchmark))
                raise ValueError(f"mteb:{name}: mteb has neither a task nor a benchmark of that name. {said}") from None
    return list(dict.fromkeys(found))


def evaluate_by_mteb(
    readers: Iterable[Reader],
    tasks: list[str],
    prompts: Prompts,
    *,
    uri: str,
    pool: Pool,
    say: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """{task: {"metric", "scores": {model: main score}, "results": {model: file}}}; what an earlier run found is not run again."""
    units = [MtebUnit(reader, task, prompts) for reader in readers for task in tasks]
    missing = [unit for unit in units if not storage.exists(storage.join(uri, unit.file()))]
    say(f"mteb: {len(missing)} of {len(units)} task(s) to run, counted by model")
    fn = partial(RunMteb, missing, uri)
    finish(fn, len(missing), [unit.file() for unit in missing], uri, say, pool)
    found: dict[str, dict[str, Any]] = {}
    for unit in units:
        result = json.loads(storage.read_bytes(storage.join(uri, unit.file())))
        task = found.setdefault(unit.task, {"metric": result["metric"], "scores": {}, "results": {}})
        task["scores"][unit.reader.label] = result["score"]
        task["results"][unit.reader.label] = unit.file()
    return found


class RunMteb:
    """In a process of the pool: one task by one model. Raises ValueError where the task's data is not to be had."""

    def __init__(self, units: list[MtebUnit], uri: str) -> None:
        self.units, self.uri = units, uri
        self.embedder = lru_cache(maxsize=1)(load_embedder)

    def __call__(self, number: int) -> dict:
        import mteb

        unit = self.units[number]
        task = mteb.get_task(unit.task)
        load_data(task)
        embedder = self.embedder(unit.reader.uri, unit.reader.max_tokens)
        result = run_task(embedder, task, unit.reader.digest, unit.prompts)
        storage.write_atomic(storage.join(self.uri, unit.file()), json.dumps(result, indent=2).encode())
        return {}


def load_data(task: Any) -> None:
    try:
        task.load_data()
    except OSError as error:
        raise ValueError(
            f"mteb:{task.metadata.name}: its data ({task.metadata.dataset['path']}) is neither in the cache of Hugging Face "
            f"(HF_HOME) nor within reach: {error}"
        ) from None


def run_task(embedder: Any, task: Any, digest: str, prompts: Prompts) -> dict[str, Any]:
    """{"metric", "score", "result": all that mteb says} of one task that has its data."""
    import mteb

    from moca_core.mteb_encoder import MtebEncoder

    encoder = MtebEncoder(embedder, f"moca/{digest[:16]}", digest[:16], prompts)
    found = mteb.evaluate(
        encoder,
        task,
        cache=None,
        encode_kwargs={"batch_size": BATCH, "show_progress_bar": False},
        show_progress_bar=False,
    )
    (result,) = found.task_results
    return {
        "metric": task.metadata.main_score,
        "score": float(result.get_score()),
        "result": json.loads(result.model_dump_json()),
    }
