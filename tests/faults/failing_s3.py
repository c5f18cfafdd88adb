"""A proxy in front of an S3 server that makes its answers fail, by a plan that is the same in every run.

The fixture is `failing_s3` of tests/conftest.py. Everything below `failing_s3.uri` goes through the proxy, also in processes
that the test starts (AWS_ENDPOINT_URL and FSSPEC_S3 are in the environment) and in those of the shared Ray, for which the proxy
passes on everything as long as no test asks for failures. `failing_s3.injected` counts what was done to whom, `with
failing_s3.undisturbed():` looks at the server itself.
"""

import contextlib
import http.client
import os
import random
import re
import socket
import struct
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

READ_TIMEOUT_S = 1.0
SETTINGS = {"config_kwargs": {"read_timeout": READ_TIMEOUT_S}}  # of fsspec, for who reads through the proxy
KINDS = {
    "500": 3,  # InternalError
    "503": 3,  # SlowDown
    "reset": 3,  # RST in place of an answer; the server never saw the request
    "lost": 3,  # the server did as asked, and RST in place of its answer
    "cut": 3,  # RST in the middle of the body of the answer
    "stall": 2,  # no answer for longer than the client waits
}  # kind: weight
_XML = "<?xml version='1.0' encoding='UTF-8'?><Error><Code>{0}</Code><Message>{1}</Message></Error>"
_ERRORS = {
    "500": (500, _XML.format("InternalError", "We encountered an internal error. Please try again.")),
    "503": (503, _XML.format("SlowDown", "Please reduce your request rate.")),
    "403": (403, _XML.format("AccessDenied", "Access Denied")),
    "404": (404, _XML.format("NoSuchUpload", "The specified multipart upload does not exist.")),
}

# (method and URL of a request, how often it was seen before, how often in a row it was failed just now) -> kind or None
Plan = Callable[[str, int, int], str | None]


def seeded(seed: int, share: float, most_in_a_row: int = 3) -> Plan:
    """Fails `share` of all requests, but the same request at most so often in a row."""

    def plan(request: str, seen: int, in_a_row: int) -> str | None:
        dice = random.Random(f"{seed} {request} {seen}")
        if in_a_row >= most_in_a_row or dice.random() >= share:
            return None
        return dice.choices(list(KINDS), list(KINDS.values()))[0]

    return plan


def harmless(request: str, seen: int, in_a_row: int) -> None:
    """Fails nothing."""


class Faults:
    """What the proxy does to requests from now on, by `plan`, which may be replaced; and what it did to how many."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.requests, self.injected = Counter[str](), Counter[str]()
        self._seen, self._in_a_row = Counter[str](), defaultdict(int)
        self._lock = threading.Lock()

    def draw(self, request: str) -> str | None:
        """What to do to this request."""
        request = re.sub(r"uploadId=[^&]*", "uploadId=", request)  # the one thing that the server makes up
        with self._lock:
            kind = self.plan(request, self._seen[request], self._in_a_row[request])
            self._seen[request] += 1
            self._in_a_row[request] = self._in_a_row[request] + 1 if kind else 0
        return kind

    def count(self, method: str, kind: str | None) -> None:
        with self._lock:
            self.requests[method] += 1
            if kind:
                self.injected[kind] += 1


class FailingProxy(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = target.removeprefix("http://")
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.faults = Faults(harmless)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FailingProxy

    def _serve(self) -> None:
        self.faults = self.server.faults  # a test may end before its last answer
        kind = self.faults.draw(f"{self.command} {self.path} {self.headers.get('Range', '')}")
        if kind == "reset":
            self._reset(kind)
            return
        body = self._body()
        if kind in _ERRORS:
            self.faults.count(self.command, kind)
            status, text = _ERRORS[kind]
            self._answer(status, [("Content-Type", "application/xml")], text.encode())
        elif kind == "stall":
            time.sleep(1.5 * READ_TIMEOUT_S)
            self._reset(kind)
        else:
            self._forward(kind, body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _forward(self, kind: str | None, body: bytes) -> None:
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("transfer-encoding", "expect")}
        if body:
            headers["Content-Length"] = str(len(body))
        upstream = http.client.HTTPConnection(self.server.target, timeout=60)
        upstream.request(self.command, self.path, body, headers)
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        if kind == "cut" and len(content) < 2:
            kind = "lost"  # no body to cut
        if kind == "lost":
            self._reset(kind)
            return
        self.faults.count(self.command, kind)
        headers = [(k, v) for k, v in answer.getheaders() if k.lower() not in ("transfer-encoding", "connection")]
        self._answer(answer.status, headers, content, cut=kind == "cut")

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self._abort()

    def _reset(self, kind: str) -> None:
        self.faults.count(self.command, kind)
        self._abort()

    def _abort(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())  # lingers for no time: an RST

    def log_message(self, *_: object) -> None:
        pass


@dataclass
class FailingS3:
    """An S3 whose requests fail by `faults.plan`."""

    uri: str
    faults: Faults
    server: str

    @property
    def injected(self) -> Counter[str]:
        """{kind of fault: how often}"""
        return self.faults.injected

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """The same storage with nothing in between."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", self.server)
            yield
