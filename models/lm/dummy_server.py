"""A dummy OpenAI-compatible server on this machine: for tests, dry runs, and trying a job out without a model.

Its answers are a function of the question and its seed alone. It fails on demand, by rate or by request number, in
the ways real servers do, and it counts what it was asked, so that a test can prove that nothing was paid for twice.

    GET  /v1/models              one model
    POST /v1/chat/completions    messages, n, seed, stop, max_tokens, a prefilled assistant turn; no streaming
    GET  /stats                  what it has counted
"""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from models.lm.dummy_answers import count_tokens, cut, write_answer
from models.lm.dummy_judge import judge, noise, top_tokens
from schemas.errors import ModelError
from schemas.fingerprint import derive_seed, fingerprint

MODES = ("soften", "echo", "garbage", "judge")
# 429 (with Retry-After), 500, 503; `hang`: no answer for a long time; `close`: the connection breaks;
# `truncated`: half a reply; `garbled`: no JSON; `empty`: a reply without answers.
FAULTS = ("400", "429", "500", "503", "hang", "close", "truncated", "garbled", "empty")


@dataclass(frozen=True)
class DummyOptions:
    """How a dummy server behaves.

    Attributes:
        mode: `soften` takes the listed words of tamis's lexicon out of the text, or puts milder ones in; `echo` gives
            it back; `garbage` answers with noise and without tags; `judge` says how many words of a query a passage holds,
            in the form that is asked for (`models.lm.dummy_judge`).
        model: The one model's id.
        owned_by: What it says it is (`vllm`, `llamacpp`, ...), which decides how clients speak to it.
        api_key: Refuse requests without it; empty refuses none.
        context: Most tokens of prompt and answer together.
        latency: Seconds each answer takes.
        fail_rate: Share of completion requests that fail, drawn from `seed` and the request's number.
        fail_kinds: What they fail with, one drawn each time.
        faults: Request number (from 0) -> kind of fault, besides the rate. Numbers are given as requests come in: where
            a client asks several at once, which one a number falls to is chance.
        refused: Answer requests that hold this text with 400, whenever they come; empty refuses none.
        nonsense: Answer requests that hold this text with noise, whatever the mode; empty: none.
        logprobs: Give log-probabilities of the next token where they are asked for (mode `judge`).
        retry_after: Seconds a 429 asks to wait.
        hang: Seconds a `hang` keeps silent.
        largest_n: Most answers of one request; some servers give one, whatever `n` says.
        seed: Of the faults.
    """

    mode: str = "soften"
    model: str = "dummy"
    owned_by: str = "vllm"
    api_key: str = ""
    context: int = 4096
    latency: float = 0.0
    fail_rate: float = 0.0
    fail_kinds: tuple[str, ...] = ("429", "500", "close", "truncated")
    faults: Mapping[int, str] = field(default_factory=dict)
    refused: str = ""
    nonsense: str = ""
    logprobs: bool = True
    retry_after: float = 0.05
    hang: float = 30.0
    largest_n: int = 128
    seed: int = 0


@dataclass
class DummyStats:
    """What a dummy server has counted.

    Attributes:
        requests: Completion requests that came in.
        answered: Those answered whole.
        repeated: Answered requests that had been answered before (same body): paid for twice.
        refused: Answered with 4xx because of what they asked.
        faults: Kind -> how often it failed on purpose.
        candidates: Answers given (`n` of each request).
        prompt_tokens: Of answered requests.
        completion_tokens: Of answered requests.
        most_at_once: Most requests under way at one moment.
    """

    requests: int = 0
    answered: int = 0
    repeated: int = 0
    refused: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    candidates: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    most_at_once: int = 0


class DummyServer:
    """A dummy server in threads of this process.

    Args:
        options: How it behaves.
        host: Address to listen on.
        port: 0 takes a free one.

    Attributes:
        url: Base URL to give to a client (`http://127.0.0.1:<port>/v1`).
        bodies: The completion requests that came in, in order.

    Example:
        with DummyServer() as server:
            model = ServerLanguageModel(server.url, "dummy")
    """

    def __init__(self, options: DummyOptions | None = None, host: str = "127.0.0.1", port: int = 0) -> None:
        self.options = options or DummyOptions()
        _check(self.options)
        self.bodies: list[dict[str, Any]] = []
        self._stats = DummyStats()
        self._seen: Counter[str] = Counter()
        self._under_way = 0
        self._guard = threading.Lock()
        self._closing = threading.Event()
        server = self

        class Handler(_Handler):
            dummy = server

        try:
            self._http = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise ModelError(
                f"Cannot listen on {host}:{port} ({error.strerror}); choose another port"
            ) from error
        self._http.daemon_threads = True
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._http.server_address[1]}/v1"

    def __enter__(self) -> DummyServer:
        """Serve in a thread of its own until the block ends."""
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def serve_forever(self) -> None:
        """Serve in this thread until it is interrupted."""
        try:
            self._http.serve_forever(poll_interval=0.1)
        finally:
            self._closing.set()
            self._http.server_close()

    @property
    def stats(self) -> DummyStats:
        """A copy of what has been counted."""
        with self._guard:
            return DummyStats(**{**vars(self._stats), "faults": Counter(self._stats.faults)})

    def complete(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Answer one request as it would be answered without faults: status and JSON."""
        problem = self._problem(body)
        if problem is not None:
            return problem
        options = self.options
        prompt = "\n".join(message["content"] for message in body["messages"])
        limit = body.get("max_tokens") or body.get("max_completion_tokens") or options.context
        stops = body.get("stop") or []
        stops = [stops] if isinstance(stops, str) else stops
        seed = int(body.get("seed") or 0)
        choices, total = [], 0
        for index in range(min(int(body.get("n") or 1), options.largest_n)):
            draw = random.Random(derive_seed(seed, prompt, str(body.get("temperature", 1.0)), index))
            text, finish, stop_reason, tokens = cut(self._said(body, draw), stops, limit)
            total += tokens
            message = {"role": "assistant", "content": text}
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "finish_reason": finish,
                    "stop_reason": stop_reason,
                    **self._logprobs(body),
                }
            )
        prompt_tokens = count_tokens(prompt)
        return 200, {
            "id": f"chatcmpl-{fingerprint(json.dumps(body, sort_keys=True))[:12]}",
            "object": "chat.completion",
            "created": 0,
            "model": options.model,
            "choices": choices,
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": total,
                "total_tokens": prompt_tokens + total,
            },
        }

    def _said(self, body: dict[str, Any], draw: random.Random) -> str:
        messages, options = body["messages"], self.options
        if self._is_nonsense(messages):
            return noise(draw)
        if options.mode == "judge":
            schema = (body.get("response_format") or {}).get("json_schema", {}).get("schema")
            return judge(messages, schema)
        return write_answer(messages, options.mode, draw)

    def _logprobs(self, body: dict[str, Any]) -> dict[str, Any]:
        options, count = self.options, int(body.get("top_logprobs") or 0)
        if not (body.get("logprobs") and options.logprobs and options.mode == "judge"):
            return {}
        top = top_tokens(body["messages"], count, sense=not self._is_nonsense(body["messages"]))
        return {"logprobs": {"content": [{"token": top[0]["token"], "top_logprobs": top}] if top else []}}

    def _is_nonsense(self, messages: list[dict[str, Any]]) -> bool:
        mark = self.options.nonsense
        return bool(mark) and any(mark in m["content"] for m in messages)

    def _problem(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            return _error(400, "messages must be a list of at least one message")
        if not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):
            return _error(400, "every message needs a text as its content")
        if body.get("model") != self.options.model:
            return _error(404, f"the model `{body.get('model')}` does not exist")
        if body.get("stream"):
            return _error(400, "this server does not stream")
        if self.options.refused and any(self.options.refused in m["content"] for m in messages):
            return _error(400, "bad request")
        asked = sum(count_tokens(m["content"]) for m in messages)
        wanted = body.get("max_tokens") or body.get("max_completion_tokens") or 1
        if asked + wanted > self.options.context:
            return _error(
                400, f"{asked} tokens and {wanted} new ones exceed the context of {self.options.context}"
            )
        return None

    def _fault(self, number: int) -> str | None:
        if number in self.options.faults:
            return self.options.faults[number]
        draw = random.Random(derive_seed(self.options.seed, "fault", number))
        return draw.choice(self.options.fail_kinds) if draw.random() < self.options.fail_rate else None

    @contextlib.contextmanager
    def _request(self, body: dict[str, Any]) -> Iterator[int]:
        """Count a request while it is under way; gives its number."""
        with self._guard:
            number = self._stats.requests
            self._stats.requests += 1
            self.bodies.append(body)
            self._under_way += 1
            self._stats.most_at_once = max(self._stats.most_at_once, self._under_way)
        try:
            yield number
        finally:
            with self._guard:
                self._under_way -= 1

    def _count_fault(self, kind: str) -> None:
        with self._guard:
            self._stats.faults[kind] += 1

    def _count_answer(self, body: dict[str, Any], status: int, reply: dict[str, Any]) -> None:
        with self._guard:
            if status != 200:
                self._stats.refused += 1
                return
            key = fingerprint(json.dumps(body, sort_keys=True))
            self._stats.repeated += bool(self._seen[key])
            self._seen[key] += 1
            self._stats.answered += 1
            self._stats.candidates += len(reply["choices"])
            self._stats.prompt_tokens += reply["usage"]["prompt_tokens"]
            self._stats.completion_tokens += reply["usage"]["completion_tokens"]


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    dummy: DummyServer
    protocol_version = "HTTP/1.1"
    # Without this every small answer waits for the client's delayed acknowledgement (40 ms).
    disable_nagle_algorithm = True

    def handle(self) -> None:
        """Serve it until one side hangs up; a client that goes without a word is its own business."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        """The list of models, or the statistics."""
        if self.path == "/stats":
            self._send(200, vars(self.dummy.stats))
        elif not self._is_allowed():
            self._send(*_error(401, "invalid API key"))
        elif self.path == "/v1/models":
            options = self.dummy.options
            card = {"id": options.model, "object": "model", "created": 0, "owned_by": options.owned_by}
            self._send(200, {"object": "list", "data": [{**card, "max_model_len": options.context}]})
        else:
            self._send(*_error(404, f"no such page: {self.path}"))

    def do_POST(self) -> None:
        """A chat completion."""
        raw = self.rfile.read(int(self.headers.get("content-length") or 0))
        if not self._is_allowed():
            self._send(*_error(401, "invalid API key"))
            return
        if self.path != "/v1/chat/completions":
            self._send(*_error(404, f"no such page: {self.path}"))
            return
        try:
            body = json.loads(raw)
        except ValueError as error:
            self._send(*_error(400, f"the body is not JSON: {error}"))
            return
        if not isinstance(body, dict):
            self._send(*_error(400, "the body must be an object"))
            return
        dummy = self.dummy
        with dummy._request(body) as number:
            if dummy.options.latency:
                time.sleep(dummy.options.latency)
            fault = dummy._fault(number)
            if fault is not None:
                dummy._count_fault(fault)
                self._fail(fault)
                return
            status, reply = dummy.complete(body)
            dummy._count_answer(body, status, reply)
            self._send(status, reply)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the statistics say it."""

    def _is_allowed(self) -> bool:
        key = self.dummy.options.api_key
        return not key or self.headers.get("authorization") == f"Bearer {key}"

    def _fail(self, kind: str) -> None:
        options = self.dummy.options
        if kind == "429":
            self._send(*_error(429, "too many requests"), headers={"Retry-After": f"{options.retry_after:g}"})
        elif kind in ("400", "500", "503"):
            # 400: what a server says to a request it will never take, so no client should ask again.
            self._send(*_error(int(kind), "bad request" if kind == "400" else "something broke"))
        elif kind == "truncated":
            self._send_raw(200, b'{"choices": [{"message": {"role": "assist', length=4096)
        elif kind == "garbled":
            self._send_raw(200, b"<html>Bad gateway</html>")
        elif kind == "empty":
            self._send(200, {"object": "chat.completion", "choices": []})
        else:
            if kind == "hang":
                self.dummy._closing.wait(options.hang)
            self.close_connection = True

    def _send(self, status: int, reply: dict[str, Any], headers: Mapping[str, str] | None = None) -> None:
        self._send_raw(status, json.dumps(reply).encode(), headers=headers)

    def _send_raw(
        self, status: int, body: bytes, length: int | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        # The client may have gone meanwhile; that is its business.
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body) if length is None else length))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
            self.wfile.flush()
        if length is not None:
            self.close_connection = True  # with part of the promised bytes missing


def _check(options: DummyOptions) -> None:
    if options.mode not in MODES:
        raise ModelError(f"mode '{options.mode}' is not known; use {', '.join(MODES)}")
    unknown = ({*options.fail_kinds} | {*options.faults.values()}) - {*FAULTS}
    if unknown:
        raise ModelError(f"fault '{sorted(unknown)[0]}' is not known; use {', '.join(FAULTS)}")
    if not 0 <= options.fail_rate <= 1:
        raise ModelError("the fail rate must be in [0, 1]")


def _error(status: int, message: str) -> tuple[int, dict[str, Any]]:
    return status, {"error": {"message": message, "type": "invalid_request_error", "code": status}}
