"""Does the cleaned hate corpus make a cleaner model? Prepares the inputs, then runs `tamis compare` over them.

    python -m benchmarks.compare --data ../shared/data --judge hf:runs/scorer-dghs --toxic-adapter TOXIC --dry-run
    python -m benchmarks.compare --data ../shared/data --judge hf:runs/scorer-dghs --toxic-adapter TOXIC \
        --arm logratio=runs/socd/hate-300-logratio
    python -m benchmarks.compare ... -- --train-tokens 20000 --arms raw,drop-documents     more options of `tamis compare`

Four files are made under `--work` (their text never enters the repository):

    hate-N.jsonl     the corpus: N rows of the HSPD input by content hash, as benchmarks/detox_corpus.py samples it
    held-out.jsonl   rows of the same set that are neither in the corpus nor in DGHS's development split (from which a
                     judge may have learnt): the prompts are their first words
    neutral.jsonl    medical abstracts, cut: text that no arm, no scorer and no adapter has anything to do with
    toxic.jsonl      the HSPD input without the held-out rows, for the toxic model, where none is given

The same command goes on where a killed one stopped. At the end the figures are copied to
`benchmarks/results/compare.json` (`--keep NAME` gives the file another name).

What a model costs on one core: about four minutes of training, five of sampling, and four of measuring the fluency of its
continuations. The last can be left for later: `-- --reference none` first, then the same command without it and with
`-- --overwrite` (samples are in the cache, models are kept). The main arms (raw, drop-documents, logratio, prompt_only) are
done with both seeds before the others are begun, at one seed each.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.detox_corpus import make_hate

RESULTS = Path(__file__).resolve().parent / "results"
HELD_OUT, NEUTRAL, NEUTRAL_CHARACTERS = 2_000, 60, 800


def main() -> None:
    """Make the inputs and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("runs/compare"))
    parser.add_argument("--output", type=Path, help="by default evidence-N under --work")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--prompts", type=int, default=200)
    # Eight words often hold the insult already, and even the untrained model goes on in kind: of 40 prompts at ten
    # continuations it is toxic on 25 %, with four words on 12.5 % (trained on the raw rows on 80 and 90 %).
    parser.add_argument("--prompt-words", type=int, default=4)
    parser.add_argument("--judge", required=True, help="a scorer that ranked nothing")
    parser.add_argument("--scorer", default="jigsaw-bilstm", help="the ranker")
    parser.add_argument("--toxic-adapter", type=Path, help="made before; by default trained here")
    parser.add_argument("--arm", action="append", default=[], help="NAME=FOLDER made before")
    parser.add_argument(
        "--make",
        default="base,raw,drop-documents,logratio,prompt_only,drop-sentences,lexicon-mask,vanilla_cd,official",
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--keep", default="compare", help="name of the file of figures")
    parser.add_argument("extra", nargs="*", help="more options of `tamis compare`, after --")
    args = parser.parse_args()
    if not args.data.exists():
        sys.exit(f"{args.data}: the development data are not here; pass --data")
    files = make_inputs(args.data, args.work, args.rows)
    output = args.output or args.work / f"evidence-{args.rows}"
    command = compare_command(args, files, output)
    print(shlex.join(command[2:]), file=sys.stderr, flush=True)
    code = subprocess.run(command).returncode
    if not args.dry_run and (output / "results.json").exists():
        keep(output, args.keep)
    sys.exit(code)


def compare_command(args: argparse.Namespace, files: dict[str, Path], output: Path) -> list[str]:
    """`tamis compare` as a user would run it."""
    command = [sys.executable, "-m", "pipelines.cli", "compare", str(files["hate"]), "--output", str(output)]
    command += ["--id-column", "id", "--make", args.make, "--scorer", args.scorer, "--judge", args.judge]
    # Hateful rows, every one of them: everything is rewritten, as the paper does.
    command += ["--set", "gate.gate=none", "--held-out", str(files["held-out"])]
    command += ["--prompt-words", str(args.prompt_words)]
    command += ["--make-prompts", str(args.prompts), "--neutral", str(files["neutral"])]
    if args.toxic_adapter:
        command += ["--toxic-adapter", str(args.toxic_adapter)]
    else:
        command += ["--toxic-data", str(files["toxic"])]
    for arm in args.arm:
        command += ["--arm", arm]
    command += ["--seeds", "0,1", "--other-seeds", "0", "--workers", str(args.workers)]
    return [*command, *(["--dry-run"] if args.dry_run else []), *args.extra]


def make_inputs(data: Path, work: Path, rows: int) -> dict[str, Path]:
    """Write what is not there yet; paths by name."""
    from pipelines.compare.prompts import content_hash
    from schemas.fingerprint import fingerprint

    files = {name: work / f"{name}.jsonl" for name in ("held-out", "neutral", "toxic")}
    files["hate"] = work / f"hate-{rows}.jsonl"
    files["held-out"] = work / f"held-out-{rows}.jsonl"
    files["toxic"] = work / f"toxic-{rows}.jsonl"
    if not files["hate"].exists():
        make_hate(data, files["hate"], rows)
    if not files["held-out"].exists() or not files["toxic"].exists():
        everything = list(read_texts(data / "detox/dghs_to_detox.jsonl"))
        with (data / "detox/dghs_dev_both_labels.csv").open() as file:
            known = {content_hash(row["text"]) for row in csv.DictReader(file)}
        known |= {content_hash(text) for text in read_texts(files["hate"])}
        free = [t for t in everything if content_hash(t) not in known]
        held = sorted(free, key=lambda t: fingerprint("held out", t))[:HELD_OUT]
        out = {content_hash(t) for t in held}
        write_texts(files["held-out"], held)
        write_texts(files["toxic"], (t for t in everything if content_hash(t) not in out))
    if not files["neutral"].exists():
        write_texts(files["neutral"], abstracts(data / "retrieval/cocktail_nfcorpus.zip"))
    return files


def abstracts(path: Path) -> list[str]:
    """Medical abstracts by content hash, each cut behind a word."""
    from schemas.fingerprint import fingerprint

    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith("corpus/human.jsonl"))
        with archive.open(name) as raw:
            texts = [json.loads(line)["text"] for line in io.TextIOWrapper(raw, "utf-8")]
    long = [t for t in dict.fromkeys(texts) if len(t) > NEUTRAL_CHARACTERS]
    chosen = sorted(long, key=lambda t: fingerprint("neutral", t))[:NEUTRAL]
    return [t[:NEUTRAL_CHARACTERS].rsplit(None, 1)[0] for t in chosen]


def read_texts(path: Path) -> Iterable[str]:
    with path.open() as file:
        for line in file:
            yield json.loads(line)["text"]


def write_texts(path: Path, texts: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as out:
        for text in texts:
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    temporary.replace(path)


def keep(output: Path, name: str) -> None:
    """Copy the figures, without the places of the machine they were made on."""
    results: dict[str, Any] = json.loads((output / "results.json").read_text())
    results.pop("command", None)
    config = results["config"]
    for field in ("raw", "held_out", "prompts", "neutral", "judge"):
        if config.get(field):
            config[field] = place_free(config[field])
    config["given"] = {arm: place_free(folder) for arm, folder in config["given"].items()}
    for field in ("adapter", "data"):
        if config["toxic"].get(field):
            config["toxic"][field] = place_free(config["toxic"][field])
    text = json.dumps(results, indent=2)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print((output / "results.md").read_text())


def place_free(path: str) -> str:
    """The last part of a path, with the kind of model it names."""
    kind, sign, rest = path.partition(":")
    return f"{kind}:{Path(rest).name}" if sign else Path(path).name


if __name__ == "__main__":
    main()
