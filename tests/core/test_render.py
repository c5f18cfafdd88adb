"""From contents to token ids: nothing special out of plain text, nothing lost, no half image, never over the budget."""

import io
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from samples import CONTENTS, image, png, text, words
from transformers import AutoTokenizer

from moca_core import types
from moca_core.data.render import Rendered, Renderer
from moca_core.data.rows import document_sequences, pack_sequences
from moca_core.data.schema import PACKED
from moca_core.spec import read_spec
from moca_core.types import Document, Segment

LONG = (
    text("\n\n".join(words(n, n) for n in (20, 7, 33, 9, 41, 3))),
    image(196, 196, 1),
    text(words(90, 7) + "\n\n" + words(12, 8)),
    image(56, 100, 2),
    image(150, 90, 3),
    text(words(25, 9)),
)


def special(spec):
    return set(spec.special_token_ids)


def test_special_tokens_in_user_text_stay_text(renderer, spec, folder):
    names = AutoTokenizer.from_pretrained(folder).all_special_tokens
    assert {"<|image_pad|>", "<|vision_start|>", "<|endoftext|>", "<|mask|>"} <= set(names)
    hostile = "".join(names) + " x " + " ".join(names)
    rendered = renderer.first((text(hostile),))
    assert not special(spec) & set(rendered.input_ids)
    assert renderer.tokenizer.decode(rendered.input_ids, skip_special_tokens=False) == hostile


def test_rendering_is_what_the_tokenizer_makes_of_the_template_text(renderer, spec, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for content in CONTENTS:
        rendered, grids, said = renderer.first(content), [], ""
        for segment in content:
            if segment.image is None:
                said += segment.text
            else:
                grids.append(renderer.first((segment,)).grids[0])
                said += "<|vision_start|>" + "<|image_pad|>" * spec.image_tokens(grids[-1]) + "<|vision_end|>"
        assert rendered.input_ids == tokenizer(said, add_special_tokens=False).input_ids
        assert rendered.grids == grids
        assert rendered.images == [s.image for s in content if s.image is not None]


def test_neighbouring_texts_are_joined_by_a_blank_line(renderer):
    apart = renderer.pieces((text("one"), text("two"), image(60, 60), text("three"), text("four")))
    joined = renderer.pieces((text("one\n\ntwo"), image(60, 60), text("three\n\nfour")))
    assert apart == joined and len(apart) == 1


@pytest.mark.parametrize("budget", [101, 130, 180, 400, 5000])
def test_pieces_hold_everything_once_in_order_within_the_budget(tokenizer, spec, budget):
    pieces = Renderer(tokenizer, spec, budget).pieces(LONG)
    assert all(0 < len(p) <= budget for p in pieces)
    assert [i for p in pieces for i in p.images] == [s.image for s in LONG if s.image is not None]
    tokens = [t for p in pieces for t in p.input_ids]
    texts = [t for t in tokens if t not in special(spec)]
    said = "".join(s.text for s in LONG if s.text is not None)
    assert tokenizer.decode(texts) == said
    for piece in pieces:  # whole images: as many placeholders as the grids say, each run between its two borders
        assert piece.input_ids.count(spec.image_token_id) == sum(map(spec.image_tokens, piece.grids))
        assert piece.input_ids.count(spec.vision_start_token_id) == len(piece.images)
        assert piece.input_ids.count(spec.vision_end_token_id) == len(piece.images)
        assert len(piece.images) == len(piece.grids)
    if budget == 5000:
        assert len(pieces) == 1
    elif budget < 400:
        assert len(pieces) > 2


def test_pieces_end_at_paragraphs_and_images(tokenizer, spec):
    paragraphs = [words(20, i) for i in range(12)]
    content = (text("\n\n".join(paragraphs[:6])), image(196, 196), text("\n\n".join(paragraphs[6:])))
    longest = max(len(tokenizer.encode(p + "\n\n", add_special_tokens=False).ids) for p in paragraphs)
    budget = max(longest + 20, spec.max_image_tokens + 2)
    pieces = Renderer(tokenizer, spec, budget).pieces(content)
    assert len(pieces) > 3
    whole = {p + end for p in paragraphs for end in ("\n\n", "")}
    for piece in pieces:
        said = tokenizer.decode([t for t in piece.input_ids if t not in special(spec)])
        rest = said
        while rest:
            match = next((p for p in sorted(whole, key=len, reverse=True) if rest.startswith(p)), None)
            assert match, f"{rest[:40]!r} does not begin with a whole paragraph"
            rest = rest[len(match) :]


def test_a_paragraph_longer_than_the_budget_is_cut_between_tokens(tokenizer, spec):
    renderer = Renderer(tokenizer, spec, 120)
    ids = tokenizer.encode(words(300), add_special_tokens=False).ids
    pieces = renderer.pieces((text(words(300)),))
    assert [t for p in pieces for t in p.input_ids] == ids
    assert [len(p) for p in pieces[:-1]] == [120] * (len(pieces) - 1)


def test_many_paragraphs_cost_as_much_as_there_are(tokenizer, spec, monkeypatch):
    measured, length = [], Rendered.__len__
    monkeypatch.setattr(Rendered, "__len__", lambda rendered: measured.append(rendered) or length(rendered))
    pieces = Renderer(tokenizer, spec, 1000).pieces((text("\n\n".join(["a"] * 2000)),))
    assert len(pieces) > 2 and len(measured) < 5 * 2000


def test_no_pieces_of_nothing(renderer):
    assert renderer.pieces(()) == []
    assert renderer.pieces((text(""),)) == []


def test_a_budget_that_cannot_hold_an_image_is_refused(tokenizer, spec):
    Renderer(tokenizer, spec, spec.max_image_tokens + 2)
    with pytest.raises(
        ValueError, match=f"max_tokens={spec.max_image_tokens + 1} cannot .*max_image_px={spec.max_image_px}"
    ):
        Renderer(tokenizer, spec, spec.max_image_tokens + 1)


@pytest.mark.parametrize(
    ("low", "high"), [(3136, 3136), (3136, 4000), (56 * 56, 196 * 196), (28 * 28, 50_000), (3136, 10**6)]
)
def test_the_smallest_allowed_budget_holds_any_image_that_decodes(folder, tokenizer, low, high):
    """Also long thin ones, whose short side never shrinks below one token, and small ones that grow."""
    spec = read_spec(folder, min_image_px=low, max_image_px=high)
    renderer = Renderer(tokenizer, spec, spec.max_image_tokens + 2)
    rng = np.random.default_rng(0)
    shapes = [(200, 1), (1, 200), (5600, 28), (50, 20), (40, 40), (29, 5600), (2000, 10), (3, 570)]
    shapes += [tuple(int(n) for n in np.exp(rng.uniform(0, 8, 2))) for _ in range(200)]
    for width, height in shapes:
        if max(width, height) > 200 * min(width, height):
            continue
        buffer = io.BytesIO()
        Image.new("1", (width, height)).save(buffer, "PNG")
        (piece,) = renderer.pieces((Segment(image=buffer.getvalue()),))
        assert len(piece) <= renderer.max_tokens, (width, height, len(piece))


def test_documents_to_rows_and_packs(renderer, spec):
    documents = [Document("s", CONTENTS[i % 5][:k]) for i, k in enumerate((1, 1, 3, 6, 1, 1, 1, 2))]
    small = Renderer(renderer.tokenizer, spec, 120)
    sequences = [s for d in documents for s in document_sequences(d, small)]
    expected = [(f"{d.doc_id}:{k}", p) for d in documents for k, p in enumerate(small.pieces(d.content))]
    assert [s["piece_id"] for s in sequences] == [name for name, _ in expected]
    assert [s["input_ids"].tolist() for s in sequences] == [p.input_ids for _, p in expected]
    packed = pa.Table.from_pylist(pack_sequences(sequences, spec, 120), schema=PACKED).to_pylist()
    by_name = {}
    for row in packed:
        assert len(row["input_ids"]) == sum(row["segment_lengths"]) <= 120
        start, images, grids = 0, list(row["images"]), list(row["grid_thw"])
        for name, length in zip(row["piece_ids"], row["segment_lengths"], strict=True):
            ids = row["input_ids"][start : start + length]
            count = ids.count(spec.vision_start_token_id)
            by_name.setdefault(name, []).append((ids, images[:count], [tuple(g) for g in grids[:count]]))
            start, images, grids = start + length, images[count:], grids[count:]
        assert not images and not grids
        assert row["cost_flops"] == spec.flops(row["segment_lengths"], row["grid_thw"])
    for name, piece in expected:
        assert (piece.input_ids, piece.images, piece.grids) in by_name[name]
    assert sum(map(len, by_name.values())) == len(expected)


def test_a_document_of_many_pieces_is_hashed_once(tokenizer, spec, monkeypatch):
    hashed = []
    monkeypatch.setattr(types, "content_id", lambda content: hashed.append(content) or "name")
    sequences = document_sequences(Document("s", LONG), Renderer(tokenizer, spec, 101))
    assert len(sequences) > 2 and [s["piece_id"] for s in sequences] == [f"name:{k}" for k in range(len(sequences))]
    assert hashed == [LONG]


def test_budget_smaller_than_a_sequence_is_an_error(renderer, spec):
    sequences = document_sequences(Document("s", CONTENTS[0]), renderer)
    with pytest.raises(AssertionError, match="budget"):
        pack_sequences(sequences, spec, 10)


def test_bounds_narrow_the_size_of_images(folder, tokenizer):
    wide = replace(read_spec(folder), max_image_px=10**6)
    narrow = replace(wide, max_image_px=56 * 84)
    sizes = [Renderer(tokenizer, s, 3000).first((image(300, 200),)).grids[0] for s in (wide, narrow)]
    assert sizes[0] == (1, 14, 22) and sizes[1][1] * sizes[1][2] * 14 * 14 <= 56 * 84
    assert png(300, 200)
