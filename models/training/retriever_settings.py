"""What the training of a retriever can be told; imports neither torch nor transformers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from models.losses.settings import LossSettings
from models.training.groups import LOSS_POLICIES, NO_CAP, DrawPolicy, check_loss
from models.training.settings import COSMETIC
from schemas.errors import TamisError

Documents = Literal["shared", "fixed", "head"]

DEFAULT_RATE = {"full": 3e-5, "lora": 2e-4, "head": 3e-4}
ALL_SIZE = 1 << 30  # documents a group where every document is a candidate: no limit
_DEFAULT_BATCH = {"full": 32, "lora": 32, "head": 128}
_DEFAULT_EPOCHS = {"full": 1.0, "lora": 1.0, "head": 10.0}
# Queries alone are short, and all that has to be encoded: larger batches, more passes, a higher rate.
_QUERIES = {"batch": 128, "epochs": 6.0, "rate": 1e-4}
COSINE_SCALE = 20.0  # a temperature of 0.05, the habit of sentence-transformers


class RetrieverSettings(BaseModel):
    """How a retriever is trained; every field is an option of `tamis train retriever`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    loss: str = Field("lse_pair", description="Which loss; see models.losses.settings.")
    scale: float | None = Field(
        None, gt=0, description="1 / temperature; default 20 for cosines, 1 for inner products."
    )
    similarity: Literal["auto", "cosine", "dot"] = Field("auto", description="auto: what the model says.")
    positive_side: str = Field("all", description="lse_pair: all, min or max.")
    negative_side: str = Field("all", description="lse_pair: all or max.")
    divide_by_m: bool = Field(False, description="joint_lh, lse_pair: divide by the number of positives.")
    teacher_scale: float = Field(1.0, gt=0, description="margin_mse, kl: what grades are multiplied by.")
    in_batch: bool = Field(True, description="Documents of the batch's other queries are negatives.")
    mask: bool = Field(True, description="Keep out of a query's negatives what its mask names.")

    positives: str | None = Field(None, description="first, random_one, rotate or all; default by the loss.")
    max_positives: int | None = Field(
        None, description="Positives a group at most; default as the groups say."
    )
    group_size: int | None = Field(None, description="Documents a group; default as the groups say.")
    stages: tuple[str, ...] = Field((), description="Which stages, in which order; default all, in theirs.")

    train: Literal["full", "lora", "head"] = Field("full", description="What is trained.")
    lora_r: int = Field(16, ge=1, description="Rank.")
    lora_alpha: int = Field(32, ge=1, description="Scale: the update is multiplied by alpha / r.")
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    lora_targets: str = Field("all-linear", description="`all-linear`, or module names separated by commas.")
    head: Literal["linear", "mlp"] = Field("linear", description="Kind of head; both start as the identity.")
    head_width: int = Field(512, ge=1, description="Hidden units of an MLP head.")
    documents: Documents = Field(
        "shared",
        description="shared: documents go through what queries go through. fixed: they keep their vectors, and an index "
        "of them stays good. head: their vectors are mapped by a head of their own, so an index is mapped, not embedded anew.",
    )
    head_rate: float = Field(
        1e-3, gt=0, description="documents head beside full or lora: peak learning rate of the head."
    )
    all_documents: bool = Field(
        False, description="Every document of the groups is a candidate in every step; needs vectors."
    )

    query_length: int = Field(32, ge=4, description="Most tokens of a query.")
    passage_length: int = Field(128, ge=4, description="Most tokens of a document.")
    query_prefix: str | None = Field(None, description="Before every query; default the model's own prompt.")
    passage_prefix: str | None = Field(None, description="Before every document; default the model's own.")
    batch_size: int = Field(0, ge=0, description="Queries per device and forward pass; 0: 32, heads 128.")
    accumulate: int = Field(
        1, ge=1, description="Forward passes per step; in-batch negatives are those of one pass."
    )
    chunk: int = Field(64, ge=1, description="Documents encoded together, those of like length.")
    cached: bool = Field(False, description="Large batches in little memory: encode every chunk twice.")
    epochs: dict[str, float] = Field(default_factory=dict, description='Passes, by stage; "" for all.')
    max_steps: int = Field(0, ge=0, description="Steps of every stage; 0: by epochs.")
    learning_rate: dict[str, float] = Field(default_factory=dict, description='Peak, by stage; "" for all.')
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="After the warm-up.")
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of a stage's steps.")
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are clipped to it; 0: not.")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16: mixed precision, weights stay float32."
    )
    seed: int = Field(0, ge=0)
    save_steps: int = Field(200, ge=1, description="Checkpoint every so many steps.")
    keep_checkpoints: int = Field(2, ge=1)
    log_steps: int = Field(20, ge=1)
    threads: int = Field(0, ge=0, description="Torch threads; 0: all cores.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto")

    @field_validator("epochs", "learning_rate", mode="before")
    @classmethod
    def _by_stage(cls, value: Any) -> Any:
        """`3`, `"3"` or `"llm=2,human=1"`."""
        if value is None or value == "":
            return {}
        if isinstance(value, int | float):
            return {"": value}
        if isinstance(value, str):
            parts = [part.rpartition("=") for part in value.split(",")]
            return {stage.strip(): number.strip() for stage, _, number in parts}
        return value

    @field_validator("epochs", "learning_rate")
    @classmethod
    def _above_zero(cls, value: dict[str, float]) -> dict[str, float]:
        if any(not number > 0 for number in value.values()):
            raise ValueError("must be above 0")
        return value

    def loss_settings(self, *, cosine: bool) -> LossSettings:
        """The loss with its options.

        Raises:
            TamisError: They do not go together.
        """
        scale = self.scale or (COSINE_SCALE if cosine else 1.0)
        if self.scale is None and self.loss == "margin_mse":
            scale = 1.0
        return LossSettings(
            self.loss, scale, self.positive_side, self.negative_side, self.divide_by_m, self.teacher_scale
        )

    def draw(self, recommended: dict[str, Any]) -> DrawPolicy:
        """How groups are drawn: as told, else as the groups' manifest recommends, else as the loss needs.

        Raises:
            TamisError: The loss cannot use what would be drawn.
        """
        fitting = LOSS_POLICIES.get(self.loss, ("all",))
        if self.all_documents:  # nothing is drawn against: every positive, unless told otherwise
            recommended = {**recommended, "group_size": ALL_SIZE}
            if (self.positives or fitting[0]) == "all":
                recommended |= {"positives": "all", "max_positives": NO_CAP}
        given = self.positives or recommended.get("positives", "all")
        if self.positives is None and given not in fitting:
            given = fitting[0]
        most = self.max_positives if self.max_positives is not None else recommended.get("max_positives", 4)
        size = self.group_size if self.group_size is not None else recommended.get("group_size", 8)
        policy = DrawPolicy(given, most, size)
        check_loss(policy, self.loss)
        return policy

    def check(self) -> None:
        """Refuse, by name, settings that cannot mean what they say.

        Raises:
            TamisError: They contradict one another.
        """
        self.loss_settings(cosine=True)
        if self.train == "head":
            if self.cached:
                raise TamisError("--cached is for encoders: a head works on vectors that are there")
        elif self.head != "linear" and self.documents != "head":
            raise TamisError("--head needs --train head or --documents head")
        if self.all_documents and not self.documents_have_vectors:
            raise TamisError(
                "--all-documents needs documents whose vectors are there: pass --documents fixed or head, or --train head"
            )
        if self.all_documents and not self.in_batch:
            raise TamisError("--all-documents and --own-negatives contradict one another")
        if self.all_documents and self.group_size is not None:
            raise TamisError("--group-size draws documents, and --all-documents takes them all; pass one")

    @property
    def documents_have_vectors(self) -> bool:
        """Whether documents come as vectors, not as text."""
        return self.train == "head" or self.documents != "shared"

    @property
    def _queries_alone(self) -> bool:
        return self.train != "head" and self.documents != "shared"

    @property
    def queries_per_pass(self) -> int:
        """Queries per device and forward pass."""
        return self.batch_size or (
            int(_QUERIES["batch"]) if self.documents_have_vectors else _DEFAULT_BATCH[self.train]
        )

    def rate(self, stage: str) -> float:
        """Peak learning rate of a stage."""
        usual = _QUERIES["rate"] if self._queries_alone and self.train == "full" else DEFAULT_RATE[self.train]
        return self.learning_rate.get(stage) or self.learning_rate.get("") or usual

    def passes(self, stage: str) -> float:
        """Epochs of a stage."""
        usual = _QUERIES["epochs"] if self._queries_alone else _DEFAULT_EPOCHS[self.train]
        return self.epochs.get(stage) or self.epochs.get("") or usual

    def identity(self) -> dict[str, Any]:
        """The settings the model depends on."""
        return self.model_dump(exclude=COSMETIC)
