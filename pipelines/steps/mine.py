"""mine: hard negatives. A model embeds all queries and answers; what it finds near a query and is not right becomes a wrong answer."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Literal

from cluster.batch import Pool, run_units
from pipelines.mining.config import START, MineConfig
from pipelines.mining.passes import Embed, Search, train_file, write_keys, write_mined
from pipelines.mining.report import Mined
from pipelines.mining.units import PairUnits
from pipelines.pictures.counts import count_bars
from pipelines.runner.step import Context, Step

SEARCH_UNITS = 16  # units whose queries are searched for together: the vectors of all answers are read once for them


def mine_step(config: MineConfig, model: Literal["base", "pretrain", "warmup"]) -> Step:
    """`model` is the step whose model mines, where the settings name no other."""
    needs = ("pairs", model) if config.model == START else ("pairs",)
    # The state first: what it calls finished is there.
    passed = ("state", "keys", "vectors", "found")
    return Step("mine", run, config, needs, code_version=2, resumable=True, leftovers=passed)


def run(context: Context) -> dict:
    """Result: "train" and "rows_per_group" as the step `pairs` has them, and "mined": {task: sums of what was found}."""
    config: MineConfig = context.config
    made = [artifact.path(artifact.result["model"]) for name, artifact in context.inputs.items() if name != "pairs"]
    model = made[0] if made else config.model
    units, tasks = PairUnits.of(context.inputs["pairs"]), list(context.inputs["pairs"].result["train"])
    blocks = [
        block[first : first + SEARCH_UNITS]
        for block in map(units.of_task, tasks)
        for first in range(0, len(block), SEARCH_UNITS)
    ]
    cluster = context.execution.cluster
    pool = Pool(cluster.num_workers, cluster.cpus_per_worker, min(1, cluster.gpus_per_worker))
    given = {"units": units, "uri": context.uri}

    def run_pass(name: str, fn: Callable, count: int, pool: Pool | None = None) -> list[dict]:
        context.say(f"{name}: {count} units")
        return run_units(fn, count, state_uri=context.path("state", name), say=context.say, pool=pool)

    run_pass("keys", partial(write_keys, **given), len(units.units))
    run_pass("vectors", partial(Embed, model, config.max_tokens, **given), len(units.units), pool)
    searched = run_pass("found", partial(Search, config, blocks, **given), len(blocks), pool)
    mined = {task: Mined.total(Mined(**part["mined"]) for part in searched if part["task"] == task) for task in tasks}
    report(context, mined)
    written = run_pass("train", partial(write_mined, config=config, **given), len(units.units))
    examples = "\n".join(["# Mined negatives\n", *(unit["examples"] for unit in written if unit["examples"])])
    context.keep("examples.md", examples.encode())
    found = {task: figures.negatives for task, figures in mined.items()}
    context.keep("mined.png", count_bars("hard negatives found", found))
    return {
        "train": {task: [[train_file(unit), unit.rows] for unit in units.of_task(task)] for task in tasks},
        "rows_per_group": units.rows_per_group,
        "mined": {task: asdict(figures) for task, figures in mined.items()},
    }


def report(context: Context, mined: dict[str, Mined]) -> None:
    """Says what was found. Raises ValueError if nothing was, for any task: fine-tuning would go on without a word."""
    for task, figures in mined.items():
        context.say(f"{task}: {figures.line()}")
        context.run.log_metrics({f"{name}/{task}": value for name, value in figures.means().items()})
    if not any(figures.negatives for figures in mined.values()):
        raise ValueError(
            f"mine: no answer passed. All are above max_positive_share={context.config.max_positive_share} of the right answer's score "
            "where a model finds everything alike: let it train first (mine.warmup_steps), or raise the share"
        )
