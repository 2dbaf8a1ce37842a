"""A GGUF file behind the OpenAI chat-completions API on loopback, for as long as it is needed.

`serve` starts this module as a child process. The child dies with its parent, whatever ends the
parent: it holds the read end of a pipe, and leaves when that pipe closes. It never takes part in
Ctrl-C, so that answers in flight can still arrive.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill import machine
from edgedistill.child import crash_hint, ending
from edgedistill.errors import CollectError, MissingTool, RuntimeFailure, TeacherError
from edgedistill.memory import SERVER_MODULE, TEACHER
from edgedistill.teacher.client import Endpoint
from edgedistill.teacher.local_answers import BATCH_TOKENS, Recorder, answer_alike, compute_in

HOST = "127.0.0.1"
SERVER_VERSION = 2  # raised with every change that moves its answers or its speed
POLL_SECONDS = 0.1
STOP_SECONDS = 5.0
SHOWN_LINES = 15


@dataclass(frozen=True)
class Server:
    """A server that answers. `start_seconds` went by from its start to its first reply."""

    endpoint: Endpoint
    pid: int
    start_seconds: float


@contextlib.contextmanager
def serve(
    model: Path,
    model_id: str,
    *,
    threads: int | None,
    context_tokens: int,
    port: int | None,
    start_seconds: float,
    role: str = TEACHER,
) -> Iterator[Server]:
    """Serve one GGUF file under `model_id` with a random key; stopped on the way out.

    `threads` None: the physical cores. `port` None: a free one. Greedy answers do not depend on
    what was asked before (see `answer_alike`), and no repetition penalty is set.

    Raises:
        MissingTool: the server's packages are not installed.
        TeacherError: the port that the recipe pins is in use.
        RuntimeFailure: the server died (with its last lines), while loading or while it was used
            and could not be reached any more; or it was not ready in `start_seconds`.
    """
    _require("llama_cpp", "uvicorn", "fastapi")
    chosen = _port(port)
    endpoint = Endpoint(f"http://{HOST}:{chosen}/v1", secrets.token_urlsafe(24))
    settings = {
        "model": str(model),
        "model_id": model_id,
        "threads": threads or machine.threads(),
        "context_tokens": context_tokens,
        "port": chosen,
        "api_key": endpoint.api_key,
    }
    started = time.monotonic()
    process = _spawn(settings, role)
    lines: deque[str] = deque(maxlen=SHOWN_LINES)
    reader = threading.Thread(target=_keep_lines, args=(process, lines), daemon=True)
    try:
        reader.start()
        _wait_until_ready(process, endpoint, model, start_seconds, reader, lines, role)
        yield Server(endpoint, process.pid, time.monotonic() - started)
    except (CollectError, TeacherError) as error:
        if process.poll() is None:
            raise
        raise _died(process, model, "while it was asked", reader, lines) from error
    finally:
        _stop(process)
        if reader.is_alive():
            reader.join(1.0)  # closing what it reads would end it with an error
        if process.stdout is not None:
            process.stdout.close()


def _require(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        what = f"not installed, and a local teacher needs it: {', '.join(missing)}"
        raise MissingTool(what, hint="in the checkout: pip install -e '.[local-teacher]'")


def _port(pinned: int | None) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        if os.name == "posix":  # a port that was just given up counts as free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, pinned or 0))
        except OSError as error:
            raise TeacherError(
                f"port {pinned} cannot be used for the local teacher: {error.strerror}",
                where=f"{HOST}:{pinned}",
                hint="stop what uses it, or change teacher.port in the recipe "
                "(without it, a free port is taken)",
            ) from error
        return int(probe.getsockname()[1])


def _spawn(settings: Mapping[str, Any], role: str) -> subprocess.Popen[bytes]:
    """The key goes through the pipe: a command line is there for every user to read."""
    process = subprocess.Popen(
        [sys.executable, "-m", SERVER_MODULE, str(settings["port"]), role],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=machine.child_environment(),
    )
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # it died at once; waiting for it says why
        process.stdin.write((json.dumps(settings) + "\n").encode())
        process.stdin.flush()
    return process


def _keep_lines(process: subprocess.Popen[bytes], lines: deque[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.decode("utf-8", "replace").rstrip())


def _wait_until_ready(
    process: subprocess.Popen[bytes],
    endpoint: Endpoint,
    model: Path,
    start_seconds: float,
    reader: threading.Thread,
    lines: Sequence[str],
    role: str,
) -> None:
    deadline = time.monotonic() + start_seconds
    while not _is_ready(endpoint):
        if process.poll() is not None:
            raise _died(process, model, "while loading", reader, lines)
        if time.monotonic() > deadline:
            raise RuntimeFailure(
                f"its server was not ready after {start_seconds:g} s",
                where=str(model),
                hint="raise teacher.start_seconds in the recipe"
                if role == TEACHER
                else "is there memory enough for it, and does other work slow this machine down?",
            )
        time.sleep(POLL_SECONDS)


def _died(
    process: subprocess.Popen[bytes],
    model: Path,
    when: str,
    reader: threading.Thread,
    lines: Sequence[str],
) -> RuntimeFailure:
    reader.join(1.0)
    listed = "\n".join(f"    {line}" for line in lines)
    code = process.wait()
    return RuntimeFailure(
        f"its server died {when} ({ending(code)}); it said last:\n{listed}",
        where=str(model),
        hint=crash_hint(code, machine.facts()["cpu_features"])
        or "is this a whole GGUF file, and is there memory enough for it?",
    )


def _is_ready(endpoint: Endpoint) -> bool:
    port = int(endpoint.base_url.rsplit(":", 1)[1].split("/")[0])
    connection = http.client.HTTPConnection(HOST, port, timeout=2.0)
    try:
        headers = {"Authorization": f"Bearer {endpoint.api_key}"}
        connection.request("GET", "/v1/models", headers=headers)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _stop(process: subprocess.Popen[bytes]) -> None:
    try:
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def main() -> None:
    """The child: load and answer in a thread, and leave when the parent's pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settings = json.loads(sys.stdin.readline() or "null")
    if settings is None:
        os._exit(0)
    threading.Thread(target=_run, args=(settings,), daemon=True).start()
    sys.stdin.read()
    os._exit(0)


def _run(settings: Mapping[str, Any]) -> None:
    try:
        _answer_forever(settings)
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(1)


def _answer_forever(settings: Mapping[str, Any]) -> None:
    import uvicorn

    # OpenMP keeps a team of threads for each thread that calls it. With more teams than cores they
    # sleep at every barrier, and decoding takes two or three times as long: one thread computes.
    engine = ThreadPoolExecutor(1)
    app = engine.submit(_load, settings, engine).result()
    # A connection that the server closes while the client picks it up again is a lost call.
    config = uvicorn.Config(
        app, HOST, settings["port"], log_level="warning", access_log=False, timeout_keep_alive=600
    )
    uvicorn.Server(config).run()


def _load(settings: Mapping[str, Any], engine: Executor) -> Any:
    """llama-cpp-python's server application, with the model in memory."""
    from llama_cpp.server import app as server
    from llama_cpp.server.settings import ModelSettings, ServerSettings
    from llama_cpp.server.types import CreateChatCompletionRequest

    _forget_environment({*ModelSettings.model_fields, *ServerSettings.model_fields, "config_file"})
    # 1.1 is that server's own default; the API it speaks has no such penalty.
    CreateChatCompletionRequest.model_fields["repeat_penalty"].default = 1.0
    CreateChatCompletionRequest.model_rebuild(force=True)
    threads = settings["threads"]
    model = ModelSettings(
        model=settings["model"],
        model_alias=settings["model_id"],
        n_ctx=settings["context_tokens"],
        n_batch=BATCH_TOKENS,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=0,
        flash_attn=True,  # llama.cpp's own default is to use it where it can
        logits_all=False,
        verbose=False,
    )
    access = ServerSettings(
        host=HOST, port=settings["port"], api_key=settings["api_key"], interrupt_requests=False
    )
    app = server.create_app(server_settings=access, model_settings=[model])
    proxy: Any = server._llama_proxy
    llama = proxy(settings["model_id"])
    recorder = Recorder(llama)
    compute_in(engine, llama, answer_alike(llama, recorder), recorder)
    return app


def _forget_environment(fields: set[str]) -> None:
    """Both settings classes would also read variables such as SEED or CACHE."""
    for name in list(os.environ):
        if name.lower() in fields:
            del os.environ[name]


if __name__ == "__main__":
    main()
