"""HTML that stands alone: templates filled with everything escaped, pictures inside the file, no script and nothing fetched."""

import base64
import io
from functools import lru_cache
from typing import TYPE_CHECKING

from cluster import storage

if TYPE_CHECKING:
    from jinja2 import Environment
    from PIL.Image import Image


@lru_cache
def templates() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pipelines.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["webp"] = webp
    return environment


def page(template: str, **values: object) -> bytes:
    return templates().get_template(template).render(**values).encode()


def inlined(uri: str) -> str | None:
    """A PNG file as a data: URI; None where there is none."""
    return data_uri(storage.read_bytes(uri), "png") if storage.exists(uri) else None


def webp(picture: "Image") -> str:
    """A picture as a data: URI."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=70)
    return data_uri(buffer.getvalue(), "webp")


def data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
