"""From a docstring as it is written (reST, numpydoc, Google style) to plain paragraphs.

A line of the result is a paragraph, a heading ("Parameters:") or the description of one parameter. Examples,
directives and cross references go: they are code and markup, and a small model has no room for those.
"""

import inspect
import re

_DROPPED_SECTIONS = {"examples", "example", "see also", "references", "methods", "attributes", "usage"}
_UNDERLINE = re.compile(r"^\s*([-=~^*])\1{2,}\s*$")
_TABLE = re.compile(r"^\s*[=+-]{2,}[=+ -]* [=+-]{2,}|^\s*\+-")
_DIRECTIVE = re.compile(r"^\s*\.\. ")
_GOOGLE_DROPPED = re.compile(r"^(examples?|usage|references?|shape)\s*:{1,2}$", re.IGNORECASE)
_STARTS_LINE = re.compile(r"^([*\w][*\w, ]{0,40}( ?\([^:]*\))? ?:(\s|$)|[-*•] )")
_TEMPLATE = re.compile(r"%\(|\$?\{|<Tip|\[\[")

_QUOTED = (
    (re.compile(r":[\w:+-]+:`[~.!]*([^`<]+?)(\s*<[^>]*>)?`"), r"\1"),  # :class:`~a.b`, :ref:`words <target>`
    (re.compile(r"`([^`<]+?)\s*<[^>]*>`_{1,2}"), r"\1"),  # `words <url>`_
    (re.compile(r"\[`~?([^`]+)`\]"), r"\1"),  # [`Class`] of transformers
    (re.compile(r"``([^`]+)``"), r"\1"),
    (re.compile(r"`[~.!]*([^`]+)`"), r"\1"),
)
_INLINE = (
    (re.compile(r"\s*\[\d+\]_"), ""),  # footnotes
    (re.compile(r"\*\*(\w[^*]*)\*\*"), r"\1"),
    (re.compile(r"\\([*_|`]|(?=s\b)|\s|$)"), r"\1"),  # escapes, and the plural of a reference (Artist\s)
    (re.compile(r"::(?=\s|$)"), ":"),
    (re.compile(r"[ \t]+"), " "),
)


def paragraphs(docstring: str) -> list[str]:
    """The lines of a docstring that are prose, unwrapped; empty where it is a template to be filled in at run time."""
    if _TEMPLATE.search(docstring):
        return []
    lines: list[str] = []
    for block in _blocks(inspect.cleandoc(docstring).expandtabs(4).splitlines()):
        lines.extend(_unwrap(block))
    lines = [line for line in map(_inline, lines) if line]
    # A heading with nothing under it (its section was dropped) is no prose.
    return [
        line
        for i, line in enumerate(lines)
        if not _is_heading(line) or (i + 1 < len(lines) and not _is_heading(lines[i + 1]))
    ]


def first_sentence(paragraph: str) -> tuple[str, str]:
    """A paragraph as (its first sentence, the rest)."""
    for match in re.finditer(r"[.!?](?=\s+[A-Z])", paragraph):
        if not re.search(r"(e\.g|i\.e|etc|vs|cf|al|approx)\.$", paragraph[: match.end()]):
            return paragraph[: match.end()], paragraph[match.end() :].strip()
    return paragraph, ""


def shorten(text: str, max_chars: int) -> str:
    """The text up to `max_chars`, cut where a paragraph ends, or else a sentence, or else a word."""
    if len(text) <= max_chars:
        return text
    head = text[: max_chars + 1]
    for mark, kept in (("\n", 0), (". ", 1), (" ", 0)):
        end = head.rfind(mark)
        if end >= max_chars // 2:
            lines = head[: end + kept].rstrip().split("\n")
            return "\n".join(lines[:-1] if len(lines) > 1 and _is_heading(lines[-1]) else lines)
    return text[:max_chars]


def _blocks(lines: list[str]) -> list[list[str]]:
    """Lines between blank lines, without sections and blocks that are code, markup or references."""
    blocks: list[list[str]] = [[]]
    skipped_indent: int | None = None  # inside a dropped indented block: everything deeper than this goes
    in_dropped_section = False
    for i, line in enumerate(lines):
        following = lines[i + 1] if i + 1 < len(lines) else ""
        indent = len(line) - len(line.lstrip())
        if not line.strip():
            blocks.append([])
            continue
        if skipped_indent is not None:
            if indent > skipped_indent:
                continue
            skipped_indent = None
        if _UNDERLINE.match(line):
            continue
        if _UNDERLINE.match(following):
            in_dropped_section = line.strip().lower() in _DROPPED_SECTIONS
            if not in_dropped_section:
                blocks.extend([[line.strip() + ":"], []])
            continue
        if in_dropped_section:
            continue
        if _DIRECTIVE.match(line) or _GOOGLE_DROPPED.match(line.strip()) or line.lstrip().startswith((">>>", "```")):
            # A doctest's output is at the indent of its prompt: it ends at the blank line, which starts a new block.
            skipped_indent = indent - 1 if line.lstrip().startswith(">>>") else indent
            continue
        blocks[-1].append(line)
        if line.rstrip().endswith("::"):
            skipped_indent = indent
    return [block for block in blocks if block and not any(map(_TABLE.match, block))]


def _unwrap(block: list[str]) -> list[str]:
    joined: list[str] = []
    last_indent = 0
    for line in block:
        indent = len(line) - len(line.lstrip())
        text = line.strip()
        starts = not joined or indent < last_indent or _STARTS_LINE.match(text) or _is_heading(joined[-1])
        if not starts:
            joined[-1] += _glue(joined[-1], indent > last_indent) + text
        else:
            joined.append(text)
        last_indent = indent
    return joined


def _glue(line: str, deeper: bool) -> str:
    """What goes between two lines that become one: wrapped prose is one sentence, a description is a new one."""
    if not deeper or line.endswith((".", ":", ",", ";")):
        return " "
    if " : " in line:
        return ". "  # axis : int
    return ": " if len(line) < 30 else " "  # ValueError


def _inline(line: str) -> str:
    for pattern, replacement in (*_QUOTED, *_INLINE) if "`" in line else _INLINE:
        line = pattern.sub(replacement, line)
    return line.strip()


def _is_heading(line: str) -> bool:
    return line.endswith(":") and len(line) < 24 and line.count(" ") <= 1
