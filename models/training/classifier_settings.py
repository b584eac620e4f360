"""What the training of a classifier can be told: shared by text classifiers and span taggers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from models.training.settings import COSMETIC


class EncoderSettings(BaseModel):
    """How an encoder is fine-tuned."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_length: int = Field(256, ge=8, description="Most tokens of a text that are learned from.")
    batch_size: int = Field(32, ge=1, description="Texts per device and forward pass.")
    accumulate: int = Field(1, ge=1, description="Forward passes per step.")
    epochs: float = Field(3.0, gt=0, description="Passes over the data; ignored where max_steps is given.")
    max_steps: int = Field(0, ge=0, description="Steps to take; 0: by epochs.")
    learning_rate: float = Field(1e-4, gt=0, description="Peak.")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="After the warm-up.")
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of the steps.")
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are clipped to it; 0: not.")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16: mixed precision, weights stay float32."
    )
    seed: int = Field(0, ge=0)
    eval_fraction: float = Field(
        0.1, gt=0, lt=1, description="Share held out, by a hash of the text: half to fit on, half to test."
    )
    eval_steps: int = Field(0, ge=0, description="Held-out loss every so many steps; 0: at the end only.")
    save_steps: int = Field(200, ge=1, description="Checkpoint every so many steps.")
    keep_checkpoints: int = Field(2, ge=1)
    log_steps: int = Field(20, ge=1)
    threads: int = Field(0, ge=0, description="Torch threads; 0: all cores.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto")

    def identity(self) -> dict[str, Any]:
        """The settings the model depends on."""
        return self.model_dump(exclude=COSMETIC)


class ClassifierSettings(EncoderSettings):
    """How a toxicity classifier is trained; every field is an option of `tamis train scorer`."""

    balance: bool = Field(
        False, description="Weigh each label's positives so that they count as much as its negatives."
    )
    calibration: Literal["auto", "temperature", "shift", "none"] = Field(
        "auto",
        description="temperature: one for all labels; shift: and an offset a label, which undoes what weights and --balance "
        "did to the base rate; auto: shift where there are such.",
    )
    detoxify: bool = Field(True, description="Save a Detoxify checkpoint beside the model.")


class TaggerSettings(EncoderSettings):
    """How a span tagger is trained; every field is an option of `tamis train spans`."""

    batch_size: int = Field(16, ge=1, description="Windows per device and forward pass.")
