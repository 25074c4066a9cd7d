"""Blind cases, round 1: Trainer and TRL callbacks, odd optimizers, adapter states, clipping and scaling, groups."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import random
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LambdaLR, OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from transformers import (
    Adafactor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
datasets.disable_progress_bars()
torch.set_num_threads(1)


@dataclass(frozen=True)
class Case:
    """One training with what is right to say about it."""

    name: str
    kind: str
    link: str | None
    causes: tuple[str, ...]
    run: Callable
    why: str


CASES: list[Case] = []


def fault(name: str, link: str, *causes: str) -> Callable:
    """Register a run in which the given link breaks first."""

    def register(run: Callable) -> Callable:
        CASES.append(Case(name, "fault", link, causes, run, " ".join((run.__doc__ or "").split())))
        return run

    return register


def sound(name: str, cause: str) -> Callable:
    """Register a run in which every link holds."""

    def register(run: Callable) -> Callable:
        CASES.append(Case(name, "sound", None, (cause,), run, " ".join((run.__doc__ or "").split())))
        return run

    return register


# ---------------------------------------------------------------- models and data


def seed_all(seed: int) -> None:
    """Seed every generator a run may draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Mlp(nn.Module):
    """Two hidden layers and a head."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, width)
        self.fc2 = nn.Linear(width, width)
        self.head = nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Map features to outputs."""
        return self.head(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))


class Mixer(nn.Module):
    """One block of linear attention over eight tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens without a softmax and pool them."""
        h = x.unflatten(-1, (1, 16)).repeat(1, 8, 1) * torch.linspace(0.5, 1.5, 8)[:, None]
        h = h + torch.sin(h.cumsum(1))
        scores = self.q(h) @ self.k(h).transpose(1, 2) / 8
        return self.head((scores @ self.v(h)).mean(1))


class Deep(nn.Module):
    """Eleven residual layers, numbered 0 to 10, optionally checkpointed or cut by a detach."""

    def __init__(self, depth: int = 11, reentrant: bool | None = None, cut_after: int | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(depth))
        self.head = nn.Linear(16, 6)
        self.reentrant, self.cut_after = reentrant, cut_after

    def forward(self, x: Tensor) -> Tensor:
        """Run the layers one after the other."""
        for number, layer in enumerate(self.layers):
            if self.reentrant is None:
                step = torch.tanh(layer(x))
            else:
                step = checkpoint(lambda h, f=layer: torch.tanh(f(h)), x, use_reentrant=self.reentrant)
            x = x + 0.5 * step
            x = x.detach() if number == self.cut_after else x
        return self.head(x)


def llama(layers: int = 2, hidden: int = 16) -> LlamaForCausalLM:
    """Build a tiny causal language model."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            use_cache=False,
        )
    )


TARGETS = {
    "mlp": ["fc1", "fc2"],
    "mixer": ["q", "k", "v"],
    "deep": [f"layers.{i}" for i in range(11)],
    "llama": ["q_proj", "v_proj"],
}


def enliven(model: nn.Module, std: float = 0.1) -> nn.Module:
    """Give lora_B values other than zero, as in a run that goes on."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=std)
    return model


def adapt(base: nn.Module, targets: list[str], r: int = 4, lively: bool = True, cast: bool = True, **more) -> nn.Module:
    """Put LoRA on a model."""
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, **more)
    model = get_peft_model(base, config, autocast_adapter_dtype=cast)
    return enliven(model) if lively else model


def pairs(steps: int, batch: int = 16, noise: float = 0.1) -> list[tuple[Tensor, Tensor]]:
    """Draw batches of a regression with uneven features."""
    scale, teacher = torch.linspace(0.3, 1.6, 16), torch.randn(16, 6)
    xs = [torch.randn(batch, 16) * scale for _ in range(steps)]
    return [(x, torch.tanh(x @ teacher / 3) + noise * torch.randn(batch, 6)) for x in xs]


def sentences(count: int, length: int = 10) -> list[list[int]]:
    """Draw token sequences that walk through the vocabulary with a stride."""
    starts, strides = torch.randint(37, (count,)).tolist(), torch.randint(1, 4, (count,)).tolist()
    return [[(a + b * i) % 37 + 3 for i in range(length)] for a, b in zip(starts, strides, strict=True)]


def tokens(steps: int, batch: int = 4) -> list[dict[str, Tensor]]:
    """Draw batches for a language model."""
    rows = [torch.tensor(sentences(batch)) for _ in range(steps)]
    return [{"input_ids": ids, "labels": ids.clone()} for ids in rows]


def problem(kind: str = "mlp", steps: int = 24, seed: int = 0, base: Callable | None = None, **more) -> tuple:
    """Build a LoRA model, its loss of a batch, and the batches."""
    seed_all(seed)
    built = (base or {"mlp": Mlp, "mixer": Mixer, "deep": Deep, "llama": llama}[kind])()
    targets = more.pop("targets", TARGETS[kind])
    batch, noise = more.pop("batch", 16), more.pop("noise", 0.1)
    model = adapt(built, targets, **more)
    if kind == "llama":
        return model, (lambda b: model(**b).loss), tokens(steps)
    return model, (lambda b: F.mse_loss(model(b[0]), b[1])), pairs(steps, batch, noise)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """List what requires a gradient."""
    return [p for p in model.parameters() if p.requires_grad]


def loras(model: nn.Module, part: str = "lora_") -> dict[str, nn.Parameter]:
    """Find LoRA matrices by a part of their names."""
    kinds = ("lora_A", "lora_B")
    return {n: p for n, p in model.named_parameters() if any(k in n for k in kinds) and part in n}


# ---------------------------------------------------------------- preconditioners


def inverse_root(s: Tensor, damping: float, power: float) -> Tensor:
    """Invert a symmetric matrix, or its root, after scaling it to a mean diagonal of one."""
    mean = s.diagonal().mean()
    if mean == 0:
        return torch.eye(len(s), dtype=s.dtype) * damping**-power
    w, v = torch.linalg.eigh(s / mean)
    return v @ torch.diag((w.clamp(min=0) + damping) ** -power) @ v.T


class Whitener:
    """Rank-space whitening from running averages of the gradients' own Gram matrices."""

    def __init__(self, model: nn.Module, part: str = "lora_", beta: float = 0.8, damping: float = 0.02, **more) -> None:
        self.model, self.part, self.beta, self.damping = model, part, beta, damping
        self.power: float = more.get("power", 0.8)
        self.warm: int = more.get("warm", 0)
        self.every: int = more.get("every", 1)
        self.keep_norm: bool = more.get("keep_norm", True)
        self.diagonal: bool = more.get("diagonal", False)
        self.frozen: bool = more.get("frozen", False)
        self.grams: dict[str, Tensor] = {}
        self.mats: dict[str, Tensor] = {}
        self.count = 0

    def items(self) -> dict[str, nn.Parameter]:
        """Find the matrices to work on, by name and anew each time."""
        return loras(self.model, self.part)

    def watch(self, name: str, g: Tensor) -> None:
        """Take a gradient into the running average and refresh the matrix."""
        gram = g @ g.T if "lora_A" in name else g.T @ g
        gram = torch.diag(gram.diagonal()) if self.diagonal else gram
        old = self.grams.get(name, gram)
        self.grams[name] = self.beta * old + (1 - self.beta) * gram
        if name not in self.mats or (not self.frozen and self.count % self.every == 0):
            self.mats[name] = inverse_root(self.grams[name], self.damping, self.power)

    def apply(self, name: str, g: Tensor) -> Tensor:
        """Turn a gradient by the matrix at hand."""
        if name not in self.mats or self.count < self.warm:
            return g
        m = self.mats[name]
        out = m @ g if "lora_A" in name else g @ m
        return out * (g.norm() / out.norm().clamp(min=1e-30)) if self.keep_norm else out

    def turned(self, name: str, grad: Tensor) -> Tensor:
        """Return what is to stand in place of a gradient."""
        g = grad.detach().float()
        self.watch(name, g)
        return self.apply(name, g).to(grad.dtype)

    @torch.no_grad()
    def step(self) -> None:
        """Write turned gradients in place."""
        for name, p in self.items().items():
            if p.grad is not None:
                p.grad.copy_(self.turned(name, p.grad))
        self.count += 1


class Kfac(Whitener):
    """Rank-space K-FAC: statistics of lora_A's outputs and of the gradients there, by module hooks."""

    def __init__(self, model: nn.Module, **more) -> None:
        super().__init__(model, **{"damping": 0.05, "power": 1.0, **more})
        self.handles = []
        for path, module in model.named_modules():
            if path.rpartition(".")[0].endswith("lora_A") and isinstance(module, nn.Linear):
                self.hook(path + ".weight", module)

    def hook(self, name: str, module: nn.Module) -> None:
        """Hook one lora_A."""
        twin = name.replace("lora_A", "lora_B")
        self.handles.append(module.register_forward_hook(lambda m, i, out: self.take(twin, out)))
        self.handles.append(module.register_full_backward_hook(lambda m, gi, go: self.take(name, go[0])))

    def take(self, name: str, rows: Tensor) -> None:
        """Average the covariance of rows of length r."""
        if not self.model.training:
            return
        rows = rows.detach().float().flatten(0, -2)
        cov = rows.T @ rows / len(rows)
        self.grams[name] = self.beta * self.grams.get(name, cov) + (1 - self.beta) * cov

    def watch(self, name: str, g: Tensor) -> None:
        """Refresh the matrix from what the hooks took."""
        r = g.shape[0] if "lora_A" in name else g.shape[1]
        self.mats[name] = inverse_root(self.grams.get(name, torch.zeros(r, r)), self.damping, self.power)


class Apply(TrainerCallback):
    """Run a function at one of the Trainer's events."""

    def __init__(self, event: str, action: Callable) -> None:
        def handler(args, state, control, **kwargs) -> None:
            action(state)

        setattr(self, event, handler)


# ---------------------------------------------------------------- loops


def fit(observe: Callable, model: nn.Module, loss: Callable, batches: list, opt, before=None, after=None) -> None:
    """Train plainly, with something before and something after the optimizer's step."""
    model.train()
    with observe(model):
        for number, batch in enumerate(batches):
            model.zero_grad()
            loss(batch).backward()
            if before:
                before()
            opt.step()
            if after:
                after(number)


def adamw(model: nn.Module, lr: float = 3e-3, **more) -> torch.optim.Optimizer:
    """Make AdamW over the trainable parameters."""
    return torch.optim.AdamW(trainable(model), lr=lr, **more)


def sgd(model: nn.Module, lr: float = 0.05, **more) -> torch.optim.Optimizer:
    """Make SGD over the trainable parameters."""
    return torch.optim.SGD(trainable(model), lr=lr, **more)


COMMON = {
    "report_to": [],
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 4,
    "learning_rate": 3e-3,
    "dataloader_pin_memory": False,
}


@contextlib.contextmanager
def arguments(kind: type = TrainingArguments, **more) -> Iterator:
    """Make training arguments with a folder that goes away."""
    with tempfile.TemporaryDirectory() as folder:
        yield kind(output_dir=folder, **{**COMMON, "max_steps": 20, **more})


def rows(count: int = 160) -> datasets.Dataset:
    """Make a tokenized data set."""
    ids = sentences(count)
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids, "attention_mask": [[1] * 10] * count})


def quiet(trainer: Trainer, *callbacks: TrainerCallback) -> Trainer:
    """Take the printer away and add callbacks."""
    trainer.remove_callback(PrinterCallback)
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


def train(observe: Callable, trainer: Trainer, **more) -> None:
    """Train under observation."""
    with observe(trainer.model):
        trainer.train(**more)


def hf(
    observe: Callable, model: nn.Module, *callbacks, count: int = 160, kind=Trainer, optimizers=None, **more
) -> None:
    """Run a Trainer over token rows."""
    with arguments(**more) as args:
        extra = {"optimizers": optimizers} if optimizers else {}
        train(observe, quiet(kind(model=model, args=args, train_dataset=rows(count), **extra), *callbacks))


def tokenizer() -> PreTrainedTokenizerFast:
    """Make a word-level tokenizer over 40 words."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 40)}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def text(ids: list[int]) -> str:
    """Spell tokens as words."""
    return " ".join(f"w{i}" for i in ids)


def sft(observe: Callable, model: nn.Module, *callbacks, optimizers=None, peft_config=None, **more) -> None:
    """Run TRL's SFTTrainer over texts."""
    data = datasets.Dataset.from_dict({"text": [text(s) for s in sentences(120)]})
    with arguments(SFTConfig, max_length=32, **more) as args:
        extra = {"optimizers": optimizers} if optimizers else {}
        trainer = SFTTrainer(
            model=model, args=args, train_dataset=data, processing_class=tokenizer(), peft_config=peft_config, **extra
        )
        train(observe, quiet(trainer, *callbacks))


def dpo(observe: Callable, model: nn.Module, *callbacks, **more) -> None:
    """Run TRL's DPOTrainer over preferences."""
    good, bad = sentences(60), [random.choices(range(3, 40), k=5) for _ in range(60)]
    data = datasets.Dataset.from_dict(
        {
            "prompt": [text(s[:5]) for s in good],
            "chosen": [" " + text(s[5:]) for s in good],
            "rejected": [" " + text(s) for s in bad],
        }
    )
    with arguments(DPOConfig, max_length=32, **{"max_steps": 12, **more}) as args:
        trainer = DPOTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer())
        train(observe, quiet(trainer, *callbacks))


# ---------------------------------------------------------------- optimizers of our own


class Muon(torch.optim.Optimizer):
    """Step along the orthogonal factor of the gradient, or of its momentum."""

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Take one step."""
        for group, p in ((g, p) for g in self.param_groups for p in g["params"] if p.grad is not None):
            buf = self.state[p].setdefault("buf", torch.zeros_like(p))
            buf.mul_(group["momentum"]).add_(p.grad)
            u, _, vh = torch.linalg.svd(buf, full_matrices=False)
            p.sub_(group["lr"] * (u @ vh))


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum; with betas of zero this is sign descent."""

    def __init__(self, params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Take one step."""
        for group, p in ((g, p) for g in self.param_groups for p in g["params"] if p.grad is not None):
            m = self.state[p].setdefault("m", torch.zeros_like(p))
            b1, b2 = group["betas"]
            p.sub_(group["lr"] * torch.sign(b1 * m + (1 - b1) * p.grad))
            m.mul_(b2).add_((1 - b2) * p.grad)


class Sam:
    """Sharpness-aware minimization around a base optimizer."""

    def __init__(self, base: torch.optim.Optimizer, rho: float = 0.02) -> None:
        self.base, self.rho = base, rho
        self.params = [p for g in base.param_groups for p in g["params"]]
        self.saved: list[Tensor] = []

    @torch.no_grad()
    def climb(self) -> None:
        """Move to the worst point near by and forget the gradients."""
        self.saved = [p.clone() for p in self.params]
        norm = torch.stack([p.grad.norm() for p in self.params if p.grad is not None]).norm()
        for p in self.params:
            if p.grad is not None:
                p.add_(p.grad * self.rho / norm)
        self.base.zero_grad()

    @torch.no_grad()
    def descend(self) -> None:
        """Go back and step with the gradients found there."""
        for p, old in zip(self.params, self.saved, strict=True):
            p.copy_(old)
        self.base.step()
        self.base.zero_grad()


class CachedSgd(torch.optim.Optimizer):
    """SGD that collects gradients by hooks as they arrive and steps from its own buffers."""

    def __init__(self, params, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})
        for p in (p for g in self.param_groups for p in g["params"]):
            p.register_post_accumulate_grad_hook(self.collect)

    def collect(self, p: Tensor) -> None:
        """Keep a copy of a gradient."""
        self.state[p]["buffer"] = p.grad.detach().clone()

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Take one step from the buffers."""
        for group, p in ((g, p) for g in self.param_groups for p in g["params"]):
            if "buffer" in self.state[p]:
                p.sub_(group["lr"] * self.state[p].pop("buffer"))


class TurnedAdamW(torch.optim.AdamW):
    """AdamW that turns gradients at the beginning of its own step."""

    def __init__(self, params, pre: Whitener, **more) -> None:
        super().__init__(params, **more)
        self.pre = pre

    def step(self, closure=None):
        """Turn, then step."""
        self.pre.step()
        return super().step(closure)


# ---------------------------------------------------------------- faults: where and when things are written


@fault("trainer-on-optimizer-step", "delivered", "modified-too-late")
def _(observe: Callable) -> None:
    """The callback turns gradients in on_optimizer_step, which the Trainer fires after the optimizer has stepped."""
    model, _, _ = problem("llama")
    pre = Kfac(model)
    hf(observe, model, Apply("on_optimizer_step", lambda s: pre.step()))


@fault("trainer-on-substep-end", "delivered", "applied-on-micro-steps", "overwritten")
def _(observe: Callable) -> None:
    """With accumulation, on_substep_end turns the sums of the first micro-batches; the last one is added untouched."""
    model, _, _ = problem("llama", seed=1)
    pre = Whitener(model)
    hf(observe, model, Apply("on_substep_end", lambda s: pre.step()), gradient_accumulation_steps=2)


@fault("sft-slow-gradient-filter-last", "delivered", "overwritten")
def _(observe: Callable) -> None:
    """A gradient filter callback, added after the preconditioner's, writes its average of untouched gradients."""
    model, _, _ = problem("llama", seed=2)
    pre, average = Whitener(model), {}
    for p in trainable(model):
        p.register_post_accumulate_grad_hook(
            lambda q: average.__setitem__(q, 0.5 * average.get(q, q.grad.detach()) + 0.5 * q.grad.detach())
        )

    def flush(state) -> None:
        for p, value in average.items():
            p.grad.copy_(value)

    turn = Apply("on_pre_optimizer_step", lambda s: pre.step())
    sft(observe, model, turn, Apply("on_pre_optimizer_step", flush))


@fault("accelerate-every-micro-step", "delivered", "applied-on-micro-steps")
def _(observe: Callable) -> None:
    """In an accumulate block the preconditioner has no check for sync_gradients and turns partial sums every time."""
    model, loss, batches = problem("mlp", steps=60)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model, opt = accelerator.prepare(model, adamw(model))
    pre = Whitener(model)
    with observe(model):
        for batch in batches:
            with accelerator.accumulate(model):
                accelerator.backward(loss(batch))
                pre.step()
                opt.step()
                opt.zero_grad()


@fault("optimizer-in-backward-then-precondition", "delivered", "modified-too-late")
def _(observe: Callable) -> None:
    """Each parameter steps in its accumulation hook during backward, and gradients are turned only afterwards."""
    model, loss, batches = problem("mixer", seed=3)
    pre = Whitener(model)
    opts = {p: torch.optim.SGD([p], lr=0.05) for p in trainable(model)}
    for p in opts:
        p.register_post_accumulate_grad_hook(lambda q: opts[q].step())
    with observe(model):
        for batch in batches:
            loss(batch).backward()
            pre.step()
            for opt in opts.values():
                opt.zero_grad()


@fault("sam-second-backward", "delivered", "overwritten", "dropped")
def _(observe: Callable) -> None:
    """Gradients are turned before SAM climbs, but it steps with fresh gradients of its second backward."""
    model, loss, batches = problem("mlp", seed=4)
    pre, sam = Whitener(model), Sam(sgd(model))
    with observe(model):
        for batch in batches:
            loss(batch).backward()
            pre.step()
            sam.climb()
            loss(batch).backward()
            sam.descend()


@fault("lbfgs-closure-recomputes", "delivered", "overwritten", "dropped")
def _(observe: Callable) -> None:
    """Gradients are turned before step(closure), and the closure clears and recomputes them."""
    model, loss, batches = problem("mlp", seed=5, batch=64)
    pre = Whitener(model)
    opt = torch.optim.LBFGS(trainable(model), lr=0.1, max_iter=1, history_size=4)

    def closure(batch) -> Tensor:
        opt.zero_grad()
        value = loss(batch)
        value.backward()
        return value

    with observe(model):
        for batch in batches:
            closure(batch)
            pre.step()
            opt.step(lambda b=batch: closure(b))


@fault("zero-grad-before-step", "delivered", "dropped")
def _(observe: Callable) -> None:
    """zero_grad stands between the preconditioner and the step, so the optimizer finds nothing."""
    model, loss, batches = problem("llama", seed=6)
    pre, opt = Whitener(model), adamw(model)
    with observe(model):
        for batch in batches:
            loss(batch).backward()
            pre.step()
            opt.zero_grad()
            opt.step()


@fault("bucket-written-back", "delivered", "overwritten")
def _(observe: Callable) -> None:
    """A home-made all-reduce copies a flat bucket filled at backward back into the gradients after they were turned."""
    model, loss, batches = problem("mixer", seed=7)
    pre, opt, params = Kfac(model), adamw(model), trainable(model)
    model.train()
    with observe(model):
        for batch in batches:
            opt.zero_grad()
            loss(batch).backward()
            bucket = torch.cat([p.grad.flatten() for p in params])
            pre.step()
            bucket /= 1
            for p, part in zip(params, bucket.split([p.numel() for p in params]), strict=True):
                p.grad.copy_(part.view_as(p))
            opt.step()


@fault("tensor-hooks-without-zero-grad", "delivered", "accumulated-across-steps")
def _(observe: Callable) -> None:
    """Tensor hooks turn each arriving gradient, but zero_grad is missing and sums of all steps reach the optimizer."""
    model, loss, batches = problem("mlp", seed=8)
    pre, opt = Whitener(model), sgd(model, lr=0.005)
    for name, p in pre.items().items():
        p.register_hook(lambda g, n=name: pre.turned(n, g))
    with observe(model):
        for batch in batches:
            loss(batch).backward()
            opt.step()


@fault("trainer-training-step-with-accumulation", "delivered", "applied-on-micro-steps")
def _(observe: Callable) -> None:
    """An overridden training_step turns the running sum after every micro-batch."""
    model, _, _ = problem("llama", seed=9)
    pre = Whitener(model)

    class Turning(Trainer):
        def training_step(self, *args, **kwargs) -> Tensor:
            value = super().training_step(*args, **kwargs)
            pre.step()
            return value

    hf(observe, model, kind=Turning, gradient_accumulation_steps=3, max_steps=12)


# ---------------------------------------------------------------- faults: learning rates, rounding, weights afterwards


@fault("lora-plus-ratio-zero", "moved", "learning-rate-zero")
def _(observe: Callable) -> None:
    """LoRA+ groups with a ratio of zero give lora_B a learning rate of zero."""
    model, loss, batches = problem("mlp", seed=10)
    a, b = list(loras(model, "lora_A").values()), list(loras(model, "lora_B").values())
    opt = torch.optim.AdamW([{"params": a, "lr": 3e-3}, {"params": b, "lr": 3e-3 * 0}])
    fit(observe, model, loss, batches, opt, Whitener(model).step)


@fault("lambda-integer-division", "moved", "learning-rate-zero")
def _(observe: Callable) -> None:
    """The warm-up factor is computed by integer division and stays at zero."""
    model, _, _ = problem("llama", seed=11)
    pre, opt = Whitener(model), adamw(model)
    optimizers = (opt, LambdaLR(opt, lambda step: min(1, step // 100)))
    hf(observe, model, Apply("on_pre_optimizer_step", lambda s: pre.step()), optimizers=optimizers)


@fault("scheduler-stepped-on-micro-batches", "moved", "learning-rate-zero", "stopped")
def _(observe: Callable) -> None:
    """The linear decay is stepped for every micro-batch and is at zero after a quarter of the run."""
    model, loss, batches = problem("mlp", steps=96, seed=12)
    pre, opt = Whitener(model), adamw(model)
    sched = LambdaLR(opt, lambda step: max(0.0, 1 - step / 24))
    with observe(model):
        for number, batch in enumerate(batches, 1):
            (loss(batch) / 4).backward()
            if number % 4 == 0:
                pre.step()
                opt.step()
                opt.zero_grad()
            sched.step()


@fault("bfloat16-rounded-away", "moved", "no-update")
def _(observe: Callable) -> None:
    """Steps of SGD are far below the resolution of the bfloat16 adapter weights."""
    seed_all(13)
    base = Mlp().to(torch.bfloat16)
    model = adapt(base, TARGETS["mlp"], cast=False)
    with torch.no_grad():
        for p in loras(model).values():
            p.add_(torch.sign(p) * 0.05)
    batches = [(x.bfloat16(), y.bfloat16()) for x, y in pairs(20)]
    fit(observe, model, lambda b: F.mse_loss(model(b[0]), b[1]), batches, sgd(model, lr=1e-5), Whitener(model).step)


@fault("ema-swapped-in-for-good", "kept", "not-kept", "update-undone")
def _(observe: Callable) -> None:
    """A callback loads the averaged weights for an evaluation after each step and never puts the trained ones back."""
    model, _, _ = problem("llama", seed=14)
    pre = Whitener(model)
    shadow = {p: p.detach().clone() for p in trainable(model)}

    @torch.no_grad()
    def swap(state) -> None:
        for p, average in shadow.items():
            average.lerp_(p, 0.001)
            p.copy_(average)

    turn = Apply("on_pre_optimizer_step", lambda s: pre.step())
    hf(observe, model, turn, Apply("on_step_end", swap))


@fault("adapter-reloaded-every-epoch", "kept", "not-kept")
def _(observe: Callable) -> None:
    """Each epoch of four steps begins with loading the adapter that was saved before the first one."""
    model, loss, batches = problem("mixer", seed=15)
    pre, opt = Kfac(model), adamw(model)
    saved = {n: t.clone() for n, t in get_peft_model_state_dict(model).items()}

    def reload(number: int) -> None:
        if number % 4 == 3:
            set_peft_model_state_dict(model, {n: t.clone() for n, t in saved.items()})

    fit(observe, model, loss, batches, opt, pre.step, reload)


@fault("trust-region-always-reverts", "kept", "update-undone", "not-kept")
def _(observe: Callable) -> None:
    """A guard that reverts large steps compares a norm with a bound meant for its square and reverts every one."""
    model, loss, batches = problem("mlp", seed=16)
    pre, opt = Whitener(model), adamw(model)
    model.train()
    with observe(model):
        for batch in batches:
            before = [p.detach().clone() for p in trainable(model)]
            opt.zero_grad()
            loss(batch).backward()
            pre.step()
            opt.step()
            with torch.no_grad():
                size = sum((p - q).norm() for p, q in zip(trainable(model), before, strict=True))
                if size > 1e-4:
                    for p, q in zip(trainable(model), before, strict=True):
                        p.copy_(q)


# ---------------------------------------------------------------- faults: gradients that never come, or come broken


class Padded:
    """A distance loss over padded rows, whose root has no derivative at zero."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Average the distances."""
        mask = torch.ones(len(batch[0]), 1)
        mask[-2:] = 0
        return ((self.model(batch[0]) - batch[1]) * mask).pow(2).sum(-1).sqrt().mean()


@fault("root-of-padding-under-scaler", "arrived", "non-finite", "no-steps")
def _(observe: Callable) -> None:
    """The root of padded zeros makes every gradient NaN, and the scaler skips all steps without a word."""
    model, _, batches = problem("mlp", seed=17)
    pre, opt, scaler = Whitener(model), adamw(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    pre.turned = lambda name, g: g if g.isnan().any() else Whitener.turned(pre, name, g)
    loss = Padded(model)
    with observe(model):
        for batch in batches:
            opt.zero_grad()
            scaler.scale(loss(batch)).backward()
            scaler.unscale_(opt)
            pre.step()
            scaler.step(opt)
            scaler.update()


@fault("scaler-skips-for-another-parameter", "consumed", "no-steps", "not-consumed")
def _(observe: Callable) -> None:
    """A gate at zero has an infinite gradient, for which the scaler skips every step of the sound LoRA tensors too."""
    seed_all(18)
    base = Mlp()
    model = adapt(base, TARGETS["mlp"])
    base.gate = nn.Parameter(torch.zeros(6))
    batches, opt, scaler = pairs(20), adamw(model), torch.amp.GradScaler("cpu", init_scale=2.0**24)
    pre = Whitener(model)
    with observe(model):
        for x, y in batches:
            opt.zero_grad()
            value = F.mse_loss(model(x), y) + 0.01 * base.gate.clamp(min=0).sqrt().sum()
            scaler.scale(value).backward()
            scaler.unscale_(opt)
            pre.step()
            scaler.step(opt)
            scaler.update()


@fault("reentrant-checkpoint-without-input-grads", "arrived", "no-gradient")
def _(observe: Callable) -> None:
    """Reentrant checkpointing over frozen inputs passes no gradient to the adapters; only the head trains."""
    model, loss, batches = problem("deep", seed=19, base=lambda: Deep(3, reentrant=True), targets=TARGETS["deep"][:3])
    head = model.base_model.model.head.requires_grad_(True)
    opt = torch.optim.AdamW([*loras(model).values(), *head.parameters()], lr=3e-3)
    fit(observe, model, loss, batches, opt, Whitener(model).step)


@fault("detached-between-layers", "arrived", "no-gradient", "only-some-layers")
def _(observe: Callable) -> None:
    """Hidden states are detached after the first layer, whose adapter gets no gradient."""
    model, loss, batches = problem("deep", seed=20, base=lambda: Deep(4, cut_after=0), targets=TARGETS["deep"][:4])
    fit(observe, model, loss, batches, adamw(model), Whitener(model).step)


@fault("all-labels-ignored", "arrived", "no-gradient")
def _(observe: Callable) -> None:
    """The response template never matches, so all labels are -100 and the averaged sum leaves zero gradients."""
    model, _, batches = problem("llama", seed=21)

    def loss(batch: dict) -> Tensor:
        labels = torch.full_like(batch["labels"], -100)
        logits = model(input_ids=batch["input_ids"]).logits
        total = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        return total / (labels != -100).sum().clamp(min=1)

    fit(observe, model, loss, batches, adamw(model), Whitener(model).step)


@fault("both-factors-zero", "arrived", "no-gradient")
def _(observe: Callable) -> None:
    """A re-initialization sets lora_A and lora_B to zero, where both gradients vanish for ever."""
    model, loss, batches = problem("mixer", seed=22)
    for p in loras(model).values():
        nn.init.zeros_(p)
    fit(observe, model, loss, batches, adamw(model), Whitener(model).step)


def reloaded(model: nn.Module, seed: int, **more) -> nn.Module:
    """Save an adapter and load it onto the same base, built anew."""
    seed_all(seed)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return PeftModel.from_pretrained(Mlp(), folder, **more)


@fault("loaded-for-inference", "arrived", "no-gradient", "wrong-parameters")
def _(observe: Callable) -> None:
    """from_pretrained without is_trainable leaves the adapter frozen, and only the head learns."""
    first, _, batches = problem("mlp", seed=54)
    model = reloaded(first, 54)
    head = model.base_model.model.head.requires_grad_(True)
    opt = torch.optim.AdamW([*loras(model).values(), *head.parameters()], lr=3e-3)
    fit(observe, model, lambda b: F.mse_loss(model(b[0]), b[1]), batches, opt, Whitener(model).step)


# ---------------------------------------------------------------- faults: adapters that do not take part


def with_head(model: nn.Module) -> list[nn.Parameter]:
    """Let the head of the base train along, and list LoRA tensors and head."""
    head = model.base_model.model.head.requires_grad_(True)
    return [*loras(model).values(), *head.parameters()]


@fault("inactive-adapter", "used", "not-used")
def _(observe: Callable) -> None:
    """A frozen helper adapter was made the active one, while preconditioner and optimizer hold the default one."""
    model, loss, batches = problem("mlp", seed=23)
    opt = torch.optim.AdamW(with_head(model), lr=3e-3)
    pre = Whitener(model, "default")
    model.add_adapter("helper", LoraConfig(r=4, target_modules=TARGETS["mlp"]))
    model.set_adapter("helper")
    for name, p in loras(model).items():
        p.requires_grad_("default" in name)
    fit(observe, model, loss, batches, opt, pre.step)


@fault("merged-before-training", "used", "not-used")
def _(observe: Callable) -> None:
    """The adapter was merged for a first evaluation and never unmerged; a saved module keeps the loss falling."""
    model, loss, batches = problem("mlp", seed=24, modules_to_save=["head"])
    model.merge_adapter()
    fit(observe, model, loss, batches, adamw(model), Whitener(model).step)


@fault("adapters-left-disabled", "used", "not-used")
def _(observe: Callable) -> None:
    """The reference pass before training disables adapter layers and does not enable them again."""
    model, loss, batches = problem("mixer", seed=25)
    opt = torch.optim.AdamW(with_head(model), lr=3e-3)
    model.base_model.disable_adapter_layers()
    with torch.no_grad():
        loss(batches[0])
    for p in loras(model).values():
        p.requires_grad_(True)
    fit(observe, model, loss, batches, opt, Whitener(model).step)


@fault("restart-replaces-parameters", "used", "not-used", "wrong-parameters")
def _(observe: Callable) -> None:
    """A restart folds the adapter into the base and makes new parameters; everyone else keeps the old ones."""
    model, loss, batches = problem("mlp", seed=26)
    pre, opt, held = Whitener(model), adamw(model), loras(model)
    pre.items = lambda: held

    @torch.no_grad()
    def restart(number: int) -> None:
        if number == 3:
            for layer in (m for m in model.modules() if isinstance(m, LoraLayer)):
                layer.get_base_layer().weight.add_(layer.get_delta_weight("default"))
                for factor, std in ((layer.lora_A, 0.2), (layer.lora_B, 0.0)):
                    factor["default"].weight = nn.Parameter(torch.randn_like(factor["default"].weight) * std)

    with observe(model):
        for number, batch in enumerate(batches):
            opt.zero_grad()
            loss(batch).backward()
            pre.step()
            opt.step()
            restart(number)


# ---------------------------------------------------------------- faults: optimizers that hold or do something else


@fault("sft-optimizer-of-the-base-model", "consumed", "wrong-parameters", "no-update", "not-consumed")
def _(observe: Callable) -> None:
    """The optimizer handed to SFTTrainer was built on the base model, before peft_config put adapters on it."""
    seed_all(27)
    base = llama()
    opt = torch.optim.AdamW(base.parameters(), lr=3e-3)
    config = LoraConfig(r=4, target_modules=TARGETS["llama"], init_lora_weights=False, task_type="CAUSAL_LM")
    cell: list[Whitener] = []

    def turn(state, model=base) -> None:
        cell or cell.append(Whitener(model))
        cell[0].step()

    optimizers = (opt, None)
    sft(observe, base, Apply("on_pre_optimizer_step", turn), optimizers=optimizers, peft_config=config, max_steps=12)


@fault("adapter-made-anew-after-optimizer", "consumed", "wrong-parameters", "not-consumed", "no-update")
def _(observe: Callable) -> None:
    """The adapter was deleted and added again under its name; the optimizer still holds the deleted tensors."""
    model, loss, batches = problem("mlp", seed=28)
    opt = adamw(model)
    remake(model, "mlp")
    fit(observe, model, loss, batches, opt, Whitener(model).step)


def remake(model: nn.Module, kind: str) -> None:
    """Delete the default adapter and add it anew."""
    config = copy.deepcopy(model.peft_config["default"])
    model.add_adapter("spare", LoraConfig(r=4, target_modules=TARGETS[kind]))
    model.set_adapter("spare")
    model.delete_adapter("default")
    model.add_adapter("default", config)
    model.set_adapter("default")
    model.delete_adapter("spare")
    enliven(model)


@fault("conversion-makes-new-parameters", "consumed", "wrong-parameters", "not-consumed", "no-update")
def _(observe: Callable) -> None:
    """A conversion to double precision that overwrites module parameters came after the optimizer was built."""
    model, loss, batches = problem("mlp", seed=29)
    opt = adamw(model)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    model.double()
    torch.__future__.set_overwrite_module_params_on_conversion(False)
    batches = [(x.double(), y.double()) for x, y in batches]
    fit(observe, model, loss, batches, opt, Whitener(model).step)


@fault("groups-forget-one-factor", "consumed", "wrong-parameters", "not-consumed", "no-update", "only-one-factor")
def _(observe: Callable) -> None:
    """Groups picked by name patterns cover lora_B and norms, and lora_A matches neither."""
    model, loss, batches = problem("llama", seed=30)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decay = [p for n, p in named if "lora_B" in n]
    rest = [p for n, p in named if "norm" in n or "bias" in n]
    opt = torch.optim.AdamW([{"params": decay, "weight_decay": 0.01}, {"params": rest}], lr=3e-3)
    fit(observe, model, loss, batches, opt, Whitener(model).step)


@fault("masters-copied-before", "consumed", "not-consumed", "modified-too-late", "wrong-parameters")
def _(observe: Callable) -> None:
    """Gradients were copied to float32 masters before they were turned on the model, and the masters step."""
    model, loss, batches = problem("mlp", seed=31)
    params = trainable(model)
    masters = [nn.Parameter(p.detach().clone()) for p in params]
    pre, opt = Whitener(model), torch.optim.AdamW(masters, lr=3e-3)
    with observe(model):
        for batch in batches:
            model.zero_grad()
            loss(batch).backward()
            for p, m in zip(params, masters, strict=True):
                m.grad = p.grad.detach().clone()
            pre.step()
            opt.step()
            with torch.no_grad():
                for p, m in zip(params, masters, strict=True):
                    p.copy_(m)


@fault("optimizer-steps-from-own-buffers", "consumed", "not-consumed")
def _(observe: Callable) -> None:
    """The optimizer copies gradients by hooks as they arrive and never looks at what was written to grad later."""
    model, loss, batches = problem("mixer", seed=32)
    fit(observe, model, loss, batches, CachedSgd(trainable(model)), Whitener(model).step)


@fault("second-optimizer-never-steps", "consumed", "no-steps", "not-consumed", "no-update")
def _(observe: Callable) -> None:
    """Each factor has an optimizer, and the scaler steps that of lora_A only."""
    model, loss, batches = problem("mixer", seed=55)
    pre, scaler = Whitener(model), torch.amp.GradScaler("cpu", init_scale=256.0)
    opts = [torch.optim.AdamW(loras(model, part).values(), lr=3e-3) for part in ("lora_A", "lora_B")]
    with observe(model):
        for batch in batches:
            model.zero_grad()
            scaler.scale(loss(batch)).backward()
            for opt in opts:
                scaler.unscale_(opt)
            pre.step()
            scaler.step(opts[0])
            scaler.update()


@fault("muon-cancels-whitening", "consumed", "cancelled-by-optimizer", "not-consumed")
def _(observe: Callable) -> None:
    """Whitening by the gradient's own Gram matrix keeps its orthogonal factor, which is all that Muon steps along."""
    model, loss, batches = problem("mlp", seed=33)
    pre = Whitener(model, beta=0.0, damping=1e-3, power=0.5)
    fit(observe, model, loss, batches, Muon(trainable(model)), pre.step)


@fault("sign-descent-cancels-diagonal", "consumed", "cancelled-by-optimizer", "not-consumed")
def _(observe: Callable) -> None:
    """A diagonal preconditioner with positive entries leaves all signs alone, and the optimizer steps by sign."""
    model, loss, batches = problem("llama", seed=34)
    pre = Whitener(model, diagonal=True, power=1.0)
    fit(observe, model, loss, batches, Lion(trainable(model), betas=(0.0, 0.0)), pre.step)


@fault("adam-cancels-constant-diagonal", "consumed", "cancelled-by-optimizer", "not-consumed")
def _(observe: Callable) -> None:
    """A diagonal matrix estimated once scales rows by constants, which Adam's second moments take out again."""
    model, loss, batches = problem("mlp", seed=35)
    pre = Whitener(model, diagonal=True, power=1.0, frozen=True, keep_norm=False)
    fit(observe, model, loss, batches, torch.optim.Adam(trainable(model), lr=3e-3, eps=1e-12), pre.step)


# ---------------------------------------------------------------- faults: what the preconditioner makes of a gradient


@fault("clipped-before-unscale", "turned", "clipped-to-nothing")
def _(observe: Callable) -> None:
    """Clipping to one happens while gradients still carry the loss scale, which scaler.step then divides out."""
    model, loss, batches = problem("mlp", seed=36)
    pre, opt, scaler = Whitener(model), sgd(model, lr=0.5), torch.amp.GradScaler("cpu", init_scale=2.0**30)
    with observe(model):
        for batch in batches:
            opt.zero_grad()
            scaler.scale(loss(batch)).backward()
            pre.step()
            nn.utils.clip_grad_norm_(trainable(model), 1.0)
            scaler.step(opt)
            scaler.update()


@fault("trainer-max-grad-norm-typo", "turned", "clipped-to-nothing")
def _(observe: Callable) -> None:
    """training_step turns gradients, and the Trainer then clips them to a norm of 1e-9."""
    model, _, _ = problem("llama", seed=37)
    pre = Whitener(model)

    class Turning(Trainer):
        def training_step(self, *args, **kwargs) -> Tensor:
            value = super().training_step(*args, **kwargs)
            pre.step()
            return value

    hf(observe, model, kind=Turning, max_grad_norm=1e-9, optim="sgd")


@fault("trainer-update-direction-as-gradient", "turned", "against-the-gradient")
def _(observe: Callable) -> None:
    """The callback writes the descent direction, with its minus sign, where a gradient is expected."""
    model, _, _ = problem("llama", seed=38)
    pre = Whitener(model)
    inner = pre.turned
    pre.turned = lambda name, g: -inner(name, g)
    hf(observe, model, Apply("on_pre_optimizer_step", lambda s: pre.step()))


@fault("asynchronous-one-step-late", "turned", "stale-gradient", "unrelated-gradient")
def _(observe: Callable) -> None:
    """Turned gradients come from a worker one step late and are written over those of the next batch."""
    model, loss, batches = problem("mlp", seed=39, batch=4, noise=2.0)
    pre, opt, late = Whitener(model), sgd(model, lr=0.01), {}
    inner = pre.turned

    def turned(name: str, g: Tensor) -> Tensor:
        ready, late[name] = late.get(name, g.clone()), inner(name, g)
        return ready

    pre.turned = turned
    fit(observe, model, loss, batches, opt, pre.step)


@fault("sorted-names-misalign-layers", "turned", "unrelated-gradient")
def _(observe: Callable) -> None:
    """Turned gradients in sorted order of names are zipped with parameters in model order, and 10 sorts before 2."""
    model, loss, batches = problem("deep", seed=40)
    pre, opt = Whitener(model), adamw(model)

    @torch.no_grad()
    def misaligned() -> None:
        items = pre.items()
        outs = [pre.turned(n, items[n].grad) for n in sorted(items)]
        for p, out in zip(items.values(), outs, strict=True):
            p.grad.copy_(out)

    fit(observe, model, loss, batches, opt, misaligned)


@fault("trainer-callback-and-step-hook", "turned", "applied-twice")
def _(observe: Callable) -> None:
    """The same preconditioner hangs on the Trainer's callback and on the optimizer's pre-step hook."""
    model, _, _ = problem("llama", seed=41)
    pre, opt = Kfac(model), adamw(model)
    opt.register_step_pre_hook(lambda *_: pre.step())
    sched = LambdaLR(opt, lambda step: 1.0)
    hf(observe, model, Apply("on_pre_optimizer_step", lambda s: pre.step()), optimizers=(opt, sched))


@fault("rank-one", "turned", "scaled-only")
def _(observe: Callable) -> None:
    """With rank one the rank-space matrix is a number."""
    model, loss, batches = problem("mlp", seed=42, r=1)
    fit(observe, model, loss, batches, adamw(model), Kfac(model, keep_norm=False).step)


@fault("sft-damping-drowns-statistics", "turned", "scaled-only")
def _(observe: Callable) -> None:
    """The damping is a thousand times the mean eigenvalue, so the inverse is a multiple of the identity."""
    model, _, _ = problem("llama", seed=43)
    pre = Kfac(model, damping=1e3, keep_norm=False)
    sft(observe, model, Apply("on_pre_optimizer_step", lambda s: pre.step()), max_steps=12)


@fault("unscaled-inverse", "turned", "blown-up")
def _(observe: Callable) -> None:
    """The plain inverse of averages of tiny squared gradients makes those of lora_A some 1e5 times longer."""
    model, loss, batches = problem("mlp", seed=44)
    pre = Kfac(model, keep_norm=False)

    def watch(name: str, g: Tensor) -> None:
        pre.mats[name] = torch.linalg.inv(pre.grams[name] + 1e-6 * torch.eye(4))

    pre.watch = watch
    fit(observe, model, loss, batches, adamw(model), pre.step)


@fault("half-precision-statistics", "turned", "non-finite", "no-steps")
def _(observe: Callable) -> None:
    """Gram matrices of still scaled gradients overflow in half precision, and NaN is written."""
    model, loss, batches = problem("mlp", seed=45)
    pre, opt, scaler = Whitener(model), adamw(model), torch.amp.GradScaler("cpu", init_scale=2.0**28)

    def watch(name: str, g: Tensor) -> None:
        gram = (g @ g.T if "lora_A" in name else g.T @ g).half()
        pre.mats[name] = torch.linalg.inv_ex(gram.float() + 0.1 * gram.float().diagonal().mean() * torch.eye(4))[0]

    pre.watch = watch
    with observe(model):
        for batch in batches:
            opt.zero_grad()
            scaler.scale(loss(batch)).backward()
            pre.step()
            scaler.step(opt)
            scaler.update(2.0**28)


# ---------------------------------------------------------------- faults: statistics that are not taken


@fault("hooks-on-deleted-adapter", "read", "starved", "scaled-only", "not-ready")
def _(observe: Callable) -> None:
    """The hooks sit on modules of an adapter deleted since; without statistics only the damping is inverted."""
    model, loss, batches = problem("mlp", seed=46)
    pre = Kfac(model, keep_norm=False)
    remake(model, "mlp")
    fit(observe, model, loss, batches, adamw(model), pre.step)


def fast_forward(self, x: Tensor, *args, **kwargs) -> Tensor:
    """Compute a LoRA layer from its weights, past the modules lora_A and lora_B."""
    a, b = self.lora_A["default"].weight, self.lora_B["default"].weight
    return self.base_layer(x) + F.linear(F.linear(x, a), b) * self.scaling["default"]


def speed_up(model: nn.Module) -> None:
    """Patch the forward of all LoRA layers."""
    for layer in (m for m in model.modules() if isinstance(m, LoraLayer)):
        layer.forward = types.MethodType(fast_forward, layer)


@fault("fast-kernels-pass-hooks-by", "read", "starved", "scaled-only", "not-ready")
def _(observe: Callable) -> None:
    """A patched fast forward uses the weights without calling lora_A, so its hooks never fire."""
    model, _, _ = problem("llama", seed=47)
    speed_up(model)
    pre = Kfac(model, keep_norm=False)
    hf(observe, model, Apply("on_pre_optimizer_step", lambda s: pre.step()))


# ---------------------------------------------------------------- faults: not throughout


@fault("only-query-projections", "throughout", "only-some-layers")
def _(observe: Callable) -> None:
    """The name filter knows q_proj only, and v_proj trains plainly."""
    model, loss, batches = problem("llama", seed=48)
    fit(observe, model, loss, batches, adamw(model), Whitener(model, "q_proj").step)


@fault("dpo-only-lora-a", "throughout", "only-one-factor")
def _(observe: Callable) -> None:
    """The callback turns lora_A and leaves every lora_B as it is."""
    model, _, _ = problem("llama", seed=49)
    pre = Whitener(model, "lora_A")
    dpo(observe, model, Apply("on_pre_optimizer_step", lambda s: pre.step()))


@fault("trainer-first-epoch-only", "throughout", "stopped")
def _(observe: Callable) -> None:
    """The callback works only while the epoch is below one."""
    model, _, _ = problem("llama", seed=50)
    pre = Whitener(model)
    turn = Apply("on_pre_optimizer_step", lambda s: pre.step() if s.epoch < 1 else None)
    hf(observe, model, turn, count=32, max_steps=24)


@fault("rank-pattern-skipped", "throughout", "only-some-layers")
def _(observe: Callable) -> None:
    """A check for the configured rank skips the layer to which rank_pattern gives another one."""
    model, loss, batches = problem("mixer", seed=51, rank_pattern={"v": 6})
    pre = Whitener(model)
    pre.items = lambda: {n: p for n, p in loras(model).items() if 4 in p.shape}
    fit(observe, model, loss, batches, adamw(model), pre.step)


@fault("second-active-adapter-unknown", "throughout", "only-some-layers")
def _(observe: Callable) -> None:
    """Two adapters are active and trained, and the preconditioner looks for the default one by name."""
    model, loss, batches = problem("mlp", seed=52)
    both(model)
    fit(observe, model, loss, batches, adamw(model), Whitener(model, "default").step)


def both(model: nn.Module) -> None:
    """Add a second adapter and activate both."""
    model.add_adapter("second", LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS["mlp"]))
    model.base_model.set_adapter(["default", "second"])
    enliven(model)


@fault("error-swallowed-midway", "throughout", "stopped")
def _(observe: Callable) -> None:
    """From the twelfth step on the eigendecomposition fails, and a bare except leaves gradients as they are."""
    model, loss, batches = problem("mixer", seed=53, steps=30)
    pre = Whitener(model)

    def careful() -> None:
        try:
            if pre.count >= 12:
                torch.linalg.cholesky(-torch.eye(4))
            pre.step()
        except RuntimeError:
            return

    fit(observe, model, loss, batches, adamw(model), careful)


# ---------------------------------------------------------------- sound: plain training in unusual loops


@sound("plain-trainer-cosine", "no-modifier")
def _(observe: Callable) -> None:
    """A plain Trainer with a cosine schedule, warm-up and accumulation."""
    model, _, _ = problem("llama", seed=100)
    hf(observe, model, lr_scheduler_type="cosine", warmup_steps=3, gradient_accumulation_steps=2)


@sound("plain-sft-fresh-adapter", "no-modifier")
def _(observe: Callable) -> None:
    """A plain SFTTrainer on an adapter whose lora_B starts at zero."""
    model, _, _ = problem("llama", seed=101, lively=False)
    sft(observe, model)


@sound("plain-dpo-beta-zero-adam", "no-modifier")
def _(observe: Callable) -> None:
    """A plain DPOTrainer, whose reference passes use a frozen copy of the adapter, with Adam's first beta at zero."""
    model, _, _ = problem("llama", seed=102)
    dpo(observe, model, adam_beta1=0.0)


@sound("plain-trainer-adafactor", "no-modifier")
def _(observe: Callable) -> None:
    """A plain Trainer with Adafactor and hard clipping."""
    model, _, _ = problem("llama", seed=103)
    hf(observe, model, optim="adafactor", max_grad_norm=0.1)


@sound("plain-trainer-resumed", "no-modifier")
def _(observe: Callable) -> None:
    """A plain Trainer resumes from a checkpoint of its eighth step."""
    model, _, _ = problem("llama", seed=104)
    with arguments(save_strategy="steps", save_steps=8, max_steps=8, lr_scheduler_type="constant") as args:
        data = rows()
        quiet(Trainer(model=model, args=args, train_dataset=data)).train()
        args.max_steps = 24
        again, _, _ = problem("llama", seed=104)
        trainer = quiet(Trainer(model=again, args=args, train_dataset=data))
        train(observe, trainer, resume_from_checkpoint=os.path.join(args.output_dir, "checkpoint-8"))


@sound("plain-trainer-with-evaluations", "no-modifier")
def _(observe: Callable) -> None:
    """A plain Trainer evaluates every five steps and loads the best weights at the end."""
    model, _, _ = problem("llama", seed=105)
    more = {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5, "max_steps": 20}
    with arguments(**more, load_best_model_at_end=True) as args:
        train(observe, quiet(Trainer(model=model, args=args, train_dataset=rows(), eval_dataset=rows(16))))


@sound("plain-nesterov-clipped", "no-modifier")
def _(observe: Callable) -> None:
    """A plain loop with Nesterov momentum and clipping by norm."""
    model, loss, batches = problem("mlp", seed=106)
    opt = sgd(model, momentum=0.9, nesterov=True)
    fit(observe, model, loss, batches, opt, lambda: nn.utils.clip_grad_norm_(trainable(model), 0.2))


@sound("plain-lbfgs", "no-modifier")
def _(observe: Callable) -> None:
    """LBFGS evaluates its closure several times per step."""
    model, loss, batches = problem("mlp", seed=107, steps=10, batch=64)
    opt = torch.optim.LBFGS(trainable(model), lr=0.2, max_iter=4)

    def closure(batch) -> Tensor:
        opt.zero_grad()
        value = loss(batch)
        value.backward()
        return value

    with observe(model):
        for batch in batches:
            opt.step(lambda b=batch: closure(b))


@sound("plain-sam", "no-modifier")
def _(observe: Callable) -> None:
    """Plain SAM perturbs weights, runs backward twice, and puts them back before it steps."""
    model, loss, batches = problem("mlp", seed=108)
    sam = Sam(sgd(model, momentum=0.5))
    with observe(model):
        for batch in batches:
            loss(batch).backward()
            sam.climb()
            loss(batch).backward()
            sam.descend()


@sound("plain-scaler-one-skip", "no-modifier")
def _(observe: Callable) -> None:
    """A loss scale that is too large at first makes the scaler skip once, and all is well afterwards."""
    model, loss, batches = problem("mixer", seed=109, steps=30)
    opt, scaler = adamw(model), torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-100)
    with observe(model):
        for batch in batches:
            opt.zero_grad()
            scaler.scale(100 * loss(batch)).backward()
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(trainable(model), 1.0)
            scaler.step(opt)
            scaler.update()


@sound("plain-optimizer-in-backward", "no-modifier")
def _(observe: Callable) -> None:
    """Every parameter has its own optimizer, which steps during backward and frees the gradient."""
    model, loss, batches = problem("mlp", seed=110)
    opts = {p: torch.optim.AdamW([p], lr=3e-3) for p in trainable(model)}

    def stepped(p: Tensor) -> None:
        opts[p].step()
        opts[p].zero_grad()

    for p in opts:
        p.register_post_accumulate_grad_hook(stepped)
    with observe(model):
        for batch in batches:
            loss(batch).backward()


@sound("plain-lion", "no-modifier")
def _(observe: Callable) -> None:
    """A plain loop with Lion."""
    model, loss, batches = problem("llama", seed=111)
    fit(observe, model, loss, batches, Lion(trainable(model)))


@sound("plain-muon", "no-modifier")
def _(observe: Callable) -> None:
    """A plain loop with Muon and momentum."""
    model, loss, batches = problem("mixer", seed=112)
    fit(observe, model, loss, batches, Muon(trainable(model), momentum=0.9))


@sound("plain-rprop", "no-modifier")
def _(observe: Callable) -> None:
    """Rprop looks at signs of full-batch gradients only."""
    model, loss, batches = problem("mlp", seed=113, batch=64)
    opt = torch.optim.Rprop(trainable(model), lr=1e-3)
    fit(observe, model, loss, batches[:1] * 24, opt)


@sound("plain-accelerate-accumulate", "no-modifier")
def _(observe: Callable) -> None:
    """Accelerate accumulates over three micro-batches and clips when it synchronizes."""
    model, loss, batches = problem("mlp", seed=114, steps=60)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model, opt = accelerator.prepare(model, adamw(model))
    with observe(model):
        for batch in batches:
            with accelerator.accumulate(model):
                accelerator.backward(loss(batch))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                opt.step()
                opt.zero_grad()


@sound("plain-ema-swapped-and-back", "no-modifier")
def _(observe: Callable) -> None:
    """Averaged weights are swapped in for an evaluation and the trained ones are put back before going on."""
    model, loss, batches = problem("mlp", seed=115)
    shadow = {p: p.detach().clone() for p in trainable(model)}

    @torch.no_grad()
    def evaluate(number: int) -> None:
        for p, average in shadow.items():
            average.lerp_(p, 0.1)
        if number % 5 == 4:
            kept = [p.clone() for p in shadow]
            for p, average in shadow.items():
                p.copy_(average)
            model.eval()
            loss(batches[0])
            model.train()
            for p, old in zip(shadow, kept, strict=True):
                p.copy_(old)

    fit(observe, model, loss, batches, adamw(model), after=evaluate)


@sound("plain-averaged-model", "no-modifier")
def _(observe: Callable) -> None:
    """AveragedModel keeps a copy of the whole model beside the trained one."""
    model, loss, batches = problem("mixer", seed=116)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    fit(observe, model, loss, batches, adamw(model, amsgrad=True), after=lambda n: average.update_parameters(model))


@sound("plain-reentrant-checkpoint", "no-modifier")
def _(observe: Callable) -> None:
    """Reentrant checkpointing recomputes all layers, over inputs that ask for gradients."""
    model, _, batches = problem("deep", seed=117, base=lambda: Deep(3, reentrant=True), targets=TARGETS["deep"][:3])
    loss = lambda b: F.mse_loss(model(b[0].clone().requires_grad_(True)), b[1])  # noqa: E731
    fit(observe, model, loss, batches, adamw(model))


@sound("plain-with-logging-hooks", "no-modifier")
def _(observe: Callable) -> None:
    """Hooks on lora_A, on gradients and on the optimizer only log norms."""
    model, loss, batches = problem("mlp", seed=118)
    opt, log = adamw(model), []
    for path, module in model.named_modules():
        if path.endswith("lora_A.default"):
            module.register_forward_hook(lambda m, i, o: log.append(o.norm().item()))
            module.register_full_backward_hook(lambda m, gi, go: log.append(go[0].norm().item()))
    for p in trainable(model):
        p.register_hook(lambda g: log.append(g.norm().item()))
    opt.register_step_pre_hook(lambda *_: log.append(len(log)))
    fit(observe, model, loss, batches, opt)


@sound("plain-frozen-lora-a", "no-modifier")
def _(observe: Callable) -> None:
    """LoRA-FA: lora_A is frozen by design, and lora_B trains."""
    model, loss, batches = problem("mlp", seed=119)
    for p in loras(model, "lora_A").values():
        p.requires_grad_(False)
    fit(observe, model, loss, batches, adamw(model))


@sound("plain-lora-plus-one-cycle", "no-modifier")
def _(observe: Callable) -> None:
    """LoRA+ groups under a one-cycle schedule that also cycles momentum."""
    model, loss, batches = problem("llama", seed=120)
    a, b = list(loras(model, "lora_A").values()), list(loras(model, "lora_B").values())
    opt = torch.optim.AdamW([{"params": a, "lr": 1e-3}, {"params": b, "lr": 8e-3}])
    sched = OneCycleLR(opt, max_lr=[1e-3, 8e-3], total_steps=len(batches) + 1)
    fit(observe, model, loss, batches, opt, after=lambda n: sched.step())


@sound("plain-module-without-lora", "no-modifier")
def _(observe: Callable) -> None:
    """A module without any adapter trains all of its weights."""
    seed_all(121)
    model = Mlp()
    fit(observe, model, lambda b: F.mse_loss(model(b[0]), b[1]), pairs(24), torch.optim.NAdam(model.parameters(), 2e-3))


@sound("plain-dora-rslora", "no-modifier")
def _(observe: Callable) -> None:
    """DoRA with rank-stabilized scaling, its magnitudes in a group of their own."""
    model, loss, batches = problem("mlp", seed=122, use_dora=True, use_rslora=True)
    sizes = [p for n, p in model.named_parameters() if "magnitude" in n]
    opt = torch.optim.RAdam([{"params": list(loras(model).values())}, {"params": sizes, "lr": 1e-3}], lr=3e-3)
    fit(observe, model, loss, batches, opt)


@sound("plain-merged-for-evaluations", "no-modifier")
def _(observe: Callable) -> None:
    """The adapter is merged for an evaluation after every fourth step and unmerged again."""
    model, loss, batches = problem("mlp", seed=123)

    def evaluate(number: int) -> None:
        if number % 4 == 3:
            model.merge_adapter()
            with torch.no_grad():
                loss(batches[0])
            model.unmerge_adapter()

    fit(observe, model, loss, batches, adamw(model), after=evaluate)


@sound("plain-autocast-accumulation-in-place-zero", "no-modifier")
def _(observe: Callable) -> None:
    """Autocast in bfloat16 with accumulation, and gradients zeroed in place instead of dropped."""
    model, loss, batches = problem("llama", seed=124, steps=48)
    opt = adamw(model)
    with observe(model):
        for number, batch in enumerate(batches, 1):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                value = loss(batch) / 2
            value.backward()
            if number % 2 == 0:
                opt.step()
                opt.zero_grad(set_to_none=False)


@sound("plain-saved-head-and-trainable-tokens", "no-modifier")
def _(observe: Callable) -> None:
    """A full lm_head and three rows of the embedding train beside the adapters."""
    model, loss, batches = problem(
        "llama", seed=125, modules_to_save=["lm_head"], trainable_token_indices={"embed_tokens": [3, 4, 5]}
    )
    fit(observe, model, loss, batches, adamw(model))


@sound("plain-two-optimizers", "no-modifier")
def _(observe: Callable) -> None:
    """lora_A and lora_B have optimizers of different kinds, both stepped each time."""
    model, loss, batches = problem("mixer", seed=126)
    first = torch.optim.SGD(loras(model, "lora_A").values(), lr=0.05)
    second = torch.optim.Adamax(loras(model, "lora_B").values(), lr=3e-3)
    with observe(model):
        for batch in batches:
            value = loss(batch)
            first.zero_grad()
            second.zero_grad()
            value.backward()
            first.step()
            second.step()


@sound("plain-masters", "no-modifier")
def _(observe: Callable) -> None:
    """Float32 masters outside of a bfloat16 model take its gradients and hand weights back after each step."""
    seed_all(127)
    model = adapt(Mlp().to(torch.bfloat16), TARGETS["mlp"], cast=False)
    batches = [(x.bfloat16(), y.bfloat16()) for x, y in pairs(24)]
    run_masters(observe, model, lambda b: F.mse_loss(model(b[0]), b[1]), batches, lambda: None)


def run_masters(observe: Callable, model: nn.Module, loss: Callable, batches: list, before: Callable) -> None:
    """Train float32 masters of a model in lower precision."""
    params = trainable(model)
    masters = [nn.Parameter(p.detach().float().clone()) for p in params]
    opt = torch.optim.AdamW(masters, lr=1e-2)
    with observe(model):
        for batch in batches:
            model.zero_grad()
            loss(batch).backward()
            before()
            for p, m in zip(params, masters, strict=True):
                m.grad = p.grad.detach().float()
            opt.step()
            with torch.no_grad():
                for p, m in zip(params, masters, strict=True):
                    p.copy_(m)


# ---------------------------------------------------------------- sound: correct preconditioning in unusual ways


@sound("turned-trainer-callback", "effective")
def _(observe: Callable) -> None:
    """K-FAC in on_pre_optimizer_step, after clipping, with accumulation and a warm-up of the learning rate."""
    model, _, _ = problem("llama", seed=200)
    pre = Kfac(model)
    turn = Apply("on_pre_optimizer_step", lambda s: pre.step())
    hf(observe, model, turn, gradient_accumulation_steps=2, warmup_steps=2, lr_scheduler_type="cosine")


@sound("turned-sft-fresh-adapter", "effective")
def _(observe: Callable) -> None:
    """Whitening in SFTTrainer's callback from zero lora_B on, so the first gradient of lora_A is zero."""
    model, _, _ = problem("llama", seed=201, lively=False)
    pre = Whitener(model)
    sft(observe, model, Apply("on_pre_optimizer_step", lambda s: pre.step()))


@sound("turned-dpo", "effective")
def _(observe: Callable) -> None:
    """Whitening in DPOTrainer, where reference passes run through a frozen copy of the adapter."""
    model, _, _ = problem("llama", seed=202)
    pre = Whitener(model)
    dpo(observe, model, Apply("on_pre_optimizer_step", lambda s: pre.step()), max_steps=16)


@sound("turned-in-clip-override", "effective")
def _(observe: Callable) -> None:
    """A Trainer turns gradients in its clipping method, before it clips them."""
    model, _, _ = problem("llama", seed=203)
    pre = Whitener(model)

    class Turning(Trainer):
        def _clip_grad_norm(self, model):
            pre.step()
            return super()._clip_grad_norm(model)

    hf(observe, model, kind=Turning, max_grad_norm=0.3, optim="adafactor")


@sound("turned-in-training-step", "effective")
def _(observe: Callable) -> None:
    """training_step turns gradients, which is right as long as there is no accumulation."""
    model, _, _ = problem("llama", seed=204)
    pre = Kfac(model, warm=3)

    class Turning(Trainer):
        def training_step(self, *args, **kwargs) -> Tensor:
            value = super().training_step(*args, **kwargs)
            pre.step()
            return value

    hf(observe, model, kind=Turning, max_steps=30)


@sound("turned-trainer-resumed", "effective")
def _(observe: Callable) -> None:
    """A run resumed from a checkpoint, with a preconditioner that starts its averages anew."""
    model, _, _ = problem("llama", seed=205)
    with arguments(save_strategy="steps", save_steps=6, max_steps=6, lr_scheduler_type="constant") as args:
        data = rows()
        quiet(Trainer(model=model, args=args, train_dataset=data)).train()
        args.max_steps = 26
        again, _, _ = problem("llama", seed=205)
        pre = Whitener(again)
        turn = Apply("on_pre_optimizer_step", lambda s: pre.step())
        trainer = quiet(Trainer(model=again, args=args, train_dataset=data), turn)
        train(observe, trainer, resume_from_checkpoint=os.path.join(args.output_dir, "checkpoint-6"))


@sound("turned-by-step-pre-hook", "effective")
def _(observe: Callable) -> None:
    """The optimizer's own pre-step hook turns gradients, with Nesterov momentum behind it."""
    model, loss, batches = problem("mlp", seed=206)
    pre, opt = Whitener(model), sgd(model, momentum=0.9, nesterov=True)
    opt.register_step_pre_hook(lambda *_: pre.step())
    fit(observe, model, loss, batches, opt)


@sound("turned-inside-optimizer-subclass", "effective")
def _(observe: Callable) -> None:
    """A subclass of AdamW turns gradients at the beginning of step."""
    model, loss, batches = problem("mixer", seed=207)
    fit(observe, model, loss, batches, TurnedAdamW(trainable(model), Whitener(model), lr=3e-3))


@sound("turned-by-tensor-hooks-with-accumulation", "effective")
def _(observe: Callable) -> None:
    """Tensor hooks turn every micro-batch's gradient by one matrix per step before it is added, which is linear."""
    model, loss, batches = problem("mlp", seed=208, steps=60)
    pre, opt = Whitener(model, keep_norm=False), sgd(model)
    for name, p in pre.items().items():
        p.register_hook(lambda g, n=name: pre.apply(n, g))
    for batch in batches[:2]:
        for n, g in zip(pre.items(), torch.autograd.grad(loss(batch), list(pre.items().values())), strict=True):
            pre.watch(n, g / 1)
    for name, m in pre.mats.items():
        pre.mats[name] = m * len(m) / m.trace()
    with observe(model):
        for number, batch in enumerate(batches, 1):
            (loss(batch) / 2).backward()
            if number % 2 == 0:
                opt.step()
                opt.zero_grad()


@sound("turned-after-unscale", "effective")
def _(observe: Callable) -> None:
    """Unscale, turn, clip, step: the right order with a scaler, and groups of their own for both factors."""
    model, loss, batches = problem("mixer", seed=209)
    a, b = list(loras(model, "lora_A").values()), list(loras(model, "lora_B").values())
    opt = torch.optim.AdamW([{"params": a, "lr": 2e-3}, {"params": b, "lr": 8e-3}])
    pre, scaler = Kfac(model), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with observe(model):
        for batch in batches:
            opt.zero_grad()
            scaler.scale(loss(batch)).backward()
            scaler.unscale_(opt)
            pre.step()
            nn.utils.clip_grad_norm_(trainable(model), 1.0)
            scaler.step(opt)
            scaler.update()


@sound("turned-before-unscale", "effective")
def _(observe: Callable) -> None:
    """Scaled gradients are turned by a matrix that does not depend on their scale, and unscaled afterwards."""
    model, loss, batches = problem("mlp", seed=210)
    pre, opt, scaler = Whitener(model), sgd(model, lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with observe(model):
        for batch in batches:
            opt.zero_grad()
            scaler.scale(loss(batch)).backward()
            pre.step()
            scaler.step(opt)
            scaler.update()


@sound("turned-when-accelerate-synchronizes", "effective")
def _(observe: Callable) -> None:
    """In an accumulate block gradients are turned only when they are complete."""
    model, loss, batches = problem("mlp", seed=211, steps=60)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model, opt = accelerator.prepare(model, adamw(model))
    pre = Whitener(model)
    with observe(model):
        for batch in batches:
            with accelerator.accumulate(model):
                accelerator.backward(loss(batch))
                if accelerator.sync_gradients:
                    pre.step()
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                opt.step()
                opt.zero_grad()


@sound("turned-in-sam-second-pass", "effective")
def _(observe: Callable) -> None:
    """SAM climbs with plain gradients, and those of the second pass are turned before it steps."""
    model, loss, batches = problem("mlp", seed=212)
    pre, sam = Whitener(model), Sam(sgd(model, momentum=0.5))
    with observe(model):
        for batch in batches:
            loss(batch).backward()
            sam.climb()
            loss(batch).backward()
            pre.step()
            sam.descend()


@sound("turned-in-lbfgs-closure", "effective")
def _(observe: Callable) -> None:
    """The closure of LBFGS turns the gradients it computes by one constant matrix per tensor."""
    model, loss, batches = problem("mlp", seed=213, steps=16, batch=64)
    pre = Whitener(model, frozen=True, damping=0.1, keep_norm=False)
    opt = torch.optim.LBFGS(trainable(model), lr=0.1, max_iter=1, history_size=2)

    def closure(batch) -> Tensor:
        opt.zero_grad()
        value = loss(batch)
        value.backward()
        pre.step()
        return value

    with observe(model):
        for batch in batches:
            opt.step(lambda b=batch: closure(b))


@sound("turned-and-stepped-in-backward", "effective")
def _(observe: Callable) -> None:
    """Each parameter's accumulation hook turns its gradient, steps its optimizer, and frees it."""
    model, loss, batches = problem("mlp", seed=214)
    pre = Whitener(model)
    names = {p: n for n, p in pre.items().items()}
    opts = {p: torch.optim.AdamW([p], lr=3e-3) for p in names}

    def stepped(p: Tensor) -> None:
        p.grad.copy_(pre.turned(names[p], p.grad))
        opts[p].step()
        opts[p].zero_grad()

    for p in opts:
        p.register_post_accumulate_grad_hook(stepped)
    with observe(model):
        for batch in batches:
            loss(batch).backward()


@sound("turned-by-assignment-under-adafactor", "effective")
def _(observe: Callable) -> None:
    """New tensors are put into grad, and Adafactor steps with a learning rate of its own scale."""
    model, loss, batches = problem("llama", seed=215)
    pre = Whitener(model)
    opt = Adafactor(trainable(model), lr=1e-2, relative_step=False, scale_parameter=False, warmup_init=False)

    def assign() -> None:
        for name, p in pre.items().items():
            p.grad = pre.turned(name, p.grad)

    fit(observe, model, loss, batches, opt, assign)


@sound("turned-by-foreach-copy", "effective")
def _(observe: Callable) -> None:
    """All gradients are turned first and then written in one foreach call through data."""
    model, loss, batches = problem("mixer", seed=216)
    pre = Kfac(model)

    def write() -> None:
        items = pre.items()
        outs = [pre.turned(n, p.grad) for n, p in items.items()]
        torch._foreach_copy_([p.grad.data for p in items.values()], outs)

    fit(observe, model, loss, batches, torch.optim.RMSprop(trainable(model), lr=2e-3), write)


@sound("turned-dora-rslora", "effective")
def _(observe: Callable) -> None:
    """Both factors of DoRA layers are turned, and the magnitudes train plainly."""
    model, loss, batches = problem("mlp", seed=217, use_dora=True, use_rslora=True)
    fit(observe, model, loss, batches, adamw(model), Whitener(model).step)


@sound("turned-under-reentrant-checkpoint", "effective")
def _(observe: Callable) -> None:
    """K-FAC hooks under reentrant checkpointing take each output twice, over inputs that ask for gradients."""
    model, _, batches = problem("deep", seed=218, base=lambda: Deep(3, reentrant=True), targets=TARGETS["deep"][:3])
    loss = lambda b: F.mse_loss(model(b[0].clone().requires_grad_(True)), b[1])  # noqa: E731
    fit(observe, model, loss, batches, adamw(model), Kfac(model, damping=0.03).step)


@sound("turned-after-long-warm-up", "effective")
def _(observe: Callable) -> None:
    """The first five of thirty steps leave gradients as they are while averages fill."""
    model, loss, batches = problem("mlp", seed=219, steps=30)
    fit(observe, model, loss, batches, adamw(model), Whitener(model, warm=5, beta=0.9).step)


@sound("turned-two-active-adapters", "effective")
def _(observe: Callable) -> None:
    """Two adapters are active at a time, and both are turned."""
    model, loss, batches = problem("mlp", seed=220)
    both(model)
    fit(observe, model, loss, batches, adamw(model), Whitener(model).step)


@sound("turned-adapter-made-anew-before", "effective")
def _(observe: Callable) -> None:
    """The adapter is made anew, and hooks and optimizer only after that."""
    model, loss, batches = problem("mlp", seed=221)
    remake(model, "mlp")
    fit(observe, model, loss, batches, adamw(model), Kfac(model).step)


@sound("turned-with-merged-evaluations", "effective")
def _(observe: Callable) -> None:
    """The adapter is merged and unmerged for evaluations between preconditioned steps."""
    model, loss, batches = problem("mixer", seed=222)

    def evaluate(number: int) -> None:
        if number % 6 == 5:
            model.eval()
            model.merge_adapter()
            with torch.no_grad():
                loss(batches[0])
            model.unmerge_adapter()
            model.train()

    fit(observe, model, loss, batches, adamw(model), Kfac(model).step, evaluate)


@sound("turned-bfloat16-adapter", "effective")
def _(observe: Callable) -> None:
    """Adapters in bfloat16 with statistics in float32 and steps well above the resolution."""
    seed_all(223)
    model = adapt(Mlp().to(torch.bfloat16), TARGETS["mlp"], cast=False)
    batches = [(x.bfloat16(), y.bfloat16()) for x, y in pairs(24)]
    fit(observe, model, lambda b: F.mse_loss(model(b[0]), b[1]), batches, adamw(model, lr=2e-2), Whitener(model).step)


@sound("turned-matrix-every-fifth-step", "effective")
def _(observe: Callable) -> None:
    """Matrices are refreshed every fifth step and applied to the gradient of each."""
    model, loss, batches = problem("llama", seed=224)
    opt = adamw(model)
    sched = CosineAnnealingWarmRestarts(opt, T_0=8, eta_min=1e-4)
    fit(observe, model, loss, batches, opt, Whitener(model, every=5).step, lambda n: sched.step())


@sound("turned-before-masters", "effective")
def _(observe: Callable) -> None:
    """Gradients of a bfloat16 model are turned before float32 masters take them."""
    seed_all(225)
    model = adapt(Mlp().to(torch.bfloat16), TARGETS["mlp"], cast=False)
    batches = [(x.bfloat16(), y.bfloat16()) for x, y in pairs(24)]
    run_masters(observe, model, lambda b: F.mse_loss(model(b[0]), b[1]), batches, Whitener(model).step)


@sound("turned-past-fast-kernels", "effective")
def _(observe: Callable) -> None:
    """A patched forward calls no lora_A, and whitening needs no hooks."""
    model, _, _ = problem("llama", seed=226)
    speed_up(model)
    pre = Whitener(model)
    hf(observe, model, Apply("on_pre_optimizer_step", lambda s: pre.step()), optim="sgd", learning_rate=0.1)


@sound("turned-beside-saved-head", "effective")
def _(observe: Callable) -> None:
    """Adapters of two ranks are turned, and a saved head trains plainly beside them."""
    model, loss, batches = problem("mlp", seed=227, modules_to_save=["head"], rank_pattern={"fc2": 6})
    fit(observe, model, loss, batches, adamw(model, weight_decay=0.1), Whitener(model).step)


@sound("turned-with-ema-and-lookups", "effective")
def _(observe: Callable) -> None:
    """Averaged weights go in for evaluations and come out again between preconditioned steps."""
    model, loss, batches = problem("mlp", seed=228)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))

    @torch.no_grad()
    def evaluate(number: int) -> None:
        average.update_parameters(model)
        if number % 8 == 7:
            kept = copy.deepcopy(model.state_dict())
            model.load_state_dict(average.module.state_dict())
            model.eval()
            loss(batches[0])
            model.train()
            model.load_state_dict(kept)

    fit(observe, model, loss, batches, adamw(model), Whitener(model).step, evaluate)


@sound("turned-while-maximizing", "effective")
def _(observe: Callable) -> None:
    """A score is maximized, so steps go along the turned gradient and not against it."""
    model, loss, batches = problem("mlp", seed=229)
    opt = sgd(model, lr=0.1, momentum=0.5, maximize=True)
    fit(observe, model, lambda b: -loss(b), batches, opt, Whitener(model).step)


@sound("turned-before-lion", "effective")
def _(observe: Callable) -> None:
    """Full matrices change signs, so sign descent takes other steps."""
    model, loss, batches = problem("mixer", seed=230)
    fit(observe, model, loss, batches, Lion(trainable(model)), Whitener(model).step)


@sound("turned-with-batches-of-uneven-size", "effective")
def _(observe: Callable) -> None:
    """Accumulated sums over batches of uneven size are divided by their count, turned once, and stepped."""
    model, _, batches = problem("mlp", seed=231, steps=48)
    pre, opt = Whitener(model), adamw(model)
    sizes = itertools.cycle([16, 5, 11])
    with observe(model):
        for first, second in zip(batches[::2], batches[1::2], strict=True):
            parts = [(x[:n], y[:n]) for (x, y), n in ((b, next(sizes)) for b in (first, second))]
            for x, y in parts:
                F.mse_loss(model(x), y, reduction="sum").backward()
            total = sum(y.numel() for _, y in parts)
            for p in trainable(model):
                p.grad /= total
            pre.step()
            opt.step()
            opt.zero_grad()


@sound("turned-after-from-pretrained", "effective")
def _(observe: Callable) -> None:
    """An adapter loaded for training goes on with whitening."""
    first, _, batches = problem("mlp", seed=232)
    model = reloaded(first, 232, is_trainable=True)
    fit(observe, model, lambda b: F.mse_loss(model(b[0]), b[1]), batches, adamw(model), Whitener(model).step)


@sound("turned-under-two-optimizers-and-scaler", "effective")
def _(observe: Callable) -> None:
    """Each factor has a preconditioner and an optimizer of its own, and one scaler steps both."""
    model, loss, batches = problem("mixer", seed=233)
    parts, scaler = ("lora_A", "lora_B"), torch.amp.GradScaler("cpu", init_scale=256.0)
    pres = [Whitener(model, part) for part in parts]
    opts = [torch.optim.AdamW(loras(model, part).values(), lr=lr) for part, lr in zip(parts, (1e-3, 4e-3), strict=True)]
    with observe(model):
        for batch in batches:
            model.zero_grad()
            scaler.scale(loss(batch)).backward()
            for pre, opt in zip(pres, opts, strict=True):
                scaler.unscale_(opt)
                pre.step()
                scaler.step(opt)
            scaler.update()


def main() -> None:
    """Run all cases unobserved."""
    for case in CASES:
        start, word = time.perf_counter(), "ok"
        try:
            case.run(contextlib.nullcontext)
        except Exception as error:
            word = f"{type(error).__name__}: {error}"
        print(f"{case.kind:5} {case.name:45} {time.perf_counter() - start:6.2f} s  {word}")


if __name__ == "__main__":
    main()
