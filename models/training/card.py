"""The record of a training run: `train.json` for machines, and the model card made of it."""

from __future__ import annotations

from typing import Any


def model_card(record: dict[str, Any]) -> str:
    """Render a run's record as a model card (Markdown with the hub's metadata header).

    Args:
        record: What `train.json` holds.
    """
    lora = record["lora"]
    data, run, results = record["data"], record["run"], record["results"]
    kind = (("DoRA" if lora["dora"] else "LoRA") + " adapter") if lora else "full fine-tune"
    parts = [_header(record), f"# {record['title']}", ""]
    parts.append(
        f"A {kind} of `{record['model']['name']}` (revision `{record['model']['revision']}`), trained by tamis "
        f"{record['tamis_version']} on {data['counts'].get('examples', 0):,} examples."
    )
    parts += ["", "## Use", "", "```python", *_usage(bool(lora)), "```", ""]
    parts += ["## Data", "", *_data(data), ""]
    parts += ["## Training", "", *_table(_training(record, run, lora)), ""]
    parts += ["```", record["command"], "```", "", f"Configuration hash: `{record['config_hash']}`.", ""]
    parts += ["## Figures", "", *_table(_figures(results)), ""]
    return "\n".join(parts)


def _header(record: dict[str, Any]) -> str:
    lines = ["---", "library_name: " + ("peft" if record["lora"] else "transformers")]
    if record["model"].get("licence"):
        lines.append(f"license: {record['model']['licence'].lower()}")
    lines += ["pipeline_tag: text-generation", "tags:", "- tamis", "---", ""]
    return "\n".join(lines)


def _usage(adapter: bool) -> list[str]:
    if adapter:
        return [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), "THIS_FOLDER")',
            'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
        ]
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
    ]


def _data(data: dict[str, Any]) -> list[str]:
    counts = data["counts"]
    form = data["form"]
    lines = [
        f"Form: {form['kind']} (columns: {', '.join(form['columns'])})"
        + (f", prompt `{form['prompt']}`." if form.get("prompt") else ".")
    ]
    lineage = data.get("lineage") or {}
    if lineage:
        named = ", ".join(
            f"{key} `{value}`" for key, value in lineage.items() if isinstance(value, str | int | bool)
        )
        lines.append(f"Written by tamis: {named}.")
    lines.append("")
    lines += _table(
        {
            "rows": f"{counts.get('rows', 0):,}",
            "examples": f"{counts.get('examples', 0):,}",
            "examples held out": f"{data['held_out']:,}",
            "tokens": f"{counts.get('tokens', 0):,}",
            "tokens that carry the loss": f"{counts.get('loss_tokens', 0):,}",
            "rows left out: empty": f"{counts.get('empty', 0):,}",
            "rows left out: too long": f"{counts.get('too_long', 0):,}",
            "texts cut into chunks": f"{counts.get('chunked', 0):,}",
        }
    )
    lines += ["", "| shard | fingerprint |", "|---|---|"]
    shown = data["shards"][:50]
    lines += [f"| {shard['name']} | `{shard['fingerprint']}` |" for shard in shown]
    if len(data["shards"]) > len(shown):
        lines.append(f"| ... {len(data['shards']) - len(shown):,} more in train.json | |")
    return lines


def _training(record: dict[str, Any], run: dict[str, Any], lora: dict[str, Any] | None) -> dict[str, str]:
    rows = {
        "steps": f"{run['steps']:,} ({run['epochs']:.2f} epochs)",
        "batch": f"{run['rows_per_step']} rows of at most {run['max_length']} tokens, packing `{run['packing']}`"
        + (f", first {run['shared_prefix']} tokens shared" if run["shared_prefix"] else ""),
        "learning rate": f"{run['learning_rate']:g}, {run['schedule']}, {run['warmup_steps']} steps of warm-up",
        "precision": run["precision"],
        "seed": str(run["seed"]),
        "trainable parameters": f"{record['model']['trainable']:,} of {record['model']['parameters']:,}",
    }
    if record["model"].get("on_adapter"):
        below = record["model"]["on_adapter"]
        rows["on top of"] = f"adapter `{below['name']}` (revision `{below['revision']}`), which it holds"
    if lora:
        targets = lora["targets"] if isinstance(lora["targets"], str) else ", ".join(lora["targets"])
        rows["adapter"] = f"r {lora['r']}, alpha {lora['alpha']}, dropout {lora['dropout']:g}, on {targets}"
        rows["adapter"] += f" of the last {lora['layers']} layers" if lora.get("layers") else ""
    return rows


def _figures(results: dict[str, Any]) -> dict[str, str]:
    rows = {"training loss (mean of the run)": f"{results['train_loss']:.4f}"}
    if results.get("eval_loss_before") is not None:
        rows["held-out loss before"] = f"{results['eval_loss_before']:.4f}"
    if results.get("eval_loss") is not None:
        rows["held-out loss after"] = f"{results['eval_loss']:.4f}"
        rows["held-out perplexity after"] = f"{results['eval_perplexity']:.2f}"
    rows["tokens seen"] = f"{results['tokens_seen']:,}"
    rows["wall-clock"] = f"{results['seconds']:.0f} s, {results['tokens_per_second']:,.0f} tokens/s"
    return rows


def _table(rows: dict[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
