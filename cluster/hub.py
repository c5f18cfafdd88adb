"""Datasets on the Hugging Face Hub, read only: hf://datasets/OWNER/NAME[@REVISION][/PATH], or short hf://OWNER/NAME.

HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they mean to huggingface_hub. What @REVISION does not pin may change
between two calls.
"""

import glob
import hashlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from huggingface_hub import HfFileSystem

SCHEME = "hf://"
_FORM = "hf://datasets/OWNER/NAME[@REVISION][/PATH] is needed, or short hf://OWNER/NAME[...]"


def key(uri: str) -> str:
    """The path of `uri` as HfFileSystem wants it. Raises ValueError for anything but a dataset."""
    body = uri.removeprefix(SCHEME).strip("/")
    first = body.partition("/")[0]
    if first in ("models", "spaces", "buckets", "kernels"):
        raise ValueError(f"{uri!r} is no dataset: {_FORM}")
    owner_and_rest = body.removeprefix("datasets/")
    owner, _, rest = owner_and_rest.partition("/")
    if not owner or owner == "datasets" or "@" in owner or not rest or rest.startswith("@"):
        raise ValueError(f"{uri!r} names no dataset: {_FORM}")
    return f"datasets/{owner_and_rest}"


def filesystem() -> "HfFileSystem":
    from huggingface_hub import HfFileSystem

    # An argument, because huggingface_hub itself reads the variable only once.
    return HfFileSystem(endpoint=os.environ.get("HF_ENDPOINT"))


def commit(uri: str) -> tuple[str, str, str]:
    """(OWNER/NAME, commit sha, path inside the repository) of what `uri` names now.

    Raises ValueError if there is no such dataset or revision, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,  # of the HTTP client that huggingface_hub uses, base of its own errors
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import parse_hf_uri

    parsed = parse_hf_uri(SCHEME + key(uri))  # raises a ValueError of its own
    hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        info = hub.dataset_info(parsed.id, revision=parsed.revision, timeout=60)
    except HFValidationError as error:
        raise ValueError(f"{uri!r} names no dataset: {error}") from None
    except GatedRepoError:
        raise ValueError(
            f"{uri!r}: access to {parsed.id} must be asked for on {hub.endpoint}, and HF_TOKEN set"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"{uri!r}: no dataset {parsed.id!r} on {hub.endpoint} (or a private one, which needs HF_TOKEN); {_FORM}"
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"{uri!r}: dataset {parsed.id} has no branch, tag or commit {parsed.revision!r}") from None
    except OfflineModeIsEnabled:
        raise ValueError(
            f"{uri!r} needs the network, and HF_HUB_OFFLINE is set: unset it, or use a local clone"
        ) from None
    except HTTPError as error:
        raise ValueError(
            f"{uri!r}: {hub.endpoint} does not answer as it should ({error}); check network and HF_ENDPOINT, "
            "or use a local clone"
        ) from error
    return parsed.id, info.sha, parsed.path_in_repo


def digest(uri: str) -> str:
    """64 hex digits that stand for the commit and the path in it. Raises ValueError as `commit` does, or if nothing is there."""
    name, sha, path = commit(uri)
    storage, pinned = filesystem(), key(f"{SCHEME}{name}@{sha}/{path}")
    try:
        storage.info(pinned)
    except FileNotFoundError:
        if not (glob.has_magic(path) and storage.glob(pinned)):
            raise ValueError(f"no data at {uri!r}: dataset {name} has no {path!r} in its commit {sha}") from None
    return hashlib.sha256(f"{sha}\0{path}".encode()).hexdigest()
