"""Search a folder of documents with an exported model: pages of PDFs, images, Markdown, HTML and texts.

    python pipelines/search.py index FOLDER --model DIR --out INDEX
    python pipelines/search.py serve INDEX
    python pipelines/search.py query INDEX "how to draw a zone"

`index` embeds what the folder holds. Given again it embeds only what is new or changed, and forgets what is gone. `serve` shows
one page on this machine: type a text, drop or paste an image, see what is nearest. `query` does the same here (docs/using.md).
"""

import argparse
import sys
from pathlib import Path

from cluster import storage
from moca_core.benchmarks import PROMPTS
from moca_core.types import Segment
from pipelines.rejections import check_fraction


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python pipelines/search.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    index = commands.add_parser("index", help="make an index of a folder, or bring it up to date")
    index.add_argument("folder")
    index.add_argument("--model", required=True, help="an exported model: a folder or an s3:// URI")
    index.add_argument("--out", required=True, metavar="INDEX", help="the folder of the index")
    index.add_argument(
        "--prompts",
        choices=PROMPTS,
        default="none",
        help="words that the model was trained with, put beside pages and before what is asked (none)",
    )
    index.add_argument(
        "--max-rejected-fraction",
        type=float,
        default=0.05,
        help="more documents that cannot be read are an error (0.05)",
    )
    index.set_defaults(run=make_index)
    serve = commands.add_parser("serve", help="serve the search page of an index")
    query = commands.add_parser("query", help="ask an index")
    query.set_defaults(run=ask)
    serve.set_defaults(run=serve_page)
    for command in (serve, query):
        command.add_argument("index", metavar="INDEX")
        command.add_argument("--model", help="where the model of the index lies now (default: where it lay)")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine alone)")
    serve.add_argument("--port", type=int, default=8484)
    query.add_argument("text", nargs="?", help="what to search for")
    query.add_argument("--image", help="a file to search with")
    query.add_argument("--top", type=int, default=10)
    return parser.parse_args(arguments)


def make_index(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from pipelines.searching.index import update

    check_fraction("--max-rejected-fraction", options.max_rejected_fraction)
    model = storage.localize(options.model)
    if not (Path(model) / "config.json").is_file():
        raise ValueError(f"{options.model}: no config.json there; --model names the folder that the export step wrote")
    if not Path(options.folder).is_dir():
        raise ValueError(f"{options.folder}: no folder there")
    done = update(
        options.out,
        options.folder,
        model,
        prompts=options.prompts,
        max_rejected_fraction=options.max_rejected_fraction,
        progress=lambda files: tqdm(files, unit=" files"),
    )
    if done.rejected:
        print(f"rejected: {done.rejected}, see {options.out}/rejected.parquet", file=sys.stderr)
    print(
        f"{done.entries} pages and passages of {done.files} files in {options.out}: "
        f"{done.embedded} embedded now, {done.removed} files gone"
    )


def serve_page(options: argparse.Namespace) -> None:
    from pipelines.searching.searcher import Searcher
    from pipelines.searching.server import is_loopback, listen, serve

    searcher = Searcher(options.index, options.model)
    bound = listen(options.host, options.port)
    if not is_loopback(options.host):
        print(
            f"warning: {options.host} is no loopback address: whoever reaches this machine can search and read these documents",
            file=sys.stderr,
        )
    host = f"[{options.host}]" if ":" in options.host else options.host
    print(f"{len(searcher)} pages and passages on http://{host}:{bound.getsockname()[1]}, until Ctrl-C", flush=True)
    serve(searcher, options.host, bound)


def ask(options: argparse.Namespace) -> None:
    from pipelines.searching.searcher import Searcher

    if (options.text is None) == (options.image is None):
        raise ValueError("a text or --image FILE is needed, one of the two")
    if options.top < 1:
        raise ValueError(f"--top {options.top} must be at least 1")
    asked = Segment(text=options.text) if options.image is None else Segment(image=Path(options.image).read_bytes())
    for hit in Searcher(options.index, options.model).search((asked,), options.top):
        place = f"{hit.path}, {hit.kind} {hit.number}" if hit.numbers > 1 else hit.path
        print(f"{hit.score:7.4f}  {place}" + (f": {hit.snippet[:80]}" if hit.snippet else ""))


if __name__ == "__main__":
    sys.exit(main())
