"""The data card: README.md of an output, in the form the Hugging Face hub reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.report.findings import Findings
from pipelines.report.formatting import ACTION_NAMES, environment
from transforms.shards.formats import format_of

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_LARGER = ((10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"), (1_000_000_000, "100M<n<1B"))
_LOADERS = {"parquet": "parquet", "jsonl": "json", "arrow": "arrow"}


def render_card(found: Findings) -> str:
    """The data card of a finished output: YAML front matter and Markdown."""
    manifest, edits = found.manifest, found.edits
    shards = manifest.get("shards", [])
    format_ = next((f for f in (format_of(s["path"]) for s in shards) if f), "parquet")
    context = {
        "m": manifest,
        "totals": found.totals,
        "documents": found.documents,
        "edits": edits,
        "found_embedding": found.embedding,
        "actions": [(ACTION_NAMES.get(a, a), n) for a, n in edits.actions.most_common()] if edits else [],
        "tables": found.tables,
        "loader": _LOADERS[format_],
        "format": format_,
        "suffix": _common_suffix(shards),
        "front": front_matter(manifest),
        "models": manifest.get("models", []),
    }
    return str(environment().get_template("card.md.jinja").render(context))


def front_matter(manifest: Mapping[str, Any]) -> str:
    """YAML of the card's head, between its two `---` lines."""
    rows = manifest.get("totals", {}).get("rows_kept", 0)
    sizes = next((name for limit, name in _SIZES + _LARGER if rows < limit), "n>1B")
    suffix = _common_suffix(manifest.get("shards", []))
    meta: dict[str, Any] = {
        "pretty_name": f"{_basename(manifest)}, {manifest.get('job', 'processed')} by tamis",
        "size_categories": [sizes],
        "tags": ["tamis", str(manifest.get("job", "tamis"))],
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": f"data/**/*{suffix}"}]}
        ],
    }
    try:
        from huggingface_hub import DatasetCardData
    except ImportError:
        return "\n".join(_yaml(meta))
    return str(DatasetCardData(**meta).to_yaml()).rstrip()


def _basename(manifest: Mapping[str, Any]) -> str:
    root = str(manifest.get("input", {}).get("root", "corpus")).rstrip("/")
    return root.rsplit("/", 1)[-1] or "corpus"


def _common_suffix(shards: list[Mapping[str, Any]]) -> str:
    for suffix in (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".arrow"):
        if shards and all(str(s["path"]).endswith(suffix) for s in shards):
            return suffix
    return ""


def _yaml(value: Any, indent: int = 0) -> list[str]:
    """Just enough YAML for the head above: mappings, lists and quoted strings."""
    import json

    pad = "  " * indent
    lines: list[str] = []
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if isinstance(inner, Mapping | list):
                lines += [f"{pad}{key}:", *_yaml(inner, indent)]
            else:
                lines.append(f"{pad}{key}: {json.dumps(inner, ensure_ascii=False)}")
    else:
        for inner in value:
            if isinstance(inner, Mapping):
                first, *rest = _yaml(inner, indent + 1)
                lines += [f"{pad}- {first.strip()}", *rest]
            else:
                lines.append(f"{pad}- {json.dumps(inner, ensure_ascii=False)}")
    return lines
