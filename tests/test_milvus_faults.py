"""The backend `milvus` where processes are killed, servers do not answer, and credentials must not be told."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import pytest
import torch
from milvus_appending import CAPACITY, DIM, key_numbers

from recollect.memory_backends import load_backend, make_backend
from recollect.memory_backends.errors import DiskFull, InvalidInput, InvalidSpec
from recollect.memory_backends.milvus_errors import MilvusError, MilvusUnavailable, translate
from recollect.memory_backends.testing import skip_unless_available, vectors

APPENDING = Path(__file__).with_name("milvus_appending.py")
TOKEN = "reader:open-sesame-4711"
SIZES = {"num_memories": 1, "capacity": 64, "dim": 8}


@pytest.fixture(autouse=True)
def _library() -> None:
    skip_unless_available("milvus")


class Server:
    """Lite's engine behind a port that speaks as a server would, with credentials and TLS where they are asked for."""

    def __init__(self, folder: Path, *, token: str = "", tls: tuple[bytes, bytes] | None = None) -> None:
        self.folder, self.token, self.tls, self.port = folder, token, tls, 0
        self.start()

    @property
    def uri(self) -> str:
        return f"{'https' if self.tls else 'http'}://localhost:{self.port}"

    def start(self) -> None:
        import grpc
        from milvus_lite import MilvusLite
        from milvus_lite.adapter.grpc.servicer import MilvusServicer
        from pymilvus.grpc_gen import milvus_pb2_grpc

        self.database = MilvusLite(str(self.folder))
        checks = [_Credentials(self.token)] if self.token else []
        self.server = grpc.server(futures.ThreadPoolExecutor(4), interceptors=checks)
        milvus_pb2_grpc.add_MilvusServiceServicer_to_server(MilvusServicer(self.database), self.server)
        address = f"localhost:{self.port}"
        if self.tls:
            self.port = self.server.add_secure_port(address, grpc.ssl_server_credentials([self.tls]))
        else:
            self.port = self.server.add_insecure_port(address)
        self.server.start()

    def stop(self) -> None:
        self.server.stop(None).wait(5)
        self.database.close()


def _Credentials(token: str) -> Any:
    import base64

    import grpc

    wanted = base64.b64encode(token.encode()).decode()

    class Interceptor(grpc.ServerInterceptor):  # type: ignore[misc]
        def intercept_service(self, continuation: Any, details: Any) -> Any:
            given = dict(details.invocation_metadata).get("authorization", "")
            if (given.decode() if isinstance(given, bytes) else given) == wanted:
                return continuation(details)

            def refuse(request: Any, context: Any) -> None:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, f"auth check failure, token {given!r} is wrong")

            return grpc.unary_unary_rpc_method_handler(refuse)

    return Interceptor()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    one = Server(tmp_path / "server")
    yield one
    one.stop()


# Killed on purpose ----------------------------------------------------------------------------------------------------


def test_acknowledged_keys_are_found_after_a_kill(tmp_path: Path) -> None:
    uri = str(tmp_path / "corpus.db")
    acknowledged = 0
    for appends in (3, 50):  # the second time over what the first kill has left, and beyond the capacity
        command = [sys.executable, str(APPENDING), uri, "corpus", "existing=reuse"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _, line in zip(range(appends), process.stdout, strict=False):
                acknowledged = int(line)
            process.kill()
            for line in process.stdout:
                if line.endswith("\n"):
                    acknowledged = int(line)
        spec = f"milvus:uri={uri},collection=corpus,existing=reuse"
        with make_backend(spec, num_memories=1, capacity=CAPACITY, dim=DIM) as memory:
            total = int(memory.ring.totals[0])
            assert acknowledged > 0
            assert total >= acknowledged, f"{acknowledged - total} acknowledged keys are lost"
            first = max(0, total - CAPACITY)
            slots = torch.arange(first, total) % CAPACITY
            torch.testing.assert_close(memory.gather_keys(slots[None, None])[0, 0], key_numbers(first, total)[0])
            exact = make_backend("exact", num_memories=1, capacity=CAPACITY, dim=DIM)
            exact.add(key_numbers(0, total))
            queries = key_numbers(total - 3, total)
            assert torch.equal(memory.search(queries, 4).slots, exact.search(queries, 4).slots)


# Servers that do not answer -------------------------------------------------------------------------------------------


def test_nobody_at_the_address() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(MilvusUnavailable, match=r"did not answer within 0\.5 seconds.*the address and port"):
            make_backend(f"milvus:uri={uri},deadline_seconds=0.5", **SIZES)


def test_a_failure_is_raised_and_not_printed_as_well() -> None:
    code = (
        "from recollect.memory_backends import make_backend\n"
        "spec = 'milvus:uri=http://127.0.0.1:1,deadline_seconds=0.3'\n"
        "try:\n    make_backend(spec, num_memories=1, capacity=4, dim=2)\n"
        "except ConnectionError as error:\n    print(error)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "did not answer" in ended.stdout
    assert ended.stderr == ""


def test_somebody_who_says_nothing() -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        uri = f"http://127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(MilvusUnavailable, match=r"did not answer within 0\.5 seconds"):
            make_backend(f"milvus:uri={uri},deadline_seconds=0.5", **SIZES)


def test_a_server_that_goes_away_and_comes_back(server: Server) -> None:
    spec = f"milvus:uri={server.uri},deadline_seconds=20"
    memory = make_backend(spec, **SIZES)
    oracle = make_backend("exact", **SIZES)
    for one in (memory, oracle):
        one.add(vectors(1, 50, 8))
    server.stop()
    threading.Timer(0.5, server.start).start()
    for one in (memory, oracle):  # waits for it
        one.add(vectors(1, 30, 8, seed=1))
    queries = vectors(1, 5, 8, seed=2)
    assert torch.equal(memory.search(queries, 4).slots, oracle.search(queries, 4).slots)
    memory.close()


def test_a_server_that_stays_away_and_comes_back_later(server: Server) -> None:
    memory = make_backend(f"milvus:uri={server.uri},deadline_seconds=0.5,batch=8", **SIZES)
    oracle = make_backend("exact", **SIZES)
    for one in (memory, oracle):
        one.add(vectors(1, 50, 8))
    server.stop()
    with pytest.raises(MilvusUnavailable, match="can't append keys"):
        memory.add(vectors(1, 30, 8, seed=1))
    assert memory.lengths.tolist() == [50]
    queries = vectors(1, 5, 8, seed=2)
    with pytest.raises(MilvusUnavailable):
        memory.search(queries, 4)
    server.start()
    memory.options = type(memory.options)(uri=server.uri)
    memory.connection.deadline = 20  # type: ignore[attr-defined]
    assert torch.equal(memory.search(queries, 4).slots, oracle.search(queries, 4).slots)
    for one in (memory, oracle):
        one.add(vectors(1, 30, 8, seed=3))
    assert torch.equal(memory.search(queries, 4).slots, oracle.search(queries, 4).slots)
    memory.close()


def test_a_server_returns_so_many_neighbours(server: Server) -> None:
    with make_backend(f"milvus:uri={server.uri}", num_memories=1, capacity=20_000, dim=2) as memory:
        memory.add(torch.ones(1, 16_500, 2))
        with pytest.raises(InvalidInput, match="16384 neighbours at most"):
            memory.search(torch.ones(1, 1, 2), 16_385)
        assert memory.search(torch.ones(1, 1, 2), 100).slots.ge(0).all()


@pytest.mark.parametrize("said", ["No space left on device", "disk quota exhausted, please allocate more"])
def test_a_full_disk_is_told(said: str) -> None:
    error = translate(RuntimeError(f"[Errno 28] {said}"), "append keys", "corpus.db")
    assert isinstance(error, DiskFull)
    assert "free some space" in str(error)


# Credentials ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Server]:
    one = Server(tmp_path / "guarded", token=TOKEN)
    yield one
    one.stop()


def told_nowhere(text: str) -> None:
    for part in (TOKEN, TOKEN.split(":")[1]):
        assert part not in text


@pytest.fixture
def everything_logged() -> Iterator[io.StringIO]:
    """What pymilvus logs, down to the last detail."""
    import pymilvus  # noqa: F401 (it sets up its log when it is loaded)

    logger, stream = logging.getLogger("pymilvus"), io.StringIO()
    handler, level = logging.StreamHandler(stream), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield stream
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.mark.parametrize("by", ["environment", "file"])
def test_credentials_open_and_are_told_nowhere(
    guarded: Server, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, everything_logged: io.StringIO
) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    if by == "environment":
        monkeypatch.setenv("MILVUS_TOKEN", TOKEN)
    spec = f"milvus:uri={guarded.uri},deadline_seconds=0.5,existing=reuse" + (
        f",token_file={file}" if by == "file" else ""
    )
    memory = make_backend(spec, **SIZES)
    memory.add(vectors(1, 5, 8))
    memory.save(tmp_path / "saved")
    told_nowhere(memory.spec + repr(memory) + repr(vars(memory)) + repr(memory.options) + str(memory.stats()))
    for path in (tmp_path / "saved").rglob("*"):
        told_nowhere(path.read_bytes().decode("latin-1") if path.is_file() else "")
    load_backend(tmp_path / "saved").close()
    for path in guarded.folder.rglob("*"):
        told_nowhere(path.read_bytes().decode("latin-1") if path.is_file() else "")
    guarded.stop()
    with pytest.raises(MilvusUnavailable) as caught:
        memory.search(vectors(1, 1, 8), 1)
    told_nowhere(str(caught.value))
    assert "RPC error" in everything_logged.getvalue()
    told_nowhere(everything_logged.getvalue())
    memory.close()
    guarded.start()


def test_wrong_credentials_are_refused_at_once_and_told_nowhere(
    guarded: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILVUS_TOKEN", TOKEN + "x")
    with pytest.raises(MilvusError, match=r"refuses the credentials.*MILVUS_TOKEN.*token_file") as caught:
        make_backend(f"milvus:uri={guarded.uri},deadline_seconds=60", **SIZES)
    assert not isinstance(caught.value, MilvusUnavailable)
    told_nowhere(str(caught.value))


def test_a_message_of_the_server_does_not_tell_them() -> None:
    told_nowhere(str(translate(RuntimeError(f"who is {TOKEN}, or open-sesame-4711?"), "search", "http://h", TOKEN)))


def test_credentials_in_the_address_are_refused_and_not_told() -> None:
    with pytest.raises(InvalidSpec, match="MILVUS_TOKEN") as caught:
        make_backend(f"milvus:uri=http://{TOKEN}@host:19530", **SIZES)
    told_nowhere(str(caught.value))


@pytest.mark.parametrize("content", [None, b"", b" \n", b"\xff\xfe"])
def test_a_file_without_credentials(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InvalidInput, match=r"token_file='.*token'"):
        make_backend(f"milvus:uri=http://localhost:1,token_file={file}", **SIZES)


# TLS ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A key and a certificate for localhost, signed by itself."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl here to make a certificate with")
    folder = tmp_path_factory.mktemp("certificate")
    key, made = folder / "key.pem", folder / "certificate.pem"
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(made)]
    subprocess.run(command, check=True, capture_output=True)
    return key, made


def test_tls(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    key, made = certificate
    server = Server(tmp_path / "tls", tls=(key.read_bytes(), made.read_bytes()))
    with contextlib.ExitStack() as ending:
        ending.callback(server.stop)
        with make_backend(f"milvus:uri={server.uri},ca_file={made}", **SIZES) as memory:
            memory.add(vectors(1, 5, 8))
            assert memory.search(vectors(1, 1, 8), 5).slots.sum() == 10
        # Signed by nobody whom the system trusts; and spoken to in the clear.
        for wrong in (server.uri, server.uri.replace("https", "http")):
            with pytest.raises(MilvusUnavailable, match="https:// where it speaks TLS"):
                make_backend(f"milvus:uri={wrong},deadline_seconds=0.5", **SIZES)
    with pytest.raises(InvalidInput, match="ca_file"):
        make_backend(f"milvus:uri=https://localhost:1,ca_file={tmp_path / 'none'}", **SIZES)
