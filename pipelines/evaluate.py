"""Evaluate embedding models on retrieval tasks: public benchmarks from their published files, any task of mteb by its name, your own.

    python pipelines/evaluate.py --model runs/demo/latest/export/model --tasks jsonl=my/tasks --out scores
    python pipelines/evaluate.py --model DIR --tasks mmeb=MMEB-eval --images MMEB-eval/eval_images --out scores
    python pipelines/evaluate.py --model old=DIR new=DIR --tasks beir=vidore/esg_reports_v2 "mteb:ViDoRe(v2)" --out scores

A task is LAYOUT=PATH, local, on s3:// or hf://, or mteb:NAME, where a name is a task or a benchmark of mteb. Layouts:

    mmeb      MMEB's evaluation Parquet, version 1            jsonl    your own: queries.jsonl beside candidates.jsonl
    mmeb_v2   MMEB-V2's tasks of images and documents         stored   what a pipeline held out: runs/demo/latest/pairs
    beir      BEIR folders; ViDoRe as published

Scores with 95 % intervals are printed and written below --out: report.md, scores.json, scores.csv, and what every query found in
rankings/. Two models are compared by a paired test on the same queries. The same command again embeds nothing a second time, and
goes on where a killed one was.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict

import yaml

from cluster import storage
from cluster.batch import Pool
from cluster.session import ClusterConfig, connect
from moca_core.benchmarks import PROMPTS, Prompts
from pipelines.evaluation import report
from pipelines.evaluation.by_mteb import evaluate_by_mteb, task_names
from pipelines.evaluation.engine import evaluate, open_models
from pipelines.evaluation.prepare import Asking, prepare, stored_tasks
from pipelines.evaluation.scoring import METRICS
from pipelines.evaluation.tasks import StoredTask
from pipelines.sources import Source

MTEB, STORED = "mteb:", "stored"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        run(options)
    except (ValueError, OSError) as error:
        print(
            f"error: {getattr(error, 'cause', None) or error}", file=sys.stderr
        )  # of what Ray wraps, the error itself
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; what is finished is kept: the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python pipelines/evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", nargs="+", required=True, metavar="[NAME=]DIR", help="model folders or URIs; one or two, or more")
    add("--tasks", nargs="+", required=True, metavar="TASK", help="LAYOUT=PATH or mteb:NAME, see above")
    add("--out", required=True, help="folder or s3:// URI for the scores; what is there already is used again")
    add("--images", help="the folder that image paths of mmeb, mmeb_v2 and jsonl are relative to")
    add(
        "--prompts",
        help=f"{', '.join(PROMPTS)}, or a .yaml file with `query` and `image` (default: the benchmark's, else none)",
    )
    add(
        "--metric",
        choices=METRICS[:3],
        help="main metric of your own tasks (default: ndcg_at_10 for beir, else precision_at_1)",
    )
    add("--max-tokens", type=int, help="longest query or candidate (default: what the model was exported with)")
    add("--workers", type=int, help="processes that embed (default: one for every GPU, else one)")
    add("--vectors", help="where vectors are kept between runs (default: OUT/vectors)")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    models = named_models(options.model)
    asking = Asking(read_prompts(options.prompts), options.metric)
    named = [task.removeprefix(MTEB) for task in options.tasks if task.startswith(MTEB)]
    by_name = task_names(named) if named else []
    given = [split_task(task) for task in options.tasks if not task.startswith(MTEB)]
    held = [task for layout, path in given if layout == STORED for task in stored_tasks(path, asking)]
    files = tuple(source_of(layout, path, options.images) for layout, path in given if layout != STORED)
    connect(ClusterConfig())
    pool = Pool.of_all(options.workers)
    readers = open_models(models, options.max_tokens, pool)
    for reader in readers:
        say(f"model {reader.label}: {reader.attention}, {reader.digest[:16]}, {reader.uri}")
    scores = {"settings": {"max_tokens": options.max_tokens, "precision": readers[0].precision, "tasks": options.tasks}}
    text = ""
    if given:
        tasks = distinct([*held, *(prepare(files, asking, options.out, say) if files else [])])
        vectors_uri = options.vectors or storage.join(options.out, "vectors")
        evaluated = evaluate(readers, tasks, uri=options.out, vectors_uri=vectors_uri, pool=pool, say=say)
        values = report.read_values(evaluated, options.out)
        pair = (readers[-1].label, readers[0].label)
        compared = report.comparisons(values, evaluated.tasks, *pair) if len(readers) > 1 else {}
        scores |= report.document(values, evaluated, compared, pair)
        text = report.markdown(scores)
    if by_name:
        prompts = asking.prompts or Prompts()
        found = evaluate_by_mteb(readers, by_name, prompts, uri=options.out, pool=pool, say=say)
        scores["mteb"] = {"prompts": asdict(prompts), "tasks": found}
        text += report.mteb_markdown(found, list(models))
    files = {
        "scores.json": json.dumps(scores, indent=2, allow_nan=False).encode(),
        "scores.csv": report.scores_csv(scores),
        "report.md": text.encode(),
    }
    for name, content in files.items():
        storage.write_atomic(storage.join(options.out, name), content)
    print(f"\n{text}\nreport.md, scores.json, scores.csv and rankings are in {options.out}")


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def named_models(given: list[str]) -> dict[str, str]:
    """{name: URI}. A model without a name is called after as much of its path as tells it from the others."""
    named = dict(model.split("=", 1) for model in given if "=" in model)
    paths = [model.rstrip("/") for model in given if "=" not in model]
    if len(named) + len(set(paths)) < len(given):
        raise ValueError(f"--model {' '.join(given)}: the same one twice, or two of one name")
    for parts in range(1, 1 + max((len(path.split("/")) for path in paths), default=0)):
        short = {"-".join(filter(None, path.split("/")[-parts:])): path for path in paths}
        if len(short) == len(paths):
            break
    else:
        short = {}
    models = named | short
    if len(models) < len(given):
        raise ValueError(f"--model {' '.join(given)}: two models have the same name; give one as NAME=DIR")
    return models


def split_task(task: str) -> tuple[str, str]:
    layout, separator, path = task.partition("=")
    if not separator or not path:
        raise ValueError(f"--tasks {task!r}: LAYOUT=PATH or mteb:NAME is needed, such as jsonl=my/tasks")
    return layout, path


def source_of(layout: str, path: str, images: str | None) -> Source:
    return Source(layout, path, images=images if layout != "beir" else None)


def read_prompts(given: str | None) -> Prompts | None:
    """A set by its name, or one's own from a file."""
    if given is None or given in PROMPTS:
        return PROMPTS.get(given or "")
    if not given.endswith((".yaml", ".yml")):
        raise ValueError(f"--prompts {given!r}: one of {', '.join(PROMPTS)}, or a .yaml file with `query` and `image`")
    try:
        values = yaml.safe_load(storage.read_bytes(given))
    except yaml.YAMLError as error:
        raise ValueError(f"--prompts {given}: {error}") from None
    texts = isinstance(values, dict) and all(isinstance(value, str) for value in values.values())
    if not texts or not set(values) <= {"query", "image"}:
        raise ValueError(f"--prompts {given}: texts under `query` and `image` are expected, got {values!r}")
    return Prompts(**values)


def distinct(tasks: list[StoredTask]) -> list[StoredTask]:
    names = [task.name for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"two tasks are called {twice[0]}; rename a file or its folder, or evaluate them one after the other"
        )
    return tasks


if __name__ == "__main__":
    sys.exit(main())
