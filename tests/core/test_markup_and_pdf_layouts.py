"""Folders of Markdown, HTML and PDFs: what a reader sees comes out in order, whatever the file claims to be."""

import base64
import io

import pytest
from document_files import at, pdf, put, read, reasons
from PIL import Image
from samples import picture, png, text

from moca_core.data.image_files import decode
from moca_core.sources import markup
from moca_core.sources import pdf as pdf_source
from moca_core.types import Document, Rejected, Segment

A, B = png(60, 60, 1), png(80, 60, 2)
IMAGE_A, IMAGE_B, NONE = Segment(image=A), Segment(image=B), Segment(image=b"")


MARKDOWN = f"""---
title: no part of it
---
# Board

Before ![the board](img/a%20b.png "A board") after, `![code](no.png)`.

```md
![fenced](no.png)
```
<img alt="B" src="b.png"/> ![web](https://example.org/x.png) ![lost](lost.png) ![in](data:image/png;base64,{base64.b64encode(A).decode()})
"""


def test_markdown(tmp_path):
    put(tmp_path / "docs" / "a.md", MARKDOWN)
    put(tmp_path / "docs" / "img" / "a b.png", A)
    put(tmp_path / "b.png", B)  # at the top of the source
    (document,) = read(markup, at(tmp_path))
    code = " after, `![code](no.png)`.\n\n```md\n![fenced](no.png)\n```\n"
    assert document.content == (text("# Board\n\nBefore "), IMAGE_A, text(code), IMAGE_B, text(" web "), NONE, IMAGE_A)
    assert document.source == "docs" and document.where.endswith("docs/a.md")


@pytest.mark.parametrize(
    ("front", "taken"),
    [
        ("---\ntitle: x\ntags:\n  - a\n---\n", True),
        ("---\n# a comment\n\n'quoted-key' :\n...\n", True),
        ('+++\n[table]\ntitle = "x"\n+++\n', True),
        ("---\n---\n", True),
        ("---\nIntro under a rule\n\nnote: more\n\n---\n", False),
        ("---\nSee https://example.org/x\n---\n", False),
        ("---\n- a list\n---\n", False),
        ("---\ntitle: never closed\n", False),
    ],
)
def test_front_matter_begins_with_a_key_and_everything_else_is_text(tmp_path, front, taken):
    (document,) = read(markup, at(put(tmp_path / "a.md", f"{front}second\n")))
    assert document.content == (text("second\n" if taken else f"{front}second\n"),)


HTML = """<!DOCTYPE html><html><head><meta charset="windows-1252"><title>T</title><style>p{}</style></head><body>
<h1>Caf\u00e9 &amp; bar</h1><p>One <b>two</b>
three<br>four <!-- not this --></p><ul><li>a</li> <li>b</ul>
<table><tr><th>x</th><th>y</th></tr><tr><td>1</td><td>2</td></tr></table>
<pre>def f():
    pass</pre><script>if (a < b) document.write("<p>x")</script><img src='a.png' alt="A">
<p>1 < 2 <img src="//cdn/x.png" alt="web"></p></body></html>"""


def test_html(tmp_path):
    put(tmp_path / "docs" / "a.htm", HTML.encode("windows-1252"))
    put(tmp_path / "docs" / "a.png", A)
    (document,) = read(markup, at(tmp_path))
    said = ["Caf\u00e9 & bar", "One two three\nfour", "a\nb", "x | y\n1 | 2", "def f():\n    pass"]
    assert document.content == (text("\n\n".join(said)), IMAGE_A, text("1 < 2\n\nweb"))


@pytest.mark.parametrize(
    "tag",
    [
        '<img src="a.png"" alt="A">',
        '<img alt="5" disk" src="a.png">',
        "<img alt=it's src=a.png>",
        '<img alt="4 > 3" src = "a.png" />',
        "<img/src='a.png'alt=A>",
        """<img data-x='"' src=a.png>""",
        '<img src="a.png>',
    ],
)
def test_a_quote_that_begins_no_value_is_none(tmp_path, tag):
    """Each ends at its own ">", as in browsers (but for the last, over which they lose the rest of the page)."""
    put(tmp_path / "a.html", f"<p>before</p>{tag}<p>after</p><p>to the end</p>")
    put(tmp_path / "a.png", A)
    (document,) = read(markup, at(tmp_path))
    assert document.content == (text("before"), IMAGE_A, text("after\n\nto the end"))


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.md", b"\xef\xbb\xbfx", "x"),
        ("a.md", "x\u00e9".encode("utf-16"), "x\u00e9"),
        ("a.md", b"x\xe9", "malformed_text"),
        ("a.html", b"<meta http-equiv=x content='text/html; charset=Shift_JIS'>\x82\xa0", "\u3042"),
        ("a.html", b"<meta charset=zip>x", "x"),
        ("a.html", b"<meta charset=utf-16>x", "x"),
        *[("a.html", b"<meta charset=%s>x" % name, "x") for name in (b"iso-8859-12", b"iso-8859-0", b"windows-1259")],
        ("a.html", b"&#" + b"9" * 5000 + b";&#xD800;", "&#" + "9" * 5000 + ";&#xD800;"),
        ("a.md", b"x" * (17 * 2**20), "file_too_large"),
        ("a.md", b"![x](data:image/png;base64,abc)", "malformed_row"),
    ],
)
def test_encodings_and_bounds_of_pages(tmp_path, name, data, expected):
    (item,) = read(markup, at(put(tmp_path / name, data)))
    assert (item.reason if isinstance(item, Rejected) else item.content[0].text) == expected


def test_pdf(tmp_path):
    put(tmp_path / "manuals" / "a.PDF", pdf([f"page {i} of eleven" for i in range(11)]))
    first, second = read(pdf_source, at(tmp_path))
    assert [len(d.content) for d in (first, second)] == [16, 6] and first.source == "manuals"
    assert [s.text for s in second.content[1::2]] == [f"page {i} of eleven" for i in (8, 9, 10)]
    assert decode(first.content[0].image).size == (1275, 1650) and first.content[0].image.startswith(b"\x89PNG")
    assert second.where.endswith("a.PDF pages 9 to 11")
    scan = io.BytesIO()
    picture(800, 800).save(scan, "PDF", resolution=72)
    (document,) = read(pdf_source, at(put(tmp_path / "scan.pdf", scan.getvalue())))
    assert len(document.content) == 1 and document.content[0].image.startswith(b"\xff\xd8")


ENCRYPTED = b"/Encrypt << /Filter /Standard /V 1 /R 2 /O (%s) /U (%s) /P -4 >>" % (b"o" * 32, b"u" * 32)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "pdf_unreadable"),
        (b"%PDF-1.4\nnothing", "pdf_unreadable"),
        (pdf([]), "pdf_unreadable"),
        (pdf(["a"]).replace(b"/Root 1", ENCRYPTED + b" /Root 1"), "pdf_encrypted"),
    ],
)
def test_pdfs_that_cannot_be_read(tmp_path, data, reason):
    items = read(pdf_source, at(put(tmp_path / "a.pdf", data)))
    assert {i.reason for i in items if isinstance(i, Rejected)} == {reason}


def test_pages_of_any_size_are_bounded(tmp_path, monkeypatch):
    for size in ((14400, 14400), (10**9, 1), (0.001, 0.001), (-612, 792), (0, 0), (10**38, 10**38)):
        for item in read(pdf_source, at(put(tmp_path / "a.pdf", pdf(["x"], size)))):
            if isinstance(item, Document):
                assert max(Image.open(io.BytesIO(item.content[0].image)).size) <= 2048
    monkeypatch.setattr(pdf_source, "MAX_FILE_BYTES", 100)
    assert reasons(read(pdf_source, at(tmp_path))) == ["file_too_large"]
