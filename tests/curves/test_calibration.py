"""The recorded calibration meets its limits and comes out of this code again."""

from __future__ import annotations

import json

import pytest

from grit_impl.curves import calibration
from grit_impl.curves import noise as curves
from grit_impl.curves.calibration_runs import EVALUATION_SEEDS, OPTIMIZERS, TUNING_SEEDS
from grit_impl.curves.compare import compare_logs
from grit_impl.errors import GRITError


@pytest.fixture(scope="module")
def recorded() -> dict[str, dict[str, dict[str, float]]]:
    """fixtures/curves_calibration.json."""
    loaded: dict[str, dict[str, dict[str, float]]] = json.loads(calibration.RESULT.read_text())
    return loaded


def test_recorded_rates_meet_the_limits(recorded: dict[str, dict[str, dict[str, float]]]) -> None:
    """Oracle: the limits set before any result was seen, for the constants in use now."""
    fixed = {"window": curves.WINDOW, "margin": curves.MARGIN, "alpha": curves.ALPHA}
    assert recorded["fixed beforehand"] == fixed
    assert not set(EVALUATION_SEEDS) & set(TUNING_SEEDS)
    null = recorded["simulated null pairs"]["different"]
    assert null["n"] >= 1000
    assert null["share"] <= 0.01
    assert len(OPTIMIZERS) >= 6
    assert len(EVALUATION_SEEDS) >= 5
    for row in recorded["different optimizers"].values():
        assert row["different"]["share"] >= 0.95  # type: ignore[index]
    covered = recorded["independent AR(1), interval covers zero"]
    assert float(max(covered, key=float)) == 0.9
    assert all(0.93 <= row["share"] <= 0.97 for row in covered.values())


@pytest.mark.parametrize("reruns", [0, 1, 3])
def test_real_optimizers_are_told_apart_again(recorded: dict[str, dict[str, dict[str, float]]], reruns: int) -> None:
    """Oracle: the recorded verdicts of all 105 pairs, judged again from the recorded curves."""
    again = calibration.different_verdicts(calibration.Runs.load(), EVALUATION_SEEDS, reruns)
    name = f"{reruns or 'bit-identical'} rerun{'s' * (reruns > 1)}"
    assert again == recorded["different optimizers"][name]["cases"]


@pytest.mark.parametrize("noise", list(calibration.NOISES))
def test_fresh_null_pairs_are_not_called_different(noise: str) -> None:
    """Oracle: 20 pairs per kind of noise and number of reruns from seeds that were never used; at most one error."""
    verdicts = [
        compare_logs(a, b, again).verdict
        for reruns in (1, 3)
        for a, b, again in calibration.null_pairs(noise, reruns, 20, seed=30)
    ]
    assert verdicts.count("different") <= 1


def test_fresh_coverage() -> None:
    """Oracle: 400 pairs of independent AR(1) series with phi = .9: 95% +- 3.3 (three standard errors)."""
    assert 0.917 <= calibration.coverage(0.9, 400, seed=30) / 400 <= 0.983


def test_a_damaged_fixture_is_named(tmp_path: object) -> None:
    """Oracle: a file that is no npz."""
    path = calibration.RUNS.__class__(str(tmp_path)) / "runs.npz"
    path.write_bytes(b"no")
    with pytest.raises(GRITError, match="--runs"):
        calibration.Runs.load(path)


@pytest.mark.slow
def test_a_run_is_trained_again() -> None:
    """Oracle: the recorded curve of one optimizer, to what another CPU's float32 may drift early in training."""
    import numpy as np

    from grit_impl.curves import calibration_runs

    base = calibration_runs._base()
    fresh = calibration_runs.train(base, "adamw", 1, order=10_001, init=20_001, noise=None)
    np.testing.assert_allclose(fresh[0, :10], calibration.Runs.load().get("adamw", 1).loss[:10], rtol=1e-3)
