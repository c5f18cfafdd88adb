"""A source as a recipe names it: a layout and where the data lies. What it holds is its identity, where it lies is not."""

from dataclasses import dataclass

from cluster import storage
from moca_core import sources


@dataclass(frozen=True)
class Source:
    """`layout` is one of the adapters of moca_core/sources; `path` a file or folder, local or s3:// (none for "builtin")."""

    layout: str
    path: str | None = None

    def __post_init__(self) -> None:
        if (self.layout == "builtin") != (self.path is None):
            raise ValueError(
                f"layout {self.layout!r} with path {self.path!r}: every layout but 'builtin' needs a path, and that has none"
            )

    def identity(self) -> dict[str, str]:
        if self.path is None:
            from moca_core.sources import builtin

            return {"layout": self.layout, "content": builtin.digest()}
        try:
            return {"layout": self.layout, "content": storage.digest(self.path)}
        except OSError as error:
            raise ValueError(f"source {self.path} cannot be read: {error}") from None

    def adapter(self, registry: dict[str, str]):
        return sources.adapter(registry, self.layout)

    def open(self):
        """(file system, path on it), both None for a source without a path."""
        return storage.filesystem(self.path) if self.path else (None, None)


def check_layouts(name: str, given: tuple[Source, ...], registry: dict[str, str]) -> None:
    """Raises ValueError for an empty list and for layouts that do not exist."""
    if not given:
        raise ValueError(f"{name} is empty: name at least one source")
    for source in given:
        if source.layout not in registry:
            raise ValueError(f"{name}: unknown layout {source.layout!r}; use one of {', '.join(sorted(registry))}")
