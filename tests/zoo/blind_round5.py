"""Blind test cases, round five: what befalls modified gradients in ordinary fine-tuning code."""

from __future__ import annotations

import contextlib
import copy
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import datasets
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import LoraLayer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.func import functional_call
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.optimization import Adafactor

torch.set_num_threads(1)
warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
datasets.disable_progress_bars()
logging.disable(logging.WARNING)

VOCAB = 32


@dataclass(frozen=True)
class Case:
    """One training run with what a watcher of it should find."""

    name: str
    kind: str
    link: str | None
    causes: tuple[str, ...]
    run: Callable
    why: str


CASES: list[Case] = []


def fault(name: str, link: str, *causes: str) -> Callable:
    """Add a run in which the given link is the first that broke."""

    def add(run: Callable) -> Callable:
        CASES.append(Case(name, "fault", link, causes, run, (run.__doc__ or "").strip()))
        return run

    return add


def sound(name: str, *causes: str) -> Callable:
    """Add a run in which nothing is wrong."""

    def add(run: Callable) -> Callable:
        CASES.append(Case(name, "sound", None, causes, run, (run.__doc__ or "").strip()))
        return run

    return add


# ---------------------------------------------------------------------------------------------- models and data


class Attention(nn.Module):
    """One-headed attention with a linear head."""

    def __init__(self, dim: int = 16, out: int = 3):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.head = nn.Linear(dim, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mix = (self.q(x) @ self.k(x).transpose(-1, -2) / x.shape[-1] ** 0.5).softmax(-1)
        return self.head(torch.tanh(x + self.o(mix @ self.v(x))))


class Mlp(nn.Module):
    """A plain stack of layers."""

    def __init__(self, dim: int = 12, hidden: int = 24, out: int = 4):
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.mid = nn.Linear(hidden, hidden)
        self.down = nn.Linear(hidden, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.mid(torch.tanh(self.up(x)))))


def llama(layers: int = 1, hidden: int = 16, **kw) -> LlamaForCausalLM:
    """A very small causal language model."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=128,
        use_cache=False,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **kw,
    )
    return LlamaForCausalLM(config)


def lora(model: nn.Module, targets=("q_proj", "v_proj"), r: int = 4, **kw) -> PeftModel:
    """Wrap a model with LoRA."""
    kw.setdefault("lora_alpha", 8)
    targets = list(targets) if not isinstance(targets, str) else targets
    return get_peft_model(model, LoraConfig(r=r, target_modules=targets, **kw))


def lm(seed: int, layers: int = 1, hidden: int = 16, targets=("q_proj", "v_proj"), r: int = 4, **kw) -> PeftModel:
    """A seeded small language model with LoRA in training mode."""
    torch.manual_seed(seed)
    return lora(llama(layers, hidden), targets, r, **kw).train()


def tokens(count: int, seed: int = 0, rows: int = 4, length: int = 10) -> list[torch.Tensor]:
    """Batches of token ids that follow a noisy rule."""
    made = torch.Generator().manual_seed(1000 + seed)
    start = torch.randint(3, VOCAB, (count, rows, 1), generator=made)
    stride = torch.randint(1, 4, (count, rows, 1), generator=made)
    noise = torch.randint(0, 2, (count, rows, length), generator=made)
    return list(3 + (start + stride * torch.arange(length) + noise) % (VOCAB - 3))


def pairs(count: int, width: int, out: int, seed: int = 0, rows: int = 16, length: int | None = None) -> list[tuple]:
    """Batches of inputs and targets of a fixed random map."""
    made = torch.Generator().manual_seed(2000 + seed)
    rule = torch.randn(width, out, generator=made) / width**0.5
    skew = torch.linspace(0.4, 1.8, width)
    shape = (count, rows, width) if length is None else (count, rows, length, width)
    x = torch.randn(shape, generator=made) * skew
    return [(a, torch.sin(2 * a @ rule)) for a in x]


def lm_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Next-token loss."""
    return model(input_ids=ids, labels=ids).loss


def mse(model: nn.Module, batch: tuple) -> torch.Tensor:
    """Squared error."""
    return F.mse_loss(model(batch[0]), batch[1])


def attention(seed: int, r: int = 4, targets=("q", "k", "v", "o"), **kw) -> PeftModel:
    """A seeded attention layer with LoRA."""
    torch.manual_seed(seed)
    return lora(Attention(), targets, r, **kw).train()


def mlp(seed: int, r: int = 4, targets=("up", "mid"), **kw) -> PeftModel:
    """A seeded stack of layers with LoRA."""
    torch.manual_seed(seed)
    return lora(Mlp(), targets, r, **kw).train()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """What requires a gradient."""
    return [p for p in model.parameters() if p.requires_grad]


def factors(model: nn.Module, part: str = "lora_") -> list[tuple[str, nn.Parameter]]:
    """Trainable LoRA matrices by name."""
    return [(n, p) for n, p in model.named_parameters() if part in n and p.ndim > 1 and p.requires_grad]


def is_a(name: str) -> bool:
    """Whether a name belongs to a first factor."""
    return "lora_A" in name or "lora_embedding_A" in name


def unfreeze_norms(model: nn.Module) -> None:
    """Let the normalisation weights learn too."""
    for name, p in model.named_parameters():
        if "norm" in name:
            p.requires_grad_(True)


def wake(model: nn.Module, std: float = 0.1) -> nn.Module:
    """Start the second factors away from zero, so that the first ones have gradients at once."""
    for name, p in factors(model):
        if not is_a(name):
            nn.init.normal_(p, std=std)
    return model


@torch.no_grad()
def enlarge(model: nn.Module) -> nn.Module:
    """Make every entry of the factors about one half in size, with random signs."""
    for _, p in factors(model):
        p.copy_(torch.randn_like(p).sign() * torch.empty_like(p).uniform_(0.4, 0.6))
    return model


# ---------------------------------------------------------------------------------------------- preconditioners


def rank_first(name: str, g: torch.Tensor) -> torch.Tensor:
    """A gradient as a matrix whose rows are the rank."""
    return g.flatten(1) if is_a(name) else g.flatten(1).t()


def rank_back(name: str, flat: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of rank_first."""
    return (flat if is_a(name) else flat.t()).reshape(like.shape).to(like.dtype)


def inverse_root(s: torch.Tensor, power: float = 0.5, damping: float = 1e-3) -> torch.Tensor:
    """A damped inverse root of a symmetric matrix."""
    s = s.double()
    s = s + damping * s.diagonal().mean().clamp_min(1e-30) * torch.eye(len(s), dtype=s.dtype)
    values, vectors = torch.linalg.eigh(s)
    return (vectors * values.clamp_min(1e-30).pow(-power)) @ vectors.t()


class Gram:
    """Whitens the rank side of each LoRA gradient with a running average of its own Gram matrix."""

    def __init__(self, model: nn.Module, part: str = "lora_", beta: float = 0.8, power: float = 0.75, warm: int = 0):
        self.named = factors(model, part)
        self.beta, self.power, self.warm = beta, power, warm
        self.sums: dict[str, torch.Tensor] = {}
        self.count = 0

    def observe(self, name: str, g: torch.Tensor) -> None:
        """Take one gradient into the average."""
        flat = rank_first(name, g.detach()).double()
        new = flat @ flat.t()
        self.sums[name] = new if name not in self.sums else self.beta * self.sums[name] + (1 - self.beta) * new

    def matrix(self, name: str) -> torch.Tensor | None:
        """The matrix of one tensor, None while there is none."""
        return inverse_root(self.sums[name], self.power) if name in self.sums else None

    def turned(self, name: str, g: torch.Tensor) -> torch.Tensor:
        """The preconditioned gradient at the norm of the old one."""
        if not g.any():
            return g.clone()
        self.observe(name, g)
        m = self.matrix(name)
        if m is None or self.count < self.warm:
            return g.clone()
        new = m @ rank_first(name, g).double()
        new = new * (g.double().norm() / new.norm())
        return rank_back(name, new, g)

    def step(self, *_) -> None:
        """Precondition everything that has a gradient, in place."""
        for name, p in self.named:
            if p.grad is not None:
                p.grad.copy_(self.turned(name, p.grad))
        self.count += 1


class Kfac(Gram):
    """Whitens with covariances of what flows through the rank space, taken by hooks."""

    def __init__(self, model: nn.Module, part: str = "lora_", **kw):
        super().__init__(model, part, **kw)
        self.handles = []
        for path, module in model.named_modules():
            if isinstance(module, LoraLayer):
                for adapter, inner in module.lora_A.items():
                    ends = [f"{path}.lora_{side}.{adapter}.weight" for side in "AB"]
                    self.handles.append(inner.register_forward_hook(self.hook(*ends)))

    def hook(self, name_a: str, name_b: str) -> Callable:
        """A forward hook that feeds both averages of one layer."""

        def take(_module: nn.Module, _inputs: tuple, out: torch.Tensor) -> None:
            if out.requires_grad:
                self.add(name_b, out)
                out.register_hook(lambda g: self.add(name_a, g))

        return take

    def add(self, name: str, rows: torch.Tensor) -> None:
        """Take rows of rank-space vectors into an average."""
        rows = rows.detach().reshape(-1, rows.shape[-1]).double()
        new = rows.t() @ rows / len(rows)
        if new.any():
            self.sums[name] = new if name not in self.sums else self.beta * self.sums[name] + (1 - self.beta) * new

    def observe(self, name: str, g: torch.Tensor) -> None:
        """Nothing: hooks do it."""


def hook_in_place(pre: Gram, name: str) -> Callable:
    """A post-accumulate hook that turns one gradient where it stands."""

    def turn(p: nn.Parameter) -> None:
        p.grad.copy_(pre.turned(name, p.grad))

    return turn


# ---------------------------------------------------------------------------------------------- loops


def fit(observe, model, opt, batches, loss=lm_loss, before=None, after=None, clip=None, sched=None) -> None:
    """An ordinary loop with places for a modifier."""
    with observe(model):
        for i, batch in enumerate(batches):
            opt.zero_grad()
            loss(model, batch).backward()
            if before:
                before(i)
            if clip:
                nn.utils.clip_grad_norm_(trainable(model), clip)
            opt.step()
            if after:
                after(i)
            if sched:
                sched.step()


class At(TrainerCallback):
    """Calls a function at one event of the Trainer."""

    def __init__(self, event: str, call: Callable):
        setattr(self, event, lambda args, state, control, **kw: call())


def hf(model, steps: int = 10, callbacks=(), cls=Trainer, optimizers=(None, None), seed: int = 0, **kw) -> Trainer:
    """A quiet Trainer on token batches."""
    settings = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": seed,
    } | kw
    rows = [{"input_ids": x, "labels": x} for x in torch.cat(tokens(24, seed))]
    made = cls(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=rows,
        data_collator=default_data_collator,
        callbacks=list(callbacks),
        optimizers=optimizers,
    )
    made.remove_callback(PrinterCallback)
    return made


CHAT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'ask ' + m['content'] + ' ' }}{% else %}"
    "{{ 'say ' }}{% generation %}{{ m['content'] + ' end ' }}{% endgeneration %}{% endif %}{% endfor %}"
)


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of a few words."""
    known = ["<pad>", "<s>", "end", "ask", "say", "<unk>"] + [f"w{i}" for i in range(VOCAB - 6)]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="end", unk_token="<unk>"
    )
    made.chat_template = CHAT
    return made


def phrase(start: int, length: int, stride: int = 1) -> str:
    """Words in a row."""
    return " ".join(f"w{(start + stride * i) % (VOCAB - 6)}" for i in range(length))


def sft(model, rows: list[dict], steps: int = 10, callbacks=(), **kw):
    """A quiet SFTTrainer."""
    from trl import SFTConfig, SFTTrainer

    settings = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "max_length": 24,
        "bf16": False,
        "gradient_checkpointing": False,
    } | kw
    made = SFTTrainer(
        model=model,
        args=SFTConfig(**settings),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=words(),
        callbacks=list(callbacks),
    )
    made.remove_callback(PrinterCallback)
    return made


def completions(count: int = 32) -> list[dict]:
    """Prompts with completions."""
    return [{"prompt": phrase(i, 4), "completion": " " + phrase(3 * i, 5, 2)} for i in range(count)]


def chats(count: int = 32) -> list[dict]:
    """Conversations of one turn."""
    return [
        {
            "messages": [
                {"role": "user", "content": phrase(i, 3)},
                {"role": "assistant", "content": phrase(2 * i, 4, 2)},
            ]
        }
        for i in range(count)
    ]


# ---------------------------------------------------------------------------------------------- optimizers


class Lion(Optimizer):
    """Sign of an interpolated momentum."""

    def __init__(self, params, lr: float = 1e-3, betas=(0.9, 0.99)):
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure=None):
        """One update."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                b1, b2 = group["betas"]
                p.add_((b1 * m + (1 - b1) * p.grad).sign(), alpha=-group["lr"])
                m.lerp_(p.grad, 1 - b2)


class SignSgd(Optimizer):
    """Moves every entry by the learning rate."""

    def __init__(self, params, lr: float):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        """One update."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad.sign(), alpha=-group["lr"])


class FlatSgd(Optimizer):
    """Keeps all gradients in one buffer whose views are the gradients of the parameters."""

    def __init__(self, params, lr: float):
        super().__init__(list(params), {"lr": lr})
        self.members = self.param_groups[0]["params"]
        self.buffer = torch.zeros(sum(p.numel() for p in self.members))
        self.zero_grad()

    def views(self) -> list[torch.Tensor]:
        """The slices of the buffer."""
        return [
            v.view_as(p)
            for v, p in zip(self.buffer.split([p.numel() for p in self.members]), self.members, strict=True)
        ]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Empty the buffer and hang its views on the parameters."""
        self.buffer.zero_()
        for p, view in zip(self.members, self.views(), strict=True):
            p.grad = view

    @torch.no_grad()
    def step(self, closure=None):
        """One update from the buffer."""
        for p, view in zip(self.members, self.views(), strict=True):
            p.add_(view, alpha=-self.param_groups[0]["lr"])


class Lookahead:
    """Slow weights that follow fast ones every few steps."""

    def __init__(self, inner: Optimizer, every: int = 4, alpha: float = 0.5):
        self.inner, self.every, self.alpha, self.count = inner, every, alpha, 0
        self.slow = {p: p.detach().clone() for g in inner.param_groups for p in g["params"]}

    def zero_grad(self) -> None:
        """Forget gradients."""
        self.inner.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        """One fast step, and every few steps a slow one."""
        self.inner.step()
        self.count += 1
        if self.count % self.every == 0:
            for p, slow in self.slow.items():
                slow.lerp_(p, self.alpha)
                p.copy_(slow)


# ============================================================================================== faults
# ---------------------------------------------------------------------------------------------- used


@fault("dpo_loop_stays_on_reference_adapter", "used", "not-used", "wrong-parameters", "no-gradient")
def dpo_loop_stays_on_reference_adapter(observe):
    """The loop switches to the reference adapter for its forward and never back, so the policy adapter idles."""
    model = lm(1)
    model.add_adapter("reference", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    policy = [p for n, p in model.named_parameters() if ".default." in n]
    opt = AdamW(policy, lr=1e-2)
    pre = Gram(model, "default")
    with observe(model):
        for ids in tokens(10, 1):
            opt.zero_grad()
            model.set_adapter("reference")
            with torch.no_grad():
                anchor = lm_loss(model, ids)
            (-F.logsigmoid(anchor - lm_loss(model, ids))).backward()
            pre.step()
            opt.step()


@fault("loss_inside_disable_adapter", "used", "not-used", "no-gradient")
def loss_inside_disable_adapter(observe):
    """The indentation puts the policy loss into the disable_adapter block; only unfrozen norms still learn."""
    model = lm(2)
    unfreeze_norms(model)
    opt = AdamW(trainable(model), lr=1e-2)
    pre = Gram(model)
    with observe(model):
        for ids in tokens(10, 2):
            opt.zero_grad()
            with model.disable_adapter():
                with torch.no_grad():
                    anchor = lm_loss(model, ids)
                (lm_loss(model, ids) - anchor.detach()).backward()
            pre.step()
            opt.step()


@fault("merged_for_eval_before_training", "used", "not-used", "no-gradient")
def merged_for_eval_before_training(observe):
    """A baseline evaluation merges the adapter and the training that follows runs on the merged weights."""
    model = lm(3, targets=("q_proj", "k_proj", "v_proj"))
    unfreeze_norms(model)
    model.merge_adapter()
    with torch.no_grad():
        lm_loss(model, tokens(1)[0])
    pre = Gram(model)
    fit(observe, model, AdamW(trainable(model), lr=1e-2), tokens(10, 3), before=pre.step)


@fault("trains_what_merge_and_unload_left", "used", "not-used", "no-gradient")
def trains_what_merge_and_unload_left(observe):
    """The adapter was unloaded for an export and the run goes on with an optimizer full of orphaned factors."""
    torch.manual_seed(4)
    base = Attention()
    model = lora(base, ("q", "v"), modules_to_save=["head"])
    opt = AdamW(trainable(model), lr=1e-2)
    pre = Gram(model)
    with observe(model):
        model.merge_and_unload()
        for x, y in pairs(10, 16, 3, 4, rows=6, length=5):
            opt.zero_grad()
            F.mse_loss(model(x), y).backward()
            pre.step()
            opt.step()


@fault("functional_call_on_copies_made_once", "used", "not-used", "stale-gradient", "no-gradient")
def functional_call_on_copies_made_once(observe):
    """Gradients come from copies of the factors taken before the first step, never from the factors themselves."""
    model = wake(mlp(5))
    live = dict(factors(model))
    copies = {n: p.detach().clone().requires_grad_() for n, p in live.items()}
    opt = SGD(live.values(), lr=0.05)
    pre = Gram(model)
    with observe(model):
        for x, y in pairs(12, 12, 4, 5):
            loss = F.mse_loss(functional_call(model, copies, (x,)), y)
            for (n, p), g in zip(live.items(), torch.autograd.grad(loss, list(copies.values())), strict=True):
                p.grad = g.clone()
                assert n in copies
            pre.step()
            opt.step()


@fault("forward_through_a_deepcopied_worker", "used", "not-used", "no-gradient")
def forward_through_a_deepcopied_worker(observe):
    """The loop forwards through a replica made at start-up; the model and its optimizer never see a gradient."""
    model = lm(6)
    worker = copy.deepcopy(model)
    opt = AdamW(trainable(model), lr=1e-2)
    pre = Gram(model)
    with observe(model):
        for ids in tokens(10, 6):
            opt.zero_grad()
            lm_loss(worker, ids).backward()
            pre.step()
            opt.step()


@fault("generation_merge_never_unmerged_midway", "throughout", "stopped", "not-used", "no-gradient")
def generation_merge_never_unmerged_midway(observe):
    """An evaluation after step six merges for speed and nobody unmerges, so the adapter drops out of the rest."""
    model = lm(7)
    unfreeze_norms(model)
    pre = Gram(model)

    def evaluate(i):
        if i == 5:
            model.merge_adapter()

    fit(observe, model, AdamW(trainable(model), lr=1e-2), tokens(16, 7), before=pre.step, after=evaluate)


@fault("eval_adapter_left_active_midway", "throughout", "stopped", "not-used", "no-gradient", "wrong-parameters")
def eval_adapter_left_active_midway(observe):
    """A saved adapter is loaded under another name for a comparison and stays the active one for the second half."""
    model = lm(8)
    opt = AdamW(trainable(model), lr=1e-2)
    pre = Gram(model)

    def compare(i):
        if i == 7:
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                model.load_adapter(folder, "snapshot", is_trainable=True)
            model.set_adapter("snapshot")

    fit(observe, model, opt, tokens(16, 8), before=pre.step, after=compare)


# ---------------------------------------------------------------------------------------------- arrived


class Recomputed(nn.Module):
    """A stack whose body is recomputed in backward by the reentrant variant."""

    def __init__(self):
        super().__init__()
        self.body, self.score = Mlp(12, 24, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(checkpoint(self.body, x, use_reentrant=True))


@fault("reentrant_checkpointing_without_input_grads", "arrived", "no-gradient")
def reentrant_checkpointing_without_input_grads(observe):
    """Reentrant checkpointing of a body whose input wants no gradient: its adapters get none, only the head learns."""
    torch.manual_seed(10)
    model = lora(Recomputed(), ("up", "mid", "down"), modules_to_save=["score"]).train()
    pre = Gram(model)
    fit(observe, model, AdamW(trainable(model), lr=1e-2), pairs(10, 12, 4, 10), mse, before=pre.step)


@fault("both_factors_start_at_zero", "arrived", "no-gradient")
def both_factors_start_at_zero(observe):
    """A home-made initialisation zeroes both factors, a saddle that no gradient leaves."""
    model = lm(11)
    for _, p in factors(model):
        nn.init.zeros_(p)
    pre = Gram(model)
    fit(observe, model, AdamW(trainable(model), lr=1e-2, weight_decay=0.0), tokens(10, 11), before=pre.step)


@fault("every_label_masked", "arrived", "no-gradient")
def every_label_masked(observe):
    """The completion mask is off by a whole prompt: the mean over no tokens is NaN and every gradient zero."""
    model = lm(12)
    pre = Gram(model)

    def loss(model, ids):
        return model(input_ids=ids, labels=torch.full_like(ids, -100)).loss

    fit(observe, model, AdamW(trainable(model), lr=1e-2), tokens(8, 12), loss, before=pre.step)


@fault("lora_alpha_of_zero", "arrived", "no-gradient", "not-used")
def lora_alpha_of_zero(observe):
    """A sweep sets lora_alpha to zero, which scales the adapter and all its gradients away."""
    model = lm(13, lora_alpha=0)
    pre = Gram(model)
    fit(observe, model, AdamW(trainable(model), lr=1e-2, weight_decay=0.0), tokens(10, 13), before=pre.step)


@fault("reloaded_adapter_is_not_trainable", "arrived", "no-gradient", "wrong-parameters")
def reloaded_adapter_is_not_trainable(observe):
    """from_pretrained without is_trainable gives frozen factors; the unfrozen norms hide it."""
    first = lm(14)
    with tempfile.TemporaryDirectory() as folder:
        first.save_pretrained(folder)
        torch.manual_seed(14)
        model = PeftModel.from_pretrained(llama(), folder).train()
    unfreeze_norms(model)
    opt = AdamW(model.parameters(), lr=1e-2)
    pre = Gram(model)
    fit(observe, model, opt, tokens(10, 14), before=pre.step)


class Probe(nn.Module):
    """A body whose features are detached before the head."""

    def __init__(self, body: nn.Module, width: int):
        super().__init__()
        self.body, self.score = body, nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(self.body(x).detach())


@fault("features_detached_before_the_head", "arrived", "no-gradient")
def features_detached_before_the_head(observe):
    """A leftover detach from a probing script cuts the adapters off from the loss."""
    torch.manual_seed(15)
    model = lora(Probe(Mlp(), 4), ("up", "mid", "down"), modules_to_save=["score"])
    pre = Gram(model)
    fit(observe, model, AdamW(trainable(model), lr=1e-2), pairs(10, 12, 4, 15), mse, before=pre.step)


@fault("scaler_begins_beyond_half_precision", "arrived", "non-finite", "no-steps")
def scaler_begins_beyond_half_precision(observe):
    """The initial loss scale is so high that each half-precision backward overflows and each step is skipped."""
    model = wake(mlp(16))
    opt = SGD(trainable(model), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    pre = Gram(model)
    with observe(model):
        for x, y in pairs(10, 12, 4, 16):
            opt.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                out = model(x)
            scaler.scale(F.mse_loss(out.float(), y)).backward()
            scaler.unscale_(opt)
            if all(p.grad.isfinite().all() for _, p in pre.named):
                pre.step()
            scaler.step(opt)
            scaler.update()


@fault("log_of_zero_in_the_loss", "arrived", "non-finite")
def log_of_zero_in_the_loss(observe):
    """A loss takes the root of an exact zero, whose derivative is infinite, and the gradient guard only looks at it."""
    model = wake(attention(17, targets=("q", "v")))

    class Cautious(Gram):
        def turned(self, name, g):
            return g.clone() if not g.isfinite().all() else super().turned(name, g)

    def loss(model, batch):
        out = model(batch[0])
        return (out - batch[1]).pow(2).mean() + (out - out.detach()).norm(dim=-1).pow(0.5).mean()

    pre = Cautious(model)
    opt = AdamW(trainable(model), lr=1e-2)
    fit(observe, model, opt, pairs(8, 16, 3, 17, rows=4, length=4), loss, before=pre.step)


# ---------------------------------------------------------------------------------------------- read


@fault("statistics_only_outside_training_mode", "read", "starved", "not-ready", "nothing-written")
def statistics_only_outside_training_mode(observe):
    """The hooks return early in training mode by an inverted test, so the averages stay empty and M the identity."""
    model = lm(20)

    class Inverted(Kfac):
        def hook(self, name_a, name_b):
            inner = super().hook(name_a, name_b)
            return lambda module, inputs, out: None if module.training else inner(module, inputs, out)

    fit(observe, model, AdamW(trainable(model), lr=1e-2), tokens(12, 20), before=Inverted(model).step)


@fault("hooks_hang_on_a_copy", "read", "starved", "not-ready", "nothing-written")
def hooks_hang_on_a_copy(observe):
    """The preconditioner hooked a copy of the model kept as reference, and writes back what it got, unturned."""
    model = attention(21)
    pre = Kfac(copy.deepcopy(model))
    pre.named = factors(model)
    fit(observe, model, Adam(trainable(model), 1e-2), pairs(12, 16, 3, 21, rows=4, length=4), mse, before=pre.step)


@fault("layers_replaced_after_hooking", "read", "starved", "not-ready", "nothing-written")
def layers_replaced_after_hooking(observe):
    """A helper swaps the inner linear layers for fresh modules around the same weights, without their hooks."""
    model = lm(22)
    pre = Kfac(model)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for inner in (module.lora_A, module.lora_B):
                old = inner["default"]
                new = nn.Linear(old.in_features, old.out_features, bias=False)
                new.weight = old.weight
                inner["default"] = new
    fit(observe, model, SGD(trainable(model), lr=0.3), tokens(12, 22), before=pre.step)


@fault("hooks_removed_by_a_profiler_cleanup", "read", "starved", "not-ready", "nothing-written")
def hooks_removed_by_a_profiler_cleanup(observe):
    """A clean-up before training clears all forward hooks, those of the preconditioner among them."""
    model = mlp(23)
    pre = Kfac(model)
    for module in model.modules():
        module._forward_hooks.clear()
    fit(observe, model, Adam(trainable(model), lr=1e-2), pairs(12, 12, 4, 23), mse, before=pre.step)


# ---------------------------------------------------------------------------------------------- turned


@fault("callback_registered_twice", "turned", "applied-twice")
def callback_registered_twice(observe):
    """The callback is given to the constructor and added again, so M acts twice on each gradient."""
    model = lm(30)
    call = At("on_pre_optimizer_step", Kfac(model, power=0.4).step)
    trainer = hf(model, 12, [call])
    trainer.callback_handler.callbacks.append(call)
    with observe(model):
        trainer.train()


@fault("pre_hook_and_manual_call", "turned", "applied-twice")
def pre_hook_and_manual_call(observe):
    """The loop still calls the preconditioner by hand after it was made an optimizer hook."""
    model = attention(31)
    opt = SGD(trainable(model), lr=0.1)
    pre = Kfac(model, power=0.4)
    opt.register_step_pre_hook(pre.step)
    fit(observe, model, opt, pairs(14, 16, 3, 31, rows=4, length=4), mse, before=pre.step)


@fault("shared_factor_visited_per_layer", "turned", "applied-twice")
def shared_factor_visited_per_layer(observe):
    """One A is tied across two layers and the modifier walks over modules, turning the shared tensor once per layer."""
    model = mlp(32, targets=("mid", "down"))
    inner = model.base_model.model
    inner.down.lora_A["default"].weight = inner.mid.lora_A["default"].weight
    opt = SGD(trainable(model), lr=0.1)
    pre = Kfac(model, power=0.4)
    shared = factors(model)[0]
    pre.named = [*factors(model), shared]
    fit(observe, model, opt, pairs(14, 12, 4, 32), mse, before=pre.step)


@fault("trainer_modifies_inside_training_step", "turned", "applied-on-micro-steps", "applied-twice")
def trainer_modifies_inside_training_step(observe):
    """training_step is overridden to precondition after each backward, though three micro-batches accumulate."""
    model = lm(33)
    pre = Kfac(model, power=0.4)

    class Eager(Trainer):
        def training_step(self, *args, **kw):
            loss = super().training_step(*args, **kw)
            pre.step()
            return loss

    trainer = hf(model, 8, cls=Eager, gradient_accumulation_steps=3)
    with observe(model):
        trainer.train()


@fault("post_accumulate_hook_on_micro_batches", "turned", "applied-on-micro-steps", "applied-twice")
def post_accumulate_hook_on_micro_batches(observe):
    """The hook after accumulation turns the running sum at each of four micro-batches."""
    model = mlp(34)
    opt = SGD(trainable(model), lr=0.1)
    pre = Kfac(model, power=0.25)
    for name, p in pre.named:
        p.register_post_accumulate_grad_hook(hook_in_place(pre, name))
    with observe(model):
        for i, batch in enumerate(pairs(40, 12, 4, 34)):
            (mse(model, batch) / 4).backward()
            if i % 4 == 3:
                opt.step()
                opt.zero_grad()


@fault("accelerate_ignores_sync_gradients", "turned", "applied-on-micro-steps", "applied-twice")
def accelerate_ignores_sync_gradients(observe):
    """Inside accumulate() the modifier runs at each micro-batch while the wrapped optimizer waits for the last."""
    model = attention(35, targets=("q", "v"))
    pre = Kfac(model, power=0.25)
    acc = Accelerator(cpu=True, gradient_accumulation_steps=3)
    ready, opt = acc.prepare(model, AdamW(trainable(model), lr=1e-2))
    with observe(model):
        for batch in pairs(30, 16, 3, 35, rows=4, length=4):
            with acc.accumulate(ready):
                acc.backward(mse(ready, batch))
                pre.step()
                opt.step()
                opt.zero_grad()


@fault("average_with_a_sign_slip", "turned", "against-the-gradient")
def average_with_a_sign_slip(observe):
    """The running average subtracts the new Gram matrix, so its inverse is negative definite."""
    model = lm(36)

    class Slip(Gram):
        def matrix(self, name):
            s = -self.sums[name]
            s = s - 0.05 * self.sums[name].diagonal().mean() * torch.eye(len(s), dtype=s.dtype)
            return torch.linalg.inv(s)

    fit(observe, model, SGD(trainable(model), lr=0.05), tokens(14, 36), before=Slip(model).step)


@fault("direction_returned_instead_of_gradient", "turned", "against-the-gradient")
def direction_returned_instead_of_gradient(observe):
    """The helper returns the descent direction -MG, and the loop stores it as a gradient."""
    model = lm(37, targets=("q_proj", "o_proj"))
    pre = Gram(model)

    def descend(_):
        for name, p in pre.named:
            p.grad = -pre.turned(name, p.grad)

    fit(observe, model, AdamW(trainable(model), lr=3e-3), tokens(14, 37), before=descend)


@fault("damping_drowns_the_covariance", "turned", "scaled-only", "nothing-written")
def damping_drowns_the_covariance(observe):
    """Absolute damping of a thousand against covariances near a thousandth leaves a multiple of the identity."""
    model = lm(38)

    class Drowned(Kfac):
        def matrix(self, name):
            s = self.sums.get(name)
            return None if s is None else torch.linalg.inv(s + 1e3 * torch.eye(len(s), dtype=s.dtype))

        def turned(self, name, g):
            m = self.matrix(name)
            return g if m is None else rank_back(name, 3e3 * m @ rank_first(name, g).double(), g)

    fit(observe, model, SGD(trainable(model), lr=0.1), tokens(12, 38), before=Drowned(model).step)


@fault("divides_by_the_norm_of_the_matrix", "turned", "scaled-only", "blown-up")
def divides_by_the_norm_of_the_matrix(observe):
    """Where the inverse was meant the code divides by the matrix norm, which only rescales."""
    model = mlp(39)
    pre = Gram(model)

    def rescale(_):
        for name, p in pre.named:
            pre.observe(name, p.grad)
            p.grad.div_(pre.sums[name].norm().sqrt().float() + 1e-3)

    fit(observe, model, SGD(trainable(model), lr=0.03), pairs(12, 12, 4, 39), mse, before=rescale)


@fault("root_exponent_of_zero", "turned", "scaled-only", "nothing-written")
def root_exponent_of_zero(observe):
    """The exponent -1//2 + 1 was meant as a half and is zero: M is the identity times a grafting factor."""
    model = attention(40)
    pre = Gram(model, power=-1 // 2 + 1)

    def grafted(_):
        for name, p in pre.named:
            p.grad.copy_(0.7 * pre.turned(name, p.grad))

    fit(observe, model, SGD(trainable(model), lr=0.2), pairs(12, 16, 3, 40, rows=4, length=4), mse, before=grafted)


@fault("results_written_one_place_further", "turned", "unrelated-gradient", "against-the-gradient")
def results_written_one_place_further(observe):
    """Two lists of equal shapes are zipped with an offset of one, so each factor gets its neighbour's gradient."""
    model = lm(41, layers=3, targets=("q_proj",))
    pre = Gram(model)

    def shifted(_):
        for part in ("lora_A", "lora_B"):
            here = [(n, p) for n, p in pre.named if part in n]
            new = [pre.turned(n, p.grad) for n, p in here]
            for (_, p), g in zip(here, new[1:] + new[:1], strict=True):
                p.grad = g

    fit(observe, model, AdamW(trainable(model), lr=1e-2), tokens(14, 41), before=shifted)


@fault("lookup_by_shape_last_one_wins", "turned", "unrelated-gradient", "against-the-gradient")
def lookup_by_shape_last_one_wins(observe):
    """Two factor pairs of one shape are looked up by shape in a dictionary, and the last one wins for both."""
    model = wake(attention(43, targets=("q", "k", "v")))
    pre = Gram(model)

    def by_shape(_):
        found = {p.shape: pre.turned(n, p.grad) for n, p in pre.named}
        for _, p in pre.named:
            p.grad.copy_(found[p.shape])

    opt = SGD(trainable(model), lr=0.1)
    fit(observe, model, opt, pairs(14, 16, 3, 43, rows=4, length=4), mse, before=by_shape)


@fault("preconditions_last_steps_copy", "turned", "stale-gradient", "unrelated-gradient")
def preconditions_last_steps_copy(observe):
    """Double buffering is off by one: what is written each time was computed from the previous step's gradient."""
    model = lm(44)
    pre = Gram(model)
    last = {n: None for n, _ in pre.named}

    def delayed(_):
        for name, p in pre.named:
            now = pre.turned(name, p.grad)
            if last[name] is not None:
                p.grad.copy_(last[name])
            last[name] = now

    fit(observe, model, AdamW(trainable(model), lr=1e-2), tokens(16, 44), before=delayed)


@fault("snapshot_of_the_first_step", "turned", "stale-gradient", "unrelated-gradient")
def snapshot_of_the_first_step(observe):
    """A cache keyed by name keeps the second step's preconditioned gradient and serves it for ever."""
    model = mlp(45)
    pre = Gram(model)
    cache: dict[str, torch.Tensor] = {}

    def cached(i):
        for name, p in pre.named:
            if i > 0:
                p.grad.copy_(cache.setdefault(name, pre.turned(name, p.grad)))

    fit(observe, model, SGD(trainable(model), lr=0.05), pairs(16, 12, 4, 45), mse, before=cached)


@fault("momentum_buffer_replaces_gradient", "turned", "stale-gradient", "unrelated-gradient")
def momentum_buffer_replaces_gradient(observe):
    """A slow average with weight 0.999 on the past is written, which hardly contains the present gradient."""
    model = mlp(46)
    pre = Gram(model)
    slow: dict[str, torch.Tensor] = {}

    def averaged(i):
        for name, p in pre.named:
            new = pre.turned(name, p.grad)
            if i > 1:
                slow[name] = slow.get(name, new).lerp(new, 0.001)
                p.grad.copy_(slow[name])

    fit(observe, model, SGD(trainable(model), lr=0.05), pairs(16, 12, 4, 46, rows=2), mse, before=averaged)


@fault("only_one_optimizer_zeroed", "turned", "accumulated-across-steps")
def only_one_optimizer_zeroed(observe):
    """A and B have their own optimizers and the loop zeroes the gradients of A twice and of B never."""
    model = lm(47)
    opt_a = SGD([p for n, p in factors(model) if is_a(n)], lr=0.1)
    opt_b = SGD([p for n, p in factors(model) if not is_a(n)], lr=0.05)
    pre = Kfac(model)
    with observe(model):
        for ids in tokens(14, 47):
            opt_a.zero_grad()
            opt_a.zero_grad()
            lm_loss(model, ids).backward()
            pre.step()
            opt_a.step()
            opt_b.step()


@fault("zero_grad_on_a_stale_wrapper", "turned", "accumulated-across-steps")
def zero_grad_on_a_stale_wrapper(observe):
    """zero_grad goes to the frozen base's copy, so the preconditioned sums of all earlier steps stay in .grad."""
    model = attention(48, targets=("q", "v"))
    other = copy.deepcopy(model)
    opt = SGD(trainable(model), lr=0.02)
    pre = Kfac(model)
    with observe(model):
        for batch in pairs(14, 16, 3, 48, rows=4, length=4):
            other.zero_grad()
            mse(model, batch).backward()
            pre.step()
            opt.step()


@fault("undamped_inverse_of_one_sample", "turned", "blown-up")
def undamped_inverse_of_one_sample(observe):
    """The Gram matrix of a single sample is of rank one; its undamped inverse blows all later gradients up."""
    model = mlp(49)
    pre = Gram(model)
    first: dict[str, torch.Tensor] = {}

    def undamped(_):
        for name, p in pre.named:
            flat = rank_first(name, p.grad).double()
            if name not in first:
                if p.grad.any():
                    first[name] = torch.linalg.inv(flat @ flat.t() + 1e-9 * torch.eye(len(flat), dtype=flat.dtype))
            else:
                p.grad.copy_(rank_back(name, first[name] @ flat, p.grad))

    fit(observe, model, Adam(trainable(model), lr=1e-3), pairs(14, 12, 4, 49, rows=1), mse, before=undamped)


@fault("average_never_updated_from_zero", "turned", "blown-up", "scaled-only", "starved")
def average_never_updated_from_zero(observe):
    """The covariance stays at its zero start, and the root of its tiny epsilon multiplies gradients by a million."""
    model = lm(50)
    zeros = {n: torch.zeros(4, 4) for n, _ in factors(model)}

    def empty(_):
        for name, p in factors(model):
            m = torch.linalg.inv(zeros[name] + 1e-6 * torch.eye(4))
            p.grad.copy_(rank_back(name, m @ rank_first(name, p.grad), p.grad))

    fit(observe, model, AdamW(trainable(model), lr=1e-2), tokens(12, 50), before=empty)


@fault("inverse_root_of_a_zero_matrix", "turned", "non-finite", "blown-up")
def inverse_root_of_a_zero_matrix(observe):
    """The first root is taken before any statistics, zero to the power of minus a half, and writes NaN."""
    model = lm(51)
    pre = Gram(model)

    def undefended(_):
        for name, p in pre.named:
            if not p.grad.isfinite().all():
                continue
            s = pre.sums.get(name, torch.zeros(4, 4, dtype=torch.float64))
            w, q = torch.linalg.eigh(s)
            m = (q * w.pow(-0.5)) @ q.t()
            pre.observe(name, p.grad)
            p.grad.copy_(rank_back(name, m @ rank_first(name, p.grad).double(), p.grad))

    fit(observe, model, AdamW(trainable(model), lr=1e-2), tokens(8, 51), before=undefended)


@fault("half_precision_inverse_overflows", "turned", "non-finite", "blown-up")
def half_precision_inverse_overflows(observe):
    """The inverse is cast to float16 for speed, where its entries are infinite."""
    model = wake(attention(52, targets=("q", "v")))
    pre = Gram(model)

    def halved(_):
        for name, p in pre.named:
            flat = rank_first(name, p.grad).double()
            m = torch.linalg.inv(flat @ flat.t() * 1e-3 + 1e-8 * torch.eye(4, dtype=flat.dtype)).half()
            p.grad.copy_(rank_back(name, m.double() @ flat, p.grad))

    fit(observe, model, Adam(trainable(model), 1e-2), pairs(8, 16, 3, 52, rows=4, length=4), mse, before=halved)


@fault("scaled_gradients_clipped_before_unscaling", "turned", "clipped-to-nothing")
def scaled_gradients_clipped_before_unscaling(observe):
    """Clipping to one happens at loss scale 65536, and unscaling then shrinks the step to nothing."""
    model = wake(mlp(53))
    opt = SGD(trainable(model), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    pre = Gram(model)
    with observe(model):
        for batch in pairs(12, 12, 4, 53):
            opt.zero_grad()
            scaler.scale(mse(model, batch)).backward()
            pre.step()
            nn.utils.clip_grad_norm_(trainable(model), 1.0)
            scaler.step(opt)
            scaler.update()


@fault("clip_value_mistyped", "turned", "clipped-to-nothing")
def clip_value_mistyped(observe):
    """clip_grad_value_ gets 1e-10 where 1.0 was meant, after the preconditioner."""
    model = wake(lm(54))
    pre = Gram(model)

    def both(i):
        pre.step()
        nn.utils.clip_grad_value_(trainable(model), 1e-10)

    fit(observe, model, SGD(trainable(model), lr=0.3), tokens(12, 54), before=both)


@fault("clip_norm_mistyped_after_modifier", "turned", "clipped-to-nothing")
def clip_norm_mistyped_after_modifier(observe):
    """A clipping threshold of 1e-9 from a config in other units wipes out the turned gradient."""
    model = wake(attention(55))
    opt = SGD(trainable(model), lr=0.2)
    pre = Kfac(model)
    batches = pairs(12, 16, 3, 55, rows=4, length=4)
    fit(observe, model, opt, batches, mse, before=pre.step, clip=1e-9)


# ---------------------------------------------------------------------------------------------- delivered


@fault("trainer_writes_in_on_optimizer_step", "delivered", "modified-too-late")
def trainer_writes_in_on_optimizer_step(observe):
    """on_optimizer_step fires after the step of the optimizer, so the turned gradient is thrown away by zero_grad."""
    model = lm(60)
    trainer = hf(model, 10, [At("on_optimizer_step", Gram(model).step)])
    with observe(model):
        trainer.train()


@fault("substep_end_misses_the_last_micro_batch", "delivered", "applied-on-micro-steps", "overwritten")
def substep_end_misses_the_last_micro_batch(observe):
    """on_substep_end fires for all micro-batches but the last, whose raw gradient is added on top."""
    model = lm(61)
    trainer = hf(model, 10, [At("on_substep_end", Gram(model).step)], gradient_accumulation_steps=2)
    with observe(model):
        trainer.train()


@fault("optimizer_in_backward_then_modifier", "delivered", "modified-too-late")
def optimizer_in_backward_then_modifier(observe):
    """Each parameter steps inside backward by a hook; the modifier afterwards writes for nobody."""
    model = lm(62)
    opts = {p: SGD([p], lr=0.2) for p in trainable(model)}
    for p, opt in opts.items():
        p.register_post_accumulate_grad_hook(lambda _, opt=opt: opt.step())
    pre = Gram(model)
    with observe(model):
        for ids in tokens(12, 62):
            model.zero_grad()
            lm_loss(model, ids).backward()
            pre.step()


@fault("step_post_hook_instead_of_pre_hook", "delivered", "modified-too-late")
def step_post_hook_instead_of_pre_hook(observe):
    """The modifier is registered as a post-hook of the step."""
    model = attention(63, targets=("k", "v", "o"))
    opt = AdamW(trainable(model), lr=1e-2)
    opt.register_step_post_hook(Gram(model).step)
    fit(observe, model, opt, pairs(12, 16, 3, 63, rows=4, length=4), mse)


@fault("bucket_copied_back_over_it", "delivered", "overwritten")
def bucket_copied_back_over_it(observe):
    """Gradients are reduced in a flat bucket that was filled before the modifier and copied back after it."""
    model = lm(64)
    opt = AdamW(trainable(model), lr=1e-2)
    pre = Gram(model)
    with observe(model):
        for ids in tokens(12, 64):
            opt.zero_grad()
            lm_loss(model, ids).backward()
            held = [p for p in trainable(model) if p.grad is not None]
            bucket = nn.utils.parameters_to_vector([p.grad for p in held])
            pre.step()
            for p, piece in zip(held, bucket.split([p.numel() for p in held]), strict=True):
                p.grad.copy_(piece.view_as(p))
            opt.step()


@fault("zero_grad_between_modifier_and_step", "delivered", "dropped")
def zero_grad_between_modifier_and_step(observe):
    """zero_grad stands between the modifier and the step, so the step finds nothing."""
    model = wake(mlp(65))
    opt = AdamW(trainable(model), lr=1e-2)
    pre = Gram(model)
    with observe(model):
        for batch in pairs(12, 12, 4, 65):
            mse(model, batch).backward()
            pre.step()
            opt.zero_grad()
            opt.step()


@fault("zeroed_in_place_before_the_step", "delivered", "dropped", "overwritten")
def zeroed_in_place_before_the_step(observe):
    """A pre-hook meant for NaN clean-up zeroes every gradient in place right before the step."""
    model = wake(lm(66))
    opt = SGD(trainable(model), lr=0.2, momentum=0.0)
    pre = Gram(model)

    def tidy(opt, args, kw):
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad.masked_fill_(p.grad.isfinite(), 0.0)

    opt.register_step_pre_hook(tidy)
    fit(observe, model, opt, tokens(12, 66), before=pre.step)


@fault("noise_assigned_instead_of_added", "delivered", "overwritten", "unrelated-gradient")
def noise_assigned_instead_of_added(observe):
    """Annealed gradient noise is assigned with = where += was meant, after the modifier."""
    model = wake(lm(67))
    pre = Gram(model)
    made = torch.Generator().manual_seed(67)

    def noisy(i):
        pre.step()
        for p in trainable(model):
            p.grad = torch.randn(p.shape, generator=made) * 0.01 / (1 + i) ** 0.55

    fit(observe, model, SGD(trainable(model), lr=0.2), tokens(14, 67), before=noisy)


@fault("gradient_surgery_restores_task_gradients", "delivered", "overwritten")
def gradient_surgery_restores_task_gradients(observe):
    """Conflict resolution keeps per-task gradients from before the modifier and writes their sum after it."""
    model = attention(68)
    opt = Adam(trainable(model), lr=1e-2)
    pre = Gram(model)
    with observe(model):
        for x, y in pairs(12, 16, 3, 68, rows=4, length=4):
            tasks = []
            for column in (0, 1):
                opt.zero_grad()
                F.mse_loss(model(x)[..., column], y[..., column]).backward()
                tasks.append([p.grad.clone() for p in trainable(model)])
            for p, one, two in zip(trainable(model), *tasks, strict=True):
                p.grad = one + two
            pre.step()
            for p, one, two in zip(trainable(model), *tasks, strict=True):
                p.grad = one + two - min(0.0, (one * two).sum().item()) * one / (one.norm() ** 2 + 1e-9)
            opt.step()


@fault("second_hook_restores_raw_gradients", "delivered", "overwritten")
def second_hook_restores_raw_gradients(observe):
    """A gradient guard, hooked onto the optimizer later, puts back the copies it made in backward."""
    model = lm(69)
    opt = AdamW(trainable(model), lr=1e-2)
    pre = Gram(model)
    raw: dict[nn.Parameter, torch.Tensor] = {}
    for p in trainable(model):
        p.register_post_accumulate_grad_hook(lambda p: raw.__setitem__(p, p.grad.clone()))

    def guard(*_):
        for p, g in raw.items():
            if g.isfinite().all():
                p.grad = g.clone()

    opt.register_step_pre_hook(pre.step)
    opt.register_step_pre_hook(guard)
    fit(observe, model, opt, tokens(12, 69))


@fault("trainer_pre_step_callback_order", "delivered", "overwritten")
def trainer_pre_step_callback_order(observe):
    """A later callback at the same event writes back the averaged raw gradients it saved for logging."""
    model = lm(70, targets=("q_proj", "v_proj", "o_proj"))
    saved: dict[nn.Parameter, torch.Tensor] = {}

    def keep():
        saved.update({p: p.grad.clone() for p in trainable(model) if p.grad is not None})

    def put():
        for p, g in saved.items():
            p.grad = g

    calls = [At("on_pre_optimizer_step", f) for f in (keep, Gram(model).step, put)]
    trainer = hf(model, 10, calls)
    trainer.callback_handler.callbacks = [*calls, *[c for c in trainer.callback_handler.callbacks if c not in calls]]
    with observe(model):
        trainer.train()


@fault("auxiliary_backward_after_the_modifier", "delivered", "overwritten", "applied-on-micro-steps")
def auxiliary_backward_after_the_modifier(observe):
    """An auxiliary loss ten times the main one is backpropagated after the modifier and lands on top, raw."""
    model = lm(71)
    opt = SGD(trainable(model), lr=0.03)
    pre = Gram(model)
    with observe(model):
        for ids, other in zip(tokens(12, 71), tokens(12, 171), strict=True):
            opt.zero_grad()
            lm_loss(model, ids).backward()
            pre.step()
            (10 * lm_loss(model, other)).backward()
            opt.step()


# ---------------------------------------------------------------------------------------------- consumed


@fault("lora_initialised_after_the_optimizer", "consumed", "wrong-parameters")
def lora_initialised_after_the_optimizer(observe):
    """Own initialisation assigns new Parameter objects after the optimizer was built on the old ones."""
    model = lm(80)
    opt = AdamW(trainable(model), lr=1e-2)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for side in (module.lora_A["default"], module.lora_B["default"]):
                side.weight = nn.Parameter(torch.randn_like(side.weight) * 0.1)
    pre = Gram(model)
    with observe(model):
        for ids in tokens(10, 80):
            model.zero_grad()
            lm_loss(model, ids).backward()
            pre.step()
            opt.step()


@fault("optimizer_built_before_get_peft_model", "consumed", "wrong-parameters")
def optimizer_built_before_get_peft_model(observe):
    """The optimizer took the parameters of the base model before LoRA was added, and holds only frozen ones."""
    torch.manual_seed(81)
    base = llama()
    opt = AdamW(base.parameters(), lr=1e-2)
    model = wake(lora(base).train())
    pre = Gram(model)
    with observe(model):
        for ids in tokens(10, 81):
            model.zero_grad()
            lm_loss(model, ids).backward()
            pre.step()
            opt.step()


@fault("trainer_given_the_copys_optimizer", "consumed", "wrong-parameters")
def trainer_given_the_copys_optimizer(observe):
    """The optimizers argument holds an optimizer of another instance of the same model."""
    model = wake(lm(82))
    other = copy.deepcopy(model)
    opt = AdamW(trainable(other), lr=1e-2)
    call = At("on_pre_optimizer_step", Gram(model).step)
    trainer = hf(model, 8, [call], optimizers=(opt, LambdaLR(opt, lambda _: 1.0)))
    with observe(model):
        trainer.train()


@fault("reassigned_gradient_leaves_flat_buffer", "consumed", "not-consumed")
def reassigned_gradient_leaves_flat_buffer(observe):
    """The optimizer reads its flat buffer; assigning .grad detaches it from the buffer, which stays raw."""
    model = mlp(83)
    opt = FlatSgd(trainable(model), lr=0.1)
    pre = Gram(model)

    def assign(_):
        for name, p in pre.named:
            p.grad = pre.turned(name, p.grad)

    fit(observe, model, opt, pairs(14, 12, 4, 83), mse, before=assign)


@fault("closure_computes_the_gradient_again", "consumed", "not-consumed", "overwritten")
def closure_computes_the_gradient_again(observe):
    """The step gets a closure that zeroes and recomputes raw gradients after the modifier wrote."""
    model = lm(84)
    opt = SGD(trainable(model), lr=0.2)
    pre = Gram(model)
    with observe(model):
        for ids in tokens(12, 84):

            def closure(ids=ids):
                opt.zero_grad()
                loss = lm_loss(model, ids)
                loss.backward()
                return loss

            closure()
            pre.step()
            opt.step(closure)


class Remembering(Optimizer):
    """Steps by gradients that hooks took during backward."""

    def __init__(self, params, lr: float):
        super().__init__(list(params), {"lr": lr})
        self.taken: dict[nn.Parameter, torch.Tensor] = {}
        for p in self.param_groups[0]["params"]:
            p.register_post_accumulate_grad_hook(lambda p: self.taken.__setitem__(p, p.grad.detach().clone()))

    @torch.no_grad()
    def step(self, closure=None):
        """One update from what was taken."""
        for p, g in self.taken.items():
            p.add_(g, alpha=-self.param_groups[0]["lr"])


@fault("optimizer_took_gradients_in_backward", "consumed", "not-consumed")
def optimizer_took_gradients_in_backward(observe):
    """A partitioned optimizer copies gradients in backward hooks and never looks at .grad again."""
    model = attention(85)
    opt = Remembering(trainable(model), lr=0.2)
    pre = Gram(model)
    fit(observe, model, opt, pairs(12, 16, 3, 85, rows=4, length=4), mse, before=pre.step)


class Diagonal(Gram):
    """A fixed positive diagonal on the rank side."""

    def turned(self, name, g):
        scale = torch.tensor([4.0, 1.0, 0.25, 2.0])[: len(rank_first(name, g))]
        return rank_back(name, scale[:, None] * rank_first(name, g), g)


@fault("adam_cancels_a_fixed_diagonal", "consumed", "cancelled-by-optimizer")
def adam_cancels_a_fixed_diagonal(observe):
    """A constant diagonal M scales rows, and Adam divides each entry by its own scale again."""
    model = mlp(86)
    opt = Adam(trainable(model), lr=1e-2, eps=1e-15)
    fit(observe, model, opt, pairs(16, 12, 4, 86), mse, before=Diagonal(model).step)


@fault("sign_descent_cancels_a_diagonal", "consumed", "cancelled-by-optimizer")
def sign_descent_cancels_a_diagonal(observe):
    """The optimizer keeps only signs, which a positive diagonal never changes."""
    model = lm(87)
    fit(observe, model, SignSgd(trainable(model), lr=2e-3), tokens(14, 87), before=Diagonal(model).step)


@fault("rmsprop_cancels_a_fixed_diagonal", "consumed", "cancelled-by-optimizer")
def rmsprop_cancels_a_fixed_diagonal(observe):
    """RMSprop normalises each entry, so a fixed diagonal M has no say in the updates."""
    model = attention(88, targets=("q", "k", "v"))
    opt = torch.optim.RMSprop(trainable(model), lr=3e-3, eps=1e-15)
    fit(observe, model, opt, pairs(14, 16, 3, 88, rows=4, length=4), mse, before=Diagonal(model).step)


@fault("accumulation_longer_than_the_run", "consumed", "no-steps")
def accumulation_longer_than_the_run(observe):
    """The step waits for 64 micro-batches and the loader ends after 16."""
    model = wake(lm(89))
    opt = AdamW(trainable(model), lr=1e-2)
    pre = Gram(model)
    with observe(model):
        for i, ids in enumerate(tokens(16, 89)):
            opt.zero_grad()
            lm_loss(model, ids).backward()
            pre.step()
            if (i + 1) % 64 == 0:
                opt.step()


@fault("first_optimizer_stepped_twice", "consumed", "no-steps", "only-one-factor", "wrong-parameters")
def first_optimizer_stepped_twice(observe):
    """A typo steps the optimizer of B twice and that of A never."""
    model = lm(90)
    opt_a = AdamW([p for n, p in factors(model) if is_a(n)], lr=1e-2)
    opt_b = AdamW([p for n, p in factors(model) if not is_a(n)], lr=1e-2)
    pre = Gram(model)
    with observe(model):
        for ids in tokens(12, 90):
            opt_a.zero_grad()
            opt_b.zero_grad()
            lm_loss(model, ids).backward()
            pre.step()
            opt_b.step()
            opt_b.step()


# ---------------------------------------------------------------------------------------------- moved


@fault("bfloat16_weights_round_the_step_away", "moved", "no-update")
def bfloat16_weights_round_the_step_away(observe):
    """Factors of size one half in bfloat16 and a rate of 1e-6: each update is below half a unit in the last place."""
    model = enlarge(mlp(100, lora_alpha=0.2)).to(torch.bfloat16)
    opt = AdamW(trainable(model), lr=1e-6, weight_decay=0.0)
    batches = [(x.bfloat16(), y.bfloat16()) for x, y in pairs(12, 12, 4, 100)]
    fit(observe, model, opt, batches, mse, before=Gram(model).step)


@fault("integer_division_in_the_schedule", "moved", "learning-rate-zero")
def integer_division_in_the_schedule(observe):
    """The warm-up factor is step // 100, which is zero all along."""
    model = wake(lm(101))
    opt = AdamW(trainable(model), lr=1e-2)
    sched = LambdaLR(opt, lambda step: min(1, step // 100))
    fit(observe, model, opt, tokens(12, 101), before=Gram(model).step, sched=sched)


@fault("resumed_schedule_already_over", "moved", "learning-rate-zero")
def resumed_schedule_already_over(observe):
    """The scheduler and optimizer of a finished run are loaded, whose rate is zero."""
    model = wake(lm(102))
    opt = SGD(trainable(model), lr=0.2)
    sched = LambdaLR(opt, lambda step: max(0.0, 1 - step / 20))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(20):
            sched.step()
    saved = copy.deepcopy((sched.state_dict(), opt.state_dict()))
    again = SGD(trainable(model), lr=0.2)
    later = LambdaLR(again, lambda step: max(0.0, 1 - step / 20))
    later.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    fit(observe, model, again, tokens(12, 102), before=Gram(model).step, sched=later)


@fault("group_of_b_without_a_rate", "moved", "learning-rate-zero", "only-one-factor")
def group_of_b_without_a_rate(observe):
    """A LoRA+ ratio of zero in the config gives the group of B no learning rate."""
    model = wake(attention(103))
    ratio = 0.0
    groups = [
        {"params": [p for n, p in factors(model) if is_a(n)], "lr": 1e-2},
        {"params": [p for n, p in factors(model) if not is_a(n)], "lr": 1e-2 * ratio},
    ]
    pre = Kfac(model)
    fit(observe, model, AdamW(groups), pairs(12, 16, 3, 103, rows=4, length=4), mse, before=pre.step)


@fault("trainer_with_a_rate_of_zero", "moved", "learning-rate-zero")
def trainer_with_a_rate_of_zero(observe):
    """learning_rate is rounded to zero by a sweep that formats it with four digits."""
    model = wake(lm(104))
    trainer = hf(model, 8, [At("on_pre_optimizer_step", Gram(model).step)], learning_rate=float(f"{2e-5:.4f}"))
    with observe(model):
        trainer.train()


# ---------------------------------------------------------------------------------------------- kept


@fault("ema_weights_copied_in_and_left", "kept", "not-kept", "update-undone")
def ema_weights_copied_in_and_left(observe):
    """The averaged weights are copied into the model after each step for logging and stay there."""
    model = wake(lm(110))
    opt = SGD(trainable(model), lr=0.2)
    average = {p: p.detach().clone() for p in trainable(model)}

    @torch.no_grad()
    def swap(_):
        for p, e in average.items():
            e.lerp_(p, 0.01)
            p.copy_(e)

    fit(observe, model, opt, tokens(12, 110), before=Gram(model).step, after=swap)


@fault("best_adapter_reloaded_each_step", "kept", "not-kept", "update-undone")
def best_adapter_reloaded_each_step(observe):
    """The best state so far is never updated by a wrong comparison and gets loaded after each evaluation."""
    model = wake(lm(111))
    best = {n: t.clone() for n, t in get_peft_model_state_dict(model).items()}
    opt = AdamW(trainable(model), lr=1e-2)

    def evaluate(_):
        set_peft_model_state_dict(model, best)

    fit(observe, model, opt, tokens(12, 111), before=Gram(model).step, after=evaluate)


@fault("spike_guard_rolls_back", "kept", "not-kept", "update-undone")
def spike_guard_rolls_back(observe):
    """A loss-spike guard compares the loss with itself and restores the weights right after each step."""
    model = wake(mlp(112))
    opt = SGD(trainable(model), lr=0.1)
    held: list[torch.Tensor] = []

    def save(*_):
        held[:] = [p.detach().clone() for p in trainable(model)]

    @torch.no_grad()
    def rollback(i):
        for p, old in zip(trainable(model), held, strict=True):
            p.copy_(old)

    opt.register_step_pre_hook(save)
    fit(observe, model, opt, pairs(12, 12, 4, 112), mse, before=Gram(model).step, after=rollback)


@fault("line_search_rejects_everything", "kept", "not-kept", "update-undone")
def line_search_rejects_everything(observe):
    """Acceptance demands that the loss halves in one step, so each step is taken back before the next forward."""
    model = wake(lm(113))
    opt = SGD(trainable(model), lr=0.1)
    pre = Gram(model)
    with observe(model):
        for ids in tokens(12, 113):
            opt.zero_grad()
            loss = lm_loss(model, ids)
            loss.backward()
            pre.step()
            old = [p.detach().clone() for p in trainable(model)]
            opt.step()
            with torch.no_grad():
                if lm_loss(model, ids) > 0.5 * loss:
                    for p, o in zip(trainable(model), old, strict=True):
                        p.data.copy_(o)


@fault("server_broadcast_of_old_weights", "kept", "not-kept", "update-undone")
def server_broadcast_of_old_weights(observe):
    """A federated loop starts each round by broadcasting server weights that were never aggregated."""
    model = wake(attention(114))
    server = {n: t.clone() for n, t in model.state_dict().items()}
    opt = AdamW(trainable(model), lr=1e-2)
    pre = Gram(model)
    with observe(model):
        for batch in pairs(12, 16, 3, 114, rows=4, length=4):
            model.load_state_dict(server)
            opt.zero_grad()
            mse(model, batch).backward()
            pre.step()
            opt.step()


@fault("trainer_step_end_restores_snapshot", "kept", "not-kept", "update-undone")
def trainer_step_end_restores_snapshot(observe):
    """A callback at on_step_end swaps the weights saved at the start of training back in, as if after an evaluation."""
    model = wake(lm(115))
    start = [p.detach().clone() for p in trainable(model)]

    @torch.no_grad()
    def restore():
        for p, s in zip(trainable(model), start, strict=True):
            p.copy_(s)

    trainer = hf(model, 10, [At("on_pre_optimizer_step", Gram(model).step), At("on_step_end", restore)])
    with observe(model):
        trainer.train()


# ---------------------------------------------------------------------------------------------- throughout


@fault("name_filter_finds_only_a", "throughout", "only-one-factor")
def name_filter_finds_only_a(observe):
    """The list of tensors is made with a filter on lora_A, so B gets its raw gradients."""
    model = lm(120)
    fit(observe, model, AdamW(trainable(model), lr=1e-2), tokens(14, 120), before=Gram(model, "lora_A").step)


@fault("only_first_group_of_loraplus", "throughout", "only-one-factor")
def only_first_group_of_loraplus(observe):
    """The modifier walks over param_groups[0], which in LoRA+ holds the first factors alone."""
    model = lm(121)
    opt = create_loraplus_optimizer(model, AdamW, lr=2e-3, loraplus_lr_ratio=8)
    pre = Gram(model)
    held = {id(p) for p in opt.param_groups[0]["params"]}
    pre.named = [(n, p) for n, p in pre.named if id(p) in held]
    fit(observe, model, opt, tokens(14, 121), before=pre.step)


@fault("filter_of_one_projection", "throughout", "only-some-layers")
def filter_of_one_projection(observe):
    """Targets were widened to four projections and the filter of the modifier still says q_proj."""
    model = lm(122, layers=2, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
    fit(observe, model, AdamW(trainable(model), lr=1e-2), tokens(12, 122), before=Gram(model, "q_proj.lora_").step)


@fault("trainer_modifier_gives_up_silently", "throughout", "stopped")
def trainer_modifier_gives_up_silently(observe):
    """From step seven on an exception of the modifier is swallowed by a bare except and gradients stay raw."""
    model = lm(123)
    pre = Gram(model)

    def guarded():
        with contextlib.suppress(Exception):
            if pre.count >= 6:
                raise RuntimeError("did not converge")
            pre.step()

    trainer = hf(model, 18, [At("on_pre_optimizer_step", guarded)])
    with observe(model):
        trainer.train()


@fault("new_layers_added_without_modifier", "throughout", "only-some-layers", "stopped")
def new_layers_added_without_modifier(observe):
    """Progressive unfreezing adds the second layer's factors to the optimizer only, not to the modifier."""
    model = lm(124, layers=2)
    late = [p for n, p in factors(model) if "layers.1." in n]
    for p in late:
        p.requires_grad_(False)
    opt = AdamW(trainable(model), lr=1e-2)
    pre = Gram(model)

    def unfreeze(i):
        if i == 5:
            for p in late:
                p.requires_grad_(True)
            opt.add_param_group({"params": late})

    fit(observe, model, opt, tokens(18, 124), before=pre.step, after=unfreeze)


@fault("modules_search_overlooks_embeddings", "throughout", "only-some-layers")
def modules_search_overlooks_embeddings(observe):
    """The modifier looks for lora_A by name and misses the factors of the embedding, called lora_embedding_A."""
    model = lm(125, targets=("embed_tokens", "q_proj", "v_proj"))
    pre = Gram(model)
    pre.named = [(n, p) for n, p in pre.named if "lora_A" in n or "lora_B" in n]
    fit(observe, model, AdamW(trainable(model), lr=1e-2), tokens(14, 125), before=pre.step)


@fault("hook_handles_removed_at_checkpoint", "throughout", "stopped")
def hook_handles_removed_at_checkpoint(observe):
    """Saving a checkpoint removes all tensor hooks to make the model picklable and does not put them back."""
    model = mlp(126)
    opt = SGD(trainable(model), lr=0.1)
    pre = Gram(model)
    handles = [p.register_post_accumulate_grad_hook(hook_in_place(pre, n)) for n, p in pre.named]

    def checkpoint(i):
        if i == 6:
            for handle in handles:
                handle.remove()

    fit(observe, model, opt, pairs(18, 12, 4, 126), mse, after=checkpoint)


@fault("alternating_run_modifies_one_phase", "throughout", "only-one-factor")
def alternating_run_modifies_one_phase(observe):
    """A and B are trained in turns and the modifier is called only in the turns of B."""
    model = lm(127)
    opts = {part: SGD([p for n, p in factors(model) if part in n], lr=0.2) for part in ("lora_A", "lora_B")}
    pre = Gram(model, "lora_B")
    with observe(model):
        for i, ids in enumerate(tokens(20, 127)):
            part = "lora_A" if i % 2 else "lora_B"
            model.zero_grad()
            lm_loss(model, ids).backward()
            if part == "lora_B":
                pre.step()
            opts[part].step()


@fault("schedule_stepped_at_each_micro_batch", "throughout", "learning-rate-zero", "stopped")
def schedule_stepped_at_each_micro_batch(observe):
    """A linear decay counted in optimizer steps is advanced at each of four micro-batches: zero from a quarter on."""
    model = mlp(128)
    opt = AdamW(trainable(model), lr=1e-2)
    sched = LambdaLR(opt, lambda step: max(0.0, 1 - step / 20))
    pre = Gram(model)
    with observe(model):
        for i, batch in enumerate(pairs(80, 12, 4, 128, rows=4)):
            (mse(model, batch) / 4).backward()
            if i % 4 == 3:
                pre.step()
                opt.step()
                opt.zero_grad()
            sched.step()


@fault("interval_counter_off_by_a_unit", "throughout", "stopped")
def interval_counter_off_by_a_unit(observe):
    """The limit of modified steps is given in epochs of six steps and taken for optimizer steps."""
    model = attention(129)
    pre = Kfac(model)
    epochs = 6

    def limited(i):
        if i < epochs:
            pre.step()

    opt = SGD(trainable(model), lr=0.2)
    fit(observe, model, opt, pairs(20, 16, 3, 129, rows=4, length=4), mse, before=limited)


@fault("second_adapter_left_raw", "throughout", "only-some-layers")
def second_adapter_left_raw(observe):
    """Two adapters are active at once and the modifier was built when there was only the first."""
    model = attention(130, targets=("q", "v"))
    pre = Gram(model)
    model.add_adapter("extra", LoraConfig(r=3, target_modules=["k", "o"]))
    model.base_model.set_adapter(["default", "extra"])
    opt = AdamW(trainable(model), lr=1e-2)
    fit(observe, model, opt, pairs(14, 16, 3, 130, rows=4, length=4), mse, before=pre.step)


@fault("shape_guard_skips_the_wide_layers", "throughout", "only-some-layers")
def shape_guard_skips_the_wide_layers(observe):
    """A size limit meant for full gradients leaves out every factor with more than a hundred entries."""
    model = lm(131, targets=("q_proj", "down_proj"))
    pre = Gram(model)
    pre.named = [(n, p) for n, p in pre.named if p.numel() <= 100]
    fit(observe, model, SGD(trainable(model), lr=0.2), tokens(12, 131), before=pre.step)


# ---------------------------------------------------------------------------------------------- further ones


@fault("sft_packing_modifier_after_the_step", "delivered", "modified-too-late")
def sft_packing_modifier_after_the_step(observe):
    """In SFTTrainer with packing and DoRA the callback sits at on_optimizer_step, which comes after the step."""
    model = lm(140, use_dora=True)
    rows = [{"text": phrase(i, 6 + i % 9)} for i in range(60)]
    calls = [At("on_optimizer_step", Gram(model).step)]
    trainer = sft(model, rows, 10, calls, packing=True, packing_strategy="wrapped")
    with observe(model):
        trainer.train()


@fault("sft_modifier_knows_attention_only", "throughout", "only-some-layers")
def sft_modifier_knows_attention_only(observe):
    """SFTTrainer on all linear layers, and a modifier that looks for self_attn in the names."""
    model = lm(141, targets=("q_proj", "v_proj", "up_proj", "down_proj"), use_rslora=True)
    calls = [At("on_pre_optimizer_step", Gram(model, "self_attn").step)]
    trainer = sft(model, completions(), 10, calls, completion_only_loss=True)
    with observe(model):
        trainer.train()


@fault("sft_callback_returns_after_first_epoch", "throughout", "stopped")
def sft_callback_returns_after_first_epoch(observe):
    """The callback compares state.epoch with one and leaves all later epochs alone."""
    model = lm(142, init_lora_weights="gaussian")
    pre = Gram(model)

    class FirstEpoch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kw):
            if state.epoch < 1:
                pre.step()

    trainer = sft(model, chats(), 22, [FirstEpoch()], assistant_only_loss=True)
    with observe(model):
        trainer.train()


class Polar(Optimizer):
    """Steps along the polar factor of each gradient, as Muon does, but exactly and without momentum."""

    def __init__(self, params, lr: float):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        """One update."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    u, _, v = torch.linalg.svd(p.grad.double(), full_matrices=False)
                    p.add_((u @ v).to(p.dtype), alpha=-group["lr"])


@fault("polar_steps_whiten_again", "consumed", "cancelled-by-optimizer")
def polar_steps_whiten_again(observe):
    """An orthogonalising optimizer takes the polar factor, the same for G and for its exactly whitened form."""
    model = wake(mlp(143), 0.3)
    pre = Gram(model)

    def whiten(_):
        for name, p in pre.named:
            flat = rank_first(name, p.grad).double()
            p.grad.copy_(rank_back(name, inverse_root(flat @ flat.t(), 0.5, 1e-12) @ flat, p.grad))

    fit(observe, model, Polar(trainable(model), lr=5e-3), pairs(14, 12, 4, 143), mse, before=whiten)


@fault("rate_multiplied_into_the_gradient", "turned", "scaled-only")
def rate_multiplied_into_the_gradient(observe):
    """A per-layer factor meant for the rates is multiplied into gradients in place of the matrix."""
    model = lm(144, layers=2)
    opt = SGD(trainable(model), lr=0.5)

    def scale(_):
        for name, p in factors(model):
            p.grad.mul_(0.3 if "layers.0." in name else 0.6)

    fit(observe, model, opt, tokens(12, 144), before=scale)


@fault("lookahead_never_leaves_its_slow_weights", "kept", "not-kept", "update-undone")
def lookahead_never_leaves_its_slow_weights(observe):
    """Lookahead with interval one and alpha zero puts its slow weights back after each step."""
    model = wake(lm(145))
    opt = Lookahead(AdamW(trainable(model), lr=1e-2), every=1, alpha=0.0)
    fit(observe, model, opt, tokens(12, 145), before=Gram(model).step)


@fault("rate_in_the_wrong_unit", "moved", "no-update")
def rate_in_the_wrong_unit(observe):
    """A rate of 1e-11 on weights near one half: float32 rounds each update away."""
    model = enlarge(attention(146, targets=("q", "v"), lora_alpha=1))
    opt = Adam(trainable(model), lr=1e-11)
    fit(observe, model, opt, pairs(12, 16, 3, 146, rows=4, length=4), mse, before=Gram(model).step)


@fault("adapter_loaded_again_from_disk", "kept", "not-kept", "update-undone")
def adapter_loaded_again_from_disk(observe):
    """Each step ends with load_adapter from a folder that was written once before training."""
    model = wake(lm(147))
    opt = AdamW(trainable(model), lr=1e-2)
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)

    def reload(_):
        model.load_adapter(folder, "default", is_trainable=True)

    fit(observe, model, opt, tokens(8, 147), before=Gram(model).step, after=reload)


@fault("noise_swamps_the_turned_gradient", "delivered", "overwritten", "unrelated-gradient")
def noise_swamps_the_turned_gradient(observe):
    """Privacy noise of forty times the gradient's norm is added after the modifier."""
    model = wake(attention(148))
    pre = Gram(model)
    made = torch.Generator().manual_seed(148)

    def private(_):
        pre.step()
        for p in trainable(model):
            noise = torch.randn(p.shape, generator=made)
            p.grad.add_(noise * 40 * p.grad.norm() / noise.norm())

    opt = SGD(trainable(model), lr=1e-3)
    fit(observe, model, opt, pairs(14, 16, 3, 148, rows=4, length=4), mse, before=private)


# ============================================================================================== sound
# ---------------------------------------------------------------------------------------------- no modifier


@sound("plain_lbfgs", "no-modifier")
def plain_lbfgs(observe):
    """LBFGS evaluates its closure several times per step; nothing changes gradients."""
    model = mlp(200)
    opt = torch.optim.LBFGS(trainable(model), lr=0.3, max_iter=3, history_size=4)
    batch = pairs(1, 12, 4, 200)[0]
    with observe(model):
        for _ in range(8):

            def closure():
                opt.zero_grad()
                loss = mse(model, batch)
                loss.backward()
                return loss

            opt.step(closure)


@sound("plain_muon", "no-modifier")
def plain_muon(observe):
    """Muon orthogonalises inside its step; the gradients themselves are plain."""
    model = lm(201, layers=2)
    fit(observe, model, torch.optim.Muon(trainable(model), lr=1e-2, weight_decay=0.0), tokens(10, 201))


@sound("plain_adafactor_relative_steps", "no-modifier")
def plain_adafactor_relative_steps(observe):
    """Adafactor with its own relative rates, whose group carries lr None."""
    model = lm(202)
    opt = Adafactor(trainable(model), scale_parameter=True, relative_step=True, warmup_init=False, lr=None)
    fit(observe, model, opt, tokens(12, 202))


@sound("plain_sam", "no-modifier")
def plain_sam(observe):
    """Sharpness-aware steps: climb, second backward, come back, descend."""
    model = mlp(203)
    opt = SGD(trainable(model), lr=0.1, momentum=0.9)
    with observe(model):
        for batch in pairs(12, 12, 4, 203):
            opt.zero_grad()
            mse(model, batch).backward()
            with torch.no_grad():
                norm = torch.stack([p.grad.norm() for p in trainable(model)]).norm() + 1e-12
                climbs = [0.02 * p.grad / norm for p in trainable(model)]
                for p, e in zip(trainable(model), climbs, strict=True):
                    p.add_(e)
            opt.zero_grad()
            mse(model, batch).backward()
            with torch.no_grad():
                for p, e in zip(trainable(model), climbs, strict=True):
                    p.sub_(e)
            opt.step()


@sound("plain_lookahead", "no-modifier")
def plain_lookahead(observe):
    """Lookahead draws the weights halfway back every fourth step as part of its update rule."""
    model = lm(204)
    fit(observe, model, Lookahead(AdamW(trainable(model), lr=1e-2)), tokens(14, 204))


@sound("plain_ema_beside_the_model", "no-modifier")
def plain_ema_beside_the_model(observe):
    """An averaged copy is kept beside the model and evaluated there."""
    model = lm(205)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    def follow(i):
        ema.update_parameters(model)
        if i % 4 == 3:
            with torch.no_grad():
                lm_loss(ema.module, tokens(1, 5)[0])

    fit(observe, model, AdamW(trainable(model), lr=1e-2), tokens(12, 205), after=follow)


@sound("plain_swa_with_swap_and_restore", "no-modifier")
def plain_swa_with_swap_and_restore(observe):
    """Averages are swapped in for an evaluation every third step and the training weights put back before the next."""
    model = mlp(206)
    opt = SGD(trainable(model), lr=0.1)
    mean = [p.detach().clone() for p in trainable(model)]

    @torch.no_grad()
    def evaluate(i):
        for p, m in zip(trainable(model), mean, strict=True):
            m.lerp_(p, 1 / (i + 2))
        if i % 3 == 2:
            live = [p.detach().clone() for p in trainable(model)]
            for p, m in zip(trainable(model), mean, strict=True):
                p.copy_(m)
            mse(model, pairs(1, 12, 4, 7)[0])
            for p, w in zip(trainable(model), live, strict=True):
                p.copy_(w)

    fit(observe, model, opt, pairs(14, 12, 4, 206), mse, after=evaluate)


@sound("plain_grad_scaler_on_cpu", "no-modifier")
def plain_grad_scaler_on_cpu(observe):
    """Half-precision autocast with a scaler whose first steps overflow and are skipped, then all goes on."""
    model = mlp(207)
    opt = SGD(trainable(model), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    with observe(model):
        for x, y in pairs(24, 12, 4, 207):
            opt.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                out = model(x)
            scaler.scale(F.mse_loss(out.float(), y)).backward()
            scaler.step(opt)
            scaler.update()


@sound("plain_bfloat16_autocast", "no-modifier")
def plain_bfloat16_autocast(observe):
    """Autocast to bfloat16 with float32 factors."""
    model = lm(208)
    opt = AdamW(trainable(model), lr=1e-2)
    with observe(model):
        for ids in tokens(10, 208):
            opt.zero_grad(set_to_none=False)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = lm_loss(model, ids)
            loss.backward()
            opt.step()


@sound("plain_checkpointing_reentrant", "no-modifier")
def plain_checkpointing_reentrant(observe):
    """Reentrant checkpointing with input gradients enabled as it should be."""
    model = lm(209, layers=2)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    fit(observe, model.train(), AdamW(trainable(model), lr=1e-2), tokens(10, 209))


@sound("plain_compiled_block", "no-modifier")
def plain_compiled_block(observe):
    """A submodule is compiled with the eager backend."""
    model = mlp(210)
    inner = model.base_model.model
    inner.mid.forward = torch.compile(inner.mid.forward, backend="eager")
    fit(observe, model, AdamW(trainable(model), lr=1e-2), pairs(10, 12, 4, 210), mse)


@sound("plain_fused_adamw", "no-modifier")
def plain_fused_adamw(observe):
    """The fused implementation on the CPU."""
    model = lm(211)
    fit(observe, model, AdamW(trainable(model), lr=1e-2, fused=True), tokens(12, 211), clip=1.0)


@sound("plain_loraplus_cosine", "no-modifier")
def plain_loraplus_cosine(observe):
    """LoRA+ groups with a cosine that ends at zero after the last step."""
    model = lm(212)
    opt = create_loraplus_optimizer(model, AdamW, lr=1e-3, loraplus_lr_ratio=16)
    fit(observe, model, opt, tokens(14, 212), sched=CosineAnnealingLR(opt, 14))


@sound("plain_two_optimizers", "no-modifier")
def plain_two_optimizers(observe):
    """SGD for the first factors and Adam for the second ones."""
    model = attention(213)
    opts = [
        SGD([p for n, p in factors(model) if is_a(n)], lr=0.2),
        Adam([p for n, p in factors(model) if not is_a(n)], lr=1e-2),
    ]
    with observe(model):
        for batch in pairs(12, 16, 3, 213, rows=4, length=4):
            mse(model, batch).backward()
            for opt in opts:
                opt.step()
                opt.zero_grad()


@sound("plain_alternating_factors", "no-modifier")
def plain_alternating_factors(observe):
    """A and B take turns of two steps, frozen while the other learns."""
    model = lm(214)
    both = {part: [p for n, p in factors(model) if part in n] for part in ("lora_A", "lora_B")}
    opts = {part: AdamW(ps, lr=1e-2) for part, ps in both.items()}
    with observe(model):
        for i, ids in enumerate(tokens(16, 214)):
            now = "lora_A" if i // 2 % 2 else "lora_B"
            for part, ps in both.items():
                for p in ps:
                    p.requires_grad_(part == now)
            opts[now].zero_grad()
            lm_loss(model, ids).backward()
            opts[now].step()


@sound("plain_optimizer_in_backward", "no-modifier")
def plain_optimizer_in_backward(observe):
    """One small optimizer per parameter, stepped and zeroed by a hook inside backward."""
    model = lm(215)
    opts = {p: AdamW([p], lr=1e-2) for p in trainable(model)}

    def update(p):
        opts[p].step()
        opts[p].zero_grad()

    for p in opts:
        p.register_post_accumulate_grad_hook(update)
    with observe(model):
        for ids in tokens(12, 215):
            lm_loss(model, ids).backward()


@sound("plain_group_added_midway", "no-modifier")
def plain_group_added_midway(observe):
    """The second layer's factors join the optimizer after six steps."""
    model = lm(216, layers=2)
    late = [p for n, p in factors(model) if "layers.1." in n]
    for p in late:
        p.requires_grad_(False)
    opt = AdamW(trainable(model), lr=1e-2)

    def widen(i):
        if i == 5:
            for p in late:
                p.requires_grad_(True)
            opt.add_param_group({"params": late, "lr": 5e-3})

    fit(observe, model, opt, tokens(14, 216), after=widen)


@sound("plain_trainer_accumulation", "no-modifier")
def plain_trainer_accumulation(observe):
    """The Trainer with accumulation, warm-up and cosine decay."""
    trainer = hf(lm(217), 8, gradient_accumulation_steps=2, lr_scheduler_type="cosine", warmup_steps=2)
    with observe(trainer.model):
        trainer.train()


@sound("plain_trainer_adafactor_checkpointing", "no-modifier")
def plain_trainer_adafactor_checkpointing(observe):
    """The Trainer with Adafactor and checkpointing."""
    model = lm(218, layers=2)
    trainer = hf(
        model,
        8,
        optim="adafactor",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    with observe(model):
        trainer.train()


@sound("plain_sft_packing", "no-modifier")
def plain_sft_packing(observe):
    """SFTTrainer with packing."""
    model = lm(219)
    rows = [{"text": phrase(i, 6 + i % 9)} for i in range(60)]
    trainer = sft(model, rows, 8, packing=True, packing_strategy="wrapped")
    with observe(model):
        trainer.train()


@sound("plain_sft_completion_only", "no-modifier")
def plain_sft_completion_only(observe):
    """SFTTrainer with loss on completions and two micro-batches."""
    model = lm(220)
    trainer = sft(model, completions(), 8, completion_only_loss=True, gradient_accumulation_steps=2)
    with observe(model):
        trainer.train()


@sound("plain_sft_assistant_masks", "no-modifier")
def plain_sft_assistant_masks(observe):
    """SFTTrainer with loss on assistant turns from the template's generation marks."""
    model = lm(221)
    trainer = sft(model, chats(), 8, assistant_only_loss=True)
    with observe(model):
        trainer.train()


@sound("plain_dpo_two_adapters", "no-modifier")
def plain_dpo_two_adapters(observe):
    """A preference loss with a reference adapter that is swapped in for its forwards and out again."""
    model = lm(222)
    model.add_adapter("reference", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("default")
    opt = AdamW(trainable(model), lr=1e-2)
    with observe(model):
        for good, bad in zip(tokens(10, 222), tokens(10, 322), strict=True):
            opt.zero_grad()
            model.set_adapter("reference")
            with torch.no_grad():
                anchor = lm_loss(model, good) - lm_loss(model, bad)
            model.set_adapter("default")
            margin = lm_loss(model, good) - lm_loss(model, bad)
            (-F.logsigmoid(anchor - margin)).backward()
            opt.step()


@sound("plain_accelerate_accumulate", "no-modifier")
def plain_accelerate_accumulate(observe):
    """The usual accumulate() loop with clipping and a prepared scheduler."""
    model = attention(223, targets=("q", "v"))
    acc = Accelerator(cpu=True, gradient_accumulation_steps=2)
    opt = AdamW(trainable(model), lr=1e-2)
    ready, opt, sched = acc.prepare(model, opt, LambdaLR(opt, lambda s: 1 / (1 + 0.1 * s)))
    with observe(model):
        for batch in pairs(24, 16, 3, 223, rows=4, length=4):
            with acc.accumulate(ready):
                acc.backward(mse(ready, batch))
                if acc.sync_gradients:
                    acc.clip_grad_norm_(ready.parameters(), 1.0)
                opt.step()
                sched.step()
                opt.zero_grad()


@sound("plain_dora_with_dropout", "no-modifier")
def plain_dora_with_dropout(observe):
    """DoRA with dropout; magnitudes learn beside the factors."""
    model = lm(224, use_dora=True, lora_dropout=0.2)
    fit(observe, model, AdamW(trainable(model), lr=1e-2), tokens(10, 224))


@sound("plain_modules_to_save", "no-modifier")
def plain_modules_to_save(observe):
    """The head is trained whole."""
    model = lm(225, modules_to_save=["lm_head"])
    fit(observe, model, AdamW(trainable(model), lr=5e-3), tokens(10, 225))


@sound("plain_trainable_tokens", "no-modifier")
def plain_trainable_tokens(observe):
    """A few new tokens learn beside LoRA."""
    model = lm(226, trainable_token_indices={"embed_tokens": [5, 6, 7]})
    fit(observe, model, AdamW(trainable(model), lr=1e-2), tokens(10, 226))


class Bare(nn.Module):
    """A net whose weights are bare parameters."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Parameter(torch.randn(16, 12) / 4)
        self.leave = nn.Parameter(torch.randn(4, 16) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.enter.t()) @ self.leave.t()


@sound("plain_target_parameters", "no-modifier")
def plain_target_parameters(observe):
    """LoRA on bare parameters instead of modules."""
    torch.manual_seed(227)
    model = get_peft_model(
        nn.Sequential(Bare()), LoraConfig(r=4, target_modules=[], target_parameters=["enter", "leave"])
    )
    fit(observe, model, AdamW(trainable(model), lr=1e-2), pairs(12, 12, 4, 227), mse)


@sound("plain_embedding_lora", "no-modifier")
def plain_embedding_lora(observe):
    """LoRA on the embedding table, whose first factor has gradients on visited rows alone."""
    model = lm(228, targets=("embed_tokens", "v_proj"))
    fit(observe, model, torch.optim.Adagrad(trainable(model), lr=0.05), tokens(12, 228))


def gpt(seed: int, **kw) -> PeftModel:
    """A small GPT-2 with LoRA on its Conv1D layers."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=32, initializer_range=0.2)
    return lora(GPT2LMHeadModel(config), ("c_attn", "c_proj"), fan_in_fan_out=True, **kw).train()


@sound("plain_conv1d", "no-modifier")
def plain_conv1d(observe):
    """GPT-2 with its transposed linear layers, RMSprop."""
    model = gpt(229)
    fit(observe, model, torch.optim.RMSprop(trainable(model), lr=3e-3), tokens(10, 229))


@sound("plain_freeze_halfway", "no-modifier")
def plain_freeze_halfway(observe):
    """The lower layer's factors are frozen on purpose after half of the run."""
    model = lm(230, layers=2)

    def freeze(i):
        if i == 7:
            for n, p in factors(model):
                p.requires_grad_("layers.0." not in n)

    fit(observe, model, AdamW(trainable(model), lr=1e-2), tokens(16, 230), after=freeze)


@sound("plain_clip_value", "no-modifier")
def plain_clip_value(observe):
    """Value clipping that bites on the larger entries only."""
    model = lm(231)
    opt = SGD(trainable(model), lr=0.2)

    def clip(_):
        nn.utils.clip_grad_value_(trainable(model), 0.2)

    fit(observe, model, opt, tokens(12, 231), before=clip)


@sound("plain_tied_embeddings", "no-modifier")
def plain_tied_embeddings(observe):
    """Embedding and head share one frozen weight."""
    torch.manual_seed(232)
    model = lora(llama(tie_word_embeddings=True), ("q_proj", "o_proj", "up_proj")).train()
    fit(observe, model, torch.optim.NAdam(trainable(model), lr=1e-2), tokens(10, 232))


@sound("plain_skips_bad_batches", "no-modifier")
def plain_skips_bad_batches(observe):
    """Batches whose loss is not finite are skipped, as they ought to be."""
    model = mlp(233)
    opt = AdamW(trainable(model), lr=1e-2)
    with observe(model):
        for i, (x, y) in enumerate(pairs(18, 12, 4, 233)):
            opt.zero_grad()
            loss = mse(model, (x * float("nan") if i % 6 == 2 else x, y))
            if not loss.isfinite():
                continue
            loss.backward()
            opt.step()


@sound("plain_input_noise", "no-modifier")
def plain_input_noise(observe):
    """Noise on the embeddings by a forward hook, as NEFTune does."""
    model = lm(234)
    table = model.base_model.model.get_input_embeddings()
    table.register_forward_hook(lambda module, inputs, out: out + 0.05 * torch.randn_like(out))
    fit(observe, model, AdamW(trainable(model), lr=1e-2), tokens(10, 234))


@sound("plain_rprop", "no-modifier")
def plain_rprop(observe):
    """Rprop on one fixed batch."""
    model = mlp(235)
    fit(observe, model, torch.optim.Rprop(trainable(model), lr=1e-3), pairs(1, 12, 4, 235) * 10, mse)


@sound("plain_maximised_reward", "no-modifier")
def plain_maximised_reward(observe):
    """A reward is maximised with maximize=True."""
    model = mlp(236)
    opt = SGD(trainable(model), lr=0.1, maximize=True, foreach=True)
    fit(observe, model, opt, pairs(12, 12, 4, 236), lambda m, b: -mse(m, b))


@sound("plain_resume_in_a_new_process", "no-modifier")
def plain_resume_in_a_new_process(observe):
    """Adapter and optimizer are saved, loaded into new objects and trained on."""
    first = lm(237)
    old = AdamW(trainable(first), lr=1e-2)
    fit(lambda m: contextlib.nullcontext(), first, old, tokens(6, 237))
    with tempfile.TemporaryDirectory() as folder:
        first.save_pretrained(folder)
        torch.manual_seed(237)
        model = PeftModel.from_pretrained(llama(), folder, is_trainable=True).train()
    opt = AdamW(trainable(model), lr=1e-2)
    opt.load_state_dict(old.state_dict())
    fit(observe, model, opt, tokens(10, 337))


@sound("plain_onecycle", "no-modifier")
def plain_onecycle(observe):
    """OneCycle moves rate and momentum."""
    model = lm(238)
    opt = SGD(trainable(model), lr=0.01, momentum=0.9)
    fit(observe, model, opt, tokens(16, 238), sched=OneCycleLR(opt, 0.3, total_steps=16))


@sound("plain_module_without_lora", "no-modifier")
def plain_module_without_lora(observe):
    """A plain module, fully trained, with weight decay groups."""
    torch.manual_seed(239)
    model = Mlp()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    fit(observe, model, AdamW(groups, lr=5e-3), pairs(12, 12, 4, 239), mse)


@sound("plain_layerwise_rates", "no-modifier")
def plain_layerwise_rates(observe):
    """Each layer has its own rate, falling by depth."""
    model = lm(240, layers=3)
    groups = [
        {"params": [p for n, p in factors(model) if f"layers.{i}." in n], "lr": 1e-2 * 0.7 ** (2 - i)} for i in range(3)
    ]
    fit(observe, model, AdamW(groups), tokens(10, 240))


@sound("plain_two_tasks_two_adapters", "no-modifier")
def plain_two_tasks_two_adapters(observe):
    """Two adapters for two tasks are trained in turns with an optimizer each."""
    model = attention(241, targets=("q", "v"))
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q", "v"]))
    opts = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        opts[name] = AdamW(trainable(model), lr=1e-2)
    with observe(model):
        for i, batch in enumerate(pairs(20, 16, 3, 241, rows=4, length=4)):
            name = "second" if i % 2 else "default"
            model.set_adapter(name)
            opts[name].zero_grad()
            mse(model, batch).backward()
            opts[name].step()


@sound("plain_two_losses_two_backwards", "no-modifier")
def plain_two_losses_two_backwards(observe):
    """Two losses are backpropagated one after the other into the same gradients."""
    model = lm(242)
    opt = Lion(trainable(model), lr=2e-3)
    with observe(model):
        for one, two in zip(tokens(12, 242), tokens(12, 342), strict=True):
            opt.zero_grad()
            lm_loss(model, one).backward()
            (0.3 * lm_loss(model, two)).backward()
            opt.step()


@sound("plain_gradcache_chunks", "no-modifier")
def plain_gradcache_chunks(observe):
    """A contrastive loss in chunks: representation gradients are cached and fed back by surrogate losses."""
    model = mlp(243)
    opt = AdamW(trainable(model), lr=1e-2)
    with observe(model):
        for x, _ in pairs(10, 12, 4, 243):
            opt.zero_grad()
            with torch.no_grad():
                cached = torch.cat([model(c) for c in x.split(8)]).requires_grad_()
            logits = F.normalize(cached, dim=-1) @ F.normalize(cached.detach().roll(1, 0), dim=-1).t()
            F.cross_entropy(5 * logits, torch.arange(len(x)) // 2).backward()
            for c, g in zip(x.split(8), cached.grad.split(8), strict=True):
                (model(c) * g).sum().backward()
            opt.step()


@sound("plain_pissa", "no-modifier")
def plain_pissa(observe):
    """PiSSA starts both factors from the weight's leading singular vectors."""
    model = attention(244, init_lora_weights="pissa")
    fit(observe, model, AdamW(trainable(model), lr=1e-3), pairs(10, 16, 3, 244, rows=4, length=4), mse)


@sound("plain_manual_autograd_grad", "no-modifier")
def plain_manual_autograd_grad(observe):
    """Gradients come from autograd.grad and are put into .grad by hand."""
    model = mlp(245)
    opt = AdamW(trainable(model), lr=1e-2)
    with observe(model):
        for batch in pairs(12, 12, 4, 245):
            held = trainable(model)
            for p, g in zip(held, torch.autograd.grad(mse(model, batch), held), strict=True):
                p.grad = g
            opt.step()


@sound("plain_merge_and_unmerge_for_eval", "no-modifier")
def plain_merge_and_unmerge_for_eval(observe):
    """Every fourth step the adapter is merged for an evaluation and unmerged right after it."""
    model = lm(246)

    def evaluate(i):
        if i % 4 == 3:
            model.merge_adapter()
            with torch.no_grad():
                lm_loss(model, tokens(1, 9)[0])
            model.unmerge_adapter()

    fit(observe, model, AdamW(trainable(model), lr=1e-2), tokens(12, 246), after=evaluate)


@sound("plain_statistics_hooks_for_logging", "no-modifier")
def plain_statistics_hooks_for_logging(observe):
    """Gradient norms are logged by hooks that read and never write."""
    model = lm(247)
    opt = AdamW(trainable(model), lr=1e-2)
    seen: list[float] = []
    for p in trainable(model):
        p.register_hook(lambda g: seen.append(float(g.norm())))
        p.register_post_accumulate_grad_hook(lambda p: seen.append(float(p.grad.norm())))
    opt.register_step_pre_hook(lambda opt, args, kw: seen.append(opt.param_groups[0]["lr"]))
    fit(observe, model, opt, tokens(10, 247))


# ---------------------------------------------------------------------------------------------- effective


@sound("gram_in_trainer_pre_step_callback", "effective")
def gram_in_trainer_pre_step_callback(observe):
    """The right event of the Trainer, after its clipping and before the step."""
    model = lm(300)
    trainer = hf(model, 14, [At("on_pre_optimizer_step", Gram(model).step)], gradient_accumulation_steps=2)
    with observe(model):
        trainer.train()


@sound("kfac_in_trainer_optimizer_hook", "effective")
def kfac_in_trainer_optimizer_hook(observe):
    """A pre-hook on the optimizer handed to the Trainer."""
    model = lm(301, layers=2)
    opt = AdamW(trainable(model), lr=1e-2)
    opt.register_step_pre_hook(Kfac(model).step)
    trainer = hf(model, 12, optimizers=(opt, LambdaLR(opt, lambda s: 1.0)))
    with observe(model):
        trainer.train()


@sound("training_step_on_the_last_micro_batch", "effective")
def training_step_on_the_last_micro_batch(observe):
    """training_step preconditions where the accelerator says that gradients are complete."""
    model = lm(302)
    pre = Kfac(model)

    class Patient(Trainer):
        def training_step(self, *args, **kw):
            loss = super().training_step(*args, **kw)
            if self.accelerator.sync_gradients:
                pre.step()
            return loss

    trainer = hf(model, 10, cls=Patient, gradient_accumulation_steps=3)
    with observe(model):
        trainer.train()


@sound("trainer_create_optimizer_subclass", "effective")
def trainer_create_optimizer_subclass(observe):
    """create_optimizer returns an AdamW whose step preconditions first."""
    model = lm(303)
    pre = Gram(model)

    class Turning(AdamW):
        def step(self, closure=None):
            pre.step()
            return super().step(closure)

    class Own(Trainer):
        def create_optimizer(self, *args, **kw):
            self.optimizer = Turning(trainable(model), lr=1e-2)
            return self.optimizer

    trainer = hf(model, 12, cls=Own)
    with observe(model):
        trainer.train()


@sound("sft_packing_with_kfac", "effective")
def sft_packing_with_kfac(observe):
    """SFTTrainer with packing and checkpointing, hooks fed by the recomputed forward too."""
    model = lm(304, layers=2)
    rows = [{"text": phrase(i, 6 + i % 9)} for i in range(60)]
    calls = [At("on_pre_optimizer_step", Kfac(model).step)]
    trainer = sft(model, rows, 8, calls, packing=True, packing_strategy="wrapped", gradient_checkpointing=True)
    with observe(model):
        trainer.train()


@sound("sft_completion_only_with_gram", "effective")
def sft_completion_only_with_gram(observe):
    """SFTTrainer with loss on completions and accumulated micro-batches."""
    model = lm(305)
    calls = [At("on_pre_optimizer_step", Gram(model).step)]
    trainer = sft(model, completions(), 10, calls, completion_only_loss=True, gradient_accumulation_steps=2)
    with observe(model):
        trainer.train()


@sound("sft_assistant_masks_with_gram", "effective")
def sft_assistant_masks_with_gram(observe):
    """SFTTrainer with loss on assistant turns, Adafactor and dropout."""
    model = lm(306, lora_dropout=0.1)
    calls = [At("on_pre_optimizer_step", Gram(model).step)]
    trainer = sft(model, chats(), 10, calls, assistant_only_loss=True, optim="adafactor")
    with observe(model):
        trainer.train()


@sound("dpo_loop_with_reference_swap", "effective")
def dpo_loop_with_reference_swap(observe):
    """Policy, reference, policy: the reference adapter is put in for its forwards and out again; M on the policy."""
    model = lm(307)
    model.add_adapter("reference", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("default")
    opt = AdamW(trainable(model), lr=1e-2)
    pre = Gram(model, "default")
    with observe(model):
        for good, bad in zip(tokens(12, 307), tokens(12, 407), strict=True):
            opt.zero_grad()
            margin = lm_loss(model, good) - lm_loss(model, bad)
            model.set_adapter("reference")
            with torch.no_grad():
                anchor = lm_loss(model, good) - lm_loss(model, bad)
            model.set_adapter("default")
            (-F.logsigmoid(anchor - margin)).backward()
            pre.step()
            opt.step()


@sound("disable_adapter_for_the_reference", "effective")
def disable_adapter_for_the_reference(observe):
    """The reference is the base model under disable_adapter; the policy's gradient is turned."""
    model = lm(308)
    opt = SGD(trainable(model), lr=0.3)
    pre = Kfac(model)
    with observe(model):
        for ids in tokens(12, 308):
            opt.zero_grad()
            with torch.no_grad(), model.disable_adapter():
                base = model(input_ids=ids).logits
            out = model(input_ids=ids, labels=ids)
            kl = F.kl_div(out.logits.log_softmax(-1), base.softmax(-1), reduction="batchmean")
            (out.loss + 0.01 * kl).backward()
            pre.step()
            opt.step()


@sound("accelerate_on_sync_only", "effective")
def accelerate_on_sync_only(observe):
    """Inside accumulate(), modification and clipping wait for sync_gradients."""
    model = attention(309)
    pre = Gram(model)
    acc = Accelerator(cpu=True, gradient_accumulation_steps=3)
    ready, opt = acc.prepare(model, AdamW(trainable(model), lr=1e-2))
    with observe(model):
        for batch in pairs(36, 16, 3, 309, rows=4, length=4):
            with acc.accumulate(ready):
                acc.backward(mse(ready, batch))
                if acc.sync_gradients:
                    pre.step()
                    acc.clip_grad_norm_(ready.parameters(), 0.5)
                opt.step()
                opt.zero_grad()


@sound("scaler_unscaled_then_turned", "effective")
def scaler_unscaled_then_turned(observe):
    """unscale_, precondition, clip, step: the textbook order with a scaler."""
    model = mlp(310)
    opt = SGD(trainable(model), lr=0.1, momentum=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    pre = Gram(model)
    with observe(model):
        for batch in pairs(14, 12, 4, 310):
            opt.zero_grad()
            scaler.scale(mse(model, batch)).backward()
            scaler.unscale_(opt)
            pre.step()
            nn.utils.clip_grad_norm_(trainable(model), 1.0)
            scaler.step(opt)
            scaler.update()


@sound("scaled_gradients_turned_before_unscale", "effective")
def scaled_gradients_turned_before_unscale(observe):
    """The matrix does not mind the loss scale, so turning scaled gradients and unscaling in step() is the same."""
    model = mlp(311)
    opt = Adam(trainable(model), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    pre = Gram(model)
    with observe(model):
        for batch in pairs(14, 12, 4, 311):
            opt.zero_grad()
            scaler.scale(mse(model, batch)).backward()
            pre.step()
            scaler.step(opt)
            scaler.update()


@sound("pre_hook_fused_adamw", "effective")
def pre_hook_fused_adamw(observe):
    """A pre-hook on fused AdamW."""
    model = lm(312)
    opt = AdamW(trainable(model), lr=1e-2, fused=True)
    opt.register_step_pre_hook(Gram(model).step)
    fit(observe, model, opt, tokens(12, 312))


@sound("post_accumulate_hook_one_batch_per_step", "effective")
def post_accumulate_hook_one_batch_per_step(observe):
    """Without accumulation the hook after accumulation is a right place."""
    model = attention(313)
    opt = SGD(trainable(model), lr=0.2, foreach=True)
    pre = Gram(model)
    for name, p in pre.named:
        p.register_post_accumulate_grad_hook(hook_in_place(pre, name))
    fit(observe, model, opt, pairs(14, 16, 3, 313, rows=4, length=4), mse)


@sound("optimizer_in_backward_after_turning", "effective")
def optimizer_in_backward_after_turning(observe):
    """In one hook: turn this parameter's gradient, step its optimizer, drop the gradient."""
    model = lm(314)
    opts = {p: SGD([p], lr=0.3) for p in trainable(model)}
    pre = Gram(model)

    def make(name):
        def update(p):
            p.grad = pre.turned(name, p.grad)
            opts[p].step()
            p.grad = None

        return update

    for name, p in pre.named:
        p.register_post_accumulate_grad_hook(make(name))
    with observe(model):
        for ids in tokens(12, 314):
            lm_loss(model, ids).backward()


@sound("grad_none_and_reassigned", "effective")
def grad_none_and_reassigned(observe):
    """The old gradient is set to None and a new tensor is assigned."""
    model = lm(315)
    pre = Gram(model)

    def reassign(_):
        for name, p in pre.named:
            new = pre.turned(name, p.grad)
            p.grad = None
            p.grad = new

    fit(observe, model, AdamW(trainable(model), lr=1e-2), tokens(12, 315), before=reassign, clip=1.0)


@sound("written_through_data", "effective")
def written_through_data(observe):
    """The result is written through .data of the gradient."""
    model = mlp(316)
    pre = Gram(model)

    def through(_):
        for name, p in pre.named:
            p.grad.data = pre.turned(name, p.grad.data)

    fit(observe, model, Adam(trainable(model), lr=1e-2), pairs(14, 12, 4, 316), mse, before=through)


@sound("flat_buffer_filled_in_place", "effective")
def flat_buffer_filled_in_place(observe):
    """The flat-buffer optimizer sees what is copied into the views of its buffer."""
    model = mlp(317)
    fit(observe, model, FlatSgd(trainable(model), lr=0.1), pairs(14, 12, 4, 317), mse, before=Gram(model).step)


@sound("loraplus_with_gram", "effective")
def loraplus_with_gram(observe):
    """LoRA+ with all groups preconditioned."""
    model = lm(318)
    opt = create_loraplus_optimizer(model, AdamW, lr=2e-3, loraplus_lr_ratio=8)
    fit(observe, model, opt, tokens(14, 318), before=Gram(model).step)


@sound("two_optimizers_one_modifier", "effective")
def two_optimizers_one_modifier(observe):
    """Own optimizers for A and B after one modifier."""
    model = attention(319)
    opts = [AdamW([p for n, p in factors(model) if part in n], lr=1e-2) for part in ("lora_A", "lora_B")]
    pre = Kfac(model)
    with observe(model):
        for batch in pairs(12, 16, 3, 319, rows=4, length=4):
            for opt in opts:
                opt.zero_grad()
            mse(model, batch).backward()
            pre.step()
            for opt in opts:
                opt.step()


@sound("alternating_factors_both_turned", "effective")
def alternating_factors_both_turned(observe):
    """A and B take turns, and each is preconditioned in its turn."""
    model = lm(320)
    both = {part: [p for n, p in factors(model) if part in n] for part in ("lora_A", "lora_B")}
    pres = {part: Gram(model, part) for part in both}
    opts = {part: SGD(ps, lr=0.3) for part, ps in both.items()}
    with observe(model):
        for i, ids in enumerate(tokens(20, 320)):
            now = "lora_A" if i % 2 else "lora_B"
            model.zero_grad()
            lm_loss(model, ids).backward()
            pres[now].step()
            opts[now].step()


@sound("group_added_with_its_modifier", "effective")
def group_added_with_its_modifier(observe):
    """A layer unfrozen midway joins optimizer and modifier at once."""
    model = lm(321, layers=2)
    late = [(n, p) for n, p in factors(model) if "layers.1." in n]
    for _, p in late:
        p.requires_grad_(False)
    opt = AdamW(trainable(model), lr=1e-2)
    pre = Gram(model)

    def widen(i):
        if i == 4:
            for _, p in late:
                p.requires_grad_(True)
            opt.add_param_group({"params": [p for _, p in late]})
            pre.named += late

    fit(observe, model, opt, tokens(18, 321), before=pre.step, after=widen)


@sound("resumed_with_its_statistics", "effective")
def resumed_with_its_statistics(observe):
    """Adapter, optimizer and averages are restored into new objects."""
    first = lm(322)
    old, had = AdamW(trainable(first), lr=1e-2), Gram(first)
    fit(lambda m: contextlib.nullcontext(), first, old, tokens(6, 322), before=had.step)
    with tempfile.TemporaryDirectory() as folder:
        first.save_pretrained(folder)
        torch.manual_seed(322)
        model = PeftModel.from_pretrained(llama(), folder, is_trainable=True).train()
    opt, pre = AdamW(trainable(model), lr=1e-2), Gram(model)
    opt.load_state_dict(old.state_dict())
    pre.sums = {n: s.clone() for n, s in had.sums.items()}
    fit(observe, model, opt, tokens(12, 422), before=pre.step)


@sound("lookahead_around_turned_steps", "effective")
def lookahead_around_turned_steps(observe):
    """Lookahead over preconditioned SGD."""
    model = mlp(323)
    opt = Lookahead(SGD(trainable(model), lr=0.1), every=5)
    fit(observe, model, opt, pairs(16, 12, 4, 323), mse, before=Gram(model).step)


@sound("sam_turns_the_second_gradient", "effective")
def sam_turns_the_second_gradient(observe):
    """SAM climbs along the raw gradient and descends along the preconditioned one taken there."""
    model = mlp(324)
    opt = SGD(trainable(model), lr=0.1)
    pre = Gram(model)
    with observe(model):
        for batch in pairs(14, 12, 4, 324):
            opt.zero_grad()
            mse(model, batch).backward()
            with torch.no_grad():
                old = [p.detach().clone() for p in trainable(model)]
                for p in trainable(model):
                    p.add_(0.01 * p.grad / (p.grad.norm() + 1e-12))
            opt.zero_grad()
            mse(model, batch).backward()
            with torch.no_grad():
                for p, o in zip(trainable(model), old, strict=True):
                    p.copy_(o)
            pre.step()
            opt.step()


@sound("ema_swapped_in_and_out", "effective")
def ema_swapped_in_and_out(observe):
    """The averaged weights are used for an evaluation now and then and the training weights restored."""
    model = lm(325)
    average = [p.detach().clone() for p in trainable(model)]

    @torch.no_grad()
    def evaluate(i):
        live = [p.detach().clone() for p in trainable(model)]
        for e, w in zip(average, live, strict=True):
            e.lerp_(w, 0.1)
        if i % 5 == 4:
            for p, e in zip(trainable(model), average, strict=True):
                p.copy_(e)
            lm_loss(model, tokens(1, 3)[0])
            for p, w in zip(trainable(model), live, strict=True):
                p.copy_(w)

    fit(observe, model, AdamW(trainable(model), lr=1e-2), tokens(14, 325), before=Gram(model).step, after=evaluate)


@sound("warm_up_of_four_steps", "effective")
def warm_up_of_four_steps(observe):
    """The first four steps stay plain while statistics gather."""
    model = lm(326)
    opt = AdamW(trainable(model), lr=1e-2)
    fit(observe, model, opt, tokens(24, 326), before=Gram(model, warm=4).step)


@sound("roots_refreshed_every_fifth_step", "effective")
def roots_refreshed_every_fifth_step(observe):
    """Expensive roots are kept for five steps."""
    model = attention(327)

    class Lazy(Kfac):
        def matrix(self, name):
            kept = self.__dict__.setdefault("roots", {})
            if self.count % 5 == 0 or name not in kept:
                kept[name] = super().matrix(name)
            return kept[name]

    opt = SGD(trainable(model), lr=0.2)
    fit(observe, model, opt, pairs(18, 16, 3, 327, rows=4, length=4), mse, before=Lazy(model).step)


@sound("rate_of_zero_in_the_first_step", "effective")
def rate_of_zero_in_the_first_step(observe):
    """Linear warm-up begins at a rate of zero, as in every schedule of the library."""
    model = lm(328)
    opt = AdamW(trainable(model), lr=1e-2)
    sched = transformers.get_linear_schedule_with_warmup(opt, 3, 18)
    fit(observe, model, opt, tokens(16, 328), before=Gram(model).step, sched=sched)


@sound("bfloat16_model_turned_in_float32", "effective")
def bfloat16_model_turned_in_float32(observe):
    """A bfloat16 model; M is applied in double precision and rounded on return."""
    model = mlp(329).to(torch.bfloat16)
    batches = [(x.bfloat16(), y.bfloat16()) for x, y in pairs(14, 12, 4, 329)]
    fit(observe, model, SGD(trainable(model), lr=0.3), batches, mse, before=Gram(model).step)


@sound("adafactor_after_gram", "effective")
def adafactor_after_gram(observe):
    """Adafactor with a fixed rate behind the modifier."""
    model = lm(330)
    opt = Adafactor(trainable(model), lr=1e-2, scale_parameter=False, relative_step=False, warmup_init=False)
    fit(observe, model, opt, tokens(14, 330), before=Gram(model).step)


@sound("lion_after_kfac", "effective")
def lion_after_kfac(observe):
    """Signs of a turned gradient differ from those of the raw one."""
    model = lm(331, layers=2)
    fit(observe, model, Lion(trainable(model), lr=2e-3), tokens(14, 331), before=Kfac(model).step)


@sound("dora_with_gram", "effective")
def dora_with_gram(observe):
    """DoRA: factors are preconditioned, magnitudes learn plainly."""
    model = lm(332, use_dora=True)
    fit(observe, model, AdamW(trainable(model), lr=1e-2), tokens(12, 332), before=Gram(model).step)


@sound("rslora_with_dropout", "effective")
def rslora_with_dropout(observe):
    """Rank-stabilised scaling and dropout."""
    model = lm(333, r=8, use_rslora=True, lora_dropout=0.1)
    fit(observe, model, AdamW(trainable(model), lr=5e-3), tokens(14, 333), before=Gram(model).step)


@sound("pissa_with_kfac", "effective")
def pissa_with_kfac(observe):
    """PiSSA start, both factors with gradients from the first step."""
    model = attention(334, init_lora_weights="pissa")
    opt = SGD(trainable(model), lr=0.05)
    fit(observe, model, opt, pairs(12, 16, 3, 334, rows=4, length=4), mse, before=Kfac(model).step)


@sound("olora_start_with_gram", "effective")
def olora_start_with_gram(observe):
    """OLoRA start by a QR decomposition, nested momentum."""
    model = attention(335, init_lora_weights="olora")
    opt = SGD(trainable(model), lr=0.05, momentum=0.8, nesterov=True)
    fit(observe, model, opt, pairs(14, 16, 3, 335, rows=4, length=4), mse, before=Gram(model).step)


@sound("embedding_factors_too", "effective")
def embedding_factors_too(observe):
    """The embedding's factors are transposed parameters and are preconditioned on their rank side as well."""
    model = lm(336, targets=("embed_tokens", "q_proj"))
    fit(observe, model, AdamW(trainable(model), lr=1e-2), tokens(14, 336), before=Gram(model).step)


@sound("conv1d_factors", "effective")
def conv1d_factors(observe):
    """GPT-2's transposed layers."""
    model = gpt(337)
    fit(observe, model, AdamW(trainable(model), lr=1e-2), tokens(12, 337), before=Gram(model).step)


class Eye(nn.Module):
    """Two convolutions and a head."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))).mean((-1, -2)))


@sound("convolution_factors", "effective")
def convolution_factors(observe):
    """LoRA on convolutions, gradients flattened to their rank side."""
    torch.manual_seed(338)
    model = lora(Eye(), ("one", "two"))
    made = torch.Generator().manual_seed(338)
    images = torch.randn(14, 8, 3, 6, 6, generator=made)
    batches = [
        (x, torch.stack([x.mean((1, 2, 3)), x.amax((1, 2, 3)), x[:, 0, 0, 0], x[:, 1, 2, 2]], 1)) for x in images
    ]
    fit(observe, model, AdamW(trainable(model), lr=1e-2), batches, mse, before=Gram(model, power=0.5).step)


@sound("bare_parameters_with_gram", "effective")
def bare_parameters_with_gram(observe):
    """LoRA on bare parameters by target_parameters."""
    torch.manual_seed(339)
    model = get_peft_model(
        nn.Sequential(Bare()), LoraConfig(r=4, target_modules=[], target_parameters=["enter", "leave"])
    )
    fit(observe, model, SGD(trainable(model), lr=0.1), pairs(14, 12, 4, 339), mse, before=Gram(model).step)


@sound("modules_to_save_stay_plain", "effective")
def modules_to_save_stay_plain(observe):
    """The whole head learns plainly beside preconditioned factors."""
    model = lm(340, modules_to_save=["lm_head"])
    opt = AdamW(trainable(model), lr=5e-3)
    fit(observe, model, opt, tokens(12, 340), before=Gram(model).step)


@sound("trainable_tokens_stay_plain", "effective")
def trainable_tokens_stay_plain(observe):
    """New token vectors learn plainly beside preconditioned factors."""
    model = lm(341, trainable_token_indices={"embed_tokens": [5, 6, 7]})
    fit(observe, model, AdamW(trainable(model), lr=1e-2), tokens(12, 341), before=Gram(model).step)


@sound("tied_first_factor_visited_once", "effective")
def tied_first_factor_visited_once(observe):
    """One A is shared by two layers, appears once among the parameters and is turned once."""
    model = mlp(342, targets=("mid", "down"))
    inner = model.base_model.model
    inner.down.lora_A["default"].weight = inner.mid.lora_A["default"].weight
    fit(observe, model, AdamW(trainable(model), lr=1e-2), pairs(14, 12, 4, 342), mse, before=Gram(model).step)


@sound("frozen_layer_on_purpose", "effective")
def frozen_layer_on_purpose(observe):
    """The lower layer's factors are frozen from the start; all that learn are preconditioned."""
    model = lm(343, layers=2)
    for n, p in factors(model):
        p.requires_grad_("layers.0." not in n)
    fit(observe, model, AdamW(trainable(model), lr=1e-2), tokens(14, 343), before=Gram(model).step)


@sound("noise_in_backward_then_gram", "effective")
def noise_in_backward_then_gram(observe):
    """Tensor hooks add a little noise in backward; the modifier turns what results."""
    model = lm(344)
    for p in trainable(model):
        p.register_hook(lambda g: g + 0.05 * g.norm() / g.numel() ** 0.5 * torch.randn_like(g))
    fit(observe, model, AdamW(trainable(model), lr=1e-2), tokens(12, 344), before=Gram(model).step)


@sound("compiled_layer_with_gram", "effective")
def compiled_layer_with_gram(observe):
    """One layer is compiled with the eager backend; the modifier works from gradients alone."""
    model = mlp(345)
    inner = model.base_model.model
    inner.up.forward = torch.compile(inner.up.forward, backend="eager")
    fit(observe, model, SGD(trainable(model), lr=0.1), pairs(12, 12, 4, 345), mse, before=Gram(model).step)


@sound("checkpointed_layers_with_kfac", "effective")
def checkpointed_layers_with_kfac(observe):
    """Non-reentrant checkpointing runs forward hooks twice; the averages do not mind."""
    model = lm(346, layers=2)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    fit(observe, model, AdamW(trainable(model), lr=1e-2), tokens(10, 346), before=Kfac(model).step)


@sound("two_tasks_in_turns_with_modifiers", "effective")
def two_tasks_in_turns_with_modifiers(observe):
    """Two adapters are trained in turns, each with its optimizer and its modifier."""
    model = attention(347, targets=("q", "v"))
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q", "v"]))
    tools = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        tools[name] = (AdamW(trainable(model), lr=1e-2), Gram(model, f".{name}."))
    with observe(model):
        for i, batch in enumerate(pairs(28, 16, 3, 347, rows=4, length=4)):
            name = "second" if i % 2 else "default"
            model.set_adapter(name)
            opt, pre = tools[name]
            opt.zero_grad()
            mse(model, batch).backward()
            pre.step()
            opt.step()


@sound("merged_for_eval_and_back", "effective")
def merged_for_eval_and_back(observe):
    """The adapter is merged for an evaluation every fourth step and unmerged before training goes on."""
    model = lm(348)

    def evaluate(i):
        if i % 4 == 3:
            model.eval()
            model.merge_adapter()
            with torch.no_grad():
                lm_loss(model, tokens(1, 8)[0])
            model.unmerge_adapter()
            model.train()

    fit(observe, model, AdamW(trainable(model), lr=1e-2), tokens(14, 348), before=Gram(model).step, after=evaluate)


@sound("closure_that_turns", "effective")
def closure_that_turns(observe):
    """The closure given to the step does all: zero, backward, precondition."""
    model = mlp(349)
    opt = SGD(trainable(model), lr=0.1)
    pre = Gram(model)
    with observe(model):
        for batch in pairs(14, 12, 4, 349):

            def closure(batch=batch):
                opt.zero_grad()
                loss = mse(model, batch)
                loss.backward()
                pre.step()
                return loss

            opt.step(closure)


@sound("turned_in_a_gradient_list_then_assigned", "effective")
def turned_in_a_gradient_list_then_assigned(observe):
    """autograd.grad gives a list, which is preconditioned and only then assigned to .grad."""
    model = mlp(350)
    opt = AdamW(trainable(model), lr=1e-2)
    pre = Gram(model)
    with observe(model):
        for batch in pairs(14, 12, 4, 350):
            held = [p for _, p in pre.named]
            raw = torch.autograd.grad(mse(model, batch), held)
            for (name, p), g in zip(pre.named, raw, strict=True):
                p.grad = g.clone()
                p.grad = pre.turned(name, g)
            opt.step()


@sound("accumulation_with_constant_matrix_tensor_hook", "effective")
def accumulation_with_constant_matrix_tensor_hook(observe):
    """Tensor hooks turn each micro-gradient by one fixed M, which sums to M times the accumulated gradient."""
    model = mlp(351)
    opt = SGD(trainable(model), lr=0.1)
    made = torch.Generator().manual_seed(351)
    mats = {}
    for name, p in factors(model):
        half = torch.randn(4, 4, generator=made)
        m = half @ half.t() / 4 + 0.3 * torch.eye(4)
        mats[name] = m / m.norm() * 2
        p.register_hook(lambda g, name=name: rank_back(name, mats[name] @ rank_first(name, g), g))
    with observe(model):
        for i, batch in enumerate(pairs(36, 12, 4, 351)):
            (mse(model, batch) / 3).backward()
            if i % 3 == 2:
                opt.step()
                opt.zero_grad()


@sound("riemannian_preconditioner", "effective")
def riemannian_preconditioner(observe):
    """Scaled gradient descent for LoRA: the inverse Gram matrix of the other factor turns each gradient."""
    model = attention(352, init_lora_weights="gaussian")
    opt = SGD(trainable(model), lr=0.02)
    held = dict(factors(model))
    for name, p in held.items():
        if not is_a(name):
            nn.init.normal_(p, std=0.3)

    @torch.no_grad()
    def scaled(_):
        for name, p in held.items():
            other = held[name.replace("lora_A", "lora_B") if is_a(name) else name.replace("lora_B", "lora_A")]
            gram = other.t() @ other if is_a(name) else other @ other.t()
            m = torch.linalg.inv(gram / gram.diagonal().mean() + 0.1 * torch.eye(len(gram)))
            p.grad.copy_(rank_back(name, m @ rank_first(name, p.grad), p.grad))

    fit(observe, model, opt, pairs(14, 16, 3, 352, rows=4, length=4), mse, before=scaled)


@sound("clip_before_and_after", "effective")
def clip_before_and_after(observe):
    """Raw gradients are clipped, turned and clipped once more at the usual threshold."""
    model = lm(353)
    opt = torch.optim.NAdam(trainable(model), lr=1e-2)
    pre = Gram(model)

    def both(i):
        nn.utils.clip_grad_norm_(trainable(model), 0.5)
        pre.step()

    fit(observe, model, opt, tokens(12, 353), before=both, clip=0.4)


@sound("micro_batches_without_sync", "effective")
def micro_batches_without_sync(observe):
    """Gradients gather over three micro-batches as under no_sync and are turned once at the end."""
    model = attention(354)
    opt = torch.optim.Adamax(trainable(model), lr=1e-2)
    pre = Kfac(model)
    with observe(model):
        for i, batch in enumerate(pairs(36, 16, 3, 354, rows=4, length=4)):
            (mse(model, batch) / 3).backward()
            if (i + 1) % 3:
                continue
            pre.step()
            opt.step()
            opt.zero_grad(set_to_none=False)


@sound("bad_batches_skipped_before_modifier", "effective")
def bad_batches_skipped_before_modifier(observe):
    """Batches with a loss that is not finite are skipped before backward; all others are turned."""
    model = mlp(355)
    opt = AdamW(trainable(model), lr=1e-2)
    pre = Gram(model)
    with observe(model):
        for i, (x, y) in enumerate(pairs(20, 12, 4, 355)):
            opt.zero_grad()
            loss = mse(model, (x / 0 if i % 7 == 3 else x, y))
            if not loss.isfinite():
                continue
            loss.backward()
            pre.step()
            opt.step()


def main() -> None:
    """Run every case unwatched and print how it went."""
    for case in CASES:
        begun = time.perf_counter()
        try:
            case.run(contextlib.nullcontext)
            state = "ok"
        except Exception as error:
            state = f"{type(error).__name__}: {error}"
        print(f"{case.name:58s} {time.perf_counter() - begun:6.2f} {state}")


if __name__ == "__main__":
    main()
