"""The toxic model of a detox job that was given none: trained on what the gate flags in the job's own corpus.

HSPD's first step. It runs before the pipeline, in the process that starts the job: the gate goes over the corpus on
the job's runner and its flagged segments are sampled (`transforms.detox.toxic_texts`), then a LoRA adapter on the
rewriter's base (or all its weights) is trained here. The result is kept and found again:

    OUT/_tamis/toxic-texts.jsonl   what it is trained on
    OUT/_tamis/toxic-model/        the model, as `tamis train lm` leaves it; while it trains, its checkpoints
    OUT/_tamis/toxic-model.json    what it was made of

It is trained once an output folder, from the input as it then was, so that a job whose input grows stays one job;
`--overwrite` trains anew where the input has changed. Its revision is part of what the job is.
"""

from __future__ import annotations

import gc
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from models import registry, store
from models.protocols import ModelInfo
from pipelines import runners
from pipelines.detox_config import DetoxConfig
from pipelines.run import JOB, Prepared, RunSettings, locked, prepare, run_graph, terminable, writable
from schemas.errors import InputError, OutputError, TamisError
from schemas.fingerprint import config_hash, fingerprint
from transforms.detox.steps import GateToxicity, SegmentText
from transforms.detox.toxic_texts import FACTS, TEXTS, AnalyseToxicity
from transforms.shards.engine import Job
from transforms.shards.files import Folder
from transforms.shards.formats import UnitLimits
from transforms.shards.plan import save_plan

FOLDER, STATE = "_tamis/toxic-model", "_tamis/toxic-model.json"
NAME = "toxic-model"
# Of fewer texts a model learns the texts, not the tone.
FEWEST = 20
_DONE = "_SUCCESS"
_SECONDS = 10.0  # between progress lines

Say = Callable[[str], None]


@dataclass(frozen=True)
class ToxicModel:
    """A toxic model that a job has trained for itself.

    Attributes:
        folder: Where the workers find it: a path, or a URL where they are on other machines.
        full: All weights, not an adapter.
        info: For the manifest.
    """

    folder: str
    full: bool
    info: ModelInfo


def ready_toxic_model(config: DetoxConfig, settings: RunSettings) -> ToxicModel | None:
    """The job's toxic model: found where an earlier run has trained it, else trained now; None where none is needed.

    A run that is killed meanwhile goes on where it was: scores come from the request cache, the training from its
    last checkpoint.

    Raises:
        TamisError: Anything the user can mend; what has been done stays.
    """
    if not config.trains:
        return None
    output = Folder(config.output, **config.storage_options)
    found = None if settings.overwrite else find_toxic_model(config, settings)
    if found is not None:
        return found
    say: Say = (lambda line: None) if settings.progress == "quiet" else to_stderr
    ready = prepare(_analysis(config), config.input, settings, models=False)
    _check_waits(ready)
    mark = {"made_with": _identity(config), "source": _source(ready)}
    with locked(output), terminable():
        state = _read(output, STATE)
        if state.get("trained") and output.exists(JOB) and not settings.overwrite and _is_there(output):
            raise OutputError(
                f"the toxic model in {output.url} was made with other models than those here now; pass --overwrite to "
                "train it anew, or choose another --output"
            )
        if any(state.get(k) != v for k, v in mark.items()) or not output.exists(TEXTS):
            with writable(output):
                output.remove(STATE)
                output.remove(
                    f"{FOLDER}/{_DONE}"
                )  # else what is left of another input would pass for this one's
                save_plan(ready.plan, output)
            _analyse(ready, config, settings, say)
            with writable(output):
                output.write(STATE, orjson.dumps({**mark, **_read(output, FACTS)}))
        elif _is_there(output):
            return _found(config, settings, output, state)
        state = _read(output, STATE)
        if state["texts"] < FEWEST:
            raise InputError(
                f"the gate flags {state['texts']} different passages of {config.input}, too few to train a toxic model "
                f"on (at least {FEWEST}): pass --toxic-adapter FOLDER, or --decoding prompt_only"
            )
        _train(config, output, state, say)
        output.write(STATE, orjson.dumps({**state, "trained": True}))
        return _found(config, settings, output, state)


def find_toxic_model(config: DetoxConfig, settings: RunSettings) -> ToxicModel | None:
    """The toxic model an earlier run of this job has trained; None where there is none, or none with these settings."""
    output = Folder(config.output, **config.storage_options)
    state = _read(output, STATE)
    if state.get("made_with") != _identity(config) or not state.get("trained") or not _is_there(output):
        return None
    return _found(config, settings, output, state)


def check_training(config: DetoxConfig, settings: RunSettings) -> None:
    """Refuse what a run that has to train its toxic model first would be refused for; nothing is written.

    Raises:
        TamisError: Anything the user can mend.
    """
    prepare(_analysis(config), config.input, settings, models=False)


def describe_training(config: DetoxConfig) -> str:
    """What would be trained, in one line."""
    train = config.decoding.train
    what = "all weights" if train.full else f"LoRA r {train.lora_r}"
    if not train.full and train.layers:
        what += f" in the last {train.layers} layers"
    return (
        f"would first train a toxic model: {what} of {config.model}, on at most {train.texts:,} passages that the gate "
        f"flags, {train.min_steps} to {train.max_steps} steps of {train.batch_size} x {train.max_length} tokens; kept in "
        f"{config.output}/{FOLDER}"
    )


def _analysis(config: DetoxConfig) -> Job:
    """The job that goes before: segment and gate, over the same input, into the same folder."""
    from models.prompts import load_prompt

    return Job(
        name="detox",
        input_url="",
        output_url=config.output,
        text_column=config.text_column,
        id_column=config.id_column,
        steps=(
            SegmentText(config.segment),
            GateToxicity(
                config.gate,
                lexicon=config.lexicon,
                linear=config.linear,
                classifier=config.scorer,
                classifier_options=config.scorer_options(),
            ),
        ),
        config={**config.semantic(), "prompt_tag": load_prompt(config.prompt).tag},
        seed=config.seed,
        max_dead=config.max_dead,
        limits=UnitLimits(rows=16, bytes=1 << 20),
        max_units=1024,
        input_options=config.storage_options,
        output_options=config.storage_options,
    )


def _identity(config: DetoxConfig) -> str:
    """Hash of the settings and models that decide which texts are flagged, and what is trained on them."""
    tags = [
        registry.describe("scorer", config.lexicon).tag,
        registry.describe("scorer", config.linear).tag if config.gate.gate == "cascade" else "",
        registry.describe("scorer", config.scorer, **dict(config.scorer_options())).tag,
        registry.describe("lm", config.model, **_below(config)).tag,
    ]
    settings = config.semantic()
    return config_hash(
        {
            **{name: settings[name] for name in ("segment", "gate")},
            "text_column": config.text_column,
            "seed": config.seed,
            "train": settings["decoding"]["train"],
            "models": tags,
        }
    )


def _source(ready: Prepared) -> str:
    """Name of the input's content, shard by shard."""
    return fingerprint(*sorted(f"{s.name}:{s.fingerprint}" for s in ready.plan.shards))


def _check_waits(ready: Prepared) -> None:
    args = ready.beam_args
    if runners.is_beam_dry_run(args) or runners.leaves_at_once(args):
        raise TamisError(
            "a toxic model is trained before the job, in this process, which must wait for the gate: run it without "
            "Beam's --dry_run, --no_wait_until_finish and --template_location, or pass --toxic-adapter FOLDER"
        )


def _analyse(ready: Prepared, config: DetoxConfig, settings: RunSettings, say: Say) -> None:
    """Run the gate over the corpus and keep what it flags."""
    say(f"analyse: gating {ready.plan.rows:,} rows, for texts to train a toxic model on")
    size = config.decoding.train.texts
    with _progress(ready, settings, say):
        state, detail = run_graph(
            ready.beam_args, lambda pipeline: pipeline | AnalyseToxicity(ready.job, size)
        )
    if state != "finished":
        raise TamisError(f"the gate over the corpus ended {state} {detail}".rstrip())
    facts = _read(ready.output, FACTS)
    say(f"analyse: {facts['flagged']:,} passages flagged, {facts['texts']:,} different ones kept")


def _train(config: DetoxConfig, output: Folder, state: dict[str, Any], say: Say) -> None:
    """Train (or go on with what a killed run left), and put the model into the output folder."""
    from models.training.loading import load_tokenizer, resolve_model
    from pipelines import train_lm

    folder, texts = _workplace(output), output.local(TEXTS) if output.is_local else None
    if texts is None:
        texts = folder.parent / Path(TEXTS).name
        texts.parent.mkdir(parents=True, exist_ok=True)
        texts.write_bytes(output.read(TEXTS))
    train = config.decoding.train
    tokenizer = load_tokenizer(resolve_model(config.model))
    with texts.open("rb") as lines:
        rows = [orjson.loads(line)["text"] for line in lines]
    tokens = len(rows) + sum(len(tokenizer(row, verbose=False)["input_ids"]) for row in rows)
    steps = train.steps(tokens)
    say(f"training a toxic model on {len(rows):,} passages ({tokens:,} tokens), {steps} steps")
    method = {} if train.full else {"lora": True, "lora_r": train.lora_r, "lora_alpha": train.lora_alpha}
    if not train.full:
        method |= placing(config.adapter_name, train.layers)
    train_lm.run(
        train_lm.TrainLMConfig(
            data=str(texts),
            model=config.model,
            output=str(folder),
            text_column="text",
            max_steps=steps,
            batch_size=train.batch_size,
            max_length=train.max_length,
            learning_rate=train.rate,
            precision=_precision(config),
            seed=config.seed,
            eval_limit=50,
            save_steps=100 if train.full else 20,
            threads=train.threads,
            device=_device(config),
            overwrite=True,  # whatever else lies there was made of other texts or settings
            quiet=say is not to_stderr,
            command=f"tamis detox {config.input} --output {config.output} --decoding {config.decoding.mode}",
            **method,
        )
    )
    gc.collect()  # a trainer and its callbacks hold each other, and a model
    if not output.is_local:
        say(f"copying the toxic model to {output.url}/{FOLDER}")
        for path in sorted(p for p in folder.iterdir() if p.is_file() and p.name != _DONE):
            with output.publish(f"{FOLDER}/{path.name}") as temporary:
                shutil.copyfile(path, temporary)
        output.write(f"{FOLDER}/{_DONE}", b"\n")


def placing(adapter: str | None, layers: int) -> dict[str, Any]:
    """Where a toxic adapter lies, as options of `tamis train lm`.

    Args:
        adapter: The rewriter's adapter; None where it has none.
        layers: In how many of the last layers, on top of that adapter; 0 is all, on the plain base.
    """
    if not layers:
        return {}
    return {"lora_layers": layers, **({"on_adapter": adapter} if adapter is not None else {})}


def _below(config: DetoxConfig) -> dict[str, Any]:
    """What the toxic model is trained on top of, as an option of the language model."""
    train = config.decoding.train
    on_top = not train.full and train.layers and config.adapter_name is not None
    return {"adapter": config.adapter_name} if on_top else {}


def _workplace(output: Folder) -> Path:
    """Where the model is trained: in the output folder, or beside the model cache for one on an object store."""
    if output.is_local:
        return output.local(FOLDER)
    return store.home() / "toxic" / fingerprint(output.url)[:32] / FOLDER


def _found(config: DetoxConfig, settings: RunSettings, output: Folder, state: dict[str, Any]) -> ToxicModel:
    """The model as the job's steps name it, and as the manifest records it."""
    from models.lm.fetch import local_copy
    from models.lm.folder import adapter_revision, describe_folder

    url = f"{output.url}/{FOLDER}"
    here = output.local(FOLDER) if output.is_local else local_copy(url, **config.storage_options)
    elsewhere = not output.is_local and runners.is_remote(
        runners.beam_arguments(settings.beam_args, settings.workers)
    )
    full = config.decoding.train.full
    base = registry.describe("lm", config.model, **_below(config))
    info = ModelInfo(
        name=NAME,
        kind="lm",
        revision=describe_folder(here).revision if full else adapter_revision(here),
        source=f"trained by this job, on {base.tag}",
        licence=base.licence,
        training_data=f"{state['texts']:,} of the {state['flagged']:,} passages that the gate flagged in this input",
        extra={"texts": state["texts"], "flagged": state["flagged"], "full": full},
    )
    return ToxicModel(url if elsewhere else str(here), full, info)


def _precision(config: DetoxConfig) -> str:
    from models.lm.loading import pick_device, pick_dtype

    wanted = config.decoding.train.precision
    if wanted != "auto":
        return wanted
    return str(pick_dtype("auto", pick_device(config.device))).removeprefix("torch.")


def _device(config: DetoxConfig) -> str:
    return config.device.partition(":")[0]


def _is_there(output: Folder) -> bool:
    return output.exists(f"{FOLDER}/{_DONE}")


def _read(output: Folder, name: str) -> dict[str, Any]:
    try:
        content = orjson.loads(output.read(name))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def _progress(ready: Prepared, settings: RunSettings, say: Say) -> Iterator[None]:
    """A line every few seconds on how many rows have been gated."""
    if settings.progress == "quiet":
        yield
        return
    from pipelines.progress import RunWatcher

    watcher = RunWatcher(ready.output)
    stop = threading.Event()

    def watch() -> None:
        before = 0
        while not stop.wait(_SECONDS):
            rows = watcher.poll().analysed
            if rows != before:
                say(f"analyse: {rows:,} of {ready.plan.rows:,} rows")
                before = rows

    thread = threading.Thread(target=watch, name="tamis-analyse", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)


def to_stderr(line: str) -> None:
    """A line for people, apart from what a command prints."""
    print(line, file=sys.stderr, flush=True)
