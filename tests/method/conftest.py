"""Models small enough for exact references, and the runs that the invariants compare."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grit_impl.config import GRITConfig
from grit_impl.method.manager import GRITManager

HIDDEN, LAYERS, VOCABULARY, RANK = 32, 2, 48, 4
PROJECTIONS = ["q_proj", "v_proj", "down_proj"]
# Every step inverts and preconditions, with the plain formula: nothing between the test and the mathematics.
PLAIN = {"kfac_update_freq": 1, "kfac_min_samples": 1, "kfac_damping": 0.0, "renormalise": "none", "factor_decay": 0.0}


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    """The same numbers in any order of tests; the two cores are shared."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message=".*(lr_scheduler|pin_memory|tie_word_embeddings|epoch parameter).*")


@pytest.fixture
def counters() -> Iterator[Any]:
    """Dynamo's counters, with nothing compiled before or left behind."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


class Linear(nn.Module):
    """One linear layer with a Gaussian likelihood: the gradient at each token's output is what the caller says."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(d_in, d_out, bias=False)

    def forward(self, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
        y = self.proj(x)
        residual = y - y.detach() + dy  # y minus a label that lies dy away, exactly, however small dy is
        return {"loss": 0.5 * (residual**2).sum() / len(x)}


@pytest.fixture
def linear() -> Callable[..., Any]:
    """(d_in, d_out, r, **lora) -> a PEFT model in float64 with random A and B."""

    def build(d_in: int = 5, d_out: int = 6, r: int = 3, dtype: torch.dtype = torch.float64, **lora: Any) -> Any:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=["proj"], **lora)
        model = get_peft_model(Linear(d_in, d_out).to(dtype), config).train()
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
        return model

    return build


@pytest.fixture
def attach() -> Callable[..., GRITManager]:
    """(model, **options) -> an attached manager with the plain formula unless options say otherwise."""

    def build(model: nn.Module, **options: Any) -> GRITManager:
        return GRITManager(model, GRITConfig(**{**PLAIN, **options})).attach()

    return build


@pytest.fixture
def fit() -> Callable[..., GRITManager]:
    """(model, x, dy, **options) -> one backward pass with statistics taken, gradients still raw."""

    def run(model: Any, x: Tensor, dy: Tensor, **options: Any) -> GRITManager:
        model.zero_grad()
        manager = GRITManager(model, GRITConfig(**{**PLAIN, **options}))
        manager.loss_tokens = len(x)
        manager.attach()
        model(x=x, dy=dy)["loss"].backward()
        return manager

    return run


@pytest.fixture
def llama() -> Callable[..., Any]:
    """(**lora) -> a random two-layer Llama with adapters, in training mode; B random, so that every gradient lives."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        zero_b: bool = False,
        tied: bool = False,
        attention: str = "sdpa",
        layers: int = LAYERS,
        **lora: Any,
    ) -> Any:
        torch.manual_seed(seed)
        config = LlamaConfig(
            hidden_size=HIDDEN,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=tied,
            attn_implementation=attention,
            use_cache=False,
        )
        options = {"r": RANK, "lora_alpha": 8, "target_modules": PROJECTIONS, "task_type": "CAUSAL_LM", **lora}
        model = get_peft_model(LlamaForCausalLM(config).to(dtype), LoraConfig(**options))
        if not zero_b:
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.1)
        return model.train()

    return build


@pytest.fixture
def sequences() -> Callable[..., list[Tensor]]:
    """(n, seed) -> n token sequences of different lengths."""

    def build(n: int = 4, seed: int = 0, shortest: int = 5, longest: int = 11) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(shortest, longest + 1, (n,), generator=generator).tolist()
        return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]

    return build


@pytest.fixture
def collate() -> Callable[..., dict[str, Tensor]]:
    """(sequences, side, length) -> padded input_ids, attention_mask, labels; the first two tokens unsupervised."""

    def build(rows: list[Tensor], side: str = "right", length: int | None = None) -> dict[str, Tensor]:
        length = length or max(len(row) for row in rows)
        ids, mask, labels = (torch.full((len(rows), length), fill) for fill in (0, 0, -100))
        for i, row in enumerate(rows):
            where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
            ids[i, where], mask[i, where] = row, 1
            labels[i, where] = torch.where(torch.arange(len(row)) < 2, -100, row)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return build


@pytest.fixture
def supervised() -> Callable[[list[Tensor]], Tensor]:
    """(sequences) -> number of tokens that the loss is averaged over."""
    return lambda rows: torch.tensor(sum(len(row) - 2 for row in rows))


@pytest.fixture
def relative() -> Callable[[Tensor, Tensor], float]:
    """(value, reference) -> |value - reference| / |reference|, in float64."""

    def error(value: Tensor, reference: Tensor) -> float:
        value, reference = value.double(), reference.double()
        return float((value - reference).norm() / reference.norm().clamp_min(1e-300))

    return error


@pytest.fixture
def adapters() -> Callable[[nn.Module], Tensor]:
    """(model) -> all trained parameters in one vector."""
    return lambda model: torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


@pytest.fixture
def gradients() -> Callable[[nn.Module], Tensor]:
    """(model) -> the gradients of all trained parameters in one vector."""
    return lambda model: torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.fixture
def rows() -> list[dict[str, list[int]]]:
    """A training set of 24 short sequences."""
    generator = torch.Generator().manual_seed(7)
    out = []
    for _ in range(24):
        ids = torch.randint(3, VOCABULARY, (int(torch.randint(4, 9, (), generator=generator)),), generator=generator)
        out.append({"input_ids": ids.tolist(), "labels": [-100, *ids.tolist()[1:]]})
    return out


@pytest.fixture
def pad_rows() -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """A data collator: right padding, and a mask."""

    def collator(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        length = max(len(f["input_ids"]) for f in features)

        def pad(values: Any, fill: int) -> list[int]:
            return [*values, *([fill] * (length - len(values)))]

        return {
            "input_ids": torch.tensor([pad(f["input_ids"], 0) for f in features]),
            "attention_mask": torch.tensor([pad([1] * len(f["input_ids"]), 0) for f in features]),
            "labels": torch.tensor([pad(f["labels"], -100) for f in features]),
        }

    return collator


@pytest.fixture
def training(tmp_path: Any, rows: Any, pad_rows: Any) -> Callable[..., Any]:
    """(kind, model, config, **arguments) -> a Trainer: kind is none, pure, hybrid, sft, or sft-pure."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    from grit_impl.recipes.sabotage import LateCallback
    from grit_impl.trainer import GRITCallback, GRITTrainer, with_grit

    def build(kind: str, model: Any, config: GRITConfig | None = None, moment: str | None = None, **given: Any) -> Any:
        arguments = {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "remove_unused_columns": False,
            "dataloader_pin_memory": False,
            "seed": 3,
            **given,
        }
        common = {"model": model, "train_dataset": Dataset.from_list(rows), "data_collator": pad_rows}
        callback = LateCallback(config, moment) if moment else GRITCallback(config)
        if kind.startswith("sft"):
            from trl import SFTConfig, SFTTrainer

            settings = {"packing": False, "dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": 32}
            tokenizer = _tokenizer()
            args = SFTConfig(**settings, **{"bf16": False, "gradient_checkpointing": False, **arguments})
            if kind == "sft-pure":
                return with_grit(SFTTrainer)(args=args, grit_config=config, processing_class=tokenizer, **common)
            trainer = SFTTrainer(args=args, processing_class=tokenizer, **common)
            trainer.add_callback(callback)
        elif kind == "pure":
            trainer = GRITTrainer(args=TrainingArguments(**arguments), grit_config=config, **common)
        else:
            trainer = Trainer(args=TrainingArguments(**arguments), **common)
            if kind == "hybrid":
                trainer.add_callback(callback)
        trainer.grit_callback = callback
        return trainer

    return build


def _tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(3, VOCABULARY)}
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **words}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<pad>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )


@pytest.fixture
def losses() -> Callable[[Any], list[float]]:
    """(trainer) -> the logged losses."""
    return lambda trainer: [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.fixture
def clone() -> Callable[[Any], Any]:
    """Deep copy of a model, to run one thing twice from the same start."""
    return copy.deepcopy
