"""A run that was stopped anywhere, by anything, goes on where it was and ends as if it had never been stopped."""

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from schemas.errors import FatalStepError, OutputError
from tests.conftest import ROOT
from tests.helpers import (
    Ask,
    Drop,
    Fail,
    Keep,
    Log,
    Replace,
    StopAt,
    logged,
    read_output,
    run,
    sample_corpus,
    sample_texts,
    write_jsonl,
)
from transforms.shards.engine import list_receipts
from transforms.shards.files import Folder
from transforms.shards.plan import load_plan
from transforms.shards.receipts import Receipt, read_receipts, receipt_name, unit_name

STEPS = (Drop(), Fail(), Replace())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return sample_corpus(tmp_path_factory.mktemp("corpus"), shards=1, rows=20)


@pytest.fixture(scope="module")
def expected(corpus, tmp_path_factory):
    """What an uninterrupted run over the corpus makes."""
    out = tmp_path_factory.mktemp("expected") / "out"
    run(corpus, out, STEPS, unit_rows=5)
    return read_output(out)


@pytest.fixture(scope="module")
def answered(corpus, tmp_path_factory):
    """The same, where a pretended model was asked as well."""
    folder = tmp_path_factory.mktemp("answered")
    run(corpus, folder / "out", (*STEPS, Ask(str(folder / "bill"))), unit_rows=5)
    return read_output(folder / "out")


def committed(out):
    """(shard, unit) of every unit that is done, by the configuration of a plain test job."""
    output = Folder(str(out))
    receipts = [Receipt.loads(output.read(p)) for p in output.find("_tamis/receipts")]
    return {(r.shard, r.unit) for r in receipts}


@pytest.mark.parametrize("how", ["fatal", "interrupt"])
@pytest.mark.parametrize(
    "unit", [("more/part-0.jsonl", 0), ("more/part-0.jsonl", 3), ("part-0.parquet", 2)], ids=str
)
def test_a_stopped_run_goes_on_and_no_committed_unit_is_done_twice(corpus, expected, tmp_path, how, unit):
    out, log, allowed = tmp_path / "out", tmp_path / "log", tmp_path / "allowed"
    steps = (StopAt(str(allowed), *unit, how), Log(str(log)), *STEPS)
    with pytest.raises(FatalStepError if how == "fatal" else KeyboardInterrupt):
        run(corpus, out, steps, unit_rows=5)
    before = committed(out)
    assert unit not in before and not (out / "_SUCCESS").exists() and not (out / "data").exists()
    allowed.touch()
    result = run(corpus, out, steps, unit_rows=5)
    assert result.done == len(before)
    assert read_output(out) == expected
    seen = Counter((shard, u) for shard, u, _ in logged(log))
    assert seen == dict.fromkeys([(s.name, u.unit) for s in result.plan.shards for u in s.units], 1)


def test_other_unit_sizes_do_not_undo_what_is_done(corpus, expected, tmp_path):
    out, allowed, log = tmp_path / "out", tmp_path / "allowed", tmp_path / "log"
    steps = (StopAt(str(allowed), "part-0.parquet", 1), Log(str(log)), *STEPS)
    with pytest.raises(FatalStepError):
        run(corpus, out, steps, unit_rows=5)
    allowed.touch()
    result = run(corpus, out, steps, unit_rows=50)
    assert result.done > 0 and read_output(out) == expected
    assert max(Counter((shard, u) for shard, u, _ in logged(log)).values()) == 1


def test_settings_that_change_the_result_undo_it(corpus, tmp_path):
    out, allowed, log = tmp_path / "out", tmp_path / "allowed", tmp_path / "log"
    with pytest.raises(FatalStepError):
        run(corpus, out, (StopAt(str(allowed), "part-0.parquet", 1), *STEPS), unit_rows=5, seed=1)
    with pytest.raises(OutputError, match=r"with other settings \(seed\); pass --overwrite"):
        run(corpus, out, (Log(str(log)), *STEPS), unit_rows=5, seed=2)
    result = run(corpus, out, (Log(str(log)), *STEPS), unit_rows=5, seed=2, overwrite=True)
    assert result.done == 0 and len(logged(log)) == result.plan.units


def test_an_input_that_changed_meanwhile_is_done_again(tmp_path):
    root, out, allowed, log = tmp_path / "in", tmp_path / "out", tmp_path / "allowed", tmp_path / "log"
    for name in ("a.jsonl", "b.jsonl"):
        write_jsonl(root / name, sample_texts(20))
    steps = (StopAt(str(allowed), "b.jsonl", 2), Log(str(log)), *STEPS)
    with pytest.raises(FatalStepError):
        run(root, out, steps, unit_rows=5)
    write_jsonl(root / "a.jsonl", sample_texts(12, seed=900))
    allowed.touch()
    log.unlink(missing_ok=True)
    run(root, out, steps, unit_rows=5)
    assert [u for s, u, _ in sorted(logged(log)) if s == "a.jsonl"] == [0, 1, 2]
    run(root, tmp_path / "fresh", STEPS, unit_rows=5)
    assert read_output(out) == read_output(tmp_path / "fresh")


@pytest.mark.parametrize("what", ["unit", "receipt", "no unit"])
def test_a_damaged_unit_or_receipt_is_found_out_and_mended(corpus, expected, tmp_path, what):
    out, allowed, log = tmp_path / "out", tmp_path / "allowed", tmp_path / "log"
    steps = (StopAt(str(allowed), "part-0.parquet", 3), Log(str(log)), *STEPS)
    with pytest.raises(FatalStepError):
        run(corpus, out, steps, unit_rows=5)
    allowed.touch()
    victim = sorted(committed(out))[0]
    if what == "unit":
        path = out / unit_name(*victim)
        path.write_bytes(path.read_bytes()[:-100] + bytes(100))
        with pytest.raises(OutputError, match=r"is damaged .* run the same command again"):
            run(corpus, out, steps, unit_rows=5)
        assert not (out / "_SUCCESS").exists()
    elif what == "receipt":
        (out / receipt_name(*victim)).write_bytes(b'{"shard": "part')
    else:
        (out / unit_name(*victim)).unlink()
    run(corpus, out, steps, unit_rows=5)
    assert read_output(out) == expected
    assert Counter((s, u) for s, u, _ in logged(log))[victim] == 2


def test_two_runs_at_once_are_one_too_many(corpus, tmp_path):
    import fcntl

    out = tmp_path / "out"
    run(corpus, out, STEPS)
    (out / "_SUCCESS").unlink()
    with (out / "_tamis" / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another run is at work in"):
            run(corpus, out, STEPS)
    assert run(corpus, out, STEPS).state == "finished"


def test_a_run_killed_before_its_first_file_leaves_no_stranger(corpus, expected, tmp_path):
    """The lock is the first file a run makes; the folder must still be the next run's own."""
    lock = tmp_path / "out" / "_tamis" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    (lock.parent / "tmp").mkdir()
    (lock.parent / "tmp" / "0123-job.json").write_bytes(b"{")
    run(corpus, tmp_path / "out", STEPS, unit_rows=5)
    assert read_output(tmp_path / "out") == expected


# ------------------------------------------------------------------------------------------- killed at every rename

# A process that never ran a pipeline itself forks one child for each point: the child runs the job and kills itself
# right before, or right after, its n-th file is given its name; a second child then runs the job to its end.
CRASH = """
import json, os, pathlib, signal, sys
from tests.helpers import *
from tests.jobs.test_engine_resume import STEPS

corpus, root, bill, points = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]

def job(out):
    run(corpus, out, (*STEPS, Ask(bill + "." + out.name)), unit_rows=5)

def crashing(out, point, after):
    count = [0]
    replace = pathlib.Path.replace
    def counting(self, target):
        count[0] += 1
        if count[0] == point and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(self, target)
        if count[0] == point:
            os.kill(os.getpid(), signal.SIGKILL)
    pathlib.Path.replace = counting
    job(out)
    print(json.dumps({"renames": count[0]}), flush=True)

for point, after in points:
    out = root / f"{point}-{int(after)}"
    killed = os.WIFSIGNALED(child(lambda: crashing(out, point, after)))
    early = (out / "_SUCCESS").exists() and not after
    code = child(lambda: job(out))
    print(json.dumps({"out": str(out), "killed": killed, "early": early, "code": code}), flush=True)
"""


def crash(corpus, root, points):
    """Run the job once for each (rename, whether behind it); what each left behind, or the number of renames."""
    root.mkdir()
    command = [sys.executable, "-c", CRASH, str(corpus), str(root), str(root / "bill"), json.dumps(points)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def assert_all_ended_well(corpus, root, answered, points):
    reports, errors = crash(corpus, root, points)
    assert len(reports) == len(points), errors
    questions = None
    for report, (point, after) in zip(reports, points, strict=True):
        assert report["killed"] and report["code"] == 0 and not report["early"], (report, errors)
        out = Path(report["out"])
        assert read_output(out) == answered, (point, after)
        assert not (out / "_tamis" / "tmp").exists() or not list((out / "_tamis" / "tmp").iterdir())
        bill = Counter((root / f"bill.{out.name}").read_text().split())
        questions = questions or set(bill)
        assert set(bill) == questions and set(bill.values()) == {
            1
        }  # nothing was in flight: nothing is paid twice


def renames(corpus, root):
    reports, _ = crash(corpus, root, [(10**6, False)])
    return reports[0]["renames"]


def test_a_run_killed_at_some_files_ends_as_if_it_had_not_been(corpus, answered, tmp_path):
    # Eleven units: the job and the plan, 22 names of units, then the shards and their sidecars, manifest, _SUCCESS.
    points = [(1, False), (2, True), (3, False), (24, True), (30, False), (40, False)]
    assert_all_ended_well(corpus, tmp_path / "crash", answered, points)


@pytest.mark.slow
def test_a_run_killed_at_any_file_ends_as_if_it_had_not_been(corpus, answered, tmp_path):
    count = renames(corpus, tmp_path / "count")
    points = [(n, after) for n in range(1, count + 1) for after in (False, True)]
    assert_all_ended_well(corpus, tmp_path / "crash", answered, points)


# ---------------------------------------------------------------------------------------------- killed at any moment

WORK = """
import sys
from tests.helpers import *
from tests.jobs.test_engine_resume import STEPS
corpus, out, log, bill, workers = sys.argv[1:]
print("ready", flush=True)
try:
    run(corpus, out, (*STEPS, Ask(bill, 0.01), Log(log)), unit_rows=5, workers=int(workers))
except KeyboardInterrupt:
    sys.exit(130)
"""


def work(corpus, folder, workers=1):
    command = [
        sys.executable,
        "-c",
        WORK,
        str(corpus),
        *(str(folder / n) for n in ("out", "log", "bill")),
        str(workers),
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def finish(process, seconds=120):
    _, errors = process.communicate(timeout=seconds)
    return process.returncode, errors


def kill_and_resume(corpus, folder, draw, kills, workers=1):
    """Kill the job some seconds after it began, again and again; then let it end."""
    paid = 0
    for _ in range(kills):
        process = work(corpus, folder, workers)
        time.sleep(draw())
        over = process.poll() is not None
        process.send_signal(signal.SIGKILL)
        finish(process)
        if over:
            break
        done = committed(folder / "out") if (folder / "out").exists() else set()
        lines = len(logged(folder / "log"))
        paid += 1
        yield done, lines
    process = work(corpus, folder, workers)
    code, errors = finish(process)
    assert code == 0, errors
    # Each kill has at most one question of each worker in flight.
    bill = Counter((folder / "bill").read_text().split())
    assert sum(bill.values()) - len(bill) <= paid * workers


def assert_units_were_kept(folder, states):
    """No unit that was committed when a kill came was worked on after it."""
    log = [(shard, unit) for shard, unit, _ in logged(folder / "log")]
    for done, lines in states:
        assert not set(log[lines:]) & done


def test_a_run_killed_at_random_moments(corpus, answered, tmp_path):
    rng = random.Random(4)
    states = list(kill_and_resume(corpus, tmp_path, lambda: rng.uniform(0.4, 1.2), kills=2))
    assert_units_were_kept(tmp_path, states)
    assert read_output(tmp_path / "out") == answered


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_killed_at_twenty_random_moments(tmp_path, workers):
    corpus = sample_corpus(tmp_path / "in", shards=2, rows=400)
    run(corpus, tmp_path / "whole", (*STEPS, Ask(str(tmp_path / "whole-bill"))), unit_rows=5)
    rng = random.Random(workers)
    states = list(kill_and_resume(corpus, tmp_path, lambda: rng.uniform(0.3, 1.5), kills=20, workers=workers))
    assert len(states) == 20  # else the job was over before the last of them
    assert_units_were_kept(tmp_path, states)
    assert read_output(tmp_path / "out") == read_output(tmp_path / "whole")
    assert set((tmp_path / "bill").read_text().split()) == set((tmp_path / "whole-bill").read_text().split())


@pytest.mark.parametrize("signal_", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_polite_stop_ends_soon_and_leaves_a_folder_to_go_on_with(corpus, answered, tmp_path, signal_):
    process = work(corpus, tmp_path)
    deadline = time.monotonic() + 60
    while not committed_now(tmp_path / "out") and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal_)
    started = time.monotonic()
    code, errors = finish(process)
    assert code == 130, errors
    assert time.monotonic() - started < 10
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    tmp = tmp_path / "out" / "_tamis" / "tmp"
    assert not list(tmp.iterdir())
    code, errors = finish(work(corpus, tmp_path))
    assert code == 0, errors
    assert read_output(tmp_path / "out") == answered
    assert set(Counter((s, u) for s, u, _ in logged(tmp_path / "log")).values()) == {1}


def committed_now(out):
    return (
        list((out / "_tamis" / "receipts").rglob("*.json")) if (out / "_tamis" / "receipts").exists() else []
    )


# ------------------------------------------------------------------------------------------------------ small promises


def test_receipts_are_listed_with_an_empty_mark_for_every_shard(corpus, tmp_path):
    """A shard none of whose units is fresh must still be assembled."""
    from dataclasses import replace

    from tests.helpers import job

    run(corpus, tmp_path / "out", STEPS, unit_rows=5)
    done = replace(job(tmp_path / "out", STEPS), input_url=str(corpus))
    listed = list(list_receipts(done))
    assert sorted(n for n, c in listed if not c) == ["more/part-0.jsonl", "part-0.parquet"]
    assert len([c for _, c in listed if c]) == 11
    output = Folder(str(tmp_path / "out"))
    assert len(read_receipts(output, load_plan(output), done.config_hash)) == 11


def test_the_hash_of_a_job_sees_what_decides_the_result_and_nothing_else(tmp_path):
    from tests.helpers import job

    base = job(tmp_path, (Keep(),), config={"a": 1})
    same = [
        job(tmp_path / "elsewhere", (Keep(),), config={"a": 1}),
        job(
            tmp_path,
            (Keep(),),
            config={"a": 1},
            max_dead=3,
            cache_url="memory://c",
            at_least_tasks=9,
            max_units=5,
        ),
        job(tmp_path, (Keep(),), config={"a": 1}, on_finish="m:f", output_options={"key": "x"}),
    ]
    other = [
        job(tmp_path, (Keep(),), config={"a": 2}),
        job(tmp_path, (Keep(),), config={"a": 1}, seed=1),
        job(tmp_path, (Keep(),), config={"a": 1}, id_column="doc"),
        job(tmp_path, (Keep(),), config={"a": 1}, text_column="body"),
        job(tmp_path, (Keep(),), config={"a": 1}, name="other"),
        job(tmp_path, (Keep(),), config={"a": 1}, models=({"name": "m", "revision": "1"},)),
    ]
    assert {j.config_hash for j in same} == {base.config_hash}
    assert len({j.config_hash for j in [base, *other]}) == len(other) + 1
