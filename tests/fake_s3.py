"""An object store for tests: as much of S3's protocol as Lance speaks, over a dictionary, on this machine only."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

OPTIONS = {
    "aws_access_key_id": "an-access-key",
    "aws_secret_access_key": "a-very-secret-key",
    "aws_region": "nowhere",
    "allow_http": "true",
}
"""Storage options beside `aws_endpoint`."""


class Objects:
    """What the store holds, by name; `refuse` makes every request fail with 403."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.lock = threading.Lock()
        self.refuse = False
        self.requests = 0


@contextlib.contextmanager
def fake_s3() -> Iterator[tuple[Objects, dict[str, str]]]:
    """Serves an empty store; yields its objects and the storage options that lead to it."""
    objects = Objects()

    class Handler(_Handler):
        store = objects

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield objects, {**OPTIONS, "aws_endpoint": f"http://127.0.0.1:{server.server_address[1]}"}
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    store: Objects
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        """Says nothing."""

    def _begin(self) -> tuple[str, dict[str, list[str]], bytes]:
        self.store.requests += 1
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "aws-chunked" in (self.headers.get("Content-Encoding") or ""):
            raise ValueError("chunked signatures are not spoken here")
        return unquote(parts.path).lstrip("/"), parse_qs(parts.query, keep_blank_values=True), body

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _fail(self, status: int, code: str) -> None:
        self._answer(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())

    def _refused(self) -> bool:
        if self.store.refuse:
            self._fail(403, "AccessDenied")
        return self.store.refuse

    def do_PUT(self) -> None:
        name, query, body = self._begin()
        if self._refused():
            return
        tag = hashlib.md5(body, usedforsecurity=False).hexdigest()
        with self.store.lock:
            if "uploadId" in query:
                self.store.uploads[query["uploadId"][0]][int(query["partNumber"][0])] = body
            elif self.headers.get("If-None-Match") == "*" and name in self.store.content:
                self._fail(412, "PreconditionFailed")
                return
            else:
                self.store.content[name] = body
        self._answer(200, ETag=f'"{tag}"')

    def do_POST(self) -> None:
        name, query, body = self._begin()
        if self._refused():
            return
        if "uploads" in query:
            upload = f"upload{len(self.store.uploads)}"
            self.store.uploads[upload] = {}
            answer = f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
            self._answer(200, answer.encode())
        elif "uploadId" in query:
            parts = self.store.uploads.pop(query["uploadId"][0])
            with self.store.lock:
                self.store.content[name] = b"".join(parts[number] for number in sorted(parts))
            self._answer(200, b'<CompleteMultipartUploadResult><ETag>"x"</ETag></CompleteMultipartUploadResult>')
        else:  # several deletions in one request
            bucket = name.split("/")[0]
            names = [part.split("</Key>")[0] for part in body.decode().split("<Key>")[1:]]
            for key in names:
                self.store.content.pop(f"{bucket}/{key}", None)
            done = "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in names)
            self._answer(200, f"<DeleteResult>{done}</DeleteResult>".encode())

    def do_DELETE(self) -> None:
        name, _, _ = self._begin()
        self.store.content.pop(name, None)
        self._answer(204)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name, query, _ = self._begin()
        if self._refused():
            return
        if "list-type" in query:
            self._list(name.split("/")[0], query.get("prefix", [""])[0], query.get("delimiter", [""])[0])
            return
        body = self.store.content.get(name)
        if body is None:
            self._fail(404, "NoSuchKey")
            return
        headers = {"ETag": f'"{len(body)}"', "Last_Modified": formatdate(time.time(), usegmt=True)}
        wanted = self.headers.get("Range")
        if wanted is None:
            self._answer(200, body, Content_Length=str(len(body)), **headers)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start = int(first) if first else max(0, len(body) - int(last))
        stop = min(len(body), int(last) + 1) if first and last else len(body)
        headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
        self._answer(206, body[start:stop], Content_Length=str(stop - start), **headers)

    def _list(self, bucket: str, prefix: str, delimiter: str) -> None:
        names = sorted(key.partition("/")[2] for key in self.store.content if key.startswith(f"{bucket}/{prefix}"))
        folders: dict[str, None] = {}
        listed = []
        for name in names:
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                folders[prefix + rest.partition(delimiter)[0] + delimiter] = None
            else:
                size = len(self.store.content[f"{bucket}/{name}"])
                listed.append(
                    f"<Contents><Key>{escape(name)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                    f'<ETag>"x"</ETag><Size>{size}</Size></Contents>'
                )
        common = "".join(f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>" for folder in folders)
        body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(listed)}{common}</ListBucketResult>"
        self._answer(200, body.encode())
