"""Settings of `tamis label`: what decides the labels, and what only decides how the work is done."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class LabelConfig(BaseModel):
    """Settings of `tamis label`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pools: tuple[str, ...] = Field(min_length=1, description="Output of `tamis pool`, a pool, a TREC run.")
    output: str = Field(description="Folder to write to.")
    method: str = Field("yes_no", description="How labels are made; see `tamis label --methods`.")
    method_options: dict[str, Any] = Field(default_factory=dict, description="Options of the method.")
    # what is judged
    corpus: str | None = Field(None, description="Documents; default those of the pool.")
    queries: str | None = Field(None, description="Queries; default those of the pool.")
    human: tuple[str, ...] = Field((), description="Labels of people, to compare with; default the pool's.")
    corpus_source: str | None = Field(
        None, description="Which copy of the documents, where there are several."
    )
    splits: tuple[str, ...] = Field((), description="Only queries people judged in this split.")
    depth: int | None = Field(None, ge=1, description="Candidates a query, best pool rank first.")
    limit_queries: int | None = Field(None, ge=1, description="So many queries, by the hash of their ids.")
    passage_tokens: int | None = Field(None, ge=16, description="Longest passage shown to the judge.")
    # who judges
    model: str = Field("smollm2", description="The judge: smollm2, a model folder, hf:ID, openai:URL#MODEL.")
    model_options: dict[str, Any] = Field(default_factory=dict, description="Its options.")
    adapter: str = Field(
        "auto", description="LoRA adapter: auto (the shipped judge), none, a name or a folder."
    )
    target_model: str | None = Field(
        None, description="Reader that labels by gain are for; default the judge."
    )
    target_options: dict[str, Any] = Field(default_factory=dict, description="Its options.")
    prompts: dict[str, str] = Field(
        default_factory=dict, description='Role -> prompt file; "" for the first role.'
    )
    calibrate_on: str | None = Field(
        None, description="Labels of people that slope and bias of the judge are fitted on."
    )
    # money
    budget_tokens: int | None = Field(None, ge=1, description="Most tokens to spend, prompts and answers.")
    price_in: float | None = Field(None, ge=0, description="Price of a million prompt tokens.")
    price_out: float | None = Field(None, ge=0, description="Price of a million answer tokens.")
    # running
    documents: str = Field("pooled", description="Documents written beside the labels: pooled, none.")
    queries_per_shard: int = Field(1000, ge=1)
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    threads: int = Field(1, ge=1)
    overwrite: bool = False
    storage_options: dict[str, Any] = Field(default_factory=dict)

    def running(self) -> dict[str, Any]:
        """Options of how models in this process run."""
        return {"dtype": self.dtype, "device": self.device, "threads": self.threads}


def default_method(model: str) -> str:
    """The method for a judge where none is named: the embedded model is at chance when asked, and orders well by likelihood."""
    return "likelihood" if model == "smollm2" else "yes_no"
