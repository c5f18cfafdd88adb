"""S3 that survives its bad days: s3fs with one bounded retry around every request, and errors that name the object.

s3fs repeats the requests that it knows to be repeatable, and the reading of bodies. What is added here: the server errors
and connection errors that it does not know, botocore's own retries switched off (two layers would multiply, not add),
the answer to a completed upload that got lost, and deletions whose failure s3fs does not report.

The setting FSSPEC_S3='{"config_kwargs": {"read_timeout": 5}}' of the environment reaches every process, as fsspec has it.
"""

import asyncio
import contextlib
import functools
import os
import uuid
from collections.abc import Iterator
from typing import Any, BinaryIO

import aiohttp
import s3fs
import s3fs.core
from botocore.exceptions import BotoCoreError, ClientError, FlexibleChecksumError, IncompleteReadError
from botocore.exceptions import ConnectionError as NoConnection
from fsspec.asyn import sync_wrapper

_REPEATABLE_STATUS = {429, 500, 502, 503, 504, 509}
_REPEATABLE_CODES = {"InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown"}
_TOKEN = "written-by"  # metadata of an object that was uploaded in parts


def is_transient(error: Exception) -> bool:
    """Whether a request that was answered with `error` may succeed when it is sent again."""
    if not isinstance(error, ClientError):
        return False
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status in _REPEATABLE_STATUS or error.response.get("Error", {}).get("Code") in _REPEATABLE_CODES


@functools.cache
def _teach_s3fs() -> None:
    """What s3fs repeats is a setting of the process."""
    s3fs.core.set_custom_error_handler(is_transient)
    for kind in (NoConnection, aiohttp.ClientError, IncompleteReadError, FlexibleChecksumError):
        s3fs.core.add_retryable_error(kind)


class PatientS3(s3fs.S3FileSystem):
    """Raises OSError, FileNotFoundError or PermissionError naming the object: at once where repeating is of no use."""

    retries = 10  # waits of 0.1 s to 12 s, together 29 s
    connect_timeout = 10
    read_timeout = 60
    default_block_size = 16 * 2**20  # of reading ahead, and of the parts of an upload: 10,000 parts make 160 GiB

    def __init__(self, **options: Any) -> None:
        _teach_s3fs()  # here, as a worker that unpickles one makes it anew
        # One request at a time per file: only then s3fs repeats the reading of a body. Files travel side by side.
        super().__init__(**{"max_concurrency": 1, "fixed_upload_size": True, **options})
        self._tokens: dict[str, str] = {}

    @contextlib.contextmanager
    def open_writer(self, path: str) -> Iterator[BinaryIO]:
        """A file that is completed when the block ends well, and discarded with all its parts otherwise."""
        # Without autocommit only `commit` makes it visible: what is left to the garbage collector is closed, and closing
        # would complete it.
        file = self.open(path, "wb", autocommit=False)
        try:
            yield file
            if file.mpu:
                file.flush(force=True)  # the last part
            file.commit()  # a file that never filled a part is one PUT
        except BaseException as error:
            try:
                file.discard()
            except OSError as second:
                error.add_note(f"and its upload could not be aborted: {second}")
            raise
        finally:
            file.closed = True

    def _prepare_config_kwargs(self) -> dict[str, Any]:
        return {
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": 32,
            **super()._prepare_config_kwargs(),
        }

    async def _call_s3(self, method: str, *akwarglist: dict, **kwargs: Any) -> Any:
        what = f"S3 {method} of s3://{kwargs.get('Bucket', '')}/{kwargs.get('Key') or kwargs.get('Prefix', '')}"
        if method == "create_multipart_upload":
            kwargs["Metadata"] = {**kwargs.get("Metadata", {}), _TOKEN: uuid.uuid4().hex}
        try:
            answer = await super()._call_s3(method, *akwarglist, **kwargs)
        except FileNotFoundError as error:
            answer = await self._answer_to_repeated(method, kwargs)
            if answer is None:
                raise FileNotFoundError(*error.args[:-1], f"{error.args[-1]} ({what})") from error
        except (*s3fs.core.S3_RETRYABLE_ERRORS, BotoCoreError) as error:
            # An error that s3fs would repeat again one level up: this one has had all its repetitions.
            raise OSError(f"{error} ({what})") from error
        except OSError as error:
            raise type(error)(*error.args[:-1], f"{error.args[-1]} ({what})") from error
        if method == "create_multipart_upload":
            self._tokens[answer["UploadId"]] = kwargs["Metadata"][_TOKEN]
        elif method in ("complete_multipart_upload", "abort_multipart_upload"):
            self._tokens.pop(kwargs["UploadId"], None)
        return answer

    # s3fs made its own from its own `_call_s3`.
    call_s3 = sync_wrapper(_call_s3)

    async def _answer_to_repeated(self, method: str, kwargs: dict[str, Any]) -> dict | None:
        """The answer where an upload is gone because our first request did its work and only the answer was lost.

        None if that is not what happened.
        """
        if method == "abort_multipart_upload":
            return {}
        if method != "complete_multipart_upload":
            return None
        try:
            head = await self._call_s3("head_object", Bucket=kwargs["Bucket"], Key=kwargs["Key"])
        except FileNotFoundError:
            return None
        token = self._tokens.get(kwargs["UploadId"])
        return head if token is not None and head.get("Metadata", {}).get(_TOKEN) == token else None

    async def _bulk_delete(self, pathlist: list[str], **kwargs: Any) -> list[str]:
        # One request for each: s3fs drops the errors of single keys in the answer to a bulk request.
        await asyncio.gather(*(self._rm_file(path) for path in pathlist))
        return pathlist


def filesystem() -> PatientS3:
    """The S3 of the AWS_* environment variables, AWS_ENDPOINT_URL included."""
    # The endpoint is an argument because fsspec reuses instances by argument. No listing cache: other processes write
    # here too.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return PatientS3(endpoint_url=endpoint, use_listings_cache=False)
