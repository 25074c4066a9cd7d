"""What a verification can be told: one table, from which the pytest plugin, its ini keys and docs/claims.md are made.

Thresholds and questions stand in `evaluate/options.py`, because `grit evaluate` takes them, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grit_impl import settings
from grit_impl.errors import GRITError
from grit_impl.evaluate.options import Questions, Thresholds
from grit_impl.machine import has_gpu
from grit_impl.recipes.arms import default_training
from grit_impl.recipes.bases import find_base
from grit_impl.settings import count, count_or_nothing, points, positive, seed, setting, whole

PLAN_ARMS = ("baseline", "hybrid", "pure")
"""The arms that are exported and evaluated, next to the base model itself."""
PLAN_MODELS = ("base", *PLAN_ARMS)
RECOMMENDED = "recommended"
"""The arm beside them: the rule, learning rate and betas that the evidence is for, where the base is one of those."""
MODELS = (*PLAN_MODELS, RECOMMENDED)
REPORTS = Path("reports")


def url(text: str) -> str:
    """an http address such as http://localhost:11434"""
    if not text:  # as in other people's projects, which may lack the packages of the evaluation
        return text
    from grit_impl.serve.connection import find_server

    try:
        server = find_server(text)
    except GRITError:
        raise ValueError(text) from None
    # Without user and password it could not be asked.
    return text if server.auth else server.url


@dataclass(frozen=True)
class RunOptions:
    """What is trained, where its records lie, and what it is evaluated with."""

    base_model: str = setting("tiny", "base model: tiny, smollm2, a folder, a .gguf file, a hub id, random:llama-1b")
    reports_dir: Path = setting(REPORTS, "folder of run records and reports", Path)  # noqa: RUF009 (Path is immutable)
    seed: int = setting(3407, "seed of every arm", seed)
    seeds: int = setting(1, "train every arm of the plan with so many seeds, from --seed on; 6 decide", count)
    steps: int = setting(None, "optimizer steps of every arm; empty: the base's own, mostly 200", count_or_nothing)
    limit: int | None = setting(
        None, "questions of each kind at most; empty: the base's own, mostly all", count_or_nothing
    )
    jobs: int = setting(0, "arms that train at the same time, spread over the GPUs; 0: two, and one on a GPU", whole)
    cost_seconds: float = setting(90.0, "on a GPU: seconds of steps with and without GRIT, per length", positive)
    reuse_runs: bool = setting(False, "judge the runs that exist; train, export and evaluate nothing")
    ollama_url: str = setting("", "Ollama to evaluate with; empty: OLLAMA_HOST, else the embedded server", url)


@dataclass(frozen=True)
class Options(Thresholds, Questions, RunOptions):
    """The options of a verification; `--min-delta-aqi` on the command line is `min_delta_aqi` here."""

    min_fine_tuning_gain: float = setting(20.0, "points that LoRA must gain over the base on AQI", points)
    strict_claims: bool = setting(False, "a gating claim that is inconclusive or not exercised fails")
    gate_hypotheses: bool = setting(False, "hypotheses gate too")
    require_gpu: bool = setting(False, "fail unless at least one test marked gpu ran")

    def __post_init__(self) -> None:
        if not self.steps:  # None, as it was declared
            own = default_training(self.base_model, cuda=has_gpu()).steps
            object.__setattr__(self, "steps", own)
        if self.limit is None and not has_gpu():
            object.__setattr__(self, "limit", find_base(self.base_model).questions_on_cpu)

    @classmethod
    def parse(cls, texts: Mapping[str, Any]) -> Options:
        """Options from texts as they were typed; None or a missing name stands for the default.

        Raises:
            GRITError: a text that is not what the option expects.
        """
        return settings.parse(cls, texts)

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON values."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}
