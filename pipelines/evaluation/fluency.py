"""FL: whether an output is an acceptable sentence, by a language model's surprisal or by a classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from models.metrics.acceptability import Acceptability, fit_acceptability, surprisal_features
from models.protocols import LanguageModel, ModelInfo
from models.scorers.fluency import load_fluency_scorer
from pipelines.evaluation.progress import counting
from pipelines.evaluation.tables import read_table
from schemas.errors import InputError, ModelError
from schemas.fingerprint import derive_seed, digest
from transforms.evaluation.corruptions import corrupt
from transforms.evaluation.likelihood import surprisals_cached
from transforms.requests import identity
from transforms.shards.cache import RequestCache

Array = npt.NDArray[np.float64]
Tell = Callable[[int], None]

SHIPPED = Path(__file__).resolve().parents[2] / "models" / "metrics" / "acceptability_smollm2.json"
MOST_SENTENCES = 3000  # to calibrate on: beyond, eleven numbers learn nothing more
_HELD = 0.25
_ACCEPTABLE = ("acceptable", "grammatical", "fluent", "label_1", "1")


@dataclass(frozen=True)
class Fluency:
    """A measure of acceptability.

    Attributes:
        words: What it is, in a sentence for a page.
        threshold: Score from which an output counts as fluent.
        info: Its model; None where there is none.
        record: For `results.json`.
        compute: Scores n texts.
    """

    words: str
    threshold: float
    info: ModelInfo | None
    compute: Callable[[Sequence[str], Tell], Array]
    record: dict[str, Any] = field(default_factory=dict)

    def score(self, texts: Sequence[str], tell: Tell = lambda n: None) -> Array:
        """Acceptability of n texts, float64 in [0, 1].

        Args:
            texts: None of them empty.
            tell: Called with how many more are done.
        """
        return self.compute(texts, tell) if texts else np.zeros(0)


def load_fluency(
    name: str,
    *,
    cache: RequestCache | None,
    text: str | None = None,
    label: str | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    progress: str = "auto",
    storage_options: Mapping[str, Any] | None = None,
) -> Fluency:
    """Load a measure by name.

    Args:
        name: `lm:MODEL` (surprisal under a language model together with word classes, calibrated on whole and broken
            sentences), `ngram` (word classes alone: next to no cost), `hf:FOLDER` (a classifier trained on judgments of
            acceptability, such as CoLA's), or `none` (every output is fluent).
        cache: Where scores are remembered.
        text: For `lm:`: whole sentences to calibrate on; None takes what was fitted for the embedded model.
        label: For `hf:`: the label that means acceptable; by default one called so, or the second of two.
        seed: Of the broken sentences.
        options: `device`, `dtype`, `threads`.
        progress: As in `counting`.
        storage_options: fsspec options of `text`.

    Raises:
        ModelError: No such model, or nothing to calibrate it with.
        InputError: No such kind of measure.
    """
    kind, _, rest = name.partition(":")
    how = dict(options or {})
    if name == "none":
        return Fluency("FL is not measured: it is 1 for every output with something left.", 0.0, None, _ones)
    if name == "ngram":
        return _by_word_classes()
    if kind == "lm" and rest:
        return _by_surprisal(rest, cache, text, seed, how, progress, storage_options)
    if kind == "hf" and rest:
        how.pop("dtype", None)
        return _by_classifier(name, cache, label, how)
    raise InputError(f"--fluency {name}: pass lm:MODEL, ngram, hf:FOLDER or none")


def calibrate(
    model: LanguageModel,
    sentences: Sequence[str],
    *,
    cache: RequestCache | None,
    seed: int = 0,
    source: str = "",
    tell: Tell = lambda n: None,
) -> Acceptability:
    """Fit acceptability under a language model on whole sentences and on the same ones broken.

    A quarter of the sentences, by a hash of their content, is held out for the threshold and for what is said of its
    quality.

    Args:
        model: Any language model that scores tokens.
        sentences: Whole sentences, as people write them where the outputs come from.
        cache: Where surprisals are remembered.
        seed: Of the draws.
        source: Named in the record.
        tell: Called with how many more texts are scored.

    Raises:
        ModelError: Too few sentences.
    """
    chosen = sorted(
        dict.fromkeys(s.strip() for s in sentences if s.strip()),
        key=lambda s: derive_seed(seed, "fluency", s),
    )
    chosen = chosen[:MOST_SENTENCES]
    pool = sorted({w for s in chosen for w in s.split() if w.isalpha()})
    kinds: dict[bool, tuple[list[str], list[str]]] = {False: ([], []), True: ([], [])}
    for sentence in chosen:
        whole, broken = kinds[derive_seed(seed, "held", sentence) / 2**63 < _HELD]
        whole.append(sentence)
        found = corrupt(sentence, seed, pool)
        broken.extend([found[0]] if found else [])
    return fit_to(model, *kinds[False], held=kinds[True], cache=cache, source=source, seed=seed, tell=tell)


def fit_to(
    model: LanguageModel,
    whole: Sequence[str],
    broken: Sequence[str],
    *,
    held: tuple[Sequence[str], Sequence[str]],
    cache: RequestCache | None,
    source: str = "",
    seed: int = 0,
    tell: Tell = lambda n: None,
) -> Acceptability:
    """As `calibrate`, on given sentences.

    Args:
        model: Any language model that scores tokens.
        whole: Whole sentences.
        broken: Broken ones.
        held: Whole and broken ones for the threshold and the quality.
        cache: Where surprisals are remembered.
        source: Named in the record.
        seed: Likewise.
        tell: Called with how many more texts are scored.
    """
    features = [_features(model, texts, cache, tell) for texts in (whole, broken, *held)]
    return fit_acceptability(
        features[0],
        features[1],
        held_whole=features[2],
        held_broken=features[3],
        of={
            "model": model.info.name,
            "revision": model.info.revision,
            "word_classes": load_fluency_scorer().info.revision,
            "sentences": source,
            "seed": seed,
        },
    )


def _by_surprisal(
    name: str,
    cache: RequestCache | None,
    text: str | None,
    seed: int,
    options: dict[str, Any],
    progress: str,
    storage_options: Mapping[str, Any] | None,
) -> Fluency:
    from models import registry

    info = registry.describe("lm", name)
    fitted: Acceptability | None = None
    if text is None:
        fitted = Acceptability.load(SHIPPED)
        expected = (info.revision, load_fluency_scorer().info.revision)
        if (fitted.of.get("revision"), fitted.of.get("word_classes")) != expected:
            raise ModelError(
                f"--fluency lm:{name}: nothing says what is surprising to this model; pass --fluency-text FILE with whole "
                "sentences to calibrate it on"
            )
    model = registry.load("lm", name, **options)
    if fitted is None:
        table = read_table(str(text), storage_options)
        column = table.first_of(("text", "sentence", "neutral"), "the sentences (call it `text`)")
        sentences = [s for s in table.texts(column) if s]
        with counting(
            "fluency: sentences to calibrate on", 2 * min(len(sentences), MOST_SENTENCES), progress
        ) as tell:
            fitted = calibrate(model, sentences, cache=cache, seed=seed, source=str(text), tell=tell)
    kept = fitted

    def compute(texts: Sequence[str], tell: Tell) -> Array:
        return kept.score(_features(model, texts, cache, tell))

    quality = kept.quality
    words = f"FL is 1 where {name} and word classes find a whole sentence rather than a broken one{_how_good(quality)}"
    record = {"quality": quality, "of": kept.of}
    return Fluency(words, kept.threshold, model.info, compute, record)


def _by_word_classes() -> Fluency:
    scorer = load_fluency_scorer()

    def compute(texts: Sequence[str], tell: Tell) -> Array:
        tell(len(texts))
        return np.asarray(scorer.score(texts)[:, 0], np.float64)

    quality = scorer.weights.quality
    words = f"FL is 1 where word classes follow each other as in a whole sentence rather than a broken one{_how_good(quality)}"
    return Fluency(words, scorer.weights.threshold, scorer.info, compute, {"quality": quality})


def _how_good(quality: Mapping[str, Any]) -> str:
    return (
        f": the threshold passes {100 * quality['whole_passed']:.0f} % of whole sentences and refuses "
        f"{100 * quality['broken_refused']:.0f} % of those broken on purpose (AUC {quality['auc']:.2f}). A rough measure."
    )


def _by_classifier(
    name: str, cache: RequestCache | None, label: str | None, options: dict[str, Any]
) -> Fluency:
    from models import registry
    from models.folders import read_config, resolve

    folder, _ = resolve(name.partition(":")[2])
    chosen = label or _acceptable_label(read_config(folder), name)
    scorer = registry.load("scorer", name, label=chosen, **options)

    def compute(texts: Sequence[str], tell: Tell) -> Array:
        distinct = list(dict.fromkeys(texts))
        keys = {t: digest("acceptability", identity(scorer.info), chosen, t) for t in distinct}
        found: dict[str, float] = {}
        if cache is not None:
            for t, answer in zip(distinct, cache.get_many([keys[t] for t in distinct]), strict=True):
                if answer is not None and len(answer) == 4:
                    found[t] = float(np.frombuffer(answer, "<f4")[0])
        missing = [t for t in distinct if t not in found]
        if missing:
            scores = scorer.score(missing)[:, 0].astype("<f4")
            found |= dict(zip(missing, scores.tolist(), strict=True))
            if cache is not None:
                cache.put_many({keys[t]: s.tobytes() for t, s in zip(missing, scores, strict=True)})
        tell(len(texts))
        return np.array([found[t] for t in texts])

    words = f"FL is 1 where {name} finds the output acceptable (label {chosen}, 0.5 or more)."
    return Fluency(words, 0.5, scorer.info, compute, {"label": chosen})


def _acceptable_label(config: Mapping[str, Any], name: str) -> str:
    names = [str(v) for v in (config.get("id2label") or {}).values()] or ["LABEL_0", "LABEL_1"]
    if len(names) == 1:
        return names[0]
    for wanted in _ACCEPTABLE:
        for label in names:
            if label.strip().lower() == wanted:
                return label
    raise ModelError(
        f"--fluency {name}: which of its labels means acceptable? pass --fluency-label, one of {', '.join(names)}"
    )


def _features(model: LanguageModel, texts: Sequence[str], cache: RequestCache | None, tell: Tell) -> Array:
    """What is known of n texts: the shape of their surprisal, and how their word classes follow each other."""
    if not texts:
        return np.zeros((0, 1))
    # With its end: how a model takes to a line break says whether something had to follow.
    nats = surprisals_cached(model, [f"{' '.join(t.split())}\n" for t in texts], cache, tell)
    return np.column_stack([surprisal_features(nats), load_fluency_scorer().logits(texts)])


def _ones(texts: Sequence[str], tell: Tell) -> Array:
    tell(len(texts))
    return np.ones(len(texts))
