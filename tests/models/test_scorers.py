"""The embedded scorers compute what their packages compute, from files that run no code, in any company the same."""

from __future__ import annotations

import json
import pickle
import sys
import types
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import store
from models.embedded import jigsaw_bilstm, linear
from models.protocols import ModelInfo, ToxicityScorer
from models.scorers.bilstm import BilstmScorer
from models.scorers.linear import LinearScorer
from models.scorers.numbers import refuse_nan, sigmoid, softmax
from schemas.errors import ModelError

INFO = ModelInfo(name="test", kind="scorer", revision="0")
RUDE = [
    "you are an idiot and a moron",
    "shut up you stupid fool",
    "what a damn stupid idea you idiot",
    "nobody likes you, moron",
    "you damn fool, shut up",
    "stupid stupid stupid",
]
KIND = [
    "the committee meets on tuesday",
    "thank you for the lovely dinner",
    "the train leaves at nine from the old station",
    "we planted two apple trees in the garden",
    "the report was easy to read, thank you",
    "the garden is lovely on tuesday",
]


# --- linear


@pytest.fixture(scope="module")
def package_model(tmp_path_factory):
    """The package's own kind of model, fitted on a few sentences, in the package's files; and it converted."""
    import joblib
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.svm import LinearSVC

    vectorizer = TfidfVectorizer(stop_words="english")
    features = vectorizer.fit_transform(RUDE + KIND)
    svm = LinearSVC(class_weight="balanced", dual=False, tol=1e-2)
    model = CalibratedClassifierCV(svm, cv=3).fit(features, [1] * len(RUDE) + [0] * len(KIND))
    payload, target = tmp_path_factory.mktemp("payload"), tmp_path_factory.mktemp("linear")
    (payload / "profanity_check" / "data").mkdir(parents=True)
    joblib.dump(vectorizer, payload / "profanity_check" / "data" / "vectorizer.joblib")
    joblib.dump(model, payload / "profanity_check" / "data" / "model.joblib")
    linear.convert(payload, target)
    return vectorizer, model, payload, LinearScorer(target, INFO)


def test_linear_scores_equal_the_packages_own(package_model):
    vectorizer, model, _, scorer = package_model
    texts = [*RUDE, *KIND, "IDIOT!!! You're an Idiot.", "unknown wörds only", "a I", "¿qué?", "stupid " * 500]
    expected = model.predict_proba(vectorizer.transform(texts))[:, 1]
    np.testing.assert_allclose(scorer.score(texts)[:, 0], expected, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(alphabet="idiot stupd.,!Éx\n", max_size=40), min_size=1, max_size=8))
def test_linear_scores_are_the_packages_on_any_text(package_model, texts):
    vectorizer, model, _, scorer = package_model
    scores = scorer.score(texts)
    assert scores.shape == (len(texts), 1) and scores.dtype == np.float32
    expected = model.predict_proba(vectorizer.transform(texts))[:, 1]
    expected[[not text.strip() for text in texts]] = 0.0
    np.testing.assert_allclose(scores[:, 0], expected, atol=1e-6)


def test_a_linear_package_set_otherwise_is_refused(package_model, tmp_path):
    import joblib

    vectorizer, _, payload, _ = package_model
    other = tmp_path / "profanity_check" / "data"
    other.mkdir(parents=True)
    joblib.dump(joblib.load(payload / "profanity_check/data/model.joblib"), other / "model.joblib")
    joblib.dump(vectorizer.set_params(sublinear_tf=True), other / "vectorizer.joblib")
    vectorizer.set_params(sublinear_tf=False)
    with pytest.raises(ModelError, match="sublinear_tf"):
        linear.convert(tmp_path, tmp_path)


# --- BiLSTM

WORDS = ["idiot", "stupid", "the", "tea", "you", "are", "garden", "nice"]


@pytest.fixture(scope="module")
def keras_files(tmp_path_factory):
    """Files laid out as tox-block's, with random weights and eight words; and them converted."""
    import h5py

    payload, target = tmp_path_factory.mktemp("payload"), tmp_path_factory.mktemp("bilstm")
    folder = payload / "tox_block" / "trained_models"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(7)
    shapes = {"kernel": (50, 200), "recurrent": (50, 200), "bias": (200,)}
    with h5py.File(folder / "lstm_model_0.1.2.h5", "w") as file:
        file.attrs["model_config"] = json.dumps(architecture())
        for name, key in jigsaw_bilstm._HDF5.items():
            shape = {
                "embedding": (20, 50),
                "dense.kernel": (100, 50),
                "dense.bias": (50,),
                "output.kernel": (50, 6),
                "output.bias": (6,),
            }.get(name) or shapes[name.split(".")[1]]
            file["model_weights/" + key] = draw.normal(0, 0.4, shape).astype(np.float32)
    (folder / "encoder_0.1.2.pkl").write_bytes(keras_pickle(WORDS))
    jigsaw_bilstm.convert(payload, target)
    return folder, BilstmScorer(target, INFO)


def architecture(gates: str = "hard_sigmoid") -> dict:
    lstm = {"units": 50, "activation": "tanh", "recurrent_activation": gates, "use_bias": True}
    layers = {
        "embedding": {"mask_zero": False},
        "bidirectional": {"layer": {"config": lstm}, "merge_mode": "concat"},
        "dense": {"activation": "relu"},
        "dense_1": {"activation": "sigmoid"},
    }
    return {"config": {"layers": [{"name": name, "config": config} for name, config in layers.items()]}}


def keras_pickle(words: list[str]) -> bytes:
    """A pickle that names the classes tox-block's names; they exist only while it is written."""
    modules = {name: types.ModuleType(name) for name in ("keras_preprocessing", "keras_preprocessing.text")}
    modules |= {
        name: types.ModuleType(name)
        for name in ("tox_block", "tox_block.data_processing", "tox_block.data_processing.preprocessors")
    }
    tokenizer_class = type("Tokenizer", (), {"__module__": "keras_preprocessing.text"})
    encoder_class = type("TokenSequencer", (), {"__module__": "tox_block.data_processing.preprocessors"})
    modules["keras_preprocessing.text"].Tokenizer = tokenizer_class
    modules["tox_block.data_processing.preprocessors"].TokenSequencer = encoder_class
    tokenizer, encoder = tokenizer_class(), encoder_class()
    tokenizer.__dict__.update(
        word_index={word: i for i, word in enumerate(words, 1)} | {"dropped": 20},
        word_counts=OrderedDict((word, 1) for word in words),
        word_docs=defaultdict(int),
        num_words=20,
        filters='!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~\t\n',
        lower=True,
        split=" ",
        char_level=False,
        oov_token=None,
    )
    encoder.__dict__.update(tokenizer=tokenizer, max_sequence_length=100, max_features=20)
    sys.modules.update(modules)
    try:
        return pickle.dumps(encoder, protocol=2, fix_imports=False)
    finally:
        for name in modules:
            del sys.modules[name]


def keras_reference(weights_file, ids: list[int]) -> np.ndarray:
    """The network step by step in float64, as Keras defines it."""
    import h5py

    with h5py.File(weights_file) as file:
        w = {k: file["model_weights/" + key][:].astype(float) for k, key in jigsaw_bilstm._HDF5.items()}
    inputs = w["embedding"][[0] * (100 - len(ids)) + ids]
    peaks = []
    for name, sequence in (("forward", inputs), ("backward", inputs[::-1])):
        hidden = cell = np.zeros(50)
        outputs = []
        for x in sequence:
            z = x @ w[f"{name}.kernel"] + hidden @ w[f"{name}.recurrent"] + w[f"{name}.bias"]
            i, f, c, o = np.split(z, 4)
            i, f, o = (np.clip(0.2 * gate + 0.5, 0, 1) for gate in (i, f, o))
            cell = f * cell + i * np.tanh(c)
            hidden = o * np.tanh(cell)
            outputs.append(hidden)
        peaks.append(np.max(outputs, axis=0))
    dense = np.maximum(np.concatenate(peaks) @ w["dense.kernel"] + w["dense.bias"], 0)
    return 1 / (1 + np.exp(-(dense @ w["output.kernel"] + w["output.bias"])))


@pytest.mark.parametrize("words", [1, 3, 40, 99, 100])
def test_bilstm_equals_keras_step_by_step(keras_files, words):
    folder, scorer = keras_files
    ids = np.random.default_rng(words).integers(1, len(WORDS) + 1, words).tolist()
    text = " ".join(WORDS[i - 1] for i in ids)
    expected = keras_reference(folder / "lstm_model_0.1.2.h5", ids)
    np.testing.assert_allclose(scorer.score([text])[0], expected, atol=1e-6)


def test_bilstm_splits_words_as_keras_does(keras_files):
    _, scorer = keras_files
    assert scorer.tokenize("You, STUPID-idiot!\nunknown  dropped the_tea it's") == [5, 2, 1, 3, 4]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.sampled_from(WORDS), max_size=130), min_size=1, max_size=12))
def test_a_bilstm_score_is_the_same_in_any_company(keras_files, texts):
    _, scorer = keras_files
    joined = [" ".join(words) for words in texts]
    together = scorer.score(joined)
    assert together.shape == (len(texts), 6) and ((together >= 0) & (together <= 1)).all()
    for text, row in zip(joined, together, strict=True):
        np.testing.assert_array_equal(scorer.score([text])[0], row)


def test_a_text_over_the_limit_scores_at_least_what_its_end_scores(keras_files):
    folder, scorer = keras_files
    ids = np.random.default_rng(3).integers(1, len(WORDS) + 1, 260)
    text = " ".join(WORDS[i - 1] for i in ids)
    last = keras_reference(folder / "lstm_model_0.1.2.h5", ids[-100:].tolist())
    assert (scorer.score([text])[0] >= last - 1e-6).all()


def test_bilstm_scores_nothing_where_there_is_nothing(keras_files):
    _, scorer = keras_files
    assert not scorer.score(["", " \n", "?!…", "🙂"]).any()
    assert scorer.score([]).shape == (0, 6)


def test_a_pickle_that_wants_anything_else_is_refused(keras_files, tmp_path):
    folder, _ = keras_files
    evil = tmp_path / "tox_block" / "trained_models"
    evil.mkdir(parents=True)
    (evil / "lstm_model_0.1.2.h5").write_bytes((folder / "lstm_model_0.1.2.h5").read_bytes())
    (evil / "encoder_0.1.2.pkl").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(ModelError, match=r"asks for os\.system; refused"):
        jigsaw_bilstm.convert(tmp_path, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_network_with_other_gates_is_refused():
    with pytest.raises(ModelError, match="not the one this version of tamis can compute"):
        jigsaw_bilstm._check_architecture(architecture(gates="sigmoid"))


# --- numbers


def test_nan_is_refused_with_the_texts_index():
    scores = np.array([[0.1], [0.2], [np.nan]], np.float32)
    with pytest.raises(ModelError, match=r"toy: the score of text 2 \(of 3\) is not a number"):
        refuse_nan(scores, "toy")
    assert refuse_nan(scores[:2], "toy") is not None


def test_a_bilstm_with_unsound_weights_says_which_text(tmp_path):
    from safetensors.numpy import save_file

    record = {"vocabulary": {"tea": 1}, "separators": " ", "max_tokens": 100}
    (tmp_path / "tokenizer.json").write_text(json.dumps(record))
    shapes = {"kernel": (50, 200), "recurrent": (50, 200), "bias": (200,)}
    arrays = {f"{d}.{k}": np.zeros(s, np.float32) for d in ("forward", "backward") for k, s in shapes.items()}
    arrays |= {"embedding": np.ones((2, 50), np.float32)}
    arrays |= {"dense.kernel": np.zeros((100, 50), np.float32), "dense.bias": np.zeros(50, np.float32)}
    arrays |= {"output.kernel": np.zeros((50, 6), np.float32), "output.bias": np.full(6, np.nan, np.float32)}
    save_file(arrays, tmp_path / "bilstm.safetensors")
    with pytest.raises(ModelError, match="text 1"):
        BilstmScorer(tmp_path, INFO).score(["", "tea"])


def test_sigmoid_and_softmax_hold_at_the_extremes():
    logits = np.array([[-1e4, 0.0, 1e4]], np.float32)
    assert sigmoid(logits).tolist() == [[0.0, 0.5, 1.0]]
    np.testing.assert_allclose(softmax(np.array([[1000.0, 1000.0]])), [[0.5, 0.5]])


# --- the real ones


@pytest.mark.models
@pytest.mark.parametrize("name", ["linear", "jigsaw-bilstm"])
def test_insults_score_high_and_neutral_sentences_low(name):
    from models import registry

    if not store.available(name):
        pytest.skip(f"run: tamis models pull {name}")
    scorer = registry.load("scorer", name)
    assert isinstance(scorer, ToxicityScorer) and scorer.labels[0] == "toxicity"
    assert (scorer.score(RUDE)[:, 0] > 0.6).all()
    assert (scorer.score(KIND)[:, 0] < 0.3).all()
    # The end of a long text counts.
    long = "The committee meets on Tuesday to talk about the garden. " * 60
    assert scorer.score([long])[0, 0] < 0.3
    if name == "jigsaw-bilstm":
        assert scorer.score([long + "You stupid idiot, shut up."])[0, 0] > 0.5
