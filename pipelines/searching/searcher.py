"""An index and its model, open: contents to what is nearest to them."""

import threading
from dataclasses import dataclass
from pathlib import Path

import faiss

from cluster import storage
from moca_core.benchmarks import PROMPTS
from moca_core.data.image_files import ImageBounds
from moca_core.data.validate import problem
from moca_core.embedder import Embedder
from moca_core.folder import model_digest
from moca_core.types import Content
from pipelines.searching import nearest
from pipelines.searching.index import ROWS_PER_GROUP, read_manifest
from pipelines.tables import open_table, read_table


@dataclass(frozen=True)
class Hit:
    """An entry that was found. `id` stands for it as long as the file does not change."""

    id: str
    score: float
    path: str
    kind: str
    number: int
    numbers: int  # of the file: its pages or passages
    snippet: str
    has_picture: bool


class Searcher:
    """Answers one question at a time, whoever asks: the memory that an image takes is taken once."""

    def __init__(self, index: str, model: str | None = None) -> None:
        """Raises ValueError where there is no index, or `model` (default: the one that made it) is another one."""
        manifest = read_manifest(index)
        if manifest is None:
            raise ValueError(
                f"{index}: no index there; make one with: search.py index FOLDER --model DIR --out {index}"
            )
        folder = storage.localize(model or manifest.model)
        if not (Path(folder) / "config.json").is_file():
            raise ValueError(f"{folder}: no model there; name the one that the index was made with: --model DIR")
        if model_digest(folder) != manifest.model_digest:
            raise ValueError(
                f"{folder} is not the model that {index} was made with; name that one with --model, or index again"
            )
        self.manifest = manifest
        self._uri = str(Path(index) / manifest.entries)
        self._rows = read_table(self._uri, columns=["key", "number", "kind", "snippet", "has_picture"]).to_pylist()
        self._nearest = faiss.read_index(str(Path(index) / manifest.nearest))
        self._embedder = Embedder(folder)
        self._paths = {key: path for path, key in reversed(manifest.files.items())}
        self._places = {entry_id(row): place for place, row in enumerate(self._rows)}
        self._numbers: dict[str, int] = {}
        for row in self._rows:
            self._numbers[row["key"]] = max(row["number"], self._numbers.get(row["key"], 0))
        self._lock = threading.Lock()
        self._reading = threading.Lock()  # two threads in one ParquetFile end the process

    def __len__(self) -> int:
        return len(self._rows)

    def search(self, content: Content, top: int) -> list[Hit]:
        """The nearest entries, best first. Raises ImageError for a content that cannot be embedded."""
        with self._lock:
            if error := problem(content, ImageBounds()):
                raise error
            vector = self._embedder.encode([PROMPTS[self.manifest.prompts].put(content, query=True)])[0]
            return [self._hit(place, score) for place, score in nearest.search(self._nearest, vector, top)]

    def _hit(self, place: int, score: float) -> Hit:
        row = self._rows[place]
        return Hit(
            id=entry_id(row),
            score=score,
            path=self._paths[row["key"]],
            kind=row["kind"],
            number=row["number"],
            numbers=self._numbers[row["key"]],
            snippet=row["snippet"],
            has_picture=row["has_picture"],
        )

    def picture(self, id: str) -> bytes | None:
        """The small picture of an entry, None if it has none. Raises KeyError for an id that there is not."""
        group, row = divmod(self._places[id], ROWS_PER_GROUP)
        with self._reading:
            return open_table(self._uri).read_row_group(group, columns=["picture"])["picture"][row].as_py()

    def document(self, id: str) -> Path:
        """The file that an entry is of. Raises KeyError for an id that there is not, or a file that is no longer there."""
        key = self._rows[self._places[id]]["key"]
        folder = Path(self.manifest.folder).resolve()
        path = (folder / self._paths[key]).resolve()
        if not (path.is_relative_to(folder) and path.is_file()):
            raise KeyError(id)
        return path


def entry_id(row: dict) -> str:
    return f"{row['key']}-{row['number']}"
