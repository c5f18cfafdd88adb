"""HTML to its visible text, in paragraphs, and the images between.

Not the standard library's parser: 25 kB of "<a " keep that one busy for ten seconds, and "<![<" makes it fail. This one passes over
every character once, and reads what is broken as browsers do: a tag, comment or script that does not end takes the rest, and a quote
counts only where a value begins (not in alt="5" disk", nor in title=it's). Only a quote that nothing closes takes no more than its tag.
"""

import html
import re
from typing import NamedTuple

# Possessive (`++`): nothing is tried twice.
ATTRIBUTE = r"([^\s/>][^\s/>=]*+)(?:\s*+=\s*+(\"[^\"]*+\"|'[^']*+'|[^\s>]*+))?+"
TAG = re.compile(rf"</?([a-zA-Z][^\s/>]*+)(?:[\s/]++|{ATTRIBUTE})*+>")
SPACE = re.compile(r"\s++")
HIDDEN_END = {
    name: re.compile(f"</{name}[\\s/>]", re.IGNORECASE)
    for name in ("script", "style", "title", "template", "noscript", "svg", "iframe")
}
LINES = ("br", "li", "tr", "dt", "dd", "option")  # begin a line
CELLS = ("td", "th")
PARAGRAPH = re.compile(
    "address|article|aside|blockquote|body|caption|center|details|dialog|div|dl|fieldset|figcaption|figure|footer|form|h[1-6]|"
    "header|hr|html|main|nav|ol|p|pre|section|summary|table|ul"
)


class Picture(NamedTuple):
    """An image where it stands, not read yet."""

    src: str
    alt: str


class _Page:
    """Texts and pictures as they come, and the paragraph that is being read."""

    def __init__(self) -> None:
        self.parts: list[str | Picture] = []
        self.paragraphs: list[str] = []
        self.pieces: list[str] = []
        self.preformatted = False

    def end_paragraph(self) -> None:
        text = "".join(self.pieces)
        if not self.preformatted:
            text = SPACE.sub(lambda space: "\n" if "\n" in space[0] else " ", text)
            text = "\n".join(line.strip().removeprefix("| ") for line in text.split("\n")).strip()
        if text.strip():
            self.paragraphs.append(text.strip("\n"))
        self.pieces.clear()

    def end_text(self) -> None:
        self.end_paragraph()
        if self.paragraphs:
            self.parts.append("\n\n".join(self.paragraphs))
        self.paragraphs.clear()


def html_parts(source: str) -> list[str | Picture]:
    """Texts, whose paragraphs are parted by a blank line, and pictures, in order."""
    page = _Page()
    at = 0
    while at < len(source):
        start = source.find("<", at)
        text = _unescaped(source[at : start if start >= 0 else len(source)])
        page.pieces.append(text if page.preformatted else SPACE.sub(" ", text))
        if start < 0:
            break
        name, tag, at = _markup(source, start)
        closing = tag.startswith("</")
        if not name:
            page.pieces.append(tag)
        elif PARAGRAPH.fullmatch(name):
            page.end_paragraph()
            page.preformatted = page.preformatted if name != "pre" else not closing
        elif name == "img":
            page.end_text()
            page.parts.append(picture(tag))
        elif name in LINES and not closing:
            page.pieces.append("\n")
        elif name in CELLS and not closing:
            page.pieces.append(" | ")
    page.end_text()
    return page.parts


def picture(tag: str) -> Picture:
    """What an <img> tag says."""
    found = {name.lower(): _unescaped(value.strip("\"'")).strip() for name, value in re.findall(ATTRIBUTE, tag)}
    return Picture(found.get("src", ""), found.get("alt", ""))


def _markup(source: str, start: int) -> tuple[str, str, int]:
    """(name, tag, where it ends) of what begins with "<"; what has no name is text, and a comment an empty one."""
    if source.startswith("<!--", start):
        end = source.find("-->", start + 4)
        return "", "", end + 3 if end >= 0 else len(source)
    if source.startswith(("<!", "<?"), start):
        end = source.find(">", start)
        return "", "", end + 1 if end >= 0 else len(source)
    if not re.match(r"/?[a-zA-Z]", source[start + 1 : start + 3]):
        return "", "<", start + 1
    tag = TAG.match(source, start)
    if not tag:
        return "", "", len(source)
    name, end = tag[1].lower(), tag.end()
    if name in HIDDEN_END and not tag[0].startswith("</") and not tag[0].endswith("/>"):
        hidden_end = HIDDEN_END[name].search(source, end)
        end = hidden_end.start() if hidden_end else len(source)
    return name, tag[0], end


def _unescaped(text: str) -> str:
    try:
        return html.unescape(text)
    except ValueError:  # a number of thousands of digits
        return text
