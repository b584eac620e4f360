"""Model cards of classifiers: what `train.json` holds, as Markdown with the hub's metadata header."""

from __future__ import annotations

from typing import Any

_COLUMNS = ("base_rate", "auc", "precision", "recall", "f1", "ece_before", "ece")


def scorer_card(record: dict[str, Any]) -> str:
    """Render the record of a trained scorer."""
    results = record["results"]
    parts = [
        *_header(record, "text-classification"),
        f"A toxicity classifier with {len(results['labels'])} labels ({', '.join(results['labels'])}), each an "
        f"independent probability. {_origin(record)}",
        "",
        "## Use",
        "",
        "In tamis, wherever a scorer is named: `hf:THIS_FOLDER`. With transformers:",
        "",
        "```py",
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
        'model = AutoModelForSequenceClassification.from_pretrained("THIS_FOLDER")',
        'scores = model(**tokenizer(["a text"], return_tensors="pt")).logits.sigmoid()',
        "```",
        "",
    ]
    if results.get("detoxify"):
        parts += [
            f"With Detoxify, from `{results['detoxify']['file']}` (sha256 `{results['detoxify']['sha256']}`):",
            "",
            "```py",
            "from detoxify import Detoxify",
            "",
            f'Detoxify(checkpoint="THIS_FOLDER/{results["detoxify"]["file"]}", huggingface_config_path="THIS_FOLDER")',
            "```",
            "",
            "Detoxify also reads the configuration from where the checkpoint says: the folder it was first saved to.",
            "",
        ]
    parts += [*_data(record), *_training(record), *_test(results)]
    return "\n".join(parts) + "\n"


def tagger_card(record: dict[str, Any]) -> str:
    """Render the record of a trained span tagger."""
    results = record["results"]
    rows = [
        f"| {name} | {row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f}) |"
        for name, row in results["test"].items()
        if isinstance(row, dict)
    ]
    parts = [
        *_header(record, "token-classification"),
        f"Marks the characters of a text that are toxic. {_origin(record)}",
        "",
        "## Use",
        "",
        'In tamis as a localiser: `localize.sources = ["tagger"]`, `localize.tagger = "hf:THIS_FOLDER"`. A word is toxic',
        f"where the mean probability of its tokens is at least {results['decoding']['threshold']:.3f} "
        "(`tagger_threshold` in config.json).",
        "",
        *_data(record),
        *_training(record),
        "## Figures",
        "",
        f"On {results['test']['texts']:,} held-out texts, with 95 % bootstrap intervals over texts:",
        "",
        "| | |",
        "|---|---|",
        *rows,
    ]
    return "\n".join(parts) + "\n"


def _header(record: dict[str, Any], task: str) -> list[str]:
    lines = ["---", "library_name: transformers"]
    if record["model"].get("licence"):
        lines.append(f"license: {record['model']['licence'].lower()}")
    return [*lines, f"pipeline_tag: {task}", "tags:", "- tamis", "---", "", f"# {record['title']}", ""]


def _origin(record: dict[str, Any]) -> str:
    model = record["model"]
    return (
        f"`{model['name']}` (revision `{model['revision']}`), fine-tuned by tamis {record['tamis_version']} on "
        f"`{record['training_data']}`."
    )


def _data(record: dict[str, Any]) -> list[str]:
    data, counts = record["data"], record["data"]["counts"]
    lines = ["## Data", ""]
    lines += [
        "| set | columns | weight | bytes | fingerprint of the first shard |",
        "|---|---|---|---|---|",
    ]
    for source in data["sources"]:
        columns = ", ".join(source["columns"])
        shards = source["shards"]
        lines.append(
            f"| {source['name']} | {columns} | {source.get('weight', 1):g} | {sum(s['bytes'] for s in shards):,} in "
            f"{len(shards):,} shards | `{shards[0]['fingerprint']}` |"
        )
    lines += ["", "| | |", "|---|---|"]
    lines += [f"| {name} | {count:,} |" for name, count in sorted(counts.items())]
    lines += [f"| held out | {data['held_out']:,} |", ""]
    return lines


def _training(record: dict[str, Any]) -> list[str]:
    run = record["run"]
    settings = run["settings"]
    return [
        "## Training",
        "",
        f"{run['steps']:,} steps ({run['epochs']:.2f} epochs) of {run['rows_per_step']} texts of at most "
        f"{settings['max_length']} tokens; learning rate {settings['learning_rate']:g}, {settings['schedule']}, "
        f"{run['warmup_steps']} steps of warm-up; {settings['precision']}; seed {settings['seed']}; "
        f"{record['results']['seconds']:.0f} s.",
        "",
        "```",
        record["command"],
        "```",
        "",
        f"Configuration hash: `{record['config_hash']}`.",
        "",
    ]


def _test(results: dict[str, Any]) -> list[str]:
    calibration = results["calibration"]
    lines = [
        "## Figures",
        "",
        f"Calibrated on {calibration['examples']:,} held-out texts by {calibration['method']} (temperature "
        f"{calibration['temperature']:.3f}), which is part of the saved weights; measured on other held-out texts, at "
        "threshold 0.5, with 95 % bootstrap intervals over texts. ECE: expected calibration error.",
        "",
        "| set | label | texts | base rate | AUC | precision | recall | F1 | ECE before | ECE |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for part, labels in results["test"].items():
        for label, row in labels.items():
            if row["n"]:
                cells = " | ".join(_cell(row[column]) for column in _COLUMNS)
                lines.append(f"| {part} | {label} | {row['n']:,} | {cells} |")
    return lines


def _cell(figure: dict[str, float | None]) -> str:
    value, low, high = figure["value"], figure["low"], figure["high"]
    if value is None or low is None or high is None:
        return "-"
    return f"{value:.3f} ({low:.3f} to {high:.3f})"
