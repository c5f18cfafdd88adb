"""Markdown as it is, parted at its images: ![alt](path) and <img>, but not where they stand in code. Front matter is left out."""

import re
from bisect import bisect_right
from collections.abc import Iterator

from moca_core.sources.html_text import Picture, picture

# A line --- may be a rule too: what it opens is front matter where the first line below, but for comments, is a key or the end.
KEY = r"(?:[ \t]*+(?:#[^\n]*+)?+\n)*+(?:[\"']?+[\w.-]++[\"']?+[ \t]*+:|---)\s"
FRONT_MATTER = re.compile(rf"(\+\+\+|---(?=[ \t]*+\n{KEY}))[ \t]*\n(?:.*?\n)??(?:\1|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
FENCE = re.compile(r"[ \t>]*+(`{3,}|~{3,})(.*)")
BLANK_LINES = re.compile(r"(\n[ \t]*\n)")
# Possessive (`++`): nothing is tried twice.
TOKEN = re.compile(
    r"(?P<ticks>`++)|\\.|(?P<tag><img\b[^<>]*+>)"
    r"|!\[(?P<alt>(?:[^\[\]]++|\[[^\[\]]*+\])*+)\]"
    r"\(\s*+(?P<src><[^<>\n]*+>|[^\s()]*+(?:\([^\s()]*+\)[^\s()]*+)*+)(?:\s++(?:\"[^\"]*+\"|'[^']*+'))?+\s*+\)",
    re.IGNORECASE | re.DOTALL,
)


def markdown_parts(source: str) -> list[str | Picture]:
    """Texts and pictures in order; the texts together are the source without its pictures and front matter."""
    front = FRONT_MATTER.match(source)
    parts: list[str | Picture] = []
    texts: list[str] = []
    for part in _pieces(source[front.end() if front else 0 :]):
        if isinstance(part, str):
            texts.append(part)
            continue
        parts += ["".join(texts), part]
        texts.clear()
    return [part for part in [*parts, "".join(texts)] if part]


def _pieces(source: str) -> Iterator[str | Picture]:
    """Fenced code as it is, and what is between as `_inline` reads it, paragraph by paragraph."""
    held: list[str] = []
    fence = ""
    for line in source.splitlines(keepends=True):
        mark = FENCE.match(line)
        if fence:
            yield line
            if mark and mark[1].startswith(fence) and not mark[2].strip():
                fence = ""
        elif mark and not (mark[1][0] == "`" and "`" in mark[2]):
            yield from _paragraphs(held)
            held = []
            fence = mark[1]
            yield line
        else:
            held.append(line)
    yield from _paragraphs(held)


def _paragraphs(lines: list[str]) -> Iterator[str | Picture]:
    for paragraph in BLANK_LINES.split("".join(lines)):
        yield from _inline(paragraph)


def _inline(text: str) -> Iterator[str | Picture]:
    """Text and pictures; a run of backticks opens code where an equal run closes it."""
    runs: dict[int, list[int]] = {}
    for run in re.finditer(r"`+", text):
        runs.setdefault(len(run[0]), []).append(run.start())
    done = at = 0
    while token := TOKEN.search(text, at):
        at = token.end()
        if token["ticks"]:
            equal = runs.get(len(token["ticks"]), [])
            closing = bisect_right(equal, token.start())
            at = equal[closing] + len(token["ticks"]) if closing < len(equal) else at
        elif token["tag"] or token["src"] is not None:
            yield text[done : token.start()]
            yield picture(token["tag"]) if token["tag"] else Picture(token["src"].strip("<>"), token["alt"])
            done = at
    yield text[done:]
