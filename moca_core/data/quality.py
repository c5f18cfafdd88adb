"""Bounds on the text of a document that hold in any language: how long it is, and how much of it says the same again."""

import zlib
from dataclasses import dataclass

from moca_core.types import Content, Rejected

REASONS = ("text_too_short", "text_too_long", "repeated_lines", "repetitive_text")
"""What these bounds turn away is whole, only not wanted: it does not count as broken."""

_LONG_ENOUGH = 1000  # characters from which repetition can be told from a short list
_SAMPLE_BYTES = 2**16


@dataclass(frozen=True)
class TextBounds:
    """None switches a bound off.

    `min_characters` and `max_characters` of all text of a document (a document with an image may be as short as it likes).
    `max_repeated_lines`: share of the characters that stand in lines which the document had before (MassiveText's rule, arXiv
    2112.11446, table A1, by characters). `max_compression`: how often smaller zlib makes the text; prose shrinks to a third,
    what repeats itself to a twentieth. Neither knows words, so they hold for text without spaces too. Texts below 1,000
    characters are not asked for repetition.
    """

    min_characters: int | None = 16
    max_characters: int | None = 2_000_000
    max_repeated_lines: float | None = 0.5
    max_compression: float | None = 15.0

    def __post_init__(self) -> None:
        for name in ("min_characters", "max_characters", "max_compression"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1, or null to switch it off")
        if (share := self.max_repeated_lines) is not None and not 0 < share < 1:
            raise ValueError(f"max_repeated_lines={share} must be between 0 and 1, or null to switch it off")


def unwanted(content: Content, bounds: TextBounds, where: str) -> Rejected | None:
    """Why a document of good data is not wanted, or None."""
    text = "\n".join(segment.text for segment in content if segment.text is not None)
    length = len(text)
    has_image = any(segment.image is not None for segment in content)
    if bounds.min_characters is not None and not has_image and length < bounds.min_characters:
        return Rejected("text_too_short", f"{length} characters, at least {bounds.min_characters}", where)
    if bounds.max_characters is not None and length > bounds.max_characters:
        return Rejected("text_too_long", f"{length} characters, at most {bounds.max_characters}", where)
    if length < _LONG_ENOUGH:
        return None
    if bounds.max_repeated_lines is not None and (share := repeated_lines(text)) > bounds.max_repeated_lines:
        detail = f"{share:.0%} of the characters in repeated lines, at most {bounds.max_repeated_lines:.0%}"
        return Rejected("repeated_lines", detail, where)
    if bounds.max_compression is not None and (ratio := compression(text)) > bounds.max_compression:
        return Rejected("repetitive_text", f"compresses {ratio:.0f} times, at most {bounds.max_compression:g}", where)
    return None


def repeated_lines(text: str) -> float:
    """Share of characters in lines that stood before in the same text; blanks around a line do not count."""
    seen: set[str] = set()
    repeated = total = 0
    for line in map(str.strip, text.splitlines()):
        total += len(line)
        if line in seen:
            repeated += len(line)
        seen.add(line)
    return repeated / max(1, total)


def compression(text: str) -> float:
    """How many times smaller zlib makes the beginning of a text."""
    data = text[:_SAMPLE_BYTES].encode()[:_SAMPLE_BYTES]
    return len(data) / len(zlib.compress(data, level=1))
