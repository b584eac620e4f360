"""The model card of a retriever: what it learned from, whose labels those were, how, and how to use it."""

from __future__ import annotations

from typing import Any

from models.training.groups import DrawPolicy
from models.training.retriever_plan import describe_draw


def retriever_card(record: dict[str, Any]) -> str:
    """Render a run's record as a model card (Markdown with the hub's metadata header).

    Args:
        record: What `train.json` holds.
    """
    data, run, settings = record["data"], record["run"], record["run"]["settings"]
    what = {
        "full": "All weights",
        "lora": f"A LoRA adapter of rank {settings['lora_r']} (merged in; alone in `adapter/`)",
        "head": f"A {settings['head']} head over frozen vectors",
    }[settings["train"]]
    if settings["documents"] == "fixed":
        what += ", on the side of queries alone (documents keep the base model's vectors: an index of them stays good),"
    elif settings["documents"] == "head":
        what += f", on the side of queries, with a {settings['head']} head over the base model's vectors on that of documents,"
    parts = [_header(record), f"# {record['title']}", ""]
    parts.append(
        f"A retriever: {what} of `{record['model']['name']}` (revision `{record['model']['revision']}`) trained by tamis "
        f"{record['tamis_version']} on {data['groups']:,} groups of queries with their positives and negatives, with the "
        f"loss `{run['loss']['name']}`."
    )
    parts += ["", "## Use", "", "```python", *_usage(record), "```", ""]
    parts += ["## Data", "", *_data(data), ""]
    parts += ["## Training", "", *_table(_training(record)), ""]
    parts += ["```", record["command"], "```", "", f"Configuration hash: `{record['config_hash']}`.", ""]
    parts += ["## Figures of the training", "", *_figures(record["results"]), ""]
    parts.append(
        "The loss says how training went, not how good the retriever is: judge it by searching with it (nDCG, recall) on "
        "queries that were not trained on."
    )
    return "\n".join([*parts, ""])


def _header(record: dict[str, Any]) -> str:
    lines = ["---", "library_name: sentence-transformers"]
    if record["model"].get("licence"):
        lines.append(f"license: {record['model']['licence'].lower()}")
    lines += [
        "pipeline_tag: sentence-similarity",
        "tags:",
        "- tamis",
        "- sentence-transformers",
        "- retrieval",
        "---",
        "",
    ]
    return "\n".join(lines)


def _usage(record: dict[str, Any]) -> list[str]:
    return [
        "from sentence_transformers import SentenceTransformer",
        "",
        'model = SentenceTransformer("THIS_FOLDER")',
        'queries = model.encode_query(["a question"])',
        'documents = model.encode_document(["a passage", "another one"])',
        f"scores = model.similarity(queries, documents)  # {record['run']['similarity']}",
    ]


def _data(data: dict[str, Any]) -> list[str]:
    lines = [f"Groups: `{data['source']}`, {data['groups']:,} groups over {data['documents']:,} documents."]
    lineage = data.get("lineage") or {}
    named = ", ".join(f"{k} `{v}`" for k, v in lineage.items() if isinstance(v, str | int | bool))
    if named:
        lines.append(f"Written by tamis: {named}.")
    if data.get("vectors"):
        lines.append(
            "Vectors: "
            + ", ".join(f"{k} `{v['url']}` (run `{v['run_id']}`)" for k, v in data["vectors"].items())
            + "."
        )
    lines += ["", "| stage | labels from | annotator | positives |", "|---|---|---|---:|"]
    lines += [
        f"| {x['stage']} | {x['label_source']} | {x['annotator']} | {x['positives']:,} |"
        for x in data["labels"]
    ]
    lines += ["", "| shard | fingerprint |", "|---|---|"]
    shown = data["shards"][:50]
    lines += [f"| {s['name']} | `{s['fingerprint']}` |" for s in shown]
    if len(data["shards"]) > len(shown):
        lines.append(f"| ... {len(data['shards']) - len(shown):,} more in train.json | |")
    return lines


def _training(record: dict[str, Any]) -> dict[str, str]:
    run, settings = record["run"], record["run"]["settings"]
    loss, draw = run["loss"], run["draw"]
    options = []
    if loss["name"] == "lse_pair" and (loss["positive_side"], loss["negative_side"]) != ("all", "all"):
        options.append(f"positive side {loss['positive_side']}, negative side {loss['negative_side']}")
    if loss["divide_by_m"]:
        options.append("divided by the number of positives")
    rows = {
        "loss": ", ".join([loss["name"], *options]),
        "score": f"{run['similarity']} x {loss['scale']:g}",
        "group": describe_draw(
            DrawPolicy(draw["positives"], draw["max_positives"], draw["group_size"]),
            settings["all_documents"],
        ),
        "negatives": (
            "every document of the groups"
            if settings["all_documents"]
            else "the group's and those of the batch's other queries"
            if settings["in_batch"]
            else "the group's"
        )
        + ("; false ones masked by id" if settings["mask"] else "; nothing masked"),
        "batch": f"{run['queries_per_step']} queries a step",
    }
    if settings["train"] != "head":
        rows["lengths"] = f"queries {settings['query_length']}" + (
            f", documents {settings['passage_length']} tokens"
            if settings["documents"] == "shared"
            else " tokens"
        )
    prompts = {k: v for k, v in run["prompts"].items() if v}
    if prompts:
        rows["prompts"] = ", ".join(f"{k} `{v}`" for k, v in prompts.items())
    for s in run["stages"]:
        rows[f"stage {s['name']}"] = (
            f"{s['groups']:,} groups, {s['steps']:,} steps ({s['steps'] / s['steps_per_epoch']:.2f} epochs), "
            f"learning rate {s['rate']:g}, {settings['schedule']}, {s['warmup']} steps of warm-up"
        )
    rows["precision"] = settings["precision"]
    rows["seed"] = str(settings["seed"])
    rows["trainable parameters"] = f"{record['model']['trainable']:,} of {record['model']['parameters']:,}"
    return rows


def _table(rows: dict[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]


def _figures(results: dict[str, Any]) -> list[str]:
    lines = [
        "| stage | steps | mean loss | positives' score | negatives' score | queries excluded |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for s in results["stages"]:
        last = s["last"]
        values = [f"{last[k]:.3f}" if k in last else "-" for k in ("positive_score", "negative_score")]
        excluded = f"{last['excluded']:.1%}" if "excluded" in last else "-"
        lines.append(
            f"| {s['stage']} | {s['steps']:,} | {s['train_loss']:.4f} | {' | '.join(values)} | {excluded} |"
        )
    return [
        *lines,
        "",
        f"Wall-clock: {results['seconds']:.0f} s. Scores are of the last steps, without the scale.",
    ]
