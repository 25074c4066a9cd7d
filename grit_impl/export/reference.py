"""The trained model as Hugging Face runs it: the other side of every comparison."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grit_impl.export.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch


class Reference:
    """Base plus unmerged PEFT adapter, in float32 unless told otherwise.

    Args:
        base: Folder of the base.
        adapter: PEFT folder or None.
        four_bit: The adapter was trained on NF4 weights: a base stored in 16 bits goes through NF4 and back.
        device: Where to compute.
        dtype: torch dtype's name; float32 needs 32 GB for 8B parameters.
    """

    def __init__(
        self, base: Path, adapter: Path | None, *, four_bit: bool = False, device: str = "cpu", dtype: str = "float32"
    ) -> None:
        import torch
        from transformers import AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(base)
        self.model: Any = _load(Checkpoint(base), getattr(torch, dtype), four_bit)
        self.adapted = adapter is not None
        if adapter is not None:
            from peft import PeftModel

            self.model = PeftModel.from_pretrained(self.model, adapter)
        self.model.to(device).eval()
        self.device = device

    def ids(self, text: str) -> list[int]:
        """Token ids with special tokens, as in training."""
        return [int(i) for i in self.tokenizer(text).input_ids]

    def log_probabilities(self, ids: list[int], start: int) -> torch.Tensor:
        """Log-probabilities (len(ids) - start + 1, vocabulary) of the tokens at positions start to len(ids)."""
        import torch

        with torch.inference_mode():
            logits = self.model(torch.tensor([ids], device=self.device)).logits[0, start - 1 :]
        result: torch.Tensor = logits.float().log_softmax(-1).cpu()
        return result

    @contextlib.contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The base alone."""
        with self.model.disable_adapter() if self.adapted else contextlib.nullcontext():
            yield

    def render(self, messages: list[dict[str, str]]) -> str | None:
        """The conversation in the tokenizer's chat template, without BOS; None if it has none."""
        if not self.tokenizer.chat_template:
            return None
        text = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        return text.removeprefix(self.tokenizer.bos_token or "")


def _load(base: Checkpoint, dtype: torch.dtype, four_bit: bool) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if not base.four_bit:
        model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=dtype)
        if four_bit:
            from grit_impl.export.four_bit import round_trip

            with torch.no_grad():
                for name, module in model.named_modules():
                    if isinstance(module, torch.nn.Linear) and name != "lm_head":
                        with base.reader() as reader:
                            module.weight.copy_(round_trip(reader(f"{name}.weight")))
        return model
    # bitsandbytes would compute in 4 bits; the comparison wants the same weights in full precision.
    config = AutoConfig.from_pretrained(base.folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    with base.reader() as reader, torch.no_grad():
        model.load_state_dict({name: reader(name).to(dtype) for name in base.names()}, strict=False)
        model.tie_weights()
    return model
