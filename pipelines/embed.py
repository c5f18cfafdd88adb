"""Embed your own texts and images with an exported model.

    python pipelines/embed.py --model runs/demo/latest/export/model "a handwritten seven" page.png notes.txt
    python pipelines/embed.py --model DIR --out vectors.parquet folder/ report.pdf table.parquet
    python pipelines/embed.py --model DIR --out vectors.npy - < queries.txt
    python pipelines/embed.py --model DIR "the digit seven" *.png --rank

An argument that is a file or a folder (also s3:// or hf://) is read, "-" stands for the lines of the standard input, every other
argument is a text. Folders are walked. Images, Markdown and HTML with their images, and texts are an item each, every page of a PDF
is one (its picture), and every row of a Parquet or JSON lines table: its text, its image, or its `content` (docs/using.md).

With --out what is finished is kept beside it in OUT.parts until all is: the same command again goes on where a killed one stopped.
What cannot be used is counted by reason and kept in OUT's name with .rejected.parquet; without --out it is an error.
"""

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np

from cluster import storage
from moca_core.benchmarks import PROMPTS
from moca_core.data.image_files import ImageBounds
from moca_core.folder import model_digest
from moca_core.sources import contents
from moca_core.types import Document, Rejected
from pipelines.embedding.inputs import checked, is_place, list_inputs, read_input
from pipelines.embedding.output import SUFFIXES, beside, counts, write_rejected, write_vectors
from pipelines.embedding.shares import Embed, Job
from pipelines.rejections import check_fraction, check_rejected


def main(arguments: list[str] | None = None) -> int:
    try:
        run(parse(arguments))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; with --out, the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python pipelines/embed.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("items", nargs="+", metavar="ITEM", help="a text, a file, a folder, or - for lines of texts")
    parser.add_argument("--model", required=True, help="an exported model: a folder or an s3:// URI")
    output = parser.add_mutually_exclusive_group()
    output.add_argument(
        "--out",
        help="save to .parquet (item and vector) or .npy (vectors; the items go to .names.jsonl) instead of printing JSON lines",
    )
    output.add_argument("--rank", action="store_true", help="rank all other items by their similarity to the first")
    parser.add_argument("--max-tokens", type=int, help="longest input (default: what the model was exported with)")
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="ROLE=NAME",
        help=f"which column of a table plays a role: {', '.join(contents.COLUMNS)}; may be given several times",
    )
    parser.add_argument(
        "--prompts",
        choices=PROMPTS,
        default="none",
        help="words that the model was trained with, put beside images that are alone, or with --queries before texts (none)",
    )
    parser.add_argument("--queries", action="store_true", help="these are what is searched with, not what is found")
    parser.add_argument(
        "--workers", type=int, default=0, help="so many processes of Ray Data, with a GPU each where there are any"
    )
    parser.add_argument(
        "--max-rejected-fraction", type=float, default=0.05, help="with --out: more bad items are an error (0.05)"
    )
    return parser.parse_intermixed_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Raises ValueError for what the user can mend."""
    columns = roles(options.column)
    check_fraction("--max-rejected-fraction", options.max_rejected_fraction)
    if options.workers and not options.out:
        raise ValueError("--workers needs --out")
    if options.queries and not PROMPTS[options.prompts].query:
        named = [name for name, prompts in PROMPTS.items() if prompts.query]
        raise ValueError(
            f"--queries with --prompts {options.prompts} changes nothing: of them only {', '.join(named)} ask"
        )
    if not storage.exists(storage.join(options.model, "config.json")):
        raise ValueError(f"{options.model}: no config.json there; --model names the folder that the export step wrote")
    if options.out:
        check_out(options.out, options.items)
    units = list_inputs(options.items, sys.stdin)
    if options.out:
        save(options, units, columns)
        return
    documents = all_documents(units, columns)
    if options.rank and len(documents) < 2:
        raise ValueError("--rank needs a first item and at least one other to compare with it")
    from moca_core.embedder import Embedder

    embedder = Embedder(storage.localize(options.model), max_tokens=options.max_tokens)
    prompts, first = PROMPTS[options.prompts], options.queries or options.rank
    queries = [first, *[options.queries] * (len(documents) - 1)]
    vectors = embedder.encode([prompts.put(d.content, query=q) for d, q in zip(documents, queries, strict=True)])
    names = [document.where for document in documents]
    if options.rank:
        print_ranking(names, vectors)
        return
    for name, vector in zip(names, vectors, strict=True):
        print(json.dumps({"item": name, "vector": [round(float(x), 6) for x in vector]}))


def roles(given: list[str]) -> dict[str, str]:
    """{role: column} of the arguments of --column."""
    columns = {}
    for argument in given:
        role, separator, name = argument.partition("=")
        if not separator or not name or role not in contents.COLUMNS:
            raise ValueError(f"--column {argument}: ROLE=NAME is needed, with one of {', '.join(contents.COLUMNS)}")
        columns[role] = name
    return columns


def check_out(out: str, items: list[str]) -> None:
    """Raises ValueError for a name that nothing can be written to, or that would be read as an input."""
    if not out.endswith(SUFFIXES):
        raise ValueError(f"--out {out}: {' or '.join(SUFFIXES)} is expected")
    for item in filter(is_place, items):
        if storage.is_within(out, item):
            raise ValueError(f"--out {out} is or lies in {item}, which is to be embedded: name a place outside of it")


def all_documents(units: list[dict], columns: dict[str, str]) -> list[Document]:
    """The contents of all units, in memory. Raises ValueError for the first that cannot be used."""
    documents = []
    for unit in units:
        for item in (found for read in read_input(unit, columns) for found in checked(read, ImageBounds())):
            if isinstance(item, Rejected):
                raise ValueError(f"{item.where}: {item.reason}, {item.detail}")
            documents.append(item)
    return documents


def print_ranking(names: list[str], vectors: np.ndarray) -> None:
    similarity = vectors[1:] @ vectors[0]
    for index in np.argsort(-similarity):
        print(f"{similarity[index]:7.4f}  {names[index + 1]}")


def save(options: argparse.Namespace, units: list[dict], columns: dict[str, str]) -> None:
    parts = f"{options.out}.parts"
    job = Job(options.model, options.max_tokens, units, columns, parts, options.prompts, options.queries)
    start_or_go_on(job, options.items)
    (on_ray if options.workers else alone)(job, options)
    embedded, rejected = counts(job)
    write_rejected(job, options.out)
    if rejected:
        print(f"rejected: {dict(rejected)}, see {beside(options.out, '.rejected.parquet')}", file=sys.stderr)
    check_rejected("embed", embedded, rejected, options.max_rejected_fraction)
    dimension = write_vectors(job, options.out)
    storage.delete(job.uri)
    print(f"{embedded} vectors of {dimension} dimensions in {options.out}")


def start_or_go_on(job: Job, items: list[str]) -> None:
    """Writes down what the parts are of. Raises ValueError where there are parts of something else."""
    inputs = [storage.digest(item) for item in items if is_place(item)]
    texts = [unit for unit in job.units if "texts" in unit]
    plan = {
        "model": model_digest(storage.localize(job.model)),
        "inputs": hashlib.sha256(json.dumps([items, inputs, texts, job.columns]).encode()).hexdigest(),
        "max tokens": job.max_tokens,
        "prompts": [job.prompts, job.queries],
    }
    uri = storage.join(job.uri, "plan.json")
    if not storage.exists(uri):
        storage.write_atomic(uri, json.dumps(plan).encode())
        return
    begun = json.loads(storage.read_bytes(uri))
    if changed := [name for name, value in plan.items() if begun.get(name) != value]:
        raise ValueError(
            f"{job.uri} was begun with other {' and '.join(changed)}: give the same command, or delete it to start again"
        )


def alone(job: Job, options: argparse.Namespace) -> None:
    from tqdm import tqdm

    rows = [unit.get("rows") or len(unit.get("texts", ())) for unit in job.units]
    with tqdm(total=sum(rows) if all(rows) else None, unit=" items", smoothing=0.1) as bar:
        embed = Embed(job, tell=progress(bar))
        for share in range(len(job.shares())):
            embed(share)


def progress(bar) -> Callable[[int, int], None]:
    rejected: Counter[str] = Counter()

    def tell(embedded: int, bad: int) -> None:
        rejected["all"] += bad
        if rejected["all"]:
            bar.set_postfix_str(f"{rejected['all']} rejected", refresh=False)
        bar.update(embedded + bad)

    return tell


def on_ray(job: Job, options: argparse.Namespace) -> None:
    from cluster.batch import Pool, run_units
    from cluster.session import ClusterConfig, connect

    connect(ClusterConfig())
    run_units(
        partial(Embed, job),
        len(job.shares()),
        state_uri=storage.join(job.uri, "state"),
        say=lambda line: print(line, file=sys.stderr),
        pool=Pool.of_all(options.workers),
    )


if __name__ == "__main__":
    sys.exit(main())
