"""The plan: every shard once, with its rows and units; what cannot be read stands apart; what is known is kept."""

import pytest

from schemas.errors import InputError
from tests.helpers import sample_corpus, sample_texts, write_jsonl, write_parquet
from transforms.shards.files import Folder
from transforms.shards.formats import UnitLimits
from transforms.shards.inputs import list_input
from transforms.shards.plan import Plan, load_plan, make_plan, plan_key, save_plan


def plan_of(root, *, text="text", id_column=None, limits=None, previous=None, **options):
    return make_plan(list_input(str(root)), text, id_column, limits or UnitLimits(), previous, **options)


def test_every_shard_is_surveyed(tmp_path):
    plan = plan_of(sample_corpus(tmp_path / "in"), limits=UnitLimits(25))
    assert [s.name for s in plan.shards] == [
        "more/part-0.jsonl",
        "more/part-1.jsonl",
        "part-0.parquet",
        "part-1.parquet",
    ]
    assert [s.rows for s in plan.shards] == [60] * 4 and plan.rows == 240
    assert plan.units == sum(len(s.units) for s in plan.shards)
    assert all(s.size == (tmp_path / "in" / s.name).stat().st_size for s in plan.shards)
    assert [bool(s.schema) for s in plan.shards] == [False, False, True, True]
    assert len({s.fingerprint for s in plan.shards}) == 4


def test_a_plan_comes_back_from_disk_as_it_was(tmp_path):
    plan = plan_of(sample_corpus(tmp_path / "in"), id_column="doc", limits=UnitLimits(10))
    output = Folder(str(tmp_path / "out"))
    assert load_plan(output) is None
    save_plan(plan, output)
    assert load_plan(output) == plan == Plan.loads(plan.dumps())


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[1]", b'{"version": 1}'])
def test_a_damaged_plan_is_no_plan(tmp_path, content):
    """A power cut may leave an empty file; the units are planned again and their receipts are still good."""
    output = Folder(str(tmp_path))
    output.write("_tamis/plan.json", content)
    assert load_plan(output) is None


@pytest.mark.parametrize(
    "broken",
    [b"", b"PAR1", b"PAR1" + bytes(50) + b"PAR1", None],
    ids=["empty", "magic", "footer", "truncated"],
)
def test_a_broken_shard_among_good_ones_stands_apart(tmp_path, broken):
    root = sample_corpus(tmp_path / "in", shards=1)
    whole = (root / "part-0.parquet").read_bytes()
    (root / "bad.parquet").write_bytes(whole[: len(whole) // 2] if broken is None else broken)
    plan = plan_of(root)
    bad = {s.name: s for s in plan.shards}["bad.parquet"]
    assert bad.error and "\n" not in bad.error and not bad.units and bad.rows == 0
    assert [s.error for s in plan.shards if s is not bad] == [None, None]


def test_nothing_that_can_be_read_is_one_line(tmp_path):
    for name in ("a.parquet", "b.parquet"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"PAR1 broken")
    with pytest.raises(InputError, match=r"no shard can be read; the first, a\.parquet: "):
        plan_of(tmp_path / "in")


def test_a_shard_without_the_column_is_one_line_that_names_it(tmp_path):
    write_parquet(tmp_path / "in" / "a.parquet", sample_texts(3))
    (tmp_path / "in" / "b.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(InputError, match=r"b\.jsonl: no field 'text'"):
        plan_of(tmp_path / "in")


def test_two_shards_with_one_sidecar_are_one_line(tmp_path):
    write_jsonl(tmp_path / "in" / "a.jsonl", ["x"])
    write_parquet(tmp_path / "in" / "a.jsonl.parquet", ["x"])
    with pytest.raises(InputError, match=r"would share the sidecar a\.jsonl\.parquet; rename one"):
        plan_of(tmp_path / "in")


def test_what_has_not_changed_keeps_its_units_even_if_unit_sizes_were_set_otherwise(tmp_path):
    root = sample_corpus(tmp_path / "in")
    before = plan_of(root, limits=UnitLimits(10))
    write_jsonl(root / "more" / "part-0.jsonl", sample_texts(33))
    after = plan_of(root, limits=UnitLimits(20), previous=before)
    assert after.shards[1:] == before.shards[1:]
    assert after.shards[0].rows == 33 and len(after.shards[0].units) == 2


def test_a_file_only_touched_has_not_changed(tmp_path):
    root = sample_corpus(tmp_path / "in", shards=1)
    before = plan_of(root, limits=UnitLimits(10))
    for path in root.rglob("*.*"):
        path.write_bytes(path.read_bytes())
    after = plan_of(root, limits=UnitLimits(20), previous=before)
    assert [s.units for s in after.shards] == [s.units for s in before.shards]
    assert [s.fingerprint for s in after.shards] == [s.fingerprint for s in before.shards]


def test_a_shard_that_was_broken_is_looked_at_again(tmp_path):
    root = sample_corpus(tmp_path / "in", shards=1)
    good = (root / "part-0.parquet").read_bytes()
    (root / "part-0.parquet").write_bytes(good[:-5])
    before = plan_of(root)
    (root / "part-0.parquet").write_bytes(good)
    assert before.shards[1].error and plan_of(root, previous=before).shards[1].rows == 60


def test_many_small_units_are_joined_to_a_bound(tmp_path):
    root = sample_corpus(tmp_path / "in")
    assert plan_of(root, limits=UnitLimits(1)).units == 240
    assert plan_of(root, limits=UnitLimits(1), max_units=50).units <= 50
    assert plan_of(root, limits=UnitLimits(1), max_units=1000).units == 240


def test_a_receipt_is_good_for_one_configuration_content_and_cut(tmp_path):
    root = sample_corpus(tmp_path / "in", shards=1)
    one, other = (
        plan_of(root, limits=UnitLimits(10)).shards[0],
        plan_of(root, limits=UnitLimits(20)).shards[0],
    )
    keys = {plan_key(one, "a"), plan_key(one, "b"), plan_key(other, "a")}
    assert len(keys) == 3 and plan_key(one, "a") in keys
