"""Pairs and tasks without labels, from documents alone: the first sentence of a section asks for the rest of it, a detail of a figure
for the figure.

    python docs/recipes/kicad_sections.py --corpus ../shared/data/kicad/interleaved --out runs/kicad-sections

Every third section, drawn by its name, is held out: its text and its figures are in the tasks, and neither in the pairs nor in the
corpus that is pre-trained on. For documents in the layout of OBELICS (docs/your_own_corpus.md).
"""

import argparse
import hashlib
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from moca_core.data.image_files import ImageError, header_size, refusals

HELD_OUT_ONE_IN = 3
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
LEAST_WORDS = 6  # of a question; its answer has five times as many at least
LEAST_FIGURE_PX, MOST_FIGURE_PX = 100, 4_000_000  # of a side; of the whole
DETAIL_SHARE = 0.4, 0.7  # of each side


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="kicad_sections.py"
    )
    parser.add_argument("--corpus", type=Path, required=True, help="folder of Parquet files in OBELICS layout")
    parser.add_argument("--out", type=Path, required=True, help="folder for corpus/, pairs/ and tasks/")
    options = parser.parse_args()
    files = sorted(options.corpus.glob("*.parquet"))
    if not files:
        parser.error(f"--corpus {options.corpus}: no Parquet files there")
    sections = pa.concat_tables([pq.read_table(file) for file in files])
    kept = pa.array([not held_out(name) for name in sections["doc_id"].to_pylist()])
    corpus = options.out / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    pq.write_table(sections.filter(kept), corpus / "part-0.parquet")
    print(f"{sum(kept.to_pylist())} of {len(kept)} sections to pre-train on")
    for task, asked in (("sentence_to_section", sentences(sections)), ("detail_to_figure", details(sections, kept))):
        folder = options.out / "tasks" / task
        pairs, queries, candidates = [], [], []
        for name, held, question, answer in asked:
            if held:
                candidates.append({"id": name, "content": written(answer, folder)})
                queries.append({"query": written(question, folder), "answers": [name]})
            else:
                sides = (written(side, options.out / "pairs") for side in (question, answer))
                pairs.append(dict(zip(("query", "positive"), sides, strict=True), task=task))
        write_lines(options.out / "pairs" / f"{task}.jsonl", pairs)
        write_lines(folder / "queries.jsonl", queries)
        write_lines(folder / "candidates.jsonl", candidates)
        print(f"{task}: {len(pairs)} pairs, {len(queries)} held-out queries")


def held_out(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % HELD_OUT_ONE_IN == 0


def sentences(sections: pa.Table) -> Iterator[tuple[str, bool, str, str]]:
    """(section, whether it is held out, its first sentence, the rest of its text); the heading is in neither."""
    for section in sections.select(["doc_id", "texts"]).to_pylist():
        _, *body = [text for text in section["texts"] if text] or [""]
        question, *rest = SENTENCE_END.split(" ".join(" ".join(body).split()), maxsplit=1)
        answer = "".join(rest)
        if len(question.split()) >= LEAST_WORDS and len(answer.split()) >= 5 * LEAST_WORDS:
            yield section["doc_id"], held_out(section["doc_id"]), question, answer


def details(sections: pa.Table, kept: pa.Array) -> Iterator[tuple[str, bool, Image.Image, Image.Image]]:
    """(figure, whether it is in held-out sections alone, a part of it, the figure), each figure once."""
    trained = {image for images in sections.filter(kept)["images"].to_pylist() for image in images if image}
    everything = {image for images in sections["images"].to_pylist() for image in images if image}
    for encoded in sorted(everything):
        try:
            width, height = header_size(encoded)
            if min(width, height) < LEAST_FIGURE_PX or width * height > MOST_FIGURE_PX:
                continue
            with refusals(encoded):
                figure = Image.open(io.BytesIO(encoded)).convert("RGB")
        except ImageError as error:
            print(f"a figure is left out: {error}", file=sys.stderr)
            continue
        name = hashlib.sha256(encoded).hexdigest()[:16]
        draw = Random(name)
        width, height = (round(side * draw.uniform(*DETAIL_SHARE)) for side in figure.size)
        left, top = draw.randrange(figure.width - width), draw.randrange(figure.height - height)
        detail = figure.crop((left, top, left + width, top + height))
        yield name, encoded not in trained, detail, figure


def written(side: str | Image.Image, folder: Path) -> str | dict[str, str]:
    """A side as JSON lines hold it; an image becomes a file in the folder."""
    if isinstance(side, str):
        return side
    content = io.BytesIO()
    side.save(content, "PNG")
    path = Path("images") / f"{hashlib.sha256(content.getvalue()).hexdigest()[:16]}.png"
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_bytes(content.getvalue())
    return {"image": str(path)}


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    main()
