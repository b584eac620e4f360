"""Embedding: a vector beside every row, and what was done to get it; nothing else changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from models.encoder_folder import Kind
from models.encoders import Embedded, Long, SentenceEncoder
from schemas import flight
from schemas.errors import ModelError
from schemas.fingerprint import digest
from transforms.embed.text import TextTemplate
from transforms.embed.vectors import EMPTY, INFO_SUFFIX, INFO_TYPE, NULL, OK, SCALE_SUFFIX, Store, to_arrow
from transforms.requests import identity
from transforms.shards.cache import RequestCache
from transforms.shards.steps import StepContext

# A unit's texts are embedded longest first, so many characters at a time, and each part is of like length.
_PART_CHARACTERS = 200_000
# What took longer than this to compute is written down before the unit is done, and never computed again.
CHECKPOINT_SECONDS = 5.0
TRUNCATED, MEAN = "truncated", "mean"


@dataclass(frozen=True)
class EmbedOptions:
    """What is done to a text; all of it decides the numbers.

    Attributes:
        prompt: Put before every text.
        kind: `document` or `query`.
        long: `truncate` at the model's limit, or `mean` of windows.
        normalize: Unit length; None as the model's configuration says.
        dimensions: Keep so many numbers of each vector; None keeps all.
        store: Type of the stored numbers.
    """

    prompt: str = ""
    kind: Kind = "document"
    long: Long = "truncate"
    normalize: bool | None = None
    dimensions: int | None = None
    store: Store = "float32"


def embed_text(
    batch: pa.RecordBatch,
    text: pa.Array | TextTemplate,
    encoder: SentenceEncoder,
    options: EmbedOptions = EmbedOptions(),
    *,
    attribute: str = "embedding",
    cache: RequestCache | None = None,
    count: Callable[[str, int], None] = lambda name, amount: None,
    pulse: Callable[[], None] = lambda: None,
) -> pa.RecordBatch:
    """Embed the text of every row.

    Args:
        batch: n rows in flight.
        text: n strings, or how they are made of the batch's columns.
        encoder: Any encoder.
        options: What is done to a text.
        attribute: Name of the attribute the vectors go to; `<name>_info` says what was done, `<name>_scale` holds the
            scales of int8 vectors.
        cache: Where vectors are kept that took long, so that a killed run does not compute them again.
        count: Called with (counter, amount).
        pulse: Called now and then while it works.

    Returns:
        The batch with the attributes set. A blank text has no vector (status `empty`), nor has one whose vector is null
        (`null`); a row whose vector is not finite is dead.

    Raises:
        ModelError: Most vectors are not finite: the model, and no row, is at fault.
    """
    texts = (text.render(batch) if isinstance(text, TextTemplate) else text).to_pylist()
    filled = [i for i, t in enumerate(texts) if t and not t.isspace()]
    places: dict[str, int] = {}
    where = np.array([places.setdefault(texts[i], len(places)) for i in filled], np.int64)
    found = _embed_distinct(list(places), encoder, options, cache, count, pulse)
    whole = _spread(found, np.array(filled, np.int64), where, len(texts))
    empty = np.ones(len(texts), bool)
    empty[filled] = False
    finite: npt.NDArray[np.bool_] = np.asarray(np.isfinite(whole.vectors).all(axis=1))
    broken = ~finite
    if broken.sum() > max(1, len(filled) // 2):
        raise ModelError(f"{encoder.info.name} gives vectors that are not finite; try --dtype float32")
    if broken.any():
        whole.vectors[broken] = 0
        errors = ["the model's vector is not finite" if b else None for b in broken.tolist()]
        batch = flight.kill_rows(batch, errors, stage="EmbedText")
    null = ~empty & ~broken & (whole.norms == 0)
    missing = empty | null | broken
    status = np.full(len(texts), OK, object)
    status[whole.windows > 1] = MEAN
    status[whole.truncated] = TRUNCATED
    status[null] = NULL
    status[empty] = EMPTY
    values, scales = to_arrow(whole.vectors, missing, options.store)
    batch = flight.set_attribute(batch, attribute, values)
    batch = flight.set_attribute(batch, attribute + INFO_SUFFIX, _info(status, whole, empty))
    if scales is not None:
        batch = flight.set_attribute(batch, attribute + SCALE_SUFFIX, scales)
    for name in (OK, MEAN, TRUNCATED, NULL, EMPTY):
        count(f"embed.{name}", int((status[~broken] == name).sum()))
    count("embed.windows", int(whole.windows.sum()))
    count("embed.duplicates", len(filled) - len(places))
    return batch


def _embed_distinct(
    texts: Sequence[str],
    encoder: SentenceEncoder,
    options: EmbedOptions,
    cache: RequestCache | None,
    count: Callable[[str, int], None],
    pulse: Callable[[], None],
) -> Embedded:
    """Embed distinct texts, longest first; what is in the cache is taken from there."""
    keys = [_key(encoder, options, t) for t in texts] if cache is not None else []
    stored = cache.get_many(keys) if cache is not None else [None] * len(texts)
    width = 4 * (options.dimensions or encoder.dimension) + _TAIL.itemsize
    known = [i for i, s in enumerate(stored) if s is not None and len(s) == width]
    todo = sorted(set(range(len(texts))) - set(known), key=lambda i: -len(texts[i]))
    out = _blank(len(texts), options.dimensions or encoder.dimension)
    for i in known:
        _put(out, np.array([i]), _unpack(stored[i] or b""))
    count("embed.from_cache", len(known))
    waiting: dict[bytes, bytes] = {}
    saved = time.monotonic()
    for part in _parts(todo, texts):
        done = encoder.embed(
            [texts[i] for i in part],
            prompt=options.prompt,
            kind=options.kind,
            long=options.long,
            normalize=options.normalize,
            dimensions=options.dimensions,
        )
        _put(out, np.array(part), done)
        count("embed.tokens_in", int(done.tokens.sum()))
        if cache is not None:
            waiting |= {keys[i]: _pack(done, j) for j, i in enumerate(part)}
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                cache.put_many(waiting)
                waiting, saved = {}, time.monotonic()
        pulse()
    return out


def _parts(order: Sequence[int], texts: Sequence[str]) -> list[list[int]]:
    """Neighbours in order, some characters at a time."""
    parts: list[list[int]] = []
    size = _PART_CHARACTERS
    for i in order:
        if size >= _PART_CHARACTERS:
            parts.append([])
            size = 0
        parts[-1].append(i)
        size += len(texts[i]) + 16
    return parts


def _blank(n: int, dimension: int) -> Embedded:
    return Embedded(
        np.zeros((n, dimension), np.float32),
        np.zeros(n, np.int64),
        np.zeros(n, np.int64),
        np.zeros(n, bool),
        np.zeros(n, np.float32),
    )


def _put(out: Embedded, rows: npt.NDArray[np.int64], given: Embedded) -> None:
    for name in ("vectors", "tokens", "windows", "truncated", "norms"):
        getattr(out, name)[rows] = getattr(given, name)


def _spread(found: Embedded, filled: npt.NDArray[np.int64], where: npt.NDArray[np.int64], n: int) -> Embedded:
    """Vectors of distinct texts to the rows that hold them."""
    out = _blank(n, found.vectors.shape[1])
    if len(filled):
        _put(
            out,
            filled,
            Embedded(
                found.vectors[where],
                found.tokens[where],
                found.windows[where],
                found.truncated[where],
                found.norms[where],
            ),
        )
    return out


def _info(status: npt.NDArray[Any], whole: Embedded, empty: npt.NDArray[np.bool_]) -> pa.Array:
    return pa.StructArray.from_arrays(
        [
            pa.array(status.tolist(), pa.string()),
            pa.array(whole.tokens.astype(np.int32)),
            pa.array(whole.windows.astype(np.int32)),
            pa.array(whole.norms, mask=empty),
        ],
        fields=list(INFO_TYPE),
    )


_TAIL = np.dtype([("tokens", "<i8"), ("windows", "<i8"), ("norm", "<f4"), ("truncated", "?")])


def _pack(done: Embedded, i: int) -> bytes:
    tail = np.array((done.tokens[i], done.windows[i], done.norms[i], done.truncated[i]), _TAIL)
    return done.vectors[i].astype("<f4").tobytes() + tail.tobytes()


def _unpack(stored: bytes) -> Embedded:
    split = len(stored) - _TAIL.itemsize
    tail = np.frombuffer(stored[split:], _TAIL)
    return Embedded(
        np.frombuffer(stored[:split], "<f4")[None],
        tail["tokens"],
        tail["windows"],
        tail["truncated"],
        tail["norm"],
    )


def _key(encoder: SentenceEncoder, options: EmbedOptions, text: str) -> bytes:
    said = (options.prompt, options.kind, options.long, str(options.normalize), str(options.dimensions))
    return digest("embed", identity(encoder.info), encoder.variant, *said, text)


@dataclass(frozen=True)
class EmbedText:
    """Step: `embed_text` with an encoder found by name.

    Attributes:
        encoder: Its name (`tamis models list`).
        options: Options of the encoder, as pairs (device, dtype, threads, token_budget, pooling).
        embed: What is done to a text.
        text: How the text is made; empty means the text column as it stands.
        attribute: Where the vectors go.
        remember: Whether to write down, while a unit is at work, what took long.
    """

    encoder: str = "minilm"
    options: tuple[tuple[str, Any], ...] = ()
    embed: EmbedOptions = EmbedOptions()
    text: str = ""
    attribute: str = "embedding"
    remember: bool = True
    label: str = "EmbedText"

    def setup(self, context: StepContext) -> None:
        """Load the encoder."""
        self._encoder()

    def __call__(self, batch: pa.RecordBatch, context: StepContext) -> pa.RecordBatch:
        """Embed a batch."""
        return embed_text(
            batch,
            TextTemplate(self.text or "{" + context.text_column + "}"),
            self._encoder(),
            self.embed,
            attribute=self.attribute,
            cache=context.cache if self.remember else None,
            count=context.count,
            pulse=context.heartbeat,
        )

    def _encoder(self) -> SentenceEncoder:
        from models.registry import load

        return load("encoder", self.encoder, **dict(self.options))  # type: ignore[return-value]
