"""A PEFT adapter's folder, and PEFT's own merge of it into the base, one module at a time.

PEFT builds its layers around a model without memory (`Checkpoint.skeleton`) and loads the adapter's file into them, so
that names, ranks, scalings, variants and saved modules are PEFT's business. To merge a module, its base weight is put
in place, PEFT's `merge` is called, and the weight is taken out again.

PiSSA and OLoRA take the adapter's start out of the base weight when a layer is made; from the same base PEFT finds the
same start again, here as in training. CorDA, LoRA-GA and LoftQ need what only training had, and PiSSA with a number of
iterations is random: such an adapter is exported after PEFT has converted it to plain LoRA (`save_pretrained` with
`path_initial_model_for_weight_conversion`), or it is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grit_impl.errors import GRITError
from grit_impl.export.checkpoint import EMBEDDING, HEAD, Checkpoint, read_json
from grit_impl.record import sha256_file
from grit_impl.tables import refuse_pointers

if TYPE_CHECKING:
    import torch

NAME = "default"
PREFIX = "base_model.model."
# PEFT's options that its merge takes care of, or that have no effect on a trained adapter. Any other must be unset.
KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "trainable_token_indices", "use_dora",
    "use_rslora",
}  # fmt: skip
# What `init_lora_weights` does to the base weight: nothing, or something that the same base gives again.
HARMLESS_STARTS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
REPEATED_STARTS = ("pissa", "olora")

Base = Callable[[str], "torch.Tensor"]


class Adapter:
    """A LoRA adapter in PEFT's format, over a base.

    Args:
        folder: The folder with `adapter_config.json` and the weights.
        base: The base that it was trained on.

    Attributes:
        changed: Names of the base's parameters that the adapter changes.
        rows: Rows of the embedding, which an adapter that saved it may have made more.

    Raises:
        GRITError: the folder is no adapter, or uses an option whose effect cannot be exported (named), or holds a
            tensor that PEFT does not use or lacks one that it needs (named), or does not fit the base.
    """

    def __init__(self, folder: Path | str, base: Checkpoint) -> None:
        self.folder, self.base = Path(folder), base
        self.config = read_json(self.folder / "adapter_config.json")
        refuse_pointers(*self.folder.iterdir())
        self._check_config()
        self.start = str(self.config.get("init_lora_weights", True)).lower()
        weights = self._load()
        self.rows = self._rows(weights)
        self._peft = self._build(weights)
        self._modules: dict[str, Any] = dict(self._peft.base_model.model.named_modules())
        self.changed = self._changed()

    @property
    def layers(self) -> dict[str, Any]:
        """PEFT's LoRA layers by the name of the module that each wraps."""
        from peft.tuners.lora import LoraLayer

        return {name: module for name, module in self._modules.items() if isinstance(module, LoraLayer)}

    @property
    def kept_apart(self) -> str | None:
        """Why the adapter cannot be a GGUF file of its own, which holds plain A and B only; None if it can."""
        pairs = {f"{name}.weight" for name in self.layers}
        if self.start in REPEATED_STARTS:
            return f"init_lora_weights={self.config['init_lora_weights']!r}, which changed the base"
        if self.config.get("use_dora"):
            return "DoRA"
        if self.config.get("trainable_token_indices"):
            return "trainable_token_indices"
        if self.config.get("lora_bias"):
            return "lora_bias"
        if "model.embed_tokens" in self.layers:
            return "LoRA on the embedding"
        if others := sorted(self.changed - pairs):
            kind = "modules_to_save" if self.config.get("modules_to_save") else "a trained parameter"
            return f"{kind} ({others[0]})"
        if self.base.tied and "lm_head" in self.layers:
            return "LoRA on a tied head"
        return None

    def shape(self, name: str) -> tuple[int, ...]:
        """A parameter's shape in the merged model."""
        rest = self.base.shape(name)
        return (self.rows, *rest[1:]) if name in (EMBEDDING, HEAD) else rest

    def merged(self, name: str, base: Base) -> torch.Tensor:
        """A parameter with the adapter in it, in float32.

        Args:
            name: One of `changed`.
            base: Gives the base's parameter of a name, in float32, as a tensor that may be overwritten.
        """
        import torch

        module_name, _, kind = name.rpartition(".")
        module = self._modules[module_name]
        inner = _inner(module)
        places = dict(inner._parameters)
        for key, place in places.items():
            # A bias alone is merged over a place without memory only if PEFT does not write to the weight.
            if place is not None and _is_place(place):
                inner._parameters[key] = torch.nn.Parameter(base(f"{module_name}.{key}"), requires_grad=False)
        try:
            with torch.no_grad():
                self._start_again(module)
                merged = _merge(module)
            result: torch.Tensor = merged._parameters[kind].detach()
        except (RuntimeError, ValueError, NotImplementedError, AttributeError, TypeError) as error:
            raise GRITError(f"cannot export {self.folder}: PEFT does not merge {name}: {_line(error)}") from error
        finally:
            inner._parameters.update(places)
            for layer in (module, getattr(module, "token_adapter", None)):
                if layer is not None and hasattr(layer, "merged_adapters"):
                    layer.merged_adapters.clear()
        return result

    def _start_again(self, module: Any) -> None:
        """Take the adapter's start out of the base weight, as PEFT did when training began."""
        if self.start not in REPEATED_STARTS or not hasattr(module, "lora_A") or NAME not in module.lora_A:
            return
        trained = [(part[NAME], part[NAME].weight.data) for part in (module.lora_A, module.lora_B)]
        if self.start == "pissa":
            module.pissa_init(NAME, "pissa")
        else:
            module.olora_init(NAME)
        for layer, weight in trained:
            layer.weight.data = weight

    def _check_config(self) -> None:
        config = self.config
        if config.get("peft_type") != "LORA":
            raise GRITError(f"{self.folder} is a {config.get('peft_type')} adapter: only LoRA can be exported")
        for option, value in config.items():
            if option not in KNOWN and value not in (None, False, [], {}):
                raise GRITError(f"cannot export {self.folder}: {option}={value!r} is not merged; train without it")
        start = config.get("init_lora_weights", True)
        if str(start).lower() not in (*HARMLESS_STARTS, *REPEATED_STARTS):
            raise GRITError(
                f"cannot export {self.folder}: init_lora_weights={start!r} changed the base, and how cannot be found "
                "again: convert it with save_pretrained(..., path_initial_model_for_weight_conversion=...), or give "
                "the changed base and set init_lora_weights to true"
            )
        if self.base.four_bit and str(start).lower() in REPEATED_STARTS:
            raise GRITError(f"cannot export {self.folder}: init_lora_weights={start!r} on weights stored in 4 bits")

    def _load(self) -> dict[str, torch.Tensor]:
        """The file's tensors; floating point in float32."""
        from peft.utils import load_peft_weights
        from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

        path = next(
            (self.folder / n for n in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) if (self.folder / n).is_file()), None
        )
        if path is None:
            raise GRITError(f"{self.folder / SAFETENSORS_WEIGHTS_NAME} is missing")
        self.sha256 = sha256_file(path)
        try:
            weights = load_peft_weights(str(self.folder), device="cpu")
        except Exception as error:  # safetensors and pickle raise many unrelated types
            raise GRITError(f"{path} cannot be read: {_line(error)}") from error
        if not weights:
            raise GRITError(f"{self.folder} holds no adapter tensor")
        for key, tensor in weights.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                module = key.removeprefix(PREFIX).split(".lora_")[0]
                raise GRITError(f"{self.folder}: {module} has NaN or infinite weights; this training diverged")
        for key in [key for key in weights if ".modules_to_save." in key]:
            # PEFT saves an enlarged embedding under two names.
            twin = weights.get(key.replace(".modules_to_save.", "."))
            if twin is not None and twin.equal(weights[key]):
                del weights[key]
        return {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in weights.items()}

    def _rows(self, weights: dict[str, torch.Tensor]) -> int:
        """The embedding's rows: those that the adapter saved, or the base's."""
        for key, tensor in weights.items():
            if key.endswith(".weight") and "lora_" not in key and ".embed_tokens." in key and tensor.ndim == 2:
                return int(tensor.shape[0])
        return self.base.shape(EMBEDDING)[0]

    def _build(self, weights: dict[str, torch.Tensor]) -> Any:
        """PEFT's model over the skeleton, with all of the file's tensors in it."""
        from peft import PeftConfig, PeftModel, set_peft_model_state_dict

        own = self.base.shape(EMBEDDING)[0]
        model = self.base.skeleton(self.rows if self.rows != own else None)
        with warnings.catch_warnings():
            # What PEFT warns of is decided here: missing and unused tensors, tied weights.
            warnings.simplefilter("ignore")
            try:
                config = PeftConfig.from_pretrained(str(self.folder))
                config.inference_mode = True
                # There are no base weights to start from yet.
                config.init_lora_weights = True
                peft = PeftModel(model, config, NAME, low_cpu_mem_usage=True)
                set_peft_model_state_dict(peft, weights, NAME, low_cpu_mem_usage=True)
            except KeyError as error:
                raise GRITError(
                    f"{self.folder} lacks tensor {error.args[0]}, which its configuration asks for"
                ) from error
            except (RuntimeError, ValueError, TypeError, AttributeError) as error:
                raise GRITError(self._misfit(_line(error, 2))) from error
        self._check_use(peft, weights)
        return peft

    def _misfit(self, reason: str) -> str:
        if "size mismatch" in reason:
            remedy = "; an adapted rank belongs into rank_pattern" if "lora_" in reason else ""
            return f"wrong-base: {self.folder} does not fit {self.base.folder}: {reason}{remedy}"
        if "not found in the base model" in reason:
            return f"wrong-base: {self.folder} changes what {self.base.folder} does not have: {reason}"
        return f"cannot export {self.folder}: {reason}"

    def _check_use(self, peft: Any, weights: dict[str, torch.Tensor]) -> None:
        """Every tensor of the file is in the model now, and every part of the adapter came from the file."""
        parts = dict(peft.named_parameters(remove_duplicate=False)) | dict(peft.named_buffers(remove_duplicate=False))
        used = {tensor.data_ptr() for tensor in parts.values() if tensor.device.type == "cpu"}
        for key, tensor in weights.items():
            if tensor.data_ptr() not in used:
                raise GRITError(f"cannot export {self.folder}: PEFT has no place for its tensor {key}")
        for name, parameter in peft.named_parameters(remove_duplicate=False):
            if parameter.device.type == "meta":
                key = name.replace(f".{NAME}", "")
                raise GRITError(f"{self.folder} lacks tensor {key}, which its configuration asks for")

    def _changed(self) -> set[str]:
        if self.base.tied:
            self._tie_saved()
        inside = {name: _inner(module) for name, module in self._modules.items()}
        wrappers = tuple(f"{name}." for name, module in self._modules.items() if inside[name] is not module)
        changed = set()
        for name, module in self._modules.items():
            if name.startswith(wrappers):
                if inside[name] is not module and not name.endswith(".token_adapter"):
                    raise GRITError(
                        f"cannot export {self.folder}: PEFT does not merge {name}, one way of training over another "
                        "(two of LoRA, modules_to_save and trainable_token_indices) on the same module"
                    )
                continue
            for key, parameter in inside[name]._parameters.items():
                adapted = inside[name] is not module and (key == "weight" or bool(self.config.get("lora_bias")))
                if parameter is not None and (adapted or not self._is_base(f"{name}.{key}", parameter)):
                    changed.add(f"{name}.{key}")
        both = changed & {EMBEDDING, HEAD}
        if self.base.tied and self.start in REPEATED_STARTS and "lm_head" in self.layers:
            start = self.config["init_lora_weights"]
            raise GRITError(
                f"cannot export {self.folder}: init_lora_weights={start!r} on a tied head changed the embedding"
            )
        if self.rows != self.base.shape(EMBEDDING)[0] and len(both) < 2:
            missing = next(iter({EMBEDDING, HEAD} - both))
            raise GRITError(
                f"wrong-base: {self.folder} has {self.rows} rows in its embedding, but no {missing} of its own"
            )
        if self.base.tied and both and self.config.get("ensure_weight_tying"):
            raise GRITError(f"cannot export {self.folder}: ensure_weight_tying on {min(both)} is not merged")
        return changed

    def _is_base(self, name: str, parameter: Any) -> bool:
        """Whether a parameter is the base's: not in the adapter's file, or saved there without a change."""
        if _is_place(parameter):
            return True
        if self.base.source(name) is None or tuple(parameter.shape) != self.base.shape(name):
            return False
        with self.base.reader() as reader:
            return bool((reader(name) == parameter).all())

    def _tie_saved(self) -> None:
        """An embedding that was saved whole under an adapted one is the head's, too, where the two are one matrix."""
        embedding, head = (_inner(self._modules[name.removesuffix(".weight")]) for name in (EMBEDDING, HEAD))
        saved, other = embedding._parameters["weight"], head._parameters["weight"]
        wrapped = hasattr(self._modules["model.embed_tokens"], "modules_to_save")
        if not _is_place(saved) and _is_place(other) and not wrapped:
            head._parameters["weight"] = saved


def _inner(module: Any) -> Any:
    """The module that holds the base's parameters: the one that PEFT wrapped, or the module itself."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(module, AuxiliaryTrainingWrapper):
        saved = getattr(module, "modules_to_save", None)
        return _inner(saved[NAME]) if saved is not None and NAME in saved else _inner(module.original_module)
    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    return module


def _merge(module: Any) -> Any:
    """The module as PEFT's `merge_and_unload` leaves it."""
    if hasattr(module, "unload_and_optionally_merge_module"):
        return module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    if hasattr(module, "base_layer"):
        module.merge()
        return module.get_base_layer()
    return module


def _is_place(parameter: Any) -> bool:
    """Whether a parameter is the skeleton's: one zero seen in all places."""
    return parameter.numel() > 1 and not any(parameter.stride())


def _line(error: BaseException, lines: int = 1) -> str:
    """An exception's first line or lines in one."""
    return " ".join(part.strip() for part in str(error).strip().splitlines()[:lines]) or type(error).__name__
