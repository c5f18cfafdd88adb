"""Pairs and a task without labels, from documents alone: the first sentence of a section asks for the rest of it.

    python docs/recipes/kicad_sections.py --corpus ../shared/data/kicad/interleaved --out runs/kicad-sections

Every third section, drawn by its name, is held out: it is in the task, and neither in the pairs nor in the corpus that is pre-trained
on. For documents in the layout of OBELICS (docs/your_own_corpus.md).
"""

import argparse
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

HELD_OUT_ONE_IN = 3
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
LEAST_WORDS = 6  # of a question; its answer has five times as many at least


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
    kept = [not held_out(name) for name in sections["doc_id"].to_pylist()]
    corpus = options.out / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    pq.write_table(sections.filter(pa.array(kept)), corpus / "part-0.parquet")
    pairs, queries, candidates = [], [], []
    for name, question, answer in questions(sections):
        if held_out(name):
            candidates.append({"id": name, "content": answer})
            queries.append({"query": question, "answers": [name]})
        else:
            pairs.append({"query": question, "positive": answer, "task": "sentence_to_section"})
    task = options.out / "tasks" / "sentence_to_section"
    write_lines(options.out / "pairs" / "pairs.jsonl", pairs)
    write_lines(task / "queries.jsonl", queries)
    write_lines(task / "candidates.jsonl", candidates)
    print(
        f"{sum(kept)} of {len(kept)} sections to pre-train on, {len(pairs)} pairs, {len(queries)} held-out queries: {options.out}"
    )


def held_out(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % HELD_OUT_ONE_IN == 0


def questions(sections: pa.Table) -> Iterator[tuple[str, str, str]]:
    """(section, its first sentence, the rest of its text); the heading is in neither."""
    for section in sections.select(["doc_id", "texts"]).to_pylist():
        _, *body = [text for text in section["texts"] if text] or [""]
        question, *rest = SENTENCE_END.split(" ".join(" ".join(body).split()), maxsplit=1)
        answer = "".join(rest)
        if len(question.split()) >= LEAST_WORDS and len(answer.split()) >= 5 * LEAST_WORDS:
            yield section["doc_id"], question, answer


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    main()
