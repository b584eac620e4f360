"""Asking a model through the request cache: by content, each distinct question once, answers kept as they come.

Keys hold everything an answer depends on and nothing else (no row numbers, no shards, no thresholds), so answers
survive a crash, a resharding and a changed threshold. Errors are never stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import orjson

from models.protocols import (
    Candidate,
    Encoder,
    Generation,
    GenerationRequest,
    LanguageModel,
    ModelInfo,
    Sampling,
    ToxicityScorer,
)
from schemas.fingerprint import digest
from transforms.shards.cache import RequestCache

FloatArray = npt.NDArray[np.float32]

# What `ModelInfo.extra` may hold that changes an answer; device and thread count do not (but for the last bits).
_DECIDING_EXTRAS = ("adapter", "dtype", "decoding", "quantization", "label")


@dataclass
class Usage:
    """What a call of `generate_cached` took.

    Attributes:
        requests: Requests passed in.
        asked: Distinct requests the model was asked now.
        cache_hits: Distinct requests answered by the cache.
        errors: Requests that failed.
        tokens_in: Prompt tokens of what was asked now.
        tokens_out: Candidate tokens of what was asked now.
    """

    requests: int = 0
    asked: int = 0
    cache_hits: int = 0
    errors: int = 0
    tokens_in: int = 0
    tokens_out: int = 0


def score_cached(scorer: ToxicityScorer, texts: Sequence[str], cache: RequestCache | None) -> FloatArray:
    """Score texts, each distinct one at most once over all runs that share the cache.

    Args:
        scorer: Any scorer; its `info.tag` stands in the key.
        texts: n texts.
        cache: None scores without remembering (equal texts of one call are still scored once).

    Returns:
        float32 array of shape (n, len(scorer.labels)).
    """
    width = len(scorer.labels)
    if not texts:
        return np.empty((0, width), np.float32)
    positions: dict[str, int] = {}
    where = np.array([positions.setdefault(t, len(positions)) for t in texts], np.int64)
    distinct = list(positions)
    scores = np.zeros((len(distinct), width), np.float32)
    missing = list(range(len(distinct)))
    keys: list[bytes] = []
    if cache is not None:
        head = ("score", identity(scorer.info), ",".join(scorer.labels))
        keys = [digest(*head, t) for t in distinct]
        missing = []
        for i, answer in enumerate(cache.get_many(keys)):
            if answer is not None and len(answer) == 4 * width:
                scores[i] = np.frombuffer(answer, "<f4")
            else:
                missing.append(i)
    if missing:
        scores[missing] = scorer.score([distinct[i] for i in missing])
        if cache is not None:
            cache.put_many({keys[i]: scores[i].astype("<f4").tobytes() for i in missing})
    return scores[where]


def similarity_cached(
    encoder: Encoder, pairs: Sequence[tuple[str, str]], cache: RequestCache | None
) -> FloatArray:
    """Cosine similarity of pairs of texts; each distinct text is embedded once, in one call.

    Args:
        encoder: Any encoder of unit vectors.
        pairs: n pairs (source, replacement).
        cache: None embeds without remembering.

    Returns:
        float32 array of shape (n,), in [-1, 1].
    """
    if not pairs:
        return np.empty(0, np.float32)
    positions: dict[tuple[str, str], int] = {}
    where = np.array([positions.setdefault(p, len(positions)) for p in pairs], np.int64)
    distinct = list(positions)
    cosines = np.zeros(len(distinct), np.float32)
    missing = list(range(len(distinct)))
    keys: list[bytes] = []
    if cache is not None:
        tag = identity(encoder.info)
        keys = [digest("similarity", tag, a, b) for a, b in distinct]
        missing = []
        for i, answer in enumerate(cache.get_many(keys)):
            if answer is not None and len(answer) == 4:
                cosines[i] = np.frombuffer(answer, "<f4")[0]
            else:
                missing.append(i)
    if missing:
        texts: dict[str, int] = {}
        rows = [[texts.setdefault(t, len(texts)) for t in distinct[i]] for i in missing]
        vectors = encoder.encode(list(texts))
        left, right = np.array(rows).T
        cosines[missing] = np.clip((vectors[left] * vectors[right]).sum(axis=1), -1, 1)
        if cache is not None:
            cache.put_many({keys[i]: cosines[i].astype("<f4").tobytes() for i in missing})
    return cosines[where]


def generate_cached(
    model: LanguageModel,
    requests: Sequence[GenerationRequest],
    sampling: Sampling,
    cache: RequestCache | None,
    on_progress: Callable[[], None] | None = None,
) -> tuple[list[Generation], Usage]:
    """Generate for every request what the cache does not hold; each answer is stored the moment it is done.

    Args:
        model: Any language model.
        requests: n requests; equal ones are asked once.
        sampling: Shared by all of them, and part of the key.
        cache: None asks without remembering.
        on_progress: Called after every finished request, perhaps from another thread.

    Returns:
        One generation per request, in order (those with `error` set are not stored), and what it took.
    """
    usage = Usage(requests=len(requests))
    keys = [request_key(model.info, r, sampling) for r in requests]
    distinct: dict[bytes, GenerationRequest] = dict(zip(keys, requests, strict=True))
    answers: dict[bytes, Generation] = {}
    if cache is not None:
        for key, stored in zip(distinct, cache.get_many(list(distinct)), strict=True):
            generation = _decode(stored) if stored is not None else None
            if generation is not None:
                answers[key] = generation
    usage.cache_hits = len(answers)
    missing = [k for k in distinct if k not in answers]
    stored_now: set[bytes] = set()

    def keep(i: int, generation: Generation) -> None:
        if cache is not None and generation.error is None:
            cache.put_many({missing[i]: _encode(generation)})
            stored_now.add(missing[i])
        if on_progress is not None:
            on_progress()

    if missing:
        generations = model.generate([distinct[k] for k in missing], sampling, keep)
        for i, (key, generation) in enumerate(zip(missing, generations, strict=True)):
            if key not in stored_now and cache is not None and generation.error is None:
                cache.put_many({missing[i]: _encode(generation)})  # a backend that did not call back
            answers[key] = _whole(generation)
            usage.tokens_in += generation.prompt_tokens
            usage.tokens_out += sum(c.tokens for c in generation.candidates)
    usage.asked = len(missing)
    out = [answers[k] for k in keys]
    usage.errors = sum(g.error is not None for g in out)
    return out, usage


def request_key(info: ModelInfo, request: GenerationRequest, sampling: Sampling) -> bytes:
    """The cache key of a request: model, turns, prefill, stop strings, sampling and seed; nothing else."""
    body = {
        "messages": [[m.role, m.content] for m in request.messages],
        "prefill": request.prefill,
        "stop": request.stop,
        "sampling": asdict(sampling),
        "seed": request.seed,
    }
    if request.schema:  # only then, so that answers of before there were schemas keep their keys
        body["schema"] = request.schema
    if request.form is not None:
        body["form"] = {type(request.form).__name__: asdict(request.form)}
    return digest("generate", identity(info), orjson.dumps(_whole_strings(body), option=orjson.OPT_SORT_KEYS))


def identity(info: ModelInfo) -> str:
    """What tells a model from every other in a cache key: its tag and the settings that change its answers.

    A model in a folder is known by its revision (its weights' hash, or a hub commit) and not by where the folder lies, so
    that what was paid for is found again after the folder has moved. A server's model is known by its address and name.
    """
    name, extra = info.name, dict(info.extra)
    if "/" in name and not name.startswith("openai:"):
        name = info.kind
        if extra.get("adapter"):
            extra["adapter"] = extra.get("adapter_revision", extra["adapter"])
    extras = [f"{key}={extra[key]}" for key in _DECIDING_EXTRAS if extra.get(key)]
    return ";".join([f"{name}@{info.revision}", *extras])


def _encode(generation: Generation) -> bytes:
    body = _whole(generation)
    return orjson.dumps(
        {"prompt_tokens": body.prompt_tokens, "candidates": [asdict(c) for c in body.candidates]},
        option=orjson.OPT_SERIALIZE_NUMPY,
    )


def _decode(stored: bytes) -> Generation | None:
    try:
        body = orjson.loads(stored)
        candidates = tuple(Candidate(**c) for c in body["candidates"])
        return Generation(candidates, prompt_tokens=int(body["prompt_tokens"]))
    except (ValueError, KeyError, TypeError):
        return None  # written by another version, or torn: ask again


def _whole(generation: Generation) -> Generation:
    """Replace lone surrogates (half an emoji, which a server can send in JSON) by U+FFFD: Arrow holds none."""
    if all(c.text.isascii() or _is_utf8(c.text) for c in generation.candidates):
        return generation
    clean = tuple(Candidate(**{**asdict(c), "text": _utf8(c.text)}) for c in generation.candidates)
    return Generation(clean, generation.prompt_tokens, generation.error)


def _whole_strings(value: object) -> object:
    if isinstance(value, str):
        return value if value.isascii() or _is_utf8(value) else _utf8(value)
    if isinstance(value, (list, tuple)):
        return [_whole_strings(v) for v in value]
    if isinstance(value, dict):
        return {k: _whole_strings(v) for k, v in value.items()}
    return value


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _utf8(text: str) -> str:
    # By way of UTF-16, so that the two halves of one emoji become that emoji.
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
