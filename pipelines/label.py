"""`tamis label`: a language model's labels for the documents a pool puts up for each query.

plan      pool, queries and what people said -> one row a query (ids only); the texts they name, by one pass over the corpus
label     a job of the shard engine over these rows, under `OUT/_tamis/run`: resume, workers, dead rows, request cache
finish    its labels as judgments in `OUT/data`, queries with what was found out about them, report, card, manifest
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import orjson
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from models import registry
from models.lm.folder import ADAPTERS
from models.prompts import Prompt, load_prompt
from models.protocols import ModelInfo
from pipelines.label_config import LabelConfig
from pipelines.retrieval.folder import TableFolder, input_fingerprints
from pipelines.run import RunSettings, locked, run_job
from schemas.errors import InputError, ModelError, TamisError
from schemas.fingerprint import config_hash
from transforms.requests import identity
from transforms.retrieval.collection import RetrievalData, frame
from transforms.retrieval.labelling.budget import Ledger
from transforms.retrieval.labelling.judge import Judge
from transforms.retrieval.labelling.method import Estimate, Method, load_method, method_options
from transforms.retrieval.labelling.plan import Planned, plan_queries
from transforms.retrieval.labelling.step import UNASKED, LabelCandidates, Model, read_queries
from transforms.retrieval.labelling.texts import TextStore, build_texts
from transforms.shards.engine import Job
from transforms.shards.files import Folder
from transforms.shards.formats import UnitLimits
from transforms.shards.plan import load_plan
from transforms.shards.receipts import read_receipts, remove_receipts

QUESTIONS, RUN, CACHE, TEXTS = "_tamis/questions", "_tamis/run", "_tamis/cache", "_tamis/texts"
# The adapter trained as a judge of relevance, on the embedded model and this prompt (benchmarks/judge_adapter.py).
JUDGE_ADAPTER, JUDGE_MODEL, JUDGE_PROMPT = "judge", "smollm2", "likelihood-query-v1"
# A unit is what one commit holds; a query with thirty candidates takes seconds on a core.
_UNIT_QUERIES = 8
# Queries that a dry run counts tokens of, and pairs it times.
_COUNTED, _TIMED = 40, 4


@dataclass(frozen=True)
class LabelResult:
    """What came of it.

    Attributes:
        output: The folder.
        state: `finished`, `already finished` or `planned`; `submitted` where a service runs the job.
        manifest: Its manifest; of a dry run, what it would take.
        notes: What the user should know, a line each.
    """

    output: str
    state: str
    manifest: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parts:
    """Everything that is known before work begins."""

    method: Method
    judge: Model
    reader: Model | None
    prompts: dict[str, Prompt]
    notes: tuple[str, ...] = ()

    @property
    def models(self) -> list[ModelInfo]:
        """Who is asked."""
        return [self.judge.info, *([self.reader.info] if self.reader else [])]


@dataclass
class Task:
    """What is to be judged.

    Attributes:
        planned: One row a query.
        data: Where it comes from.
        human: What people said of these pairs, where they did.
        notes: What the reader should know.
    """

    planned: Planned
    data: RetrievalData
    human: pl.DataFrame
    notes: list[str] = field(default_factory=list)


def run(config: LabelConfig, settings: RunSettings | None = None) -> LabelResult:
    """Label, or go on where an earlier run stopped.

    Raises:
        InputError: No candidates, no queries, no documents.
        ModelError: A model cannot be had, or cannot do what the method needs.
        OutputError: The folder holds something else.
        TamisError: Settings that mean nothing or contradict one another.
    """
    settings = settings or RunSettings()
    parts = describe(config)
    decides = _decides(config, parts)
    out = TableFolder(
        config.output, "label", decides, overwrite=config.overwrite, options=config.storage_options
    )
    if not settings.dry_run and (manifest := out.finished) is not None and not _goes_on(config, manifest):
        return LabelResult(config.output, "already finished", manifest)
    task = read_task(config, parts.method)
    if settings.dry_run:
        return LabelResult(config.output, "planned", estimate(config, parts, task), tuple(task.notes))
    with locked(out.folder):
        out.start()
        job = _prepare(config, parts, task, out.folder)
        result = run_job(
            job, f"{out.folder.url.rstrip('/')}/{QUESTIONS}", replace(settings, overwrite=config.overwrite)
        )
        if result.manifest is None:
            return LabelResult(config.output, result.state, {}, (result.detail,))
        from pipelines.retrieval.label_finish import finish

        manifest = finish(config, parts, task, out, result.manifest)
    return LabelResult(config.output, "finished", manifest, tuple(manifest.get("notes", ())))


def describe(config: LabelConfig) -> Parts:
    """The method, the models and the prompts; no weights are loaded.

    Raises:
        ModelError: A model cannot be had, or cannot do what the method needs.
        TamisError: No such method, option or role.
    """
    method = load_method(config.method, config.method_options)
    notes = []
    adapter = _adapter(config, method)
    judge = _model(config.model, config, config.model_options, adapter)
    reader = None
    if config.target_model is not None:
        if not method.needs_target:
            raise TamisError(f"method {method.name} labels for any reader; leave --target-model out")
        reader = _model(config.target_model, config, config.target_options, None)
        if identity(reader.info) == identity(judge.info):
            reader = None
    for model in filter(None, (judge, reader)):
        asked = model is reader or not method.needs_target or reader is None
        if method.in_process and asked and model.name.startswith("openai:"):
            raise ModelError(
                f"method {method.name} needs log-probabilities of given text, which a chat server does not give; "
                "use a model in this process (smollm2, hf:<folder>)"
            )
    if adapter and config.adapter == "auto":
        notes.append(
            f"the shipped judge adapter is used ({judge.info.tag}); --adapter none judges without it"
        )
    prompts = load_prompts(method, config.prompts)
    return Parts(method, judge, reader, prompts, tuple(notes))


def _adapter(config: LabelConfig, method: Method) -> str | None:
    """The adapter to judge with: the shipped one only with the model, method and prompt it was trained for."""
    if config.adapter == "none":
        return None
    if config.adapter != "auto":
        return config.adapter
    fits = (
        config.model == JUDGE_MODEL
        and not config.prompts
        and method.prompts.get("judge") == JUDGE_PROMPT
        and getattr(method, "of", "query") == "query"
        and "adapter" not in config.model_options
    )
    return JUDGE_ADAPTER if fits and (ADAPTERS / JUDGE_ADAPTER).is_dir() else None


def _model(name: str, config: LabelConfig, options: dict[str, Any], adapter: str | None) -> Model:
    running = {} if name.startswith("openai:") else config.running()
    whole = {**running, **({"adapter": adapter} if adapter else {}), **options}
    return Model(name, tuple(sorted(whole.items())), registry.describe("lm", name, **whole))


def load_prompts(method: Method, given: dict[str, str]) -> dict[str, Prompt]:
    """Prompts by role; what the user gives takes the place of the method's own.

    Raises:
        TamisError: No such role; a template that needs other variables.
    """
    roles = list(method.prompts)
    if given and not roles:
        raise TamisError(f"method {method.name} has no prompt; leave --prompt out")
    named = {role or roles[0]: path for role, path in given.items()}
    for role in named:
        if role not in roles:
            raise TamisError(f"method {method.name} has no prompt '{role}'; it has {', '.join(roles)}")
    return {
        role: load_prompt(named.get(role, own), variables=tuple(method.variables.get(role, ())))
        for role, own in method.prompts.items()
    }


def _decides(config: LabelConfig, parts: Parts) -> dict[str, Any]:
    """What decides the labels, with the fingerprints of what is read."""
    keep = (
        "method", "splits", "depth", "limit_queries", "passage_tokens", "corpus_source", "documents", "queries_per_shard",
        "seed", "calibrate_on",
    )  # fmt: skip
    places = [*config.pools, *config.human, config.corpus, config.queries, config.calibrate_on]
    return {
        **{name: getattr(config, name) for name in keep},
        "source": ", ".join(config.pools),
        "method_options": method_options(parts.method),
        "method_version": parts.method.version,
        "models": [identity(info) for info in parts.models],
        "prompts": {role: prompt.tag for role, prompt in parts.prompts.items()},
        "input": {url: input_fingerprints(url, config.storage_options) for url in places if url is not None},
    }


def _goes_on(config: LabelConfig, manifest: dict[str, Any]) -> bool:
    """Whether a finished run left pairs unasked that this one's budget has room for."""
    if not manifest["totals"].get("unasked"):
        return False
    before = (manifest.get("budget") or {}).get("tokens")
    return config.budget_tokens is None or (before is not None and config.budget_tokens > before)


def read_task(config: LabelConfig, method: Method) -> Task:
    """Pools, queries and what people said, whole; documents as a stream.

    Raises:
        InputError: No candidates, no queries, no documents; no answers where the method needs them.
    """
    from pipelines.retrieval.inputs import read_all

    data = read_all(
        config.pools,
        corpus=config.corpus,
        queries=config.queries,
        corpus_source=config.corpus_source,
        options=config.storage_options,
    )
    if config.human:
        said = read_all(config.human, corpus_source=config.corpus_source, options=config.storage_options)
        data.judgments = pa.concat_tables([data.judgments, said.judgments], promote_options="default")
        data.notes += said.notes
        if data.documents is None:
            data.documents = said.documents
        if not data.queries.num_rows:
            data.queries = said.queries
    if data.documents is None:
        raise InputError(f"{config.pools[0]} holds no documents: pass --corpus")
    human = frame(data.judgments)
    planned = plan_queries(
        frame(data.pool),
        frame(data.queries),
        human,
        depth=config.depth,
        limit=config.limit_queries,
        splits=config.splits,
    )
    task = Task(planned, data, human.filter(pl.col("label_source") == "human"), list(data.notes))
    if planned.without_text:
        n = len(planned.without_text)
        task.notes.append(
            f"{n:,} queries of the pool are left out: their text is not known ({planned.without_text[0]}, ...)"
        )
    if method.needs_answers:
        have = sum(a != "[]" for a in planned.table["answers"].to_pylist())
        if not have:
            raise InputError(
                f"method {method.name} needs gold answers: a column 'answers' (or 'answer') in --queries"
            )
        if have < planned.table.num_rows:
            task.notes.append(f"{planned.table.num_rows - have:,} queries have no gold answer")
    return task


def _prepare(config: LabelConfig, parts: Parts, task: Task, folder: Folder) -> Job:
    """Write questions and texts where they are not there yet, and describe the job."""
    texts, missing = _texts(config, task, folder)
    if missing:
        task.notes.append(f"{len(missing):,} documents of the pool are not in the corpus ({missing[0]}, ...)")
    _write_questions(task.planned.table, folder, config.queries_per_shard)
    url = folder.url.rstrip("/")
    step = LabelCandidates(
        method=parts.method.name,
        options=tuple(sorted(config.method_options.items())),
        judge=parts.judge,
        prompts=tuple(parts.prompts.items()),
        texts=f"{url}/{TEXTS}",
        texts_options=tuple(sorted(folder.options.items())),
        reader=parts.reader,
        ledger=f"{url}/{CACHE}" if folder.is_local or config.budget_tokens is not None else None,
        budget=config.budget_tokens,
        passage_tokens=config.passage_tokens,
    )
    if step.ledger is not None:
        Ledger(step.ledger, config.budget_tokens)  # refuses before work starts what cannot hold a budget
    job = Job(
        name="label-queries",
        input_url="",
        output_url=f"{url}/{RUN}",
        text_column="text",
        id_column="query_id",
        extra_columns=("query_id", "documents", "answers", "split"),
        steps=(step,),
        config={
            "method": config.method.replace("-", "_"),
            "version": parts.method.version,
            "options": method_options(parts.method),
            "prompts": {role: prompt.tag for role, prompt in parts.prompts.items()},
            "passage_tokens": config.passage_tokens,
            "texts": texts,
            "dtype": config.dtype,
        },
        models=tuple(asdict(info) for info in parts.models),
        seed=config.seed,
        cache_url=f"{url}/{CACHE}",
        output_options=config.storage_options,
        input_options=config.storage_options,
        limits=UnitLimits(rows=_UNIT_QUERIES, bytes=1 << 20),
    )
    _settle(folder)
    _reopen(job)
    return job


def _texts(config: LabelConfig, task: Task, folder: Folder) -> tuple[str, list[str]]:
    """Texts of the pooled documents, beside the job; found again where the corpus and the ids are the same."""
    where = config.corpus or ", ".join((*config.pools, *config.human))
    places = [config.corpus] if config.corpus else [*config.pools, *config.human]
    prints = {url: input_fingerprints(url, config.storage_options) for url in places}
    key = config_hash(
        {
            "where": where,
            "files": prints,
            "copy": config.corpus_source,
            "ids": config_hash({"ids": task.planned.documents}),
        }
    )
    home = folder.child(TEXTS)
    if home.exists("texts.json"):
        known = orjson.loads(home.read("texts.json"))
        if known["key"] == key:
            return known["fingerprint"], known["missing"]
    home.remove("texts.json")
    assert task.data.documents is not None
    found, missing = build_texts(home, task.data.documents, task.planned.documents)
    home.write("texts.json", orjson.dumps({"key": key, "fingerprint": found, "missing": missing}))
    return found, missing


def _write_questions(table: pa.Table, folder: Folder, rows: int) -> None:
    """The planned queries as shards; one that stands there with the same content is left, so that jobs over it resume."""
    home = folder.child(QUESTIONS)
    names = [f"part-{i:05d}.parquet" for i in range(-(-table.num_rows // rows))]
    for old in home.find() if home.exists() else []:
        if old not in names:
            home.remove(old)
    for i, name in enumerate(names):
        part = table.slice(i * rows, rows)
        if home.exists(name):
            try:
                with home.open(name) as file:
                    if pq.read_table(file).equals(part):
                        continue
            except (pa.ArrowException, OSError):
                pass  # torn by a kill: written again
        with home.publish(name) as temporary:
            pq.write_table(part, temporary, compression="zstd")


def _settle(folder: Folder) -> None:
    """Let an output that was moved go on: what the engine keeps names the old place; the answers are in the cache."""
    name = f"{RUN}/_tamis/job.json"
    if folder.exists(name):
        before = str(orjson.loads(folder.read(name)).get("input", "")).rstrip("/")
        if before != f"{folder.url.rstrip('/')}/{QUESTIONS}":
            folder.remove(RUN)


def _reopen(job: Job) -> None:
    """Take back the receipts of units that a spent budget left pairs unasked in: they are gone over again."""
    output = job.output()
    plan = load_plan(output) if output.exists() else None
    if plan is None:
        return
    receipts = read_receipts(output, plan, job.config_hash).values()
    remove_receipts(output, [r for r in receipts if r.counters.get(UNASKED)])


def estimate(config: LabelConfig, parts: Parts, task: Task) -> dict[str, Any]:
    """What a run would take: tokens of some queries counted, the rest in proportion; a few pairs timed where that is free.

    The judge is loaded for it (of a server, nothing but its name), and answers nothing that is kept.
    """
    planned = task.planned
    step = min(planned.table.num_rows, _COUNTED)
    some = planned.table.slice(0, step).combine_chunks()
    import tempfile

    with tempfile.TemporaryDirectory(prefix="tamis-dry-") as place:
        folder = Folder(place)
        ids = {d["id"] for row in some["documents"].to_pylist() for d in orjson.loads(row)}
        assert task.data.documents is not None
        build_texts(folder, task.data.documents, ids)
        queries = read_queries(some.to_batches()[0], TextStore(folder))
    judge = Judge(
        parts.judge.load,
        parts.judge.info,
        prompts=parts.prompts,
        seed=config.seed,
        passage_tokens=config.passage_tokens,
        reader=Judge(parts.reader.load, parts.reader.info, prompts=parts.prompts) if parts.reader else None,
    )
    total = sum((parts.method.estimate(q, judge) for q in queries), Estimate())
    pairs = sum(len(q.documents) for q in queries)
    factor = planned.candidates / max(1, pairs)
    tokens_in, tokens_out = round(total.prompt_tokens * factor), round(total.completion_tokens * factor)
    found: dict[str, Any] = {
        "totals": {
            "queries": planned.table.num_rows,
            "pairs": planned.candidates,
            "requests": round(total.requests * factor),
            "prompt_tokens": tokens_in,
            "completion_tokens": tokens_out,
            "exact": factor == 1.0,
        },
        "price": price(config, tokens_in, tokens_out),
        "judge": parts.judge.info.tag,
        "method": parts.method.name,
    }
    if not any(m.name.startswith("openai:") for m in (parts.judge, parts.reader) if m):
        first = replace(queries[0], documents=queries[0].documents[:_TIMED])
        parts.method.label([first], judge)  # what is paid once (loading, first kernels) is not the work
        started = time.perf_counter()
        parts.method.label([first], judge)
        found["totals"]["seconds"] = round(
            (time.perf_counter() - started) / max(1, len(first.documents)) * planned.candidates, 1
        )
    return found


def price(config: LabelConfig, tokens_in: int, tokens_out: int) -> float | None:
    """What tokens cost, where prices are known."""
    if config.price_in is None and config.price_out is None:
        return None
    return (tokens_in * (config.price_in or 0.0) + tokens_out * (config.price_out or 0.0)) / 1e6


def shards(out: Folder) -> Iterator[tuple[str, list[str], list[list[dict[str, Any]]], list[dict[str, Any]]]]:
    """The engine's output, shard by shard: name, query ids, rows of labels and facts of each query."""
    from pipelines.report.output import Output

    done = Output(f"{out.url.rstrip('/')}/{RUN}", out.options)
    for name in done.files("data"):
        ids = [v for b in done.read(name, ["query_id"]) for v in b.column(0).to_pylist()]
        columns: list[list[Any]] = []
        for attribute in ("labels", "facts"):
            side = done.sidecar(f"attributes/{attribute}", name)
            batches = done.read(side) if side is not None else iter(())
            columns.append([v for b in batches for v in b.column("value").to_pylist()])
        yield name, ids, columns[0], [orjson.loads(f) for f in columns[1]]


def print_result(config: LabelConfig, result: LabelResult) -> None:
    """Say what came of it and where to look."""
    from pipelines.retrieval.label_page import planned_lines, result_lines

    lines = planned_lines(result.manifest) if result.state == "planned" else result_lines(config, result)
    for line in (*lines, *result.notes):
        if line:
            print(line)
