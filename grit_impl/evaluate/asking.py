"""How a session asks: which questions are read how, how long a server is waited for, how long speed is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grit_impl.errors import GRITError
from grit_impl.evaluate import speed
from grit_impl.evaluate.results import ANSWERED
from grit_impl.evaluate.scoring import AQI_METRICS, find_scorer

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """How to ask.

    Attributes:
        aqi_metric: The primary accuracy: `category`, `exact` or `within5`.
        base: Label of the model that the others are compared with.
        baseline: Label of the fine-tuned model that GRIT is compared with.
        scorer: What reads the answers to the questions, one of `scoring.SCORERS`; `aqi` has several accuracies, of
            which `aqi_metric` is the primary one.
        knowledge_scorer: What reads the answers to knowledge questions.
        knowledge_by: `answer`, or `likelihood`: known is what the model finds likelier than the item's `wrong`.
        num_predict: Token limit of an answer: room to explain. A model that answers tersely ends by itself.
        stop: Strings that end an answer: the next section of the Alpaca format. GSM8K's `#### 12` is none.
        system: System prompt; "" for the model's own.
        think: Whether a thinking model thinks; None: it is asked not to.
        seed: Sent with every request; greedy answers do not depend on it.
        in_flight: Requests at the same time. More than the server's own parallelism gains nothing.
        in_turn: Ask all models a question before the next one, not one model after the other: where the server holds
            all of them, they then answer side by side.
        timeout: Seconds for one request, loading the model included.
        attempts: Tries per item and sweep.
        backoff: Seconds; waits are uniform up to backoff * 2**attempt, at most 8.
        give_up_after: Unanswered items in a row after which the rest is not asked.
        stream: Ask for streamed answers.
        num_thread: Threads of the engine, where the server lets the client choose.
        num_ctx: Context length to load the model with; None for the server's.
        repeats: Answers per model that are asked for once more, to know what the server changes; 0 for none.
        speed_rounds: Speed samples per model; up to eight times as many until the intervals are narrow; 0 for none.
        speed_width: Percent of the base's speed: how narrow (see `speed.Schedule`).
        speed_seconds: Time for speed samples, after which wider intervals do.
        speed_tokens: Tokens per speed sample.
        max_speed_loss: Percent of the base's speed that a model may lose, if that is judged (see `speed.Schedule`).
        progress: Show a progress bar on standard error.
    """

    aqi_metric: str = AQI_METRICS[0]
    base: str = "base"
    baseline: str = "baseline"
    scorer: str = "aqi"
    knowledge_scorer: str = "contains-as-answer"
    knowledge_by: str = "answer"
    num_predict: int = 160
    stop: tuple[str, ...] = ("### Instruction", "### Input", "### Response")
    system: str = ""
    think: bool | None = None
    seed: int = 0
    in_flight: int = 2
    in_turn: bool = False
    timeout: float = 120.0
    attempts: int = 6
    backoff: float = 0.25
    give_up_after: int = 20
    stream: bool = False
    num_thread: int | None = None
    num_ctx: int | None = None
    repeats: int = 20
    speed_rounds: int = 30
    speed_width: float = 4.0
    speed_seconds: float = 300.0
    speed_tokens: int = 64
    max_speed_loss: float | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if self.aqi_metric not in AQI_METRICS:
            raise GRITError(f"unknown AQI metric {self.aqi_metric!r}: use {', '.join(AQI_METRICS)}")
        for name in (self.scorer, self.knowledge_scorer):
            find_scorer(name)
        if self.knowledge_by not in ("answer", "likelihood"):
            raise GRITError(f"unknown knowledge_by {self.knowledge_by!r}: use answer or likelihood")
        if min(self.num_predict, self.in_flight, self.attempts, self.give_up_after) < 1:
            raise GRITError("num_predict, in_flight, attempts and give_up_after must be at least 1")
        if min(self.speed_rounds, self.repeats) < 0 or self.speed_tokens < 2:
            raise GRITError("speed_rounds and repeats must not be negative, speed_tokens at least 2")
        if min(self.timeout, self.speed_width) <= 0:
            raise GRITError("timeout and speed_width must be positive")

    @property
    def schedule(self) -> speed.Schedule:
        """When measuring speed ends."""
        return speed.Schedule(self.speed_rounds, self.speed_width, self.speed_seconds, self.max_speed_loss)

    def engine(self) -> Row:
        """Ollama options that every request has."""
        given = {"num_thread": self.num_thread, "num_ctx": self.num_ctx}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def metric(self) -> str:
        """The primary accuracy: of an index that of `aqi_metric`, of any other task the only one."""
        return self.aqi_metric if self.scorer == "aqi" else ANSWERED

    def fields(self) -> Row:
        """What a request has beside the prompt and Ollama's options."""
        given = {"system": self.system or None, "think": self.think}
        return {name: value for name, value in given.items() if value is not None}

    def greedy(self) -> Row:
        """Ollama options of a question. The repeat penalty is explicit because old servers default to 1.1."""
        return {
            "temperature": 0.0,
            "repeat_penalty": 1.0,
            "seed": self.seed,
            "num_predict": self.num_predict,
            "stop": list(self.stop),
            **self.engine(),
        }
