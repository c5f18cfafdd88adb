"""Does it restore what was masked? Images with their patches rebuilt and passages with their words guessed, as pre-training proceeds."""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image, ImageDraw

from cluster import storage
from moca_core.reconstruction import RebuiltImage, Word
from pipelines.pictures.figure import BLUE
from pipelines.pictures.sheet import FAINT, INK, beside, boxed, cell, font, line, png, stacked

FOLDER = "reconstructions"
WIDTH_PX, IMAGE_PX = 1000, 148
WORDS_OF_A_RUN = 14  # masked ones whose guesses are followed over the moments
CONTEXT_CHARACTERS = 20
MASKED = "#FFF3C4"


@dataclass(frozen=True)
class Moment:
    """What the model made of the fixed rows after so many steps."""

    step: int
    images: list[RebuiltImage]
    passages: list[list[Word]]

    def to_bytes(self) -> bytes:
        arrays = {f"{kind}/{n}": pixels for n, image in enumerate(self.images) for kind, pixels in vars(image).items()}
        words = json.dumps([[asdict(word) for word in passage] for passage in self.passages]).encode()
        buffer = io.BytesIO()
        np.savez_compressed(buffer, step=self.step, words=np.frombuffer(words, np.uint8), **arrays)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Moment":
        with np.load(io.BytesIO(data), allow_pickle=False) as held:
            count = sum(name.startswith("original/") for name in held.files)
            images = [
                RebuiltImage(*(held[f"{kind}/{n}"] for kind in ("original", "seen", "rebuilt"))) for n in range(count)
            ]
            passages = json.loads(held["words"].tobytes())
            step = int(held["step"])
        words = [[Word(w["text"], tuple((g, p) for g, p in w["guesses"])) for w in passage] for passage in passages]
        return cls(step, images, words)

    @property
    def guessed(self) -> list[Word]:
        return [word for passage in self.passages for word in passage if word.guesses]

    @property
    def right(self) -> int:
        """Words of which the first guess is right."""
        return sum(word.guesses[0][0] == word.text for word in self.guessed)


def read_moments(uri: str) -> list[Moment]:
    """Those that were kept below a step's folder, in their order."""
    folder = storage.join(uri, FOLDER)
    names = sorted(name for name, _ in storage.list_files(folder) if name.endswith(".npz"))
    return [Moment.from_bytes(storage.read_bytes(storage.join(folder, name))) for name in names]


def draw_moment(moment: Moment, steps: int) -> bytes:
    """PNG of one moment: every image as it is, as the model saw it, and rebuilt; every passage with its guesses."""
    pieces = [line(f"after {moment.step} of {steps} steps", 18, bold=True)]
    if moment.images:
        triples = [beside([boxed(pixels, IMAGE_PX) for pixels in vars(image).values()]) for image in moment.images]
        heads = beside([cell(line(name, ink=FAINT), IMAGE_PX) for name in ("original", "what it saw", "rebuilt")])
        columns = [[heads, *triples[first::2]] for first in range(min(2, len(triples)))]
        pieces.append(beside([stacked(column) for column in columns], gap_px=40))
    if moment.passages:
        count = len(moment.guessed)
        pieces.append(
            line(
                f"masked words, framed, and what it takes them for; its first guess is right for {moment.right} of {count}",
                ink=FAINT,
            )
        )
        pieces += [_passage(passage) for passage in moment.passages]
    return png(stacked(pieces))


def draw_development(moments: Sequence[Moment]) -> bytes:
    """PNG of how the same images and words were restored better and better, a column for every moment."""
    names = ["start" if m.step == 0 else f"{m.step} steps" for m in moments]
    pieces = []
    if moments[0].images:
        heads = [cell(line(name, ink=FAINT), IMAGE_PX) for name in ("original", "what it saw", *names)]
        pieces.append(beside(heads))
        for number, first in enumerate(moments[0].images):
            rebuilt = [moment.images[number].rebuilt for moment in moments]
            pieces.append(beside([boxed(pixels, IMAGE_PX) for pixels in (first.original, first.seen, *rebuilt)]))
    if moments[0].guessed:
        pieces.append(_words_of_a_run(moments, names))
    return png(stacked(pieces))


def _passage(passage: list[Word]) -> Image.Image:
    """Words as they follow each other; below a masked one, in a frame, what the model took it for."""
    lines: list[list[Image.Image]] = [[]]
    room_px = WIDTH_PX
    for word in passage:
        piece = _word(word)
        if piece.width > room_px and lines[-1]:
            lines.append([])
            room_px = WIDTH_PX
        lines[-1].append(piece)
        room_px -= piece.width + 1
    return stacked([beside(pieces, gap_px=1) for pieces in lines], gap_px=6)


def _word(word: Word) -> Image.Image:
    text = _shown(word.text)
    if not word.guesses:
        return line(text, 14)
    guesses = [_guess(guess, chance, guess == word.text) for guess, chance in word.guesses]
    head = line(text.strip() or text, 14, bold=True)
    width = max(head.width, *(guess.width for guess in guesses)) + 8
    whole = Image.new("RGB", (width, head.height + 6 + sum(guess.height for guess in guesses)), "white")
    pen = ImageDraw.Draw(whole)
    pen.rectangle((0, 0, width - 1, head.height), fill=MASKED, outline=INK)
    pen.text((4, 2), text.strip() or text, INK, font(14, bold=True))
    y = head.height + 4
    for guess in guesses:
        whole.paste(guess, (4, y))
        y += guess.height
    return whole


def _guess(guess: str, chance: float, right: bool) -> Image.Image:
    text = f"{'✓ ' if right else ''}{_shown(guess).strip()} {chance:.0%}"
    return line(text, 11, bold=right, ink=BLUE if right else FAINT)


def _words_of_a_run(moments: Sequence[Moment], names: Sequence[str]) -> Image.Image:
    """A line for each of some masked words, in what stands around it: the first guess at every moment."""
    left_px = 330
    column_px = max(120, (len(moments) + 2) * (IMAGE_PX + 12) - left_px) // len(moments) if moments[0].images else 120
    heads = [f"{name}: {moment.right}/{len(moment.guessed)} right" for name, moment in zip(names, moments, strict=True)]
    first = line("a masked word, and the first guess for it", 12, ink=FAINT)
    rows = [beside([cell(first, left_px), *(cell(line(h, 12, ink=FAINT), column_px) for h in heads)], gap_px=0)]
    found = [
        (n, place) for n, words in enumerate(moments[0].passages) for place, word in enumerate(words) if word.guesses
    ]
    for n, place in (found[k] for k in np.unique(np.linspace(0, len(found) - 1, WORDS_OF_A_RUN).round().astype(int))):
        words = moments[0].passages[n]
        before = _shown("".join(w.text for w in words[:place]))[-CONTEXT_CHARACTERS:]
        after = _shown("".join(w.text for w in words[place + 1 :]))[:CONTEXT_CHARACTERS]
        context = beside(
            [line(before, 12, ink=FAINT), line(_shown(words[place].text), 12, bold=True), line(after, 12, ink=FAINT)], 2
        )
        guesses = [moment.passages[n][place].guesses[0] for moment in moments]
        shown = [_guess(guess, chance, guess == words[place].text) for guess, chance in guesses]
        rows.append(beside([cell(context, left_px), *(cell(guess, column_px) for guess in shown)], gap_px=0))
    return stacked(rows, gap_px=2)


def _shown(text: str) -> str:
    shown = "".join("⏎" if c == "\n" else c if c.isprintable() else "�" for c in text)
    return shown if shown.strip() else "␣" * len(shown)
