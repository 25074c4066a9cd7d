"""Proof that an exported file is the trained model, in three parts that fail for different reasons.

1. *The file is right*: every key and tensor, against what PEFT's own merge gives (`audit.py`).
2. *llama.cpp reads it right*: transformers is given the file's own numbers, llama.cpp generates greedily, and the two
   distributions are compared at every token it said. How far two right programs are apart is measured (`floor.py`).
3. *What rounding costs*: the trained model against the file's numbers. Told, and judged only by limits that are given.

Generated texts are not compared: after one near-tie they part.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from grit_impl.errors import GRITError
from grit_impl.export import audit, engine
from grit_impl.export.adapter import NAME, Adapter
from grit_impl.export.checkpoint import EMBEDDING, Checkpoint
from grit_impl.export.engine import PROMPTS
from grit_impl.export.findings import MODES, Finding, from_load_error
from grit_impl.export.floor import Branch, as_llama_cpp, branches, in_double
from grit_impl.export.reference import Reference
from grit_impl.export.vocabulary import Vocabulary, read_vocabulary
from grit_impl.gguf.architecture import gguf_name, rotary_heads, unpermute
from grit_impl.gguf.encoding import check_same_base
from grit_impl.gguf.gotemplate import Template, TemplateError
from grit_impl.gguf.llamacpp import LlamaCpp
from grit_impl.gguf.modelfile import read_modelfile
from grit_impl.gguf.tensors import Weights

if TYPE_CHECKING:
    import torch

# All prompts are cut into tokens. Of more than so many, as many of at most so many tokens are continued, evenly spread.
CONTINUED, SHORT = 8, 40
# Tokens below a probability of one in a million are left out of the maximum: no sampler ever picks them, and a maximum
# over ten thousand of them measures their number.
FLOOR = -14.0
# How many times the measured floor an answer may be off. Measured over the right and wrong exports of
# docs/measurements/testing.md.
DIFFERENCE, DIVERGENCE = 4.0, 4.0
# Below these nothing is told apart: llama.cpp reports float32 logarithms.
LEAST_DIFFERENCE, LEAST_DIVERGENCE = 2e-5, 1e-10

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Limits:
    """Largest difference of a log-probability, and mean Kullback-Leibler divergence in nats per token."""

    difference: float
    kl: float


@dataclass
class Verification:
    """What was compared and found. `passed` means that there is no finding.

    `exact` of `tensors` are equal to the bit to PEFT's merge, rounded to their number type. `max_difference` and
    `mean_kl` are between llama.cpp and transformers on the file's own numbers, `floor` what right programs differ by on
    this model, `limits` what was allowed. `cost_kl` and `agreement` are between the trained model and the file's
    numbers: nats per token, and the share of positions with the same most likely token.
    """

    dtype: str
    prompts: int
    tensors: int = 0
    exact: int = 0
    positions: int = 0
    max_difference: float = math.nan
    mean_kl: float = math.nan
    floor: Limits = field(default_factory=lambda: Limits(math.nan, math.nan))
    limits: Limits = field(default_factory=lambda: Limits(math.nan, math.nan))
    cost_kl: float = math.nan
    agreement: float = math.nan
    adapter_kl: float | None = None
    merge_difference: float | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether the file is the trained model within its type's rounding."""
        return not self.findings

    def summary(self) -> str:
        """One line."""
        numbers = (
            f"{self.exact} of {self.tensors} tensors equal PEFT's merge to the bit; llama.cpp within "
            f"{self.max_difference:.2g} (limit {self.limits.difference:.2g}), KL {self.mean_kl:.2g} "
            f"(limit {self.limits.kl:.2g}) over {self.positions} positions; rounding costs KL {self.cost_kl:.2g}, "
            f"top-1 agreement {self.agreement:.1%}"
        )
        return (
            f"{self.dtype}: {numbers}"
            if self.passed
            else f"{self.dtype}: {'; '.join(map(str, self.findings))}; {numbers}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For a run record."""
        return {**asdict(self), "passed": self.passed, "summary": self.summary()}


@contextlib.contextmanager
def _half_of_the_cores() -> Iterator[None]:
    """On a busy machine torch's threads wait for each other: two on two cores took two to five times as long as one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(min(before, max(1, (os.cpu_count() or 2) // 2)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_half_of_the_cores()
def verify_export(
    base: Path | str,
    adapter: Path | str | None,
    gguf: Path | str,
    *,
    gguf_adapter: Path | str | None = None,
    modelfile: Path | str | None = None,
    training_format: str | None = None,
    four_bit: bool | None = None,
    sixteen_bit_base: bool = False,
    max_kl: float | None = None,
    min_agreement: float | None = None,
    prompts: tuple[str, ...] = PROMPTS,
    tokens: int = 8,
    device: str = "cpu",
    dtype: str = "float32",
    progress: Progress = lambda done, total, what: None,
) -> Verification:
    """Compare an exported model with the trained one.

    Args:
        base: Folder of the Hugging Face base.
        adapter: PEFT folder, or None.
        gguf: The merged model; with `gguf_adapter`, the base that the adapter is applied to.
        gguf_adapter: The adapter as GGUF.
        modelfile: Its TEMPLATE and stop tokens are checked, too.
        training_format: The prompt format of training, with `{instruction}`; None: the chat template of training's
            tokenizer, or the Alpaca format where there is none.
        four_bit: Whether the adapter was trained on NF4 weights. None: only if the base is stored so.
        sixteen_bit_base: The QLoRA adapter was merged into 16-bit weights on purpose: the difference from the trained
            model is measured (`merge_difference`), not judged.
        max_kl: Most that rounding may cost, in nats per token; None: told, not judged.
        min_agreement: Smallest share of positions with the same most likely token; None: told, not judged.
        prompts: Texts to start from.
        tokens: Tokens to generate for each prompt that is continued.
        device: Where transformers computes.
        dtype: In what.
        progress: Called with (steps done, steps in all, what is being done).

    Returns:
        The numbers, and a named finding for everything that is wrong.

    Raises:
        GRITError: the inputs are not what they should be (no file, no model).
    """
    model = Checkpoint(base)
    model.check()
    lora = Adapter(adapter, model) if adapter is not None else None
    weights = Weights(gguf, arrays=True)
    rows = lora.rows if lora is not None else model.shape(EMBEDDING)[0]
    vocabulary = read_vocabulary(
        model, rows, lora.folder if lora else None, retrained=lora is not None and EMBEDDING in lora.changed
    )
    quantized = bool(four_bit) and not model.four_bit
    result = Verification(dtype=audit.file_dtype(weights), prompts=len(prompts))
    if modelfile is not None:
        result.findings += check_modelfile(Path(modelfile), vocabulary, training_format)
    sha256 = lora.sha256 if lora is not None else None
    for finding in audit.audit_metadata(model, vocabulary, rows, weights, None if gguf_adapter else sha256):
        _add(result, finding)
    trained = Reference(
        model,
        lora.folder if lora else None,
        # With a 16-bit merge the file is right if it is base16 + adapter; how far that is from training is reported.
        four_bit=quantized and not sixteen_bit_base,
        device=device,
        dtype=dtype,
    )
    progress(1, 5, "llama.cpp answers")
    answers = _answers(result, trained, vocabulary, weights.path, gguf_adapter, prompts, tokens)
    if answers is None:
        return result
    progress(2, 5, "the trained model answers")
    wanted = _said(trained, answers)
    if trained.adapted:
        with trained.without_adapter():
            # Whether it does anything is seen on a few.
            _judge_adapter(result, wanted, _said(trained, [answer for answer in answers if answer.steps][:3]))
    if quantized and sixteen_bit_base and lora is not None:
        nf4 = _said(Reference(model, lora.folder, four_bit=True, device=device, dtype=dtype), answers)
        result.merge_difference = max(float((one - other).abs().max()) for one, other in zip(wanted, nf4, strict=True))
    progress(3, 5, "every tensor is compared")
    apart = _compare_tensors(result, trained, model, lora, weights, gguf_adapter)
    progress(4, 5, "transformers answers with the file's numbers")
    _compare_answers(result, trained, weights, apart, answers, wanted)
    if max_kl is not None and not result.cost_kl <= max_kl:
        _add(result, Finding("rounding", f"rounding costs a KL of {result.cost_kl:.2g}, {max_kl:g} is allowed"))
    if min_agreement is not None and not result.agreement >= min_agreement:
        detail = f"the most likely token is the same at {result.agreement:.1%} of positions, not {min_agreement:.1%}"
        _add(result, Finding("rounding", detail))
    progress(5, 5, "done")
    return result


def check_modelfile(path: Path, vocabulary: Vocabulary, training_format: str | None = None) -> list[Finding]:
    """Whether a Modelfile serves the training format and stops where the model ends."""
    spec = read_modelfile(path)
    found = []
    if spec.template is None:
        # Where the format cannot be said in Go's language, the file's own template is what there is.
        if vocabulary.template is not None:
            found.append(Finding("chat-template", f"{path.name} has no TEMPLATE, so Ollama guesses one"))
    else:
        question = "What is 2 + 2?\n  Answer briefly."
        messages = [{"role": "user", "content": question}]
        try:
            rendered = Template(spec.template).render(messages)
            expected = (
                training_format.replace("{instruction}", question) if training_format is not None
                else Template(vocabulary.template).render(messages) if vocabulary.template is not None
                else rendered
            )  # fmt: skip
            if rendered != expected:
                found.append(Finding("chat-template", f"TEMPLATE of {path.name} renders {rendered[:80]!r}"))
        except TemplateError as error:
            found.append(Finding("chat-template", f"TEMPLATE of {path.name} does not parse: {error}"))
    stops = spec.parameters.get("stop", [])
    if missing := [s for s in vocabulary.stops if s not in stops]:
        found.append(Finding("stop-token", f"{path.name} has no PARAMETER stop {missing[0]!r}"))
    if any(adapter.is_dir() or adapter.suffix == ".safetensors" for adapter in spec.adapters):
        found.append(Finding("peft-adapter", f"ADAPTER of {path.name} is {spec.adapters[0].name}"))
    return found


def _add(result: Verification, finding: Finding) -> None:
    if finding.mode not in {f.mode for f in result.findings}:
        result.findings.append(finding)


def _answers(
    result: Verification,
    trained: Reference,
    vocabulary: Vocabulary,
    gguf: Path,
    adapter: Path | str | None,
    prompts: tuple[str, ...],
    tokens: int,
) -> list[engine.Answer] | None:
    """What llama.cpp says; None if it cannot load the file."""
    try:
        running = LlamaCpp(gguf, adapter=adapter, context=1024, exact=True)
    except GRITError as error:
        _add(result, from_load_error(str(error)))
        return None
    with running, httpx.Client(base_url=running.url, headers=running.headers, timeout=600, trust_env=False) as client:
        for finding in (
            *engine.check_tokens(client, trained, vocabulary, prompts),
            *engine.check_stops(client, vocabulary),
            *engine.check_template(client, trained),
        ):
            _add(result, finding)
        texts = [trained.ids(prompt) for prompt in prompts]
        chosen = [ids for ids in texts if len(ids) <= SHORT] if len(texts) > CONTINUED else texts
        chosen = chosen[:: max(1, len(chosen) // CONTINUED)][:CONTINUED]
        return [engine.ask(client, ids, tokens, len(vocabulary.tokens)) for ids in chosen]


def _said(model: Reference, answers: list[engine.Answer], copies: int = 1) -> list[torch.Tensor]:
    """What transformers thinks of every token that llama.cpp said (all steps, vocabulary)."""
    return [model.log_probabilities(answer.ids, answer.start, copies)[:-1] for answer in answers if answer.steps]


def _judge_adapter(result: Verification, trained: list[torch.Tensor], plain: list[torch.Tensor]) -> None:
    """The trained model itself cannot be told from its base: nothing was learned, or nothing was loaded."""
    kls = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(trained, plain, strict=False)]
    result.adapter_kl = sum(kls) / len(kls) if kls else None
    if result.adapter_kl is not None and result.adapter_kl < 1e-9:
        detail = f"with and without the adapter the model is the same (KL {result.adapter_kl:.1g})"
        _add(result, Finding("no-op-merge", detail))


def _compare_tensors(
    result: Verification,
    trained: Reference,
    model: Checkpoint,
    lora: Adapter | None,
    weights: Weights,
    gguf_adapter: Path | str | None,
) -> dict[str, Branch]:
    """Audit the file's tensors, and leave the model with the file's own numbers in it. Returns an adapter's, apart."""
    import torch

    config = model.config
    apart: dict[str, Branch] = {}
    if gguf_adapter is not None and lora is not None:
        factors = {
            name.removeprefix("base_model.model."): (
                layer.lora_A[NAME].weight.detach(), layer.lora_B[NAME].weight.detach(), float(layer.scaling[NAME]),
            )
            for name, layer in trained.model.named_modules() if hasattr(layer, "lora_A") and NAME in layer.lora_A
        }  # fmt: skip
        try:
            check_same_base(weights.path, gguf_adapter)
        except GRITError as error:
            _add(result, Finding("wrong-base", str(error).removeprefix("wrong-base: ")))
        compared, apart = audit.audit_adapter(factors, config, Path(gguf_adapter), lora.sha256)
        _take(result, compared)
        result.dtype = f"{result.dtype}, adapter apart"
        expected = trained.unload()
    else:
        expected = trained.merge()
    with model.reader() as reader:
        changed = lora.changed if lora is not None and gguf_adapter is None else set()

        def start(name: str) -> torch.Tensor | None:
            return reader(name) if name in changed and model.source(name) is not None else None

        _take(result, audit.audit_tensors(weights, expected, config, start))
    with torch.no_grad():
        for name, parameter in expected.items():
            place, heads = gguf_name(name, config), rotary_heads(name, config)
            if place not in weights:
                # llama.cpp takes the embedding for a head that is not there; nothing else can be missing.
                place = gguf_name(EMBEDDING, config)
            value = weights(place)
            if value.shape == parameter.shape:
                parameter.copy_(unpermute(value, heads) if heads else value)
    return apart


def _take(result: Verification, compared: audit.Tensors) -> None:
    result.tensors += compared.compared
    result.exact += compared.exact
    for finding in compared.findings:
        _add(result, finding)


def _compare_answers(
    result: Verification,
    reference: Reference,
    weights: Weights,
    apart: dict[str, Branch],
    answers: list[engine.Answer],
    wanted: list[torch.Tensor],
) -> None:
    answers = [answer for answer in answers if answer.steps]
    model = reference.model
    with branches(model, apart):
        ours = _said(reference, answers)
    kinds = {
        name: weights.type(place)
        for name, place in (
            (module, gguf_name(f"{module}.weight", model.config.to_dict()))
            for module in (n for n, m in model.named_modules() if hasattr(m, "in_features"))
        )
        if place in weights
    }
    kinds.setdefault("lm_head", weights.type(gguf_name(EMBEDDING, model.config.to_dict())))
    if {*kinds.values(), *(kind for branch in apart.values() for kind in branch.kinds)} == {"F32"}:
        few = answers[: max(4, len(answers) // 2)]
        with branches(model, apart):
            others = [_said(reference, few, copies=2)]
        with in_double(model), branches(model, apart, exact=True):
            others.append(_said(reference, few))
    else:
        # The order of sums is nothing beside what rounding does.
        with as_llama_cpp(model, kinds), branches(model, apart, rounded=True):
            others = [_said(reference, answers)]
    engine_difference, engine_kl, floors, costs, agreed = [], [], [], [], 0
    for number, answer in enumerate(answers):
        for step, given in enumerate(answer.steps):
            if given is None:
                continue
            indices, theirs = given
            row = ours[number][step]
            difference, kl = _apart(row[indices], theirs)
            engine_difference.append(difference)
            engine_kl.append(kl)
            if number < len(others[0]):
                floors.append([_apart(row[indices], other[number][step][indices]) for other in others])
            full = wanted[number][step]
            costs.append(float((full.exp() * (full - row)).sum()))
            agreed += int(full.argmax() == row.argmax())
    result.positions = len(costs)
    if not costs:
        _add(result, Finding("evaluation-artefact", "llama.cpp generated no token on any prompt"))
        return
    result.max_difference, result.mean_kl = max(engine_difference), sum(engine_kl) / len(engine_kl)
    result.cost_kl, result.agreement = max(0.0, sum(costs) / len(costs)), agreed / len(costs)
    kinds_of_floor = range(len(others))
    result.floor = Limits(
        max(difference for row in floors for difference, _ in row),
        max(sum(row[kind][1] for row in floors) / len(floors) for kind in kinds_of_floor),
    )
    result.limits = Limits(
        max(DIFFERENCE * result.floor.difference, LEAST_DIFFERENCE), max(DIVERGENCE * result.floor.kl, LEAST_DIVERGENCE)
    )
    if result.max_difference > result.limits.difference or result.mean_kl > result.limits.kl:
        detail = (
            f"llama.cpp is {result.max_difference:.2g} off (KL {result.mean_kl:.2g}) on the file's own numbers; "
            f"right programs differ by {result.floor.difference:.2g} (KL {result.floor.kl:.2g}) on this model"
        )
        _add(result, Finding("engine", detail))


def _apart(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """Largest difference and KL(ours || theirs) of two sets of log-probabilities of the same tokens.

    Both are normalised over these tokens: llama.cpp's do not sum to one (by 2e-4 for 49,152 tokens).
    """
    inside = ours.logsumexp(0), theirs.logsumexp(0)
    p, q = ours - inside[0], theirs - inside[1]
    kept = (p > FLOOR) & (q > FLOOR)
    difference = float((p - q)[kept].abs().max())
    kl = float((p.exp() * (p - q.clamp_min(-60))).sum())
    # Probability that one of the two gives to tokens that the other does not name.
    outside = abs(float(inside[0].exp()) - float(inside[1].exp()))
    return (difference, max(kl, 0.0)) if outside < 0.02 else (max(difference, outside), max(kl, 0.0) + outside)


__all__ = ["MODES", "PROMPTS", "Limits", "Verification", "check_modelfile", "verify_export"]
