"""What a verification can be told: one table, from which the pytest plugin and the command line make their options."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from grit_impl.errors import GRITError
from grit_impl.evaluate.scoring import AQI_METRICS

PLAN_ARMS = ("baseline", "hybrid", "pure")
"""The arms that are exported and evaluated, next to the base model itself."""
PLAN_MODELS = ("base", *PLAN_ARMS)


def number(text: str) -> float:
    """A finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def positive(text: str) -> float:
    """A number above 0."""
    if (value := number(text)) <= 0:
        raise ValueError(text)
    return value


def percentage(text: str) -> float:
    """A number between 0 and 100; a trailing % is allowed."""
    value = number(text.removesuffix("%"))
    if not 0 <= value <= 100:
        raise ValueError(text)
    return value


def count(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def whole(text: str) -> int:
    """A whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise ValueError(text)
    return value


def seed(text: str) -> int:
    """A whole number that every random generator takes."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise ValueError(text)
    return value


def metric(text: str) -> str:
    """A way to score an AQI answer."""
    if text not in AQI_METRICS:
        raise ValueError(text)
    return text


def url(text: str) -> str:
    """An http(s) address; `localhost:11434` is taken as http."""
    if not text:
        return ""
    address = text if "://" in text else f"http://{text}"
    parts = urlparse(address)
    _ = parts.port
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(text)
    return address.rstrip("/")


REPORTS = Path("reports")

EXPECTED = {
    number: "a number",
    percentage: "a percentage between 0 and 100",
    positive: "a number above 0",
    count: "a whole number of at least 1",
    whole: "a whole number of at least 0",
    seed: "a whole number between 0 and 4294967295",
    metric: "category, exact or within5",
    url: "an http address such as http://localhost:11434",
}


def _option(default: Any, help: str, parse: Callable[[str], Any] = str) -> Any:
    return field(default=default, metadata={"help": help, "parse": parse})


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a verification; `--min-delta-aqi` on the command line is `min_delta_aqi` here."""

    base_model: str = _option("tiny", "base model: tiny, a folder, a hub id, or random:llama-1b")
    reports_dir: Path = _option(REPORTS, "folder of run records and reports", Path)  # noqa: RUF009 (Path is immutable)
    seed: int = _option(3407, "seed of every arm", seed)
    seeds: int = _option(1, "train every arm of the plan with so many seeds, from --seed on; 6 decide", count)
    steps: int = _option(200, "optimizer steps of every arm", count)
    jobs: int = _option(0, "arms that train at the same time, spread over the GPUs; 0: two, and one on a GPU", whole)
    cost_seconds: float = _option(90.0, "on a GPU: seconds of steps with and without GRIT, per length", positive)
    reuse_runs: bool = _option(False, "judge the runs that exist; train, export and evaluate nothing")
    ollama_url: str = _option("", "Ollama to evaluate with; empty: OLLAMA_HOST, else the embedded server", url)
    aqi_metric: str = _option("category", "primary AQI accuracy: category, exact or within5", metric)
    aqi_dataset: str = _option("", "AQI questions: JSONL, CSV, parquet or hub id; empty: the frozen set")
    features_field: str = _option("features", "column of the AQI questions in --aqi-dataset")
    answer_field: str = _option("", "column of their answers; empty: aqi_value")
    allow_overlap: bool = _option(False, "keep questions of --aqi-dataset that occur in the training data")
    min_delta_aqi: float = _option(0.0, "delta_AQI over the base must exceed this many points", number)
    min_fine_tuning_gain: float = _option(20.0, "points that LoRA must gain over the base on AQI", number)
    min_delta_over_baseline: float = _option(0.0, "points by which GRIT must beat LoRA on AQI (hypothesis)", number)
    max_speed_loss: float = _option(10.0, "percent of the base's tokens/s that a model may lose", percentage)
    min_retention: float = _option(70.0, "percent of the base's knowledge that must be kept", percentage)
    strict_claims: bool = _option(False, "a gating claim that is inconclusive or not exercised fails")
    gate_hypotheses: bool = _option(False, "hypotheses gate too")
    require_gpu: bool = _option(False, "fail unless at least one test marked gpu ran")

    @classmethod
    def parse(cls, texts: Mapping[str, Any]) -> Options:
        """Options from texts as they were typed; None or a missing name stands for the default.

        Raises:
            GRITError: a text that is not what the option expects.
        """
        values: dict[str, Any] = {}
        for each in fields(cls):
            text = texts.get(each.name)
            if text is None:
                continue
            if isinstance(each.default, bool):
                values[each.name] = bool(text)
                continue
            parse = each.metadata["parse"]
            try:
                values[each.name] = parse(str(text).strip())
            except ValueError:
                expected = EXPECTED.get(parse, "a value")
                raise GRITError(f"{flag(each.name)} takes {expected}, not {str(text)!r}") from None
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON values."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


def flag(name: str) -> str:
    """`min_delta_aqi` -> `--min-delta-aqi`."""
    return "--" + name.replace("_", "-")
