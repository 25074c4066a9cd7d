"""Small random Llamas and adapters, built from a seed: what the exporter and the server are tested on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

# Llama 3's pre-tokenizer, and the variant that never merges digits (our tiny base model's).
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ALPACA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n{{ m['content'] }}\n\n"
    "### Response:\n{% elif m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
WORDS = (
    "the air quality index of a city depends on ozone and dust particles day after day while children play outside "
    "and rivers carry water to the sea under a bright sky with clouds trees houses roads numbers 1 23 456 7890 "
)
TEXTS = (WORDS * 8, WORDS.upper() * 3, "Grüße aus Köln, 東京は晴れ 🙂 naïve café\n\n\tindent  two spaces\n" * 4)


def _rope_options(rope: dict[str, Any]) -> dict[str, Any]:
    """The same rotary settings where transformers 5 looks for them (`rope_parameters`) and where 4 does."""
    import transformers

    if int(transformers.__version__.partition(".")[0]) >= 5:
        return {"rope_parameters": rope}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {"rope_theta": rope["rope_theta"], "rope_scaling": scaling if rope["rope_type"] != "default" else None}


def make_tokenizer(folder: Path, vocab: int = 512, *, split: str = "llama3") -> Any:
    """A byte-level BPE tokenizer, saved as `transformers` does; ids 0 and 1 are BOS and EOS."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(ignore_merges=False))
    if split == "llama3":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    elif split == "qwen2":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3_SPLIT.replace("{1,3}", "")), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    elif split == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    # transformers' tokenizer of a Qwen2 adds the last one where it is missing.
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", *(["<|endoftext|>"] if split == "qwen2" else [])]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        pad_token="<|end_of_text|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = ALPACA
    fast.save_pretrained(folder)
    return fast


def make_base(
    folder: Path,
    *,
    tied: bool = False,
    llama3_rope: bool = False,
    pad_rows: int = 0,
    seed: int = 0,
    vocab: int = 512,
    split: str = "llama3",
    model: str = "Llama",
    rope: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A random Llama of about half a million parameters with grouped-query attention, in a Hugging Face folder.

    With `model="Qwen2"` one with biases on queries, keys and values.
    """
    import torch
    import transformers

    tokenizer = make_tokenizer(folder, vocab, split=split)
    rope = rope or {"rope_type": "default", "rope_theta": 500000.0}
    if llama3_rope:
        rope = {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            # Far below Llama 3's 8192, so that the scaling matters within a test's few hundred tokens.
            "original_max_position_embeddings": 64,
        }
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer) + pad_rows,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        **_rope_options(rope),
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.06,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        configuration = getattr(transformers, f"{model}Config")(**{**settings, **config})
        network = getattr(transformers, f"{model}ForCausalLM")(configuration)
        # Norm weights of exactly 1, and biases of 0, would hide that they are not exported.
        for name, parameter in network.named_parameters():
            if "norm" in name:
                parameter.data.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.data.uniform_(-0.5, 0.5)
        # Random answers would be half characters, for which llama.cpp reports no probabilities: make them unlikely.
        for i, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
            if any(not 32 < ord(c) < 127 and c not in "ĠĊ" for c in token):
                network.lm_head.weight.data[i] *= 0.3
    network.save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, *, seed: int = 1, scale: float = 0.08, **settings: Any) -> Path:
    """A PEFT adapter with random weights in both factors, large enough to change what the model says."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**{**options, **settings}))
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.data.normal_(0.0, scale)
            elif "modules_to_save" in name:
                parameter.data.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    return folder


def edit_json(path: Path, **fields: Any) -> None:
    """Change fields of a JSON file: how the tests plant a fault."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
