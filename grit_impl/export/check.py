"""Proof that an exported file is the trained model: Hugging Face against llama.cpp, token by token.

llama.cpp generates greedily from many prompts; Hugging Face is then given the very same tokens (teacher forcing), and
the two distributions are compared at every position. Generated texts are not compared: after one near-tie they part.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from grit_impl.errors import GRITError
from grit_impl.export import audit
from grit_impl.export.checkpoint import Checkpoint
from grit_impl.export.findings import MODES, Finding, from_load_error
from grit_impl.export.lora import Adapter
from grit_impl.export.reference import Reference
from grit_impl.export.vocabulary import read_vocabulary
from grit_impl.export.writer import EMBEDDING
from grit_impl.gguf.gotemplate import Template, TemplateError
from grit_impl.gguf.llamacpp import LlamaCpp
from grit_impl.gguf.metadata import read_metadata
from grit_impl.gguf.modelfile import read_modelfile

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Limits:
    """Largest difference of a log-probability, and mean Kullback-Leibler divergence in nats per token."""

    difference: float
    kl: float


# Ten times what was measured on small models with a float32 cache (q8_0: three times).
LIMITS = {
    "f32": Limits(1e-4, 1e-6),
    "f16": Limits(5e-2, 1e-5),
    "bf16": Limits(3e-1, 3e-4),
    "q8_0": Limits(5e-1, 1e-3),
}
PROMPTS = (
    "Predict AQI given: PM2.5 35.4 ug/m3, O3 0.071 ppm",
    "What is the capital of France?",
    "Add 17 and 25.",
    "List three primary colors.",
    "Repeat: 0123456789 3.14159 1,000,000 -7e-3",
    "Grüße aus Köln: naïve façade, Ærøskøbing",
    "東京は今日も晴れです。",
    "Привет, как дела?",
    "emoji 🙂🚀 and flags 🇫🇷, family 👨‍👩‍👧",
    "tabs\tand  double  spaces   and trailing ",
    "line one\nline two\r\n\n\nline five",
    "def f(x):\n    return {'a': x[0], \"b\": None}",
    "I'll say we've it's don't you're HE'LL",
    "MiXeD CaSe wOrDs AND ACRONYMS like NATO, pH, iOS",
    "!!!???... --- *** ((nested [brackets] {here})) <tag/> \\ | ~ ` ^",
    "a",
    " leading space",
    "zero width\u200bspace, combining e\u0301, nbsp\u00a0end",
    "The quick brown fox jumps over the lazy dog. " * 6,
    "Give the AQI category for NO2 101 ppb, CO 4.5 ppm, SO2 36 ppb and explain why it is not the worst pollutant.",
)
# Probabilities asked for at each step: everything for small vocabularies, the head of the distribution for large ones.
MOST_PROBABILITIES = 2048
# Tokens below a probability of one in a million are left out of the maximum: no sampler ever picks them, and a maximum
# over ten thousand of them measures their number.
FLOOR = -14.0


@dataclass
class Verification:
    """What was compared and found. `passed` means that there is no finding."""

    dtype: str
    prompts: int
    positions: int = 0
    max_difference: float = math.nan
    mean_kl: float = math.nan
    top_agreement: float = math.nan
    adapter_kl: float | None = None
    merge_difference: float | None = None
    limits: Limits = field(default_factory=lambda: LIMITS["q8_0"])
    findings: list[Finding] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether the file is the trained model within its type's rounding."""
        return not self.findings

    def summary(self) -> str:
        """One line."""
        numbers = (
            f"{self.positions} positions, max log-probability difference {self.max_difference:.2g} "
            f"(limit {self.limits.difference:g}), mean KL {self.mean_kl:.2g} (limit {self.limits.kl:g})"
        )
        return (
            f"{self.dtype}: {numbers}"
            if self.passed
            else f"{self.dtype}: {'; '.join(map(str, self.findings))}; {numbers}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For a run record."""
        return {**asdict(self), "passed": self.passed, "summary": self.summary()}


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
    prompts: tuple[str, ...] = PROMPTS,
    tokens: int = 24,
    device: str = "cpu",
    dtype: str = "float32",
) -> Verification:
    """Compare an exported model with the trained one.

    Args:
        base: Folder of the Hugging Face base.
        adapter: PEFT folder, or None.
        gguf: The merged model; with `gguf_adapter`, the base that the adapter is applied to.
        gguf_adapter: The adapter as GGUF.
        modelfile: Its TEMPLATE and stop tokens are checked, too.
        training_format: The prompt format of training, with `{instruction}`; None: the Alpaca format.
        four_bit: Whether the adapter was trained on NF4 weights. None: only if the base is stored so.
        sixteen_bit_base: The QLoRA adapter was merged into 16-bit weights on purpose: the difference from the trained
            model is measured (`merge_difference`), not judged.
        prompts: Texts to start from.
        tokens: Tokens to generate per prompt.
        device: Where Hugging Face computes.
        dtype: In what.

    Returns:
        The numbers, and a named finding for everything that is wrong.

    Raises:
        GRITError: the inputs are not what they should be (no file, no model).
    """
    model = Checkpoint(base)
    lora = Adapter(adapter) if adapter is not None else None
    path = Path(gguf)
    metadata = read_metadata(path)
    kind = audit.file_dtype(metadata)
    quantized = bool(four_bit) and not model.four_bit
    result = Verification(dtype=kind, prompts=len(prompts), limits=LIMITS[kind])
    if modelfile is not None:
        result.findings += check_modelfile(Path(modelfile), model, training_format)
    result.findings += audit.audit_metadata(model, path)
    try:
        engine = LlamaCpp(path, adapter=gguf_adapter, context=1024, exact=True)
    except GRITError as error:
        _add(result.findings, from_load_error(str(error)))
        return result
    with engine, httpx.Client(base_url=engine.url, headers=engine.headers, timeout=600, trust_env=False) as client:
        # With a 16-bit merge the file is right if it is base16 + adapter; how far that is from training is reported.
        reference = Reference(
            model.folder,
            lora.folder if lora else None,
            four_bit=quantized and not sixteen_bit_base,
            device=device,
            dtype=dtype,
        )
        _check_tokens(client, reference, prompts, result)
        _check_stops(client, model, result)
        _check_template(client, reference, result)
        steps = [_generate(client, reference.ids(prompt), tokens, len(reference.tokenizer)) for prompt in prompts]
    _compare(result, reference, steps)
    if quantized and sixteen_bit_base and lora is not None:
        trained = Reference(model.folder, lora.folder, four_bit=True, device=device, dtype=dtype)
        result.merge_difference = max(_difference(reference, trained, prompt) for prompt in prompts)
    causes = (
        audit.audit_adapter(model, lora, Path(gguf_adapter)) if gguf_adapter is not None and lora is not None
        else audit.audit_weights(model, lora, path, four_bit=quantized, sixteen_bit_base=sixteen_bit_base)
    )  # fmt: skip
    for cause in causes:
        _add(result.findings, cause)
    if (result.max_difference > result.limits.difference or result.mean_kl > result.limits.kl) and not result.findings:
        detail = f"log-probabilities differ by up to {result.max_difference:.2g}, mean KL {result.mean_kl:.2g}"
        _add(result.findings, Finding("weights", detail))
    return result


def check_modelfile(path: Path, base: Checkpoint, training_format: str | None = None) -> list[Finding]:
    """Whether a Modelfile serves the training format and stops where the model ends."""
    from grit_impl.recipes.datasets import ALPACA_TEMPLATE

    expected = training_format or ALPACA_TEMPLATE
    spec = read_modelfile(path)
    found = []
    if spec.template is None:
        found.append(Finding("chat-template", f"{path.name} has no TEMPLATE, so Ollama guesses one"))
    else:
        question = "What is 2 + 2?\n  Answer briefly. "
        try:
            rendered = Template(spec.template).render([{"role": "user", "content": question}])
            if rendered != expected.replace("{instruction}", question):
                found.append(Finding("chat-template", f"TEMPLATE of {path.name} renders {rendered[:80]!r}"))
        except TemplateError as error:
            found.append(Finding("chat-template", f"TEMPLATE of {path.name} does not parse: {error}"))
    stops = spec.parameters.get("stop", [])
    if missing := [s for s in read_vocabulary(base, base.shape(EMBEDDING)[0]).stops if s not in stops]:
        found.append(Finding("stop-token", f"{path.name} has no PARAMETER stop {missing[0]!r}"))
    if any(adapter.is_dir() or adapter.suffix == ".safetensors" for adapter in spec.adapters):
        found.append(Finding("peft-adapter", f"ADAPTER of {path.name} is {spec.adapters[0].name}"))
    return found


def _add(findings: list[Finding], finding: Finding) -> None:
    if finding.mode not in {f.mode for f in findings}:
        findings.append(finding)


def _check_tokens(client: httpx.Client, reference: Reference, prompts: tuple[str, ...], result: Verification) -> None:
    bos = reference.tokenizer.bos_token_id
    wrong, bos_only = [], 0
    for prompt in prompts:
        ours = reference.ids(prompt)
        theirs = client.post("/tokenize", json={"content": prompt, "add_special": True}).json()["tokens"]
        if ours != theirs:
            wrong.append(prompt)
            bos_only += [i for i in ours if i != bos] == [i for i in theirs if i != bos]
    if wrong and bos_only == len(wrong):
        _add(result.findings, Finding("bos", f"{len(wrong)} of {len(prompts)} prompts begin with another BOS"))
    elif wrong:
        detail = f"{len(wrong)} of {len(prompts)} prompts have other token ids, e.g. {wrong[0][:40]!r}"
        _add(result.findings, Finding("pre-tokenizer", detail))


def _check_stops(client: httpx.Client, model: Checkpoint, result: Verification) -> None:
    vocabulary = read_vocabulary(model, model.shape(EMBEDDING)[0])
    for token in vocabulary.eos:
        # Forced to say the end token, the engine must stop.
        body = {
            "prompt": [vocabulary.bos or 0, token],
            "n_predict": 3,
            "temperature": 0,
            "logit_bias": [[token, 1000.0]],
        }
        reply = client.post("/completion", json=body).json()
        if reply.get("stop_type") != "eos":
            _add(result.findings, Finding("stop-token", f"generation goes on after {vocabulary.tokens[token]!r}"))


def _check_template(client: httpx.Client, reference: Reference, result: Verification) -> None:
    messages = [{"role": "user", "content": "Name a river. "}]
    for conversation in (
        messages,
        [*messages, {"role": "assistant", "content": "Rhine"}, {"role": "user", "content": "Another?"}],
    ):
        ours = reference.render(conversation)
        if ours is None:
            return
        reply = client.post("/apply-template", json={"messages": conversation}).json()
        theirs = str(reply.get("prompt", reply.get("error"))).removeprefix(reference.tokenizer.bos_token or "")
        if ours != theirs:
            _add(
                result.findings,
                Finding("chat-template", f"the file renders {theirs[:60]!r}, training had {ours[:60]!r}"),
            )


@dataclass
class _Steps:
    """One prompt's greedy continuation: all ids, where it starts, and per step the ids and log-probabilities given."""

    ids: list[int]
    start: int
    steps: list[tuple[torch.Tensor, torch.Tensor] | None]


def _generate(client: httpx.Client, ids: list[int], tokens: int, vocabulary: int) -> _Steps:
    reply = _complete(client, ids, tokens, vocabulary)
    said, entries = reply["tokens"], reply.get("completion_probabilities", [])
    if len(entries) == len(said):
        return _Steps([*ids, *said], len(ids), [_step(entry) for entry in entries])
    # llama.cpp gives no probabilities for a token that ends inside a character, nor says where: one token at a time.
    all_ids = list(ids)
    steps: list[tuple[torch.Tensor, torch.Tensor] | None] = []
    for _ in said:
        reply = _complete(client, all_ids, 1, vocabulary)
        if not reply["tokens"]:
            break
        entries = reply.get("completion_probabilities", [])
        all_ids += reply["tokens"][:1]
        steps.append(_step(entries[0]) if entries else None)
    return _Steps(all_ids, len(ids), steps)


def _complete(client: httpx.Client, ids: list[int], tokens: int, vocabulary: int) -> dict[str, Any]:
    body = {
        "prompt": ids,
        "n_predict": tokens,
        "temperature": 0,
        "n_probs": min(vocabulary, MOST_PROBABILITIES),
        "return_tokens": True,
    }
    reply = client.post("/completion", json=body)
    if reply.status_code != 200:
        raise GRITError(f"llama.cpp refused a prompt: {reply.text[:200]}")
    value: dict[str, Any] = reply.json()
    return value


def _step(entry: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    top = entry["top_logprobs"]
    return torch.tensor([t["id"] for t in top]), torch.tensor([t["logprob"] for t in top], dtype=torch.float64)


def _compare(result: Verification, reference: Reference, generated: list[_Steps]) -> None:
    differences, kls, adapter_kls, agreements = [], [], [], 0
    for item in generated:
        if not item.steps:
            continue
        ours = reference.log_probabilities(item.ids, item.start).double()
        plain = None
        if reference.adapted:
            with reference.without_adapter():
                plain = reference.log_probabilities(item.ids, item.start).double()
        for step, given in enumerate(item.steps):
            if given is None:
                continue
            indices, theirs = given
            row = ours[step]
            kept = (theirs > FLOOR) & (row[indices] > FLOOR)
            differences.append(float((row[indices] - theirs)[kept].abs().max()))
            kls.append(_kl(row, indices, theirs))
            agreements += int(row.argmax()) == item.ids[item.start + step]
            if plain is not None:
                adapter_kls.append(_kl(row, indices, plain[step][indices]))
    result.positions = len(kls)
    if not kls:
        _add(result.findings, Finding("evaluation-artefact", "llama.cpp generated no token on any prompt"))
        return
    result.max_difference, result.mean_kl = max(differences), sum(kls) / len(kls)
    result.top_agreement = agreements / len(kls)
    if adapter_kls:
        result.adapter_kl = sum(adapter_kls) / len(adapter_kls)
        # The trained model itself cannot be told from its base: nothing was learned, or nothing was loaded.
        if result.adapter_kl < 1e-9:
            _add(
                result.findings,
                Finding(
                    "no-op-merge", f"with and without the adapter the model is the same (KL {result.adapter_kl:.1g})"
                ),
            )


def _kl(ours: torch.Tensor, indices: torch.Tensor, theirs: torch.Tensor) -> float:
    """KL(ours || theirs) over the given tokens, everything else taken as one token."""
    import torch

    mine = ours[indices]
    p, q = mine.exp(), theirs.exp()
    total = float((p * (mine - theirs.clamp_min(-60))).sum())
    rest_p, rest_q = 1 - float(p.sum()), 1 - float(q.sum())
    if len(indices) < len(ours) and rest_p > 1e-9:
        total += rest_p * float(torch.tensor(rest_p / max(rest_q, 1e-12)).log())
    return max(total, 0.0)


def _difference(one: Reference, other: Reference, prompt: str) -> float:
    ids = one.ids(prompt)
    start = min(2, len(ids))
    return float((one.log_probabilities(ids, start) - other.log_probabilities(ids, start)).abs().max())


__all__ = ["LIMITS", "MODES", "PROMPTS", "Limits", "Verification", "check_modelfile", "verify_export"]
