"""The trained model as transformers and PEFT load it: the other side of every comparison, which shares no code with the
export. Once it has answered, PEFT merges it, and then it is given a GGUF file's own weights."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grit_impl.errors import GRITError
from grit_impl.export.checkpoint import EMBEDDING, HEAD, Checkpoint
from grit_impl.export.vocabulary import load_tokenizer, training_folder
from grit_impl.tables import one_line

if TYPE_CHECKING:
    import torch


class Reference:
    """Base plus unmerged PEFT adapter, in float32 unless told otherwise.

    Args:
        base: The base.
        adapter: PEFT folder or None.
        four_bit: The adapter was trained on NF4 weights: a base stored in 16 bits goes through NF4 and back.
        device: Where to compute.
        dtype: torch dtype's name; float32 needs 32 GB for 8B parameters.

    Raises:
        GRITError: PEFT cannot load the adapter.
    """

    def __init__(
        self,
        base: Checkpoint,
        adapter: Path | None,
        *,
        four_bit: bool = False,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        import torch

        self.tokenizer: Any = load_tokenizer(training_folder(base.folder, adapter))
        self.model: Any = _load(base, getattr(torch, dtype), four_bit)
        self.adapted = adapter is not None
        if adapter is not None:
            self.model = _adapted(self.model, adapter)
        self.model.to(device).eval()
        self.device = device

    def ids(self, text: str) -> list[int]:
        """Token ids with special tokens, as in training."""
        return [int(i) for i in self.tokenizer(text).input_ids]

    def log_probabilities(self, ids: list[int], start: int, copies: int = 1) -> torch.Tensor:
        """Log-probabilities (len(ids) - start + 1, vocabulary) of the tokens at positions start to len(ids).

        With more `copies` the same text is computed several times side by side, which changes only how sums are cut.
        """
        import torch

        with torch.inference_mode():
            kept = len(ids) - start + 1
            logits = self.model(torch.tensor([ids] * copies, device=self.device), logits_to_keep=kept).logits[-1]
        result: torch.Tensor = logits.double().log_softmax(-1).cpu()
        return result

    @contextlib.contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The base alone."""
        with self.model.disable_adapter() if self.adapted else contextlib.nullcontext():
            yield

    def render(self, messages: list[dict[str, str]]) -> str | None:
        """The conversation in the tokenizer's chat template, without BOS; None if it has none."""
        from grit_impl.export.vocabulary import render

        return render(self.tokenizer, messages) if self.tokenizer.chat_template else None

    def merge(self) -> dict[str, Any]:
        """Let PEFT merge the adapter into the model, for good, and return its parameters by name."""
        self._untie()
        if self.adapted:
            self.model, self.adapted = self.model.merge_and_unload(), False
        return dict(self.model.named_parameters(remove_duplicate=False))

    def unload(self) -> dict[str, Any]:
        """Take the adapter off, for good, and return the base's parameters by name."""
        self._untie()
        if self.adapted:
            self.model, self.adapted = self.model.unload(), False
        return dict(self.model.named_parameters(remove_duplicate=False))

    def _untie(self) -> None:
        """Give head and embedding a matrix each: PEFT would add the changes of both to the one that they share."""
        import torch

        inside = self.model.get_base_model() if self.adapted else self.model
        for name in (EMBEDDING, HEAD):
            module = inside.get_submodule(name.removesuffix(".weight"))
            module = module.get_base_layer() if hasattr(module, "get_base_layer") else module
            if "weight" in module._parameters:
                module._parameters["weight"] = torch.nn.Parameter(module.weight.detach().clone(), requires_grad=False)


def _adapted(model: Any, adapter: Path) -> Any:
    from peft import PeftConfig, PeftModel
    from peft.utils import load_peft_weights

    with warnings.catch_warnings():
        # The export refuses what PEFT warns of.
        warnings.simplefilter("ignore")
        try:
            weights = load_peft_weights(str(adapter), device="cpu")
            saved = [t for key, t in weights.items() if key.endswith("embed_tokens.weight") and "lora_" not in key]
            if saved and saved[0].shape[0] != model.get_input_embeddings().weight.shape[0]:
                model.resize_token_embeddings(saved[0].shape[0], mean_resizing=False)
            return PeftModel.from_pretrained(model, adapter, config=PeftConfig.from_pretrained(str(adapter)))
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            reason = one_line(error)
            raise GRITError(f"PEFT cannot load {adapter}: {reason}") from error


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
