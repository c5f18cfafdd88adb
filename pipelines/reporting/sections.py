"""What a report says of every step: the question that it answers, its figures, its pictures, and what deserves a second look."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cluster import storage
from moca_core.data.validate import DROPPED
from pipelines.pictures.time_spent import MEANS
from pipelines.rejections import rejected_rows
from pipelines.reporting.pages import inlined
from pipelines.runner.outcome import Attempt
from pipelines.runner.record import Record

QUESTIONS = {
    "corpus": "What was read, and what was refused?",
    "pairs": "Which questions with their answers are there?",
    "clean": "What was taken out, and why?",
    "base": "Which model does it start from?",
    "pack": "What does it learn from?",
    "pretrain": "Does it learn to restore what was masked?",
    "warmup": "Can a first, short fine-tuning tell answers apart?",
    "mine": "Which wrong answers are hard ones?",
    "finetune": "Does it learn to tell right answers from wrong ones?",
    "average": "Of which weights is the model a mean?",
    "evaluate": "How good is it, and where?",
    "export": "Does it give the same vectors everywhere?",
}
PICTURES = {
    "documents.png": "Documents that entered, and those refused by reason.",
    "pairs.png": "Training pairs by task, and those refused by reason.",
    "taken_out.png": "What the cleaning took out, by reason.",
    "mined.png": "Hard negatives found, by task.",
    "scores.png": "Precision@1 by task and model, with 95 % intervals where there are any; the black dashes are what chance gives.",
    "mixture.png": "Tokens by source after cleaning.",
    "losses.png": "Losses over the tokens seen, of training and of what is held out.",
    "reconstructions.png": "The same held-out images and words, restored at several moments.",
    "similarities.png": "Cosines of queries to right answers and to negatives, in the last fifth of training.",
    "time.png": "Where the seconds of a step went.",
}
Facts = list[tuple[str, str]]


@dataclass
class Table:
    title: str
    columns: list[str]
    rows: list[list[str]]


@dataclass
class Section:
    """`status` is that of the attempt; `facts` are names with values."""

    step: str
    question: str
    status: str
    facts: Facts = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    pictures: list[tuple[str, str]] = field(default_factory=list)  # caption, data: URI


def section(attempt: Attempt, uri: str, record: Record | None) -> Section:
    """`uri` is the step's folder, `record` what it left there."""
    made = Section(attempt.step, QUESTIONS.get(attempt.step, ""), attempt.status)
    if record is None:
        return made
    made.facts = [("took", duration(record.duration_s)), ("made", moment(record.started))]
    if attempt.step in READERS:
        READERS[attempt.step](made, record.result)
    for name, caption in PICTURES.items():
        if (source := inlined(storage.join(uri, name))) is not None:
            made.pictures.append((caption, source))
    return made


def moment(iso: str) -> str:
    """ "2026-11-23T08:00:10+00:00" for people."""
    return f"{iso[:10]} {iso[11:16]} UTC"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def _corpus(made: Section, result: dict[str, Any]) -> None:
    made.facts += [("documents", f"{result['documents']:,}"), ("sources", ", ".join(result["sources"]))]
    _rejected(made, result["rejected"], "documents")


def _pairs(made: Section, result: dict[str, Any]) -> None:
    train = {name: sum(rows for _, rows in files) for name, files in result["train"].items()}
    made.facts += [("training pairs", f"{sum(train.values()):,}"), ("evaluation tasks", str(len(result["tasks"])))]
    made.tables.append(Table("Training", ["task", "pairs"], [[name, f"{count:,}"] for name, count in train.items()]))
    held_out = [[name, f"{task['queries']:,}", f"{task['candidates']:,}"] for name, task in result["tasks"].items()]
    made.tables.append(Table("Held out for evaluation", ["task", "queries", "candidates"], held_out))
    _rejected(made, result["rejected"], "pairs")


def _clean(made: Section, result: dict[str, Any]) -> None:
    counts = result["counts"]
    made.facts.append(("taken out", f"{sum(counts.values()):,}"))
    if counts:
        rows = [[reason.replace("_", " "), f"{count:,}"] for reason, count in sorted(counts.items(), key=_most_first)]
        made.tables.append(Table("Taken out", ["why", "times"], rows))


def _pack(made: Section, result: dict[str, Any]) -> None:
    made.facts += [
        ("rows", f"{result['rows']:,}"),
        ("tokens", f"{result['tokens']:,}"),
        ("of images", f"{result['image_tokens'] / max(1, result['tokens']):.1%}"),
        ("full", f"{result['fill']:.1%}"),
    ]
    if result["fill"] < 0.97:
        made.warnings.append(
            f"Rows are {result['fill']:.1%} full: the corpus, or pack.window, is small for rows of that length."
        )
    if result["emptied"]:
        made.warnings.append(f"{result['emptied']:,} documents held nothing but images that the cleaning took out.")


def _training(made: Section, result: dict[str, Any]) -> None:
    if "parameters" in result:
        made.facts.append(("parameters", f"{result['parameters'] / 1e6:,.1f} M"))
    if "steps" in result:
        made.facts += [("steps", f"{result['steps']:,}"), ("attention", result["attention"])]
    if "tokens_seen" in result:
        made.facts.append(("tokens seen", f"{result['tokens_seen']:,}"))
    for name, value in result.get("last", {}).items():
        made.facts.append((name.replace("_", " "), f"{result['first'][name]:.3f} → {value:.3f}"))
    if shown := result.get("reconstructions"):
        right = f"{shown['right'][0]} → {shown['right'][-1]} of {shown['words']}"
        made.facts.append(("masked words guessed right, of those below", right))
    if spent := result.get("time"):
        made.facts.append(("time", ", ".join(f"{share:.0%} {MEANS[part]}" for part, share in spent.items())))
    if result.get("restarts"):
        made.warnings.append(f"Failures after which the workers went on from a checkpoint: {result['restarts']}.")


def _mine(made: Section, result: dict[str, Any]) -> None:
    rows = []
    for name, found in result["mined"].items():
        pairs, negatives = max(1, found["pairs"]), found["negatives"]
        mined = f"{found['negative_similarity'] / negatives:.3f}" if negatives else ""
        rows.append([name, f"{negatives / pairs:.2f}", f"{found['positive_similarity'] / pairs:.3f}", mined])
        if not negatives:
            made.warnings.append(f"{name}: no hard negative was found.")
    made.tables.append(Table("By task", ["task", "negatives a pair", "cosine to right", "cosine to mined"], rows))


def _average(made: Section, result: dict[str, Any]) -> None:
    made.facts += [(name, f"{share:.1%}") for name, share in result["shares"].items()]


def _evaluate(made: Section, result: dict[str, Any]) -> None:
    made.facts.append(("queries", f"{sum(result['queries'].values()):,}"))
    model = list(next(iter(result["scores"].values())))[-1]
    for name, row in result["scores"].items():
        interval = result.get("intervals", {}).get(name, {}).get(model)
        if (interval["low"] if interval else row[model]) <= row["chance"]:
            made.warnings.append(f"{name}: {model} cannot be told from chance.")


def _export(made: Section, result: dict[str, Any]) -> None:
    made.facts += [(f"lowest cosine, {reader}", f"{cosine:.6f}") for reader, cosine in result["cosine"].items()]


def _rejected(made: Section, counts: dict[str, int], what: str) -> None:
    """Rows, and images without which their documents went on."""
    rejected = rejected_rows(counts)
    dropped = {reason.removeprefix(DROPPED): count for reason, count in counts.items() if reason not in rejected}
    for title, lost, name in (("Rejected", rejected, what), ("Images dropped from their documents", dropped, "images")):
        if lost:
            made.warnings.append(
                f"{sum(lost.values()):,} {name} could not be used; they are kept in rejected/, with the reason."
            )
            rows = [[reason.replace("_", " "), f"{count:,}"] for reason, count in sorted(lost.items(), key=_most_first)]
            made.tables.append(Table(title, ["why", name], rows))


def _most_first(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]


READERS: dict[str, Callable[[Section, dict[str, Any]], None]] = {
    "corpus": _corpus,
    "pairs": _pairs,
    "clean": _clean,
    "base": _training,
    "pack": _pack,
    "pretrain": _training,
    "warmup": _training,
    "mine": _mine,
    "finetune": _training,
    "average": _average,
    "evaluate": _evaluate,
    "export": _export,
}
