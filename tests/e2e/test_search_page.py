"""The search page in a real browser: type, drop, paste, and what is refused, with the server running on as before."""

import base64
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
from playwright.sync_api import expect, sync_playwright

from pipelines.search import main
from tests.e2e.conftest import ROOT
from tests.exported import exported_model
from tests.pipelines.conftest import png
from tests.pipelines.test_search import SECTIONS, huge_png, write_documents

BROWSER = shutil.which("chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no chromium on this machine (Debian: apt-get install chromium)"
)

# What a person does with a mouse: a file that is dragged over the page and let go.
DROP = """([name, base64]) => {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([bytes], name, { type: "image/png" }));
  for (const type of ["dragenter", "dragover", "drop"])
    document.body.dispatchEvent(new DragEvent(type, { dataTransfer, bubbles: true, cancelable: true }));
}"""
PASTE = """(base64) => {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const clipboardData = new DataTransfer();
  clipboardData.items.add(new File([bytes], "image.png", { type: "image/png" }));
  document.dispatchEvent(new ClipboardEvent("paste", { clipboardData }));
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """The address of a server over a small index."""
    folder = write_documents(tmp_path_factory.mktemp("documents") / "manuals")
    index = str(tmp_path_factory.mktemp("index") / "index")
    model = exported_model(tmp_path_factory.mktemp("model"))
    assert main(["index", str(folder), "--model", model, "--out", index]) == 0
    command = [sys.executable, "pipelines/search.py", "serve", index, "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    yield re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
    assert process.poll() is None, "the server has died"
    process.terminate()
    process.wait(10)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)


@pytest.fixture
def page(server, browser):
    """The page, freshly opened. No script of a document may run, nothing may be asked of another server."""
    opened = browser.new_page()
    wrong: list[str] = []
    opened.on("dialog", lambda dialog: wrong.append(dialog.message) or dialog.dismiss())
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None)
    opened.on("request", lambda asked: None if asked.url.startswith((server, "blob:")) else wrong.append(asked.url))
    opened.goto(server)
    opened.wait_for_selector("#about:not(:empty)")
    yield opened
    opened.close()
    assert not wrong


def type_in(page, text):
    page.fill("#text", text)
    with page.expect_response("**/search/text"):
        page.press("#text", "Enter")
    page.wait_for_selector("body:not([aria-busy]) #hits li")


def drop(page, image, name="image.png"):
    page.evaluate(DROP, [name, base64.b64encode(image).decode()])


def first(page):
    return page.locator("#hits li").first


def test_the_page_says_what_it_searches(page):
    assert page.title() == "Search manuals" and page.inner_text("#about") == "19 pages and passages of 14 files"


def test_type_a_text_and_see_the_right_passage_first(page):
    type_in(page, SECTIONS[3])
    assert first(page).locator("h2").inner_text() == "manual.md"
    assert first(page).locator(".place").inner_text() == "passage 4 of 6"
    assert first(page).locator(".snippet").inner_text() == " ".join(SECTIONS[3].split())
    with page.expect_popup() as popup:
        first(page).locator("a").click()
    assert popup.value.inner_text("body").strip().startswith(SECTIONS[0].split("\n")[0])


def test_drop_an_image_and_see_the_right_picture_first(page):
    drop(page, png(5))
    page.wait_for_selector("#asked:not([hidden])")
    assert first(page).locator("h2").inner_text() == "5.png"
    assert first(page).locator(".place").inner_text() == "image · figures"
    assert first(page).locator(".score span").inner_text() == "1.000"
    shown = first(page).locator("img")
    shown.scroll_into_view_if_needed()
    expect(shown).to_have_js_property("naturalWidth", 60)
    expect(page.locator("#asked-image")).to_have_js_property("naturalWidth", 60)


def test_paste_and_choose_an_image(page, tmp_path):
    page.evaluate(PASTE, base64.b64encode(png(6)).decode())
    page.wait_for_selector("#asked:not([hidden])")
    assert first(page).locator("h2").inner_text() == "6.png"
    (tmp_path / "chosen.png").write_bytes(png(7))
    page.set_input_files("#file", tmp_path / "chosen.png")
    expect(first(page).locator("h2")).to_have_text("7.png")


def test_a_late_answer_to_an_image_changes_nothing_of_a_later_question(page):
    held = []
    page.route("**/search/image", lambda route: held.append(route))
    with page.expect_request("**/search/image"):
        drop(page, png(5))
    type_in(page, SECTIONS[3])
    with page.expect_response("**/search/image") as late:
        held[0].continue_()
    late.value.finished()
    page.wait_for_timeout(200)  # what the page does with it
    assert page.locator("#asked").is_hidden() and "passage 4 of 6" in first(page).inner_text()


@pytest.mark.parametrize(
    "image, words",
    [
        (huge_png(), "at most 50 million pixels"),
        (b"<script>alert(1)</script>", "not an image"),
        (b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"></svg>', "not an image"),
        (b"<html><body onload=alert(1)>", "not an image"),
    ],
    ids=["300 megapixels", "script", "svg", "html"],
)
def test_what_is_no_good_image_is_refused_politely_and_the_server_lives_on(page, image, words):
    drop(page, image)
    page.wait_for_selector("#error:not([hidden])")
    assert words in page.inner_text("#error") and page.locator("#hits li").count() == 0
    assert page.locator("#asked").is_hidden()
    type_in(page, SECTIONS[1])
    assert page.locator("#error").is_hidden() and "passage 2 of 6" in first(page).inner_text()


def test_a_large_file_is_not_even_sent(page):
    page.on("request", lambda asked: pytest.fail(f"{asked.method} {asked.url}"))
    page.evaluate("""() => {
      const dataTransfer = new DataTransfer();
      dataTransfer.items.add(new File([new Uint8Array(33 * 2 ** 20)], "large.png"));
      document.body.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true }));
    }""")
    assert "at most 32 MiB" in page.inner_text("#error")


def test_markup_in_documents_stays_text(page):
    type_in(page, "<img src=x onerror=alert(1)>")
    snippets = page.locator(".snippet").all_inner_texts()
    assert any("<img src=x onerror=alert(1)>" in snippet for snippet in snippets)


def test_an_empty_question_and_a_dead_server_are_said(page):
    page.fill("#text", "   ")
    page.press("#text", "Enter")
    page.wait_for_selector("#error:not([hidden])")
    assert "Type something" in page.inner_text("#error")
    page.route("**/search/text", lambda route: route.abort())
    page.fill("#text", "a question")
    page.press("#text", "Enter")
    expect(page.locator("#error")).to_contain_text("does not answer")


def test_nothing_is_wider_than_a_phone(page):
    page.set_viewport_size({"width": 360, "height": 740})
    type_in(page, "x" * 300)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
