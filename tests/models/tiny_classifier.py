"""Tiny random classifiers with real tokenizers, made in a moment: BERT as a folder, or as Detoxify packs it."""

from __future__ import annotations

import hashlib
from pathlib import Path

WORDS = [
    "the",
    "a",
    "you",
    "are",
    "is",
    "not",
    "idiot",
    "stupid",
    "moron",
    "fool",
    "tea",
    "garden",
    "train",
    "nice",
    "lovely",
    "committee",
    "meets",
    "on",
    "tuesday",
    "thank",
    "for",
    "dinner",
    "good",
    "bad",
    "very",
    "so",
    "and",
    "we",
    "they",
    "it",
    "was",
    "##s",
    "##ed",
    "##ing",
    ".",
    ",",
    "!",
    "?",
]
LABELS = ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")


def save_settings(folder: Path, *, labels: tuple[str, ...] = LABELS, limit: int = 64, **changes) -> Path:
    """Save config.json and tokenizer of a two-layer BERT, without weights."""
    from transformers import BertConfig, BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *WORDS,
        *letters,
        *(f"##{c}" for c in letters),
    ]
    vocabulary = list(dict.fromkeys(vocabulary))
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}, model_max_length=limit)
    tokenizer.save_pretrained(folder)
    settings = {
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": limit,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        "architectures": ["BertForSequenceClassification"],
        **changes,
    }
    BertConfig(**settings).save_pretrained(folder)
    return folder


def make_model(folder: Path, *, seed: int = 0):
    """A random model of a folder's configuration; its head is scaled up so that scores differ."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model


def save_classifier(folder: Path, *, seed: int = 0, **changes) -> Path:
    """Save a whole classifier folder."""
    make_model(save_settings(folder, **changes), seed=seed).save_pretrained(folder)
    return folder


def save_detoxify(folder: Path, settings: Path, *, labels: tuple[str, ...] = LABELS, seed: int = 0) -> Path:
    """Save a random checkpoint in Detoxify's own layout, its hash in its name."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    arguments = {
        "model_type": str(settings),
        "model_name": "BertForSequenceClassification",
        "tokenizer_name": "BertTokenizer",
        "num_classes": len(labels),
    }
    record = {
        "config": {"arch": {"args": arguments}, "dataset": {"args": {"classes": list(labels)}}},
        "state_dict": make_model(settings, seed=seed).state_dict(),
    }
    plain = folder / "plain.ckpt"
    torch.save(record, plain)
    digest = hashlib.sha256(plain.read_bytes()).hexdigest()
    return plain.rename(folder / f"tiny-{digest[:8]}.ckpt")
