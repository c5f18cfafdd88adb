"""A source as a recipe names it: a layout, where the data lies and how much of it. What it holds is its identity, where it lies is not."""

import re
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import Any

from cluster import storage
from moca_core import sources

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """`layout` is one of the adapters of moca_core/sources; `path` a file, a folder or a glob, local, s3:// or hf:// (none for
    "builtin").

    `columns` says which column plays a role of the layout, `images` is the folder that image paths are relative to.
    `limit` is the most rows to take; `weight` the share of the mixture's `max_rows` beside the other sources' weights.
    """

    layout: str
    path: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    images: str | None = None
    limit: int | None = None
    weight: float | None = None

    def __post_init__(self) -> None:
        if (self.layout == "builtin") != (self.path is None):
            raise ValueError(
                f"layout {self.layout!r} with path {self.path!r}: every layout but 'builtin' needs a path, and that has none"
            )
        if self.limit is not None and self.limit < 1:
            raise ValueError(
                f"{self.name}: limit={self.limit} must be at least 1; leave the source out to take nothing"
            )
        if self.weight is not None and not self.weight > 0:
            raise ValueError(
                f"{self.name}: weight={self.weight} must be positive; leave the source out to take nothing"
            )
        if self.images and ("://" in self.images) != ("://" in (self.path or "")):
            raise ValueError(f"{self.name}: images={self.images!r} must lie on the same storage as the path")

    @property
    def name(self) -> str:
        """What a person reads in the mixture: the layout, and the end of the path."""
        return " ".join(filter(None, [self.layout, "/".join((self.path or "").rstrip("/").split("/")[-2:])]))

    def identity(self) -> dict[str, Any]:
        given = {name: value for name in ("columns", "limit", "weight") if (value := getattr(self, name))}
        if self.path is None:
            from moca_core.sources import builtin

            return {"layout": self.layout, "content": builtin.digest(), **given}
        if self.images:
            given["images"] = digest(self.images)
        return {"layout": self.layout, "content": digest(self.path), **given}

    def adapter(self, registry: dict[str, str]) -> ModuleType:
        return sources.adapter(registry, self.layout)

    def location(self) -> sources.Location | None:
        """What the adapter reads from, None for a source without a path."""
        if self.path is None:
            return None
        fs, path = storage.filesystem(self.path)
        images = storage.filesystem(self.images)[1] if self.images else None
        return sources.Location(fs, path, self.columns, images)


@lru_cache(maxsize=256)
def digest(uri: str) -> str:
    """What lies there, asked once by a process: a plan and the steps that it runs must see the same."""
    try:
        return storage.digest(uri)
    except OSError as error:
        raise ValueError(f"source {uri} cannot be read: {error}") from None
    except ValueError as error:
        if HUB_NAME.fullmatch(uri) and not storage.exists(uri):
            raise ValueError(
                f"{error}; for the dataset of that name on the Hugging Face Hub write hf://{uri}"
            ) from None
        raise


def check_layouts(name: str, given: tuple[Source, ...], registry: dict[str, str]) -> None:
    """Raises ValueError for an empty list, for layouts that do not exist and for options that a layout does not have."""
    if not given:
        raise ValueError(f"{name} is empty: name at least one source")
    for source in given:
        if source.layout not in registry:
            raise ValueError(f"{name}: unknown layout {source.layout!r}; use one of {', '.join(sorted(registry))}")
        options = sources.options(registry, source.layout)
        for option in ("columns", "images"):
            if getattr(source, option) and option not in options:
                raise ValueError(f"{name}: layout {source.layout!r} has no option {option}")
        if unknown := [role for role in source.columns if role not in options["columns"]]:
            raise ValueError(
                f"{name}: layout {source.layout!r} has no column role {unknown[0]!r}; there are {', '.join(options['columns'])}"
            )


def check_mixture(name: str, given: tuple[Source, ...], max_rows: int | None) -> None:
    """Raises ValueError where weights and `max_rows` do not belong together."""
    weighted = [source.weight is not None for source in given]
    if any(weighted) != (max_rows is not None) or any(weighted) != all(weighted):
        raise ValueError(
            f"{name}: weights share out max_rows={max_rows}: give both, and a weight to every source, or neither"
        )
    if max_rows is not None and max_rows < len(given):
        raise ValueError(f"{name}: max_rows={max_rows} must be at least the number of sources, {len(given)}")


def targets(given: tuple[Source, ...], max_rows: int | None) -> list[int | None]:
    """The most rows to take of each source: its share of `max_rows` by weight, its limit, or None for all there is."""
    total = sum(source.weight or 0 for source in given)
    shares = [max(1, round(max_rows * source.weight / total)) if max_rows else None for source in given]
    return [
        min((n for n in (share, source.limit) if n is not None), default=None)
        for share, source in zip(shares, given, strict=True)
    ]


def names(given: tuple[Source, ...]) -> list[str]:
    """A name for each source, no two alike."""
    plain = [source.name for source in given]
    return [f"{name} ({k})" if plain.count(name) > 1 else name for k, name in enumerate(plain, 1)]
