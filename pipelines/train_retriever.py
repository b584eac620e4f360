"""`tamis train retriever`: train a sentence encoder on training groups, with any number of positives a query.

The same command run again goes on where a killed run stopped, with the same batches; once the model is there it does
nothing. The output folder loads with `SentenceTransformer`, and as encoder `hf:DIR`; `_SUCCESS` comes last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from models.training.retriever_settings import RetrieverSettings
from pipelines.train_folder import TrainResult, rank, silent, to_stderr
from pipelines.train_scorer import command_line, train_into
from schemas.errors import InputError
from schemas.fingerprint import config_hash

if TYPE_CHECKING:
    from models.encoder_folder import Kind
    from models.training.retriever_data import GroupData
    from models.training.retriever_texts import GroupVectors
    from models.training.shards import ShardListing


class TrainRetrieverConfig(RetrieverSettings):
    """Everything `tamis train retriever` can be told; see docs/jobs/train-retriever.md."""

    data: str = Field(description="Training groups: an output of `tamis groups`.")
    model: str = Field("minilm", description="Encoder to start from: minilm, a model folder, or hf:ID.")
    output: str = Field(description="Folder for the trained model, on this machine.")
    corpus: str | None = Field(None, description="Documents, where the groups hold ids only.")
    queries: str | None = Field(None, description="Queries, where the groups hold ids only.")
    vectors: str | None = Field(
        None, description="Output of `tamis embed` of the documents, where they are not trained."
    )
    query_vectors: str | None = Field(None, description="Heads: output of `tamis embed` of the queries.")
    allow_poisoned: bool = Field(False, description="Train on groups that were poisoned on purpose.")
    overwrite: bool = Field(False, description="Replace another run's model in the output folder.")
    dry_run: bool = Field(False, description="Print the plan; write nothing.")
    quiet: bool = Field(False, description="No progress lines.")
    command: str = Field("", description="Command line for the model card; default: made from the settings.")

    def check(self) -> None:
        """Refuse, by name, settings that cannot mean what they say.

        Raises:
            TamisError: They contradict one another.
        """
        super().check()
        if self.vectors is not None and not self.documents_have_vectors:
            raise InputError(
                "--vectors are for documents that are not trained: pass --documents fixed or head, or --train head"
            )
        if self.query_vectors is not None and self.train != "head":
            raise InputError("--query-vectors are for heads: pass --train head")
        if self.query_vectors is not None and self.vectors is None:
            raise InputError("--query-vectors go with --vectors (of the documents)")


def run(config: TrainRetrieverConfig) -> TrainResult:
    """Train, go on with a run that was killed, or find the work done.

    Raises:
        InputError: The groups cannot be used.
        TamisError: Settings that do not go together.
        ModelError: The model cannot be used.
        OutputError: The output folder holds something else, or another process is training into it.
    """
    config.check()
    from models.training.classifier import join_tags, resolve_encoder
    from models.training.labelled import training_tag
    from models.training.retriever_data import mask_files
    from models.training.retriever_session import RetrieverSession
    from models.training.shards import list_shards, shard_fingerprint

    listing = list_shards(config.data, allow_poisoned=config.allow_poisoned)
    _check_groups(listing)
    fingerprints = [shard_fingerprint(shard, listing.options) for shard in listing.shards]
    settings = RetrieverSettings(**config.model_dump(include=set(RetrieverSettings.model_fields)))
    settings.draw((listing.manifest or {}).get("draw", {}))
    base = resolve_encoder(config.model)
    vectors = _vectors(config) if config.vectors is not None else None
    title = Path(config.data.rstrip("/")).name
    identity = config_hash(
        {
            "job": "train-retriever",
            "settings": settings.identity(),
            "groups": fingerprints,
            "mask": _mask_fingerprints(listing, mask_files(listing)),
            "draw": (listing.manifest or {}).get("draw", {}),
            "texts": [
                [shard_fingerprint(x, one.options) for x in one.shards]
                for one in (list_shards(url) for url in (config.corpus, config.queries) if url is not None)
            ],
            "vectors": None if vectors is None else [v["run_id"] for v in vectors.origin.values()],
            "base": base.revision,
        }
    )
    session = RetrieverSession(
        settings=settings,
        base=base,
        listing=listing,
        identity=identity,
        command=config.command or command_line("retriever", config, settings),
        data={
            "source": config.data,
            "tag": join_tags(base, [training_tag(title, fingerprints)]),
            "shards": [
                {"name": s.name, "bytes": s.size, "fingerprint": f}
                for s, f in zip(listing.shards, fingerprints, strict=True)
            ],
            "lineage": listing.lineage,
            "vectors": None if vectors is None else vectors.origin,
            # What says whose vectors its documents have, where they keep them.
            "encoder_revision": _revision(config.model) if settings.documents_have_vectors else None,
        },
        say=silent if config.quiet or rank() else to_stderr,
        emit=lambda kind, fields: None,
        fill=_filler(config),
        vectors=vectors,
        given=() if vectors is None else vectors.given,
    )
    return train_into(session, config, "train-retriever")


def _check_groups(listing: ShardListing) -> None:
    job = (listing.manifest or {}).get("job", "groups")
    if job != "groups":
        raise InputError(
            f"{listing.source} is an output of `tamis {job}`, not of `tamis groups`; make groups of it first"
        )


def _mask_fingerprints(listing: ShardListing, paths: list[str]) -> list[str]:
    """What the manifest says of the mask's files: their hashes."""
    tables = {t["path"]: t for t in (listing.manifest or {}).get("tables", [])}
    return [str(tables[path].get("sha256", "")) for path in paths]


def _filler(config: TrainRetrieverConfig) -> Callable[[GroupData], GroupData] | None:
    """Completes groups of ids with the texts of a corpus and of queries."""
    if config.corpus is None and config.queries is None:
        return None
    corpus, queries = config.corpus, config.queries

    def fill(groups: GroupData) -> GroupData:
        from models.training.retriever_data import join_title
        from transforms.retrieval.collection import pick_documents
        from transforms.retrieval.texts import open_documents, read_queries

        documents, asked = groups.documents, groups.queries
        if corpus is not None:
            found = pick_documents(open_documents(corpus), groups.document_ids)
            texts = {i: join_title(t, x) for i, t, x in found.select("doc_id", "title", "text").iter_rows()}
            documents = _complete(groups.document_ids, documents, texts, f"--corpus {corpus}", "document")
        if queries is not None:
            table = read_queries(queries)
            words = dict(zip(table["query_id"].to_pylist(), table["text"].to_pylist(), strict=True))
            asked = _complete(groups.query_ids, asked, words, f"--queries {queries}", "query")
        return dataclasses.replace(groups, documents=documents, queries=asked)

    return fill


def _complete(
    ids: list[str], have: list[str | None], found: dict[str, str | None], where: str, what: str
) -> list[str | None]:
    texts = [h if h is not None else found.get(i) for i, h in zip(ids, have, strict=True)]
    missing = [i for i, t in zip(ids, texts, strict=True) if t is None]
    if missing:
        raise InputError(
            f"{where} has no {what} '{missing[0]}' ({len(missing):,} of {len(ids):,} are missing)"
        )
    return texts


@dataclasses.dataclass(frozen=True)
class _Embedded:
    """Reads the vectors of groups from outputs of `tamis embed`."""

    sides: dict[str, Any]
    origin: dict[str, dict[str, Any]]

    @property
    def given(self) -> tuple[Kind, ...]:
        """What there are vectors of."""
        return ("document", "query") if "queries" in self.sides else ("document",)

    def __call__(self, groups: GroupData) -> GroupVectors:
        from models.training.retriever_texts import GroupVectors

        queries = self.sides.get("queries")
        return GroupVectors(
            None if queries is None else _pick(queries, groups.query_ids, "query"),
            _pick(self.sides["documents"], groups.document_ids, "document"),
        )


def _vectors(config: TrainRetrieverConfig) -> _Embedded:
    from transforms.embed.vectors import VectorShards

    revision = _revision(config.model)
    opened, origin = {}, {}
    for what, url in (("documents", config.vectors), ("queries", config.query_vectors)):
        if url is None:
            continue
        shards = opened[what] = VectorShards(url)
        made_by = [m for m in shards.manifest.get("models", []) if m.get("kind") == "encoder"]
        if made_by and made_by[0]["revision"] != revision:
            raise InputError(
                f"{url} was embedded by {made_by[0]['name']} ({made_by[0]['revision']}), not by {config.model} ({revision}); "
                "pass --model, or embed again"
            )
        origin[what] = {"url": url, "run_id": shards.manifest.get("run_id", "")}
    dimensions = {shards.dimension for shards in opened.values()}
    if len(dimensions) > 1:
        raise InputError(
            f"vectors of documents have {opened['documents'].dimension} dimensions, of queries {opened['queries'].dimension}"
        )
    return _Embedded(opened, origin)


def _revision(model: str) -> str:
    """The encoder's revision as outputs of `tamis embed` record it."""
    from models import registry
    from models.encoder_folder import encoder_name

    return registry.describe("encoder", encoder_name(model)).revision


def _pick(shards: Any, ids: list[str], what: str) -> Any:
    """Vectors of some ids, float32 (n, d), by one pass."""
    import numpy as np

    rows: dict[str, list[int]] = {}
    for row, name in enumerate(ids):
        rows.setdefault(name, []).append(row)
    out = np.zeros((len(ids), shards.dimension), np.float32)
    missing = dict.fromkeys(ids)
    listed = list(shards.ids())
    read = shards.read([block for block, _, _ in listed])
    for (_, names, present), (_, batch) in zip(listed, read, strict=True):
        for name, vector in zip(np.array(names.to_pylist(), object)[present], batch.vectors, strict=True):
            if name in missing:
                out[rows[name]] = vector
                del missing[name]
    if missing:
        first = next(iter(missing))
        raise InputError(
            f"{shards.folder.url} has no vector of {what} '{first}' ({len(missing):,} are missing); embed them with "
            "--id-column, so that ids are those of the groups"
        )
    return out
