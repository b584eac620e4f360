"""The page of `tamis groups`: what each stage holds, what was left out and why, and some groups to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc

from pipelines.evaluation.page import Grid, Section, Text, Texts, Tile, render_page

if TYPE_CHECKING:
    from transforms.retrieval.groups import GroupShard

EXAMPLES = 6  # groups shown
_SIZES = ((1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 64), (65, None))
_MOST_CHARACTERS = 400
_MOST_DOCUMENTS = 5


@dataclass
class Seen:
    """What the page needs of the shards as they go by."""

    sizes: dict[str, Counter[int]] = field(default_factory=dict)
    sources: dict[str, Counter[str]] = field(default_factory=dict)
    grades: dict[str, Counter[str]] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def look(self, stage: str, shard: GroupShard) -> None:
        """Count a shard's groups, and keep some of the first."""
        groups = shard.groups
        self.sizes.setdefault(stage, Counter()).update(pc.list_value_length(groups["positives"]).to_pylist())
        negatives = pc.list_flatten(groups["negatives"])
        self.sources.setdefault(stage, Counter()).update(
            {
                r["values"]: r["counts"]
                for r in pc.value_counts(pc.struct_field(negatives, "source")).to_pylist()
            }
        )
        positives = pc.list_flatten(groups["positives"])
        self.grades.setdefault(stage, Counter()).update(
            {
                "no grade" if r["values"] is None else str(r["values"]): r["counts"]
                for r in pc.value_counts(pc.struct_field(positives, "grade")).to_pylist()
            }
        )
        room = EXAMPLES - sum(e["stage"] == stage for e in self.examples)
        self.examples += groups.slice(0, max(0, room)).to_pylist()


def render(record: Mapping[str, Any], seen: Seen) -> str:
    """The page as HTML.

    Args:
        record: The manifest's facts: totals, stages, dropped, rejected, draw, notes, config.
        seen: What was seen of the groups.
    """
    stages = record["stages"]
    groups = record["totals"]["groups"]
    positives = sum(s["positives"] for s in stages)
    negatives = sum(s["negatives"] for s in stages)
    several = sum(n for sizes in seen.sizes.values() for size, n in sizes.items() if size > 1)
    out = sum(d["queries"] for d in record["dropped"])
    sections = [_stages(stages, seen), _left_out(record), _examples(seen)]
    return render_page(
        job="groups",
        headline=f"{groups:,} training groups, {several:,} of them with several positives",
        lede="One group a query and stage: every positive, best first, and every negative, hardest first. How many of them an "
        "epoch sees is drawn by the trainer.",
        tiles=[
            Tile(f"{groups:,}", "groups", f"in {len(stages)} stage{'s' if len(stages) > 1 else ''}"),
            Tile(f"{positives / max(1, groups):.2f}", "positives a group", f"{positives:,} in all"),
            Tile(f"{negatives / max(1, groups):.2f}", "negatives a group", f"{negatives:,} in all"),
            Tile(f"{out:,}", "queries without a group", "by stage; see below"),
        ],
        sections=sections,
        record=record,
        warnings=record["notes"],
    )


def _stages(stages: Sequence[Mapping[str, Any]], seen: Seen) -> Section:
    rows = [
        [
            s["name"],
            f"{s['groups']:,}",
            f"{s['positives'] / max(1, s['groups']):.2f}",
            f"{s['negatives'] / max(1, s['groups']):.2f}",
            f"{s['dropped']:,}",
        ]
        for s in stages
    ]
    blocks = [Grid(("stage", "groups", "positives a group", "negatives a group", "queries dropped"), rows)]
    names = [s["name"] for s in stages]
    sizes = [
        [
            f"{a}" if a == b else f"{a} to {b}" if b else f"{a} and more",
            *(
                f"{sum(n for size, n in seen.sizes.get(s, {}).items() if size >= a and (b is None or size <= b)):,}"
                for s in names
            ),
        ]
        for a, b in _SIZES
    ]
    blocks.append(
        Grid(("positives", *names), [r for r in sizes if set(r[1:]) != {"0"}], title="Groups by positives")
    )
    blocks.append(_counts("Positives by grade", "grade", seen.grades, names))
    blocks.append(_counts("Negatives by source", "source", seen.sources, names))
    return Section("stages", "Stages", "They are trained in this order.", blocks)


def _counts(title: str, head: str, counts: Mapping[str, Counter[str]], names: Sequence[str]) -> Grid:
    keys = sorted({k for c in counts.values() for k in c})
    rows = [[k, *(f"{counts.get(s, Counter())[k]:,}" for s in names)] for k in keys]
    return Grid((head, *names), rows, title=title)


def _left_out(record: Mapping[str, Any]) -> Section:
    dropped = [[d["stage"], d["reason"], f"{d['queries']:,}"] for d in record["dropped"]]
    rejected = [[r["stage"], r["reason"], f"{r['candidates']:,}"] for r in record["rejected"]]
    blocks = []
    if dropped:
        blocks.append(Grid(("stage", "reason", "queries"), dropped, title="Queries", words=(0, 1)))
    if rejected:
        blocks.append(Grid(("stage", "reason", "candidates"), rejected, title="Candidates", words=(0, 1)))
    say = "Every one of them is a row in dropped/ or rejected/." if blocks else "Nothing."
    return Section("left-out", "Left out", say, blocks)


def _examples(seen: Seen) -> Section:
    texts = []
    for row in seen.examples:
        more = [
            (f"positive {p['quality_rank']} ({_label(p)})", _short(p))
            for p in row["positives"][:_MOST_DOCUMENTS]
        ]
        more += [
            (f"negative ({n['source']}{'' if n['rank'] is None else ' ' + str(n['rank'])})", _short(n))
            for n in row["negatives"][:_MOST_DOCUMENTS]
        ]
        meta = [
            ("query", row["query_id"]),
            ("stage", row["stage"]),
            ("positives", str(len(row["positives"]))),
            ("negatives", str(len(row["negatives"]))),
        ]
        texts.append(Text(meta, [("equal", row["query"] or row["query_id"])], more))
    return Section("groups", "Groups", "The first of each stage, as they stand.", [Texts("", texts)])


def _label(positive: Mapping[str, Any]) -> str:
    grade = "" if positive["grade"] is None else f"grade {positive['grade']} "
    return f"{grade}by {positive['annotator']}"


def _short(document: Mapping[str, Any]) -> str:
    text = document["text"] or document["doc_id"]
    whole = f"{document['title']}. {text}" if document["title"] else text
    return whole if len(whole) <= _MOST_CHARACTERS else whole[:_MOST_CHARACTERS] + " ..."
