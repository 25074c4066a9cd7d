"""GRITConfig: every option checked, every preset what its name says, every complaint names option, value and range."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from grit_impl.config import PRESETS, GRITConfig
from grit_impl.errors import GRITError

WRONG: list[tuple[str, Any, str]] = [
    ("kfac_update_freq", 0, "1 or more"),
    ("kfac_update_freq", 2.5, "int"),
    ("kfac_update_freq", True, "int"),
    ("kfac_update_freq", "5", "int"),
    ("kfac_damping", -1e-3, "0 or more"),
    ("kfac_damping", float("nan"), "0 or more"),
    ("kfac_damping", float("inf"), "0 or more"),
    ("kfac_damping", None, "float"),
    ("damping_mode", "trace", "relative, absolute"),
    ("kfac_min_samples", 0, "1 or more"),
    ("grit_cov_update_freq", 0, "1 or more"),
    ("factor_decay", 1.5, "0 to 1"),
    ("factor_decay", -0.1, "0 to 1"),
    ("pairing", "swapped", "fisher, released"),
    ("renormalise", True, "gradient_norm, none"),
    ("ng_warmup_steps", -1, "0 or more"),
    ("reprojection_freq", -1, "0 or more"),
    ("reprojection_k", 0, "1 or more"),
    ("reprojection_warmup_steps", -1, "0 or more"),
    ("use_two_sided_reprojection", 1, "bool"),
    ("enable_rank_adaptation", "yes", "bool"),
    ("rank_adaptation_threshold", 1.01, "0 to 1"),
    ("rank_adaptation_start_step", -2, "0 or more"),
    ("min_lora_rank", 0, "1 or more"),
    ("lambda_kfac", -1.0, "0 or more"),
    ("lambda_reproj", float("inf"), "0 or more"),
    ("regularizer_warmup_steps", -1, "0 or more"),
    ("log_fisher_spectrum", None, "bool"),
    ("log_top_eigs", -1, "0 or more"),
    ("kfac_inversion_device", "gpu", "cpu, cuda or cuda:N"),
    ("spectral_floor", -0.1, "0 or more"),
    ("update_rule", "adam", "eigenbasis, gram, precondition, spectral, trust_region"),
]


@pytest.mark.parametrize(("name", "value", "accepted"), WRONG, ids=lambda v: str(v))
def test_a_wrong_value_names_option_value_and_range(name: str, value: Any, accepted: str) -> None:
    """The message is one line with all three."""
    with pytest.raises(GRITError) as error:
        GRITConfig(**{name: value})
    message = str(error.value)
    assert name in message
    assert repr(value) in message
    assert accepted in message
    assert "\n" not in message


def test_every_option_is_tried() -> None:
    """The table above forgets none."""
    assert {name for name, _, _ in WRONG} == set(GRITConfig().to_dict())


def test_an_unknown_option_is_refused_with_a_suggestion() -> None:
    """Released configurations hold options of the trainer and the adapter: each is told where it belongs."""
    with pytest.raises(GRITError, match="did you mean kfac_damping"):
        GRITConfig.from_dict({"kfac_dampening": 1e-3})
    with pytest.raises(GRITError, match="training arguments"):
        GRITConfig.from_dict({"learning_rate": 1e-4})
    with pytest.raises(GRITError, match="LoRASettings"):
        GRITConfig.from_dict({"lora_rank": 8})


def test_presets() -> None:
    """The values that the presets' names promise."""
    aggressive, pure = GRITConfig.preset("seed_aggressive"), GRITConfig.preset("seed_pure")
    wanted = {"kfac_update_freq": 5, "reprojection_freq": 40, "kfac_damping": 1e-5, "lambda_kfac": 1e-6}
    assert {**aggressive.to_dict(), **wanted, "kfac_min_samples": 4} == aggressive.to_dict()
    wanted = {"kfac_update_freq": 150, "kfac_min_samples": 64, "kfac_damping": 1e-4, "reprojection_freq": 300}
    assert {**pure.to_dict(), **wanted} == pure.to_dict()
    released = GRITConfig.preset("released_defaults")
    wanted = {"kfac_update_freq": 50, "kfac_min_samples": 64, "kfac_damping": 1e-3, "reprojection_freq": 50}
    assert {**released.to_dict(), **wanted, "damping_mode": "absolute"} == released.to_dict()
    assert GRITConfig.preset("precondition") == GRITConfig()
    assert GRITConfig.preset("recommended") == GRITConfig(update_rule="eigenbasis")
    assert {GRITConfig.preset(name).pairing for name in PRESETS} == {"fisher"}
    assert GRITConfig.preset("seed_pure", pairing="released").pairing == "released"
    with pytest.raises(GRITError, match="choose one of recommended"):
        GRITConfig.preset("best")


def test_options_survive_json() -> None:
    """to_dict and from_dict are inverse through JSON, as a run record stores them."""
    import json

    for name in PRESETS:
        config = GRITConfig.preset(name)
        assert GRITConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_help_names_every_option() -> None:
    """One line each: what it does, its range, its default."""
    lines = GRITConfig.help()
    assert list(lines) == list(GRITConfig().to_dict())
    assert lines["factor_decay"].endswith("[0, 1] (default 0.95)")


def test_the_configuration_needs_no_torch() -> None:
    """Importing it must be quick: the command line and the plugin do."""
    code = "import sys, grit_impl.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
