"""One training of a retriever, stage by stage, to the saved folder; resumes what a killed run left.

    FOLDER/_tamis/checkpoints/<stage>/   whole checkpoints, until the model is saved
    FOLDER/_tamis/vectors/               vectors of what is not trained as text, until the model is saved
    FOLDER/...                           the model: `SentenceTransformer(FOLDER)` loads it
    FOLDER/adapter/                      LoRA: the adapter alone; the model has it merged in
    FOLDER/train.json, README.md         what was done; the model card
    FOLDER/_SUCCESS                      written last

Every stage is a training of its own (warm-up, schedule and optimiser begin anew) on the weights of the one before.
Import this module late: it needs torch and transformers.
"""

from __future__ import annotations

import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import transformers

from models.encoder_folder import EncoderSettings as FolderSettings
from models.encoder_folder import Kind, read_settings
from models.losses.settings import TEACHER_LOSSES
from models.training.loading import BaseModel, LoraSettings, parameter_counts, save_trained
from models.training.planned import Progress, checkpoints, remove_partial
from models.training.retriever_batches import (
    GroupCollator,
    GroupPlan,
    QueryFeatures,
    TextFeatures,
    VectorFeatures,
)
from models.training.retriever_card import retriever_card
from models.training.retriever_data import GroupData, read_groups
from models.training.retriever_model import (
    Head,
    HeadRetriever,
    QueryRetriever,
    TextRetriever,
    add_adapter,
    load_sentence_encoder,
    save_encoder,
)
from models.training.retriever_plan import (
    PreparedGroups,
    RetrieverPlan,
    StagePlan,
    check_stages,
    check_texts,
    describe_plan,
    plan_stages,
)
from models.training.retriever_settings import RetrieverSettings
from models.training.retriever_texts import GroupVectors, embed_groups, tokenize_groups
from models.training.retriever_trainer import RetrieverTrainer
from models.training.running import (
    mean_loss,
    move_files,
    plain_errors,
    processes,
    set_threads,
    training_arguments,
    versions,
)
from models.training.shards import ShardListing
from schemas.errors import InputError, ModelError

WORK, RECORD, SUCCESS = "_tamis", "train.json", "_SUCCESS"


@dataclass
class RetrieverSession:
    """A run's parts; nothing is written before `train`.

    Attributes:
        settings: How to train.
        base: What to start from.
        listing: The groups' shards.
        identity: Hash of everything the model depends on.
        command: For the model card.
        data: What the record says of the data.
        say: Called with each line for people.
        emit: Called with (kind, fields) for each event.
        fill: Completes groups of ids with texts; None where they have them.
        vectors: Gives vectors of what is not trained as text; what it does not give is embedded.
        given: What it gives.
    """

    settings: RetrieverSettings
    base: BaseModel
    listing: ShardListing
    identity: str
    command: str
    data: dict[str, Any]
    say: Callable[[str], None]
    emit: Callable[[str, dict[str, Any]], None]
    fill: Callable[[GroupData], GroupData] | None = None
    vectors: Callable[[GroupData], GroupVectors] | None = None
    given: tuple[Kind, ...] = ()
    kind: str = field(default="retriever", init=False)
    _encoder: Any = field(default=None, init=False, repr=False)
    _adapter: Any = field(default=None, init=False, repr=False)
    _device: str = field(default="cpu", init=False, repr=False)
    _writes: bool = field(default=True, init=False, repr=False)

    @property
    def encoder(self) -> Any:
        """The `sentence-transformers` model, loaded when it is first needed."""
        if self._encoder is None:
            self._encoder = load_sentence_encoder(self.base)
        return self._encoder

    def read(self) -> PreparedGroups:
        """Read the groups, and tokenise them where the encoder is trained.

        Raises:
            InputError: They cannot be used.
            TamisError: The loss cannot use what would be drawn.
        """
        settings = self.settings
        settings.check()
        policy = settings.draw((self.listing.manifest or {}).get("draw", {}))
        groups = read_groups(self.listing)
        check_stages(settings, groups)
        if not groups.negatives.lengths.any() and (not settings.in_batch or settings.queries_per_pass == 1):
            raise InputError(
                "no group has a negative of its own: train against the batch's (--in-batch, --batch-size 2 or more), or make "
                "groups with --pool or --random-negatives"
            )
        if settings.loss in TEACHER_LOSSES and np.isnan(groups.positive_grades).any():
            raise InputError(
                f"loss '{settings.loss}' learns from grades, and some positives have none; choose another --loss"
            )
        if self.fill is not None:
            groups = self.fill(groups)
        folder = self._folder_settings()
        similarity = folder.similarity if settings.similarity == "auto" else settings.similarity
        if similarity not in ("cosine", "dot"):
            raise ModelError(
                f"{self.base.name} compares vectors by '{similarity}'; pass --set similarity=cosine or dot to train for that"
            )
        cosine = similarity == "cosine"
        texts = None
        if settings.train != "head":
            check_texts(groups, documents=not (settings.documents_have_vectors and self.vectors is not None))
            texts = tokenize_groups(groups, self.encoder, settings, self._prompts(folder))
        return PreparedGroups(groups, policy, cosine, texts)

    def plan(self, prepared: PreparedGroups) -> RetrieverPlan:
        """Plan the stages."""
        return plan_stages(self.settings, prepared)

    def describe_plan(self, prepared: PreparedGroups, plan: RetrieverPlan) -> list[str]:
        """The plan in a few lines."""
        return describe_plan(self.settings, prepared, plan)

    def estimate(self, prepared: PreparedGroups) -> RetrieverPlan:
        """The plan with the seconds it will take: a few batches are run forward and backward, and timed."""
        set_threads(self.settings.threads)
        plan = self.plan(prepared)
        embedding = 0.0
        lacking = self._lacking()
        if lacking:
            vectors, embedding = self._pretend(prepared.groups, lacking)
            features = self._of_vectors(prepared, vectors)
        else:
            features = self._features(prepared)
        model = self.make_model(prepared, features)
        seconds = 0.0
        for stage in plan.stages:
            with tempfile.TemporaryDirectory(prefix="tamis-train-") as folder:
                trainer = self._trainer(model, prepared, features, stage, Path(folder), None)
                trainer._move_model_to_device(model, trainer.args.device)
                batches = trainer.train_plan.batches(0)
                spent = []
                for at in (0, len(batches) // 3, 2 * len(batches) // 3):
                    began = time.monotonic()
                    inputs = trainer._prepare_inputs(trainer.collator(batches[at]))
                    with trainer.accelerator.autocast():
                        loss = trainer.compute_loss(model, inputs)
                    if loss.requires_grad:
                        loss.backward()
                    float(loss.detach())  # waits for an accelerator
                    spent.append(time.monotonic() - began)
            each = sum(spent[1:]) / 2 if len(spent) > 1 else spent[0]  # the first one warms up
            seconds += each * stage.steps * self.settings.accumulate
        return replace(plan, seconds=seconds + embedding)

    def train(self, output: Path) -> tuple[RetrieverPlan, dict[str, Any], int]:
        """Train, from the last whole checkpoint in `output` if there is one, and save.

        Returns:
            The plan, what `train.json` holds, and the step the run went on from (0 = it began anew).

        Raises:
            TamisError: The data or the model cannot be used; nothing of the model has been written then.
        """
        started = time.monotonic()
        threads = set_threads(self.settings.threads)
        prepared = self.read()
        plan = self.plan(prepared)
        for line in self.describe_plan(prepared, plan):
            self.say(line)
        with plain_errors(output):
            features = self._features(prepared, output / WORK / "vectors")
            model, results, resumed = self.fit(prepared, features, plan, output / WORK / "checkpoints")
            record = self._publish(output, model, prepared, plan, results, threads, started)
        return plan, record, resumed

    def fit(
        self, prepared: PreparedGroups, features: Any, plan: RetrieverPlan, folder: Path
    ) -> tuple[Any, dict[str, Any], int]:
        """Train the stages, going on from the last whole checkpoint.

        Args:
            prepared: The data.
            features: What makes tensors of a batch: `TextFeatures` or `VectorFeatures`.
            plan: The stages.
            folder: Where checkpoints go.

        Returns:
            The trained model, figures by stage, and the step of all stages the run went on from.
        """
        transformers.set_seed(self.settings.seed)
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # it would tear our own lines apart
        model = self.make_model(prepared, features)
        figures, resumed, done = [], 0, 0
        for stage in plan.stages:
            own = folder / f"{stage.number}-{stage.name}"
            remove_partial(own)
            last = checkpoints(own)[-1:]
            step = int(last[0].name.rpartition("-")[2]) if last else 0
            transformers.set_seed(
                self.settings.seed
            )  # what a stage draws must not depend on where the run began
            progress = Progress(self._emit_for(stage, plan), self._say_for(stage, plan))
            trainer = self._trainer(model, prepared, features, stage, own, progress)
            progress.trainer = trainer
            if last:
                trainer.tokens_seen = orjson.loads((last[0] / "tokens.json").read_bytes())["tokens_seen"]
                resumed = done + step
                if step < stage.steps:
                    self.say(f"going on from step {step} of stage {stage.name}")
            before, began = trainer.tokens_seen, time.monotonic()
            if step < stage.steps:
                trainer.train(resume_from_checkpoint=str(last[0]) if last else None)
            else:
                trainer.take_up(last[0])
            seconds = time.monotonic() - began
            figures.append(
                {
                    "stage": stage.name,
                    "steps": stage.steps,
                    "train_loss": round(mean_loss(trainer), 6),
                    "last": _last_figures(trainer),
                    "tokens_seen": trainer.tokens_seen,
                    "tokens_per_second": round((trainer.tokens_seen - before) / max(seconds, 1e-9), 1),
                    "steps_per_second": round((stage.steps - step) / max(seconds, 1e-9), 3),
                }
            )
            model = trainer.accelerator.unwrap_model(trainer.model)
            self._device, self._writes = str(trainer.args.device), trainer.is_world_process_zero()
            done += stage.steps
        return model, {"stages": figures, "resumed_from": resumed}, resumed

    def make_model(self, prepared: PreparedGroups, features: Any) -> Any:
        """What is trained, drawn from torch's generator where it is new."""
        settings = self.settings
        if settings.train == "head":
            width = settings.head_width if settings.head == "mlp" else 0
            return HeadRetriever(int(features.queries.shape[1]), width=width, documents=settings.documents)
        if settings.train == "lora":
            targets = settings.lora_targets
            self._adapter = add_adapter(
                self.encoder,
                LoraSettings(
                    settings.lora_r,
                    settings.lora_alpha,
                    settings.lora_dropout,
                    targets if targets == "all-linear" else tuple(t.strip() for t in targets.split(",")),
                ),
            )
        assert prepared.texts is not None
        lengths = prepared.texts.prompt_lengths
        if not settings.documents_have_vectors:
            return TextRetriever(self.encoder, cached=settings.cached, prompt_lengths=lengths)
        head = None
        if settings.documents == "head":
            width = settings.head_width if settings.head == "mlp" else 0
            head = Head(int(features.documents.shape[1]), width)
        return QueryRetriever(self.encoder, head, cached=settings.cached, prompt_lengths=lengths)

    def _features(self, prepared: PreparedGroups, cache: Path | None = None) -> Any:
        """What makes tensors; what is not trained as text is embedded now, where nobody gave its vectors."""
        if prepared.texts is not None and prepared.texts.documents is not None:
            return TextFeatures(
                prepared.texts.queries,
                prepared.texts.documents,
                self.encoder.tokenizer.pad_token_id,
                self.settings.chunk,
            )
        given = self.vectors(prepared.groups) if self.vectors is not None else GroupVectors(None, None)
        lacking = self._lacking()
        if not lacking:
            return self._of_vectors(prepared, given)
        check_texts(prepared.groups, documents="document" in lacking)
        assert cache is not None
        made = embed_groups(
            prepared.groups,
            self.encoder,
            self.base,
            self._prompts(self._folder_settings()),
            cache,
            kinds=lacking,
            device=self.settings.device,
            say=self.say,
        )
        return self._of_vectors(
            prepared,
            GroupVectors(
                made.queries if "query" in lacking else given.queries,
                made.documents if "document" in lacking else given.documents,
            ),
        )

    def _lacking(self) -> tuple[Kind, ...]:
        """What has to be embedded before training."""
        wanted: tuple[Kind, ...] = ()
        if self.settings.documents_have_vectors:
            wanted = ("query", "document") if self.settings.train == "head" else ("document",)
        return tuple(kind for kind in wanted if kind not in self.given)

    def _of_vectors(self, prepared: PreparedGroups, vectors: GroupVectors) -> VectorFeatures | QueryFeatures:
        """What makes tensors of vectors and, where queries are trained as text, of their tokens."""
        pad = 0 if prepared.texts is None else int(self.encoder.tokenizer.pad_token_id)
        return vectors.features(prepared.texts, pad, self.settings.chunk)

    def _pretend(self, groups: GroupData, kinds: Sequence[Kind]) -> tuple[GroupVectors, float]:
        """Vectors of no text, and the seconds the real ones would take: some texts are embedded, and timed."""
        check_texts(groups, documents="document" in kinds)
        texts = groups.documents if "document" in kinds else groups.queries
        sample = [t or "" for t in texts[:: max(1, len(texts) // 32)][:32]]
        began = time.monotonic()
        self.encoder.encode(sample, show_progress_bar=False)
        each = (time.monotonic() - began) / len(sample)
        rng = np.random.default_rng(0)
        width = int(self.encoder.get_embedding_dimension() or 0)
        queries, documents = (
            rng.standard_normal((n, width), np.float32)
            for n in (len(groups.query_ids), len(groups.document_ids))
        )
        embedded = sum(len(v) for kind, v in (("query", queries), ("document", documents)) if kind in kinds)
        return GroupVectors(queries, documents), each * embedded

    def _trainer(
        self,
        model: Any,
        prepared: PreparedGroups,
        features: Any,
        stage: StagePlan,
        folder: Path,
        progress: Progress | None,
    ) -> RetrieverTrainer:
        settings = self.settings
        told: Any = settings.model_copy(
            update={"learning_rate": stage.rate, "batch_size": settings.queries_per_pass}
        )
        collator = GroupCollator(
            prepared.groups,
            prepared.policy,
            settings.seed,
            features,
            in_batch=settings.in_batch,
            mask=settings.mask,
            teacher=settings.loss in TEACHER_LOSSES,
            distributed=processes() > 1,
            all_documents=settings.all_documents,
        )
        return RetrieverTrainer(
            model,
            training_arguments(told, folder, steps=stage.steps, warmup=stage.warmup, evaluates=False),
            loss=settings.loss_settings(cosine=prepared.cosine),
            cosine=prepared.cosine,
            in_batch=settings.in_batch,
            head_rate=settings.head_rate,
            collator=collator,
            train_plan=GroupPlan(
                prepared.groups.rows(stage.number), settings.queries_per_pass, settings.seed, stage.name
            ),
            keep=settings.keep_checkpoints,
            callbacks=[progress] if progress else None,
        )

    def _folder_settings(self) -> FolderSettings:
        return read_settings(Path(self.base.source))

    def _prompts(self, folder: FolderSettings) -> dict[str, str]:
        return {
            "query": folder.prompt("query", prefix=self.settings.query_prefix),
            "document": folder.prompt("document", prefix=self.settings.passage_prefix),
        }

    def _say_for(self, stage: StagePlan, plan: RetrieverPlan) -> Callable[[str], None]:
        if len(plan.stages) == 1:
            return self.say
        return lambda line: self.say(f"{stage.name}  {line}")

    def _emit_for(self, stage: StagePlan, plan: RetrieverPlan) -> Callable[[str, dict[str, Any]], None]:
        return lambda kind, fields: self.emit(kind, {"stage": stage.name, **fields})

    def _publish(
        self,
        output: Path,
        model: Any,
        prepared: PreparedGroups,
        plan: RetrieverPlan,
        results: dict[str, Any],
        threads: int,
        started: float,
    ) -> dict[str, Any]:
        """Save beside the checkpoints, move into place file by file, `_SUCCESS` last; then clear up."""
        if not self._writes:
            return {}
        settings = self.settings
        staging = output / WORK / "final"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        trainable, total = parameter_counts(model)
        model.cpu()
        before = None
        if isinstance(model, HeadRetriever):
            total += sum(p.numel() for p in self.encoder.parameters())
        elif isinstance(model, QueryRetriever):
            before = load_sentence_encoder(self.base)
            total += sum(p.numel() for p in before.parameters())
        if settings.train == "lora":
            save_trained(self._adapter, self.encoder.tokenizer, staging / "adapter")
            self._adapter.merge_and_unload()
            total -= trainable
        prompts = self._prompts(self._folder_settings())
        save_encoder(self.encoder, staging, prompts=prompts, cosine=prepared.cosine, model=model, base=before)
        packages = versions()
        loss = settings.loss_settings(cosine=prepared.cosine)
        record = {
            "title": output.resolve().name,
            "kind": self.kind,
            "tamis_version": packages.get("tamis", ""),
            "command": self.command,
            "config_hash": self.identity,
            "training_data": self.data["tag"],
            "model": {
                "name": self.base.name,
                **self.base.place,
                "revision": self.base.revision,
                "licence": self.base.licence,
                "trainable": trainable,
                "parameters": total,
            },
            "data": {
                **self.data,
                "groups": len(prepared.groups.query_ids),
                "documents": len(prepared.groups.document_ids),
                "labels": [
                    {"stage": s, "label_source": source, "annotator": who, "positives": n}
                    for (s, source, who), n in sorted(prepared.groups.labels.items())
                ],
            },
            "run": {
                "loss": dict(vars(loss)),
                "similarity": "cosine" if prepared.cosine else "dot",
                "draw": {**vars(prepared.policy), "max_positives": prepared.policy.most_positives},
                "prompts": prompts,
                "stages": [vars(s) for s in plan.stages],
                "steps": plan.steps,
                "queries_per_step": settings.queries_per_pass * settings.accumulate * processes(),
                "threads": threads,
                "device": self._device,
                "settings": settings.model_dump(mode="json", exclude={"threads", "device"}),
            },
            "results": {**results, "seconds": round(time.monotonic() - started, 1)},
            "environment": {"python": platform.python_version(), "packages": packages},
        }
        (staging / RECORD).write_bytes(orjson.dumps(record, option=orjson.OPT_INDENT_2))
        (staging / "README.md").write_text(retriever_card(record), "utf-8")
        move_files(staging, output)
        (output / SUCCESS).write_text(f"{self.identity}\n")
        for name in ("final", "checkpoints", "vectors"):
            shutil.rmtree(output / WORK / name, ignore_errors=True)
        return record


def _last_figures(trainer: RetrieverTrainer) -> dict[str, float]:
    """The figures of the last progress line."""
    return {k: round(v, 6) for k, v in trainer.last_live.items()}
