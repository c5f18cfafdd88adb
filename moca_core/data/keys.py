"""Keys of content: what makes two documents, two images or two texts the same one, whatever file they came in."""

import hashlib
import unicodedata
from dataclasses import dataclass

from moca_core.types import Content, content_id

MIN_TEXT_CHARACTERS = 40
"""Shorter texts (labels, names, answers of a word) stand everywhere; finding one in an evaluation set says nothing."""


@dataclass(frozen=True)
class ContentKeys:
    """16-byte hashes: of the whole content, of its images by their place, and of its text where it is nothing but text.

    The text beside an image is most often an instruction, a label or a caption that many share, and says nothing of the whole.
    """

    whole: bytes
    images: tuple[tuple[int, bytes], ...]
    text: bytes | None


def keys_of(content: Content) -> ContentKeys:
    images = tuple((place, _hash(s.image)) for place, s in enumerate(content) if s.image is not None)
    text = None if images else text_key("\n\n".join(segment.text for segment in content))
    return ContentKeys(bytes.fromhex(content_id(content)), images, text)


def text_key(text: str) -> bytes | None:
    """Key of a text whatever its case, spacing and composition of characters; None below `MIN_TEXT_CHARACTERS`."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return _hash(plain.encode()) if len(plain) >= MIN_TEXT_CHARACTERS else None


def evaluation_keys(content: Content) -> list[bytes]:
    """What no training document may hold of a query or a candidate: its images, or all of its text."""
    keys = keys_of(content)
    return [key for _, key in keys.images] + ([keys.text] if keys.text else [])


def pair_key(query: Content, answer: Content) -> bytes:
    """Key of a question together with its right answer."""
    return _hash(keys_of(query).whole + keys_of(answer).whole)


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:16]
