"""search.py: an index that is brought up to date, its answers, and a server that trusts nobody."""

import io
import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from starlette.testclient import TestClient

from moca_core.embedder import Embedder
from moca_core.types import Segment
from pipelines.search import main
from pipelines.searching.searcher import Searcher
from pipelines.searching.server import host_name, make_app, own_hosts
from tests.exported import exported_model
from tests.pipelines.conftest import png, words

SECTIONS = [f"## Section {n}\n\n{words(25, n)}" for n in range(6)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return exported_model(tmp_path_factory.mktemp("search"))


def write_documents(folder):
    """A manual of six sections, figures, a page of HTML with markup that must not run, two pages of PDF, one broken image."""
    (folder / "figures").mkdir(parents=True)
    (folder / "manual.md").write_text("\n\n".join(SECTIONS))
    (folder / "with figure.md").write_text(f"{words(20, 40)}\n\n![it](figures/shown.png)\n")
    for n in range(8):
        (folder / "figures" / f"{n}.png").write_bytes(png(n))
    (folder / "figures" / "shown.png").write_bytes(png(50, 300, 200))
    (folder / "page.html").write_text(
        f"<h1>{words(12, 60)}</h1><script>alert(1)</script><p>&lt;img src=x onerror=alert(1)&gt;"
    )
    Image.new("RGB", (100, 140), "navy").save(
        folder / "two.pdf", save_all=True, append_images=[Image.new("RGB", (100, 140), "red")]
    )
    (folder / "broken.png").write_text("<script>alert(1)</script>")
    return folder


def make(folder, model, out, *more):
    return main(["index", str(folder), "--model", model, "--out", str(out), "--max-rejected-fraction", "0.2", *more])


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("documents") / "folder")


@pytest.fixture(scope="module")
def index(documents, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("index") / "index"
    assert make(documents, model, out) == 0
    return out


@pytest.fixture(scope="module")
def searcher(index):
    return Searcher(str(index))


@pytest.fixture(scope="module")
def client(searcher):
    return TestClient(make_app(searcher, own_hosts("127.0.0.1")), base_url="http://127.0.0.1:8484")


def first(searcher, **segment):
    return searcher.search((Segment(**segment),), 1)[0]


def test_a_section_a_picture_and_a_page_find_themselves(searcher, documents):
    for number, section in enumerate(SECTIONS, 1):
        hit = first(searcher, text=section)
        assert (hit.path, hit.kind, hit.number, hit.numbers) == ("manual.md", "text", number, 6)
        assert hit.score == pytest.approx(1, abs=1e-5) and hit.snippet == " ".join(section.split())
    hit = first(searcher, image=png(3))
    assert (hit.path, hit.kind, hit.score) == ("figures/3.png", "image", pytest.approx(1, abs=1e-5)) and hit.has_picture
    from pyarrow.fs import LocalFileSystem

    from moca_core.sources import Location, pdf

    path = str(documents / "two.pdf")
    pages = list(pdf.read_pages(Location(LocalFileSystem(), path), {"path": path}))
    hit = first(searcher, image=pages[1].content[0].image)
    assert (hit.path, hit.kind, hit.number, hit.numbers) == ("two.pdf", "page", 2, 2)


def test_scores_are_cosines_best_first(searcher, index, model):
    question = (Segment(text="which rules does the editor check"),)
    hits = searcher.search(question, 100)
    table = pq.read_table(next(index.glob("entries-*.parquet"))).to_pylist()
    cosines = np.array([row["vector"] for row in table]) @ Embedder(model, device="cpu").encode([question])[0]
    assert len(hits) == len(table) == 6 + 1 + 9 + 1 + 2
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(cosines)[::-1], atol=1e-5)


def test_another_model_is_refused(index, documents, tmp_path, capsys):
    other = exported_model(tmp_path / "other", "qwen2_vl")
    assert make(documents, other, index) == 2
    assert "is of another model" in capsys.readouterr().err
    for command in (["query", str(index), "a", "--model", other], ["serve", str(index), "--model", other]):
        assert main(command) == 2
        assert "is not the model" in capsys.readouterr().err


def test_what_the_user_can_mend_is_said(model, documents, tmp_path, capsys):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("keep me")
    whole = ["index", str(documents), "--model", model, "--out", str(tmp_path / "i")]
    for command, message in (
        (["index", str(documents), "--model", model, "--out", str(tmp_path / "home")], "is no index, and not empty"),
        (["index", str(tmp_path / "none"), "--model", model, "--out", str(tmp_path / "i")], "no folder there"),
        (["index", str(documents), "--model", str(tmp_path), "--out", str(tmp_path / "i")], "no config.json"),
        ([*whole, "--max-rejected-fraction", "0"], "not_an_image 1"),
        (["query", str(tmp_path / "none"), "a"], "no index there"),
        (["query", str(tmp_path / "none")], "a text or --image"),
    ):
        assert main(command) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "home" / "letter.txt").read_text() == "keep me"
    assert main(whole) == 0  # what was embedded before the refusal is taken over


def test_prompts_of_an_index_are_its_own(documents, model, tmp_path, capsys):
    out = tmp_path / "index"
    assert make(documents, model, out, "--prompts", "vlm2vec") == 0
    hit = first(Searcher(str(out)), text=SECTIONS[2])
    embedder = Embedder(model)
    asked = (Segment(text="Find a document image that matches the given query: " + SECTIONS[2]),)
    page = (Segment(image=png(3)), Segment(text="Understand the content of the provided document image."))
    query, *found = embedder.encode([asked, page, *((Segment(text=s),) for s in SECTIONS)])
    by_hand = {
        hit.path: hit.score for hit in Searcher(str(out)).search((Segment(text=SECTIONS[2]),), 50) if hit.numbers == 1
    }
    assert by_hand["figures/3.png"] == pytest.approx(float(query @ found[0]), abs=1e-5)
    assert hit.score < 1 - 1e-4  # a section is offered as it is
    capsys.readouterr()
    assert make(documents, model, out) == 2
    assert "was made with --prompts vlm2vec" in capsys.readouterr().err


def test_query_on_the_command_line(index, documents, capsys):
    assert main(["query", str(index), SECTIONS[2], "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].split()[:4] == ["1.0000", "manual.md,", "text", "3:"]
    assert main(["query", str(index), "--image", str(documents / "figures" / "2.png")]) == 0
    assert capsys.readouterr().out.split()[:2] == ["1.0000", "figures/2.png"]
    assert main(["query", str(index), "--image", str(documents / "broken.png")]) == 2


def huge_png(width=20_000, height=15_000):
    """300 megapixels in some 40 kB: black, one bit each."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((width // 8 + 1) * height), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_the_page_and_its_answers(client):
    page = client.get("/")
    assert page.status_code == 200 and "<script src=" in page.text and "style=" not in page.text
    assert all(client.get(path).status_code == 200 for path in ("/page.css", "/page.js"))
    assert client.get("/about").json() == {"entries": 19, "files": 14, "folder": "folder"}
    hits = client.post("/search/text", json={"text": SECTIONS[4]}).json()["hits"]
    assert (hits[0]["path"], hits[0]["number"]) == ("manual.md", 5)
    assert client.get(f"/document/{hits[0]['id']}").text == "\n\n".join(SECTIONS)
    hits = client.post("/search/image", content=png(50, 300, 200)).json()["hits"]
    assert hits[0]["path"] == "figures/shown.png"
    assert client.get(f"/document/{hits[0]['id']}").content == png(50, 300, 200)
    picture = client.get(f"/picture/{hits[0]['id']}")
    assert (
        Image.open(io.BytesIO(picture.content)).size == (300, 200) and picture.headers["content-type"] == "image/jpeg"
    )


@pytest.mark.parametrize(
    "image, status, words_in_answer",
    [
        (huge_png(), 422, "at most 50 million pixels"),
        (b"<script>alert(1)</script>", 422, "not an image"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', 422, "not an image"),
        (b"<!doctype html><h1>no image</h1>", 422, "not an image"),
        (png(1)[:-100], 422, "damaged"),
        (b"", 422, "empty"),
        (b"\x89PNG" + bytes(33 * 2**20), 413, "at most 32 MiB"),
    ],
)
def test_what_is_no_good_image_is_refused_in_words(client, image, status, words_in_answer):
    refused = client.post("/search/image", content=image)
    assert refused.status_code == status and words_in_answer in refused.json()["error"]
    assert client.post("/search/image", content=png(1)).status_code == 200


def test_refusing_300_megapixels_decodes_none_of_them(searcher):
    import tracemalloc

    from moca_core.data.image_files import ImageError

    image = huge_png()
    tracemalloc.start()
    with pytest.raises(ImageError):
        searcher.search((Segment(image=image),), 1)
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()


def test_many_visitors_at_once(index, tmp_path):
    """In a process of its own: what is wrong here ends it without a word."""
    program = f"""
import random
from concurrent.futures import ThreadPoolExecutor
from moca_core.types import Segment
from pipelines.searching.searcher import Searcher
searcher = Searcher({str(index)!r})
ids = [hit.id for hit in searcher.search((Segment(text="a"),), 100) if hit.has_picture]
assert len(ids) == 12
def visit(number):
    if number % 500 == 0:
        return searcher.search((Segment(text=str(number)),), 5)
    return searcher.picture(random.choice(ids))
with ThreadPoolExecutor(40) as threads:
    assert all(threads.map(visit, range(20_000)))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_what_is_no_question_is_refused_in_words(client):
    for content, status in (
        (b"", 400),
        (b"[1]", 400),
        (b'{"text": 3}', 400),
        (b'{"text": "\\ud800"}', 400),
        (b" " * 70_000, 413),
    ):
        refused = client.post("/search/text", content=content)
        assert refused.status_code == status and refused.json()["error"]
    assert "Type something" in client.post("/search/text", json={"text": "  "}).json()["error"]


def test_documents_go_by_id_and_never_by_path(client, searcher, documents):
    for path in (
        "/document/../index.json",
        "/document/%2e%2e%2fmanual.md",
        "/document//etc/passwd",
        "/document/manual.md",
        "/page/page.html",
    ):
        assert client.get(path).status_code == 404
    assert client.get("/picture/nothing-1").status_code == 404
    hit = first(searcher, image=png(7))
    path = documents / "figures" / "7.png"
    path.rename(documents / "figures" / "away")
    try:
        gone = client.get(f"/document/{hit.id}")
        assert gone.status_code == 404 and "no longer there" in gone.json()["error"]
        path.symlink_to("/etc/passwd")
        assert client.get(f"/document/{hit.id}").status_code == 404
        path.unlink()
    finally:
        (documents / "figures" / "away").rename(path)


def test_html_is_served_as_the_text_that_it_is(client, searcher):
    hit = first(searcher, text=f"{words(12, 60)}\n\n<img src=x onerror=alert(1)>")
    assert hit.path == "page.html" and "alert(1)</script>" not in hit.snippet
    shown = client.get(f"/document/{hit.id}")
    assert shown.headers["content-type"].startswith("text/plain") and "<script>" in shown.text


def test_every_answer_says_what_a_browser_may_do_with_it(client):
    for answer in (
        client.get("/"),
        client.get("/nothing"),
        client.post("/search/image", content=b"x"),
        client.get("/", headers={"Host": "evil"}),
    ):
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy


def test_foreign_hosts_and_origins_are_refused(client):
    for host in ("evil.example", "evil.example:8484", "localhost.evil.example", "192.168.1.5:8484", "[", ""):
        assert client.get("/about", headers={"Host": host}).status_code == 403, host
    for host in ("localhost:8484", "127.0.0.1", "[::1]:8484"):
        assert client.get("/about", headers={"Host": host}).status_code == 200, host
    asked = {"json": {"text": "a"}}
    assert client.post("/search/text", headers={"Origin": "http://evil.example"}, **asked).status_code == 403
    assert client.post("/search/text", headers={"Origin": "null"}, **asked).status_code == 403
    assert client.post("/search/text", headers={"Origin": "http://127.0.0.1:8484"}, **asked).status_code == 200


def test_a_server_that_others_may_reach_answers_to_addresses_and_its_name():
    is_own = own_hosts("0.0.0.0")
    assert all(is_own(host_name(host)) for host in ("192.168.1.5:8484", "[fe80::1]:80", "localhost"))
    assert not is_own("evil.example")
    assert own_hosts("search.example")(host_name("Search.Example:80"))


def test_no_more_of_a_body_is_read_than_it_may_have(searcher):
    """Ten gigabytes in chunks of a megabyte: the answer comes after the bound, not after the end."""
    import asyncio

    sent, answers = 0, []

    async def receive():
        nonlocal sent
        sent += 1
        return {"type": "http.request", "body": bytes(2**20), "more_body": sent < 10_000}

    async def send(message):
        answers.append(message)

    scope = {"type": "http", "method": "POST", "path": "/search/image", "headers": [(b"host", b"localhost")]}
    scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http", "root_path": "", "client": ("127.0.0.1", 1)}
    app = make_app(searcher, own_hosts("127.0.0.1"))
    asyncio.run(app(scope | {"server": ("127.0.0.1", 8484), "raw_path": b"/search/image"}, receive, send))
    assert answers[0]["status"] == 413 and sent < 40
    assert "32 MiB" in json.loads(answers[1]["body"])["error"]
