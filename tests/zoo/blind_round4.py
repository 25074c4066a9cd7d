"""Blind cases, round 4: faults and sound runs of modified gradients in realistic trainings, with expectations."""

from __future__ import annotations

import contextlib
import copy
import random
import tempfile
import time
import types
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.func import functional_call
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LambdaLR, OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from transformers import (
    Adafactor,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

torch.set_num_threads(1)
warnings.filterwarnings("ignore")


@dataclass(frozen=True)
class Case:
    """One run with what it should be judged as."""

    name: str
    kind: str
    link: str | None
    causes: tuple[str, ...]
    run: Callable
    why: str


CASES: list[Case] = []


def fault(name, link, *causes):
    """Adds a run with a fault: the first broken link and the causes that are right answers."""

    def add(run):
        CASES.append(Case(name, "fault", link, causes, run, run.__doc__))
        return run

    return add


def sound(name, *causes):
    """Adds a run in which every link holds."""

    def add(run):
        CASES.append(Case(name, "sound", None, causes, run, run.__doc__))
        return run

    return add


# ---------------------------------------------------------------- models and data


def seed(n):
    """Seeds every generator in use."""
    random.seed(n)
    np.random.seed(n)
    torch.manual_seed(n)


class Block(nn.Module):
    """Linear attention and a small MLP, both residual."""

    def __init__(self, d):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d, d, bias=False) for _ in range(3))
        self.up_proj, self.down_proj = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x):
        q, k = F.elu(self.q_proj(x)) + 1, F.elu(self.k_proj(x)) + 1
        state = k.transpose(1, 2) @ self.v_proj(x) / x.shape[1]
        x = x + q @ state / q.sum(-1, keepdim=True)
        return x + self.down_proj(F.gelu(self.up_proj(x)))


class Net(nn.Module):
    """A stack of blocks with a head."""

    def __init__(self, d=16, layers=2, out=8):
        super().__init__()
        self.layers = nn.ModuleList(Block(d) for _ in range(layers))
        self.head = nn.Linear(d, out)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Tower(nn.Module):
    """A deep chain of small linear layers."""

    def __init__(self, d=12, layers=12):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(d, d) for _ in range(layers))
        self.head = nn.Linear(d, 8)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(3 * layer(x))
        return self.head(x)


def net(d=16, layers=2, r=4, targets=("q_proj", "v_proj"), init=False, **lora):
    """A PEFT model over a small net."""
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(targets), init_lora_weights=init, **lora)
    return get_peft_model(Net(d, layers), config)


def llama(hidden=16, layers=2, r=4, targets=("q_proj", "v_proj"), init=False, tie=False, heads=2, **lora):
    """A PEFT model over a tiny Llama."""
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=64,
        tie_word_embeddings=tie,
        initializer_range=0.15,
        attn_implementation="eager",
        use_cache=False,
        pad_token_id=0,
    )
    peft_config = LoraConfig(
        r=r, lora_alpha=2 * r, target_modules=list(targets), init_lora_weights=init, task_type="CAUSAL_LM", **lora
    )
    return get_peft_model(LlamaForCausalLM(config), peft_config)


def reals(n, d=16, out=8, batch=4, length=6):
    """Batches of uneven features with a noisy target."""
    scale = torch.logspace(-0.7, 0.7, d)
    mix, teacher = torch.randn(d, d) / d**0.5, torch.randn(d, out) / d**0.5
    for _ in range(n):
        x = (torch.randn(batch, length, d) * scale) @ mix
        yield x, torch.tanh(x @ teacher) + 0.3 * torch.randn(batch, length, out)


def tokens(n, batch=4, length=10, vocab=48):
    """Batches of token ids in which each token hints at the next."""
    for _ in range(n):
        ids = [torch.randint(1, vocab, (batch, 1))]
        for _ in range(length - 1):
            ids.append((ids[-1] * 3 + torch.randint(0, 6, (batch, 1))) % (vocab - 1) + 1)
        yield torch.cat(ids, 1)


def mse(model, batch):
    """Squared error of a net."""
    return F.mse_loss(model(batch[0]), batch[1])


def lm(model, ids):
    """Language modelling loss."""
    return model(input_ids=ids, labels=ids).loss


def logps(model, ids, prompt=3):
    """Summed log-probabilities of the completions."""
    logits = model(input_ids=ids).logits[:, prompt - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, ids[:, prompt:, None]).squeeze(-1).sum(-1)


def trainable(model):
    """What is to be trained."""
    return [p for p in model.parameters() if p.requires_grad]


def named(model, part):
    """Trainable parameters with that part in their names."""
    return [p for n, p in model.named_parameters() if part in n and p.requires_grad]


def adamw(model, lr=5e-3, **kw):
    """AdamW over what is to be trained."""
    return torch.optim.AdamW(trainable(model), lr=lr, weight_decay=0.0, **kw)


def sgd(model, lr=0.1, **kw):
    """SGD over what is to be trained."""
    return torch.optim.SGD(trainable(model), lr=lr, **kw)


# ---------------------------------------------------------------- preconditioner


class Kfac:
    """Rank-space preconditioner: M G for A, G M for B, from running averages in each layer."""

    def __init__(self, model, adapter="default", source="hooks", warmup=2, every=1, damping=0.1, power=1.0, only=None):
        self.source, self.warmup, self.every = source, warmup, every
        self.damping, self.power, self.steps = damping, power, 0
        self.stats, self.matrices, self.side, self.pairs, self.handles = {}, {}, {}, [], []
        self.collect = True
        for name, module in model.named_modules():
            parts = getattr(module, "lora_A", None)
            if isinstance(parts, nn.ModuleDict) and adapter in parts and (only is None or only(name)):
                self.add(module.lora_A[adapter], module.lora_B[adapter])

    def add(self, a, b):
        """Takes a layer's pair in."""
        self.side[a.weight], self.side[b.weight] = "A", "B"
        self.pairs.append((a.weight, b.weight))
        if self.source == "hooks":
            self.handles.append(a.register_forward_hook(lambda m, i, out: self.see(a.weight, b.weight, out)))

    def see(self, a, b, out):
        """Takes the statistics of one forward pass and of its backward pass."""
        if self.collect and torch.is_grad_enabled() and out.requires_grad:
            self.update(b, out.detach().flatten(0, -2))
            out.register_hook(lambda g: self.update(a, g.detach().flatten(0, -2)))

    def update(self, p, rows):
        """Moves the running average of a tensor's second moment."""
        rows = rows.float()
        new = rows.T @ rows / len(rows)
        self.stats[p] = new if p not in self.stats else 0.9 * self.stats[p] + 0.1 * new

    def refresh(self):
        """Inverts the factors."""
        for p, c in self.stats.items():
            if c.isfinite().all():
                self.matrices[p] = self.invert(c)

    def invert(self, c):
        """Damped inverse power of a factor, with a mean eigenvalue of one."""
        r = len(c)
        values, vectors = torch.linalg.eigh(c * r / c.trace().clamp_min(1e-30) + self.damping * torch.eye(r))
        powers = values.clamp_min(1e-6) ** -self.power
        return vectors @ torch.diag(powers * r / powers.sum()) @ vectors.T

    def turn(self, p, g):
        """What the preconditioner makes of a gradient."""
        m = self.matrices.get(p)
        if m is None or self.steps <= self.warmup:
            return g
        return (m @ g.float() if self.side[p] == "A" else g.float() @ m).to(g.dtype)

    def tick(self):
        """Counts a step, and takes statistics from gradients or weights where hooks do not."""
        self.steps += 1
        for a, b in self.pairs:
            if self.source == "grads":
                for p in (a, b):
                    if p.grad is not None and p.grad.abs().sum() > 0:
                        self.update(p, (p.grad.T if p is a else p.grad).detach())
            elif self.source == "weights":
                self.stats[a], self.stats[b] = (b.detach().T @ b.detach()).float(), (a @ a.T).detach().float()
        if self.steps % self.every == 0 or self.steps <= self.warmup + 1:
            self.refresh()

    @torch.no_grad()
    def step(self, *_):
        """Modifies all gradients; fits as a hook before an optimizer's step."""
        self.tick()
        for p in self.side:
            if p.grad is not None:
                p.grad.copy_(self.turn(p, p.grad))


def fit(observe, model, opt, data, loss=mse, before=None, after=None):
    """The plainest loop: backward, something before the step, the step, something after it."""
    with observe(model):
        for i, batch in enumerate(data):
            opt.zero_grad()
            loss(model, batch).backward()
            if before is not None:
                before(i)
            opt.step()
            if after is not None:
                after(i)


class Rows(torch.utils.data.Dataset):
    """Token rows for Trainer."""

    def __init__(self, n, length=10):
        self.ids = torch.cat(list(tokens(n, 1, length)))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def trainer(model, out, steps=12, cls=Trainer, callbacks=(), data=None, optimizers=(None, None), **kw):
    """A quiet Trainer on the processor."""
    options = {"learning_rate": 5e-3, "per_device_train_batch_size": 4, "weight_decay": 0.0} | kw
    arguments = TrainingArguments(
        output_dir=out, max_steps=steps, report_to="none", use_cpu=True, disable_tqdm=True, seed=1,
        logging_strategy="no", **({"save_strategy": "no"} | options),
    )  # fmt: skip
    t = cls(
        model=model, args=arguments, train_dataset=data or Rows(64), eval_dataset=Rows(8), callbacks=list(callbacks),
        optimizers=optimizers,
    )  # fmt: skip
    t.remove_callback(PrinterCallback)
    return t


@contextlib.contextmanager
def accelerator(**kw):
    """A fresh Accelerator on the processor."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    try:
        yield Accelerator(cpu=True, **kw)
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


class When(TrainerCallback):
    """Calls something at events of Trainer."""

    def __init__(self, **events):
        for event, do in events.items():
            setattr(self, event, self.quiet(do))

    @staticmethod
    def quiet(do):
        """Keeps what a call answers from Trainer, which would take it for its control."""

        def call(args, state, control, **kw):
            do(args, state, control)

        return call


def dpo(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.5):
    """The loss of direct preference optimisation."""
    return -F.logsigmoid(beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))).mean()


def rollout(model, ids, new=5):
    """Samples completions without gradients."""
    with torch.no_grad():
        for _ in range(new):
            p = model(input_ids=ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(p, 1)], 1)
    return ids


def advantages(ids, group=4):
    """Rewards of completions, normalised in their groups."""
    reward = (ids[:, 3:] % 3 == 0).float().mean(1) + 0.01 * ids[:, -1]
    reward = reward.view(-1, group)
    return ((reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)).flatten()


# ---------------------------------------------------------------- faults: the forward pass and its gradient


@fault("merged_for_rollout_never_unmerged", "used", "not-used", "no-gradient")
def _(observe):
    """The adapter is merged for the first rollout and stays merged, input gradients hide that nothing learns."""
    seed(1)
    model = llama()
    model.enable_input_require_grads()
    pre, opt = Kfac(model), adamw(model)
    with observe(model):
        for prompt in tokens(10, 2, 3):
            if not any(getattr(m, "merged", False) for m in model.modules()):
                model.merge_adapter()
            ids = rollout(model, prompt.repeat_interleave(4, 0))
            loss = -(advantages(ids) * logps(model, ids)).mean()
            opt.zero_grad()
            loss.backward()
            pre.step()
            opt.step()


@fault("dpo_reference_adapter_left_active", "used", "not-used", "wrong-parameters")
def _(observe):
    """The reference adapter is switched on for its log-probabilities and the policy's are then taken with it too."""
    seed(2)
    model = llama()
    model.add_adapter("reference", copy.deepcopy(model.peft_config["default"]))
    pre, opt = Kfac(model), adamw(model)
    with observe(model):
        for chosen, rejected in zip(tokens(12), tokens(12), strict=True):
            model.set_adapter("reference")
            with torch.no_grad():
                ref = logps(model, chosen), logps(model, rejected)
            opt.zero_grad()
            dpo(logps(model, chosen), logps(model, rejected), *ref).backward()
            pre.step()
            opt.step()


@fault("policy_pass_inside_disable_adapter", "used", "not-used", "no-gradient")
def _(observe):
    """The policy's pass slipped by indentation into the block that disables the adapter for the reference."""
    seed(3)
    model = llama(targets=("q_proj", "o_proj"))
    model.enable_input_require_grads()
    pre, opt = Kfac(model), adamw(model)
    with observe(model):
        for chosen, rejected in zip(tokens(12), tokens(12), strict=True):
            with model.disable_adapter():
                with torch.no_grad():
                    ref = logps(model, chosen), logps(model, rejected)
                loss = dpo(logps(model, chosen), logps(model, rejected), *ref)
            opt.zero_grad()
            loss.backward()
            pre.step()
            opt.step()


@fault("functional_snapshot_never_refreshed", "used", "not-used", "no-gradient", "stale-gradient")
def _(observe):
    """A functional loop differentiates a dictionary of parameter copies made once, while the real ones are stepped."""
    seed(4)
    model = net()
    pre, opt = Kfac(model, source="grads"), sgd(model, 0.05)
    real = {n: p for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    copies = {n: p.detach().clone().requires_grad_() for n, p in real.items()}
    with observe(model):
        for x, y in reals(14):
            loss = F.mse_loss(functional_call(model, {**frozen, **copies}, (x,)), y)
            for p, g in zip(real.values(), torch.autograd.grad(loss, list(copies.values())), strict=True):
                p.grad = g
            pre.step()
            opt.step()


@fault("projections_fused_for_speed", "used", "not-used")
def _(observe):
    """At the start of training each LoRA projection is swapped for a plain linear layer with the merged weight."""
    seed(5)
    model = net(modules_to_save=["head"])
    pre, opt = Kfac(model, source="grads"), adamw(model)
    with observe(model):
        for block in model.base_model.model.layers:
            for name in ("q_proj", "v_proj"):
                old = getattr(block, name)
                fused = nn.Linear(16, 16, bias=False).requires_grad_(False)
                fused.weight.data.copy_(old.base_layer.weight + old.get_delta_weight("default"))
                setattr(block, name, fused)
        for batch in reals(12):
            opt.zero_grad()
            mse(model, batch).backward()
            pre.step()
            opt.step()


@fault("adapter_scaling_set_to_zero", "arrived", "no-gradient", "not-used")
def _(observe):
    """Weights for blending adapters are left at zero, so that the LoRA branch counts for nothing and learns nothing."""
    seed(6)
    model = net(modules_to_save=["head"])
    for module in model.modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            module.set_scale("default", 0.0)
    pre, opt = Kfac(model), adamw(model)
    fit(observe, model, opt, reals(12), before=pre.step)


class Critic(nn.Module):
    """A language model with a head for values."""

    def __init__(self, policy, cut):
        super().__init__()
        self.policy, self.cut, self.value = policy, cut, nn.Linear(16, 1)

    def forward(self, ids):
        hidden = self.policy(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        return self.value(hidden.detach() if self.cut else hidden).squeeze(-1)


@fault("value_head_on_detached_states", "arrived", "no-gradient")
def _(observe):
    """A critic's head reads detached hidden states, a leftover of feature extraction, so that only the head learns."""
    seed(7)
    model = Critic(llama(), cut=True)
    pre, opt = Kfac(model), adamw(model)

    def loss(m, ids):
        return F.mse_loss(m(ids), (ids % 5).float())

    fit(observe, model, opt, tokens(12), loss, before=pre.step)


class Checkpointed(Net):
    """A net that recomputes its blocks in the old, reentrant way."""

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=True)
        return self.head(x)


@fault("reentrant_checkpoint_without_input_grads", "arrived", "no-gradient")
def _(observe):
    """Reentrant checkpointing gets inputs without gradients, so nothing inside the blocks has one; the head learns."""
    seed(8)
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], modules_to_save=["head"], init_lora_weights=False)
    model = get_peft_model(Checkpointed(), config)
    pre, opt = Kfac(model), adamw(model)
    fit(observe, model, opt, reals(12), before=pre.step)


@fault("grpo_reward_is_constant", "arrived", "no-gradient")
def _(observe):
    """The reward function answers the same for all completions, so that all advantages and gradients are zero."""
    seed(9)
    model = llama(layers=1)
    pre, opt = Kfac(model), adamw(model)
    with observe(model):
        for prompt in tokens(10, 2, 3):
            ids = rollout(model, prompt.repeat_interleave(4, 0))
            reward = torch.tensor([1.0 if len(row) else 0.0 for row in ids]).view(-1, 4)
            adv = ((reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)).flatten()
            opt.zero_grad()
            (-(adv * logps(model, ids)).mean()).backward()
            pre.step()
            opt.step()


@fault("dpo_beta_read_as_integer", "arrived", "no-gradient")
def _(observe):
    """The beta of a preference loss is read from a configuration with int(), becomes zero and kills the gradient."""
    seed(10)
    model = llama(layers=1, targets=("k_proj", "v_proj"))
    pre, opt = Kfac(model), adamw(model)
    beta = int(float("0.1"))
    with observe(model):
        for chosen, rejected in zip(tokens(12), tokens(12), strict=True):
            with torch.no_grad(), model.disable_adapter():
                ref = logps(model, chosen), logps(model, rejected)
            opt.zero_grad()
            dpo(logps(model, chosen), logps(model, rejected), *ref, beta=beta).backward()
            pre.step()
            opt.step()


@fault("every_label_masked_away", "arrived", "no-gradient")
def _(observe):
    """Truncation removed all answers: each label is -100, the loss a mean over nothing, and all gradients are zero."""
    seed(11)
    model = llama(layers=1)
    pre, opt = Kfac(model, source="weights"), adamw(model)

    def loss(m, ids):
        labels = torch.full_like(ids, -100)
        return F.cross_entropy(m(input_ids=ids).logits.flatten(0, 1), labels.flatten())

    fit(observe, model, opt, tokens(10), loss, before=pre.step)


@fault("norm_of_a_zero_difference", "arrived", "non-finite")
def _(observe):
    """A drift penalty takes the norm of a difference that begins at exactly zero, under a fixed power of one half."""
    seed(12)
    model = net()
    pre, opt = Kfac(model, source="weights"), adamw(model)
    start = [p.detach().clone() for p in trainable(model)]

    def loss(m, batch):
        drift = sum(((p - s) ** 2).sum() for p, s in zip(trainable(m), start, strict=True))
        return mse(m, batch) + 0.01 * drift**0.5

    fit(observe, model, opt, reals(10), loss, before=pre.step)


def fast_lora(layer):
    """The forward pass of a LoRA layer without calls of its parts."""

    def forward(x, *args, **kw):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return layer.base_layer(x) + F.linear(F.linear(x, a), b) * layer.scaling["default"]

    return forward


@fault("fast_kernel_bypasses_hooked_parts", "read", "starved", "not-ready", "nothing-written")
def _(observe):
    """A fast LoRA forward uses the weights without calling the parts, so hooks for statistics there never run."""
    seed(13)
    model = net(targets=("q_proj", "v_proj", "up_proj"))
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.forward = fast_lora(module)
    pre, opt = Kfac(model), adamw(model)
    fit(observe, model, opt, reals(14), before=pre.step)


@fault("hooks_on_the_other_adapter", "read", "starved", "nothing-written", "not-ready")
def _(observe):
    """Statistics are hooked on the adapter named default while the trained one has another name."""
    seed(14)
    model = net()
    model.add_adapter("policy", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("policy")
    pre, opt = Kfac(model, "default"), adamw(model)
    fit(observe, model, opt, reals(14), before=pre.step)


# ---------------------------------------------------------------- faults: what the modifier makes of a gradient


@fault("ascent_sign_kept_in_natural_gradient", "turned", "against-the-gradient")
def _(observe):
    """A policy gradient's preconditioner returns the ascent direction while the loss is already negated."""
    seed(15)
    model = llama(layers=1)
    pre, opt = Kfac(model, warmup=0), adamw(model)
    with observe(model):
        for prompt in tokens(12, 2, 3):
            ids = rollout(model, prompt.repeat_interleave(4, 0))
            opt.zero_grad()
            (-(advantages(ids) * logps(model, ids)).mean()).backward()
            pre.step()
            for p in pre.side:
                p.grad.neg_()
            opt.step()


class Negative(Kfac):
    """Subtracts a damping that lies above the largest eigenvalue."""

    def invert(self, c):
        m = torch.linalg.inv(c - 1.3 * torch.linalg.eigvalsh(c)[-1] * torch.eye(len(c)))
        return m * len(c) / m.diagonal().abs().sum()


@fault("damping_subtracted", "turned", "against-the-gradient")
def _(observe):
    """Damping is subtracted from the factor, whose inverse is then negative throughout."""
    seed(16)
    model = net()
    pre, opt = Negative(model), adamw(model, 1e-3)
    opt.register_step_pre_hook(pre.step)
    fit(observe, model, opt, reals(16))


class Overdamped(Kfac):
    """A damping in absolute units far above the factors."""

    def invert(self, c):
        return torch.linalg.inv(c / c.trace() + 30 * torch.eye(len(c))) * 150


@fault("damping_swamps_the_factor", "turned", "scaled-only")
def _(observe):
    """Damping far above each eigenvalue turns the inverse into a multiple of the identity."""
    seed(17)
    model = net(targets=("q_proj", "k_proj", "v_proj"))
    pre, opt = Overdamped(model, warmup=1), sgd(model, 0.001)
    fit(observe, model, opt, reals(16), before=pre.step)


@fault("trust_ratio_called_preconditioning", "turned", "scaled-only")
def _(observe):
    """Each tensor's gradient is only multiplied by the ratio of its weight's norm to its own."""
    seed(18)
    model = llama(layers=2)
    opt = sgd(model, 0.02)

    @torch.no_grad()
    def ratio(*_):
        for p in trainable(model):
            p.grad.mul_(p.norm() / (p.grad.norm() + 1e-8))

    opt.register_step_pre_hook(ratio)
    fit(observe, model, opt, tokens(14), lm)


class Undamped(Kfac):
    """Inverts a factor in its own units with no damping to speak of."""

    def invert(self, c):
        return torch.linalg.inv(c.double() + 1e-12 * torch.eye(len(c))).float()


@fault("inverse_of_a_tiny_fisher", "turned", "blown-up")
def _(observe):
    """The Fisher matrix of a loss divided by a token count is inverted undamped, and gradients grow 100,000-fold."""
    seed(19)
    model = net(targets=("q_proj", "down_proj"))
    pre, opt = Undamped(model, source="grads", warmup=0), adamw(model, 1e-3)
    fit(observe, model, opt, reals(12), lambda m, batch: mse(m, batch) / 64, before=pre.step)


@fault("trust_region_far_too_small", "turned", "clipped-to-nothing")
def _(observe):
    """A KL clip in the wrong units scales each preconditioned gradient to almost nothing before plain SGD."""
    seed(20)
    model = net()
    pre, opt = Kfac(model, warmup=1), sgd(model, 0.5)

    @torch.no_grad()
    def clip(_):
        raw = [p.grad.clone() for p in pre.side]
        pre.step()
        total = sum((p.grad * g).sum() for p, g in zip(pre.side, raw, strict=True))
        for p in pre.side:
            p.grad.mul_((1e-14 / total.clamp_min(1e-20)) ** 0.5)

    fit(observe, model, opt, reals(14), before=clip)


@fault("adaptive_clip_on_zero_initialised_b", "turned", "clipped-to-nothing", "only-one-factor")
def _(observe):
    """Adaptive clipping bounds a gradient by its weight's norm, which is zero for B, so B never gets off the ground."""
    seed(21)
    model = net(init=True)
    pre, opt = Kfac(model, warmup=1), sgd(model, 0.1)

    @torch.no_grad()
    def agc(_):
        pre.step()
        for p in pre.side:
            limit = 0.01 * p.norm().clamp_min(1e-3)
            p.grad.mul_((limit / p.grad.norm().clamp_min(1e-12)).clamp_max(1.0))

    fit(observe, model, opt, reals(16), before=agc)


@fault("double_buffered_gradients", "turned", "stale-gradient")
def _(observe):
    """An asynchronous preconditioner hands back the previous step's result, so each update is one batch late."""
    seed(22)
    model = net()
    pre, opt = Kfac(model, warmup=0), sgd(model, 0.05)
    waiting = {}

    @torch.no_grad()
    def swap(_):
        pre.step()
        for p in pre.side:
            ready = waiting.get(p)
            waiting[p] = p.grad.clone()
            if ready is not None:
                p.grad.copy_(ready)

    fit(observe, model, opt, reals(16, batch=1, length=2), before=swap)


@fault("first_gradient_cached_for_good", "turned", "stale-gradient")
def _(observe):
    """Gradients are cached with setdefault, so that from the second step on the first batch's one is preconditioned."""
    seed(23)
    model = net(targets=("up_proj", "down_proj"))
    pre, opt = Kfac(model, warmup=0), sgd(model, 0.01)
    cache = {}

    @torch.no_grad()
    def cached(_):
        pre.tick()
        for p in pre.side:
            p.grad.copy_(pre.turn(p, cache.setdefault(p, p.grad.clone())))

    fit(observe, model, opt, reals(16, batch=1, length=2), before=cached)


@fault("layers_sorted_as_text", "turned", "unrelated-gradient")
def _(observe):
    """Results are zipped with names sorted as text, where layer 10 precedes layer 2, and land in other layers."""
    seed(24)
    model = get_peft_model(Tower(24), LoraConfig(r=4, target_modules=r".*layers\.\d+", init_lora_weights=False))
    pre, opt = Kfac(model, warmup=0), adamw(model)
    as_text = [p for n, p in sorted(model.named_parameters()) if "lora" in n]
    as_built = [p for n, p in model.named_parameters() if "lora" in n]

    @torch.no_grad()
    def shuffled(_):
        pre.tick()
        new = [pre.turn(p, p.grad).clone() for p in as_built]
        for p, g in zip(as_text, new, strict=True):
            p.grad.copy_(g)

    fit(observe, model, opt, reals(12, 24), before=shuffled)


@fault("privacy_noise_not_divided", "turned", "unrelated-gradient")
def _(observe):
    """The noise of a private mean gradient is added at the scale of the sum, and next to nothing else is left."""
    seed(25)
    model = net(d=24, r=6)
    opt = adamw(model)

    @torch.no_grad()
    def noisy(_):
        for p in trainable(model):
            p.grad.mul_((1 / p.grad.norm()).clamp_max(1.0)).add_(torch.randn_like(p) * 4.0)

    fit(observe, model, opt, reals(16, 24), before=noisy)


@fault("work_list_rotated_by_a_layer", "turned", "unrelated-gradient")
def _(observe):
    """A work list was rotated by a layer, so that each pair is given the turned gradients of another pair."""
    seed(26)
    model = llama(layers=3)
    pre, opt = Kfac(model, warmup=1), adamw(model)
    pairs = [pre.pairs[2:] + pre.pairs[:2], pre.pairs]

    @torch.no_grad()
    def rotated(i):
        pre.tick()
        new = {p: pre.turn(p, p.grad).clone() for p in pre.side}
        for target, source in zip(*pairs, strict=True):
            for p, q in zip(target, source, strict=True):
                p.grad.copy_(new[q] if i > 1 else p.grad)

    fit(observe, model, opt, tokens(14), lm, before=rotated)


class Gentle(Kfac):
    """Never makes a gradient longer."""

    def invert(self, c):
        m = super().invert(c)
        return m / torch.linalg.matrix_norm(m, 2)


@fault("exhausted_generator_zeroes_nothing", "turned", "accumulated-across-steps")
def _(observe):
    """Gradients are cleared over a generator that the optimizer has used up, so that they pile up over all steps."""
    seed(27)
    model = net()
    params = (p for p in model.parameters() if p.requires_grad)
    opt = torch.optim.AdamW(params, lr=2e-3, weight_decay=0.0)
    pre = Gentle(model)
    with observe(model):
        for batch in reals(16):
            for p in params:
                p.grad = None
            mse(model, batch).backward()
            pre.step()
            opt.step()


@fault("hooked_twice_after_rerun_of_a_cell", "turned", "applied-twice")
def _(observe):
    """The cell that registers the preconditioner before the step ran twice, so each gradient is multiplied twice."""
    seed(28)
    model = net()
    opt, pre = adamw(model), Kfac(model, warmup=1)
    for _ in range(2):
        opt.register_step_pre_hook(pre.step)
    fit(observe, model, opt, reals(16))


@fault("callback_and_wrapped_step_both_apply", "turned", "applied-twice")
def _(observe):
    """A callback of Trainer and a patched step of the optimizer both precondition the same gradients."""
    seed(29)
    model = llama()
    opt, pre = adamw(model), Kfac(model, warmup=1)
    plain = opt.step

    def step(self, *args, **kw):
        pre.step()
        return plain(*args, **kw)

    opt.step = types.MethodType(step, opt)
    schedule = LambdaLR(opt, lambda s: 1.0)
    with tempfile.TemporaryDirectory() as out:
        apply = When(on_pre_optimizer_step=lambda *_: pre.step())
        t = trainer(model, out, 14, callbacks=[apply], optimizers=(opt, schedule))
        with observe(model):
            t.train()


# ---------------------------------------------------------------- faults: the way to the optimizer


@fault("bucket_copied_back_after_modification", "delivered", "overwritten")
def _(observe):
    """A reducer copies its flat bucket of raw gradients back right before the step and undoes what was written."""
    seed(30)
    model = net()
    pre, opt, params = Kfac(model), adamw(model), trainable(model)

    @torch.no_grad()
    def around(_):
        bucket = torch.cat([p.grad.flatten() for p in params])
        pre.step()
        for p, part in zip(params, bucket.split([p.numel() for p in params]), strict=True):
            p.grad = part.view_as(p).clone()

    fit(observe, model, opt, reals(14), before=around)


@fault("offloaded_copy_restored_at_the_step", "delivered", "overwritten")
def _(observe):
    """Gradients are offloaded as soon as they are ready and fetched again in a hook of the step, past the modifier."""
    seed(31)
    model = llama()
    pre, opt, store = Kfac(model), adamw(model), {}

    @torch.no_grad()
    def fetch(*_):
        for p, g in store.items():
            p.grad.copy_(g)

    for p in trainable(model):
        p.register_post_accumulate_grad_hook(lambda q: store.update({q: q.grad.detach().clone()}))
    opt.register_step_pre_hook(fetch)
    fit(observe, model, opt, tokens(14), lm, before=pre.step)


@fault("sharpness_aware_second_pass", "delivered", "overwritten", "dropped")
def _(observe):
    """The gradient of the first pass is preconditioned; the one of the perturbed second pass, which counts, is not."""
    seed(32)
    model = net()
    pre, opt, params = Kfac(model), adamw(model), trainable(model)
    with observe(model):
        for batch in reals(14):
            opt.zero_grad()
            mse(model, batch).backward()
            pre.step()
            shift = perturb(params)
            opt.zero_grad()
            pre.collect = False
            mse(model, batch).backward()
            pre.collect = True
            unperturb(params, shift)
            opt.step()


@torch.no_grad()
def perturb(params, rho=0.05):
    """Moves weights uphill and says by how much."""
    norm = torch.stack([p.grad.norm() for p in params]).norm()
    shift = [rho * p.grad / (norm + 1e-12) for p in params]
    for p, e in zip(params, shift, strict=True):
        p.add_(e)
    return shift


@torch.no_grad()
def unperturb(params, shift):
    """Moves weights back."""
    for p, e in zip(params, shift, strict=True):
        p.sub_(e)


@fault("auxiliary_loss_after_modification", "delivered", "overwritten", "applied-on-micro-steps", "modified-too-late")
def _(observe):
    """A strong auxiliary loss runs its own backward pass after the modification and adds raw gradients on top."""
    seed(33)
    model = llama()
    pre, opt = Kfac(model), adamw(model)
    with observe(model):
        for ids, other in zip(tokens(14), tokens(14), strict=True):
            opt.zero_grad()
            (0.3 * lm(model, ids)).backward()
            pre.step()
            pre.collect = False
            lm(model, other).backward()
            pre.collect = True
            opt.step()


@fault("modified_at_substep_ends_only", "delivered", "applied-on-micro-steps", "overwritten")
def _(observe):
    """With gradient accumulation the callback fires after each micro step but the last, which is added unmodified."""
    seed(34)
    model = llama()
    pre = Kfac(model)
    with tempfile.TemporaryDirectory() as out:
        apply = When(on_substep_end=lambda *_: pre.step())
        t = trainer(
            model, out, 10, callbacks=[apply], gradient_accumulation_steps=4, per_device_train_batch_size=2,
            data=Rows(160), lr_scheduler_type="constant",
        )  # fmt: skip
        with observe(model):
            t.train()


@fault("hooked_after_instead_of_before_the_step", "delivered", "modified-too-late")
def _(observe):
    """The modifier is registered as a hook that runs after the optimizer's step."""
    seed(35)
    model = net()
    pre, opt = Kfac(model), adamw(model)
    opt.register_step_post_hook(pre.step)
    fit(observe, model, opt, reals(14))


@fault("optimizer_in_backward_modified_afterwards", "delivered", "modified-too-late")
def _(observe):
    """Each parameter steps in its own backward hook, and gradients are modified once backward is over."""
    seed(36)
    model = net()
    pre = Kfac(model)
    opts = {p: torch.optim.AdamW([p], lr=5e-3, weight_decay=0.0) for p in trainable(model)}
    for p in opts:
        p.register_post_accumulate_grad_hook(lambda q: opts[q].step())
    with observe(model):
        for batch in reals(14):
            for opt in opts.values():
                opt.zero_grad()
            mse(model, batch).backward()
            pre.step()


@fault("scheduler_step_carries_the_modifier", "delivered", "modified-too-late")
def _(observe):
    """The modifier sits in a patched scheduler step, which the loop calls after the optimizer's."""
    seed(37)
    model = llama(layers=1, targets=("q_proj", "k_proj", "v_proj"))
    pre, opt = Kfac(model), adamw(model)
    schedule = LambdaLR(opt, lambda s: 0.99**s)
    plain = schedule.step

    def step(*args):
        pre.step()
        plain(*args)

    schedule.step = step
    fit(observe, model, opt, tokens(14), lm, after=lambda _: schedule.step())


@fault("gradient_mask_matches_all_adapters", "delivered", "dropped")
def _(observe):
    """A mask for frozen layers matches each LoRA name, its gradients are dropped, and only the head is trained."""
    seed(38)
    model = net(modules_to_save=["head"])
    pre, opt = Kfac(model), adamw(model)
    frozen = ("layers.0", "layers.1")

    def mask(_):
        pre.step()
        for n, p in model.named_parameters():
            if any(part in n for part in frozen):
                p.grad = None

    fit(observe, model, opt, reals(14), before=mask)


@fault("nan_guard_restores_raw_gradients", "delivered", "overwritten")
def _(observe):
    """A guard meant for non-finite results has its test inverted and restores raw gradients whenever all is well."""
    seed(39)
    model = llama(targets=("q_proj", "down_proj"))
    pre, opt = Kfac(model), adamw(model)

    @torch.no_grad()
    def guarded(_):
        raw = {p: p.grad.clone() for p in pre.side}
        pre.step()
        for p, g in raw.items():
            if p.grad.isfinite().all():
                p.grad.copy_(g)

    fit(observe, model, opt, tokens(14), lm, before=guarded)


class MainGrad(torch.optim.SGD):
    """Steps with gradients that hooks gather in main_grad."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.main_grad, alpha=group["lr"])
                p.main_grad.zero_()


def gather(p):
    """Adds a fresh gradient to main_grad."""
    p.main_grad = p.grad.detach().clone() if not hasattr(p, "main_grad") else p.main_grad + p.grad


@fault("optimizer_reads_main_grad", "consumed", "not-consumed")
def _(observe):
    """The optimizer steps with main_grad, filled by hooks, while the modifier writes the ordinary gradient."""
    seed(40)
    model = net()
    pre, opt = Kfac(model), MainGrad(trainable(model), lr=0.05)
    for p in trainable(model):
        p.register_post_accumulate_grad_hook(gather)
    fit(observe, model, opt, reals(14), before=pre.step)


class Captured(torch.optim.Optimizer):
    """Momentum SGD that steps with gradient buffers captured at its first step, as a graph capture does."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        self.buffers = None

    @torch.no_grad()
    def step(self, closure=None):
        params = self.param_groups[0]["params"]
        if self.buffers is None:
            self.buffers = [p.grad for p in params]
        for p, buffer in zip(params, self.buffers, strict=True):
            p.sub_(buffer, alpha=self.param_groups[0]["lr"])

    def zero_grad(self, set_to_none=False):
        for p, buffer in zip(self.param_groups[0]["params"], self.buffers or [], strict=False):
            p.grad = buffer.zero_()


@fault("captured_buffers_left_behind", "consumed", "not-consumed")
def _(observe):
    """The optimizer steps with captured buffers, and the modifier binds new tensors as gradients instead."""
    seed(41)
    model = net()
    pre, opt = Kfac(model), Captured(trainable(model), 0.05)

    @torch.no_grad()
    def rebind(_):
        pre.tick()
        if opt.buffers is not None:
            for p in pre.side:
                p.grad = pre.turn(p, p.grad).clone()

    fit(observe, model, opt, reals(16), before=rebind)


class Whiten(Kfac):
    """Whitens each gradient by its own Gram matrix."""

    def turn(self, p, g):
        gram = g @ g.T if self.side[p] == "A" else g.T @ g
        values, vectors = torch.linalg.eigh(gram + 1e-4 * gram.trace() * torch.eye(len(gram)))
        m = vectors @ torch.diag(values**-0.5) @ vectors.T
        new = m @ g if self.side[p] == "A" else g @ m
        return new * g.norm() / new.norm()


@fault("orthogonalising_optimizer_undoes_whitening", "consumed", "cancelled-by-optimizer")
def _(observe):
    """Muon orthogonalises each update, so whitening a gradient by its own Gram matrix first changes nothing."""
    seed(42)
    model = net()
    pre = Whiten(model, source="none")
    opt = torch.optim.Muon(trainable(model), lr=0.01, weight_decay=0.0, momentum=0.0, nesterov=False, ns_steps=12)
    fit(observe, model, opt, reals(14), before=pre.step)


def diagonal(model):
    """A constant diagonal preconditioner, as if from a calibration before training."""
    pre = Kfac(model, source="none", warmup=0)
    scale = torch.tensor([4.0, 0.2, 1.5, 0.3])
    pre.matrices = {p: torch.diag(scale.roll(i)) for i, p in enumerate(pre.side)}
    return pre


@fault("adam_cancels_a_constant_diagonal", "consumed", "cancelled-by-optimizer")
def _(observe):
    """A constant diagonal rescaling of the ranks is divided out again by Adam's second moments."""
    seed(43)
    model = net()
    pre, opt = diagonal(model), adamw(model, eps=1e-12)
    fit(observe, model, opt, reals(16), before=pre.step)


class SignSGD(torch.optim.Optimizer):
    """Steps with the sign of each gradient."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.sign(), alpha=group["lr"])


@fault("sign_descent_cancels_a_diagonal", "consumed", "cancelled-by-optimizer")
def _(observe):
    """A positive diagonal over the ranks never changes a sign, and the optimizer looks at nothing but signs."""
    seed(44)
    model = llama(layers=1)
    pre, opt = diagonal(model), SignSGD(trainable(model), 2e-3)
    fit(observe, model, opt, tokens(16), lm, before=pre.step)


@fault("second_task_adapter_missing_in_optimizer", "consumed", "wrong-parameters", "no-steps", "not-used")
def _(observe):
    """A new adapter for the next task is added and preconditioned, but the optimizer still holds the first one's."""
    seed(45)
    model = net()
    opt = adamw(model)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("second")
    pre = Kfac(model, "second")

    def loss(m, batch):
        for p in pre.side:
            p.grad = None
        return mse(m, batch)

    fit(observe, model, opt, reals(14), loss, before=pre.step)


@fault("optimizer_deep_copied_for_a_restart", "consumed", "wrong-parameters")
def _(observe):
    """A deep copy of the optimizer, kept for restarts, is the one that is stepped, with copies of all tensors."""
    seed(46)
    model = net()
    pre, opt = Kfac(model), copy.deepcopy(adamw(model))

    def loss(m, batch):
        m.zero_grad()
        return mse(m, batch)

    fit(observe, model, opt, reals(14), loss, before=pre.step)


@fault("accumulation_longer_than_the_run", "consumed", "no-steps", "wrong-parameters")
def _(observe):
    """Accelerate accumulates over more batches than the run has, so its optimizer never takes a step."""
    seed(47)
    model = llama(layers=1)
    pre, opt = Kfac(model), adamw(model)
    with accelerator(gradient_accumulation_steps=128) as acc:
        prepared, opt = acc.prepare(model, opt)
        with observe(model):
            for ids in tokens(16):
                with acc.accumulate(prepared):
                    acc.backward(lm(prepared, ids) * 128)
                    pre.step()
                    opt.step()
                    opt.zero_grad()


@fault("scaler_skips_for_a_bad_head", "consumed", "no-steps", "non-finite")
def _(observe):
    """One parameter of the head has an infinite gradient in each step, so the scaler skips the whole step, always."""
    seed(48)
    model = net(modules_to_save=["head"])
    bad = named(model, "head")[-1]
    bad.register_hook(lambda g: g / 0.0)
    pre, opt, scaler = Kfac(model), adamw(model), torch.amp.GradScaler("cpu", init_scale=8.0)
    with observe(model):
        for batch in reals(12):
            opt.zero_grad()
            scaler.scale(mse(model, batch)).backward()
            scaler.unscale_(opt)
            pre.step()
            scaler.step(opt)
            scaler.update()


@fault("head_optimizer_stepped_twice", "consumed", "no-steps", "not-consumed", "wrong-parameters")
def _(observe):
    """Of two optimizers the head's is stepped twice by a copied line, and the adapter's never."""
    seed(49)
    model = net(modules_to_save=["head"])
    pre = Kfac(model)
    lora = torch.optim.AdamW(named(model, "lora"), lr=5e-3)
    head = torch.optim.AdamW(named(model, "head"), lr=1e-3)
    with observe(model):
        for batch in reals(14):
            lora.zero_grad()
            head.zero_grad()
            mse(model, batch).backward()
            pre.step()
            head.step()
            head.step()


# ---------------------------------------------------------------- faults: the weights


@fault("warmup_with_integer_division", "moved", "learning-rate-zero")
def _(observe):
    """A warm-up factor is computed with integer division and stays zero for the whole run."""
    seed(50)
    model = net()
    pre, opt = Kfac(model), adamw(model)
    schedule = LambdaLR(opt, lambda s: min(1, s // 100))
    fit(observe, model, opt, reals(14), before=pre.step, after=lambda _: schedule.step())


@fault("schedule_for_an_unsized_stream", "moved", "learning-rate-zero")
def _(observe):
    """The number of steps of a stream was taken as zero, and a linear schedule to zero has ended before it begins."""
    seed(51)
    model = llama()
    pre, opt = Kfac(model), adamw(model)
    schedule = get_linear_schedule_with_warmup(opt, 0, num_training_steps=0)
    fit(observe, model, opt, tokens(12), lm, before=pre.step, after=lambda _: schedule.step())


@fault("lora_plus_with_ratio_zero", "moved", "learning-rate-zero", "only-one-factor")
def _(observe):
    """LoRA+ is given a ratio of zero in the belief that this turns it off, which gives B no learning rate."""
    seed(52)
    model = net()
    pre = Kfac(model)
    opt = create_loraplus_optimizer(model, torch.optim.AdamW, lr=5e-3, loraplus_lr_ratio=0)
    fit(observe, model, opt, reals(14), before=pre.step)


@fault("half_precision_adapter_tiny_rate", "moved", "no-update")
def _(observe):
    """Adapters kept in bfloat16 with a fine-tuning rate of a large model: each update is rounded away."""
    seed(53)
    model = net()
    for p in trainable(model):
        p.data = p.data.bfloat16()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.dtype == torch.float32:
            module.bfloat16()
    pre, opt = Kfac(model), sgd(model, 1e-6)

    def loss(m, batch):
        return F.mse_loss(m(batch[0].bfloat16()).float(), batch[1])

    fit(observe, model, opt, reals(14), loss, before=pre.step)


class Trusted(torch.optim.AdamW):
    """Takes a step back whenever it was longer than a bound."""

    bound = 1e-8

    @torch.no_grad()
    def step(self, closure=None):
        params = self.param_groups[0]["params"]
        old = [p.detach().clone() for p in params]
        super().step(closure)
        for p, o in zip(params, old, strict=True):
            if (p - o).norm() > self.bound:
                p.copy_(o)


@fault("trust_region_takes_each_step_back", "moved", "update-undone", "no-update", "not-kept")
def _(observe):
    """An optimizer takes back steps longer than a bound, which is set so small that it takes back all of them."""
    seed(54)
    model = net()
    pre, opt = Kfac(model), Trusted(trainable(model), lr=5e-3, weight_decay=0.0)
    fit(observe, model, opt, reals(14), before=pre.step)


@fault("weight_sync_in_the_wrong_direction", "kept", "not-kept", "update-undone")
def _(observe):
    """After each step the policy is overwritten with the generation engine's weights instead of the other way round."""
    seed(55)
    model = llama(layers=1)
    engine = copy.deepcopy(get_peft_model_state_dict(model))
    pre, opt = Kfac(model), adamw(model)
    with observe(model):
        for prompt in tokens(12, 2, 3):
            ids = rollout(model, prompt.repeat_interleave(4, 0))
            opt.zero_grad()
            (-(advantages(ids) * logps(model, ids)).mean()).backward()
            pre.step()
            opt.step()
            set_peft_model_state_dict(model, engine)


@fault("average_swapped_in_and_never_out", "kept", "not-kept", "update-undone")
def _(observe):
    """For an evaluation after each step the slow average is copied into the model, and nobody puts the weights back."""
    seed(56)
    model = net()
    pre, opt = Kfac(model), adamw(model)
    shadow = {p: p.detach().clone() for p in trainable(model)}

    @torch.no_grad()
    def evaluate(_):
        for p, s in shadow.items():
            s.lerp_(p, 0.001)
            p.copy_(s)
        model(next(reals(1))[0])

    fit(observe, model, opt, reals(14), before=pre.step, after=evaluate)


@fault("best_adapter_reloaded_each_step", "kept", "not-kept", "update-undone")
def _(observe):
    """A callback restores the best adapter unless the loss improved by more than it ever can."""
    seed(57)
    model = llama(layers=1)
    pre = Kfac(model)
    best = copy.deepcopy(get_peft_model_state_dict(model))
    both = When(
        on_pre_optimizer_step=lambda *_: pre.step(), on_step_end=lambda *_: set_peft_model_state_dict(model, best)
    )
    with tempfile.TemporaryDirectory() as out:
        t = trainer(model, out, 12, callbacks=[both])
        with observe(model):
            t.train()


@fault("lookahead_that_never_looks", "kept", "not-kept", "update-undone")
def _(observe):
    """Slow weights are pulled forward by nothing and copied back to the fast ones after each step of the loop."""
    seed(58)
    model = net(targets=("up_proj", "down_proj"))
    pre, opt = Kfac(model), adamw(model)
    slow = {p: p.detach().clone() for p in trainable(model)}

    @torch.no_grad()
    def pull(_, alpha=0.0):
        for p, s in slow.items():
            s.lerp_(p, alpha)
            p.copy_(s)

    fit(observe, model, opt, reals(14), before=pre.step, after=pull)


# ---------------------------------------------------------------- faults: not throughout


class HalfSum(Kfac):
    """Sums its statistics up in half precision and passes gradients on when they are no longer finite."""

    def update(self, p, rows):
        new = rows.T @ rows
        new = (new * 3600 / new.diagonal().max()).half()
        self.stats[p] = new if p not in self.stats else self.stats[p] + new

    def refresh(self):
        for p, c in self.stats.items():
            good = c.isfinite().all()
            self.matrices[p] = self.invert(c.float()) if good else torch.eye(len(c))


@fault("half_precision_sums_overflow", "throughout", "stopped")
def _(observe):
    """Statistics summed in half precision overflow in the middle of the run, and from then on nothing is changed."""
    seed(59)
    model = net()
    pre, opt = HalfSum(model), adamw(model)
    fit(observe, model, opt, reals(40), before=pre.step)


@fault("hook_cleaned_up_after_first_epoch", "throughout", "stopped")
def _(observe):
    """Cleaning up at the end of an epoch removes the hook of the step, though more epochs follow."""
    seed(60)
    model = llama()
    pre, opt = Kfac(model), adamw(model)
    hooks = [opt.register_step_pre_hook(pre.step)]
    schedule = LambdaLR(opt, lambda s: 1.0)
    clean = When(on_epoch_end=lambda *_: hooks.pop().remove() if hooks else None)
    with tempfile.TemporaryDirectory() as out:
        t = trainer(model, out, 30, callbacks=[clean], data=Rows(40), optimizers=(opt, schedule))
        with observe(model):
            t.train()


@fault("switched_to_an_adapter_it_does_not_know", "throughout", "stopped", "only-some-layers", "not-used")
def _(observe):
    """Half-way training goes on with a second adapter that the optimizer holds but the modifier never heard of."""
    seed(61)
    model = net()
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    params = [p for n, p in model.named_parameters() if "lora" in n]
    pre, opt = Kfac(model), torch.optim.AdamW(params, lr=5e-3, weight_decay=0.0)
    with observe(model):
        for i, batch in enumerate(reals(24)):
            model.set_adapter("default" if i < 12 else "second")
            opt.zero_grad()
            mse(model, batch).backward()
            pre.step()
            opt.step()


@fault("other_ranks_skipped", "throughout", "only-some-layers")
def _(observe):
    """A rank pattern gives some layers another rank, and the modifier skips those whose shape does not fit."""
    seed(62)
    model = net(targets=("q_proj", "v_proj", "up_proj"), rank_pattern={"up_proj": 6, "v_proj": 6})
    pre, opt = Kfac(model), adamw(model)
    pre.side = {p: s for p, s in pre.side.items() if 4 in p.shape}
    fit(observe, model, opt, reals(16), before=pre.step)


@fault("unfrozen_later_and_unknown", "throughout", "only-some-layers")
def _(observe):
    """Layers unfrozen after a quarter of the run were not trainable when the modifier made its list."""
    seed(63)
    model = net(layers=3)
    opt = adamw(model)
    for p in named(model, "layers.0") + named(model, "layers.1"):
        p.requires_grad_(False)
    pre = Kfac(model)
    pre.side = {p: s for p, s in pre.side.items() if p.requires_grad}

    def thaw(i):
        if i == 5:
            for n, p in model.named_parameters():
                p.requires_grad_("lora" in n)

    fit(observe, model, opt, reals(24), before=pre.step, after=thaw)


@fault("shape_test_fits_a_only", "throughout", "only-one-factor")
def _(observe):
    """The modifier takes gradients with as many rows as the rank, which leaves all B out."""
    seed(64)
    model = llama()
    pre, opt = Kfac(model), adamw(model)
    pre.side = {p: s for p, s in pre.side.items() if p.shape[0] == 4}
    opt.register_step_pre_hook(pre.step)
    fit(observe, model, opt, tokens(16), lm)


@fault("hook_on_one_of_two_optimizers", "throughout", "only-one-factor")
def _(observe):
    """A and B have an optimizer each, and the modifier before the step writes only what its own one holds."""
    seed(65)
    model = net(targets=("q_proj", "v_proj", "down_proj"))
    pre = Kfac(model)
    opt_a = torch.optim.SGD(named(model, "lora_A"), lr=0.05)
    opt_b = torch.optim.SGD(named(model, "lora_B"), lr=0.1)

    @torch.no_grad()
    def own(opt, *_):
        pre.tick()
        for p in opt.param_groups[0]["params"]:
            p.grad.copy_(pre.turn(p, p.grad))

    opt_b.register_step_pre_hook(own)
    with observe(model):
        for batch in reals(16):
            model.zero_grad()
            mse(model, batch).backward()
            opt_a.step()
            opt_b.step()


@fault("schedule_counts_one_epoch_of_three", "throughout", "learning-rate-zero", "stopped")
def _(observe):
    """A linear schedule counts the steps of one epoch, so that the learning rate is zero in the two that follow."""
    seed(66)
    model = llama(layers=1)
    pre, opt = Kfac(model), adamw(model)
    schedule = get_linear_schedule_with_warmup(opt, 0, num_training_steps=10)
    data = list(tokens(10)) * 3
    fit(observe, model, opt, data, lm, before=pre.step, after=lambda _: schedule.step())


@fault("attention_matched_by_name_only", "throughout", "only-some-layers")
def _(observe):
    """Only modules with self_attn in their names are preconditioned, and the adapters of the MLP are left alone."""
    seed(67)
    model = llama(targets=("q_proj", "v_proj", "up_proj", "down_proj"))
    pre = Kfac(model, only=lambda name: "self_attn" in name)
    with tempfile.TemporaryDirectory() as out:
        t = trainer(model, out, 14, callbacks=[When(on_pre_optimizer_step=lambda *_: pre.step())])
        with observe(model):
            t.train()


@fault("phase_switch_after_warm_start", "throughout", "stopped")
def _(observe):
    """A comparison the wrong way round applies the modifier in the first steps only instead of after them."""
    seed(68)
    model = net(use_dora=False, use_rslora=True)
    pre, opt = Kfac(model, warmup=0), adamw(model)

    def gate(i):
        if i < 10:
            pre.step()

    fit(observe, model, opt, reals(30), before=gate)


# ---------------------------------------------------------------- sound: plain training


@sound("plain_dpo_with_disabled_adapter", "no-modifier")
def _(observe):
    """Preference optimisation by hand, whose reference is the model with its adapter switched off."""
    seed(101)
    model = llama()
    opt = adamw(model)
    with observe(model):
        for chosen, rejected in zip(tokens(12), tokens(12), strict=True):
            with torch.no_grad(), model.disable_adapter():
                ref = logps(model, chosen), logps(model, rejected)
            opt.zero_grad()
            dpo(logps(model, chosen), logps(model, rejected), *ref).backward()
            nn.utils.clip_grad_norm_(trainable(model), 1.0)
            opt.step()


@sound("plain_dpo_with_reference_adapter", "no-modifier")
def _(observe):
    """A frozen second adapter is the reference, and the trained one is switched back on before each policy pass."""
    seed(102)
    model = llama(layers=1)
    model.add_adapter("reference", copy.deepcopy(model.peft_config["default"]))
    opt = adamw(model)
    with observe(model):
        for chosen, rejected in zip(tokens(12), tokens(12), strict=True):
            model.set_adapter("reference", inference_mode=True)
            with torch.no_grad():
                ref = logps(model, chosen), logps(model, rejected)
            model.set_adapter("default")
            opt.zero_grad()
            dpo(logps(model, chosen), logps(model, rejected), *ref).backward()
            opt.step()


def grpo(observe, model, opt, before=None, steps=12):
    """Group-relative policy optimisation with merged rollouts and two updates on each of them."""
    with observe(model):
        for prompt in tokens(steps // 2, 2, 3):
            model.merge_adapter()
            ids = rollout(model, prompt.repeat_interleave(4, 0))
            model.unmerge_adapter()
            adv, old = advantages(ids), logps(model, ids).detach()
            for _ in range(2):
                ratio = (logps(model, ids) - old).exp()
                opt.zero_grad()
                (-torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv).mean()).backward()
                if before is not None:
                    before()
                opt.step()


@sound("plain_grpo_with_merged_rollouts", "no-modifier")
def _(observe):
    """The adapter is merged for each rollout and unmerged before the two updates that follow."""
    seed(103)
    model = llama()
    grpo(observe, model, adamw(model, 2e-3))


@sound("plain_critic_with_value_head", "no-modifier")
def _(observe):
    """A value head is trained together with the adapter below it, each by its own group."""
    seed(104)
    model = Critic(llama(), cut=False)
    groups = [{"params": named(model, "lora")}, {"params": named(model, "value"), "lr": 1e-2}]
    opt = torch.optim.AdamW(groups, lr=5e-3)
    fit(observe, model, opt, tokens(14), lambda m, ids: F.mse_loss(m(ids), (ids % 5).float()))


@sound("plain_distillation_from_disabled_adapter", "no-modifier")
def _(observe):
    """The same model without its adapter is the teacher on clean inputs, with its adapter the student on noisy ones."""
    seed(105)
    model = net()
    opt = adamw(model)

    def loss(m, batch):
        with torch.no_grad(), m.disable_adapter():
            target = m(batch[0])
        return F.smooth_l1_loss(m(batch[0] + 0.3 * torch.randn_like(batch[0])), target)

    fit(observe, model, opt, reals(16), loss)


@sound("plain_sharpness_aware", "no-modifier")
def _(observe):
    """Sharpness-aware minimisation: weights are perturbed for a second pass and put back before the step."""
    seed(106)
    model = net()
    opt, params = sgd(model, 0.01, momentum=0.9), trainable(model)
    with observe(model):
        for batch in reals(16):
            opt.zero_grad()
            mse(model, batch).backward()
            shift = perturb(params, 0.02)
            opt.zero_grad()
            mse(model, batch).backward()
            unperturb(params, shift)
            opt.step()


class Lookahead(torch.optim.AdamW):
    """AdamW whose weights are pulled towards slow ones inside each fourth step."""

    slow, count = None, 0

    @torch.no_grad()
    def step(self, closure=None):
        params = [p for g in self.param_groups for p in g["params"]]
        self.slow = self.slow or [p.detach().clone() for p in params]
        super().step(closure)
        self.count += 1
        if self.count % 4 == 0:
            for p, s in zip(params, self.slow, strict=True):
                p.copy_(s.lerp_(p, 0.8))


@sound("plain_lookahead", "no-modifier")
def _(observe):
    """Lookahead inside the optimizer keeps four fifths of each four steps."""
    seed(107)
    model = net()
    fit(observe, model, Lookahead(trainable(model), lr=5e-3, weight_decay=0.0), reals(16))


@sound("plain_average_swapped_in_and_out", "no-modifier")
def _(observe):
    """An average of the weights is swapped in for evaluations and the weights are put back afterwards."""
    seed(108)
    model = net()
    opt = adamw(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    @torch.no_grad()
    def evaluate(i):
        average.update_parameters(model)
        if i % 4 == 3:
            kept = {k: v.clone() for k, v in model.state_dict().items()}
            model.load_state_dict(average.module.state_dict())
            model(next(reals(1))[0])
            model.load_state_dict(kept)

    fit(observe, model, opt, reals(16), after=evaluate)


@sound("plain_one_optimizer_per_factor", "no-modifier")
def _(observe):
    """A is trained by SGD with momentum and B by RAdam, with a clip for each."""
    seed(109)
    model = net()
    a, b = named(model, "lora_A"), named(model, "lora_B")
    opts = [torch.optim.SGD(a, lr=0.02, momentum=0.9), torch.optim.RAdam(b, lr=5e-3)]
    with observe(model):
        for batch in reals(16):
            model.zero_grad()
            mse(model, batch).backward()
            for opt, params in zip(opts, (a, b), strict=True):
                nn.utils.clip_grad_norm_(params, 0.5)
                opt.step()


@sound("plain_alternating_factors", "no-modifier")
def _(observe):
    """A and B take turns to be trainable, four steps each."""
    seed(110)
    model = net()
    a, b = named(model, "lora_A"), named(model, "lora_B")
    opt = adamw(model)

    def loss(m, batch):
        turn = loss.count // 4 % 2
        loss.count += 1
        for p in a:
            p.requires_grad_(turn == 0)
        for p in b:
            p.requires_grad_(turn == 1)
        return mse(m, batch)

    loss.count = 0
    fit(observe, model, opt, reals(24), loss)


@sound("plain_gradual_unfreezing", "no-modifier")
def _(observe):
    """Layers are unfrozen from the top, one every four steps."""
    seed(111)
    model = net(layers=3)
    opt = adamw(model)

    def loss(m, batch):
        for i in range(3):
            for n, p in m.named_parameters():
                if f"layers.{i}." in n and "lora" in n:
                    p.requires_grad_(loss.count >= 4 * (2 - i))
        loss.count += 1
        return mse(m, batch)

    loss.count = 0
    fit(observe, model, opt, reals(20), loss)


@sound("plain_optimizer_in_backward", "no-modifier")
def _(observe):
    """Each parameter is stepped and cleared by its own optimizer in its backward hook."""
    seed(112)
    model = net()
    opts = {p: torch.optim.Adam([p], lr=5e-3) for p in trainable(model)}

    def now(p):
        opts[p].step()
        opts[p].zero_grad()

    for p in opts:
        p.register_post_accumulate_grad_hook(now)
    with observe(model):
        for batch in reals(16):
            mse(model, batch).backward()


@sound("plain_gradients_assigned_by_hand", "no-modifier")
def _(observe):
    """Gradients come from autograd.grad and are assigned before the step."""
    seed(113)
    model = net()
    opt, params = adamw(model), trainable(model)
    with observe(model):
        for batch in reals(16):
            for p, g in zip(params, torch.autograd.grad(mse(model, batch), params), strict=True):
                p.grad = g
            opt.step()


@sound("plain_scaler_finds_its_scale", "no-modifier")
def _(observe):
    """A scale far too large makes a scaler skip the first step, after which each step is taken."""
    seed(114)
    model = net()
    opt, scaler = adamw(model), torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=2.0**-100)
    with observe(model):
        for batch in reals(20):
            opt.zero_grad()
            scaler.scale(50 * mse(model, batch)).backward()
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(trainable(model), 1.0)
            scaler.step(opt)
            scaler.update()


@sound("plain_trainer_resumed", "no-modifier")
def _(observe):
    """Trainer resumes from a checkpoint of its own with accumulation, clipping and a cosine schedule."""
    seed(115)
    options = {
        "save_strategy": "steps", "save_steps": 6, "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine",
        "warmup_steps": 2, "per_device_train_batch_size": 2, "max_grad_norm": 0.3,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as out:
        stop = When(on_step_end=lambda a, s, control: setattr(control, "should_training_stop", s.global_step == 6))
        trainer(llama(layers=1), out, 16, callbacks=[stop], **options).train()
        model = llama(layers=1)
        t = trainer(model, out, 16, **options)
        with observe(model):
            t.train(resume_from_checkpoint=True)


@sound("plain_accelerate_accumulation", "no-modifier")
def _(observe):
    """Accelerate accumulates over three batches, clips when gradients are in sync, and steps a schedule."""
    seed(116)
    model = llama(layers=1)
    opt = adamw(model)
    with accelerator(gradient_accumulation_steps=3) as acc:
        prepared, opt, schedule = acc.prepare(model, opt, OneCycleLR(opt, 1e-2, total_steps=40))
        with observe(model):
            for ids in tokens(36, 2):
                with acc.accumulate(prepared):
                    acc.backward(lm(prepared, ids))
                    if acc.sync_gradients:
                        acc.clip_grad_norm_(prepared.parameters(), 1.0)
                    opt.step()
                    schedule.step()
                    opt.zero_grad()


class ScheduleFree(torch.optim.Optimizer):
    """SGD without a schedule: trains at one point and shows an average of all when evaluating."""

    def __init__(self, params, lr=0.1, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta})
        self.count, self.training = 0, True

    def each(self):
        """All parameters with their group and state."""
        for group in self.param_groups:
            for p in group["params"]:
                yield p, group, self.state[p]

    @torch.no_grad()
    def switch(self, training):
        """Swaps the training point and the average."""
        if training != self.training:
            for p, group, state in self.each():
                if "z" in state:
                    weight = 1 - group["beta"] if training else 1 - 1 / group["beta"]
                    p.lerp_(state["z"], weight)
            self.training = training

    @torch.no_grad()
    def step(self, closure=None):
        self.count += 1
        for p, group, state in self.each():
            z, beta, c = state.setdefault("z", p.detach().clone()), group["beta"], 1 / self.count
            x = (p - (1 - beta) * z) / beta
            z.sub_(p.grad, alpha=group["lr"])
            p.copy_((1 - beta) * z + beta * x.lerp(z, c))


@sound("plain_schedule_free", "no-modifier")
def _(observe):
    """An optimizer without a schedule swaps its average in for each evaluation and out again."""
    seed(117)
    model = net()
    opt = ScheduleFree(trainable(model), lr=0.02)

    def evaluate(i):
        if i % 5 == 4:
            opt.switch(False)
            with torch.no_grad():
                model(next(reals(1))[0])
            opt.switch(True)

    fit(observe, model, opt, reals(20), after=evaluate)


@sound("plain_dora_with_saved_head", "no-modifier")
def _(observe):
    """Magnitudes, directions and a head kept as a module to save, all trained together."""
    seed(118)
    model = net(use_dora=True, modules_to_save=["head"], init=True)
    fit(observe, model, adamw(model), reals(16))


@sound("plain_trainable_tokens", "no-modifier")
def _(observe):
    """Some rows of the embedding are trained beside the adapters, with the output layer tied to it."""
    seed(119)
    model = llama(tie=True, trainable_token_indices=[3, 5, 7])
    fit(observe, model, adamw(model), tokens(14), lm)


@sound("plain_gradient_checkpointing", "no-modifier")
def _(observe):
    """Checkpointing in the reentrant way, with gradients required at the inputs as it needs."""
    seed(120)
    model = llama()
    model.enable_input_require_grads()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": True})
    model.train()
    fit(observe, model, adamw(model), tokens(12), lm)


@sound("plain_strong_adapter_dropout", "no-modifier")
def _(observe):
    """Half of each adapter's input is dropped and weights decay strongly."""
    seed(121)
    model = net(lora_dropout=0.5, init=True, use_rslora=True)
    opt = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1)
    fit(observe, model, opt, reals(20))


@sound("plain_two_adapters_at_once", "no-modifier")
def _(observe):
    """Two adapters of different rank are active together and trained together."""
    seed(122)
    model = net()
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model.add_adapter("small", config)
    model.base_model.set_adapter(["default", "small"])
    fit(observe, model, adamw(model), reals(16))


@sound("plain_separate_losses", "no-modifier")
def _(observe):
    """Two losses are brought back one after the other over one graph, and a third by a pass of its own."""
    seed(123)
    model = net()
    opt = adamw(model)
    with observe(model):
        for batch in reals(16):
            opt.zero_grad()
            out = model(batch[0])
            F.mse_loss(out, batch[1]).backward(retain_graph=True)
            (0.1 * out.abs().mean()).backward()
            (0.1 * F.mse_loss(model(batch[0] + 0.1), out.detach())).backward()
            opt.step()


@sound("plain_adversarial_embeddings", "no-modifier")
def _(observe):
    """Adversarial training: the embedding is moved uphill, a second pass adds its gradient, the embedding goes back."""
    seed(124)
    model = llama()
    opt = adamw(model)
    weight = model.get_input_embeddings().weight.requires_grad_(True)
    with observe(model):
        for ids in tokens(12):
            model.zero_grad()
            lm(model, ids).backward()
            kept, g = weight.detach().clone(), weight.grad
            with torch.no_grad():
                weight.add_(0.2 * g / g.norm())
            lm(model, ids).backward()
            with torch.no_grad():
                weight.copy_(kept)
            opt.step()


@sound("plain_federated_rounds", "no-modifier")
def _(observe):
    """Each round has a fresh optimizer and starts at the weights that the last one left."""
    seed(125)
    model = net()
    with observe(model):
        for _ in range(4):
            opt = torch.optim.SGD(trainable(model), lr=0.01, momentum=0.9)
            for batch in reals(5):
                opt.zero_grad()
                mse(model, batch).backward()
                opt.step()


@sound("plain_bad_batches_left_out", "no-modifier")
def _(observe):
    """Batches with an unusual loss are left out, their gradients cleared, and the rest is trained on."""
    seed(126)
    model = net()
    opt = adamw(model)
    with observe(model):
        for i, (x, y) in enumerate(reals(22)):
            loss = mse(model, (x, y + 100 * (i % 6 == 5)))
            opt.zero_grad()
            loss.backward()
            if loss < 100:
                opt.step()


@sound("plain_lbfgs_with_closure", "no-modifier")
def _(observe):
    """A quasi-Newton method calls its closure several times within a step."""
    seed(127)
    model = net(layers=1)
    opt = torch.optim.LBFGS(trainable(model), lr=0.3, max_iter=3, history_size=5)
    with observe(model):
        for batch in reals(10):

            def closure(batch=batch):
                opt.zero_grad()
                loss = mse(model, batch)
                loss.backward()
                return loss

            opt.step(closure)


@sound("plain_adafactor_of_its_own_rate", "no-modifier")
def _(observe):
    """Adafactor finds its learning rate itself and has none in its groups."""
    seed(128)
    model = llama(layers=1)
    opt = Adafactor(trainable(model), scale_parameter=True, relative_step=True, warmup_init=False, lr=None)
    fit(observe, model, opt, tokens(14), lm)


@sound("plain_muon_and_adamw", "no-modifier")
def _(observe):
    """Muon trains the adapters and AdamW the head and its bias."""
    seed(129)
    model = net(modules_to_save=["head"])
    muon = torch.optim.Muon(named(model, "lora"), lr=0.02, weight_decay=0.0)
    rest = torch.optim.AdamW(named(model, "head"), lr=5e-3)
    with observe(model):
        for batch in reals(16):
            model.zero_grad()
            mse(model, batch).backward()
            muon.step()
            rest.step()


@sound("plain_warm_restarts_through_zero", "no-modifier")
def _(observe):
    """A schedule starts at zero, climbs and restarts, and is at or near zero now and then."""
    seed(130)
    model = net()
    opt = adamw(model, 1e-2)
    restarts = CosineAnnealingWarmRestarts(opt, 8)
    fit(observe, model, opt, reals(28), after=lambda _: restarts.step())


class Lion(torch.optim.Optimizer):
    """Steps with the sign of an interpolated momentum."""

    def __init__(self, params, lr=2e-3, betas=(0.9, 0.99)):
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("m", torch.zeros_like(p))
                    p.sub_(m.lerp(p.grad, 1 - group["betas"][0]).sign(), alpha=group["lr"])
                    m.lerp_(p.grad, 1 - group["betas"][1])


@sound("plain_lion_from_zero_b", "no-modifier")
def _(observe):
    """Lion from the usual start, where B is zero and the first gradient of A with it."""
    seed(131)
    model = llama(init=True, targets=("q_proj", "v_proj", "gate_proj"))
    fit(observe, model, Lion(trainable(model)), tokens(16), lm)


class Packed(Trainer):
    """A trainer with a loss of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, **kw):
        out = model(input_ids=inputs["input_ids"])
        logits, labels = out.logits[:, :-1], inputs["labels"][:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
        return (loss, out) if return_outputs else loss


@sound("plain_trainer_with_own_loss_and_evaluation", "no-modifier")
def _(observe):
    """A trainer with its own loss in bfloat16 evaluates and saves as it goes."""
    seed(132)
    model = llama(layers=1, init=True)
    with tempfile.TemporaryDirectory() as out:
        t = trainer(
            model, out, 14, cls=Packed, bf16=True, eval_strategy="steps", eval_steps=5, save_strategy="steps",
            save_steps=5, lr_scheduler_type="constant_with_warmup", warmup_steps=3,
        )  # fmt: skip
        with observe(model):
            t.train()


@sound("plain_tokens_counted_before_a_step", "no-modifier")
def _(observe):
    """Batches of uneven length are gathered until enough tokens have come together for a step."""
    seed(133)
    model = llama(layers=1)
    opt, count = adamw(model), 0
    with observe(model):
        for i in range(40):
            ids = next(tokens(1, 2, 5 + i * 7 % 9))
            (lm(model, ids) * ids.numel() / 48).backward()
            count += ids.numel()
            if count >= 48:
                opt.step()
                opt.zero_grad()
                count = 0


@sound("plain_moments_dropped_now_and_then", "no-modifier")
def _(observe):
    """The optimizer's state is thrown away every six steps and the rate warms up again, as in ReLoRA."""
    seed(134)
    model = net()
    opt = adamw(model)
    schedule = LambdaLR(opt, lambda s: (s % 6 + 1) / 6)

    def reset(i):
        schedule.step()
        if i % 6 == 5:
            opt.state.clear()

    fit(observe, model, opt, reals(20), after=reset)


# ---------------------------------------------------------------- sound: modifiers that work


@sound("before_each_step_of_accelerate", "effective")
def _(observe):
    """With accelerate the modifier runs only where gradients are in sync, then they are clipped and stepped."""
    seed(201)
    model = llama()
    pre, opt = Kfac(model), adamw(model)
    with accelerator(gradient_accumulation_steps=2) as acc:
        prepared, opt = acc.prepare(model, opt)
        with observe(model):
            for ids in tokens(32, 2):
                with acc.accumulate(prepared):
                    acc.backward(lm(prepared, ids))
                    if acc.sync_gradients:
                        pre.step()
                        acc.clip_grad_norm_(prepared.parameters(), 1.0)
                    opt.step()
                    opt.zero_grad()


@sound("gradient_hooks_on_tensors", "effective")
def _(observe):
    """Each tensor's own hook returns the turned gradient, which being linear also suits accumulation."""
    seed(202)
    model = net()
    pre, opt = Kfac(model), adamw(model)
    for p in pre.side:
        p.register_hook(lambda g, p=p: pre.turn(p, g))
    with observe(model):
        for i, batch in enumerate(reals(32)):
            mse(model, batch).backward()
            if i % 2:
                opt.step()
                opt.zero_grad()
                pre.tick()


@sound("in_hooks_after_accumulation", "effective")
def _(observe):
    """Gradients are turned in the hook that runs once each has been accumulated, one backward pass to a step."""
    seed(203)
    model = net(targets=("q_proj", "up_proj"), use_rslora=True)
    pre, opt = Kfac(model), sgd(model, 0.005, momentum=0.9)

    @torch.no_grad()
    def turn(p):
        p.grad.copy_(pre.turn(p, p.grad))

    for p in pre.side:
        p.register_post_accumulate_grad_hook(turn)
    fit(observe, model, opt, reals(18), after=lambda _: pre.tick())


@sound("trainer_callback_after_clipping", "effective")
def _(observe):
    """A callback before the step of a trainer with accumulation and a cosine schedule."""
    seed(204)
    model = llama()
    pre = Kfac(model)
    with tempfile.TemporaryDirectory() as out:
        t = trainer(
            model, out, 16, callbacks=[When(on_pre_optimizer_step=lambda *_: pre.step())], data=Rows(128),
            gradient_accumulation_steps=2, lr_scheduler_type="cosine", warmup_steps=2,
        )  # fmt: skip
        with observe(model):
            t.train()


class Turning(Trainer):
    """A trainer that turns gradients where it clips them."""

    pre = None

    def _clip_grad_norm(self, model):
        self.pre.step()
        return super()._clip_grad_norm(model)


@sound("trainer_with_overridden_clipping", "effective")
def _(observe):
    """A trainer's own clipping is overridden, to turn gradients first and clip them then."""
    seed(205)
    model = llama(layers=1, targets=("q_proj", "v_proj", "down_proj"))
    with tempfile.TemporaryDirectory() as out:
        t = trainer(model, out, 16, cls=Turning, max_grad_norm=0.5)
        t.pre = Kfac(model)
        with observe(model):
            t.train()


class TurningAdamW(torch.optim.AdamW):
    """AdamW that turns gradients in its own step."""

    pre = None

    def step(self, closure=None):
        self.pre.step()
        return super().step(closure)


@sound("wrapper_around_the_step", "effective")
def _(observe):
    """The optimizer's step is patched on the instance, in the fashion of wrappers for schedulers."""
    seed(206)
    model = net()
    pre, opt = Kfac(model), adamw(model)
    plain = opt.step

    def step(self, *args, **kw):
        pre.step()
        return plain(*args, **kw)

    opt.step = types.MethodType(step, opt)
    schedule = LambdaLR(opt, lambda s: min(1.0, (s + 1) / 5))
    fit(observe, model, opt, reals(18), after=lambda _: schedule.step())


@sound("after_unscaling_in_mixed_precision", "effective")
def _(observe):
    """In bfloat16 autocast with a scaler gradients are unscaled, turned, clipped and stepped."""
    seed(207)
    model = net()
    pre, opt, scaler = Kfac(model), adamw(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    with observe(model):
        for batch in reals(18):
            opt.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = mse(model, batch)
            scaler.scale(loss).backward()
            scaler.unscale_(opt)
            pre.step()
            nn.utils.clip_grad_norm_(trainable(model), 1.0)
            scaler.step(opt)
            scaler.update()


@sound("before_unscaling_with_a_linear_map", "effective")
def _(observe):
    """Scaled gradients are turned before the scaler unscales them, which a linear map does not mind."""
    seed(208)
    model = llama(layers=1)
    pre, opt, scaler = Kfac(model), adamw(model), torch.amp.GradScaler("cpu", init_scale=256.0)
    with observe(model):
        for ids in tokens(18):
            opt.zero_grad()
            scaler.scale(lm(model, ids)).backward()
            pre.step()
            scaler.step(opt)
            scaler.update()


@sound("two_optimizers_one_modifier", "effective")
def _(observe):
    """A and B have an optimizer each, and all gradients are turned before the first of them steps."""
    seed(209)
    model = net()
    pre = Kfac(model)
    opt_a = torch.optim.NAdam(named(model, "lora_A"), lr=5e-3)
    opt_b = torch.optim.SGD(named(model, "lora_B"), lr=0.1, nesterov=True, momentum=0.8)
    with observe(model):
        for batch in reals(18):
            model.zero_grad()
            mse(model, batch).backward()
            pre.step()
            opt_b.step()
            opt_a.step()


@sound("lora_plus_groups", "effective")
def _(observe):
    """B learns eight times faster than A in the groups of LoRA+, from the usual zero start."""
    seed(210)
    model = net(init=True)
    pre = Kfac(model, warmup=3)
    opt = create_loraplus_optimizer(model, torch.optim.AdamW, lr=2e-3, loraplus_lr_ratio=8)
    fit(observe, model, opt, reals(20), before=pre.step)


@sound("sharpness_aware_after_second_pass", "effective")
def _(observe):
    """The gradient of the perturbed second pass is the one that is turned and stepped with."""
    seed(211)
    model = net()
    pre, opt, params = Kfac(model), sgd(model, 0.05), trainable(model)
    with observe(model):
        for batch in reals(18):
            opt.zero_grad()
            pre.collect = False
            mse(model, batch).backward()
            shift = perturb(params, 0.02)
            opt.zero_grad()
            pre.collect = True
            mse(model, batch).backward()
            unperturb(params, shift)
            pre.step()
            opt.step()


@sound("lookahead_over_turned_gradients", "effective")
def _(observe):
    """Lookahead inside the optimizer on top of turned gradients."""
    seed(212)
    model = net()
    pre, opt = Kfac(model), Lookahead(trainable(model), lr=5e-3, weight_decay=0.0)
    fit(observe, model, opt, reals(20), before=pre.step)


@sound("lion_with_a_dense_matrix", "effective")
def _(observe):
    """Signs of gradients change under a dense matrix, so that Lion follows it."""
    seed(213)
    model = llama()
    pre, opt = Kfac(model, damping=0.05), Lion(trainable(model))
    fit(observe, model, opt, tokens(20), lm, before=pre.step)


@sound("adafactor_in_trainer", "effective")
def _(observe):
    """Adafactor of the trainer with a callback that turns gradients."""
    seed(214)
    model = llama(layers=1)
    pre = Kfac(model)
    with tempfile.TemporaryDirectory() as out:
        apply = When(on_pre_optimizer_step=lambda *_: pre.step())
        t = trainer(model, out, 16, callbacks=[apply], optim="adafactor", lr_scheduler_type="constant")
        with observe(model):
            t.train()


@sound("factors_refreshed_every_six_steps", "effective")
def _(observe):
    """Inverses are six steps old at most, while each gradient is the step's own."""
    seed(215)
    model = net()
    pre, opt = Kfac(model, every=6), adamw(model)
    fit(observe, model, opt, reals(24), before=pre.step)


@sound("factors_fixed_before_training", "effective")
def _(observe):
    """Factors are estimated on calibration batches before training and stay as they are, under plain SGD."""
    seed(216)
    model = net()
    pre, opt = Kfac(model, warmup=0), sgd(model, 0.05)
    for batch in reals(8):
        mse(model, batch).backward()
    model.zero_grad()
    pre.refresh()
    pre.collect, pre.every = False, 1000
    fit(observe, model, opt, reals(16), before=pre.step)


@sound("inverted_in_a_background_thread", "effective")
def _(observe):
    """Factors are inverted by a worker thread while the next batch runs, gradients are turned when they are there."""
    seed(217)
    model = net()
    pre, opt = Kfac(model, warmup=3, every=10**6), adamw(model)
    with ThreadPoolExecutor(1) as pool:
        jobs = []

        def apply(_):
            if jobs:
                jobs.pop().result()
            pre.step()
            frozen = {p: c.clone() for p, c in pre.stats.items()}
            jobs.append(pool.submit(lambda: pre.matrices.update({p: pre.invert(c) for p, c in frozen.items()})))

        fit(observe, model, opt, reals(20), before=apply)


@sound("two_tasks_take_turns", "effective")
def _(observe):
    """Two adapters are trained in turn, and the modifier knows both."""
    seed(218)
    model = net()
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    params = [p for n, p in model.named_parameters() if "lora" in n]
    modifiers = {name: Kfac(model, name) for name in ("default", "second")}
    opt = torch.optim.AdamW(params, lr=5e-3, weight_decay=0.0)
    with observe(model):
        for i, batch in enumerate(reals(28)):
            name = ("default", "second")[i % 2]
            model.set_adapter(name)
            opt.zero_grad()
            mse(model, batch).backward()
            modifiers[name].step()
            opt.step()


@sound("grpo_with_merged_rollouts", "effective")
def _(observe):
    """Rollouts with merged weights, updates with the adapter apart and its gradients turned."""
    seed(219)
    model = llama()
    pre = Kfac(model)
    grpo(observe, model, adamw(model, 2e-3), pre.step, steps=20)


@sound("dpo_with_disabled_adapter", "effective")
def _(observe):
    """Reference passes without adapter and gradient leave no trace in the statistics of the policy."""
    seed(220)
    model = llama()
    pre, opt = Kfac(model), adamw(model)
    with observe(model):
        for chosen, rejected in zip(tokens(16), tokens(16), strict=True):
            with torch.no_grad(), model.disable_adapter():
                ref = logps(model, chosen), logps(model, rejected)
            opt.zero_grad()
            dpo(logps(model, chosen), logps(model, rejected), *ref).backward()
            pre.step()
            nn.utils.clip_grad_norm_(trainable(model), 1.0)
            opt.step()


@sound("recomputed_blocks", "effective")
def _(observe):
    """Checkpointing without reentrance runs the forward hooks twice, which leaves the statistics right."""
    seed(221)
    model = llama()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    pre, opt = Kfac(model), adamw(model)
    fit(observe, model, opt, tokens(16), lm, before=pre.step)


@sound("ranks_by_pattern", "effective")
def _(observe):
    """Layers of different ranks and scales each have a matrix of their own size."""
    seed(222)
    model = net(
        targets=("q_proj", "v_proj", "up_proj"), rank_pattern={"up_proj": 6, "v_proj": 3}, alpha_pattern={"v_proj": 16}
    )
    pre, opt = Kfac(model), adamw(model)
    fit(observe, model, opt, reals(18), before=pre.step)


@sound("scaled_lora_from_the_other_factor", "effective")
def _(observe):
    """Riemannian preconditioning: each factor's gradient is turned by the inverse Gram matrix of the other factor."""
    seed(223)
    model = net()
    for p in trainable(model):
        mix = torch.diag(torch.tensor([2.0, 0.5, 1.0, 0.3]))
        p.data = mix @ p.data if p.shape[0] == 4 else p.data @ mix
    pre, opt = Kfac(model, source="weights", warmup=0), sgd(model, 0.02)
    fit(observe, model, opt, reals(20), before=pre.step)


@sound("dora_by_gram_matrices", "effective")
def _(observe):
    """Directions of DoRA are turned by the gradients' own running Gram matrices, magnitudes are left as they are."""
    seed(224)
    model = net(use_dora=True)
    pre, opt = Kfac(model, source="grads", power=0.5), adamw(model)
    fit(observe, model, opt, reals(18), before=pre.step)


@sound("unfrozen_late_and_taken_in", "effective")
def _(observe):
    """Layers unfrozen later are known to the modifier from the beginning and turned as soon as they have gradients."""
    seed(225)
    model = net(layers=3)
    pre, opt = Kfac(model, warmup=1), adamw(model)

    def loss(m, batch):
        for n, p in m.named_parameters():
            if "lora" in n and "layers.0." in n:
                p.requires_grad_(loss.count >= 6)
        loss.count += 1
        return mse(m, batch)

    loss.count = 0
    fit(observe, model, opt, reals(24), loss, before=pre.step)


@sound("optimizer_in_backward_turns_first", "effective")
def _(observe):
    """Each parameter's backward hook turns its gradient, steps its own optimizer and clears it."""
    seed(226)
    model = net()
    pre = Kfac(model)
    opts = {p: torch.optim.AdamW([p], lr=5e-3, weight_decay=0.0) for p in trainable(model)}

    @torch.no_grad()
    def now(p):
        p.grad.copy_(pre.turn(p, p.grad))
        opts[p].step()
        opts[p].zero_grad()

    for p in opts:
        p.register_post_accumulate_grad_hook(now)
    with observe(model):
        for batch in reals(18):
            mse(model, batch).backward()
            pre.tick()


@sound("low_rank_projection_of_gradients", "effective")
def _(observe):
    """Gradients are projected onto the leading direction of their rank space, renewed every five steps."""
    seed(227)
    model = net()
    opt, bases, count = sgd(model, 0.05), {}, [0]

    @torch.no_grad()
    def project(*_):
        for n, p in model.named_parameters():
            if p.grad is None:
                continue
            g = p.grad if "lora_A" in n else p.grad.T
            if count[0] % 5 == 0 or p not in bases:
                u = torch.linalg.svd(g @ g.T + 1e-12 * torch.eye(4))[0][:, :1]
                bases[p] = u @ u.T
            g = bases[p] @ g
            p.grad.copy_(g if "lora_A" in n else g.T)
        count[0] += 1

    opt.register_step_pre_hook(project)
    fit(observe, model, opt, reals(24))


@sound("grafted_onto_the_raw_norm", "effective")
def _(observe):
    """The turned gradient is given the raw one's norm, tensor by tensor."""
    seed(228)
    model = llama(targets=("q_proj", "up_proj"))
    pre, opt = Kfac(model, damping=0.03), sgd(model, 0.1)

    @torch.no_grad()
    def graft(_):
        norms = {p: p.grad.norm() for p in pre.side}
        pre.step()
        for p, n in norms.items():
            p.grad.mul_(n / p.grad.norm().clamp_min(1e-12))

    fit(observe, model, opt, tokens(18), lm, before=graft)


@sound("moderate_trust_region", "effective")
def _(observe):
    """A KL clip shortens the turned gradients of the larger steps to a fraction and leaves the rest alone."""
    seed(229)
    model = net()
    pre, opt = Kfac(model), sgd(model, 0.1)

    @torch.no_grad()
    def clip(_):
        raw = {p: p.grad.clone() for p in pre.side}
        pre.step()
        total = sum((p.grad * g).sum() for p, g in raw.items())
        for p in pre.side:
            p.grad.mul_((0.3 / total).sqrt().clamp_max(1.0))

    fit(observe, model, opt, reals(18), before=clip)


class Resumed(Trainer):
    """A trainer with a modifier whose state is kept beside its checkpoints."""

    pre = None

    def create_optimizer(self, *args, **kw):
        opt = super().create_optimizer(*args, **kw)
        opt.register_step_pre_hook(lambda *_: self.pre.step())
        return opt


@sound("resumed_with_its_statistics", "effective")
def _(observe):
    """A resumed trainer gives its modifier the statistics that it had at the checkpoint."""
    seed(230)
    options = {"save_strategy": "steps", "save_steps": 6}
    with tempfile.TemporaryDirectory() as out:
        stop = When(on_step_end=lambda a, s, control: setattr(control, "should_training_stop", s.global_step == 6))
        first = trainer(llama(layers=1), out, 20, cls=Resumed, callbacks=[stop], **options)
        first.pre = Kfac(first.model)
        first.train()
        model = llama(layers=1)
        t = trainer(model, out, 20, cls=Resumed, **options)
        t.pre = Kfac(model, warmup=0)
        t.pre.stats = {new: first.pre.stats[old] for new, old in zip(t.pre.side, first.pre.side, strict=True)}
        with observe(model):
            t.train(resume_from_checkpoint=True)


@sound("all_within_the_closure", "effective")
def _(observe):
    """The closure handed to the step clears, computes and turns gradients, and the optimizer uses what it leaves."""
    seed(231)
    model = net()
    pre, opt = Kfac(model), torch.optim.Adam(trainable(model), lr=5e-3)
    with observe(model):
        for batch in reals(18):

            def closure(batch=batch):
                opt.zero_grad()
                loss = mse(model, batch)
                loss.backward()
                pre.step()
                return loss

            opt.step(closure)


@sound("turned_in_double_precision_elsewhere", "effective")
def _(observe):
    """Gradients are copied away, turned in double precision and bound as new tensors."""
    seed(232)
    model = net()
    pre, opt = Kfac(model), adamw(model)

    @torch.no_grad()
    def away(_):
        pre.tick()
        for p in pre.side:
            g, m = p.grad.double().clone(), pre.matrices.get(p)
            if m is not None and pre.steps > 2:
                p.grad = (m.double() @ g if pre.side[p] == "A" else g @ m.double()).float()

    fit(observe, model, opt, reals(18), before=away)


class Shared(nn.Module):
    """Two frozen layers with adapters of their own B and one A for both."""

    def __init__(self, d=16, r=4):
        super().__init__()
        self.base = nn.ModuleList(nn.Linear(d, d).requires_grad_(False) for _ in range(2))
        self.lora_A = nn.Parameter(torch.randn(r, d) / d**0.5)
        self.lora_B = nn.ParameterList(nn.Parameter(torch.randn(d, r) / r**0.5) for _ in range(2))
        self.head = nn.Linear(d, 8).requires_grad_(False)

    def forward(self, x):
        for base, b in zip(self.base, self.lora_B, strict=True):
            x = x + torch.tanh(base(x) + F.linear(F.linear(x, self.lora_A), b))
        return self.head(x)


@sound("one_a_shared_by_two_layers", "effective")
def _(observe):
    """A home-made adapter shares A between two layers, and running Gram matrices turn all three gradients."""
    seed(233)
    model = Shared()
    pre, opt = Kfac(model, source="grads"), adamw(model)
    pre.pairs = [(model.lora_A, b) for b in model.lora_B]
    pre.side = {model.lora_A: "A"} | dict.fromkeys(model.lora_B, "B")
    fit(observe, model, opt, reals(18), before=pre.step)


@sound("evaluated_in_between_without_a_trace", "effective")
def _(observe):
    """Evaluations without gradients and with other data every three steps leave the statistics alone."""
    seed(234)
    model = net(lora_dropout=0.1)
    pre, opt = Kfac(model), adamw(model)

    @torch.no_grad()
    def evaluate(i):
        if i % 3 == 2:
            model.eval()
            model(100 * next(reals(1))[0])
            model.train()

    fit(observe, model, opt, reals(20), before=pre.step, after=evaluate)


@sound("adapter_in_half_precision", "effective")
def _(observe):
    """Adapters in bfloat16 are turned by matrices in single precision and step far enough to move."""
    seed(235)
    model = net()
    model.bfloat16()
    pre, opt = Kfac(model), adamw(model, 1e-2)

    def loss(m, batch):
        return F.mse_loss(m(batch[0].bfloat16()).float(), batch[1])

    fit(observe, model, opt, reals(18), loss, before=pre.step)


@sound("averaged_beside_a_working_modifier", "effective")
def _(observe):
    """An average is swapped in for evaluations, the weights come back, and gradients are turned throughout."""
    seed(236)
    model = net()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    pre, opt = Kfac(model), adamw(model)

    @torch.no_grad()
    def evaluate(i):
        average.update_parameters(model)
        if i % 5 == 4:
            kept = copy.deepcopy(get_peft_model_state_dict(model))
            set_peft_model_state_dict(model, get_peft_model_state_dict(average.module))
            model(next(reals(1))[0])
            set_peft_model_state_dict(model, kept)

    fit(observe, model, opt, reals(20), before=pre.step, after=evaluate)


@sound("optimizer_class_that_turns", "effective")
def _(observe):
    """A subclass of AdamW turns gradients at the beginning of its own step, under warm restarts."""
    seed(237)
    model = llama(layers=1, targets=("q_proj", "v_proj", "up_proj"))
    opt = TurningAdamW(trainable(model), lr=5e-3, weight_decay=0.0)
    opt.pre = Kfac(model)
    restarts = CosineAnnealingWarmRestarts(opt, 7)
    fit(observe, model, opt, tokens(20), lm, after=lambda _: restarts.step())


@sound("master_weights_in_single_precision", "effective")
def _(observe):
    """Turned gradients go to single-precision masters, which are stepped and copied back to the bfloat16 adapter."""
    seed(238)
    model = net().bfloat16()
    pre, params = Kfac(model), trainable(model)
    masters = [p.detach().float().clone().requires_grad_() for p in params]
    opt = torch.optim.AdamW(masters, lr=1e-2, weight_decay=0.0)
    with observe(model):
        for x, y in reals(18):
            model.zero_grad()
            F.mse_loss(model(x.bfloat16()).float(), y).backward()
            pre.step()
            for p, m in zip(params, masters, strict=True):
                m.grad = p.grad.float()
            opt.step()
            with torch.no_grad():
                for p, m in zip(params, masters, strict=True):
                    p.copy_(m)


@sound("moe_losses_gathered_first", "effective")
def _(observe):
    """An auxiliary loss has its own backward pass, and gradients are turned after both."""
    seed(239)
    model = llama()
    pre, opt = Kfac(model), adamw(model)
    with observe(model):
        for ids, other in zip(tokens(16), tokens(16), strict=True):
            opt.zero_grad()
            lm(model, ids).backward()
            (0.3 * lm(model, other)).backward()
            pre.step()
            opt.step()


if __name__ == "__main__":
    for case in CASES:
        began = time.time()
        try:
            case.run(contextlib.nullcontext)
            said = "ok"
        except Exception as error:
            said = repr(error)
        print(f"{case.name:50s} {time.time() - began:5.1f} {said}")
