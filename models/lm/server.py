"""A language model behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp, or a hosted one."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import os
import queue
import random
import re
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import httpx
import stamina

from models.lm.dialects import DIALECTS, Choice, Dialect, GarbledReplyError, read_reply, write_body
from models.lm.limits import check_sampling
from models.lm.reach import describe_card, headers, is_local, one_line, reach, without_secrets
from models.lm.server_scores import NO_ANSWER, NO_LOGPROBS, read_answers, scores_body
from models.protocols import (
    Candidate,
    FloatArray,
    Generation,
    GenerationRequest,
    Message,
    ModelInfo,
    Sampling,
    TokenScores,
)
from schemas.errors import FatalStepError, ModelError
from schemas.fingerprint import derive_seed

# Each retry is logged under `stamina`; who configures logging sees them, nobody else's terminal is filled with them.
logging.getLogger("stamina").addHandler(logging.NullHandler())

T = TypeVar("T")
DEFAULT_CONTEXT = 4096  # where the server does not say
LONGEST_RETRY_AFTER = 300.0  # seconds; a server that asks for more is as good as gone
# So many requests failing one after another because nothing answers is no row's fault: the run stops, resumable.
GONE_AFTER = 20
# Pieces of text, with a bound from above on the tokens each takes: see `count_tokens`.
_PIECES = re.compile(r"[A-Za-z]+|\s+|[^\x00-\x7F]|.", re.DOTALL)


class _RetryableError(Exception):
    """A failure that asking again may mend.

    Attributes:
        wait: Seconds the server asked to wait, if it did.
        unreachable: Nothing answered at all.
    """

    def __init__(self, message: str, wait: float | None = None, unreachable: bool = False) -> None:
        super().__init__(message)
        self.wait, self.unreachable = wait, unreachable


class _RefusedError(Exception):
    """A request the server understood and refused; asking again would not help."""


class ServerLanguageModel:
    """A `LanguageModel` behind an OpenAI-compatible chat server.

    Each temperature of a request is one call, for `per_temperature` answers (several where the server gives fewer).
    Calls are asynchronous, at most `concurrency` at once over all threads that use this object, and are tried again
    with growing, jittered pauses on 429 (as long as the server asks to wait), 5xx, timeouts, broken connections and
    replies that are no chat completion. What fails for good is an error of its request alone.

    Args:
        base_url: Up to and including `/v1`.
        model: The server's id of the model.
        name: What to call it in records; by default `openai:<base_url>#<model>`.
        api_key: By default `$TAMIS_API_KEY`, or else `$OPENAI_API_KEY`.
        dialect: `vllm`, `sglang`, `llama.cpp`, `openai`, `basic`, or `auto`: by what the server says of its models.
        prefill: `continue` sends the prefill as the beginning of the assistant's turn, `none` leaves it out (the
            model must write it itself), `auto` continues where the dialect can.
        concurrency: Calls under way at once.
        timeout: Seconds until an answer must be there.
        attempts: Tries of each call.
        wait_initial: Seconds before the first repetition; doubled each time.
        wait_max: Longest pause.
        context_limit: Tokens of prompt and answer together, where the server does not say.

    Attributes:
        info: What the manifest records; the revision is the server's model id.
        context_limit: Tokens of prompt and continuation together, as far as known.

    Raises:
        ModelError: The server does not answer, refuses the key, or has no such model; or an option means nothing.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        name: str = "",
        api_key: str | None = None,
        dialect: str = "auto",
        prefill: str = "auto",
        concurrency: int = 8,
        timeout: float = 120.0,
        attempts: int = 6,
        wait_initial: float = 0.5,
        wait_max: float = 30.0,
        context_limit: int | None = None,
    ) -> None:
        if concurrency < 1 or attempts < 1 or timeout <= 0:
            raise ModelError("concurrency and attempts must be 1 or more, timeout above 0")
        card = reach(base_url, model, api_key)
        self.base_url, self.model = base_url.rstrip("/"), model
        self.info = describe_card(base_url, card, name, dialect, prefill)
        self.context_limit = int(context_limit or card.get("max_model_len") or DEFAULT_CONTEXT)
        self.concurrency, self.timeout, self.attempts = concurrency, timeout, attempts
        self.wait_initial, self.wait_max = wait_initial, wait_max
        self._dialect: Dialect = DIALECTS[self.info.extra["dialect"]]
        self._prefilled = self.info.extra["prefill"] == "continue"
        self._headers = headers(api_key)
        self._loop = _BackgroundLoop()
        self._open: tuple[asyncio.AbstractEventLoop, httpx.AsyncClient, asyncio.Semaphore] | None = None
        self._unanswered = 0
        self._logprobs: bool | None = None

    @staticmethod
    def describe(
        base_url: str,
        model: str,
        *,
        name: str = "",
        api_key: str | None = None,
        dialect: str = "auto",
        prefill: str = "auto",
        **_options: object,
    ) -> ModelInfo:
        """What this model would be; asks the server for its models, within seconds.

        Raises:
            ModelError: As the constructor.
        """
        return describe_card(base_url, reach(base_url, model, api_key), name, dialect, prefill)

    def count_tokens(self, text: str) -> int:
        """Number of tokens of `text`, estimated from above for the tokenizers in use: twice too many for English."""
        count = 0
        for piece in _PIECES.findall(text):
            if piece.isascii() and piece.isalpha():
                count += math.ceil(len(piece) / 3)
            elif piece.isspace():
                count += math.ceil((len(piece) - 1) / 4) + ("\n" in piece)
            else:
                count += len(piece.encode("utf-8", "surrogatepass"))
        return count

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        on_done: Callable[[int, Generation], None] | None = None,
    ) -> list[Generation]:
        """Sample candidates for every request (see `LanguageModel.generate`).

        Args:
            requests: Any number of prompts.
            sampling: Shared by all of them. The server may know neither top-k nor a repetition penalty.
            on_done: Called with (index, generation) in the calling thread, in the order the requests are finished.

        Returns:
            One generation per request, in order. A candidate's seed is the one its call was sent with.

        Raises:
            ModelError: Settings that mean nothing.
            FatalStepError: The server has gone: many requests in a row got no answer at all.
        """
        check_sampling(sampling)
        if not requests:
            return []
        results: list[Generation | None] = [None] * len(requests)
        finished: queue.SimpleQueue[tuple[int, Generation | BaseException]] = queue.SimpleQueue()

        async def answer(index: int) -> Generation:
            return await self._answer(requests[index], sampling)

        job = self._loop.submit(_each(len(requests), answer, finished))
        job.add_done_callback(functools.partial(_ended, finished))
        try:
            for _ in requests:
                index, generation = finished.get()
                if isinstance(generation, BaseException):
                    raise generation
                results[index] = generation
                if on_done is not None:
                    on_done(index, generation)
        finally:
            job.cancel()  # nothing, where all is done; stops the rest where a callback or a call raised
        return [generation for generation in results if generation is not None]

    def offers_logprobs(self) -> bool:
        """Whether the server says how likely other tokens were; asked once, with a question of one token.

        Raises:
            ModelError: It refuses every question.
        """
        if self._logprobs is None:
            probe = GenerationRequest((Message("user", "Answer Yes or No: is water wet?"),), 0)
            (found,) = self.answer_logprobs([probe], ("Yes", "No"))
            if found.error is not None and NO_LOGPROBS not in found.error and NO_ANSWER not in found.error:
                raise ModelError(f"{self.info.name} does not answer: {found.error}")
            self._logprobs = found.error is None or NO_ANSWER in found.error
        return self._logprobs

    def answer_logprobs(
        self,
        requests: Sequence[GenerationRequest],
        answers: Sequence[str],
        on_done: Callable[[int, TokenScores], None] | None = None,
    ) -> list[TokenScores]:
        """Log-probabilities of a few answers as the next token, off the server's likeliest tokens.

        An answer that is not among these is at most as likely as the least likely of them, and is taken for that.

        Args:
            requests: n prompts.
            answers: m short answers (see `models.lm.server_scores.read_answers`).
            on_done: Called with (index, scores) in the calling thread, in the order they come.

        Returns:
            n scores of m natural log-probabilities, in order; an error of its own where the server gives none, or where
            no answer is among the likeliest tokens.
        """
        results: list[TokenScores | None] = [None] * len(requests)
        finished: queue.SimpleQueue[tuple[int, TokenScores | BaseException]] = queue.SimpleQueue()

        async def ask(index: int) -> TokenScores:
            request = requests[index]
            body = scores_body(self.model, request, self._dialect, self._prefilled)
            read = lambda reply: read_answers(reply, answers)  # noqa: E731
            try:
                scores = await self._retried(body, lambda response: _json(response, read))
            except (_RetryableError, _RefusedError) as error:
                return TokenScores((), 0, 0, self._failed(ExceptionGroup("", [error])).error)
            self._unanswered = 0
            return scores

        if requests:
            job = self._loop.submit(_each(len(requests), ask, finished))
            job.add_done_callback(functools.partial(_ended, finished))
            try:
                for _ in requests:
                    index, scores = finished.get()
                    if isinstance(scores, BaseException):
                        raise scores
                    results[index] = scores
                    if on_done is not None:
                        on_done(index, scores)
            finally:
                job.cancel()
        return [scores for scores in results if scores is not None]

    def score_tokens(self, texts: Sequence[str]) -> list[tuple[list[tuple[int, int]], FloatArray]]:
        """Not possible: chat servers do not score given text.

        Raises:
            ModelError: Always.
        """
        raise ModelError(
            f"{self.info.name} cannot score tokens; use a model in this process (smollm2, hf:<folder>)"
        )

    def close(self) -> None:
        """Close connections and the background thread; the object can be used again."""
        opened, self._open = self._open, None
        if opened is not None:
            self._loop.submit(opened[1].aclose()).result()
        self._loop.stop()

    async def _answer(self, request: GenerationRequest, sampling: Sampling) -> Generation:
        """All temperatures of a request; where one fails for good, so does the request."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._one_temperature(request, sampling, float(temperature)))
                    for temperature in sampling.temperatures
                ]
        except ExceptionGroup as errors:
            return self._failed(errors)
        self._unanswered = 0
        groups = [task.result() for task in tasks]
        candidates = tuple(candidate for group, _ in groups for candidate in group)
        return Generation(candidates, max(tokens for _, tokens in groups))

    def _failed(self, errors: ExceptionGroup) -> Generation:
        _, others = errors.split((_RetryableError, _RefusedError))
        if others is not None:
            raise others.exceptions[0]  # a mistake of ours
        first = errors.exceptions[0]
        unreachable = isinstance(first, _RetryableError) and first.unreachable
        self._unanswered = self._unanswered + 1 if unreachable else 0
        if self._unanswered >= GONE_AFTER:
            raise FatalStepError(
                f"The server at {without_secrets(self.base_url)} no longer answers ({first}); "
                "start it again and run the same command"
            )
        return Generation((), 0, str(first))

    async def _one_temperature(
        self, request: GenerationRequest, sampling: Sampling, temperature: float
    ) -> tuple[list[Candidate], int]:
        """The candidates of one temperature, and the prompt's tokens."""
        candidates: list[Candidate] = []
        prompt_tokens = 0
        while len(candidates) < sampling.per_temperature:  # some servers ignore `n` and answer once
            wanted = sampling.per_temperature - len(candidates)
            seed = derive_seed(request.seed, str(temperature), len(candidates)) & 0x7FFFFFFF
            body = write_body(
                self.model, request, sampling, temperature, wanted, seed, self._dialect, self._prefilled
            )
            choices, prompt_tokens = await self._call(body, request)
            candidates += [
                Candidate(choice.text, temperature, len(candidates) + n, seed, choice.tokens, choice.finish)
                for n, choice in enumerate(choices[:wanted])
            ]
        return candidates, prompt_tokens

    async def _call(self, body: dict[str, Any], request: GenerationRequest) -> tuple[list[Choice], int]:
        """One chat completion, tried again where that may help."""
        return await self._retried(
            body, lambda response: _json(response, lambda reply: read_reply(reply, request, self._prefilled))
        )

    async def _retried(self, body: dict[str, Any], read: Callable[[httpx.Response], T]) -> T:
        """What `read` makes of the answer to one call, which is tried again where that may help."""
        client, slots = self._connection()
        async for attempt in stamina.retry_context(
            on=_pause,
            attempts=self.attempts,
            timeout=None,
            wait_initial=self.wait_initial,
            wait_max=self.wait_max,
            wait_jitter=self.wait_initial,
        ):
            with attempt:
                async with slots:  # given back while waiting
                    return read(await _post(client, body, self.timeout))
        raise AssertionError("unreachable")

    def _connection(self) -> tuple[httpx.AsyncClient, asyncio.Semaphore]:
        """The client and the slots of the running loop, which is another one after a fork."""
        loop = asyncio.get_running_loop()
        if self._open is None or self._open[0] is not loop:
            client = httpx.AsyncClient(
                base_url=self.base_url + "/",
                headers=self._headers,
                timeout=httpx.Timeout(self.timeout, connect=min(10.0, self.timeout), pool=None),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=self.concurrency),
                trust_env=not is_local(self.base_url),
            )
            self._open = (loop, client, asyncio.Semaphore(self.concurrency))
        return self._open[1], self._open[2]


class _BackgroundLoop:
    """An event loop in a thread of its own, begun when first needed (and again after a fork)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._process = 0

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine there; returns its concurrent future."""
        with self._lock:
            if self._loop is None or self._process != os.getpid():
                self._process, self._loop = os.getpid(), asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._loop.run_forever, name="tamis-server-lm", daemon=True
                )
                self._thread.start()
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def stop(self) -> None:
        """End the thread."""
        with self._lock:
            if self._loop is not None and self._thread is not None and self._process == os.getpid():
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join()
                self._loop.close()
            self._loop = self._thread = None


async def _post(client: httpx.AsyncClient, body: dict[str, Any], timeout: float) -> httpx.Response:
    """Post one chat completion; every failure as one of our two errors."""
    try:
        # httpx's own timeout is between bytes; ours is until the whole answer is there.
        async with asyncio.timeout(timeout):
            response = await client.post("chat/completions", json=body)
    except (TimeoutError, httpx.TimeoutException) as error:
        raise _RetryableError(f"no answer within {timeout:g} s", unreachable=True) from error
    except httpx.TransportError as error:
        # The server hung up or was never there; a reply cut short comes here too.
        gone = not isinstance(error, httpx.ReadError | httpx.RemoteProtocolError)
        raise _RetryableError(f"connection failed ({one_line(error)})", unreachable=gone) from error
    if response.status_code in (408, 409, 425, 429) or response.status_code >= 500:
        raise _RetryableError(f"HTTP {response.status_code}: {_said(response)}", _retry_after(response))
    if response.status_code != httpx.codes.OK:
        raise _RefusedError(f"HTTP {response.status_code}: {_said(response)}")
    return response


def _json(response: httpx.Response, read: Callable[[Any], T]) -> T:
    """Read a reply's JSON; garbage is worth another try."""
    try:
        return read(response.json())
    except (ValueError, GarbledReplyError) as error:
        raise _RetryableError(f"the reply is garbled: {one_line(error)}") from error


async def _each(
    count: int, answer: Callable[[int], Coroutine[Any, Any, Any]], finished: queue.SimpleQueue[Any]
) -> None:
    """Answer every question, and hand each answer (or error) over as it comes."""

    async def one(index: int) -> None:
        try:
            finished.put((index, await answer(index)))
        except Exception as error:  # carried over to the calling thread, which raises it
            finished.put((index, error))

    # A task group: where this is cancelled, so are they.
    async with asyncio.TaskGroup() as group:
        for index in range(count):
            group.create_task(one(index))


def _ended(finished: queue.SimpleQueue[Any], future: Any) -> None:
    """Closed from another thread, or a mistake of ours: nobody is to wait for ever."""
    if future.cancelled():
        finished.put((-1, ModelError("closed while in use")))
    elif future.exception() is not None:
        finished.put((-1, future.exception()))


def _pause(error: Exception) -> bool | float:
    """Whether to try again; a number is how long to wait before that."""
    if not isinstance(error, _RetryableError):
        return False
    if error.wait is None:
        return True
    return error.wait + random.uniform(0, 0.1 + 0.1 * error.wait)  # not all waiting calls at the same moment


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds the server asks to wait, where it names seconds (a date is not worth its clock's error)."""
    try:
        wait = float(response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return min(wait, LONGEST_RETRY_AFTER) if wait >= 0 else None


def _said(response: httpx.Response) -> str:
    """What a refusal says, in one short line."""
    try:
        body = response.json()
        error = body.get("error", body) if isinstance(body, dict) else body
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except ValueError:
        text = response.text
    return " ".join(text.split())[:200] or response.reason_phrase
