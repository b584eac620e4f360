"""What a training run can be told: one typed, validated record, shared by the job and the session that runs it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

# Settings that change nothing about the model: they may differ when a run is resumed, and are in no hash.
COSMETIC = {"log_steps", "save_steps", "keep_checkpoints", "eval_steps", "threads", "device"}
_DEFAULT_RATE = {"lora": 2e-4, "full": 2e-5}


class TrainSettings(BaseModel):
    """How a causal language model is trained; every field is an option of `tamis train lm`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text_column: str | None = Field(None, description="Train on running text in this column.")
    prompt_column: str | None = Field(None, description="What stands before the completion (no loss).")
    completion_column: str | None = Field(None, description="What is learned.")
    messages_column: str | None = Field(
        None, description="Chats: a list of {role, content}; assistants' turns are learned."
    )
    prompt: str = Field(
        "", description="Prompt template (a name or a .jinja file) the prompt column goes through."
    )
    prompt_options: dict[str, Any] = Field(default_factory=dict, description="Variables of the template.")

    parse_special: bool = Field(
        False,
        description="Read names of special tokens in the data as those tokens (prompts rendered beforehand).",
    )

    lora: bool = Field(False, description="Train a LoRA adapter instead of all weights.")
    lora_r: int = Field(16, ge=1, description="Rank.")
    lora_alpha: int = Field(32, ge=1, description="Scale: the update is multiplied by alpha / r.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    lora_targets: str = Field("all-linear", description="`all-linear`, or module names separated by commas.")
    lora_layers: int = Field(0, ge=0, description="Only in the last so many layers; 0: in all.")
    dora: bool = Field(False, description="DoRA instead of LoRA.")
    on_adapter: str = Field(
        "",
        description="A LoRA adapter (name or folder) the model has while it is trained; the result holds it too.",
    )

    max_length: int = Field(
        512, ge=8, description="Most tokens of a row; text is cut into chunks, other examples left out."
    )
    batch_size: int = Field(8, ge=1, description="Rows per device and forward pass.")
    accumulate: int = Field(1, ge=1, description="Forward passes per step.")
    packing: Literal["auto", "off", "isolated", "concat"] = Field(
        "auto",
        description="How rows are filled; auto: isolated for text, off otherwise, isolated where a prompt is shared.",
    )
    share_prefix: bool | None = Field(
        None, description="Let packed examples share the fixed part of their prompt; default: where it pays."
    )
    epochs: float = Field(1.0, gt=0, description="Passes over the data; ignored where max_steps is given.")
    max_steps: int = Field(0, ge=0, description="Steps to take; 0: by epochs.")
    max_tokens: int = Field(
        0,
        ge=0,
        description="Take the steps that see about so many tokens, whatever the corpus' size; 0: by epochs.",
    )
    learning_rate: float | None = Field(None, gt=0, description="Peak; default 2e-4 with LoRA, 2e-5 in full.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="After the warm-up.")
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps.")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are clipped to it; 0: not.")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16: mixed precision, weights stay float32."
    )
    save_dtype: Literal["", "float32", "bfloat16"] = Field(
        "", description="Of the saved weights; default: as trained."
    )
    gradient_checkpointing: bool = Field(False, description="Less memory, a third more time.")
    attention: Literal["sdpa", "eager"] = Field("sdpa")
    seed: int = Field(0, ge=0)

    eval_fraction: float = Field(0.02, ge=0, lt=1, description="Share held out, by a hash of the content.")
    eval_limit: int = Field(1000, ge=0, description="Most held-out examples evaluated.")
    eval_steps: int = Field(0, ge=0, description="Evaluate every so many steps; 0: before and after only.")
    save_steps: int = Field(200, ge=1, description="Checkpoint every so many steps.")
    keep_checkpoints: int = Field(2, ge=1)
    log_steps: int = Field(10, ge=1)
    threads: int = Field(0, ge=0, description="Torch threads; 0: all cores.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto")

    def identity(self) -> dict[str, Any]:
        """What decides the model, for its hash."""
        # A setting that came later counts only where it is used: folders made before it keep their hash.
        later = {name for name in ("max_tokens", "lora_layers", "on_adapter") if not getattr(self, name)}
        return self.model_dump(exclude=COSMETIC | later)

    @property
    def rate(self) -> float:
        """The peak learning rate: the one given, or the usual one for the method."""
        return self.learning_rate or _DEFAULT_RATE["lora" if self.lora else "full"]
