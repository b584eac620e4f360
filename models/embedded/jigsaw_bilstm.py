"""The six-label Jigsaw classifier: a Keras BiLSTM (tox-block), converted without TensorFlow.

The payload is an HDF5 file of weights and a pickled Keras tokenizer. The pickle is opened by an unpickler
that can build nothing but dicts and two empty stand-in classes; the weights are read with h5py. What is kept:

    bilstm.safetensors   embedding (20000, 50); forward.* and backward.*: kernel (50, 200),
                         recurrent (50, 200), bias (200,), gates in Keras order (input, forget, cell,
                         output); dense.*, output.*
    tokenizer.json       the 19,999 words the network knows, with their indices; the characters that
                         separate words

Nothing is transposed here: the arrays are those of the file, float32.
"""

from __future__ import annotations

import collections
import json
import pickle
from pathlib import Path
from typing import Any

from models.store import Package
from schemas.errors import ModelError

_ENCODER = "tox_block/trained_models/encoder_0.1.2.pkl"
_WEIGHTS = "tox_block/trained_models/lstm_model_0.1.2.h5"

# The names Detoxify gives the same Jigsaw labels, so that scorers can be compared.
LABELS = ("toxicity", "severe_toxicity", "obscene", "threat", "insult", "identity_attack")

PACKAGE = Package(
    name="jigsaw-bilstm",
    kind="scorer",
    distribution="tox-block",
    version="0.1.2",
    payload={
        _ENCODER: "f73db76ce4138c0a566cf91a84077ab66db1f5da40d795d2f751b5a157d91ce7",
        _WEIGHTS: "587d40726f1250341a3661fac099e46582cf34cdd5136eb88a726bf6d62ec24e",
    },
    licence="MIT",
    training_data="jigsaw-2018",
    download_mb=18,
    disk_mb=5,
    summary="BiLSTM with the six Jigsaw labels",
    extra={"labels": list(LABELS), "max_tokens": 100},
)

_HDF5 = {
    "embedding": "embedding/embedding/embeddings:0",
    "forward.kernel": "bidirectional/bidirectional/forward_lstm/kernel:0",
    "forward.recurrent": "bidirectional/bidirectional/forward_lstm/recurrent_kernel:0",
    "forward.bias": "bidirectional/bidirectional/forward_lstm/bias:0",
    "backward.kernel": "bidirectional/bidirectional/backward_lstm/kernel:0",
    "backward.recurrent": "bidirectional/bidirectional/backward_lstm/recurrent_kernel:0",
    "backward.bias": "bidirectional/bidirectional/backward_lstm/bias:0",
    "dense.kernel": "dense/dense/kernel:0",
    "dense.bias": "dense/dense/bias:0",
    "output.kernel": "dense_1/dense_1/kernel:0",
    "output.bias": "dense_1/dense_1/bias:0",
}


def convert(payload: Path, target: Path) -> None:
    """Save weights and vocabulary of the payload as safetensors and JSON.

    Raises:
        ImportError: h5py is not installed.
        ModelError: The files do not hold what is expected.
    """
    import h5py
    import numpy as np
    from safetensors.numpy import save_file

    with h5py.File(payload / _WEIGHTS, "r") as file:
        _check_architecture(json.loads(file.attrs["model_config"]))
        arrays = {name: np.asarray(file["model_weights"][key], np.float32) for name, key in _HDF5.items()}
    save_file(arrays, target / "bilstm.safetensors")

    with (payload / _ENCODER).open("rb") as stream:
        encoder = _TokenizerUnpickler(stream).load()
    tokenizer = encoder.tokenizer
    if (
        not tokenizer.lower
        or tokenizer.char_level
        or tokenizer.split != " "
        or tokenizer.oov_token is not None
    ):
        raise ModelError("the tox-block tokenizer is not the one this version of tamis can convert")
    record = {
        # num_words: Keras drops indices from it on, however large the vocabulary is.
        "vocabulary": {w: i for w, i in tokenizer.word_index.items() if i < tokenizer.num_words},
        "separators": tokenizer.filters,
        "max_tokens": encoder.max_sequence_length,
    }
    (target / "tokenizer.json").write_text(json.dumps(record, ensure_ascii=False), "utf-8")


class _Attributes:
    """Stands in for a pickled object: holds its attributes, runs none of its code."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __getattr__(self, name: str) -> Any:
        raise ModelError(f"the tox-block tokenizer lacks '{name}'")


class _TokenizerUnpickler(pickle.Unpickler):
    """Builds only the five classes the tokenizer's pickle names; everything else is refused."""

    _ALLOWED: dict[tuple[str, str], Any] = {  # noqa: RUF012
        ("tox_block.data_processing.preprocessors", "TokenSequencer"): type(
            "TokenSequencer", (_Attributes,), {}
        ),
        ("keras_preprocessing.text", "Tokenizer"): type("Tokenizer", (_Attributes,), {}),
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("collections", "defaultdict"): collections.defaultdict,
        ("builtins", "int"): int,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Resolve a global of the pickle; only the allowed ones exist."""
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise ModelError(f"the tox-block tokenizer's pickle asks for {module}.{name}; refused") from None


def _check_architecture(config: dict[str, Any]) -> None:
    """Refuse a network the scorer would compute wrongly."""
    layers = {layer["name"]: layer["config"] for layer in config["config"]["layers"]}
    lstm = layers["bidirectional"]["layer"]["config"]
    found = (
        lstm["units"],
        lstm["activation"],
        lstm["recurrent_activation"],
        lstm["use_bias"],
        layers["bidirectional"]["merge_mode"],
        layers["embedding"]["mask_zero"],
        layers["dense"]["activation"],
        layers["dense_1"]["activation"],
    )
    # hard_sigmoid, not sigmoid: torch.nn.LSTM cannot compute this network.
    expected = (50, "tanh", "hard_sigmoid", True, "concat", False, "relu", "sigmoid")
    if found != expected:
        raise ModelError(f"the tox-block network is not the one this version of tamis can compute: {found}")
