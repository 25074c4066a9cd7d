"""Blind test cases, round 3: trainings whose gradients are, or are not, modified as their authors believe."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from peft import (
    AdaLoraConfig,
    LoraConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from transformers import Adafactor, LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)
warnings.filterwarnings("ignore")


@dataclass(frozen=True)
class Case:
    """One training with what is to be said about it."""

    name: str
    kind: str
    link: str | None
    causes: tuple[str, ...]
    run: Callable
    why: str


CASES: list[Case] = []


def fault(name: str, link: str, *causes: str) -> Callable:
    """Register a training in which a link breaks."""

    def register(run: Callable) -> Callable:
        CASES.append(Case(name, "fault", link, causes, run, " ".join(run.__doc__.split())))
        return run

    return register


def sound(name: str, cause: str) -> Callable:
    """Register a training in which every link holds."""

    def register(run: Callable) -> Callable:
        CASES.append(Case(name, "sound", None, (cause,), run, " ".join(run.__doc__.split())))
        return run

    return register


# ---------------------------------------------------------------- models and data


class Attention(nn.Module):
    """One residual self-attention block without biases."""

    def __init__(self, width: int):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(width, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Attend and add."""
        mixed = F.scaled_dot_product_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x))
        return x + self.o_proj(mixed)


class Encoder(nn.Module):
    """A few attention blocks, checkpointed on request, and an output layer."""

    def __init__(self, width: int = 16, layers: int = 2, reentrant: bool | None = None):
        super().__init__()
        self.blocks = nn.ModuleList(Attention(width) for _ in range(layers))
        self.head = nn.Linear(width, width)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks and the output layer."""
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


class Mlp(nn.Module):
    """Residual up and down projections."""

    def __init__(self, width: int = 16, layers: int = 2):
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """Run all pairs of projections."""
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(F.silu(up(x)))
        return x


class Headed(nn.Module):
    """A backbone with a trainable head of one output."""

    def __init__(self, body: nn.Module, width: int = 16, outputs: int = 1):
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Score the body's output."""
        return self.head(self.body(x))


QV, UD = ["q_proj", "v_proj"], ["up", "down"]


def adapt(base: nn.Module, targets: list[str], r: int = 4, init: bool | str = False, **options) -> nn.Module:
    """Put LoRA on a model; both factors are random unless init says otherwise."""
    if targets == UD:
        targets = r".*\.?(up|down)\.\d+"
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, init_lora_weights=init, **options)
    return spread(get_peft_model(base, config))


@torch.no_grad()
def spread(model: nn.Module, adapter: str = "default") -> nn.Module:
    """Give the rank directions of an adapter unequal sizes, as training does."""
    for name, p in lora(model, adapter).items():
        ranks = p if ".lora_A." in name else p.transpose(0, 1)
        ranks.mul_(torch.logspace(0.1, -0.7, len(ranks)).view(-1, *[1] * (p.dim() - 1)))
    return model


def second(model: nn.Module, name: str = "second") -> None:
    """Add another adapter of the same configuration."""
    model.add_adapter(name, copy.deepcopy(model.peft_config["default"]))
    spread(model, name)


def attn(seed: int, width: int = 16, layers: int = 2, reentrant: bool | None = None, **options) -> nn.Module:
    """Return a small attention encoder with LoRA on its query and value projections."""
    torch.manual_seed(seed)
    return adapt(Encoder(width, layers, reentrant), options.pop("targets", QV), **options)


def mlp(seed: int, width: int = 16, layers: int = 2, **options) -> nn.Module:
    """Return a small residual MLP with LoRA on its projections."""
    torch.manual_seed(seed)
    return adapt(Mlp(width, layers), UD, **options)


def llama(seed: int, hidden: int = 16, layers: int = 1, targets: list[str] | None = None, **options) -> nn.Module:
    """Return a tiny Llama with LoRA."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=48, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
        tie_word_embeddings=options.pop("tie", False), attn_implementation="eager", use_cache=False,
    )  # fmt: skip
    return adapt(LlamaForCausalLM(config), targets or QV, task_type="CAUSAL_LM", **options)


def batch(i: int, width: int = 16, rows: int = 12) -> tuple[Tensor, Tensor]:
    """Return the i-th batch of a fixed regression task."""
    make = torch.Generator().manual_seed(1000 + i)
    x = torch.randn(rows, 5, width, generator=make)
    teacher = torch.randn(width, width, generator=torch.Generator().manual_seed(7)) / math.sqrt(width)
    return x, torch.tanh(x @ teacher) + x.roll(1, -1)


def tokens(i: int, rows: int = 6, length: int = 10) -> Tensor:
    """Return the i-th batch of rising token sequences."""
    start = torch.randint(0, 48, (rows, 1), generator=torch.Generator().manual_seed(2000 + i))
    return (start + 3 * torch.arange(length)) % 48


def loss_of(model: nn.Module, i: int) -> Tensor:
    """Return the regression loss on the i-th batch."""
    x, y = batch(i)
    return F.mse_loss(model(x), y)


def lm_loss(model: nn.Module, i: int) -> Tensor:
    """Return the language-model loss on the i-th batch."""
    ids = tokens(i)
    return model(input_ids=ids, labels=ids).loss


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that take gradients."""
    return [p for p in model.parameters() if p.requires_grad]


def lora(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """Return the LoRA factors of one adapter by name."""
    marks = (f".lora_A.{adapter}", f".lora_B.{adapter}")
    return {n: p for n, p in model.named_parameters() if any(m in n for m in marks)}


def clones(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return detached copies."""
    return {n: t.detach().clone() for n, t in tensors.items()}


@torch.no_grad()
def put(target: dict[str, Tensor], source: dict[str, Tensor]) -> None:
    """Copy values over by name."""
    for name, tensor in target.items():
        tensor.copy_(source[name])


# ---------------------------------------------------------------- preconditioners


def turned(matrix: Tensor, grad: Tensor, left: bool) -> Tensor:
    """Multiply a gradient by an r x r matrix on its rank side and keep its norm."""
    work = grad.float()
    out = matrix @ work if left else work @ matrix
    return (out * work.norm() / out.norm().clamp_min(1e-30)).to(grad.dtype)


def inverse_power(cov: Tensor, damping: float = 0.02, power: float = 0.7) -> Tensor:
    """Return the damped inverse power of a covariance."""
    values, vectors = torch.linalg.eigh(cov / cov.trace().clamp_min(1e-30) * len(cov))
    return vectors @ torch.diag((values.clamp_min(0) + damping) ** -power) @ vectors.T


def gram_of(grad: Tensor, left: bool) -> Tensor:
    """Return a gradient's normalised Gram matrix on its rank side."""
    work = grad.detach().float()
    gram = work @ work.T if left else work.T @ work
    return gram / gram.trace().clamp_min(1e-30)


class Gram:
    """Whiten LoRA gradients by the running average of their own Gram matrices."""

    def __init__(self, tensors: dict[str, nn.Parameter], warmup: int = 2, every: int = 1, decay: float = 0.8, **matrix):
        self.tensors, self.warmup, self.every, self.decay, self.matrix = dict(tensors), warmup, every, decay, matrix
        self.cov: dict[str, Tensor] = {}
        self.root: dict[str, Tensor] = {}
        self.seen: dict[str, int] = {}

    def learn(self, name: str, grad: Tensor) -> None:
        """Take a gradient into the statistics and refresh the matrix when due."""
        if not grad.any():
            return
        gram = gram_of(grad, ".lora_A." in name)
        self.cov[name] = self.cov[name].lerp(gram, 1 - self.decay) if name in self.cov else gram
        self.seen[name] = self.seen.get(name, 0) + 1
        if name not in self.root or self.seen[name] % self.every == 0:
            self.root[name] = inverse_power(self.cov[name], **self.matrix)

    def turn(self, name: str, grad: Tensor) -> Tensor:
        """Return the preconditioned gradient, or the same one while warming up."""
        self.learn(name, grad)
        if self.seen.get(name, 0) <= self.warmup:
            return grad
        return turned(self.root[name], grad, ".lora_A." in name)

    def apply(self) -> None:
        """Rewrite all gradients in place."""
        for name, p in self.tensors.items():
            if p.grad is not None:
                p.grad.copy_(self.turn(name, p.grad))


class Kfac:
    """Whiten LoRA gradients by activations and gradients at the rank space, taken with hooks."""

    def __init__(self, model: nn.Module, adapter: str = "default", warmup: int = 2, decay: float = 0.8, **matrix):
        self.warmup, self.decay, self.matrix = warmup, decay, matrix
        self.cov: dict[str, Tensor] = {}
        self.steps = 0
        self.tensors = lora(model, adapter)
        self.handles = [
            module.register_forward_hook(self.hook(name))
            for name, module in model.named_modules()
            if name.endswith(f".lora_A.{adapter}")
        ]

    def add(self, name: str, rows: Tensor) -> None:
        """Average the second moment of rank-space rows into one statistic."""
        rows = rows.detach().float().reshape(-1, rows.shape[-1])
        cov = rows.T @ rows
        cov = cov / cov.trace().clamp_min(1e-30)
        self.cov[name] = self.cov[name].lerp(cov, 1 - self.decay) if name in self.cov else cov

    def hook(self, name: str) -> Callable:
        """Return the forward hook of one lora_A."""
        a_name, b_name = f"{name}.weight", f"{name}.weight".replace(".lora_A.", ".lora_B.")

        def forward_hook(module: nn.Module, args: tuple, out: Tensor) -> None:
            if out.requires_grad and module.training:
                self.add(b_name, out)
                out.register_hook(lambda grad: self.add(a_name, grad))

        return forward_hook

    def turn(self, name: str, grad: Tensor) -> Tensor:
        """Return the preconditioned gradient, or the same one without statistics."""
        if self.steps <= self.warmup or name not in self.cov:
            return grad
        return turned(inverse_power(self.cov[name], **self.matrix), grad, ".lora_A." in name)

    def apply(self) -> None:
        """Rewrite all gradients in place."""
        self.steps += 1
        for name, p in self.tensors.items():
            if p.grad is not None:
                p.grad.copy_(self.turn(name, p.grad))


def sgd(params, lr: float = 0.05, momentum: float = 0.0) -> torch.optim.SGD:
    """Return plain or momentum SGD."""
    return torch.optim.SGD(params, lr=lr, momentum=momentum)


def adamw(params, lr: float = 3e-3, **options) -> torch.optim.AdamW:
    """Return AdamW without decay."""
    return torch.optim.AdamW(params, lr=lr, weight_decay=0.0, **options)


def step(model: nn.Module, i: int, optimizer, pre=None, loss_fn: Callable = loss_of) -> float:
    """Run one ordinary training step."""
    optimizer.zero_grad()
    loss = loss_fn(model, i)
    loss.backward()
    if pre is not None:
        pre.apply()
    optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def evaluate(model: nn.Module, loss_fn: Callable = loss_of) -> float:
    """Return the loss on a held-out batch in evaluation mode."""
    model.eval()
    value = float(loss_fn(model, 999))
    model.train()
    return value


# ---------------------------------------------------------------- faults: averages, swaps, reloads


@fault("ema_left_in_after_eval", "kept", "not-kept", "update-undone")
def _(observe):
    """EMA weights are copied in for each evaluation and the trained weights are never put back."""
    model = attn(1)
    optimizer, tensors = sgd(trainable(model)), lora(model)
    pre, ema = Gram(tensors), clones(tensors)
    with observe(model):
        for i in range(18):
            step(model, i, optimizer, pre)
            for name, p in tensors.items():
                ema[name].lerp_(p.detach(), 0.1)
            if i % 3 == 2:
                put(tensors, ema)
                evaluate(model)


@fault("ema_lerp_reversed", "kept", "not-kept", "update-undone")
def _(observe):
    """The EMA line lerps the live weights towards the average instead of the average towards the weights."""
    model = mlp(2)
    optimizer, tensors = adamw(trainable(model)), lora(model)
    pre, ema = Kfac(model), clones(tensors)
    with observe(model):
        for i in range(16):
            step(model, i, optimizer, pre)
            for name, p in tensors.items():
                p.data.lerp_(ema[name], 0.99)


@fault("swa_average_broadcast_each_epoch", "kept", "not-kept", "update-undone")
def _(observe):
    """After every epoch of three steps the running SWA average is copied into the model that goes on training."""
    model = attn(3, layers=1)
    optimizer, pre = sgd(trainable(model), momentum=0.5), Gram(lora(model))
    with observe(model):
        average = AveragedModel(model)
        for i in range(18):
            step(model, i, optimizer, pre)
            if i % 3 == 2:
                average.update_parameters(model)
                put(dict(model.named_parameters()), dict(average.module.named_parameters()))


@fault("lookahead_slow_weights_never_move", "kept", "not-kept", "update-undone")
def _(observe):
    """A hand-written lookahead forgets to move its slow weights and every second step returns to the start."""
    model = mlp(4)
    optimizer, pre, tensors = adamw(trainable(model)), Gram(lora(model)), lora(model)
    slow = clones(tensors)
    with observe(model):
        for i in range(20):
            step(model, i, optimizer, pre)
            if i % 2 == 1:
                _ = {n: s + 0.5 * (tensors[n].detach() - s) for n, s in slow.items()}
                put(tensors, slow)


@fault("federated_round_drops_own_update", "kept", "not-kept", "update-undone")
def _(observe):
    """Every round the server's adapter, averaged from the other clients only, replaces the local one."""
    model = attn(5)
    optimizer, pre = adamw(trainable(model)), Kfac(model)
    server = clones(get_peft_model_state_dict(model))
    with observe(model):
        for i in range(16):
            step(model, i, optimizer, pre)
            if i % 2 == 1:
                others = {n: t + 0.001 * torch.randn_like(t) for n, t in server.items()}
                set_peft_model_state_dict(model, others)


@fault("best_checkpoint_loaded_every_epoch", "kept", "not-kept", "update-undone")
def _(observe):
    """Each epoch ends by loading the best state, judged by a metric that never improves after the first epoch."""
    model = llama(6)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model))
    best, best_score = clones(get_peft_model_state_dict(model)), -1.0
    with observe(model):
        for i in range(16):
            step(model, i, optimizer, pre, lm_loss)
            if i % 2 == 1:
                score = -abs(evaluate(model, lm_loss))
                if score > best_score:
                    best, best_score = clones(get_peft_model_state_dict(model)), score + 1e6
                set_peft_model_state_dict(model, best)


@fault("reference_sync_in_wrong_direction", "kept", "not-kept", "update-undone")
def _(observe):
    """The synchronisation of a reference adapter copies the reference into the policy instead of the reverse."""
    model = attn(7)
    second(model, "reference")
    policy, reference = lora(model), lora(model, "reference")
    names = {n: n.replace(".default", ".reference") for n in policy}
    put(reference, {names[n]: p for n, p in policy.items()})
    optimizer, pre = sgd(policy.values()), Gram(policy)
    with observe(model):
        for i in range(16):
            step(model, i, optimizer, pre)
            if i % 2 == 1:
                put(policy, {n: 0.6 * reference[names[n]] + 0.4 * p for n, p in policy.items()})


@fault("momentum_encoder_written_backwards", "kept", "not-kept", "update-undone")
def _(observe):
    """A momentum encoder's update writes the key encoder's weights into the query encoder."""
    query = mlp(8)
    key = copy.deepcopy(query)
    optimizer, pre = sgd(trainable(query), 0.2), Gram(lora(query))
    with observe(query):
        for i in range(16):
            x, _y = batch(i)
            optimizer.zero_grad()
            with torch.no_grad():
                k = F.normalize(key(x + 0.1).mean(1), dim=-1)
            q = F.normalize(query(x).mean(1), dim=-1)
            F.cross_entropy(q @ k.T / 0.2, torch.arange(len(x))).backward()
            pre.apply()
            optimizer.step()
            for p_query, p_key in zip(query.parameters(), key.parameters(), strict=True):
                p_query.data.mul_(0.05).add_(p_key.data, alpha=0.95)


@fault("rollback_when_loss_is_above_record", "kept", "update-undone", "not-kept")
def _(observe):
    """A guard restores the weights whenever the batch loss is above the best batch so far, which is nearly always."""
    model = attn(9)
    optimizer, pre, tensors = adamw(trainable(model)), Gram(lora(model)), lora(model)
    best = 0.0
    with observe(model):
        for i in range(20):
            before = clones(tensors)
            loss = step(model, i, optimizer, pre)
            if loss > best:
                put(tensors, before)
            best = min(best, loss)


@fault("schedule_free_left_in_eval_weights", "kept", "not-kept", "update-undone")
def _(observe):
    """A schedule-free wrapper swaps the average in for evaluation and its train() call is forgotten."""
    model = mlp(10)
    optimizer, pre, tensors = sgd(trainable(model), 0.1), Gram(lora(model)), lora(model)
    average, count = clones(tensors), 0
    with observe(model):
        for i in range(18):
            step(model, i, optimizer, pre)
            count += 1
            for name, p in tensors.items():
                average[name].lerp_(p.detach(), 1 / (count + 1))
            if i % 3 == 2:
                for name, p in tensors.items():
                    p.data, average[name] = average[name].clone(), average[name].clone()
                evaluate(model)


# ---------------------------------------------------------------- faults: masters, buckets, own references


@fault("masters_never_copied_back", "moved", "no-update", "wrong-parameters", "not-consumed", "not-kept")
def _(observe):
    """The optimizer steps float masters whose values are never copied back to the model."""
    model = mlp(11)
    tensors = lora(model)
    masters = {n: nn.Parameter(p.detach().float().clone()) for n, p in tensors.items()}
    optimizer, pre = adamw(masters.values()), Gram(tensors)
    with observe(model):
        for i in range(14):
            model.zero_grad()
            loss_of(model, i).backward()
            pre.apply()
            for name, p in tensors.items():
                masters[name].grad = p.grad.float()
            optimizer.step()


@fault("masters_filled_before_preconditioning", "delivered", "modified-too-late", "not-consumed", "overwritten")
def _(observe):
    """Master gradients are filled while backward runs, before the model's gradients are preconditioned."""
    model = attn(12)
    tensors = lora(model)
    masters = {n: nn.Parameter(p.detach().clone()) for n, p in tensors.items()}
    optimizer, pre = adamw(masters.values()), Gram(tensors)

    def fill(name: str) -> Callable:
        return lambda p: setattr(masters[name], "grad", p.grad.clone())

    for name, p in tensors.items():
        p.register_post_accumulate_grad_hook(fill(name))
    with observe(model):
        for i in range(16):
            model.zero_grad()
            loss_of(model, i).backward()
            pre.apply()
            optimizer.step()
            put(tensors, masters)


@fault("bucket_copied_back_over_turned", "delivered", "overwritten")
def _(observe):
    """Gradients are packed into a bucket, preconditioned, and then overwritten by the unpacked bucket."""
    model = attn(13)
    tensors = lora(model)
    optimizer, pre = adamw(trainable(model)), Kfac(model)
    with observe(model):
        for i in range(14):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            bucket = torch.cat([p.grad.flatten() for p in tensors.values()])
            pre.apply()
            bucket /= 1.0
            for p, part in zip(tensors.values(), bucket.split([p.numel() for p in tensors.values()]), strict=True):
                p.grad.copy_(part.view_as(p))
            optimizer.step()


@fault("flat_buffer_loses_replaced_gradient", "delivered", "not-consumed", "dropped", "wrong-parameters", "overwritten")
def _(observe):
    """The preconditioner rebinds p.grad, which was a view of the flat gradient that the optimizer really reads."""
    model = mlp(14)
    tensors = lora(model)
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in tensors.values()]))
    flat.grad = torch.zeros_like(flat)
    views, sizes = {}, [p.numel() for p in tensors.values()]
    for (name, p), value, grad in zip(tensors.items(), flat.data.split(sizes), flat.grad.split(sizes), strict=True):
        p.data, views[name] = value.view_as(p), grad.view_as(p)
    optimizer, pre = sgd([flat]), Gram(tensors)
    with observe(model):
        for i in range(14):
            flat.grad.zero_()
            for name, p in tensors.items():
                p.grad = views[name]
            loss_of(model, i).backward()
            for name, p in tensors.items():
                p.grad = pre.turn(name, p.grad)
            optimizer.step()


class StashingSgd(torch.optim.Optimizer):
    """SGD that stashes each gradient as soon as backward has accumulated it and steps from the stash."""

    def __init__(self, params, lr: float):
        super().__init__(params, {"lr": lr})
        self.stash: dict[nn.Parameter, Tensor] = {}
        for group in self.param_groups:
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(lambda p: self.stash.__setitem__(p, p.grad.clone()))

    @torch.no_grad()
    def step(self, closure=None):
        """Step from the stash."""
        for group in self.param_groups:
            for p in group["params"]:
                if p in self.stash:
                    p.add_(self.stash.pop(p), alpha=-group["lr"])


@fault("optimizer_steps_from_its_stash", "consumed", "not-consumed")
def _(observe):
    """An offloading optimizer keeps its own copy of each gradient from backward and ignores p.grad later."""
    model = attn(15)
    optimizer, pre = StashingSgd(trainable(model), 0.1), Gram(lora(model))
    with observe(model):
        for i in range(16):
            step(model, i, optimizer, pre)


@fault("two_adapters_optimizer_of_the_other", "delivered", "wrong-parameters", "no-update", "not-consumed")
def _(observe):
    """The optimizer was made for the first adapter and training then goes on with the second one."""
    model = attn(16)
    optimizer = adamw(trainable(model))
    second(model)
    model.set_adapter("second")
    pre = Gram(lora(model, "second"))
    with observe(model):
        for i in range(14):
            model.zero_grad()
            loss_of(model, i).backward()
            pre.apply()
            optimizer.step()


@fault("adapter_deleted_and_added_again", "delivered", "wrong-parameters", "no-update", "not-consumed")
def _(observe):
    """The adapter is deleted and added under the same name, and the optimizer still holds the old tensors."""
    model = mlp(17)
    second(model, "spare")
    optimizer = sgd(lora(model).values(), 0.1)
    model.delete_adapter("default")
    model.add_adapter("default", copy.deepcopy(model.peft_config["spare"]))
    spread(model)
    model.set_adapter("default")
    pre = Kfac(model)
    with observe(model):
        for i in range(14):
            model.zero_grad()
            loss_of(model, i).backward()
            pre.apply()
            optimizer.step()


@fault("rank_grown_without_new_optimizer", "delivered", "wrong-parameters", "no-update", "not-consumed", "stopped")
def _(observe):
    """After three steps the ranks grow by replaced parameters and the optimizer goes on with the old ones."""
    model = attn(18)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model))
    with observe(model):
        for i in range(24):
            model.zero_grad()
            loss_of(model, i).backward()
            pre.apply()
            optimizer.step()
            if i == 2:
                for module in model.modules():
                    if hasattr(module, "lora_A") and "default" in getattr(module, "lora_A", {}):
                        a, b = module.lora_A["default"], module.lora_B["default"]
                        a.weight = nn.Parameter(torch.cat([a.weight.data, 0.1 * torch.randn_like(a.weight)]))
                        b.weight = nn.Parameter(torch.cat([b.weight.data, 0.1 * torch.randn_like(b.weight)], 1))
                pre = Gram(lora(model))


@fault("weighted_adapter_trained_unheld", "delivered", "wrong-parameters", "no-update", "not-consumed")
def _(observe):
    """A combined adapter is made and activated, while the optimizer holds only its two ingredients."""
    model = attn(19)
    second(model)
    optimizer = adamw([*lora(model).values(), *lora(model, "second").values()])
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", combination_type="linear")
    model.set_adapter("both")
    for p in lora(model, "both").values():
        p.requires_grad_(True)
    pre = Gram(lora(model, "both"))
    with observe(model):
        for i in range(12):
            model.zero_grad()
            loss_of(model, i).backward()
            pre.apply()
            optimizer.step()


@fault("groups_rebuilt_from_clones", "delivered", "wrong-parameters", "no-update", "not-consumed")
def _(observe):
    """Parameter groups are rebuilt from a deep copy of the old groups, so the optimizer holds cloned tensors."""
    model = mlp(20)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model))
    group = copy.deepcopy(optimizer.param_groups[0])
    optimizer.param_groups.clear()
    optimizer.add_param_group({"params": group["params"], "lr": 1e-3})
    with observe(model):
        for i in range(14):
            model.zero_grad()
            loss_of(model, i).backward()
            pre.apply()
            optimizer.step()


@fault("only_saved_modules_in_optimizer", "delivered", "wrong-parameters", "no-update", "not-consumed")
def _(observe):
    """A name filter keeps only modules_to_save for the optimizer, so no LoRA factor is ever stepped."""
    model = attn(21, modules_to_save=["head"])
    optimizer = adamw([p for n, p in model.named_parameters() if "modules_to_save" in n])
    pre = Gram(lora(model))
    with observe(model):
        for i in range(14):
            model.zero_grad()
            loss_of(model, i).backward()
            pre.apply()
            optimizer.step()


@fault("deep_copy_does_the_forward", "used", "not-used")
def _(observe):
    """Forward and backward run on a deep copy; its gradients are moved over, but the copy keeps its old weights."""
    model = attn(22)
    worker = copy.deepcopy(model)
    optimizer, pre = sgd(trainable(model)), Gram(lora(model))
    mine, theirs = lora(model), lora(worker)
    with observe(model):
        for i in range(14):
            worker.zero_grad()
            loss_of(worker, i).backward()
            for name, p in mine.items():
                p.grad = theirs[name].grad.clone()
            pre.apply()
            optimizer.step()


@fault("functional_call_with_old_snapshot", "used", "not-used")
def _(observe):
    """functional_call is given a snapshot of the weights taken once; later weights never enter the forward."""
    model = mlp(23)
    tensors = lora(model)
    snapshot = {n: p.detach().clone().requires_grad_(True) for n, p in tensors.items()}
    optimizer, pre = adamw(trainable(model)), Gram(tensors)
    with observe(model):
        for i in range(14):
            x, y = batch(i)
            out = torch.func.functional_call(model, snapshot, (x,))
            grads = torch.autograd.grad(F.mse_loss(out, y), list(snapshot.values()))
            for p, grad in zip(tensors.values(), grads, strict=True):
                p.grad = grad
            pre.apply()
            optimizer.step()


# ---------------------------------------------------------------- faults: closures and autograd.grad


@fault("closure_recomputes_raw_gradient", "delivered", "overwritten", "dropped", "not-consumed")
def _(observe):
    """The gradient is preconditioned before step(closure), and the closure clears it and runs backward again."""
    model = attn(24)
    optimizer, pre = sgd(trainable(model), 0.1, momentum=0.9), Gram(lora(model))
    with observe(model):
        for i in range(16):

            def closure(i=i):
                optimizer.zero_grad()
                loss = loss_of(model, i)
                loss.backward()
                return loss

            closure()
            pre.apply()
            optimizer.step(closure)


@fault("sam_preconditions_the_ascent_only", "delivered", "overwritten", "dropped", "modified-too-late")
def _(observe):
    """In sharpness-aware training only the ascent gradient is preconditioned; the descent uses a fresh raw one."""
    model = mlp(25)
    optimizer, pre, tensors = sgd(trainable(model), 0.1), Gram(lora(model)), lora(model)
    with observe(model):
        for i in range(14):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            pre.apply()
            start = clones(tensors)
            scale = 0.05 / torch.stack([p.grad.norm() for p in tensors.values()]).norm()
            for p in tensors.values():
                p.data.add_(p.grad, alpha=float(scale))
            optimizer.zero_grad()
            loss_of(model, i).backward()
            put(tensors, start)
            optimizer.step()


@fault("grads_from_autograd_never_assigned", "arrived", "no-gradient", "no-update")
def _(observe):
    """torch.autograd.grad returns gradients that are preconditioned in a list; p.grad stays None for the optimizer."""
    model = attn(26)
    tensors = lora(model)
    optimizer, pre = adamw(trainable(model)), Gram(tensors)
    with observe(model):
        for i in range(14):
            optimizer.zero_grad()
            grads = torch.autograd.grad(loss_of(model, i), list(tensors.values()))
            _ = [pre.turn(n, g) for n, g in zip(tensors, grads, strict=True)]
            optimizer.step()


@fault("raw_list_assigned_not_turned_one", "turned", "nothing-written", "no-modifier")
def _(observe):
    """The turned gradients go to a list that is logged, and the raw list is assigned to p.grad."""
    model = mlp(27)
    tensors = lora(model)
    optimizer, pre = adamw(trainable(model)), Gram(tensors)
    with observe(model):
        norms = []
        for i in range(14):
            grads = torch.autograd.grad(loss_of(model, i), list(tensors.values()))
            better = [pre.turn(n, g) for n, g in zip(tensors, grads, strict=True)]
            norms.append(float(torch.stack([g.norm() for g in better]).sum()))
            for p, grad in zip(tensors.values(), grads, strict=True):
                p.grad = grad
            optimizer.step()


@fault("fused_step_inside_backward", "delivered", "modified-too-late", "dropped", "not-consumed")
def _(observe):
    """Per-parameter optimizers step inside backward; the preconditioner turns afterwards what they have used."""
    model = attn(28)
    optimizers = {p: sgd([p], 0.1) for p in trainable(model)}

    def fused(p: nn.Parameter) -> None:
        optimizers[p].step()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(fused)
    pre = Gram(lora(model))
    with observe(model):
        for i in range(14):
            loss_of(model, i).backward()
            pre.apply()
            model.zero_grad()


# ---------------------------------------------------------------- faults: adapters and their kinds


@fault("adalora_tensors_not_found", "turned", "nothing-written", "starved", "not-ready", "no-modifier")
def _(observe):
    """The preconditioner looks for lora_A linear modules, which AdaLoRA does not have, and so handles nothing."""
    torch.manual_seed(29)
    config = AdaLoraConfig(init_r=4, target_r=4, total_step=200, tinit=100, tfinal=50, target_modules=QV)
    model = spread(get_peft_model(Encoder(), config))
    optimizer = adamw(trainable(model), 1e-2)
    modules = {n: m for n, m in model.named_modules() if n.endswith("lora_A.default") and isinstance(m, nn.Linear)}
    pre = Gram({f"{n}.weight": m.weight for n, m in modules.items()})
    with observe(model):
        for i in range(16):
            step(model, i, optimizer, pre)


@fault("rank_pattern_layers_skipped", "throughout", "only-some-layers")
def _(observe):
    """Layers whose rank differs from the configured one by rank_pattern are skipped by the preconditioner."""
    model = attn(30, rank_pattern={"v_proj": 8}, use_rslora=True)
    optimizer = adamw(trainable(model))
    pre = Gram({n: p for n, p in lora(model).items() if min(p.shape) == 4})
    with observe(model):
        for i in range(16):
            step(model, i, optimizer, pre)


@fault("second_adapter_without_preconditioner", "throughout", "only-some-layers", "stopped", "nothing-written")
def _(observe):
    """Two adapters are trained in turn with one optimizer, and the preconditioner knows only the first."""
    model = attn(31)
    second(model)
    optimizer = adamw([*lora(model).values(), *lora(model, "second").values()])
    pre = Gram(lora(model))
    with observe(model):
        for i in range(24):
            if i % 12 == 0:
                model.set_adapter(("default", "second")[i // 12])
            step(model, i, optimizer, pre)


@fault("tied_adapter_turned_per_occurrence", "turned", "applied-twice")
def _(observe):
    """Two layers share one LoRA pair, and the loop over layers preconditions the shared gradient once for each."""
    model = attn(32, targets=["q_proj"])
    first, other = (block.q_proj for block in model.base_model.model.blocks)
    other.lora_A, other.lora_B = first.lora_A, first.lora_B
    optimizer, pre = adamw(trainable(model)), Gram(lora(model))
    names = list(lora(model))
    with observe(model):
        for i in range(16):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            for _layer in (first, other):
                for name in names:
                    grad = pre.tensors[name].grad
                    grad.copy_(pre.turn(name, grad))
            optimizer.step()


@fault("policy_run_inside_disable_adapter", "used", "not-used", "no-gradient")
def _(observe):
    """Policy and reference log-probabilities both run inside disable_adapter; only a value head gets gradients."""
    body = attn(33)
    model = Headed(body)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model))
    with observe(model):
        for i in range(14):
            x, y = batch(i)
            optimizer.zero_grad()
            with body.disable_adapter():
                reference = body(x).detach()
                policy = body(x)
                value = model.head(policy)
            (F.mse_loss(value, y.mean(-1, keepdim=True)) + F.mse_loss(policy, reference)).backward()
            pre.apply()
            optimizer.step()


@fault("exception_leaves_adapters_disabled", "used", "not-used", "stopped", "no-gradient")
def _(observe):
    """Reference passes raise for all long batches and skip enable_adapter_layers, so the adapters stay off."""
    body = mlp(34)
    model = Headed(body)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model))

    def reference(x: Tensor, i: int) -> Tensor:
        body.base_model.disable_adapter_layers()
        if i >= 3:
            raise ValueError("sequence too long for the reference")
        out = body(x).detach()
        body.base_model.enable_adapter_layers()
        return out

    with observe(model):
        for i in range(24):
            x, y = batch(i)
            optimizer.zero_grad()
            try:
                anchor = reference(x, i)
            except ValueError:
                anchor = torch.zeros_like(x)
            features = body(x)
            loss = F.mse_loss(model.head(features), y.mean(-1, keepdim=True))
            (loss + 0.1 * F.mse_loss(features, anchor)).backward()
            pre.apply()
            optimizer.step()


@fault("merged_for_saving_and_left", "used", "not-used", "no-gradient")
def _(observe):
    """The adapter is merged to save a full checkpoint after two steps and never unmerged."""
    body = attn(35)
    model = Headed(body)
    optimizer, pre = adamw(trainable(model)), Kfac(model)
    with observe(model):
        for i in range(18):
            x, y = batch(i)
            optimizer.zero_grad()
            F.mse_loss(model(x), y.mean(-1, keepdim=True)).backward()
            pre.apply()
            optimizer.step()
            if i == 1:
                body.merge_adapter()
                torch.save(body.state_dict(), io.BytesIO())


@fault("dora_merged_at_resume", "used", "not-used", "no-gradient")
def _(observe):
    """A DoRA model is resumed in its merged state for a quick evaluation and then trained as it is, with a head."""
    body = attn(36, use_dora=True, init=True)
    model = Headed(body)
    body.merge_adapter()
    evaluate(body)
    optimizer, pre = sgd(trainable(model)), Gram(lora(model))
    with observe(model):
        for i in range(12):
            x, y = batch(i)
            optimizer.zero_grad()
            F.mse_loss(model(x), y.mean(-1, keepdim=True)).backward()
            pre.apply()
            optimizer.step()


@fault("stage_two_adapter_has_no_hooks", "read", "starved", "nothing-written", "not-ready", "no-modifier")
def _(observe):
    """Hooks were put on a first-stage adapter; the second stage replaces it and its new modules have no hooks."""
    model = mlp(37)
    second(model, "spare")
    pre = Kfac(model)
    model.delete_adapter("default")
    model.add_adapter("default", copy.deepcopy(model.peft_config["spare"]))
    spread(model)
    model.set_adapter("default")
    pre.tensors = lora(model)
    optimizer = adamw(lora(model).values())
    with observe(model):
        for i in range(16):
            step(model, i, optimizer, pre)


# ---------------------------------------------------------------- faults: hooks, statistics, readiness


@fault("step_hook_registered_each_epoch", "turned", "applied-twice")
def _(observe):
    """The preconditioner registers itself as optimizer hook at the start of both epochs and so runs twice a step."""
    model = attn(38)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model), warmup=1)
    with observe(model):
        for i in range(20):
            if i in (0, 2):
                optimizer.register_step_pre_hook(lambda *_: pre.apply())
            step(model, i, optimizer)


@fault("hooks_live_only_in_calibration", "throughout", "stopped")
def _(observe):
    """The gradient hooks are removed with their context manager when the first phase of training ends."""
    model = attn(39)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model), warmup=1)
    with observe(model):
        with contextlib.ExitStack() as hooks:
            handle = optimizer.register_step_pre_hook(lambda *_: pre.apply())
            hooks.callback(handle.remove)
            for i in range(8):
                step(model, i, optimizer)
        for i in range(8, 24):
            step(model, i, optimizer)


@fault("weakly_held_preconditioner_collected", "turned", "nothing-written", "no-modifier", "stopped")
def _(observe):
    """The optimizer hook holds the preconditioner weakly, and the only strong reference dies when setup returns."""
    model = mlp(40)
    optimizer = adamw(trainable(model))

    def setup() -> None:
        method = weakref.WeakMethod(Gram(lora(model)).apply)
        optimizer.register_step_pre_hook(lambda *_: method() and method()())

    setup()
    with observe(model):
        for i in range(14):
            step(model, i, optimizer)


@fault("statistics_skipped_in_recomputation", "read", "starved", "nothing-written", "not-ready", "no-modifier")
def _(observe):
    """With re-entrant checkpointing the first pass has no graph, and the hook ignores the recomputation in backward."""
    model = attn(41, reentrant=True)
    optimizer, pre = adamw(trainable(model)), Kfac(model)
    add = pre.add
    pre.add = lambda name, rows: None if torch._C._current_graph_task_id() != -1 else add(name, rows)
    with observe(model):
        for i in range(14):
            optimizer.zero_grad()
            x, y = batch(i)
            F.mse_loss(model(x.requires_grad_(True)), y).backward()
            pre.apply()
            optimizer.step()


@fault("refresh_interval_longer_than_run", "turned", "not-ready", "nothing-written", "no-modifier", "starved")
def _(observe):
    """The matrix is refreshed every hundred steps, the training has twenty, so the identity is all it ever applies."""
    model = llama(42)
    optimizer, pre, every, seen = adamw(trainable(model)), Gram(lora(model)), 100, 0
    roots = {n: torch.eye(min(p.shape)) for n, p in lora(model).items()}
    with observe(model):
        for i in range(20):
            optimizer.zero_grad()
            lm_loss(model, i).backward()
            seen += 1
            for name, p in lora(model).items():
                pre.learn(name, p.grad)
                if seen % every == 0:
                    roots[name] = pre.root[name]
                p.grad.copy_(turned(roots[name], p.grad, ".lora_A." in name))
            optimizer.step()


@fault("warmup_restarts_with_each_epoch", "turned", "not-ready", "nothing-written", "no-modifier")
def _(observe):
    """A new preconditioner is built for each short epoch and never leaves its warm-up of six steps."""
    model = attn(43)
    optimizer = sgd(trainable(model), momentum=0.9)
    with observe(model):
        for epoch in range(5):
            pre = Gram(lora(model), warmup=6)
            for i in range(4):
                step(model, 4 * epoch + i, optimizer, pre)


@fault("damping_drowns_the_statistics", "turned", "scaled-only")
def _(observe):
    """Statistics summed over tiny activations meet a damping a million times larger, and the matrix is a scalar."""
    model = mlp(44)
    optimizer, pre = sgd(trainable(model), 0.02), Gram(lora(model))
    with observe(model):
        for i in range(16):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            for name, p in lora(model).items():
                pre.learn(name, p.grad)
                cov = pre.cov[name] * 1e-6 + 0.25 * torch.eye(min(p.shape))
                inverse = torch.linalg.inv(cov)
                p.grad = inverse @ p.grad if ".lora_A." in name else p.grad @ inverse
            optimizer.step()


@fault("log_eigenvalues_taken_for_roots", "turned", "against-the-gradient")
def _(observe):
    """The matrix is built from the logarithms of eigenvalues below one, which are negative, and turns uphill."""
    model = attn(45)
    optimizer, pre = sgd(trainable(model), 0.005), Gram(lora(model))
    with observe(model):
        for i in range(14):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            for name, p in lora(model).items():
                pre.learn(name, p.grad)
                if i > 1:
                    values, vectors = torch.linalg.eigh(pre.cov[name])
                    matrix = vectors @ torch.diag((0.5 * values.clamp(1e-4, 0.9)).log()) @ vectors.T
                    p.grad.copy_(turned(matrix, p.grad, ".lora_A." in name))
            optimizer.step()


@fault("double_buffer_hands_out_old_gradient", "turned", "stale-gradient")
def _(observe):
    """An asynchronous double buffer writes the preconditioned gradient of the batch two steps before."""
    model = attn(46)
    optimizer, pre, queue = sgd(trainable(model), 0.02), Gram(lora(model)), []
    with observe(model):
        for i in range(18):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            queue.append({n: pre.turn(n, p.grad).clone() for n, p in lora(model).items()})
            if len(queue) > 2:
                ready = queue.pop(0)
                for name, p in lora(model).items():
                    p.grad.copy_(ready[name])
            optimizer.step()


@fault("layer_names_shifted_by_one", "turned", "unrelated-gradient")
def _(observe):
    """Layer indices count from zero in one place and from one in another, so layers get each other's gradients."""
    model = mlp(47, layers=3)
    optimizer, pre, tensors = sgd(trainable(model), 0.01), Gram(lora(model)), lora(model)
    source = {
        n: n.replace(f".{k}.lora", f".{(k + 1) % 3}.lora") for n in tensors for k in range(3) if f".{k}.lora" in n
    }
    with observe(model):
        for i in range(16):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            results = {n: pre.turn(n, p.grad).clone() for n, p in tensors.items()}
            if i > 1:
                for name, p in tensors.items():
                    p.grad.copy_(results[source[name]])
            optimizer.step()


@fault("undamped_inverse_of_few_samples", "turned", "blown-up")
def _(observe):
    """Three rows cannot fill an 8 x 8 covariance, and its inverse with almost no damping blows gradients up."""
    model = attn(48, r=8)
    optimizer, tensors = adamw(trainable(model)), lora(model)
    with observe(model):
        for i in range(12):
            x, y = batch(i)
            optimizer.zero_grad()
            F.mse_loss(model(x[:1, :3]), y[:1, :3]).backward()
            for name, p in tensors.items():
                left = ".lora_A." in name
                inverse = torch.linalg.pinv(gram_of(p.grad, left).double() + 1e-9 * torch.eye(8)).float()
                p.grad = inverse @ p.grad if left else p.grad @ inverse
            optimizer.step()


@fault("singular_factor_gives_nan", "turned", "non-finite")
def _(observe):
    """The covariance of a frozen direction has an exact zero and its inverse square root is infinite."""
    model = mlp(49)
    optimizer, tensors = adamw(trainable(model)), lora(model)
    with observe(model):
        for i in range(10):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            for name, p in tensors.items():
                left = ".lora_A." in name
                gram = gram_of(p.grad, left)
                gram[0], gram[:, 0] = 0, 0
                root = torch.diag(gram).rsqrt().diag()
                p.grad = root @ p.grad if left else p.grad @ root
            optimizer.step()


@fault("autoclip_history_starts_at_zero", "turned", "clipped-to-nothing", "no-update")
def _(observe):
    """An adaptive clip takes the smallest norm in a history seeded with zero, so everything is clipped away."""
    model = attn(50)
    optimizer, pre, history = sgd(trainable(model)), Gram(lora(model)), [0.0]
    with observe(model):
        for i in range(14):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            pre.apply()
            norm = float(nn.utils.get_total_norm([p.grad for p in trainable(model)]))
            history.append(norm)
            nn.utils.clip_grad_norm_(trainable(model), min(history))
            optimizer.step()


@fault("parameter_generator_used_up", "throughout", "stopped", "nothing-written", "only-some-layers")
def _(observe):
    """The preconditioner iterates over a generator of parameters, which is exhausted after the first four steps."""
    model = attn(51)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model), warmup=0)
    pairs = ((n, p) for _ in range(4) for n, p in [*lora(model).items(), (None, None)])
    with observe(model):
        for i in range(20):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            for name, p in pairs:
                if name is None:
                    break
                p.grad.copy_(pre.turn(name, p.grad))
            optimizer.step()


@fault("lazy_map_never_consumed", "turned", "nothing-written", "no-modifier")
def _(observe):
    """The preconditioner is mapped lazily over all parameters and nobody consumes the map."""
    model = llama(52)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model))
    with observe(model):
        for i in range(14):
            optimizer.zero_grad()
            lm_loss(model, i).backward()
            map(lambda item: item[1].grad.copy_(pre.turn(item[0], item[1].grad)), lora(model).items())
            optimizer.step()


@fault("exception_swallowed_for_one_factor", "throughout", "only-one-factor")
def _(observe):
    """The matrix is always multiplied from the left, which fails for every B, and the exception is swallowed."""
    model = attn(53)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model))
    with observe(model):
        for i in range(16):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            for name, p in lora(model).items():
                pre.learn(name, p.grad)
                if i > 1:
                    with contextlib.suppress(RuntimeError):
                        p.grad.copy_(turned(pre.root[name], p.grad, True))
            optimizer.step()


@fault("exception_ends_the_loop_over_layers", "throughout", "only-some-layers")
def _(observe):
    """A layer without a gradient raises inside the loop; the caught exception ends it for all later layers."""
    model = attn(54, layers=3, targets=["v_proj"])
    optimizer, pre, names = adamw(trainable(model)), Gram(lora(model), warmup=1), list(lora(model))
    names.insert(2, "blocks.frozen.lora_A.default.weight")
    with observe(model):
        for i in range(16):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            try:
                for name in names:
                    p = pre.tensors[name]
                    p.grad.copy_(pre.turn(name, p.grad))
            except KeyError:
                pass
            optimizer.step()


# ---------------------------------------------------------------- faults: accumulation, scaling, schedules, two losses


@fault("counter_off_by_one_in_accumulation", "turned", "applied-on-micro-steps")
def _(observe):
    """The preconditioner tests step % 4 == 0 and the optimizer (step + 1) % 4 == 0: three raw batches come after it."""
    model = attn(55)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model), warmup=1)
    with observe(model):
        optimizer.zero_grad()
        for i in range(48):
            (loss_of(model, i) / 4).backward()
            if i % 4 == 0:
                pre.apply()
            if (i + 1) % 4 == 0:
                optimizer.step()
                optimizer.zero_grad()


@fault("accelerate_sync_flag_without_accumulate", "turned", "applied-on-micro-steps")
def _(observe):
    """sync_gradients is asked outside accumulate(), where it is always true, so each of three micro-steps is turned."""
    model = mlp(56)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model), warmup=2)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    with observe(model):
        for i in range(36):
            accelerator.backward(loss_of(model, i) / 3)
            if accelerator.sync_gradients:
                pre.apply()
            if i % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()


@fault("critic_backward_after_preconditioning", "delivered", "applied-on-micro-steps", "overwritten")
def _(observe):
    """The critic's backward runs after the actor's gradient was turned and adds a large raw gradient to the trunk."""
    body = attn(57)
    model = Headed(body)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model))
    with observe(model):
        for i in range(16):
            x, y = batch(i)
            optimizer.zero_grad()
            features = body(x)
            F.mse_loss(features, y).backward(retain_graph=True)
            pre.apply()
            (3 * F.mse_loss(model.head(features), y.mean(-1, keepdim=True))).backward()
            optimizer.step()


@fault("critic_zero_grad_wipes_actor", "delivered", "dropped", "no-gradient", "no-update")
def _(observe):
    """Before the critic's backward the whole model is zeroed, with the actor's turned gradients in it."""
    body = mlp(58)
    model = Headed(body)
    actor, critic = adamw(trainable(body)), adamw(model.head.parameters())
    pre = Gram(lora(model))
    with observe(model):
        for i in range(16):
            x, y = batch(i)
            features = body(x)
            F.mse_loss(features, y).backward()
            pre.apply()
            model.zero_grad()
            F.mse_loss(model.head(features.detach()), y.mean(-1, keepdim=True)).backward()
            actor.step()
            critic.step()


@fault(
    "skipped_batches_leave_gradients", "turned", "accumulated-across-steps", "applied-on-micro-steps", "applied-twice"
)
def _(observe):
    """Batches judged as outliers are skipped by continue after preconditioning, and zero_grad stands after the step."""
    model = attn(59)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model), warmup=1)
    with observe(model):
        for i in range(30):
            loss_of(model, i).backward()
            pre.apply()
            if i % 5 != 4 and i % 5 != 1:
                continue
            optimizer.step()
            optimizer.zero_grad()


@fault("head_optimizer_zeroes_only_the_head", "turned", "accumulated-across-steps", "applied-twice")
def _(observe):
    """Only the head's optimizer clears its gradients, so the adapters' gradients pile up over all steps."""
    body = attn(60)
    model = Headed(body)
    adapters, head = sgd(trainable(body), 0.002), sgd(model.head.parameters())
    pre = Gram(lora(model))
    with observe(model):
        for i in range(16):
            x, y = batch(i)
            head.zero_grad()
            F.mse_loss(model(x), y.mean(-1, keepdim=True)).backward()
            pre.apply()
            adapters.step()
            head.step()


@fault("scaler_overflows_forever", "arrived", "non-finite", "no-steps", "no-update")
def _(observe):
    """The loss scale overflows to infinity and backs off so slowly that the scaler skips every step."""
    model = mlp(61)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=3.0e38, backoff_factor=0.999, growth_interval=1000)
    with observe(model):
        for i in range(14):
            optimizer.zero_grad()
            scaler.scale(1e3 * loss_of(model, i)).backward()
            scaler.unscale_(optimizer)
            if all(p.grad.isfinite().all() for p in lora(model).values()):
                pre.apply()
            scaler.step(optimizer)
            scaler.update()


@fault("all_labels_masked", "arrived", "no-gradient", "no-update")
def _(observe):
    """The collator masks every label; the mean over no token is nan and every gradient is zero."""
    model = llama(62)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model))
    with observe(model):
        for i in range(8):
            optimizer.zero_grad()
            ids = tokens(i)
            model(input_ids=ids, labels=torch.full_like(ids, -100)).loss.backward()
            if all(p.grad.isfinite().all() for p in lora(model).values()):
                pre.apply()
            optimizer.step()


@fault("schedule_ends_after_a_quarter", "moved", "learning-rate-zero", "stopped", "no-update")
def _(observe):
    """The linear schedule was counted in epochs of accumulated steps and reaches zero after a quarter of the run."""
    model = attn(63)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model), warmup=1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: max(0.0, 1 - s / 8))
    with observe(model):
        for i in range(32):
            step(model, i, optimizer, pre)
            schedule.step()


@fault("loraplus_ratio_zero", "moved", "learning-rate-zero", "only-one-factor", "no-update")
def _(observe):
    """A LoRA+ ratio parsed as integer zero gives the group of all B factors a learning rate of zero."""
    model = mlp(64)
    tensors = lora(model)
    groups = [
        {"params": [p for n, p in tensors.items() if ".lora_A." in n], "lr": 3e-3},
        {"params": [p for n, p in tensors.items() if ".lora_B." in n], "lr": 3e-3 * int(0.5)},
    ]
    optimizer, pre = adamw(groups), Gram(tensors)
    with observe(model):
        for i in range(16):
            step(model, i, optimizer, pre)


@fault("resumed_optimizer_has_finished_lr", "moved", "learning-rate-zero", "no-update")
def _(observe):
    """The optimizer state of a finished run is loaded for a second phase, with its final learning rate of zero."""
    model = attn(65)
    first = adamw(trainable(model))
    schedule = torch.optim.lr_scheduler.LinearLR(first, 1.0, 0.0, 3)
    for i in range(3):
        step(model, i, first)
        schedule.step()
    optimizer, pre = adamw(trainable(model)), Kfac(model)
    optimizer.load_state_dict(first.state_dict())
    with observe(model):
        for i in range(3, 17):
            step(model, i, optimizer, pre)


@fault("bfloat16_swallows_small_updates", "moved", "no-update")
def _(observe):
    """The LoRA weights are bfloat16 and the learning rate so small that every update is rounded away."""
    model = attn(66)
    model.to(torch.bfloat16)
    with torch.no_grad():
        for p in lora(model).values():
            p.copy_(torch.where(p >= 0, 0.1, -0.1) + p)
    optimizer, pre = sgd(trainable(model), 1e-5), Gram(lora(model))

    def half_loss(model: nn.Module, i: int) -> Tensor:
        x, y = batch(i)
        return F.mse_loss(model(x.bfloat16()).float(), y)

    with observe(model):
        for i in range(14):
            step(model, i, optimizer, pre, half_loss)


# ---------------------------------------------------------------- faults: no gradients, cancelled, stopped


@fault("features_without_grad", "arrived", "no-gradient")
def _(observe):
    """Features come from the adapted backbone under no_grad, so only the probe on top learns."""
    body = attn(67)
    model = Headed(body, outputs=3)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model))
    with observe(model):
        for i in range(14):
            x, y = batch(i)
            optimizer.zero_grad()
            with torch.no_grad():
                features = body(x).mean(1)
            F.cross_entropy(model.head(features), y[:, 0, :3].argmax(-1)).backward()
            pre.apply()
            optimizer.step()


@fault("reentrant_checkpoint_cuts_the_graph", "arrived", "no-gradient")
def _(observe):
    """Re-entrant checkpointing over inputs that need no gradient cuts the graph; only the saved head still learns."""
    model = attn(68, reentrant=True, modules_to_save=["head"])
    optimizer, pre = adamw(trainable(model)), Gram(lora(model))
    with observe(model):
        for i in range(14):
            step(model, i, optimizer, pre)


class RoundNoBackward(torch.autograd.Function):
    """Rounding to a grid whose backward returns its true derivative, which is zero."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """Round."""
        return (x * 16).round() / 16

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(grad)


@fault("rounding_function_without_straight_through", "arrived", "no-gradient", "no-update")
def _(observe):
    """Outputs are fake-quantised by a custom function whose backward is zero, so all LoRA gradients are zero."""
    body = mlp(69)
    model = Headed(body)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model))
    with observe(model):
        for i in range(14):
            x, y = batch(i)
            optimizer.zero_grad()
            F.mse_loss(model.head(RoundNoBackward.apply(body(x))), y.mean(-1, keepdim=True)).backward()
            pre.apply()
            optimizer.step()


@fault("contrastive_batch_of_one", "arrived", "no-gradient", "no-update")
def _(observe):
    """In-batch negatives with a batch of one: the softmax over a single pair has a gradient of exactly zero."""
    model = attn(70)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model))
    with observe(model):
        for i in range(14):
            x, _y = batch(i, rows=1)
            optimizer.zero_grad()
            left, right = (F.normalize(model(v).mean(1), dim=-1) for v in (x, x + 0.1))
            F.cross_entropy(left @ right.T / 0.1, torch.arange(1)).backward()
            pre.apply()
            optimizer.step()


@fault("evaluation_freezes_adapters", "arrived", "no-gradient", "stopped")
def _(observe):
    """The first evaluation freezes the whole model and afterwards only the head is thawed."""
    body = attn(71)
    model = Headed(body)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model))
    with observe(model):
        for i in range(24):
            x, y = batch(i)
            optimizer.zero_grad()
            F.mse_loss(model(x), y.mean(-1, keepdim=True)).backward()
            pre.apply()
            optimizer.step()
            if i == 3:
                model.requires_grad_(False)
                evaluate(body)
                model.head.requires_grad_(True)


def diagonal(pre: Gram) -> None:
    """Precondition with the diagonal of the first statistics only."""
    for name, p in pre.tensors.items():
        left = ".lora_A." in name
        if name not in pre.root:
            pre.cov[name] = gram_of(p.grad, left)
            scale = (torch.diagonal(pre.cov[name]) + 1e-3) ** -0.8
            scale = scale[:, None] if left else scale[None]
            pre.root[name] = scale * p.grad.norm() / (scale * p.grad).norm()
        p.grad.mul_(pre.root[name])


@fault("adam_cancels_fixed_row_scaling", "consumed", "cancelled-by-optimizer")
def _(observe):
    """A fixed diagonal matrix scales each row of the gradient, and Adam divides exactly this scale out again."""
    model = attn(72)
    optimizer, pre = torch.optim.Adam(trainable(model), lr=3e-3, eps=1e-20), Gram(lora(model))
    with observe(model):
        for i in range(20):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            diagonal(pre)
            optimizer.step()


@fault("sign_descent_cancels_row_scaling", "consumed", "cancelled-by-optimizer")
def _(observe):
    """SignSGD keeps only signs, so positive row scales by the preconditioner change nothing at all."""
    model = mlp(73)
    optimizer = torch.optim.Adam(trainable(model), lr=2e-3, betas=(0.0, 0.0), eps=1e-30)
    pre = Gram(lora(model))
    with observe(model):
        for i in range(20):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            diagonal(pre)
            optimizer.step()


class SliceNormSgd(torch.optim.Optimizer):
    """SGD that brings every rank direction of a LoRA gradient to the same length."""

    def __init__(self, params, lr: float):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        """Step by normalised slices."""
        for group in self.param_groups:
            for p in group["params"]:
                longest = int(p.shape[1] > p.shape[0])
                p.sub_(F.normalize(p.grad, dim=longest, eps=1e-30), alpha=group["lr"])


@fault("slice_normalisation_cancels_scaling", "consumed", "cancelled-by-optimizer")
def _(observe):
    """An optimizer that normalises every rank direction undoes a diagonal rank-space preconditioner exactly."""
    model = mlp(74)
    optimizer, pre = SliceNormSgd(trainable(model), 5e-3), Gram(lora(model))
    with observe(model):
        for i in range(20):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            diagonal(pre)
            optimizer.step()


@fault("new_optimizer_without_the_hook", "throughout", "stopped")
def _(observe):
    """The optimizer is re-created for the second phase, and the preconditioner's hook stays on the old one."""
    model = attn(75)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model), warmup=1)
    optimizer.register_step_pre_hook(lambda *_: pre.apply())
    with observe(model):
        for i in range(24):
            if i == 10:
                optimizer = adamw(trainable(model), 1e-3)
            step(model, i, optimizer)


@fault("coroutine_preconditioner_ends", "throughout", "stopped", "nothing-written")
def _(observe):
    """A generator preconditions for five steps and ends; next() with a default hides that it is exhausted."""
    model = mlp(76)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model), warmup=0)

    def worker() -> Iterator[int]:
        for k in range(6):
            pre.apply()
            yield k

    work = worker()
    with observe(model):
        for i in range(24):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            next(work, None)
            optimizer.step()


@fault("manual_update_leaves_optimizer_unused", "consumed", "no-steps", "not-consumed")
def _(observe):
    """The loop computes raw gradients by autograd.grad and updates by hand; the preconditioned p.grad is never used."""
    model = attn(77)
    tensors = lora(model)
    pre = Gram(tensors)
    _optimizer = adamw(trainable(model))
    with observe(model):
        for i in range(14):
            model.zero_grad()
            loss = loss_of(model, i)
            raw = torch.autograd.grad(loss, list(tensors.values()), retain_graph=True)
            loss.backward()
            pre.apply()
            with torch.no_grad():
                for p, grad in zip(tensors.values(), raw, strict=True):
                    p.sub_(0.05 * grad)


@fault("preconditioner_after_scaler_step", "delivered", "modified-too-late")
def _(observe):
    """The preconditioner sits between scaler.step and scaler.update, where the optimizer has already stepped."""
    model = llama(78)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    with observe(model):
        for i in range(14):
            optimizer.zero_grad()
            scaler.scale(lm_loss(model, i)).backward()
            scaler.step(optimizer)
            pre.apply()
            scaler.update()


# ---------------------------------------------------------------- faults: rebuilt gradients, shards, dead references


@fault("private_gradient_rebuilt_at_step", "delivered", "overwritten")
def _(observe):
    """A differential-privacy step hook rebuilds p.grad from stored per-sample gradients, over the turned ones."""
    model = attn(79)
    optimizer, pre, tensors = adamw(trainable(model)), Gram(lora(model)), lora(model)
    samples: dict[str, list[Tensor]] = {}

    def rebuild(*_args) -> None:
        for name, p in tensors.items():
            clipped = [g * (1.0 / g.norm().clamp_min(1e-12)).clamp(max=1.0) for g in samples[name]]
            p.grad = torch.stack(clipped).mean(0) + 1e-6 * torch.randn_like(p)

    optimizer.register_step_pre_hook(rebuild)
    with observe(model):
        for i in range(12):
            x, y = batch(i, rows=4)
            optimizer.zero_grad()
            samples.clear()
            for k in range(4):
                loss = F.mse_loss(model(x[k : k + 1]), y[k : k + 1])
                for name, grad in zip(tensors, torch.autograd.grad(loss, list(tensors.values())), strict=True):
                    samples.setdefault(name, []).append(grad)
            F.mse_loss(model(x), y).backward()
            pre.apply()
            optimizer.step()


@fault("gradient_surgery_after_turning", "delivered", "overwritten")
def _(observe):
    """Two-task gradient surgery stores raw gradients of both losses and writes its projection over the turned sum."""
    body = mlp(80)
    model = Headed(body)
    optimizer, pre, tensors = adamw(trainable(model)), Gram(lora(model)), lora(model)
    with observe(model):
        for i in range(14):
            x, y = batch(i)
            optimizer.zero_grad()
            features = body(x)
            first = F.mse_loss(features, y)
            other = F.mse_loss(model.head(features), y.mean(-1, keepdim=True))
            parts = [torch.autograd.grad(v, list(tensors.values()), retain_graph=True) for v in (first, other)]
            (first + other).backward()
            pre.apply()
            for p, g, h in zip(tensors.values(), *parts, strict=True):
                overlap = (g * h).sum()
                p.grad = g + h - (overlap / h.norm().square() * h if overlap < 0 else 0)
            optimizer.step()


@fault("second_shard_never_steps", "throughout", "only-some-layers", "no-steps", "no-update", "wrong-parameters")
def _(observe):
    """The layers are sharded over two optimizers as in a partitioned state, and only the first of them is stepped."""
    model = attn(81)
    pre = Gram(lora(model))
    shards = [adamw([p for n, p in lora(model).items() if f"blocks.{k}." in n]) for k in (0, 1)]
    with observe(model):
        for i in range(14):
            model.zero_grad()
            loss_of(model, i).backward()
            pre.apply()
            shards[0].step()


@fault("tensor_hook_returns_nothing", "turned", "nothing-written", "no-modifier")
def _(observe):
    """The tensor hooks compute the turned gradient and forget to return it."""
    model = mlp(82)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model))

    def hook(name: str) -> Callable:
        def compute(grad: Tensor) -> None:
            _better = pre.turn(name, grad).clone()

        return compute

    with observe(model):
        for name, p in lora(model).items():
            p.register_hook(hook(name))
        for i in range(14):
            step(model, i, optimizer)


@fault("post_accumulate_hook_under_accumulation", "turned", "applied-on-micro-steps")
def _(observe):
    """A post-accumulate hook turns the running sum after each of four micro-batches instead of once."""
    model = attn(83)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model), warmup=1)

    def hook(name: str) -> Callable:
        return lambda p: setattr(p, "grad", pre.turn(name, p.grad))

    with observe(model):
        for name, p in lora(model).items():
            p.register_post_accumulate_grad_hook(hook(name))
        for i in range(10):
            optimizer.zero_grad()
            for k in range(4):
                (loss_of(model, 4 * i + k) / 4).backward()
            optimizer.step()


@fault("gradient_references_kept_from_setup", "turned", "nothing-written", "no-modifier", "stale-gradient", "stopped")
def _(observe):
    """p.grad tensors are collected once; zero_grad drops them, and later results are written into dead tensors."""
    model = attn(84)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model), warmup=1)
    loss_of(model, 500).backward()
    grads = {n: p.grad for n, p in lora(model).items()}
    with observe(model):
        for i in range(14):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            for name, grad in grads.items():
                grad.copy_(pre.turn(name, grad))
            optimizer.step()


@fault("second_active_adapter_not_turned", "throughout", "only-some-layers")
def _(observe):
    """Two adapters are active and trained at once, and the preconditioner collects the tensors of one."""
    model = attn(85)
    second(model)
    model.base_model.set_adapter(["default", "second"])
    optimizer, pre = adamw(trainable(model)), Gram(lora(model))
    with observe(model):
        for i in range(16):
            step(model, i, optimizer, pre)


@fault("post_hook_restores_frozen_snapshot", "moved", "update-undone", "not-kept", "no-update")
def _(observe):
    """A step post-hook meant for frozen layers restores its snapshot of all adapters after every step."""
    model = mlp(86)
    optimizer, pre, tensors = sgd(trainable(model)), Kfac(model), lora(model)
    frozen = clones(tensors)
    optimizer.register_step_post_hook(lambda *_: put(tensors, frozen))
    with observe(model):
        for i in range(14):
            step(model, i, optimizer, pre)


# ---------------------------------------------------------------- sound: plain training in unusual loops


@sound("plain_ema_swapped_and_restored", "no-modifier")
def _(observe):
    """EMA weights are swapped in for evaluation and the trained weights are put back before training goes on."""
    model = attn(101)
    optimizer, tensors = adamw(trainable(model)), lora(model)
    ema = clones(tensors)
    with observe(model):
        for i in range(16):
            step(model, i, optimizer)
            for name, p in tensors.items():
                ema[name].lerp_(p.detach(), 0.1)
            if i % 4 == 3:
                kept = clones(tensors)
                put(tensors, ema)
                evaluate(model)
                put(tensors, kept)


@sound("plain_swa_on_the_side", "no-modifier")
def _(observe):
    """An SWA model averages on the side and is evaluated itself; the trained model is never written."""
    model = mlp(102)
    optimizer = sgd(trainable(model), 0.1, momentum=0.9)
    with observe(model):
        average = AveragedModel(model)
        for i in range(16):
            step(model, i, optimizer)
            if i % 2:
                average.update_parameters(model)
                evaluate(average)


class Lookahead(torch.optim.Optimizer):
    """Lookahead over AdamW: every k steps the fast weights return half-way to the slow ones."""

    def __init__(self, params, lr: float, k: int = 4):
        self.inner = adamw(list(params), lr)
        super().__init__([{"params": g["params"]} for g in self.inner.param_groups], {"lr": lr})
        self.param_groups = self.inner.param_groups
        self.slow = {p: p.detach().clone() for g in self.param_groups for p in g["params"]}
        self.k, self.count = k, 0

    @torch.no_grad()
    def step(self, closure=None):
        """Step the inner optimizer and synchronise when due."""
        self.inner.step()
        self.count += 1
        if self.count % self.k == 0:
            for p, slow in self.slow.items():
                slow.lerp_(p, 0.5)
                p.copy_(slow)


@sound("plain_lookahead_optimizer", "no-modifier")
def _(observe):
    """A lookahead optimizer does its interpolation inside its own step, so the step leaves what the forward uses."""
    model = attn(103)
    optimizer = Lookahead(trainable(model), 5e-3)
    with observe(model):
        for i in range(16):
            step(model, i, optimizer)


@sound("plain_lbfgs_closure", "no-modifier")
def _(observe):
    """LBFGS evaluates its closure several times a step and moves all LoRA weights."""
    model = mlp(104, layers=1)
    optimizer = torch.optim.LBFGS(trainable(model), lr=0.5, max_iter=3, history_size=4, line_search_fn="strong_wolfe")
    with observe(model):
        for _i in range(8):

            def closure():
                optimizer.zero_grad()
                loss = loss_of(model, 0)
                loss.backward()
                return loss

            optimizer.step(closure)


@sound("plain_adamw_closure", "no-modifier")
def _(observe):
    """AdamW is given a closure that runs forward and backward."""
    model = llama(105)
    optimizer = adamw(trainable(model))
    with observe(model):
        for i in range(12):

            def closure(i=i):
                optimizer.zero_grad()
                loss = lm_loss(model, i)
                loss.backward()
                return loss

            optimizer.step(closure)


@sound("plain_autograd_grad_assigned", "no-modifier")
def _(observe):
    """Gradients come from torch.autograd.grad and are assigned to p.grad unchanged."""
    model = attn(106)
    params = trainable(model)
    optimizer = adamw(params)
    with observe(model):
        for i in range(14):
            for p, grad in zip(params, torch.autograd.grad(loss_of(model, i), params), strict=True):
                p.grad = grad
            optimizer.step()


@sound("plain_float_masters", "no-modifier")
def _(observe):
    """Bfloat16 LoRA weights have float masters in the optimizer, copied back after every step."""
    model = attn(107)
    model.to(torch.bfloat16)
    tensors = lora(model)
    masters = {n: nn.Parameter(p.detach().float()) for n, p in tensors.items()}
    optimizer = adamw(masters.values(), 1e-2)
    with observe(model):
        for i in range(14):
            x, y = batch(i)
            model.zero_grad()
            F.mse_loss(model(x.bfloat16()).float(), y).backward()
            for name, p in tensors.items():
                masters[name].grad = p.grad.float()
            optimizer.step()
            put(tensors, masters)


@sound("plain_dora_with_adafactor", "no-modifier")
def _(observe):
    """DoRA with its magnitudes is trained by Adafactor with relative steps."""
    model = attn(108, use_dora=True)
    optimizer = Adafactor(trainable(model), lr=None, relative_step=True, warmup_init=False, scale_parameter=True)
    with observe(model):
        for i in range(14):
            step(model, i, optimizer)


@sound("plain_adalora_before_its_budget", "no-modifier")
def _(observe):
    """AdaLoRA trains in its initial phase, where update_and_allocate only gathers importance scores."""
    torch.manual_seed(109)
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=200, tinit=100, tfinal=50, target_modules=QV)
    model = spread(get_peft_model(Encoder(), config))
    optimizer = adamw(trainable(model), 1e-2)
    with observe(model):
        for i in range(16):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            optimizer.step()
            model.base_model.update_and_allocate(i)


@sound("plain_vera", "no-modifier")
def _(observe):
    """VeRA trains its scaling vectors while the shared random projections stay frozen."""
    torch.manual_seed(110)
    model = get_peft_model(Encoder(), VeraConfig(r=8, target_modules=QV, d_initial=0.1))
    optimizer = adamw(trainable(model), 1e-2)
    with observe(model):
        for i in range(14):
            step(model, i, optimizer)


@sound("plain_adapters_in_turn", "no-modifier")
def _(observe):
    """Two adapters take turns every six steps, each with its own optimizer."""
    model = attn(111)
    second(model)
    optimizers = {a: adamw(lora(model, a).values()) for a in ("default", "second")}
    with observe(model):
        for i in range(24):
            name = ("default", "second")[i // 6 % 2]
            model.set_adapter(name)
            step(model, i, optimizers[name])


@sound("plain_saved_modules_and_tied_head", "no-modifier")
def _(observe):
    """A tied Llama trains LoRA and a modules_to_save copy of its norm."""
    model = llama(112, tie=True, modules_to_save=["norm"])
    optimizer = adamw(trainable(model))
    with observe(model):
        for i in range(12):
            step(model, i, optimizer, None, lm_loss)


@sound("plain_checkpoint_non_reentrant", "no-modifier")
def _(observe):
    """Non-re-entrant checkpointing runs each block twice per step."""
    model = attn(113, reentrant=False)
    optimizer = sgd(trainable(model), 0.1)
    with observe(model):
        for i in range(12):
            step(model, i, optimizer)


@sound("plain_checkpoint_reentrant_llama", "no-modifier")
def _(observe):
    """Re-entrant gradient checkpointing of a Llama with enable_input_require_grads keeps the graph."""
    model = llama(114, layers=2)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    optimizer = adamw(trainable(model))
    with observe(model):
        for i in range(12):
            step(model, i, optimizer, None, lm_loss)


@sound("plain_accelerate_accumulate", "no-modifier")
def _(observe):
    """Accelerate accumulates over three micro-steps with accumulate()."""
    model = mlp(115)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model, optimizer = accelerator.prepare(model, adamw(trainable(model)))
    with observe(model):
        for i in range(36):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, i))
                optimizer.step()
                optimizer.zero_grad()


@sound("plain_scaler_with_one_overflow", "no-modifier")
def _(observe):
    """A CPU GradScaler meets one overflowing batch, skips it, halves its scale and goes on."""
    model = attn(116)
    optimizer, scaler = adamw(trainable(model)), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with observe(model):
        for i in range(20):
            optimizer.zero_grad()
            loss = loss_of(model, i) * (float("inf") if i == 7 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()


@sound("plain_bfloat16_weights", "no-modifier")
def _(observe):
    """The whole model is bfloat16 and the learning rate is large enough to move the weights."""
    model = mlp(117)
    model.to(torch.bfloat16)
    optimizer = adamw(trainable(model), 1e-2)

    def half_loss(model: nn.Module, i: int) -> Tensor:
        x, y = batch(i)
        return F.mse_loss(model(x.bfloat16()).float(), y)

    with observe(model):
        for i in range(14):
            step(model, i, optimizer, None, half_loss)


@sound("plain_group_added_later", "no-modifier")
def _(observe):
    """All LoRA factors train from the start and a thawed head joins as a second group in mid-run."""
    body = attn(118)
    model = Headed(body)
    model.head.requires_grad_(False)
    optimizer = adamw(trainable(model))
    with observe(model):
        for i in range(16):
            x, y = batch(i)
            if i == 8:
                model.head.requires_grad_(True)
                optimizer.add_param_group({"params": list(model.head.parameters()), "lr": 1e-3})
            optimizer.zero_grad()
            F.mse_loss(model(x), y.mean(-1, keepdim=True)).backward()
            optimizer.step()


@sound("plain_optimizer_resumed_in_mid_run", "no-modifier")
def _(observe):
    """In mid-run a new optimizer object over the same tensors loads the old one's state."""
    model = attn(119)
    optimizer = adamw(trainable(model))
    with observe(model):
        for i in range(18):
            if i == 9:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = adamw(trainable(model), 1.0)
                optimizer.load_state_dict(state)
            step(model, i, optimizer)


class RoundStraight(torch.autograd.Function):
    """Rounding with a straight-through backward."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """Round."""
        return (x * 16).round() / 16

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        """Pass through."""
        return grad


@sound("plain_straight_through_rounding", "no-modifier")
def _(observe):
    """Outputs are fake-quantised with a straight-through estimator, so gradients arrive."""
    model = mlp(120)
    optimizer = adamw(trainable(model))
    with observe(model):
        for i in range(14):
            x, y = batch(i)
            optimizer.zero_grad()
            F.mse_loss(RoundStraight.apply(model(x)), y).backward()
            optimizer.step()


@sound("plain_batches_skipped_cleanly", "no-modifier")
def _(observe):
    """Batches above a loss quantile are skipped before backward, with gradients cleared."""
    model = attn(121)
    optimizer = adamw(trainable(model))
    losses: list[float] = []
    with observe(model):
        for i in range(24):
            optimizer.zero_grad(set_to_none=False)
            loss = loss_of(model, i)
            losses.append(float(loss.detach()))
            if i > 3 and losses[-1] > sorted(losses)[int(0.7 * len(losses))]:
                continue
            loss.backward()
            optimizer.step()


@sound("plain_actor_and_critic", "no-modifier")
def _(observe):
    """Actor and critic losses are summed over a shared trunk, with two optimizers over disjoint tensors."""
    body = mlp(122)
    model = Headed(body)
    actor, critic = adamw(trainable(body)), sgd(model.head.parameters())
    with observe(model):
        for i in range(14):
            x, y = batch(i)
            model.zero_grad()
            features = body(x)
            value = F.mse_loss(model.head(features), y.mean(-1, keepdim=True))
            (F.mse_loss(features, y) + 0.5 * value).backward()
            actor.step()
            critic.step()


def info_nce(model: nn.Module, i: int) -> Tensor:
    """Return a contrastive loss over two forwards."""
    x, _ = batch(i)
    noise = 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
    left, right = (F.normalize(model(v).mean(1), dim=-1) for v in (x, x + noise))
    return F.cross_entropy(left @ right.T / 0.2, torch.arange(len(x)))


@sound("plain_contrastive_two_forwards", "no-modifier")
def _(observe):
    """A contrastive loss uses two forwards of the same adapters before one backward."""
    model = attn(123)
    optimizer = sgd(trainable(model), 0.3, momentum=0.5)
    with observe(model):
        for i in range(14):
            step(model, i, optimizer, None, info_nce)


@sound("plain_kl_to_disabled_adapter", "no-modifier")
def _(observe):
    """A KL penalty compares to the base model inside disable_adapter; the policy runs outside of it."""
    model = llama(124)
    optimizer = adamw(trainable(model))

    def loss_fn(model: nn.Module, i: int) -> Tensor:
        ids = tokens(i)
        with torch.no_grad(), model.disable_adapter():
            reference = model(input_ids=ids).logits.log_softmax(-1)
        out = model(input_ids=ids, labels=ids)
        return out.loss + 0.1 * F.kl_div(out.logits.log_softmax(-1), reference, log_target=True, reduction="batchmean")

    with observe(model):
        for i in range(12):
            step(model, i, optimizer, None, loss_fn)


@sound("plain_merged_only_for_eval", "no-modifier")
def _(observe):
    """The adapter is merged for each evaluation and unmerged again before training goes on."""
    model = attn(125)
    optimizer = adamw(trainable(model))
    with observe(model):
        for i in range(15):
            step(model, i, optimizer)
            if i % 5 == 4:
                model.merge_adapter()
                evaluate(model)
                model.unmerge_adapter()


@sound("plain_saved_and_loaded_back", "no-modifier")
def _(observe):
    """Every few steps the adapter is saved to a buffer and loaded back, which changes no weight."""
    model = mlp(126)
    optimizer = adamw(trainable(model))
    with observe(model):
        for i in range(15):
            step(model, i, optimizer)
            if i % 5 == 4:
                buffer = io.BytesIO()
                torch.save(get_peft_model_state_dict(model), buffer)
                buffer.seek(0)
                set_peft_model_state_dict(model, torch.load(buffer))


@sound("plain_out_of_memory_retried", "no-modifier")
def _(observe):
    """A simulated out-of-memory error between forward and backward is caught and the batch is run in halves."""
    model = attn(127)
    optimizer = adamw(trainable(model))
    with observe(model):
        for i in range(14):
            optimizer.zero_grad()
            x, y = batch(i)
            try:
                loss = F.mse_loss(model(x), y)
                if i % 4 == 2:
                    raise MemoryError
                loss.backward()
            except MemoryError:
                for part in (slice(0, 6), slice(6, 12)):
                    (F.mse_loss(model(x[part]), y[part]) / 2).backward()
            optimizer.step()


@sound("plain_gradient_penalty", "no-modifier")
def _(observe):
    """A gradient penalty on the inputs needs a double backward through the adapters."""
    model = mlp(128)
    optimizer = adamw(trainable(model))
    with observe(model):
        for i in range(12):
            x, y = batch(i)
            x.requires_grad_(True)
            optimizer.zero_grad()
            out = model(x)
            (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            (F.mse_loss(out, y) + 0.01 * slope.square().mean()).backward()
            optimizer.step()


@sound("plain_sam", "no-modifier")
def _(observe):
    """Sharpness-aware training perturbs the weights for the second pass and restores them before the step."""
    model = attn(129)
    optimizer, tensors = sgd(trainable(model), 0.1), lora(model)
    with observe(model):
        for i in range(14):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            start = clones(tensors)
            scale = 0.05 / torch.stack([p.grad.norm() for p in tensors.values()]).norm()
            for p in tensors.values():
                p.data.add_(p.grad, alpha=float(scale))
            optimizer.zero_grad()
            loss_of(model, i).backward()
            put(tensors, start)
            optimizer.step()


@sound("plain_fused_backward_step", "no-modifier")
def _(observe):
    """Every parameter has its own optimizer that steps and clears as soon as its gradient is accumulated."""
    model = mlp(130)
    optimizers = {p: sgd([p], 0.1) for p in trainable(model)}

    def fused(p: nn.Parameter) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(fused)
    with observe(model):
        for i in range(14):
            loss_of(model, i).backward()


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD with train() and eval() switching between its two sequences."""

    def __init__(self, params, lr: float, beta: float = 0.9):
        super().__init__(params, {"lr": lr, "beta": beta})
        self.k = 0

    @torch.no_grad()
    def mode(self, evaluating: bool) -> None:
        """Show the averaged weights, or the training point again."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if evaluating:
                    state["y"] = p.clone()
                    p.copy_(state["x"])
                else:
                    p.copy_(state["y"])

    @torch.no_grad()
    def step(self, closure=None):
        """Move z by the gradient, average x, and leave the interpolation in the parameter."""
        self.k += 1
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["z"], state["x"] = p.clone(), p.clone()
                state["z"].add_(p.grad, alpha=-group["lr"])
                state["x"].lerp_(state["z"], 1 / (self.k + 1))
                p.copy_(state["z"].lerp(state["x"], group["beta"]))


@sound("plain_schedule_free", "no-modifier")
def _(observe):
    """A schedule-free optimizer shows its averages for evaluation and returns to the training point."""
    model = attn(131)
    optimizer = ScheduleFree(trainable(model), 0.5)
    with observe(model):
        for i in range(16):
            step(model, i, optimizer)
            if i % 4 == 3:
                optimizer.mode(True)
                evaluate(model)
                optimizer.mode(False)


@sound("plain_ragged_accumulation", "no-modifier")
def _(observe):
    """A batch generator yields groups of one to four micro-batches, normalised over the group."""
    model = llama(132)
    optimizer = adamw(trainable(model))

    def groups() -> Iterator[list[Tensor]]:
        for i in range(12):
            yield [tokens(10 * i + k, rows=3) for k in range(1 + i % 4)]

    with observe(model):
        for group in groups():
            optimizer.zero_grad()
            for ids in group:
                (model(input_ids=ids, labels=ids).loss / len(group)).backward()
            optimizer.step()


@sound("plain_rslora_pissa_rank_pattern", "no-modifier")
def _(observe):
    """PiSSA initialisation with rank-stabilised scaling and different ranks is trained plainly."""
    model = attn(133, init="pissa", use_rslora=True, rank_pattern={"q_proj": 6})
    optimizer = torch.optim.RMSprop(trainable(model), lr=1e-3)
    with observe(model):
        for i in range(14):
            step(model, i, optimizer)


@sound("plain_functional_call_with_live_weights", "no-modifier")
def _(observe):
    """functional_call runs on differentiable functions of the live parameters, refreshed for every step."""
    model = mlp(134)
    optimizer = adamw(trainable(model))
    with observe(model):
        for i in range(14):
            x, y = batch(i)
            optimizer.zero_grad()
            weights = {n: p * 1.0 for n, p in lora(model).items()}
            F.mse_loss(torch.func.functional_call(model, weights, (x,)), y).backward()
            optimizer.step()


# ---------------------------------------------------------------- sound: correct preconditioning


@sound("ema_swapped_and_restored", "effective")
def _(observe):
    """Preconditioned training with EMA weights swapped in by p.data for evaluation and swapped back."""
    model = mlp(201)
    optimizer, pre, tensors = adamw(trainable(model)), Gram(lora(model)), lora(model)
    ema = clones(tensors)
    with observe(model):
        for i in range(18):
            step(model, i, optimizer, pre)
            for name, p in tensors.items():
                ema[name].lerp_(p.detach(), 0.2)
            if i % 3 == 2:
                live = {n: p.data for n, p in tensors.items()}
                for name, p in tensors.items():
                    p.data = ema[name]
                evaluate(model)
                for name, p in tensors.items():
                    p.data = live[name]


@sound("lookahead_inside_the_optimizer", "effective")
def _(observe):
    """Turned gradients drive a lookahead optimizer that interpolates inside its own step."""
    model = attn(202)
    optimizer, pre = Lookahead(trainable(model), 5e-3), Gram(lora(model))
    with observe(model):
        for i in range(20):
            step(model, i, optimizer, pre)


@sound("inside_the_closure", "effective")
def _(observe):
    """The preconditioner runs at the end of the closure, after its backward."""
    model = attn(203)
    optimizer, pre = sgd(trainable(model), 0.1, momentum=0.5), Gram(lora(model))
    with observe(model):
        for i in range(16):

            def closure(i=i):
                optimizer.zero_grad()
                loss = loss_of(model, i)
                loss.backward()
                pre.apply()
                return loss

            optimizer.step(closure)


@sound("sam_descent_gradient_turned", "effective")
def _(observe):
    """In sharpness-aware training the descent gradient is preconditioned, after the weights have been restored."""
    model = mlp(204)
    optimizer, pre, tensors = sgd(trainable(model), 0.1), Gram(lora(model)), lora(model)
    with observe(model):
        for i in range(14):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            start = clones(tensors)
            for p in tensors.values():
                p.data.add_(0.02 * p.grad / (p.grad.norm() + 1e-12))
            optimizer.zero_grad()
            loss_of(model, i).backward()
            put(tensors, start)
            pre.apply()
            optimizer.step()


@sound("autograd_grad_turned_and_assigned", "effective")
def _(observe):
    """Gradients from torch.autograd.grad are first stored raw in p.grad and then replaced by turned ones."""
    model = attn(205)
    tensors = lora(model)
    optimizer, pre = adamw(trainable(model)), Gram(tensors)
    with observe(model):
        for i in range(16):
            for p, grad in zip(
                tensors.values(), torch.autograd.grad(loss_of(model, i), list(tensors.values())), strict=True
            ):
                p.grad = grad
            for name, p in tensors.items():
                p.grad = pre.turn(name, p.grad)
            optimizer.step()


@sound("autograd_grad_turned_before_assignment", "effective")
def _(observe):
    """Gradients from torch.autograd.grad are turned in a list and only the turned ones are assigned to p.grad."""
    model = mlp(206)
    tensors = lora(model)
    optimizer, pre = adamw(trainable(model)), Gram(tensors)
    with observe(model):
        for i in range(16):
            grads = torch.autograd.grad(loss_of(model, i), list(tensors.values()))
            for (name, p), grad in zip(tensors.items(), grads, strict=True):
                p.grad = pre.turn(name, grad)
            optimizer.step()


@sound("turned_then_copied_to_masters", "effective")
def _(observe):
    """Gradients are turned in p.grad, copied to float masters, stepped there, and the masters copied back."""
    model = attn(207)
    model.to(torch.bfloat16)
    tensors = lora(model)
    masters = {n: nn.Parameter(p.detach().float()) for n, p in tensors.items()}
    optimizer, pre = adamw(masters.values(), 1e-2), Gram(tensors)
    with observe(model):
        for i in range(16):
            x, y = batch(i)
            model.zero_grad()
            F.mse_loss(model(x.bfloat16()).float(), y).backward()
            pre.apply()
            for name, p in tensors.items():
                masters[name].grad = p.grad.float()
            optimizer.step()
            put(tensors, masters)


@sound("turned_in_the_masters", "effective")
def _(observe):
    """Gradients are copied to float masters and turned there; the model's weights follow the masters."""
    model = mlp(208)
    tensors = lora(model)
    masters = {n: nn.Parameter(p.detach().clone()) for n, p in tensors.items()}
    optimizer, pre = sgd(masters.values(), 0.1), Gram(masters)
    with observe(model):
        for i in range(16):
            model.zero_grad()
            loss_of(model, i).backward()
            for name, p in tensors.items():
                masters[name].grad = p.grad.clone()
            pre.apply()
            optimizer.step()
            put(tensors, masters)


@sound("flat_buffer_written_in_place", "effective")
def _(observe):
    """Weights and gradients are views of flat buffers and the preconditioner writes in place into the views."""
    model = mlp(209)
    tensors = lora(model)
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in tensors.values()]))
    flat.grad = torch.zeros_like(flat)
    sizes = [p.numel() for p in tensors.values()]
    for p, value, grad in zip(tensors.values(), flat.data.split(sizes), flat.grad.split(sizes), strict=True):
        p.data, p.grad = value.view_as(p), grad.view_as(p)
    optimizer, pre = sgd([flat], 0.1), Gram(tensors)
    with observe(model):
        for i in range(16):
            flat.grad.zero_()
            loss_of(model, i).backward()
            pre.apply()
            optimizer.step()


@sound("bucket_reduced_before_turning", "effective")
def _(observe):
    """Gradients are packed, averaged and unpacked as in a hand-made all-reduce, and turned afterwards."""
    model = attn(210)
    tensors = lora(model)
    optimizer, pre = adamw(trainable(model)), Kfac(model)
    with observe(model):
        for i in range(16):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            bucket = torch.cat([p.grad.flatten() for p in tensors.values()]) / 1.0
            for p, part in zip(tensors.values(), bucket.split([p.numel() for p in tensors.values()]), strict=True):
                p.grad = part.view_as(p)
            pre.apply()
            optimizer.step()


@sound("dora_factors_turned", "effective")
def _(observe):
    """DoRA's low-rank factors are preconditioned and its magnitudes are left to the optimizer."""
    model = attn(211, use_dora=True, init=True)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model), power=1.0)
    with observe(model):
        for i in range(18):
            step(model, i, optimizer, pre)


@sound("rslora_with_rank_pattern", "effective")
def _(observe):
    """Ranks of four and eight under rank-stabilised scaling each get a matrix of their own size."""
    model = attn(212, rank_pattern={"v_proj": 8}, alpha_pattern={"v_proj": 4}, use_rslora=True)
    optimizer, pre = adamw(trainable(model)), Kfac(model)
    with observe(model):
        for i in range(16):
            step(model, i, optimizer, pre)


@sound("pissa_turned", "effective")
def _(observe):
    """PiSSA's factors, large from the start, are preconditioned with activation statistics."""
    torch.manual_seed(213)
    base = Mlp()
    for linear in (*base.up, *base.down):
        u, _s, v = torch.linalg.svd(linear.weight.data, full_matrices=False)
        linear.weight.data = u @ torch.diag(torch.logspace(0.5, -1.5, 16)) @ v
    model = adapt(base, UD, init="pissa")
    optimizer, pre = sgd(trainable(model), 0.02), Kfac(model)
    with observe(model):
        for i in range(16):
            step(model, i, optimizer, pre)


@sound("adalora_parameters_turned", "effective")
def _(observe):
    """AdaLoRA's bare A and B parameters are preconditioned; its singular values go to the optimizer as they are."""
    torch.manual_seed(214)
    config = AdaLoraConfig(init_r=4, target_r=4, total_step=200, tinit=100, tfinal=50, target_modules=QV)
    model = spread(get_peft_model(Encoder(), config))
    optimizer, pre = adamw(trainable(model), 1e-2), Gram(lora(model), warmup=3)
    with observe(model):
        for i in range(20):
            step(model, i, optimizer, pre)


@sound("frozen_a_only_b_turned", "effective")
def _(observe):
    """As in LoRA-FA all A factors are frozen and the preconditioner handles every B."""
    model = attn(215, init=True)
    for name, p in lora(model).items():
        p.requires_grad_(".lora_B." in name)
    optimizer = adamw(trainable(model), 1e-2)
    pre = Gram({n: p for n, p in lora(model).items() if p.requires_grad})
    with observe(model):
        for i in range(16):
            step(model, i, optimizer, pre)


@sound("tied_adapter_turned_once", "effective")
def _(observe):
    """Two layers share one LoRA pair and the shared gradient is turned once per step."""
    model = attn(216, targets=["q_proj"])
    first, other = (block.q_proj for block in model.base_model.model.blocks)
    other.lora_A, other.lora_B = first.lora_A, first.lora_B
    optimizer, pre = adamw(trainable(model)), Gram(lora(model))
    with observe(model):
        for i in range(16):
            step(model, i, optimizer, pre)


@sound("adapters_in_turn_each_turned", "effective")
def _(observe):
    """Two adapters take turns every eight steps, each with its own optimizer and preconditioner."""
    model = attn(217)
    second(model)
    tools = {a: (adamw(lora(model, a).values()), Gram(lora(model, a), warmup=1)) for a in ("default", "second")}
    with observe(model):
        for i in range(32):
            name = ("default", "second")[i // 8 % 2]
            model.set_adapter(name)
            step(model, i, *tools[name])


@sound("saved_modules_beside_turned_factors", "effective")
def _(observe):
    """A head in modules_to_save trains plainly in its own group beside preconditioned factors."""
    model = attn(218, modules_to_save=["head"])
    head = [p for n, p in model.named_parameters() if "modules_to_save" in n]
    optimizer = adamw([{"params": list(lora(model).values())}, {"params": head, "lr": 1e-4}])
    pre = Kfac(model)
    with observe(model):
        for i in range(16):
            step(model, i, optimizer, pre)


@sound("optimizer_step_pre_hook", "effective")
def _(observe):
    """The preconditioner is a step pre-hook of the optimizer, registered once."""
    model = llama(219)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model))
    optimizer.register_step_pre_hook(lambda *_: pre.apply())
    with observe(model):
        for i in range(16):
            step(model, i, optimizer, None, lm_loss)


@sound("post_accumulate_hook_turns", "effective")
def _(observe):
    """Post-accumulate hooks turn each gradient once, as there is one backward per step."""
    model = attn(220)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model))

    def hook(name: str) -> Callable:
        return lambda p: setattr(p, "grad", pre.turn(name, p.grad))

    with observe(model):
        for name, p in lora(model).items():
            p.register_post_accumulate_grad_hook(hook(name))
        for i in range(16):
            step(model, i, optimizer)


@sound("matrix_refreshed_every_five_steps", "effective")
def _(observe):
    """The matrix is refreshed every fifth step and applied at every step."""
    model = attn(221)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model), every=5)
    with observe(model):
        for i in range(24):
            step(model, i, optimizer, pre)


@sound("matrix_lags_one_step", "effective")
def _(observe):
    """The matrix applied to a gradient comes from the statistics up to the previous batch."""
    model = mlp(222)
    optimizer, pre = sgd(trainable(model), 0.1), Gram(lora(model))
    with observe(model):
        for i in range(18):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            for name, p in lora(model).items():
                raw = p.grad.clone()
                if i > 2:
                    p.grad.copy_(turned(pre.root[name], raw, ".lora_A." in name))
                pre.learn(name, raw)
            optimizer.step()


@sound("accelerate_turned_when_synced", "effective")
def _(observe):
    """Within accumulate() the preconditioner runs only when gradients are synchronised."""
    model = attn(223)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    pre = Gram(lora(model))
    model, optimizer = accelerator.prepare(model, adamw(trainable(model)))
    with observe(model):
        for i in range(32):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, i))
                if accelerator.sync_gradients:
                    pre.apply()
                optimizer.step()
                optimizer.zero_grad()


@sound("accelerate_with_own_counter", "effective")
def _(observe):
    """Accelerate is used without accumulate and one counter decides for preconditioner and optimizer."""
    model = mlp(224)
    pre = Kfac(model)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, adamw(trainable(model)))
    with observe(model):
        for i in range(45):
            accelerator.backward(loss_of(model, i) / 3)
            if (i + 1) % 3 == 0:
                pre.apply()
                optimizer.step()
                optimizer.zero_grad()


@sound("scaler_unscaled_then_turned", "effective")
def _(observe):
    """A CPU GradScaler unscales, the preconditioner turns, the scaler steps; one overflowing batch is skipped."""
    model = attn(225)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with observe(model):
        for i in range(20):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, i) * (float("inf") if i == 9 else 1.0)).backward()
            scaler.unscale_(optimizer)
            if all(p.grad.isfinite().all() for p in lora(model).values()):
                pre.apply()
            scaler.step(optimizer)
            scaler.update()


@sound("scaled_gradients_turned", "effective")
def _(observe):
    """The preconditioner is invariant to scale and turns the scaled gradients before the scaler divides them."""
    model = mlp(226)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    with observe(model):
        for i in range(16):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, i)).backward()
            pre.apply()
            scaler.step(optimizer)
            scaler.update()


@sound("bfloat16_weights_turned_in_float", "effective")
def _(observe):
    """Bfloat16 gradients are turned in float, written back in bfloat16, and the steps are large enough."""
    model = attn(227)
    model.to(torch.bfloat16)
    optimizer, pre = adamw(trainable(model), 1e-2), Gram(lora(model))

    def half_loss(model: nn.Module, i: int) -> Tensor:
        x, y = batch(i)
        return F.mse_loss(model(x.bfloat16()).float(), y)

    with observe(model):
        for i in range(16):
            step(model, i, optimizer, pre, half_loss)


@sound("groups_rebuilt_with_same_tensors", "effective")
def _(observe):
    """In mid-run the groups are rebuilt for LoRA+ from the same tensors, with two rates above zero."""
    model = attn(228)
    tensors = lora(model)
    optimizer, pre = adamw(tensors.values()), Gram(tensors)
    with observe(model):
        for i in range(20):
            if i == 8:
                base = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
                parts = [[p for n, p in tensors.items() if mark in n] for mark in (".lora_A.", ".lora_B.")]
                optimizer.param_groups[:] = [
                    base | {"params": part, "lr": rate} for part, rate in zip(parts, (1e-3, 4e-3), strict=True)
                ]
            step(model, i, optimizer, pre)


@sound("optimizer_rebuilt_with_new_adapter", "effective")
def _(observe):
    """A second adapter replaces the first in mid-run, with a new optimizer and a newly registered hook."""
    model = mlp(229)
    second(model)
    with observe(model):
        for name in ("default", "second"):
            model.set_adapter(name)
            optimizer, pre = adamw(lora(model, name).values()), Gram(lora(model, name), warmup=1)
            optimizer.register_step_pre_hook(lambda *_, pre=pre: pre.apply())
            for i in range(14):
                step(model, i, optimizer)


@sound("everything_resumed_from_state", "effective")
def _(observe):
    """Half-way adapter, optimizer and preconditioner are saved and resumed from their own states."""
    model = attn(230)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model))
    with observe(model):
        for i in range(20):
            if i == 10:
                buffer = io.BytesIO()
                saved = (get_peft_model_state_dict(model), optimizer.state_dict(), (pre.cov, pre.root, pre.seen))
                torch.save(saved, buffer)
                buffer.seek(0)
                weights, state, (cov, root, seen) = torch.load(buffer)
                set_peft_model_state_dict(model, weights)
                optimizer, pre = adamw(trainable(model)), Gram(lora(model))
                optimizer.load_state_dict(state)
                pre.cov, pre.root, pre.seen = cov, root, seen
            step(model, i, optimizer, pre)


class SlimLinear(torch.autograd.Function):
    """A linear map with a hand-written backward."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply."""
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return both gradients."""
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, -2).T @ x.flatten(0, -2)


@sound("custom_linear_function", "effective")
def _(observe):
    """The LoRA projections run through a hand-written autograd function with correct gradients."""
    model = attn(231)
    for name, module in model.named_modules():
        if name.endswith((".lora_A.default", ".lora_B.default")):
            module.forward = lambda x, module=module: SlimLinear.apply(x, module.weight)
    optimizer, pre = adamw(trainable(model)), Kfac(model)
    with observe(model):
        for i in range(16):
            step(model, i, optimizer, pre)


@sound("outlier_batches_skipped_cleanly", "effective")
def _(observe):
    """Outlier batches are skipped after backward and before preconditioning, and the next step clears gradients."""
    model = mlp(232)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model))
    norms: list[float] = []
    with observe(model):
        for i in range(26):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            norms.append(float(nn.utils.get_total_norm([p.grad for p in trainable(model)])))
            if i > 4 and norms[-1] > sorted(norms)[int(0.8 * len(norms))]:
                continue
            pre.apply()
            optimizer.step()


@sound("critic_apart_from_actor", "effective")
def _(observe):
    """The critic sees detached features and has its own backward and optimizer; the actor's gradients are turned."""
    body = attn(233)
    model = Headed(body)
    actor, critic = adamw(trainable(body)), sgd(model.head.parameters())
    pre = Gram(lora(model))
    with observe(model):
        for i in range(16):
            x, y = batch(i)
            actor.zero_grad()
            features = body(x)
            F.mse_loss(features, y).backward()
            pre.apply()
            critic.zero_grad()
            F.mse_loss(model.head(features.detach()), y.mean(-1, keepdim=True)).backward()
            critic.step()
            actor.step()


@sound("both_losses_before_turning", "effective")
def _(observe):
    """Policy and value losses each run backward into a shared trunk and the sum is turned once."""
    body = mlp(234)
    model = Headed(body)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model))
    with observe(model):
        for i in range(16):
            x, y = batch(i)
            optimizer.zero_grad()
            features = body(x)
            F.mse_loss(features, y).backward(retain_graph=True)
            (0.5 * F.mse_loss(model.head(features), y.mean(-1, keepdim=True))).backward()
            pre.apply()
            optimizer.step()


@sound("contrastive_two_forwards_turned", "effective")
def _(observe):
    """Statistics come from both forwards of a contrastive loss and the summed gradient is turned once."""
    model = attn(235)
    optimizer, pre = adamw(trainable(model)), Kfac(model)
    with observe(model):
        for i in range(16):
            step(model, i, optimizer, pre, info_nce)


@sound("kl_reference_with_adapter_disabled", "effective")
def _(observe):
    """The reference pass runs with the adapter disabled and without gradients, so it leaves the statistics alone."""
    model = llama(236)
    optimizer, pre = adamw(trainable(model)), Kfac(model)

    def loss_fn(model: nn.Module, i: int) -> Tensor:
        ids = tokens(i)
        out = model(input_ids=ids, labels=ids)
        with torch.no_grad(), model.disable_adapter():
            reference = model(input_ids=ids).logits.log_softmax(-1)
        return out.loss + 0.05 * F.kl_div(out.logits.log_softmax(-1), reference, log_target=True, reduction="batchmean")

    with observe(model):
        for i in range(14):
            step(model, i, optimizer, pre, loss_fn)


@sound("evaluated_merged_and_saved_between", "effective")
def _(observe):
    """Between preconditioned steps the adapter is merged, evaluated, unmerged and saved."""
    model = attn(237)
    optimizer, pre = adamw(trainable(model)), Kfac(model)
    with observe(model):
        for i in range(18):
            step(model, i, optimizer, pre)
            if i % 4 == 3:
                model.merge_adapter()
                evaluate(model)
                model.unmerge_adapter()
                torch.save(get_peft_model_state_dict(model), io.BytesIO())


@sound("failed_refresh_keeps_the_old_matrix", "effective")
def _(observe):
    """When an eigendecomposition fails the exception is caught and the matrix of the step before is used."""
    model = attn(238)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model))
    with observe(model):
        for i in range(18):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            for name, p in lora(model).items():
                try:
                    if i % 5 == 4:
                        raise torch.linalg.LinAlgError("failed to converge")
                    pre.learn(name, p.grad)
                except torch.linalg.LinAlgError:
                    pass
                if i > 1:
                    p.grad.copy_(turned(pre.root[name], p.grad, ".lora_A." in name))
            optimizer.step()


@sound("coroutine_preconditioner", "effective")
def _(observe):
    """An endless generator receives names and gradients and yields the turned ones."""
    model = mlp(239)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model))

    def worker() -> Iterator[Tensor | None]:
        out = None
        while True:
            name, grad = yield out
            out = pre.turn(name, grad)

    work = worker()
    next(work)
    with observe(model):
        for i in range(16):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            for name, p in lora(model).items():
                p.grad = work.send((name, p.grad))
            optimizer.step()


@sound("checkpointed_with_hook_statistics", "effective")
def _(observe):
    """Non-re-entrant checkpointing runs the hooks twice, which counts activations twice and changes no average."""
    model = attn(240, reentrant=False)
    optimizer, pre = adamw(trainable(model)), Kfac(model)
    with observe(model):
        for i in range(16):
            step(model, i, optimizer, pre)


@sound("reentrant_recomputation_feeds_statistics", "effective")
def _(observe):
    """With re-entrant checkpointing the statistics are taken in the recomputation, where the graph exists."""
    model = attn(241, reentrant=True)
    optimizer, pre = adamw(trainable(model)), Kfac(model)
    with observe(model):
        for i in range(16):
            optimizer.zero_grad()
            x, y = batch(i)
            F.mse_loss(model(x.requires_grad_(True)), y).backward()
            pre.apply()
            optimizer.step()


@sound("fused_backward_turns_then_steps", "effective")
def _(observe):
    """Inside backward each parameter's gradient is turned, stepped by its own optimizer and cleared."""
    model = mlp(242)
    tensors = lora(model)
    names = {p: n for n, p in tensors.items()}
    optimizers, pre = {p: sgd([p], 0.1) for p in names}, Gram(tensors)

    def fused(p: nn.Parameter) -> None:
        p.grad.copy_(pre.turn(names[p], p.grad))
        optimizers[p].step()
        optimizers[p].zero_grad()

    with observe(model):
        for p in optimizers:
            p.register_post_accumulate_grad_hook(fused)
        for i in range(16):
            loss_of(model, i).backward()


@sound("adafactor_with_full_matrix", "effective")
def _(observe):
    """A full rank-space matrix mixes rows, which Adafactor's factored scaling cannot undo."""
    model = attn(243)
    optimizer = Adafactor(trainable(model), lr=3e-3, scale_parameter=False, relative_step=False, beta1=0.9)
    pre = Gram(lora(model))
    with observe(model):
        for i in range(16):
            step(model, i, optimizer, pre)


class Preconditioned(torch.optim.Optimizer):
    """A wrapper that turns gradients at the start of its own step and then steps the wrapped optimizer."""

    def __init__(self, inner: torch.optim.Optimizer, pre: Gram):
        super().__init__([{"params": g["params"]} for g in inner.param_groups], {})
        self.inner, self.pre, self.param_groups = inner, pre, inner.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        """Turn and step."""
        self.pre.apply()
        self.inner.step()


@sound("wrapping_optimizer_turns_in_its_step", "effective")
def _(observe):
    """An outer optimizer turns the gradients at the start of its step and hands them to the inner one."""
    model = attn(244)
    optimizer = Preconditioned(adamw(trainable(model)), Gram(lora(model)))
    with observe(model):
        for i in range(16):
            step(model, i, optimizer)


class Lion(torch.optim.Optimizer):
    """Sign of interpolated momentum."""

    def __init__(self, params, lr: float, betas: tuple[float, float] = (0.5, 0.9)):
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure=None):
        """Step by signs."""
        for group in self.param_groups:
            fast, slow = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                p.add_(mean.lerp(p.grad, 1 - fast).sign(), alpha=-group["lr"])
                mean.lerp_(p.grad, 1 - slow)


@sound("lion_with_full_matrix", "effective")
def _(observe):
    """Lion takes signs of a gradient whose rows were mixed by a full matrix, so many signs differ."""
    model = mlp(245)
    optimizer, pre = Lion(trainable(model), 1e-3), Gram(lora(model))
    with observe(model):
        for i in range(18):
            step(model, i, optimizer, pre)


@sound("schedule_free_with_turned_gradients", "effective")
def _(observe):
    """Turned gradients drive a schedule-free optimizer whose evaluation weights are swapped in and out."""
    model = attn(246)
    optimizer, pre = ScheduleFree(trainable(model), 0.5), Gram(lora(model))
    with observe(model):
        for i in range(16):
            step(model, i, optimizer, pre)
            if i % 5 == 4:
                optimizer.mode(True)
                evaluate(model)
                optimizer.mode(False)


@sound("ragged_accumulation_turned_once", "effective")
def _(observe):
    """Groups of one to three micro-batches are accumulated and the sum is turned once."""
    model = llama(247, layers=2)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model))
    with observe(model):
        for i in range(14):
            optimizer.zero_grad()
            count = 1 + i % 3
            for k in range(count):
                (lm_loss(model, 5 * i + k) / count).backward()
            pre.apply()
            optimizer.step()


@sound("cosine_schedule_with_warmup", "effective")
def _(observe):
    """A schedule warms up from a tenth and decays to a tenth of the rate while every gradient is turned."""
    model = attn(248)
    optimizer, pre = adamw(trainable(model), 5e-3), Kfac(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(0.1 + s / 5, 0.55 + 0.45 * math.cos(math.pi * min(s, 24) / 24))
    )
    with observe(model):
        for i in range(24):
            step(model, i, optimizer, pre)
            schedule.step()


@sound("decoupled_weight_decay_and_amsgrad", "effective")
def _(observe):
    """AMSGrad with moderate decoupled decay follows the turned gradients."""
    model = mlp(249)
    optimizer = torch.optim.AdamW(trainable(model), lr=3e-3, weight_decay=0.01, amsgrad=True, foreach=True)
    pre = Gram(lora(model))
    with observe(model):
        for i in range(16):
            step(model, i, optimizer, pre)


@sound("tensor_hook_turns_in_backward", "effective")
def _(observe):
    """Tensor hooks return the turned gradient during the only backward of each step."""
    model = attn(250)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model))

    def hook(name: str) -> Callable:
        return lambda grad: pre.turn(name, grad).clone()

    with observe(model):
        for name, p in lora(model).items():
            p.register_hook(hook(name))
        for i in range(16):
            step(model, i, optimizer)


# ---------------------------------------------------------------- sound: further shapes and loops


@sound("plain_embedding_and_convolution", "no-modifier")
def _(observe):
    """LoRA on an embedding, a convolution and a linear layer is trained plainly."""
    torch.manual_seed(135)

    class Words(nn.Module):
        """Embed, convolve over time and project."""

        def __init__(self):
            super().__init__()
            self.embed, self.conv, self.out = nn.Embedding(48, 16), nn.Conv1d(16, 16, 3, padding=1), nn.Linear(16, 48)

        def forward(self, ids: Tensor) -> Tensor:
            """Return logits."""
            x = self.embed(ids)
            return self.out(F.silu(self.conv(x.transpose(1, 2)).transpose(1, 2)) + x)

    model = adapt(Words(), ["embed", "conv", "out"], init=True)
    optimizer = adamw(trainable(model), 1e-2)
    with observe(model):
        for i in range(14):
            ids = tokens(i)
            optimizer.zero_grad()
            F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()


@sound("plain_storage_replaced_by_copies", "no-modifier")
def _(observe):
    """An offloading loop replaces p.data by an equal copy before each forward; values stay what the step left."""
    model = mlp(137)
    optimizer = adamw(trainable(model))
    with observe(model):
        for i in range(14):
            for p in trainable(model):
                p.data = p.data.clone()
            step(model, i, optimizer)


@sound("two_shards_both_stepped", "effective")
def _(observe):
    """The layers are sharded over two optimizers and both are stepped after preconditioning."""
    model = attn(251)
    pre = Gram(lora(model))
    shards = [adamw([p for n, p in lora(model).items() if f"blocks.{k}." in n]) for k in (0, 1)]
    with observe(model):
        for i in range(16):
            model.zero_grad()
            loss_of(model, i).backward()
            pre.apply()
            for shard in shards:
                shard.step()


@sound("two_active_adapters_turned", "effective")
def _(observe):
    """Two adapters are active at once and both are preconditioned."""
    model = attn(252)
    second(model)
    model.base_model.set_adapter(["default", "second"])
    optimizer = adamw(trainable(model))
    pre = Gram(lora(model) | lora(model, "second"))
    with observe(model):
        for i in range(16):
            step(model, i, optimizer, pre)


@sound("functional_gradient_turned", "effective")
def _(observe):
    """torch.func.grad differentiates a functional call on the current weights, and the turned result is assigned."""
    model = mlp(253)
    tensors = lora(model)
    optimizer, pre = adamw(trainable(model)), Gram(tensors)

    def objective(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(torch.func.functional_call(model, weights, (x,)), y)

    with observe(model):
        for i in range(16):
            grads = torch.func.grad(objective)({n: p.detach() for n, p in tensors.items()}, *batch(i))
            for name, p in tensors.items():
                p.grad = pre.turn(name, grads[name])
            optimizer.step()


@sound("cached_contrastive_gradients", "effective")
def _(observe):
    """Gradient caching embeds all chunks without a graph and then backpropagates chunk by chunk; the sum is turned."""
    model = attn(254)
    optimizer, pre = adamw(trainable(model)), Kfac(model)
    with observe(model):
        for i in range(16):
            x, _y = batch(i)
            noisy = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
            chunks = [*x.split(4), *noisy.split(4)]
            optimizer.zero_grad()
            with torch.no_grad():
                cached = torch.cat([model(c).mean(1) for c in chunks])
            cached.requires_grad_(True)
            left, right = F.normalize(cached, dim=-1).chunk(2)
            F.cross_entropy(left @ right.T / 0.2, torch.arange(len(x))).backward()
            for chunk, grad in zip(chunks, cached.grad.split(4), strict=True):
                model(chunk).mean(1).backward(grad)
            pre.apply()
            optimizer.step()


@sound("storage_replaced_and_turned", "effective")
def _(observe):
    """An offloading loop replaces p.data by equal copies around preconditioned steps."""
    model = attn(256)
    optimizer, pre = sgd(trainable(model), 0.1, momentum=0.5), Gram(lora(model))
    with observe(model):
        for i in range(16):
            for p in trainable(model):
                p.data = p.data.clone()
            step(model, i, optimizer, pre)


@sound("hook_registered_per_epoch_and_removed", "effective")
def _(observe):
    """Each epoch registers the optimizer hook anew and removes it at its end, so it runs once a step."""
    model = mlp(257)
    optimizer, pre = adamw(trainable(model)), Gram(lora(model))
    with observe(model):
        for epoch in range(4):
            handle = optimizer.register_step_pre_hook(lambda *_: pre.apply())
            for i in range(5):
                step(model, 5 * epoch + i, optimizer)
            handle.remove()


def main() -> None:
    """Run all cases unobserved and print how they went."""
    for case in CASES:
        start = time.perf_counter()
        try:
            case.run(lambda model: contextlib.nullcontext())
            result = "ok"
        except Exception as error:
            result = repr(error)
        print(f"{case.name:50} {time.perf_counter() - start:6.2f} {result}")


if __name__ == "__main__":
    main()
