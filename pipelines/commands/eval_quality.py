"""`tamis eval utility`, `eval spans`, `eval rewrites`: options only, what they do is imported when they are called."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.commands.options import Progress, Storage, pairs

Output = Annotated[
    str, typer.Option("--output", "-o", help="Folder for the results; run again to add to it.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.", rich_help_panel="Running")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16.", rich_help_panel="Running")]
Threads = Annotated[int, typer.Option(help="Torch threads.", min=1, rich_help_panel="Running")]
Draws = Annotated[int, typer.Option(help="Bootstrap resamples.", min=100, rich_help_panel="Running")]
Seed = Annotated[int, typer.Option(help="Seed of every draw.", rich_help_panel="Running")]
Cache = Annotated[
    str | None,
    typer.Option(
        help="Where models' answers are kept; default inside the folder.", rich_help_panel="Running"
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to `tamis eval`."""
    app.command(
        "utility",
        epilog="Example: tamis eval utility --text neutral.jsonl --model raw=models/raw --model clean=models/clean "
        "--rewritten clean=out/ -o utility/",
    )(utility)
    app.command(
        "rewrites",
        epilog="Example: tamis eval rewrites pairs.parquet --source toxic --system ours=rewritten --system detox=out/ "
        "-o rewrites/",
    )(rewrites)
    app.command(
        "spans",
        epilog="Example: tamis eval spans out/ --gold marked.csv --source lexicon --source lexicon,occlusion -o spans/",
    )(spans)


def utility(
    output: Output,
    text: Annotated[
        str | None,
        typer.Option(help="Held-out neutral text: file, folder, glob or URL.", rich_help_panel="Perplexity"),
    ] = None,
    text_column: Annotated[
        str, typer.Option(help="Column with the text.", rich_help_panel="Perplexity")
    ] = "text",
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=MODEL: a folder or a name; NAME=MODEL,adapter=FOLDER for LoRA. May be repeated.",
            rich_help_panel="Perplexity",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Model the others are compared with; default the first.", rich_help_panel="Perplexity"
        ),
    ] = None,
    documents: Annotated[
        int,
        typer.Option(
            help="Documents to use, drawn by content; 0 = all.", min=0, rich_help_panel="Perplexity"
        ),
    ] = 0,
    max_chars: Annotated[
        int,
        typer.Option(
            help="Characters of a document that count; 0 = all.", min=0, rich_help_panel="Perplexity"
        ),
    ] = 4000,
    rewritten: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=OUT: a finished `tamis detox` output. May be repeated.", rich_help_panel="Facts"
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = 1,
    seed: Seed = 0,
    draws: Draws = 2000,
    cache: Cache = None,
    progress: Progress = "auto",
    storage_option: Storage = None,
) -> None:
    """Measure what rewriting cost: perplexity of neutral text under models, facts kept in rewritten passages."""
    from pipelines import eval_utility as job

    config = job.UtilityEvalConfig(
        output=output,
        text=text,
        text_column=text_column,
        models=named(model, "--model"),
        against=against,
        documents=documents,
        max_chars=max_chars,
        rewritten=named(rewritten, "--rewritten"),
        seed=seed,
        draws=draws,
        device=device,
        dtype=dtype,
        threads=threads,
        cache=cache,
        progress=progress,
        storage_options=pairs(storage_option),
    )
    job.print_result(job.run(config))


def spans(
    predicted: Annotated[
        str, typer.Argument(help="Output of tamis with an attribute `spans`, or a file with such a column.")
    ],
    gold: Annotated[str, typer.Option(help="File with the spans people marked (CSV, Parquet, JSONL).")],
    output: Output,
    source: Annotated[
        list[str] | None,
        typer.Option(help="Sources to score as one: lexicon,occlusion. May be repeated; default every mix."),
    ] = None,
    threshold: Annotated[float, typer.Option(help="Only spans scored at least this count.")] = 0.0,
    against: Annotated[
        str | None, typer.Option(help="Mix the others are compared with: lexicon+occlusion.")
    ] = None,
    spans_column: Annotated[str, typer.Option(help="Column (or attribute) of the predictions.")] = "spans",
    gold_column: Annotated[str, typer.Option(help="Column of the gold spans.")] = "spans",
    text_column: Annotated[str, typer.Option(help="Column with the text.")] = "text",
    id_column: Annotated[
        str | None, typer.Option(help="Column of row ids to join by; default by row, or by text.")
    ] = None,
    examples: Annotated[int, typer.Option(help="Posts shown on the page.", min=0)] = 12,
    seed: Seed = 0,
    draws: Draws = 2000,
    storage_option: Storage = None,
) -> None:
    """Score toxic spans: SemEval-2021 character F1 of each source and of every mix, with intervals."""
    from pipelines import eval_spans as job

    config = job.SpansEvalConfig(
        predicted=predicted,
        gold=gold,
        output=output,
        spans_column=spans_column,
        gold_column=gold_column,
        text_column=text_column,
        id_column=id_column,
        mixes=tuple(
            tuple(part.strip() for part in item.replace("+", ",").split(",")) for item in source or []
        ),
        threshold=threshold,
        against=against,
        examples=examples,
        seed=seed,
        draws=draws,
        storage_options=pairs(storage_option),
    )
    job.print_result(job.run(config))


def rewrites(
    output: Output,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files or folders with the sources; none: the input of a system's `tamis detox` output."
        ),
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="Column of the sources; default source, toxic, before or text.")
    ] = None,
    system: Annotated[
        list[str] | None,
        typer.Option(help="NAME=COLUMN, NAME=FILE#COLUMN, or NAME=OUT of `tamis detox`. May be repeated."),
    ] = None,
    built_in: Annotated[
        str | None,
        typer.Option(
            help="Systems that need no file, comma-separated, of copy, delete, lexicon-mask, sentence-drop; `none` for "
            "none. Default: those the judge is independent of."
        ),
    ] = None,
    reference: Annotated[
        list[str] | None,
        typer.Option(help="Column of references; default reference... and neutral.... May be repeated."),
    ] = None,
    human: Annotated[bool, typer.Option(help="Score the first reference as a system.")] = True,
    id_column: Annotated[
        str | None, typer.Option(help="Column of ids to join files and outputs by; default by row.")
    ] = None,
    common: Annotated[
        bool, typer.Option("--common", help="Only the sources every --system was given.")
    ] = False,
    limit: Annotated[int, typer.Option(help="Only the first so many sources; 0 = all.", min=0)] = 0,
    against: Annotated[
        str | None, typer.Option(help="System the others are compared with; default the first given.")
    ] = None,
    judge: Annotated[
        str,
        typer.Option(
            help="Scorer that says what is toxic; not the one that ranked. auto: linear or jigsaw-bilstm, if one of them "
            "shares nothing with what ranked.",
            rich_help_panel="Measuring",
        ),
    ] = "auto",
    judge_option: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE for the judge.", rich_help_panel="Measuring")
    ] = None,
    allow_shared_judge: Annotated[
        bool,
        typer.Option(
            "--allow-shared-judge", help="Judge with a ranker; the page says so.", rich_help_panel="Measuring"
        ),
    ] = False,
    encoder: Annotated[
        str, typer.Option(help="Sentence encoder of SIM.", rich_help_panel="Measuring")
    ] = "minilm",
    fluency: Annotated[
        str,
        typer.Option(
            help="FL by lm:MODEL, ngram (no model needed), hf:FOLDER (a classifier of acceptability), or none.",
            rich_help_panel="Measuring",
        ),
    ] = "lm:smollm2",
    fluency_text: Annotated[
        str | None,
        typer.Option(
            help="Whole sentences to calibrate lm: on; needed for another model.", rich_help_panel="Measuring"
        ),
    ] = None,
    fluency_label: Annotated[
        str | None, typer.Option(help="Label of hf: that means acceptable.", rich_help_panel="Measuring")
    ] = None,
    lexicon: Annotated[
        str, typer.Option(help="Word list of delete and lexicon-mask.", rich_help_panel="Built-in systems")
    ] = "lexicon",
    classifier: Annotated[
        str, typer.Option(help="Classifier of sentence-drop.", rich_help_panel="Built-in systems")
    ] = "jigsaw-bilstm",
    drop_from: Annotated[
        float, typer.Option(help="Score from which sentence-drop drops.", rich_help_panel="Built-in systems")
    ] = 0.4,
    examples: Annotated[int, typer.Option(help="Examples a group on the page.", min=0)] = 6,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = 1,
    seed: Seed = 0,
    draws: Draws = 2000,
    cache: Cache = None,
    progress: Progress = "auto",
    storage_option: Storage = None,
) -> None:
    """Compare rewriting systems: STA, SIM, FL and J sentence by sentence, chrF and BLEU, paired significance."""
    from pipelines import eval_rewrites as job

    config = job.RewritesEvalConfig(
        inputs=tuple(inputs or ()),
        output=output,
        source=source,
        systems=named(system, "--system"),
        built_in=None
        if built_in is None
        else tuple(b.strip() for b in built_in.split(",") if b.strip() not in ("", "none")),
        human=human,
        references=tuple(reference) if reference else None,
        id_column=id_column,
        common=common,
        limit=limit,
        judge=judge,
        judge_options=pairs(judge_option),
        allow_shared_judge=allow_shared_judge,
        encoder=encoder,
        fluency=fluency,
        fluency_text=fluency_text,
        fluency_label=fluency_label,
        lexicon=lexicon,
        classifier=classifier,
        drop_from=drop_from,
        against=against,
        examples=examples,
        seed=seed,
        draws=draws,
        device=device,
        dtype=dtype,
        threads=threads,
        cache=cache,
        progress=progress,
        storage_options=pairs(storage_option),
    )
    job.print_result(job.run(config))


def named(items: list[str] | None, option: str) -> dict[str, str]:
    """NAME=VALUE options as a mapping, in order."""
    out: dict[str, str] = {}
    for item in items or []:
        name, sign, value = item.partition("=")
        if not sign or not name or not value:
            raise typer.BadParameter(f"'{item}' is not NAME=...", param_hint=option)
        if name in out:
            raise typer.BadParameter(f"'{name}' is named twice", param_hint=option)
        out[name] = value
    return out
