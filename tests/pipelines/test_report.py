"""The report and the card: what they say is what the output holds, and they need nothing but themselves."""

from __future__ import annotations

import html.parser
import re
from pathlib import Path

import fsspec
import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.report import JudgeScores, build_card, build_report, charts, write_report
from pipelines.report.costs import losses, step_costs, token_counts
from pipelines.report.documents import document_stats, other_attributes
from pipelines.report.edits import edit_stats
from pipelines.report.output import Output, read_batches
from pipelines.report.stats import Histogram
from schemas.edits import EDIT_SCHEMA
from schemas.errors import InputError, OutputError
from tests.pipelines.sample_output import LABELS, REASONS, Sample, build_output
from transforms.shards.files import Folder


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Sample:
    return build_output(tmp_path_factory.mktemp("detox") / "out")


@pytest.fixture(scope="module")
def page(sample) -> str:
    return build_report(str(sample.path))


class _Checker(html.parser.HTMLParser):
    """Collects what a page loads, and whether its tags nest."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        found = dict(attrs)
        for name in ("src", "href", "xlink:href", "action", "data"):
            if found.get(name) and not found[name].startswith("#"):
                self.loads.append(found[name])
        if tag == "details" or tag == "section":
            self.ids.append(found.get("id") or "")
        if tag not in {"meta", "input", "br", "img", "link", "hr"}:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if not self.stack or self.stack[-1] != "style":
            self.text.append(data)


def _check(page: str) -> _Checker:
    checker = _Checker()
    checker.feed(page)
    assert checker.stack == []
    return checker


def test_a_report_is_whole_and_loads_nothing(page):
    found = _check(page)
    assert found.loads == []
    assert "script" not in found.tags
    assert not re.search(r"url\(\s*['\"]?(?!#)", page)
    assert "@import" not in page
    assert found.tags.count("svg") > 8  # the logo and the charts


def test_a_report_states_the_counts_of_the_output(sample, page):
    text = " ".join(" ".join(_check(page).text).split())
    rows = len(sample.before)
    changed = sum(e["before"] != e["after"] for e in sample.edits)
    assert f"Of {rows} documents, {sample.flagged} held toxic passages" in text
    assert f"{changed} were rewritten in part" in text
    assert f"{sample.dropped} dropped, {sample.dead} dead" in text
    assert "no_acceptable_rewrite" in text
    assert "ValueError: row # is bad" in text
    assert "smollm2+detox" in text and "jigsaw-2018" in text
    assert "accept.min_similarity" in text
    assert "en/part-1.parquet" in text


def test_texts_are_escaped_and_veiled(page):
    # The sample's texts hold markup: it must stand there as text, inside the veil or a table cell, and nowhere as tags.
    assert "&lt;i&gt;garbage people&lt;/i&gt;" in page
    assert "<i>" not in page
    assert '<p class="passage veil">' in page
    assert not re.search(r"<details class=\"edit\" open", page)


def test_hostile_names_are_escaped_everywhere(tmp_path):
    sample = build_output(tmp_path / "out", rows=20, shards=("<b>.parquet",))
    manifest = orjson.loads((sample.path / "manifest.json").read_bytes())
    manifest["input"]["root"] = "</title><script>alert(1)</script>"
    manifest["config"] = {"x": "<img src=x onerror=alert(1)>"}
    manifest["counters"]["<u>.ms"] = 5
    (sample.path / "manifest.json").write_bytes(orjson.dumps(manifest))
    page = build_report(str(sample.path))
    found = _check(page)
    assert not {"script", "img", "b", "u"} & set(found.tags) - {"b"}
    assert found.loads == []
    assert "<b>.parquet" not in page


def test_the_same_output_gives_the_same_page(sample, page):
    assert build_report(str(sample.path)) == page


def test_sections_appear_only_where_there_is_data(tmp_path):
    sample = build_output(tmp_path / "scored", edits=False, rude_share=0.3)
    page = build_report(str(sample.path))
    ids = set(_check(page).ids)
    assert {"toxicity", "scorers", "cost", "provenance"} <= ids
    assert not {"changes", "candidates"} & ids
    assert "no text changed" in page


def test_a_job_with_other_attributes_shows_their_values(tmp_path):
    sample = build_output(tmp_path / "out", edits=False, shards=("a.parquet",))
    scores = np.linspace(0, 1, 40)
    folder = sample.path / "attributes" / "quality"
    folder.mkdir()
    table = {
        "id": [str(i) for i in range(40)],
        "row": list(range(40)),
        "value": [{"score": s, "label": "x", "parts": [1] * (i % 3)} for i, s in enumerate(scores)],
    }
    pq.write_table(pa.table(table), folder / "a.parquet")
    found = other_attributes(Output(str(sample.path)))
    assert set(found) == {"quality.score", "quality.parts (count)"}
    assert sorted(found["quality.score"]) == pytest.approx(scores)
    page = build_report(str(sample.path))
    assert "attributes" in _check(page).ids
    assert "quality.score" in page


def test_a_bare_manifest_makes_a_report(tmp_path):
    manifest = {
        "tamis_version": "0", "job": "copy", "run_id": "r", "created": "", "finished": "", "config": {},
        "config_hash": "c", "models": [], "input": {"root": "in", "text_column": "text", "id_column": None},
        "totals": {"rows_in": 3, "rows_kept": 3, "rows_changed": 0, "rows_dropped": 0, "rows_dead": 0, "bytes": 9},
        "counters": {}, "shards": [], "outputs": {}, "environment": {},
    }  # fmt: skip
    (tmp_path / "manifest.json").write_bytes(orjson.dumps(manifest))
    page = build_report(str(tmp_path))
    assert "3 documents went through, none changed" in page
    assert set(_check(page).ids) - {""} == {"cost", "provenance"}
    assert build_card(str(tmp_path)).startswith("---\n")


def test_an_unfinished_run_is_one_clear_line(tmp_path):
    sample = build_output(tmp_path / "out", rows=10)
    (sample.path / "manifest.json").unlink()
    with pytest.raises(OutputError, match=r"has not finished; see `tamis status"):
        build_report(str(sample.path))
    with pytest.raises(OutputError, match="no such folder"):
        build_report(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(OutputError, match="not the output of a tamis job"):
        build_report(str(tmp_path / "empty"))


def test_a_judge_is_shown_beside_the_ranker(sample):
    judge = JudgeScores("other@1", before=[0.9, 0.8, 0.1, 0.2], after=[0.1, 0.2, 0.1, 0.2])
    page = build_report(str(sample.path), judge_scores=judge)
    assert "Independent judge: other@1" in page
    assert re.search(r"0\.50</span>.*?0\.15</span>", page)  # the means, in the headline tile
    assert "before quoting these figures" not in page


def test_a_report_is_written_to_any_filesystem(sample):
    memory = fsspec.filesystem("memory")
    for file in sample.path.rglob("*"):
        if file.is_file():
            memory.pipe_file(f"/report-test/{file.relative_to(sample.path)}", file.read_bytes())
    where = write_report("memory://report-test")
    assert where == "memory://report-test/report.html"
    local = build_report(str(sample.path))
    assert memory.cat_file("/report-test/report.html").decode() == local
    assert memory.cat_file("/report-test/README.md").decode() == build_card(str(sample.path))


def test_lone_surrogates_do_not_stop_the_report(tmp_path):
    sample = build_output(tmp_path / "out", rows=10, shards=("a.parquet",))
    manifest = orjson.loads((sample.path / "manifest.json").read_bytes())
    manifest["config"]["redaction"] = "x"
    (sample.path / "manifest.json").write_bytes(orjson.dumps(manifest))
    # A lone surrogate cannot be in a manifest of ours; it can come through a JSON escape of a shard's name.
    text = (sample.path / "manifest.json").read_text().replace('"job":"detox"', '"job":"detox \\ud800"')
    (sample.path / "manifest.json").write_text(text)
    try:
        write_report(str(sample.path))
    except OutputError as error:  # orjson refuses lone surrogates: then it must be said, not raised raw
        assert "not valid JSON" in str(error)


# ------------------------------------------------------------------------------------------------- the numbers


def test_document_statistics_count_what_was_built(sample):
    stats = document_stats(Output(str(sample.path)), tau=0.5)
    assert stats is not None
    assert stats.before.n == len(sample.before)
    assert stats.flagged_before == sample.flagged
    assert stats.segments["all"] == sample.segments
    assert stats.segments["flagged"] == sample.flagged  # one rude sentence a document
    assert stats.after.n == sample.kept
    # What stays flagged are the documents kept as they were.
    assert stats.flagged_after == sum(e["action"] == "flag" for e in sample.edits)
    assert stats.after.mean < stats.kept_before.mean


def test_scores_after_are_the_same_measured_or_derived(tmp_path):
    both = [
        document_stats(Output(str(build_output(tmp_path / str(m), measured=m).path)), tau=0.5)
        for m in (True, False)
    ]
    measured, derived = both
    assert measured.after.counts.tolist() == derived.after.counts.tolist()
    assert measured.after.mean == pytest.approx(derived.after.mean, abs=1e-6)
    assert measured.flagged_after == derived.flagged_after


def test_an_edit_of_the_whole_text_replaces_all_its_segments(tmp_path):
    sample = build_output(tmp_path / "out", rows=30, shards=("a.parquet",), measured=False)
    path = sample.path / "edits" / "a.parquet"
    rows = [r for r in pq.read_table(path).to_pylist() if r["action"] == "rewrite"]
    for row in rows:
        row["segment"], row["toxicity_after"] = None, 0.25
    pq.write_table(pa.Table.from_pylist(rows, schema=EDIT_SCHEMA), path)
    stats = document_stats(Output(str(sample.path)))
    edited = np.histogram([0.25], stats.after.edges)[0].argmax()
    assert stats.after.counts[edited] >= len(rows)


def test_edit_statistics_count_what_was_built(sample):
    stats = edit_stats(Output(str(sample.path)))
    assert stats is not None
    assert stats.n == len(sample.edits)
    for action in {e["action"] for e in sample.edits}:
        assert stats.actions[action] == sum(e["action"] == action for e in sample.edits)
    candidates = [c for e in sample.edits for c in e["candidates"]]
    for reason in REASONS:
        assert stats.reasons[reason] == sum(reason in c["reasons"] for c in candidates)
    assert stats.candidates["all"] == len(candidates)
    assert stats.candidates["passed"] == sum(not c["reasons"] for c in candidates)
    won = [e["temperature"] for e in sample.edits if e["action"] == "rewrite"]
    assert sum(stats.temperatures.values()) == len(won)
    assert stats.temperatures[0.8] == won.count(0.8)
    in_text = [e for e in sample.edits if e["action"] not in ("flag", "drop_document")]
    assert stats.characters == sum(e["end"] - e["start"] for e in in_text)
    replaced = [e for e in in_text if e["action"] != "drop_segment"]
    assert stats.toxicity_before.mean == pytest.approx(
        np.mean([e["toxicity_before"] for e in replaced]), rel=1e-5
    )
    assert stats.toxicity_after.mean == pytest.approx(
        np.mean([e["toxicity_after"] for e in replaced]), rel=1e-5
    )
    assert list(stats.labels) == LABELS
    assert stats.labels["insult"].before.mean == pytest.approx(
        np.mean([e["scores_before"][4] for e in replaced]), rel=1e-5
    )


def test_samples_are_what_their_headings_say(sample):
    stats = edit_stats(Output(str(sample.path)), per_group=4)
    replaced = [e for e in sample.edits if e["action"] in ("rewrite", "span_edit", "redact")]
    shown = {(e["shard"], e["row"]) for e in stats.samples["At random"]}
    best = sorted(replaced, key=lambda e: e["toxicity_after"] - e["toxicity_before"])
    rest = [(e["shard"], e["row"]) for e in best if (e["shard"], e["row"]) not in shown]
    assert [(e["shard"], e["row"]) for e in stats.samples["Most improved"]] == rest[:4]
    assert all(e["action"] == "flag" for e in stats.samples.get("Kept and flagged", []))
    listed = [(e["shard"], e["row"], e["start"]) for group in stats.samples.values() for e in group]
    assert len(listed) == len(set(listed))
    # Whole edits, as they stand in the file.
    one = stats.samples["At random"][0]
    same = next(e for e in sample.edits if (e["shard"], e["row"]) == (one["shard"], one["row"]))
    assert (one["before"], one["after"], one["action"]) == (same["before"], same["after"], same["action"])
    assert len(one["candidates"]) == len(same["candidates"])


def test_one_candidate_is_chosen_for_each_rewrite(sample):
    stats = edit_stats(Output(str(sample.path)))
    chosen = [p for p in stats.points if p[2] == "chosen"]
    assert len(chosen) == stats.actions["rewrite"]
    assert len(stats.points) == stats.candidates["all"]


def test_losses_are_grouped_with_numbers_folded(sample):
    output = Output(str(sample.path))
    dead = losses(output, "dead")
    assert dead.n == sample.dead
    assert dict(dead.groups) == {("RewriteToxicSegments", "ValueError: row # is bad"): sample.dead}
    assert losses(output, "dropped").groups == {
        ("RewriteToxicSegments", "no_acceptable_rewrite"): sample.dropped
    }


def test_costs_come_from_generic_counters():
    counters = {
        "A.rows_in": 10,
        "A.rows_out": 9,
        "A.ms": 2000,
        "x.tokens_in": 5,
        "y.tokens_in": 7,
        "x.cache_hits": 1,
    }
    (step,) = step_costs(counters)
    assert (step.name, step.rows_in, step.rows_out, step.seconds, step.rate) == ("A", 10, 9, 2.0, 5.0)
    assert token_counts(counters) == {"tokens_in": 12, "tokens_out": 0, "requests": 0, "cache_hits": 1}


def test_only_shards_of_the_manifest_are_read(sample, tmp_path):
    copy = build_output(tmp_path / "out", rows=20)
    stale = copy.path / "edits" / "en" / "part-9.parquet"
    stale.write_bytes((copy.path / "edits" / "en" / "part-0.parquet").read_bytes())
    hidden = copy.path / "edits" / "en" / ".part-0.parquet.1234.tmp"
    hidden.write_bytes(b"half")
    output = Output(str(copy.path))
    assert output.files("edits") == ["edits/en/part-0.parquet", "edits/en/part-1.parquet"]
    assert edit_stats(output).n == len(copy.edits)


def test_a_damaged_sidecar_is_named(tmp_path):
    copy = build_output(tmp_path / "out", rows=20, shards=("a.parquet",))
    path = copy.path / "edits" / "a.parquet"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match=r"edits/a.parquet: cannot be read"):
        build_report(str(copy.path))


# ------------------------------------------------------------------------------------------------------ the card


def test_the_card_can_be_read_by_the_hub_library(sample):
    hub = pytest.importorskip("huggingface_hub")
    text = build_card(str(sample.path))
    card = hub.DatasetCard(text)
    assert card.data.size_categories == ["n<1K"]
    assert card.data.configs[0]["data_files"][0]["path"] == "data/**/*.parquet"
    assert f"| kept | {sample.kept} |" in text
    assert "`0123456789abcdef`" in text


def test_the_card_needs_no_hub_library(sample, monkeypatch):
    yaml = pytest.importorskip("yaml")
    with_hub = build_card(str(sample.path))
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    without = build_card(str(sample.path))
    heads = [yaml.safe_load(text.split("---\n")[1]) for text in (with_hub, without)]
    assert heads[0] == heads[1]
    assert with_hub.split("---\n", 2)[2] == without.split("---\n", 2)[2]


def test_the_cards_snippets_load_the_data(sample, monkeypatch):
    monkeypatch.chdir(sample.path)
    blocks = re.findall(r"```python\n(.*?)```", build_card(str(sample.path)), re.S)
    frames = []
    for block in blocks:
        if "load_dataset" in block:
            continue  # the same files, through a cache in the home folder
        scope: dict = {}
        exec(block, scope)
        frames.append(scope["data"])
    assert len(frames) == 2
    assert [len(f) for f in frames] == [sample.kept, sample.kept]


def test_the_card_of_a_jsonl_corpus_names_its_loader(tmp_path):
    sample = build_output(tmp_path / "out", rows=8, shards=("a.jsonl", "b.jsonl"))
    text = build_card(str(sample.path))
    assert 'load_dataset("json", data_files="data/**/*.jsonl"' in text
    assert "pl.scan_ndjson" in text


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_jsonl_is_read_packed_or_not(tmp_path, name):
    import gzip

    import zstandard

    content = b'{"a":1}\n\n{"a":"x","b":[1]}\nnot json\n[1]\n'
    packed = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}.get(name.rsplit(".", 1)[-1])
    (tmp_path / name).write_bytes(packed(content) if packed else content)
    (batch,) = read_batches(Folder(str(tmp_path)), name)
    rows = batch.to_pylist()
    assert [r["a"] for r in rows[:2]] == ["1", '"x"']  # types that differ are shown as the JSON they are
    assert rows[1]["b"] == [1]
    assert rows[2]["_unreadable"] == "not json"
    assert rows[3]["_value"] == [1]


def test_reports_are_written_next_to_the_data(tmp_path):
    sample = build_output(Path(tmp_path) / "out", rows=12)
    assert write_report(str(sample.path)).endswith("/report.html")
    assert (sample.path / "report.html").read_text().startswith("<!doctype html>")
    assert (sample.path / "README.md").read_text().startswith("---\n")


def test_charts_are_valid_vega_lite_and_escape_labels():
    # Outside `unchecked`, Altair checks every part against the schema of Vega-Lite.
    histogram = Histogram()
    histogram.add(np.linspace(0, 1, 50))
    drawn = [
        charts.before_after(histogram, histogram),
        charts.before_after(histogram, None),
        charts.bars([("a <b>", 3.0), ("c", 0.0)], suffixes=["3", "0"], title='t "x" <y>'),
        charts.scatter(
            [(0.1, 0.9, "chosen"), (0.6, 0.2, "not chosen")], max_toxicity=0.5, min_similarity=None
        ),
        charts.heat(["a", "b"], [[1.0, None], [None, 1.0]]),
        charts.histogram(np.array([3.0, 3.0]), title="constant"),
        *charts.label_panels({"insult": (histogram, histogram)}),
    ]
    for svg in drawn:
        assert svg.startswith('<svg role="img" aria-label="')
        _check(svg)
        assert "NaN" not in svg
        assert "<b>" not in svg
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in drawn]
    assert not ids[0] & ids[1]


def test_the_report_of_a_real_run_agrees_with_its_manifest(tmp_path):
    from tests.helpers import run
    from transforms.detox.options import AcceptOptions, LocalizeOptions
    from transforms.detox.steps import AcceptRewrites, GateToxicity, LocalizeToxicSpans, SegmentText

    examples = Path(__file__).resolve().parents[2] / "examples" / "corpus.parquet"
    steps = (  # the lexicon throughout: no weights
        SegmentText(),
        GateToxicity(linear=None, classifier="lexicon"),
        LocalizeToxicSpans(LocalizeOptions(sources=("lexicon",)), classifier="lexicon"),
        AcceptRewrites(AcceptOptions(ladder=("redact", "flag")), scorer="lexicon"),
    )
    out = tmp_path / "out"
    config = {"gate": {"tau": 0.5}, "accept": {"max_toxicity": None, "min_similarity": 0.5}}
    manifest = run(examples, out, steps, config=config, on_finish="pipelines.report:write_report").manifest
    assert "report_error" not in manifest
    totals = manifest["totals"]
    assert totals["rows_changed"] > 5
    stats = edit_stats(Output(str(out)))
    assert stats.n == totals["edits"]
    assert stats.actions["redact"] == manifest["counters"]["accept.redact"]
    documents = document_stats(Output(str(out)), tau=0.5)
    assert documents.before.n == totals["rows_in"] == 44
    assert documents.segments["all"] == manifest["counters"]["gate.segments"]
    assert documents.segments["flagged"] == manifest["counters"]["gate.flagged"]
    assert documents.flagged_after < documents.flagged_before
    assert documents.characters == sum(len(t) for t in pq.read_table(examples)["text"].to_pylist())
    page = (out / "report.html").read_text()
    found = _check(page)
    assert found.loads == []
    assert f"{totals['rows_changed']} were rewritten in part" in page
    assert "[redacted]" in page
    assert (out / "README.md").read_text().startswith("---\n")


def test_a_very_long_text_does_not_end_in_the_page(tmp_path):
    sample = build_output(tmp_path / "out", rows=10, shards=("a.parquet",), rude_share=1.0)
    path = sample.path / "edits" / "a.parquet"
    rows = pq.read_table(path).to_pylist()
    for row in rows:
        row["before"] = "x1 " * 300_000
        for candidate in row["candidates"]:
            candidate["text"] = "x2 " * 300_000
    pq.write_table(pa.Table.from_pylist(rows, schema=EDIT_SCHEMA), path)
    page = build_report(str(sample.path))
    assert len(page) < 2_000_000
    assert "(cut)" in page
