"""A tiny random language model with a real tokenizer, made in a moment: for tests of training."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(*, eos: bool = True, chat: bool = True):
    """A byte-level tokenizer: one token a byte, and the two marks of ChatML."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    options = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"} if eos else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **options)
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tiny_lm(folder: Path, *, seed: int = 0, eos: bool = True, chat: bool = True, **changes) -> Path:
    """Save a two-layer Llama of 20,000 parameters and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(eos=eos, chat=chat)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(folder, base, seed, *, targets="all-linear", r=4, scale=0.3, **changes):
    """A LoRA adapter with random weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=r, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **changes)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    model.save_pretrained(folder)
    return folder


def save_base(folder, seed):
    """A tiny model that is sure of something (untrained ones hardly differ), large enough for its layers to be packed."""
    import torch
    from transformers import AutoModelForCausalLM

    save_tiny_lm(folder, seed=seed, hidden_size=64, intermediate_size=96, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(12)
    model.save_pretrained(folder)
    return folder
