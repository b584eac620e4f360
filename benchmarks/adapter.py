"""The embedded rewriter's adapter: prepare ParaDetox pairs, train, evaluate on rows it did not see, ship.

    python -m benchmarks.adapter prepare PARADETOX.tsv --work WORK
    python -m benchmarks.adapter train --work WORK [any option of `tamis train lm`]
    python -m benchmarks.adapter evaluate --work WORK
    python -m benchmarks.adapter ship --work WORK

PARADETOX.tsv is the English ParaDetox release (CC0): columns toxic, neutral1, neutral2, neutral3. No text of it
stands in the repository: `ship` copies weights, settings and figures only.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.fingerprint import derive_seed, digest

PROMPT = "detox-rewrite-v1"
RECIPE = (
    "--model", "smollm2", "--lora", "--lora-r", "12", "--lora-alpha", "24", "--prompt", PROMPT,
    "--prompt-column", "source", "--completion-column", "target", "--max-length", "512", "--batch-size", "1",
    "--epochs", "1", "--learning-rate", "8e-4", "--precision", "bfloat16", "--save-dtype", "bfloat16",
    "--threads", "1", "--eval-limit", "100",
)  # fmt: skip
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
ROOT = Path(__file__).resolve().parents[1]
SHIPPED, RESULTS = ROOT / "models" / "adapters" / "detox", ROOT / "docs" / "results" / "adapter.md"
FLOOR, CEILING = 0.55, 0.4  # of similarity and of the target's toxicity, for pairs that are trained on
SLACK = 0.1  # of fusion score, that a reference may lie below a text's best one
JOINED = 0.12  # share of pairs also joined with another to a longer text
LEGEND = """`answered`: share of rows with an answer that closes its tag. `nontoxic`: share the six-label model (`jigsaw-bilstm`)
scores below 0.5, no answer counting as toxic; `nontoxic linear`: the same by the linear model, which neither filtered
pairs nor ranked. `toxicity`: the six-label model's mean. `similarity`: mean cosine (minilm) to the source. `joint`: mean
over rows of similarity where non-toxic, else 0. `copied`: answers equal to the source but for case and punctuation.
`length`: words of the answer by words of the source. Best of 10: temperatures 0.6 to 1.5, two each, ranked by
0.5 similarity - 0.5 toxicity, so its `nontoxic` is judged by its ranker; of people's references the best by the same."""
BASE_ROWS = 300
HELD_OUT, CHOOSE = 1000, 500  # rows: the figures' and the choosing split
SPLITS = ("held_out", "choose", "train")


def normalise(text: str) -> str:
    """What two texts that say the same letter by letter have in common: words in lower case."""
    return re.sub(r"\W+", " ", text.lower()).strip()


def split_rows(rows: Sequence[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Deal rows out by a hash of the normalised toxic text: equal texts stay on one side, in any order of rows."""
    groups: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(normalise(row["toxic"]), []).append(row)
    order = sorted(groups, key=lambda text: digest("paradetox-split", text))
    dealt: dict[str, list[dict[str, str]]] = {name: [] for name in SPLITS}
    for text in order:
        full = [len(dealt["held_out"]) >= HELD_OUT, len(dealt["choose"]) >= CHOOSE]
        dealt[SPLITS[0] if not full[0] else SPLITS[1] if not full[1] else SPLITS[2]] += groups[text]
    return dealt


def align_style(source: str, target: str, cased: bool) -> tuple[str, str]:
    """Give both sides of a pair one style, so that the model learns to keep a text's own.

    ParaDetox's toxic side is all lower case while half of its neutral side is not, and final stops come and go: taken
    as it is, it teaches to change case and punctuation at random.

    Args:
        source: The toxic side.
        target: The neutral side.
        cased: Both in sentence case; otherwise both in lower case.
    """
    source, target = " ".join(source.split()), " ".join(target.split())
    if cased:
        source, target = sentence_case(source), target if target != target.lower() else sentence_case(target)
    else:
        source, target = source.lower(), target.lower()
    end = source[-1:] if source[-1:] in ".!?" else ""
    body = target.rstrip(" .!") if not target.endswith(("?", "...")) else target
    if end and not body.endswith(("?", ".", "!")):
        spaced = " " if len(source) > 1 and source[-2] == " " else ""
        body += spaced + ("." if end == "?" else end)
    return source, body or target


def sentence_case(text: str) -> str:
    """Capitals at the start, after a full stop, and for the pronoun."""
    text = re.sub(r"\bi\b(?!\.)", "I", text)
    return re.sub(r"(^\W*|[.!?]\s+)([a-z])", lambda m: m.group(1) + m.group(2).upper(), text)


def prepare(tsv: Path, work: Path, *, floor: float, ceiling: float) -> None:
    """Write `pairs/<split>/pairs.parquet`: source, target and what the filters saw of them."""
    with tsv.open(encoding="utf-8", newline="") as stream:
        dealt = split_rows(list(csv.DictReader(stream, delimiter="\t")))
    for name, rows in dealt.items():
        pairs = measure(
            [
                {"row": i, "source": row["toxic"].strip(), "target": row[f"neutral{k}"].strip()}
                for i, row in enumerate(rows)
                for k in (1, 2, 3)
                if (row[f"neutral{k}"] or "").strip()
            ]
        )
        said = f"{name}: {len(rows):,} rows, {len(pairs):,} pairs"
        if name == "train":
            kept = keep_near_best([p for p in pairs if keeps(p, floor=floor, ceiling=ceiling)])
            pairs = [style(p) for p in kept]
            joined = join_some(pairs)
            said += f", {len(pairs):,} kept, {len(joined):,} joined"
            pairs += joined
        (work / "pairs" / name).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(pairs), work / "pairs" / name / "pairs.parquet")
        print(said)


def measure(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add cosine similarity of the two sides, and the toxicity of each."""
    from models import registry

    texts = sorted({p[side] for p in pairs for side in ("source", "target")})
    index = {text: i for i, text in enumerate(texts)}
    vectors = registry.load("encoder", "minilm").encode(texts)
    toxicity = registry.load("scorer", "jigsaw-bilstm").score(texts)[:, 0]
    out = []
    for pair in pairs:
        a, b = index[pair["source"]], index[pair["target"]]
        similarity = float(np.dot(vectors[a], vectors[b]))
        out.append(
            {
                **pair,
                "similarity": similarity,
                "tox_source": float(toxicity[a]),
                "tox_target": float(toxicity[b]),
            }
        )
    return out


def keeps(pair: dict[str, Any], *, floor: float, ceiling: float) -> bool:
    """Whether a pair teaches: its target is another text, near in meaning, and no longer toxic."""
    changed = normalise(pair["source"]) != normalise(pair["target"])
    return changed and pair["similarity"] >= floor and pair["tox_target"] < ceiling


def keep_near_best(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of several references to one text those near the best by fusion score: the others blur what is learned."""
    best: dict[str, float] = {}
    for p in pairs:
        best[p["source"]] = max(best.get(p["source"], -1.0), fusion(p))
    return [p for p in pairs if fusion(p) >= best[p["source"]] - SLACK]


def fusion(pair: dict[str, Any]) -> float:
    """0.5 similarity - 0.5 toxicity of a pair's target."""
    return 0.5 * float(pair["similarity"]) - 0.5 * float(pair["tox_target"])


def join_some(pairs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Longer texts made of two pairs: both toxic, or a harmless sentence beside a toxic one, which must stay."""
    joined = []
    far = len(pairs) // 2  # neighbours are often two references to one text
    for one, other in zip(pairs, [*pairs[far:], *pairs[:far]], strict=True):
        draw = derive_seed(0, "join", one["source"], other["source"]) % 1000 / 1000
        if draw >= JOINED:
            continue
        first = one["source"] if draw < JOINED / 3 else one["target"]
        sides = [(first, one["target"]), (other["source"], other["target"])]
        if draw >= JOINED * 2 / 3:
            sides.reverse()
        source, target = (" ".join(stopped(text) for text in texts) for texts in zip(*sides, strict=True))
        joined.append({**other, "source": source, "target": target})
    return joined


def stopped(text: str) -> str:
    """The text with a sentence's end, in sentence case."""
    return sentence_case(text if text[-1:] in ".!?" else text + ".")


def style(pair: dict[str, Any]) -> dict[str, Any]:
    """The pair in one style; which one is drawn from its content."""
    cased = derive_seed(0, "style", pair["source"], pair["target"]) % 2 == 0
    source, target = align_style(pair["source"], pair["target"], cased)
    return {**pair, "source": source, "target": target}


def train(work: Path, output: Path, *, options: Sequence[str]) -> None:
    """Train on the prepared pairs; `options` go to `tamis train lm` as they stand."""
    from pipelines.train_lm import main as train_lm

    code = train_lm([str(work / "pairs" / "train"), "--output", str(output), *RECIPE, *options])
    if code:
        sys.exit(code)


def evaluate(work: Path, adapter: Path | None, *, split: str, rows: int, candidates: bool) -> dict[str, Any]:
    """Figures of a rewriter on one split: greedy, and (asked for) the best of ten by fusion score.

    Args:
        work: Holds `pairs/`.
        adapter: The adapter; None for the base model as it comes.
        split: `held_out` or `choose`.
        rows: First rows of the split to take; 0 = all.
        candidates: Also sample ten per row, at the detox job's default temperatures.
    """
    from models import registry
    from models.prompts import load_prompt
    from models.protocols import GenerationRequest, Sampling

    sources = [s for s, _ in references(work, split, rows)]
    prompt = load_prompt(PROMPT)
    model = registry.load("lm", "smollm2", **({"adapter": str(adapter)} if adapter else {}))
    requests = []
    for source in sources:
        messages, prefill, stop = prompt.render(text=source)
        requests.append(GenerationRequest(messages, derive_seed(0, "adapter", source), prefill, stop))
    figures = {}
    for name, sampling in {
        "greedy": Sampling((0.0,), 1, max_new_tokens=64, repetition_penalty=1.0),
        **({"best_of_10": Sampling(max_new_tokens=64)} if candidates else {}),
    }.items():
        started = time.monotonic()
        done = model.generate(requests, sampling)
        seconds = time.monotonic() - started
        answers = [[a for c in g.candidates if (a := prompt.parse(c))] for g in done]
        tokens = sum(c.tokens for g in done for c in g.candidates)
        figures[name] = {**judge(sources, answers), "tokens_per_second": round(tokens / seconds, 1)}
    return figures


def baselines(work: Path, *, split: str, rows: int) -> dict[str, Any]:
    """Figures of doing nothing, and of the people who wrote the references."""
    pairs = references(work, split, rows)
    sources = [s for s, _ in pairs]
    return {
        "copy": judge(sources, [[s] for s in sources]),
        "people_first": judge(sources, [people[:1] for _, people in pairs]),
        "people_best": judge(sources, [people for _, people in pairs]),
    }


def references(work: Path, split: str, rows: int) -> list[tuple[str, list[str]]]:
    """(source, its references) for each row of a split, in order."""
    grouped: dict[int, tuple[str, list[str]]] = {}
    for pair in pq.read_table(work / "pairs" / split).to_pylist():
        grouped.setdefault(pair["row"], (pair["source"], []))[1].append(pair["target"])
    whole = [grouped[row] for row in sorted(grouped)]
    return whole[:rows] if rows else whole


def judge(sources: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Figures over n rows; of several answers to a row the one with the best fusion score counts.

    Args:
        sources: n toxic texts.
        answers: For each its answers; none where the model gave none that closes its tag.

    Returns:
        answered: share with an answer. nontoxic: share with one the six-label model scores below 0.5 (none counts as
        toxic). toxicity: its mean score. nontoxic_linear: the same share by the linear model, which ranked nothing.
        similarity: mean cosine (minilm) of answer and source. joint: mean of similarity where non-toxic, else 0.
        copied: share of answers equal to the source but for case and punctuation. length: mean ratio of words.
    """
    from models import registry

    flat = [(i, a) for i, row in enumerate(answers) for a in row]
    texts = [a for _, a in flat]
    encoder = registry.load("encoder", "minilm")
    anchors = encoder.encode(list(sources))
    vectors = encoder.encode(texts)
    toxicity = registry.load("scorer", "jigsaw-bilstm").score(texts)[:, 0]
    linear = registry.load("scorer", "linear").score(texts)[:, 0]
    best: dict[int, dict[str, float]] = {}
    for k, (i, answer) in enumerate(flat):
        similarity = float(np.dot(anchors[i], vectors[k]))
        found = {
            "fusion": 0.5 * similarity - 0.5 * float(toxicity[k]),
            "similarity": similarity,
            "toxicity": float(toxicity[k]),
            "linear": float(linear[k]),
            "copied": float(normalise(answer) == normalise(sources[i])),
            "length": len(answer.split()) / max(1, len(sources[i].split())),
        }
        if i not in best or found["fusion"] > best[i]["fusion"]:
            best[i] = found
    chosen, n = list(best.values()), len(sources)

    def mean(name: str) -> float:
        return round(float(np.mean([c[name] for c in chosen])) if chosen else 0.0, 4)

    return {
        "rows": n,
        "answered": round(len(chosen) / n, 4),
        "nontoxic": round(sum(c["toxicity"] < 0.5 for c in chosen) / n, 4),
        "toxicity": mean("toxicity"),
        "nontoxic_linear": round(sum(c["linear"] < 0.5 for c in chosen) / n, 4),
        "similarity": mean("similarity"),
        "joint": round(sum(c["similarity"] * (c["toxicity"] < 0.5) for c in chosen) / n, 4),
        "copied": mean("copied"),
        "length": mean("length"),
    }


def ship(adapter: Path, figures: Path, target: Path, results: Path) -> None:
    """Copy weights and settings into the package, and write the model card and the page of results."""
    record = json.loads((adapter / "train.json").read_text("utf-8"))
    measured = json.loads(figures.read_text("utf-8"))
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(adapter / "adapter_model.safetensors", target / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    config["base_model_name_or_path"] = BASE  # the folder it was trained from means nothing elsewhere
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    (target / "README.md").write_text(card(record, measured), "utf-8")
    results.write_text(page(record, measured), "utf-8")
    print(f"{target}: {(target / 'adapter_model.safetensors').stat().st_size:,} bytes")


def card(record: dict[str, Any], measured: dict[str, Any]) -> str:
    """The model card of the shipped adapter."""
    run, data, lora = record["run"], record["data"], record["lora"]
    return f"""---
library_name: peft
base_model: {BASE}
license: apache-2.0
pipeline_tag: text-generation
language: en
tags: [tamis, detoxification, lora]
---

# detox: the embedded rewriter's adapter

A LoRA adapter (r {lora["r"]}, alpha {lora["alpha"]}, all linear layers) that makes SmolLM2-135M-Instruct rewrite a toxic English
sentence so that its meaning stays and its toxicity goes. `tamis detox` uses it by default; by hand:

```python
from models import registry

rewriter = registry.load("lm", "smollm2", adapter="detox")
```

It was trained with the prompt `{data["form"]["prompt"]}` and answers that prompt only: other prompts reach the base model's
habits. One sentence in, one sentence out; English; sentences of everyday online talk. It is a small model: it also
changes what it should not, which is why the job checks every candidate and falls back. Do not use it without such checks.

## Data

{data["counts"]["rows"]:,} pairs of ParaDetox (CC0), {data["held_out"]} of them for watching the loss; no text of it is in this repository.
1,000 rows (split off by a hash of their content) were never trained on and give the figures below; {CHOOSE} more chose between
runs. Left out of training: pairs whose sides are equal, whose target the six-label model scores {CEILING:g} or more, or
whose sides are further apart than cosine {FLOOR:g} (minilm); of several references to a text those {SLACK:g} of fusion score or
more below its best. {JOINED:.0%} of the pairs were also joined with another to a longer text, some with a harmless sentence
that has to stay as it is. Both sides of a pair were given one style of case and final
punctuation, so that the model keeps the style it meets.

## Figures on the held-out rows

{table(measured)}

{LEGEND}

## How it was made

{run["steps"]:,} steps ({run["epochs"]:.2f} epochs), rows of {run["max_length"]} tokens that share the prompt's first {run["shared_prefix"]} tokens, learning rate
{run["learning_rate"]:g} ({run["schedule"]}), {run["precision"]} mixed precision, seed {run["seed"]}, one CPU thread. Training loss {record["results"]["train_loss"]:.3f}; loss on pairs
not trained on {record["results"]["eval_loss_before"]:.3f} before, {record["results"]["eval_loss"]:.3f} after (nats per token of the completion).

```
{commands(record)}
```

Licence: Apache-2.0, as the base model's; the training data are CC0.
"""


def page(record: dict[str, Any], measured: dict[str, Any]) -> str:
    """docs/results/adapter.md: numbers and commands only."""
    return f"""# The embedded rewriter's adapter: figures

SmolLM2-135M-Instruct with the LoRA adapter `detox` (models/adapters/detox), on {measured["rows"]:,} held-out rows of ParaDetox.

{table(measured)}

{LEGEND}

```
{commands(record)}
```
"""


def table(measured: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    names = {
        "copy": "copying the source",
        "base_greedy": "base model, greedy",
        "base_best_of_10": "base model, best of 10",
        "greedy": "**adapter, greedy**",
        "best_of_10": "**adapter, best of 10**",
        "people_first": "people, first reference",
        "people_best": "people, best reference",
    }
    columns = (
        "answered",
        "nontoxic",
        "nontoxic_linear",
        "toxicity",
        "similarity",
        "joint",
        "copied",
        "length",
    )
    lines = ["| | " + " | ".join(columns).replace("_", " ") + " |", "|---|" + "---|" * len(columns)]
    for key, name in names.items():
        if key in measured["figures"]:
            row = measured["figures"][key]
            lines.append(
                f"| {name} | "
                + " | ".join(f"{row[c]:,}" if c == "rows" else f"{row[c]:.3f}" for c in columns)
                + " |"
            )
    return "\n".join(lines)


def commands(record: dict[str, Any]) -> str:
    """The commands that remake it."""
    extra = " ".join(extra_options(record["command"]))
    return "\n".join(
        [
            "python -m benchmarks.adapter prepare PARADETOX.tsv --work WORK",
            f"python -m benchmarks.adapter train --work WORK --output WORK/adapter {extra}".rstrip(),
            "python -m benchmarks.adapter evaluate --work WORK --adapter WORK/adapter",
            "python -m benchmarks.adapter ship --work WORK --adapter WORK/adapter",
        ]
    )


def extra_options(command: str) -> list[str]:
    """What a training command says beyond the recipe and its two folders."""
    words = shlex.split(command)[4:]
    at = words.index("--output")
    words = words[:at] + words[at + 2 :]
    return words[len(RECIPE) :] if words[: len(RECIPE)] == list(RECIPE) else words


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the top of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=["prepare", "train", "evaluate", "ship"])
    parser.add_argument("tsv", nargs="?", type=Path, help="prepare: the ParaDetox file")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, help="train: where to (default WORK/adapter)")
    parser.add_argument("--adapter", type=Path, help="evaluate, ship: default WORK/adapter")
    parser.add_argument("--split", choices=SPLITS[:2], default="held_out")
    parser.add_argument("--rows", type=int, default=0, help="evaluate: first so many rows only")
    parser.add_argument(
        "--candidates", action=argparse.BooleanOptionalAction, default=True, help="best of ten too"
    )
    parser.add_argument("--floor", type=float, default=FLOOR)
    parser.add_argument("--ceiling", type=float, default=CEILING)
    options, rest = parser.parse_known_args(argv)
    adapter = options.adapter or options.work / "adapter"
    if options.verb == "prepare":
        prepare(options.tsv, options.work, floor=options.floor, ceiling=options.ceiling)
    elif options.verb == "train":
        train(options.work, options.output or options.work / "adapter", options=rest)
    elif options.verb == "evaluate":
        figures = baselines(options.work, split=options.split, rows=options.rows)
        for name, source in (("", adapter), ("base_", None)):
            # The base model talks until it is stopped: ten times the tokens, so fewer rows.
            rows = options.rows or (0 if source else BASE_ROWS)
            found = evaluate(
                options.work, source, split=options.split, rows=rows, candidates=options.candidates
            )
            figures |= {f"{name}{key}": value for key, value in found.items()}
        record = {"split": options.split, "rows": figures["copy"]["rows"], "figures": figures}
        (options.work / f"figures-{options.split}.json").write_text(
            json.dumps(record, indent=2) + "\n", "utf-8"
        )
        print(table(record))
    else:
        ship(adapter, options.work / "figures-held_out.json", SHIPPED, RESULTS)


if __name__ == "__main__":
    main()
