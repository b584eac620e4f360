"""Models by name: what a name means, what it would be (for manifests), and the part itself, once a process.

    scorer    lexicon   lexicon:<words.txt>   linear   jigsaw-bilstm (six-label)   ngram:<folder>
              detoxify:original|unbiased|multilingual|original-small|unbiased-small   hf:<folder or id>
              max:<scorer>,<scorer>,...   mean:<scorer>,<scorer>,...
    encoder   minilm    hf:<folder or id>
    lm        smollm2   hf:<folder or id>   <folder>   openai:<base url>#<model>
    tagger    hf:<folder or id>   <folder>

Nothing is registered at import: a name is resolved when it is asked for, and only then is its backend
imported. `describe` answers before any work starts whether a model can be had, and says in one line what to
do if not.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

from models import store
from models.protocols import Encoder, LanguageModel, ModelInfo, SpanFinder, ToxicityScorer
from schemas.errors import ModelError

Kind = Literal["scorer", "encoder", "lm", "tagger"]
KINDS = ("scorer", "encoder", "lm", "tagger")
# Options of how to run, not of what: they change speed and rounding only.
RUNNING = ("threads", "device", "dtype", "token_budget")
# Keywords of models.lm.local.LocalLanguageModel, listed so that describing one does not import torch.
LOCAL_LM_OPTIONS = (
    "adapter",
    "dtype",
    "device",
    "threads",
    "batch_rows",
    "context_limit",
    "merge_adapter",
    "fast",
)

SOCD_OPTIONS = ("socd", "toxic", "toxic_adapter")


@dataclass(frozen=True)
class NameRow:
    """A line of `tamis models list`.

    Attributes:
        name: What to pass; for a family, with its variable part in angle brackets.
        kind: `scorer`, `encoder`, `lm` or `tagger`.
        state: `built in`, `ready`, `not pulled` or `on request`.
        licence: SPDX id where known.
        size_mb: Download size; 0 where there is none or it varies.
        source: Package, or where it comes from.
        summary: One line.
    """

    name: str
    kind: str
    state: str
    licence: str
    size_mb: int
    source: str
    summary: str


class _Part(NamedTuple):
    """A resolved name: what it would be, and how it is loaded."""

    describe: Callable[[], ModelInfo]
    load: Callable[[], Any]


_parts: dict[tuple[str, str, tuple[tuple[str, Any], ...]], Any] = {}
_locks: dict[tuple[str, str, tuple[tuple[str, Any], ...]], threading.Lock] = {}
_guard = threading.Lock()


@overload
def load(kind: Literal["scorer"], name: str, **options: Any) -> ToxicityScorer: ...
@overload
def load(kind: Literal["encoder"], name: str, **options: Any) -> Encoder: ...
@overload
def load(kind: Literal["lm"], name: str, **options: Any) -> LanguageModel: ...
@overload
def load(kind: Literal["tagger"], name: str, **options: Any) -> SpanFinder: ...
def load(kind: str, name: str, **options: Any) -> Any:
    """Load a model part, once a process for each kind, name and set of options.

    Several threads that ask for the same part get the same one; parts of different names load side by side.

    Args:
        kind: `scorer`, `encoder`, `lm` or `tagger`.
        name: See the module's head; aliases are resolved.
        **options: Hashable options of the backend (`threads=`, `dtype=`, `device=`, `adapter=`,
            `checkpoint=`, ...).

    Raises:
        ModelError: Unknown kind, name or option; weights or a library missing. One line says what to do.
    """
    name = store.canonical(name)

    def make() -> Any:
        part = _resolve(kind, name, options)
        with _missing_libraries(name):
            part.describe()  # what is wrong with the files is said before minutes of loading
            return part.load()

    return _once(kind, name, options, make)


def _once(kind: str, name: str, options: dict[str, Any], make: Callable[[], Any]) -> Any:
    """What `make` gives, made once a process for each kind, name and set of options."""
    key = (kind, name, tuple(sorted(options.items())))
    with _guard:
        lock = _locks.setdefault(key, threading.Lock())
    with lock:
        if key not in _parts:
            _parts[key] = make()
        return _parts[key]


def describe(kind: str, name: str, **options: Any) -> ModelInfo:
    """What a manifest records of a model, or why it cannot be had; no weights are loaded.

    A hub id, or Detoxify without a local checkpoint, is fetched here if it is not cached, so that a job that
    has been described can start.

    Raises:
        ModelError: As `load`.
    """
    name = store.canonical(name)
    part = _resolve(kind, name, options)
    with _missing_libraries(name):
        return part.describe()


def names() -> list[NameRow]:
    """The names that can be passed, embedded ones with their state; nothing is loaded or fetched."""
    rows = [
        NameRow("lexicon", "scorer", "built in", "Apache-2.0", 0, "tamis", "tamis's own English word list")
    ]
    for name in store.EMBEDDED:
        spec = store.package(name)
        state = "ready" if store.available(name) else "not pulled"
        source = f"{spec.distribution} {spec.version}"
        rows.append(NameRow(name, spec.kind, state, spec.licence, spec.download_mb, source, spec.summary))
    rows += [
        NameRow("lexicon:<words.txt>", "scorer", "on request", "", 0, "file", "a word list, one term a line"),
        NameRow(
            "detoxify:<variant>",
            "scorer",
            "on request",
            "Apache-2.0",
            0,
            "checkpoint=, config= or its own download",
            "original, unbiased, multilingual, original-small, unbiased-small",
        ),
        NameRow(
            "hf:<folder or id>", "scorer", "on request", "", 0, "folder or hub", "any sequence classifier"
        ),
        NameRow(
            "ngram:<folder>", "scorer", "on request", "", 0, "folder", "what `tamis train ngram` has fitted"
        ),
        NameRow(
            "max:<scorer>,<scorer>",
            "scorer",
            "on request",
            "",
            0,
            "its members",
            "the largest score of several",
        ),
        NameRow("mean:<scorer>,<scorer>", "scorer", "on request", "", 0, "its members", "their mean"),
        NameRow("hf:<folder or id>", "encoder", "on request", "", 0, "folder or hub", "any sentence encoder"),
        NameRow("hf:<folder or id>", "lm", "on request", "", 0, "folder or hub", "any causal language model"),
        NameRow(
            "hf:<folder or id>", "tagger", "on request", "", 0, "folder or hub", "any tagger of toxic spans"
        ),
        NameRow("openai:<url>#<model>", "lm", "on request", "", 0, "server", "any OpenAI-compatible server"),
    ]
    return sorted(rows, key=lambda row: (KINDS.index(row.kind), row.state == "on request"))


def forget() -> None:
    """Drop every loaded part of this process, so that memory can be freed (parts in use live on)."""
    with _guard:
        _parts.clear()
        _locks.clear()


def _resolve(kind: str, name: str, options: dict[str, Any]) -> _Part:
    if kind not in KINDS:
        raise ModelError(f"no kind of model '{kind}'; choose one of: {', '.join(KINDS)}")
    return {"scorer": _scorer, "encoder": _encoder, "lm": _lm, "tagger": _tagger}[kind](name, options)


def _scorer(name: str, options: dict[str, Any]) -> _Part:
    family, _, rest = name.partition(":")
    if family == "lexicon":
        return _lexicon(Path(rest).expanduser() if rest else None, name, options)
    if name == "linear":
        from models.scorers.linear import LinearScorer

        _check_options(name, options, LinearScorer)
        return _embedded(name, LinearScorer)
    if name == "jigsaw-bilstm":
        from models.scorers.bilstm import BilstmScorer

        kept = _check_options(name, options, BilstmScorer)
        return _embedded(name, lambda folder, info: BilstmScorer(folder, info, **kept))
    if family == "ngram" and rest:
        from models.scorers.ngram import load_ngram

        _refuse_options(name, options, RUNNING)
        # Small enough to be read whole before work starts.
        return _Part(describe=lambda: load_ngram(rest, name).info, load=lambda: load_ngram(rest, name))
    if family == "detoxify" and rest:
        return _detoxify(rest, name, options)
    if family == "hf" and rest:
        return _classifier(rest, name, options)
    if family in ("max", "mean") and rest:
        return _ensemble(name, options)
    raise _unknown("scorer", name)


def _ensemble(name: str, options: dict[str, Any]) -> _Part:
    from models.scorers import ensemble

    combine, members = ensemble.member_names(name)
    _refuse_options(name, options, RUNNING)  # what belongs to one member alone cannot be said for all

    def info() -> ModelInfo:
        return ensemble.describe(name, [describe("scorer", m, **options) for m in members])

    def build() -> ensemble.EnsembleScorer:
        return ensemble.EnsembleScorer([load("scorer", m, **options) for m in members], info(), combine)

    return _Part(describe=info, load=build)


def _lexicon(path: Path | None, name: str, options: dict[str, Any]) -> _Part:
    from models.scorers import lexicon

    _refuse_options(name, options, RUNNING)

    def build() -> lexicon.LexiconScorer:
        return lexicon.LexiconScorer(lexicon.read_list(path or lexicon.DEFAULT_LIST), lexicon.describe(path))

    # A list is small enough to be read whole before work starts: a bad line is found then.
    return _Part(describe=lambda: build().info, load=build)


def _detoxify(variant: str, name: str, options: dict[str, Any]) -> _Part:
    from models.scorers import detoxify
    from models.scorers.sequence import SequenceScorer

    files = ("checkpoint", "config", "sha256")
    _check_options(name, options, SequenceScorer, files)
    where = {k: v for k, v in options.items() if k in files}
    how = {k: v for k, v in options.items() if k not in files}

    def build() -> SequenceScorer:
        folder, info = detoxify.prepare(variant, **where)
        return SequenceScorer(folder, info, detoxify.head(folder), **how)

    return _Part(describe=lambda: detoxify.prepare(variant, **where)[1], load=build)


def _classifier(reference: str, name: str, options: dict[str, Any]) -> _Part:
    from models.folders import describe_folder, resolve
    from models.scorers.hf import read_head
    from models.scorers.sequence import SequenceScorer

    _check_options(name, options, SequenceScorer, ("label",))
    label = options.get("label")
    how = {k: v for k, v in options.items() if k != "label"}

    def info() -> ModelInfo:
        folder, commit = resolve(reference)
        head = read_head(folder, name, label)
        chosen = {"label": label} if label is not None else {}
        return describe_folder("scorer", name, folder, commit, labels=list(head.labels), **chosen)

    def build() -> SequenceScorer:
        folder, _ = resolve(reference)
        return SequenceScorer(folder, info(), read_head(folder, name, label), **how)

    return _Part(describe=info, load=build)


def _encoder(name: str, options: dict[str, Any]) -> _Part:
    from models.encoders import SentenceEncoder

    family, _, reference = name.partition(":")
    if name == "minilm":
        _check_options(name, options, SentenceEncoder)
        return _embedded(name, lambda folder, info: SentenceEncoder(folder, info, **options))
    if family == "hf" and reference:
        from models.encoder_folder import describe_encoder
        from models.folders import resolve

        _check_options(name, options, SentenceEncoder)

        def info() -> ModelInfo:
            folder, commit = resolve(reference)
            return describe_encoder(name, folder, commit)

        return _Part(describe=info, load=lambda: SentenceEncoder(resolve(reference)[0], info(), **options))
    raise _unknown("encoder", name)


def _tagger(name: str, options: dict[str, Any]) -> _Part:
    from models.folders import describe_folder, resolve
    from models.scorers.tagger import SpanTagger, read_output

    reference = name.removeprefix("hf:")
    if not reference or not (name.startswith("hf:") or os.sep in name or Path(name).is_dir()):
        raise _unknown("tagger", name)
    _check_options(name, options, SpanTagger)

    def info() -> ModelInfo:
        folder, commit = resolve(reference)
        output = read_output(folder, name)
        return describe_folder("tagger", name, folder, commit, threshold=output.threshold)

    return _Part(describe=info, load=lambda: SpanTagger(resolve(reference)[0], info(), **options))


def _lm(name: str, options: dict[str, Any]) -> _Part:
    family, _, rest = name.partition(":")
    if family == "openai" and rest:
        return _server(name, rest, options)
    if name == "smollm2":
        return _local_lm(name, lambda: store.path(name), options)
    if family == "hf" and rest:
        from models.folders import resolve

        return _local_lm(name, lambda: resolve(rest)[0], options)
    if os.sep in name or Path(name).is_dir():
        return _lm(f"hf:{name}", options)
    raise _unknown("lm", name)


def _local_lm(name: str, folder: Callable[[], Path], options: dict[str, Any]) -> _Part:
    from models.lm.folder import describe_folder

    if "socd" in options:
        return _steered_lm(name, folder, options)
    _refuse_options(name, options, LOCAL_LM_OPTIONS)

    def info() -> ModelInfo:
        return describe_folder(folder(), name, options.get("adapter"))

    def build() -> Any:
        from models.lm.local import LocalLanguageModel

        return LocalLanguageModel(folder(), name=name, **options)

    return _Part(describe=info, load=build)


def _steered_lm(name: str, folder: Callable[[], Path], options: dict[str, Any]) -> _Part:
    """A model decoded contrastively; `socd` holds the settings of `models.decoding.socd` as pairs."""
    _refuse_options(name, options, (*LOCAL_LM_OPTIONS, *SOCD_OPTIONS))
    rest = {key: value for key, value in options.items() if key not in SOCD_OPTIONS}
    given = {key: options[key] for key in ("toxic", "toxic_adapter") if options.get(key)}

    def sides() -> dict[str, Any]:
        from models.lm.fetch import local_copy

        return {key: local_copy(value) for key, value in given.items()}

    def describe() -> ModelInfo:
        from models.decoding.model import SoCDModel
        from models.decoding.socd import SoCDSettings

        settings = SoCDSettings(**dict(options["socd"]))
        return SoCDModel.describe(
            folder(), name=name, adapter=rest.get("adapter"), settings=settings, **sides()
        )

    def load() -> LanguageModel:
        from models.decoding.model import SoCDModel
        from models.decoding.pair import load_pair
        from models.decoding.socd import SoCDSettings

        settings = SoCDSettings(**dict(options["socd"]))
        if not given:
            return SoCDModel(folder(), name=name, settings=settings, **rest)
        # Models that differ in their settings alone (the rewriter, the localiser) share their weights.
        shared = {**rest, **given}
        pair = _once("pair", name, shared, lambda: load_pair(folder(), name=name, **sides(), **rest))
        return SoCDModel(folder(), name=name, settings=settings, pair=pair, **sides(), **rest)

    return _Part(describe, load)


def _server(name: str, address: str, options: dict[str, Any]) -> _Part:
    from models.lm.server import ServerLanguageModel

    url, _, model = address.partition("#")
    if not url.startswith(("http://", "https://")) or not model:
        raise ModelError(
            f"'{name}' is no server; pass openai:<base url>#<model>, e.g. openai:http://localhost:8000/v1#x"
        )
    kept = _check_options(name, options, ServerLanguageModel)
    return _Part(
        describe=lambda: ServerLanguageModel.describe(url, model, **kept),
        load=lambda: ServerLanguageModel(url, model, **kept),
    )


def _embedded(name: str, build: Callable[[Path, ModelInfo], Any]) -> _Part:
    def info() -> ModelInfo:
        store.path(name)  # raises what to run
        return store.package(name).info

    return _Part(describe=info, load=lambda: build(store.path(name), info()))


def _check_options(
    name: str, options: dict[str, Any], backend: Callable[..., Any], more: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Refuse options the backend's constructor has no keyword for; returns those it has.

    The options of running (`RUNNING`) are accepted by every backend, so that a job can pass them on whatever
    model was named; one that means nothing to a backend is left out.
    """
    known = [p.name for p in inspect.signature(backend).parameters.values() if p.kind is p.KEYWORD_ONLY]
    allowed = (*more, *(k for k in known if k != "name"))
    _refuse_options(name, options, (*allowed, *(r for r in RUNNING if r not in allowed)))
    return {option: value for option, value in options.items() if option in allowed}


def _refuse_options(name: str, options: dict[str, Any], known: tuple[str, ...]) -> None:
    for option in options:
        if option not in known:
            raise ModelError(f"{name} has no option '{option}'; it takes {', '.join(known)}")


def _unknown(kind: str, name: str) -> ModelError:
    known = [row.name for row in names() if row.kind == kind]
    return ModelError(f"no {kind} '{name}'; choose one of: {', '.join(known)} (see: tamis models list)")


@contextlib.contextmanager
def _missing_libraries(name: str) -> Iterator[None]:
    """Turn a library that is not installed into one line about the extra that has it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModelError(f"{name} needs '{error.name}'; run: pip install 'tamis[models]'") from error
