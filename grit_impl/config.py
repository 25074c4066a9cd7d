"""GRIT's hyperparameters: validated, with the released code's names and named presets."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from grit_impl.errors import GRITError
from grit_impl.notebook import card

UPDATE_RULES: dict[str, Any] = {}
"""Classes by name, once their modules are imported; `grit_impl.method.rules.base.rule` registers them."""


@cache
def _declared_rules() -> frozenset[str]:
    """Names read off the source, because importing a rule imports torch."""
    sources = [path.read_text(encoding="utf-8") for path in (Path(__file__).parent / "method" / "rules").glob("*.py")]
    return frozenset(re.findall(r'^@rule\("(\w+)"\)', "\n".join(sources), re.MULTILINE))


def update_rules() -> list[str]:
    """Names of all update rules."""
    return sorted({*_declared_rules(), *UPDATE_RULES})


def _option(
    default: Any,
    help: str,
    low: float | None = None,
    high: float | None = None,
    choices: Callable[[], list[str]] | None = None,
    rule: str | None = None,
) -> Any:
    """An option: what it accepts, and the update rule that alone reads it."""
    about = {"help": help, "low": low, "high": high, "choices": choices, "rule": rule}
    return field(default=default, metadata=about)


# Options of the released code that are not GRIT's: where a user finds them here.
_ELSEWHERE = {
    **dict.fromkeys(
        (
            *("batch_size", "gradient_accumulation_steps", "num_epochs", "learning_rate", "precision", "num_workers"),
            *("pin_memory", "drop_last", "max_length", "max_grad_norm", "device"),
        ),
        "it belongs to the training arguments",
    ),
    **dict.fromkeys(
        ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules"),
        "it belongs to LoRASettings (recipes/lora.py)",
    ),
    **dict.fromkeys(("model_id", "model_name"), "it is the base model, --base-model"),
    "dataset_name": "it is the data set, --dataset",
    **dict.fromkeys(
        ("log_eig_heatmaps", "log_eigs_bar", "log_eig_heatmaps_modules"), "the report draws the spectra of every run"
    ),
}


@dataclass(frozen=True)
class GRITConfig:
    """Every option of GRIT.

    Options that the released code has keep its names and, in `preset("released_defaults")`, its values. A wrong
    value raises `GRITError` with the option, the value and the accepted range.
    """

    update_rule: str = _option(
        "precondition",
        "precondition: K-FAC's gradient, then the inner optimizer; eigenbasis: Adam in the factors' eigenbasis; "
        "gram: Adam in the eigenbasis of the gradients' own Gram; trust_region: natural gradient, its length lr in the "
        "rule's own metric; spectral: whitened spectral step (experimental); all but the first in AdamW's place",
        choices=update_rules,
    )
    kfac_update_freq: int = _option(
        10, "optimizer steps between two inversions of the factors, or refreshes of the basis", 1
    )
    kfac_damping: float = _option(1e-2, "damping; a fraction of trace(S)/r, or absolute (see damping_mode)", 0.0)
    damping_mode: Literal["relative", "absolute"] = _option(
        "relative", "relative: d = kfac_damping * trace(S) / r; absolute: d = kfac_damping"
    )
    kfac_min_samples: int = _option(64, "real tokens a factor needs before it is inverted", 1)
    grit_cov_update_freq: int = _option(1, "optimizer steps between two collections of statistics", 1)
    factor_decay: float = _option(0.95, "weight of the past in the exponential average, per optimizer step", 0.0, 1.0)
    pairing: Literal["fisher", "released"] = _option(
        "fisher",
        "fisher: (S_g+d)^-1 dA, dB (S_a+d)^-1; released: the published code's swapped factors",
        rule="precondition",
    )
    renormalise: Literal["gradient_norm", "none"] = _option(
        "gradient_norm",
        "gradient_norm: a preconditioned gradient keeps its raw norm, so that the learning rate does too",
    )
    ng_warmup_steps: int = _option(0, "optimizer steps before the first preconditioned gradient", 0)
    reprojection_freq: int = _option(0, "optimizer steps between reprojections; 0: never", 0)
    reprojection_k: int | None = _option(None, "directions a reprojection keeps without rank adaptation; None: all", 1)
    reprojection_warmup_steps: int = _option(0, "optimizer steps before the first reprojection", 0)
    use_two_sided_reprojection: bool = _option(False, "project B on S_g's directions instead of S_a's")
    enable_rank_adaptation: bool = _option(False, "let the spectrum decide how many directions a reprojection keeps")
    rank_adaptation_threshold: float = _option(0.99, "cumulative energy that the kept directions hold", 0.0, 1.0)
    rank_adaptation_start_step: int = _option(0, "optimizer steps before ranks may shrink", 0)
    min_lora_rank: int = _option(4, "rank adaptation never goes below", 1)
    lambda_kfac: float = _option(0.0, "weight of tr(A' S_g A) + tr(B S_a B')", 0.0)
    lambda_reproj: float = _option(0.0, "weight of |(I-P)A|^2 + |B(I-P)|^2, P from the last reprojection", 0.0)
    regularizer_warmup_steps: int = _option(0, "optimizer steps over which both weights rise linearly", 0)
    log_fisher_spectrum: bool = _option(True, "keep the factors' spectra at every inversion")
    log_top_eigs: int = _option(8, "eigenvalues kept per factor", 0)
    spectral_floor: float = _option(
        1e-2, "share of a factor's energy that the other's Gram is lifted by before it whitens", 0.0, rule="spectral"
    )
    kfac_inversion_device: str | None = _option(None, "device of the inversion; None: where the factors are")

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in dataclasses.fields(self):
            value, about = getattr(self, f.name), f.metadata
            choices = about["choices"]() if about["choices"] else [c for c in get_args(hints[f.name]) if type(c) is str]
            _check(f.name, value, hints[f.name], choices, about["low"], about["high"])
            if about["rule"] not in (None, self.update_rule) and value != f.default:
                raise GRITError(f"update_rule = {self.update_rule!r} and {f.name} = {value!r} exclude each other")
        if self.reprojection_k is not None and self.enable_rank_adaptation:
            raise GRITError("reprojection_k and enable_rank_adaptation both choose the rank: set one of them")
        if self.kfac_inversion_device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", self.kfac_inversion_device):
            raise GRITError(f"kfac_inversion_device = {self.kfac_inversion_device!r}: choose cpu, cuda or cuda:N")

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> GRITConfig:
        """Build from a mapping; an unknown name is refused with the nearest known one.

        Raises:
            GRITError: an option is unknown, belongs elsewhere, or has a value outside its range.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name in _ELSEWHERE:
                raise GRITError(f"{name} is no option of GRITConfig: {_ELSEWHERE[name]}")
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                raise GRITError(f"GRITConfig has no option {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
        return cls(**options)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> GRITConfig:
        """A preset by name, with single options replaced.

        Raises:
            GRITError: the preset is unknown, or an override is wrong.
        """
        if name not in PRESETS:
            raise GRITError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
        return cls.from_dict({**PRESETS[name], **overrides})

    def to_dict(self) -> dict[str, Any]:
        """All options as JSON values."""
        return dataclasses.asdict(self)

    def _repr_html_(self) -> str:
        """For a notebook: the rule, and each option with what it does; those that were changed first."""
        defaults, about = type(self)(), self.help()
        changed = [name for name, value in self.to_dict().items() if value != getattr(defaults, name)]
        names = [*changed, *(name for name in about if name not in changed)]
        rows = [(name, getattr(self, name), "" if name in changed else "default", about[name]) for name in names]
        return card(f"GRIT: {self.update_rule}", "", ("option", "value", "", "what it is"), rows, good=True)

    @classmethod
    def help(cls) -> dict[str, str]:
        """One line per option: what it does, its range and its default."""
        lines = {}
        for f in dataclasses.fields(cls):
            low, high = f.metadata["low"], f.metadata["high"]
            span = "" if low is None else f" [{low:g}, {'inf' if high is None else f'{high:g}'}]"
            lines[f.name] = f"{f.metadata['help']}{span} (default {f.default})"
        return lines


# recommended: the rule that docs/measurements/grit-vs-lora.md found best; it is the optimizer, so a callback needs
# optim="sgd". precondition: K-FAC's gradient, at its old norm, for whatever optimizer there is. released_*: what the
# authors' code and its examples set, with absolute damping: the published method. seed_*: the experiment that started
# this project. reprojection_k = 8 of the released defaults is left out: there it cut ranks even with adaptation off.
_RELEASED: dict[str, Any] = {
    "kfac_update_freq": 50,
    "kfac_damping": 1e-3,
    "damping_mode": "absolute",
    "kfac_min_samples": 64,
    "grit_cov_update_freq": 15,
    "renormalise": "none",
    "reprojection_freq": 50,
    "use_two_sided_reprojection": True,
    "enable_rank_adaptation": True,
    "rank_adaptation_threshold": 0.99,
    "min_lora_rank": 4,
    "lambda_kfac": 1e-5,
    "lambda_reproj": 1e-4,
}
_SEED = {**_RELEASED, "grit_cov_update_freq": 1, "enable_rank_adaptation": False, "lambda_reproj": 1e-5}
PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {"update_rule": "eigenbasis"},
    "precondition": {},
    "released_defaults": _RELEASED,
    "seed_aggressive": {
        **_SEED,
        "kfac_update_freq": 5,
        "reprojection_freq": 40,
        "kfac_damping": 1e-5,
        "lambda_kfac": 1e-6,
        "kfac_min_samples": 4,
    },
    "seed_pure": {
        **_SEED,
        "kfac_update_freq": 150,
        "kfac_min_samples": 64,
        "kfac_damping": 1e-4,
        "reprojection_freq": 300,
    },
}


@dataclass(frozen=True, slots=True)
class Tuned:
    """A training option that a preset's evidence was won with.

    Attributes:
        value: What it was.
        source: Where that is written, and what it was chosen from.
    """

    value: float | int | str
    source: str


_EIGHT = "docs/measurements/grit-vs-lora.md, section 7, `Chosen by tuning`: best of eight trials"
_FIXED = "docs/measurements/grit-vs-lora.md, section 1: the same in every trial"
_SCHEDULE = {
    "lr_scheduler_type": Tuned("linear", _FIXED),
    "weight_decay": Tuned(0.01, _FIXED),
    "max_grad_norm": Tuned(1.0, _FIXED),
}
TUNED: dict[str, dict[str, dict[str, Tuned]]] = {
    "recommended": {
        "tiny": {
            "learning_rate": Tuned(7.3e-3, f"{_EIGHT}, on all four tasks"),
            "adam_beta1": Tuned(0.8, f"{_EIGHT}, on all four tasks"),
            "adam_beta2": Tuned(0.95, f"{_EIGHT}, on all four tasks"),
            "warmup_steps": Tuned(5, f"{_EIGHT}, on all four tasks"),
            **_SCHEDULE,
        },
        "40m": {
            "learning_rate": Tuned(1.8e-3, f"{_EIGHT}, on aqi; 2.7e-3 on convert"),
            "adam_beta1": Tuned(0.8, f"{_EIGHT}, on aqi; 0.9 on convert"),
            "adam_beta2": Tuned(0.95, f"{_EIGHT}, on aqi; 0.999 on convert"),
            "warmup_steps": Tuned(5, f"{_EIGHT}, on aqi; 20 on convert"),
            **_SCHEDULE,
        },
    }
}
"""By preset and base: what the preset won with there, under the names of `transformers.TrainingArguments`."""


def preset_training(preset: str, base: str) -> dict[str, Any]:
    """What a preset was tuned with on a base; nothing where it was tuned on neither.

    Raises:
        GRITError: the preset is unknown.
    """
    if preset not in PRESETS:
        raise GRITError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    return {name: tuned.value for name, tuned in TUNED.get(preset, {}).get(base, {}).items()}


def training_arguments(preset: str, base: str) -> dict[str, Any]:
    """What a preset won with on a base, for `transformers.TrainingArguments(**training_arguments(...))`.

    Args:
        preset: Name of a preset.
        base: A base that the preset was tuned on: `tiny` (1.9 million parameters), `40m` (39 million).

    Raises:
        GRITError: the preset is unknown, or was not tuned on this base: a learning rate that was guessed may lose
            more than the rule gains.
    """
    if not (found := preset_training(preset, base)):
        bases = ", ".join(TUNED.get(preset, {})) or "no base"
        raise GRITError(
            f"preset {preset!r} was tuned on {bases}, not on {base!r}: choose the learning rate of your base by trials "
            "(grit sweep), the same number for plain LoRA"
        )
    return found


def _check(name: str, value: Any, hint: Any, choices: list[str], low: float | None, high: float | None) -> None:
    """Refuse a value of the wrong type, none of the choices, or outside [low, high]."""
    if value is None and type(None) in get_args(hint):
        return
    if choices:
        if value not in choices:
            raise GRITError(f"{name} = {value!r}: choose one of {', '.join(choices)}")
        return
    kinds = [c for c in (get_args(hint) or (hint,)) if c is not type(None)]
    kind = kinds[0]
    # bool is an int in Python, but `kfac_update_freq=True` is a mistake.
    good = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not good or (isinstance(value, bool) and kind is not bool):
        raise GRITError(f"{name} = {value!r}: expected {kind.__name__}")
    if low is not None and not (low <= value <= (math.inf if high is None else high) and math.isfinite(value)):
        span = f"{low:g} or more" if high is None else f"{low:g} to {high:g}"
        raise GRITError(f"{name} = {value!r}: accepted are values from {span}")
