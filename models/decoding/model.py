"""SoCD as a language model: a base model steered, at every token, away from what a toxic model would say."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from models.decoding.contrast import Contrast, contrast_text
from models.decoding.hook import SoCDHook, Trace
from models.decoding.pair import Pair, check_sides, load_pair
from models.decoding.socd import SoCDSettings
from models.lm.folder import describe_folder
from models.lm.local import LocalLanguageModel
from models.protocols import FloatArray, Generation, GenerationRequest, ModelInfo, Sampling
from schemas.errors import ModelError
from schemas.fingerprint import fingerprint

DEFAULTS = SoCDSettings()


class SoCDModel:
    """A `LanguageModel` that decodes contrastively (HSPD's SoCD, see `models.decoding.socd`).

    Candidates, seeds, budget and stop strings are those of `LocalLanguageModel`: with mode `prompt_only`, which loads
    no toxic model, they are the same candidates. Both models read the same prompt, once for all candidates. The order
    of a step is the paper's: repetition penalty, SoCD, temperature, top-k, top-p.

    Args:
        folder: The base model's folder.
        toxic: The toxic model's folder, of the same tokenizer; None is the base model's, with `toxic_adapter`.
        toxic_adapter: A LoRA adapter on the toxic model's base, by name or folder.
        settings: Mode, divergence, k.
        name: What to call the base model in records.
        pair: Both sides, loaded from the same folders before: models that differ in their settings share weights.
        **options: As `LocalLanguageModel`'s (`adapter` is the base side's).

    Attributes:
        info: What the manifest records; the revision covers both models, their adapters and the settings.
        context_limit: Tokens of prompt and continuation together.
        settings: As given.
        base: The base side by itself.

    Raises:
        ModelError: A folder or an adapter cannot be used, the tokenizers differ, or both sides are the same.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        toxic: str | Path | None = None,
        toxic_adapter: str | Path | None = None,
        settings: SoCDSettings = DEFAULTS,
        name: str = "",
        pair: Pair | None = None,
        **options: Any,
    ) -> None:
        self.settings = settings
        self._pair: Pair | None = None
        if settings.mode == "prompt_only":
            self.base = pair.base if pair is not None else LocalLanguageModel(folder, name=name, **options)
        else:
            if pair is None:
                pair = load_pair(folder, toxic=toxic, toxic_adapter=toxic_adapter, name=name, **options)
            self._pair = pair
            self._decoder = pair.decoder()
            self.base = pair.base
        self.context_limit = self.base.context_limit
        self.info = self.base.info
        if self._pair is not None:
            self.info = _steered(self.base.info, _describe_toxic(folder, toxic, toxic_adapter), settings)

    @staticmethod
    def describe(
        folder: str | Path,
        *,
        toxic: str | Path | None = None,
        toxic_adapter: str | Path | None = None,
        adapter: str | Path | None = None,
        settings: SoCDSettings = DEFAULTS,
        name: str = "",
    ) -> ModelInfo:
        """What this model would be, without loading weights.

        Raises:
            ModelError: As the constructor, but for what only the weights can show.
        """
        base = describe_folder(folder, name, adapter)
        if settings.mode == "prompt_only":
            return base
        other = _describe_toxic(folder, toxic, toxic_adapter)
        check_sides(folder, toxic=toxic, toxic_adapter=toxic_adapter, adapter=adapter)
        return _steered(base, other, settings)

    def count_tokens(self, text: str) -> int:
        """Number of tokens of `text`, without special tokens."""
        return self.base.count_tokens(text)

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        on_done: Callable[[int, Generation], None] | None = None,
    ) -> list[Generation]:
        """Sample steered candidates for every request (see `LanguageModel.generate`)."""
        return self._generate(requests, sampling, on_done, SoCDHook(self.settings))

    def generate_traced(
        self, requests: Sequence[GenerationRequest], sampling: Sampling
    ) -> list[tuple[Generation, tuple[Trace, ...]]]:
        """As `generate`, with where each candidate was steered: one trace a candidate, in order.

        Raises:
            ModelError: The mode is `prompt_only`, which steers nowhere.
        """
        self._need_pair()
        hook = SoCDHook(self.settings, record=True)
        generations = self._generate(requests, sampling, None, hook)
        return [(g, tuple(hook.traces[c.seed].cut(c.tokens) for c in g.candidates)) for g in generations]

    def token_texts(self, tokens: Sequence[int]) -> list[str]:
        """What each token adds to the text of those before it; empty where a character is not whole yet."""
        pieces: list[str] = []
        text = ""
        for end in range(1, len(tokens) + 1):
            now = str(self.base.tokenizer.decode(tokens[:end], skip_special_tokens=False))
            whole = end == len(tokens) or not now.endswith("\N{REPLACEMENT CHARACTER}")
            pieces.append(now[len(text) :] if whole else "")
            text = now if whole else text
        return pieces

    def score_tokens(self, texts: Sequence[str]) -> list[tuple[list[tuple[int, int]], FloatArray]]:
        """The base side's teacher forcing (see `LanguageModel.score_tokens`)."""
        return self.base.score_tokens(texts)

    def contrast(
        self, texts: Sequence[str], prompts: Sequence[GenerationRequest] | None = None
    ) -> list[Contrast]:
        """Where the two models part along given texts, under teacher forcing.

        Args:
            texts: Any number, of any length.
            prompts: For each text the prompt it continues; None reads it as a text of its own.

        Returns:
            One contrast a text.

        Raises:
            ModelError: The mode is `prompt_only`; the tokenizer gives no offsets; a prompt leaves no room.
        """
        pair = self._need_pair()
        starts: Sequence[Sequence[int] | None] = [None] * len(texts)
        if prompts is not None:
            starts = [self.base.encode(prompt) for prompt in prompts]
        contrasts = []
        for text, start in zip(texts, starts, strict=True):
            with self.base.exclusive():
                contrasts.append(contrast_text(pair, text, self.settings, start))
        return contrasts

    def _generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        on_done: Callable[[int, Generation], None] | None,
        hook: SoCDHook,
    ) -> list[Generation]:
        if self._pair is None:
            return self.base.generate(requests, sampling, on_done)
        return self.base.generate(requests, sampling, on_done, hook=hook, decoder=self._decoder)

    def _need_pair(self) -> Pair:
        if self._pair is None:
            raise ModelError("mode prompt_only loads no toxic model, and has nothing to contrast with")
        return self._pair


def _describe_toxic(
    folder: str | Path, toxic: str | Path | None, toxic_adapter: str | Path | None
) -> ModelInfo:
    return describe_folder(toxic if toxic is not None else folder, "", toxic_adapter)


def _steered(base: ModelInfo, toxic: ModelInfo, settings: SoCDSettings) -> ModelInfo:
    """The base model's information with what SoCD adds to it."""
    decoding = settings.relevant()
    return dataclasses.replace(
        base,
        name=f"{base.name}~{toxic.name.removeprefix('hf:')}",
        revision=fingerprint("socd", base.revision, toxic.revision, json.dumps(decoding, sort_keys=True))[
            :16
        ],
        extra={**base.extra, "decoding": decoding, "toxic": toxic.name, "toxic_revision": toxic.revision},
    )
