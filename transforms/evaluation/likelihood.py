"""How surprised a language model is by texts, token by token, remembered by content."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from models.batching import slices
from models.protocols import LanguageModel
from schemas.errors import ModelError
from schemas.fingerprint import digest
from transforms.requests import identity
from transforms.shards.cache import RequestCache

FloatArray = npt.NDArray[np.float32]

_TEXTS_AT_ONCE = 64
# What is lost at most when a run is killed: some seconds of one core.
_CHARACTERS_AT_ONCE = 8_000
# Bytes, so also tokens at most: what is longer gains nothing by company.
_SHORT = 512


def surprisals_cached(
    model: LanguageModel,
    texts: Sequence[str],
    cache: RequestCache | None,
    on_progress: Callable[[int], None] | None = None,
) -> list[FloatArray]:
    """Surprisal of every token of n texts, each distinct text scored once over all runs that share the cache.

    Args:
        model: Any language model that can score tokens.
        texts: n texts of any length.
        cache: None scores without remembering.
        on_progress: Called with the number of texts done since the last call (of n).

    Returns:
        For each text a float32 array of -ln p of its tokens (nats); an empty text has none.

    Raises:
        ModelError: The model cannot score tokens, or gives what is not a number.
    """
    distinct = list(dict.fromkeys(texts))
    repeats = dict.fromkeys(distinct, 0)
    for text in texts:
        repeats[text] += 1
    tell = on_progress or (lambda n: None)
    found: dict[str, FloatArray] = {}
    keys = {text: digest("surprisal", identity(model.info), text) for text in distinct}
    if cache is not None:
        for text, answer in zip(distinct, cache.get_many([keys[t] for t in distinct]), strict=True):
            if answer is not None and len(answer) % 4 == 0:
                found[text] = np.frombuffer(answer, "<f4").astype(np.float32)
        tell(sum(repeats[t] for t in found))
    # Groups are made of all texts, not of the missing ones: a run that is resumed computes what the first would have.
    order = sorted(distinct, key=lambda t: (len(t), t))
    sizes = [max(1, len(t), _CHARACTERS_AT_ONCE // _TEXTS_AT_ONCE) for t in order]
    for part in slices(sizes, _CHARACTERS_AT_ONCE):
        asked = [t for t in order[part] if t not in found]
        if not asked:
            continue
        for text, nats in zip(asked, _score(model, asked), strict=True):
            if not np.isfinite(nats).all():
                raise ModelError(
                    f"{model.info.name}: a token's log-probability is not a number; try --dtype float32"
                )
            found[text] = nats
        if cache is not None:
            cache.put_many({keys[t]: found[t].astype("<f4").tobytes() for t in asked})
        tell(sum(repeats[t] for t in asked))
    return [found[t] for t in texts]


def _score(model: LanguageModel, texts: Sequence[str]) -> list[FloatArray]:
    """Surprisals of a group: short texts side by side where the backend can, others one by one."""
    together: Callable[[str, Sequence[str]], list[FloatArray]] | None
    together = getattr(model, "score_continuations", None)
    longest = max(len(t.encode("utf-8", "surrogatepass")) for t in texts)
    if together is not None and len(texts) > 1 and longest < min(_SHORT, model.context_limit):
        return [-np.asarray(scores, np.float32) for scores in together("", texts)]
    return [-np.asarray(scores, np.float32) for _, scores in model.score_tokens(texts)]
