"""Blind cases, second round: faults seen in public bug reports, partial faults, many styles of preconditioners."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.optimizers import create_loraplus_optimizer, create_riemannian_optimizer
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.optim.swa_utils import AveragedModel
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
from transformers.utils import logging as hf_logging

torch.set_num_threads(1)
hf_logging.set_verbosity_error()
hf_logging.disable_progress_bar()
warnings.filterwarnings("ignore")

CASES: list[Case] = []


@dataclass(frozen=True)
class Case:
    """One situation with what is to be said of it."""

    name: str
    kind: str
    link: str | None
    causes: tuple[str, ...]
    run: Callable
    why: str


def fault(name: str, link: str, *causes: str):
    """Register a run whose chain breaks first at the link."""

    def register(run):
        CASES.append(Case(name, "fault", link, causes, run, run.__doc__.strip()))
        return run

    return register


def sound(name: str, *causes: str):
    """Register a run in which every link holds."""

    def register(run):
        CASES.append(Case(name, "sound", None, causes, run, run.__doc__.strip()))
        return run

    return register


# ---------------------------------------------------------------------------------------------------------- models


class Block(nn.Module):
    """Attention and feed-forward of one layer."""

    def __init__(self, dim: int):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        weights = (self.q(x) @ self.k(x).transpose(-1, -2) / math.sqrt(x.shape[-1])).softmax(-1)
        x = x + self.o(weights @ self.v(x))
        return x + self.down(F.gelu(self.up(x)))


class Toy(nn.Module):
    """A small transformer for regression; wrap may change how a layer is called."""

    def __init__(self, layers: int = 2, dim: int = 16, wrap: dict | None = None):
        super().__init__()
        self.layers = nn.ModuleList(Block(dim) for _ in range(layers))
        self.head = nn.Linear(dim, 4)
        self.wrap = wrap or {}

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            x = self.wrap[number](layer, x) if number in self.wrap else layer(x)
        return self.head(x)


class Mlp(nn.Module):
    """Three linear layers and a classifier."""

    def __init__(self, dim: int = 12):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(dim, 24), nn.Linear(24, 24), nn.Linear(24, 20)
        self.classifier = nn.Linear(20, 5)

    def forward(self, x):
        for layer in (self.fc1, self.fc2, self.fc3):
            x = F.relu(layer(x)) + 0.1 * layer(x)
        return self.classifier(x)


def lora(base: nn.Module, targets=("q", "v"), r: int = 4, warm: bool = True, **options) -> PeftModel:
    """The base with LoRA; warm starts B away from zero so that A has gradients from the first step."""
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(targets), **options)
    model = get_peft_model(base, config)
    if warm:
        warm_up(model)
    return model


def warm_up(model: nn.Module, adapter: str = "default"):
    """Draw B small and at random."""
    with torch.no_grad():
        for _, layer in lora_layers(model, adapter):
            layer.lora_B[adapter].weight.normal_(std=0.2)


def toy(seed: int = 0, layers: int = 2, targets=("q", "v"), wrap: dict | None = None, **options) -> PeftModel:
    """A small transformer with LoRA."""
    torch.manual_seed(seed)
    return lora(Toy(layers, wrap=wrap), targets, **options)


def mlp(seed: int = 0, targets=("fc1", "fc2", "fc3"), **options) -> PeftModel:
    """A small perceptron with LoRA."""
    torch.manual_seed(seed)
    return lora(Mlp(), targets, **options)


def llama(seed: int = 0, layers: int = 2, hidden: int = 16, targets=("q_proj", "v_proj"), tie=False, **options):
    """A tiny Llama with LoRA."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=40,
        max_position_embeddings=32,
        tie_word_embeddings=tie,
        initializer_range=0.3,
        use_cache=False,
    )
    return lora(LlamaForCausalLM(config), targets, **options)


def lora_layers(model: nn.Module, adapter: str = "default"):
    """All LoRA layers which have linear factors of the adapter."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer) and adapter in m.lora_A]


def factors(model: nn.Module, adapter: str = "default") -> list[tuple[nn.Parameter, str]]:
    """All LoRA factors with their side."""
    found = []
    for _, layer in lora_layers(model, adapter):
        found += [(layer.lora_A[adapter].weight, "A"), (layer.lora_B[adapter].weight, "B")]
    return found


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer gets."""
    return [p for p in model.parameters() if p.requires_grad]


# ------------------------------------------------------------------------------------------------------------ data


def regression(steps: int, seed: int = 1, size: int = 6, dim: int = 16, tokens: int = 5):
    """Batches of a regression with inputs of uneven spread."""
    draw = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.3, 2.0, dim)
    target = torch.randn(dim, 4, generator=draw) / 2
    for _ in range(steps):
        x = torch.randn(size, tokens, dim, generator=draw) * spread
        yield x, torch.tanh(x @ target)


def classes(steps: int, seed: int = 2, size: int = 16, dim: int = 12):
    """Batches of a classification."""
    draw = torch.Generator().manual_seed(seed)
    target = torch.randn(dim, 5, generator=draw)
    for _ in range(steps):
        x = torch.randn(size, dim, generator=draw) * torch.linspace(0.3, 2.0, dim)
        yield x, (x @ target).argmax(-1)


def tokens(count: int = 64, seed: int = 3, length: int = 10) -> list[dict]:
    """Sequences for a language model."""
    draw = torch.Generator().manual_seed(seed)
    rows = (torch.randint(0, 40, (count, length), generator=draw) ** 2 // 40).clamp(0, 39)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.clone()} for row in rows]


def text_batches(steps: int, size: int = 4, seed: int = 3):
    """Batches for a language model."""
    rows = tokens(steps * size, seed)
    for start in range(0, steps * size, size):
        yield {key: torch.stack([row[key] for row in rows[start : start + size]]) for key in rows[0]}


def square(model, batch):
    """The loss of the regression."""
    return F.mse_loss(model(batch[0]), batch[1])


def entropy(model, batch):
    """The loss of the classification."""
    return F.cross_entropy(model(batch[0]), batch[1])


# -------------------------------------------------------------------------------------------------- preconditioners


def damped(matrix: torch.Tensor, power: float, damping: float) -> torch.Tensor:
    """A power of a positive matrix whose mean eigenvalue is brought to one."""
    if not matrix.isfinite().all():
        return torch.eye(len(matrix))
    values, vectors = torch.linalg.eigh(matrix.float())
    values = values.clamp(min=0)
    mean = values.mean()
    if mean <= 0:
        return torch.eye(len(matrix))
    return (vectors * (values / mean + damping) ** power) @ vectors.T


def graft(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """The new direction with the old length."""
    return new * (old.norm() / new.norm().clamp(min=1e-12))


class KFac:
    """Rank-space K-FAC: A by the gradients at its output, B by the outputs of A, both from hooks."""

    def __init__(self, model, adapter="default", warmup=2, damping=0.05, power=-1.0, decay=0.8):
        self.warmup, self.damping, self.power, self.decay = warmup, damping, power, decay
        self.params, self.site, self.stats, self.count, self.handles = [], {}, {}, {}, []
        self.only_training = False
        for name, layer in lora_layers(model, adapter):
            down, up = layer.lora_A[adapter], layer.lora_B[adapter]
            self.site[id(down.weight)], self.site[id(up.weight)] = (name, "A"), (name, "B")
            self.params += [down.weight, up.weight]
            self.handles.append(down.register_forward_hook(partial(self.forward, name)))

    def forward(self, name, module, inputs, output):
        """Take the outputs of A and wait for their gradients."""
        if output.requires_grad and (module.training or not self.only_training):
            self.count[name] = self.count.get(name, 0) + 1
            self.update((name, "B"), output.detach())
            output.register_hook(lambda g: self.update((name, "A"), g))

    def update(self, key, rows):
        """Average the second moments."""
        rows = rows.reshape(-1, rows.shape[-1]).float()
        moment = rows.T @ rows / len(rows)
        self.stats[key] = moment if key not in self.stats else self.stats[key].lerp(moment, 1 - self.decay)

    def matrix(self, param):
        """The matrix of this tensor or None while warming up."""
        key = self.site.get(id(param))
        if key not in self.stats or self.count[key[0]] <= self.warmup:
            return None
        return damped(self.stats[key], self.power, self.damping)

    def turn(self, param, grad):
        """The preconditioned gradient."""
        matrix = self.matrix(param)
        if matrix is None:
            return grad
        new = matrix @ grad.float() if self.site[id(param)][1] == "A" else grad.float() @ matrix
        return graft(new, grad.float()).to(grad.dtype)

    def step(self, *_):
        """Turn all gradients in place."""
        for param in self.params:
            if param.grad is not None:
                param.grad.copy_(self.turn(param, param.grad))

    def remove(self):
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()


class Shampoo:
    """One-sided Shampoo in the rank space, from the gradients' own Gram matrices."""

    def __init__(self, model, adapter="default", power=-0.75, damping=0.01, decay=0.7):
        self.power, self.damping, self.decay, self.gram = power, damping, decay, {}
        self.side = {id(p): side for p, side in factors(model, adapter)}
        self.params = [p for p, _ in factors(model, adapter)]

    def turn(self, param, grad):
        """The preconditioned gradient."""
        left = self.side[id(param)] == "A"
        new = grad.float() @ grad.float().T if left else grad.float().T @ grad.float()
        old = self.gram.get(id(param))
        self.gram[id(param)] = new if old is None else old.lerp(new, 1 - self.decay)
        matrix = damped(self.gram[id(param)], self.power, self.damping)
        return graft(matrix @ grad.float() if left else grad.float() @ matrix, grad.float()).to(grad.dtype)

    def step(self, *_):
        """Turn all gradients in place."""
        for param in self.params:
            if param.grad is not None:
                param.grad.copy_(self.turn(param, param.grad))


# ------------------------------------------------------------------------------------------------------------ loops


def loop(model, opt, batches, loss=square, before=None, after=None):
    """The plain loop with places before and after the step."""
    for number, batch in enumerate(batches):
        opt.zero_grad()
        loss(model, batch).backward()
        if before:
            before(number)
        opt.step()
        if after:
            after(number)


class On(TrainerCallback):
    """A callback of functions, each called with the state and the keywords of the event."""

    def __init__(self, **events):
        for name, function in events.items():
            setattr(self, name, partial(self.call, function))

    @staticmethod
    def call(function, args, state, control, **keywords):
        """Drop what the functions do not need."""
        function(state, **keywords)


def hf(model, data, *callbacks, steps=16, cls=Trainer, lr=1e-2, keep=None, optimizers=(None, None), **options):
    """A quiet Trainer."""
    options = {"per_device_train_batch_size": 4, "save_strategy": "no", "lr_scheduler_type": "constant"} | options
    args = TrainingArguments(
        output_dir=keep or os.path.join(tempfile.gettempdir(), "blind_unused"),
        max_steps=steps,
        learning_rate=lr,
        use_cpu=True,
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
        **options,
    )
    trainer = cls(model=model, args=args, train_dataset=data, callbacks=list(callbacks), optimizers=optimizers)
    trainer.remove_callback(PrinterCallback)
    return trainer


def pre_step(function):
    """A callback right before the optimizer."""
    return On(on_pre_optimizer_step=lambda state, **_: function())


# ----------------------------------------------------------------------------------------------------- faults: used


@fault("sample_merge_before_training", "used", "not-used")
def _(observe):
    """The adapter was merged for a sample and never unmerged, so only the head trains."""
    model = toy(10)
    model.base_model.model.head.requires_grad_(True)
    kfac, opt = KFac(model), torch.optim.AdamW(trainable(model), lr=1e-2)
    model.merge_adapter()
    with observe(model):
        loop(model, opt, regression(16), before=kfac.step)


@fault("reference_block_swallows_policy", "used", "not-used")
def _(observe):
    """The policy's forward pass is indented into the block which disables the adapter for the reference."""
    model = llama(11)
    value = nn.Linear(40, 1)
    kfac, opt = KFac(model), torch.optim.AdamW([*trainable(model), *value.parameters()], lr=1e-2)
    with observe(model):
        for batch in text_batches(14):
            opt.zero_grad()
            with model.disable_adapter():
                reference = model(input_ids=batch["input_ids"]).logits.detach()
                logits = model(input_ids=batch["input_ids"]).logits
            loss = (value(logits).squeeze(-1) - reference.logsumexp(-1)).pow(2).mean()
            loss.backward()
            kfac.step()
            opt.step()


def fused(layer: LoraLayer, frozen: bool = False):
    """Replace the forward pass of a layer by one product, as fused kernels do."""
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    if frozen:
        down, up = down.detach().clone(), up.detach().clone()
    scale, base = layer.scaling["default"], layer.base_layer
    layer.forward = lambda x: F.linear(x, base.weight, base.bias) + scale * F.linear(F.linear(x, down), up)


@fault("fused_forward_keeps_copies", "used", "not-used", "no-gradient")
def _(observe):
    """The fused forward pass captured detached copies of the factors when it was patched in."""
    model = toy(12, targets=("q", "k", "v", "o"))
    model.base_model.model.head.requires_grad_(True)
    for _, layer in lora_layers(model):
        fused(layer, frozen=True)
    shampoo, opt = Shampoo(model), torch.optim.Adam(trainable(model), lr=5e-3)
    with observe(model):
        loop(model, opt, regression(18), before=shampoo.step)


@fault("training_a_deepcopied_engine", "used", "not-used", "no-gradient")
def _(observe):
    """Forward and backward run on a deep copy made for the engine, the optimizer holds the original."""
    model = mlp(13)
    engine = copy.deepcopy(model)
    shampoo, opt = Shampoo(model), torch.optim.SGD(trainable(model), lr=0.1)
    with observe(model):
        loop(engine, opt, classes(15), entropy, before=shampoo.step)


@fault("second_adapter_runs_first_is_optimized", "used", "not-used", "wrong-parameters", "no-gradient")
def _(observe):
    """The adapter was switched after the optimizer and the preconditioner had taken the first one."""
    model = toy(14)
    kfac, opt = KFac(model), torch.optim.AdamW(trainable(model), lr=1e-2)
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q", "v"]))
    model.set_adapter("second")
    with observe(model):
        loop(model, opt, regression(14), before=kfac.step)


@fault("one_layer_left_merged", "throughout", "only-some-layers", "not-used")
def _(observe):
    """One of three layers stayed merged after somebody looked at its effective weight."""
    model = toy(15, layers=3, targets=("v",))
    lora_layers(model)[2][1].merge()
    kfac, opt = KFac(model), torch.optim.AdamW(trainable(model), lr=1e-2)
    with observe(model):
        loop(model, opt, regression(18), before=kfac.step)


# -------------------------------------------------------------------------------------------------- faults: arrived


def reentrant(layer, x):
    """The old checkpointing, which cuts the graph when no input needs a gradient."""
    return checkpoint(layer, x, use_reentrant=True)


@fault("reentrant_checkpoint_without_input_grads", "arrived", "no-gradient")
def _(observe):
    """Reentrant checkpointing over inputs without gradients leaves every LoRA factor without one; the head trains."""
    model = toy(20, wrap={0: reentrant, 1: reentrant})
    model.base_model.model.head.requires_grad_(True)
    kfac, opt = KFac(model), torch.optim.AdamW(trainable(model), lr=1e-2)
    with observe(model):
        loop(model, opt, regression(15), before=kfac.step)


@fault("first_layer_cut_by_checkpoint", "throughout", "only-some-layers", "no-gradient")
def _(observe):
    """Only the first layer is checkpointed the reentrant way and so has no gradients."""
    model = toy(21, layers=3, wrap={0: reentrant})
    kfac, opt = KFac(model), torch.optim.AdamW(trainable(model), lr=1e-2)
    with observe(model):
        loop(model, opt, regression(18), before=kfac.step)


@fault("both_factors_zero", "arrived", "no-gradient")
def _(observe):
    """A and B both start at zero, so that neither ever gets a gradient other than zero."""
    model = mlp(22, warm=False)
    with torch.no_grad():
        for param, _ in factors(model):
            param.zero_()
    kfac, opt = KFac(model), torch.optim.AdamW(trainable(model), lr=1e-2)
    with observe(model):
        loop(model, opt, classes(14), entropy, before=kfac.step)


@fault("all_labels_masked", "arrived", "no-gradient")
def _(observe):
    """The collator masks every label, so that the loss is empty and each gradient zero."""
    model = llama(23)
    data = [row | {"labels": torch.full_like(row["labels"], -100)} for row in tokens(48)]
    kfac = KFac(model)
    trainer = hf(model, data, pre_step(kfac.step), steps=10)
    with observe(model):
        trainer.train()


@fault("sqrt_of_padding_under_scaler", "arrived", "non-finite", "no-steps")
def _(observe):
    """The root of a zero distance on padding gives NaN gradients, and the scaler skips each step."""
    model = mlp(24)
    kfac, opt = KFac(model), torch.optim.AdamW(trainable(model), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu")
    with observe(model):
        for x, _y in classes(12):
            opt.zero_grad()
            x[-4:] = 0
            out = model(x)
            distance = ((out[:-1] - out[1:]) ** 2).sum(-1).sqrt().mean()
            scaler.scale(distance).backward()
            scaler.unscale_(opt)
            kfac.step()
            scaler.step(opt)
            scaler.update()


@fault("frozen_after_wrapping", "arrived", "no-gradient")
def _(observe):
    """After wrapping, everything was frozen and only the head thawed, the LoRA factors forgotten."""
    model = llama(25)
    model.requires_grad_(False)
    model.get_output_embeddings().requires_grad_(True)
    kfac = KFac(model)
    trainer = hf(model, tokens(), pre_step(kfac.step), steps=12)
    with observe(model):
        trainer.train()


@fault("features_under_no_grad", "arrived", "no-gradient")
def _(observe):
    """The features are computed without gradients as for a frozen backbone, and only the classifier learns."""
    model = mlp(26)
    core = model.base_model.model
    core.classifier.requires_grad_(True)
    plain = core.forward

    def forward(x):
        classifier, core.classifier = core.classifier, nn.Identity()
        with torch.no_grad():
            hidden = plain(x)
        core.classifier = classifier
        return classifier(hidden)

    core.forward = forward
    kfac, opt = KFac(model), torch.optim.SGD(trainable(model), lr=0.1, momentum=0.9)
    with observe(model):
        loop(model, opt, classes(16), entropy, before=kfac.step)


# ----------------------------------------------------------------------------------------------------- faults: read


@fault("fused_forward_starves_hooks", "read", "starved", "nothing-written")
def _(observe):
    """The fused forward pass uses the weights without calling the modules, so that the hooks never fire."""
    model = toy(30, targets=("q", "k", "v", "o"))
    for _, layer in lora_layers(model):
        fused(layer)
    kfac, opt = KFac(model), torch.optim.AdamW(trainable(model), lr=1e-2)
    with observe(model):
        loop(model, opt, regression(18), before=kfac.step)


@fault("statistics_only_in_training_mode", "read", "starved", "nothing-written")
def _(observe):
    """The run stays in eval mode to be free of dropout while the statistics are taken in training mode only."""
    model = toy(31, lora_dropout=0.1).eval()
    kfac, opt = KFac(model), torch.optim.AdamW(trainable(model), lr=1e-2)
    kfac.only_training = True
    with observe(model):
        loop(model, opt, regression(16), before=kfac.step)


@fault("hooks_on_a_replaced_adapter", "read", "starved", "wrong-parameters", "nothing-written")
def _(observe):
    """The adapter was deleted and added anew after the preconditioner had hooked the old modules."""
    model = mlp(32)
    kfac = KFac(model)
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(r=4, lora_alpha=8, target_modules=["fc1", "fc2", "fc3"]))
    model.set_adapter("default")
    warm_up(model)
    opt = torch.optim.AdamW(trainable(model), lr=1e-2)
    with observe(model):
        loop(model, opt, classes(16), entropy, before=kfac.step)


@fault("one_fused_layer_of_four", "throughout", "only-some-layers", "starved")
def _(observe):
    """One of four adapted layers is fused and bypasses the hooks, so that only the others are preconditioned."""
    model = toy(33, targets=("q", "v"))
    fused(lora_layers(model)[3][1])
    kfac, opt = KFac(model), torch.optim.AdamW(trainable(model), lr=1e-2)
    with observe(model):
        loop(model, opt, regression(20), before=kfac.step)


@fault("gradient_statistics_never_taken", "throughout", "only-one-factor", "starved")
def _(observe):
    """The hook for the gradients at A's output is removed with a logging handle, so only B is preconditioned."""
    model = toy(34)
    kfac, opt = KFac(model), torch.optim.AdamW(trainable(model), lr=1e-2)
    take = kfac.update
    kfac.update = lambda key, rows: take(key, rows) if key[1] == "B" else None
    with observe(model):
        loop(model, opt, regression(20), before=kfac.step)


# --------------------------------------------------------------------------------------------------- faults: turned


@fault("warmup_longer_than_the_run", "turned", "not-ready")
def _(observe):
    """The preconditioner waits for a hundred batches, the run has sixteen."""
    model = llama(40)
    kfac = KFac(model, warmup=100)
    trainer = hf(model, tokens(), pre_step(kfac.step), steps=16)
    with observe(model):
        trainer.train()


@fault("new_preconditioner_each_epoch", "turned", "not-ready")
def _(observe):
    """A callback builds the preconditioner anew at each epoch, and an epoch is shorter than its warm-up."""
    model, held = llama(41), {}

    def renew(state, **_):
        if "kfac" in held:
            held["kfac"].remove()
        held["kfac"] = KFac(model, warmup=4)

    calls = On(on_epoch_begin=renew, on_pre_optimizer_step=lambda state, **_: held["kfac"].step())
    trainer = hf(model, tokens(12), calls, steps=18)
    with observe(model):
        trainer.train()


@fault("descent_sign_twice", "turned", "against-the-gradient")
def _(observe):
    """The preconditioner hands out the descent direction, which the optimizer then subtracts."""
    model = toy(42)
    kfac, opt = KFac(model, warmup=0), torch.optim.SGD(trainable(model), lr=0.02)

    def before(_):
        for param in kfac.params:
            param.grad = -kfac.turn(param, param.grad)

    with observe(model):
        loop(model, opt, regression(16), before=before)


@fault("absolute_damping_drowns_statistics", "turned", "scaled-only")
def _(observe):
    """The damping is absolute and far above the tiny moments, so that the inverse is a multiple of the identity."""
    model = llama(43)
    kfac = KFac(model, warmup=1)

    def write():
        for param in kfac.params:
            key = kfac.site[id(param)]
            if param.grad is None or key not in kfac.stats:
                continue
            moment = kfac.stats[key] * 1e-7
            inverse = torch.linalg.inv(moment + 0.1 * torch.eye(len(moment)))
            param.grad = inverse @ param.grad if key[1] == "A" else param.grad @ inverse

    trainer = hf(model, tokens(), pre_step(write), steps=16)
    with observe(model):
        trainer.train()


@fault("gradient_list_cached_once", "turned", "stale-gradient", "unrelated-gradient")
def _(observe):
    """The gradients were cloned into a list at the first step and the clones are preconditioned ever since."""
    model = toy(44)
    kfac, opt, cached = KFac(model, warmup=1), torch.optim.Adam(trainable(model), lr=3e-3), {}

    def before(_):
        for param in kfac.params:
            grad = cached.setdefault(id(param), param.grad.clone())
            param.grad.copy_(kfac.turn(param, grad))

    with observe(model):
        loop(model, opt, regression(20), before=before)


@fault("asynchronous_preconditioner_lags", "turned", "stale-gradient", "unrelated-gradient")
def _(observe):
    """A double buffer hands out the preconditioned gradient of the step before."""
    model = mlp(45)
    shampoo, opt, buffer = Shampoo(model), torch.optim.SGD(trainable(model), lr=0.05), {}

    def before(_):
        for param in shampoo.params:
            ready = buffer.get(id(param), torch.zeros_like(param))
            buffer[id(param)] = shampoo.turn(param, param.grad.clone())
            param.grad.copy_(ready)

    with observe(model):
        loop(model, opt, classes(24, size=2), entropy, before=before)


@fault("sorted_names_against_parameter_order", "turned", "unrelated-gradient", "overwritten")
def _(observe):
    """Gradients taken by sorted names are given to parameters in module order, of equal shape but other layers."""
    model = toy(46, targets=("q", "v", "o"))
    shampoo, opt = Shampoo(model), torch.optim.AdamW(trainable(model), lr=1e-2)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    order = sorted(named, key=lambda n: (n.rsplit("self", 1)[-1].split(".")[-4], n))

    def before(_):
        new = [shampoo.turn(named[n], named[n].grad) for n in order]
        for param, grad in zip(named.values(), new, strict=True):
            param.grad = grad

    with observe(model):
        loop(model, opt, regression(18), before=before)


@fault("privacy_noise_drowns_the_gradient", "turned", "unrelated-gradient", "blown-up", "overwritten")
def _(observe):
    """Noise of absolute size is added to a gradient hundreds of times smaller."""
    model = toy(47)
    kfac, opt = KFac(model), torch.optim.AdamW(trainable(model), lr=1e-3)
    draw = torch.Generator().manual_seed(0)

    def before(_):
        for param in kfac.params:
            noise = torch.randn(param.shape, generator=draw) * param.grad.abs().mean() * 300
            param.grad.copy_(kfac.turn(param, param.grad) + noise)

    with observe(model):
        loop(model, opt, regression(16), before=before)


@fault("undamped_inverse_of_few_rows", "turned", "blown-up")
def _(observe):
    """The moments come from fewer rows than the rank and their inverse is not damped."""
    model = mlp(48, r=8)
    kfac, opt = KFac(model, warmup=1, decay=0.0), torch.optim.AdamW(trainable(model), lr=1e-3)
    last = {}

    def before(_):
        for param in kfac.params:
            key = kfac.site[id(param)]
            old, last[key] = last.get(key), kfac.stats[key].clone()
            if old is not None:
                inverse = torch.linalg.inv(old + 1e-10 * torch.eye(len(old)))
                param.grad = inverse @ param.grad if key[1] == "A" else param.grad @ inverse

    with observe(model):
        loop(model, opt, classes(16, size=3), entropy, before=before)


@fault("wrong_kl_clip", "turned", "clipped-to-nothing")
def _(observe):
    """The trust region is computed from unscaled sums squared twice and shrinks each gradient ten-million-fold."""
    model = toy(49)
    kfac, opt = KFac(model, warmup=0), torch.optim.SGD(trainable(model), lr=0.05)

    def before(_):
        new = {p: kfac.turn(p, p.grad) for p in kfac.params}
        product = sum((p.grad * g).sum() for p, g in new.items()) * 1e2
        factor = min(1.0, 1e-3 / float(product * product + 1e4))
        for param, grad in new.items():
            param.grad = grad * factor

    with observe(model):
        loop(model, opt, regression(16), before=before)


@fault("clipped_before_unscaling", "turned", "clipped-to-nothing")
def _(observe):
    """The gradients are clipped while still scaled, and unscaling then leaves next to nothing."""
    model = mlp(50)
    shampoo, opt = Shampoo(model), torch.optim.SGD(trainable(model), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with observe(model):
        for batch in classes(16):
            opt.zero_grad()
            scaler.scale(entropy(model, batch)).backward()
            shampoo.step()
            nn.utils.clip_grad_norm_(trainable(model), 0.1)
            scaler.step(opt)
            scaler.update()


@fault("step_hook_registered_twice", "turned", "applied-twice")
def _(observe):
    """Setting up the run twice has left two pre-step hooks of the same preconditioner on the optimizer."""
    model = toy(51)
    kfac, opt = KFac(model), torch.optim.AdamW(trainable(model), lr=1e-2)

    def setup():
        opt.register_step_pre_hook(kfac.step)

    setup()
    setup()
    with observe(model):
        loop(model, opt, regression(18))


@fault("tensor_hooks_added_every_step", "turned", "applied-twice")
def _(observe):
    """Each step registers the tensor hooks again, so that the gradient is turned once more at every step."""
    model = toy(52)
    shampoo, opt = Shampoo(model), torch.optim.AdamW(trainable(model), lr=5e-3)
    with observe(model):
        for batch in regression(12):
            for param in shampoo.params:
                param.register_hook(partial(shampoo.turn, param))
            opt.zero_grad()
            square(model, batch).backward()
            opt.step()


@fault("loop_variable_rebound", "turned", "nothing-written")
def _(observe):
    """The loop binds the preconditioned gradient to a name and never writes it back."""
    model = llama(53)
    kfac = KFac(model)

    def write():
        for param in kfac.params:
            grad = param.grad
            if grad is not None:
                grad = kfac.turn(param, grad)

    trainer = hf(model, tokens(), pre_step(write), steps=16)
    with observe(model):
        trainer.train()


@fault("tensor_hook_without_return", "turned", "nothing-written")
def _(observe):
    """The tensor hook computes the preconditioned gradient and returns nothing."""
    model = mlp(54)
    kfac, opt = KFac(model), torch.optim.Adam(trainable(model), lr=1e-2)

    def hook(param, grad):
        kfac.turn(param, grad)

    for param in kfac.params:
        param.register_hook(partial(hook, param))
    with observe(model):
        loop(model, opt, classes(16), entropy)


@fault("negative_eigenvalue_gives_nan", "turned", "non-finite", "blown-up")
def _(observe):
    """The damping is subtracted, and the root of a negative eigenvalue turns the gradients into NaN."""
    model = toy(55)
    kfac, opt = KFac(model), torch.optim.AdamW(trainable(model), lr=1e-2)

    def before(number):
        for param in kfac.params if number > 3 else ():
            key = kfac.site[id(param)]
            moment = kfac.stats[key].nan_to_num()
            values, vectors = torch.linalg.eigh(moment - 0.5 * moment.trace() * torch.eye(4))
            matrix = (vectors * values**-0.5) @ vectors.T
            param.grad = matrix @ param.grad if key[1] == "A" else param.grad @ matrix

    with observe(model):
        loop(model, opt, regression(12), before=before)


@fault("whole_accumulation_turned_each_time", "turned", "applied-on-micro-steps", "applied-twice")
def _(observe):
    """After each micro-batch the whole accumulated gradient is turned again, the oldest part four times."""
    model = llama(56)
    kfac = KFac(model, warmup=4)

    class Turning(Trainer):
        def training_step(self, *args, **keywords):
            loss = super().training_step(*args, **keywords)
            kfac.step()
            return loss

    trainer = hf(model, tokens(), steps=10, cls=Turning, gradient_accumulation_steps=4)
    with observe(model):
        trainer.train()


# ------------------------------------------------------------------------------------------------ faults: delivered


@fault("trainer_callback_after_the_step", "delivered", "modified-too-late")
def _(observe):
    """The callback on_optimizer_step runs after the optimizer, whose gradients are cleared next."""
    model = llama(60)
    kfac = KFac(model)
    trainer = hf(model, tokens(), On(on_optimizer_step=lambda state, **_: kfac.step()), steps=16)
    with observe(model):
        trainer.train()


@fault("post_hook_for_pre_hook", "delivered", "modified-too-late")
def _(observe):
    """The preconditioner sits in the optimizer's post-step hook instead of its pre-step hook."""
    model = mlp(61)
    kfac, opt = KFac(model), torch.optim.RMSprop(trainable(model), lr=2e-3)
    opt.register_step_post_hook(kfac.step)
    with observe(model):
        loop(model, opt, classes(18), entropy)


@fault("closure_computes_the_gradient_again", "delivered", "overwritten")
def _(observe):
    """The gradients are turned before step(closure), and the closure clears them and goes backward again."""
    model = toy(62)
    kfac, opt = KFac(model), torch.optim.AdamW(trainable(model), lr=1e-2)
    with observe(model):
        for batch in regression(16):

            def closure(batch=batch):
                opt.zero_grad()
                loss = square(model, batch)
                loss.backward()
                return loss

            closure()
            kfac.step()
            opt.step(closure)


class Sam:
    """Sharpness-aware steps around an optimizer."""

    def __init__(self, opt, rho=0.05):
        self.opt, self.rho, self.moved = opt, rho, []

    @torch.no_grad()
    def first(self):
        """Climb to the worst point nearby."""
        params = [p for g in self.opt.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        self.moved = [(p, p.grad * self.rho / (norm + 1e-12)) for p in params]
        for param, shift in self.moved:
            param.add_(shift)
        self.opt.zero_grad()

    @torch.no_grad()
    def second(self):
        """Come back and step by the gradient of the worst point."""
        for param, shift in self.moved:
            param.sub_(shift)
        self.opt.step()
        self.opt.zero_grad()


@fault("sam_turns_only_the_climb", "delivered", "overwritten", "dropped")
def _(observe):
    """The gradient of the climb is preconditioned, the one which the optimizer uses comes after and is raw."""
    model = mlp(63)
    shampoo = Shampoo(model)
    sam = Sam(torch.optim.SGD(trainable(model), lr=0.05, momentum=0.9))
    with observe(model):
        for batch in classes(16):
            entropy(model, batch).backward()
            shampoo.step()
            sam.first()
            entropy(model, batch).backward()
            sam.second()


@fault("bucket_copied_back", "delivered", "overwritten")
def _(observe):
    """Buckets take the raw gradients during backward and are copied back, reduced, right before the step."""
    model = llama(64)
    kfac, bucket = KFac(model), {}
    for param in kfac.params:
        param.register_post_accumulate_grad_hook(lambda p: bucket.__setitem__(p, p.grad.clone()))

    def reduce(state, **_):
        for param, grad in bucket.items():
            param.grad.copy_(grad)

    trainer = hf(model, tokens(), pre_step(kfac.step), On(on_pre_optimizer_step=reduce), steps=16)
    with observe(model):
        trainer.train()


@fault("cleared_between_turning_and_stepping", "delivered", "dropped")
def _(observe):
    """The gradients are cleared after the preconditioner and before the optimizer, which finds none."""
    model = toy(65)
    kfac = KFac(model)
    accelerator = Accelerator(cpu=True)
    model, opt = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-2))
    with observe(model):
        for batch in regression(14):
            accelerator.backward(square(model, batch))
            kfac.step()
            opt.zero_grad()
            opt.step()


@fault("moved_to_an_attribute_nobody_reads", "delivered", "dropped", "no-steps")
def _(observe):
    """A memory-saving hook stores the turned gradient in an attribute and frees grad, and the optimizer reads grad."""
    model = mlp(66)
    shampoo, opt = Shampoo(model), torch.optim.AdamW(trainable(model), lr=1e-2)

    def hook(param):
        param.grad.copy_(shampoo.turn(param, param.grad))
        param.low_rank_grad, param.grad = param.grad, None

    for param in shampoo.params:
        param.register_post_accumulate_grad_hook(hook)
    with observe(model):
        loop(model, opt, classes(16), entropy)


@fault("gradients_never_cleared", "delivered", "accumulated-across-steps")
def _(observe):
    """Without zero_grad, each turned gradient is added to those of all steps before."""
    model = toy(67)
    shampoo, opt = Shampoo(model), torch.optim.SGD(trainable(model), lr=2e-3)
    for param in shampoo.params:
        param.register_hook(partial(shampoo.turn, param))
    with observe(model):
        for batch in regression(24):
            square(model, batch).backward()
            opt.step()


@fault("turned_on_substeps_only", "delivered", "applied-on-micro-steps", "overwritten")
def _(observe):
    """The preconditioner runs at the end of sub-steps, and the last micro-batch is added raw on top."""
    model = llama(68)
    kfac = KFac(model, warmup=2)
    calls = On(on_substep_end=lambda state, **_: kfac.step())
    trainer = hf(model, tokens(), calls, steps=12, gradient_accumulation_steps=2)
    with observe(model):
        trainer.train()


@fault("backward_after_autograd_grad", "delivered", "overwritten")
def _(observe):
    """The turned gradients are set by hand, then backward adds the raw ones on top."""
    model = toy(69)
    shampoo, opt = Shampoo(model), torch.optim.SGD(trainable(model), lr=5e-3)
    with observe(model):
        for batch in regression(18):
            opt.zero_grad()
            loss = square(model, batch)
            grads = torch.autograd.grad(loss, shampoo.params, retain_graph=True)
            for param, grad in zip(shampoo.params, grads, strict=True):
                param.grad = shampoo.turn(param, grad)
            loss.backward()
            opt.step()


@fault("optimizer_of_the_adapter_before", "delivered", "wrong-parameters")
def _(observe):
    """The optimizer was built before the adapter was made anew and steps orphaned tensors."""
    model = mlp(70)
    opt = torch.optim.AdamW(trainable(model), lr=1e-2)
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(r=4, lora_alpha=8, target_modules=["fc1", "fc2", "fc3"]))
    model.set_adapter("default")
    warm_up(model)
    kfac = KFac(model)
    with observe(model):
        for batch in classes(16):
            model.zero_grad()
            entropy(model, batch).backward()
            kfac.step()
            opt.step()


@fault("accumulation_longer_than_the_run", "delivered", "no-steps")
def _(observe):
    """Accelerate accumulates over more micro-batches than the run has, and no step is ever taken."""
    model = toy(71)
    shampoo = Shampoo(model)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=64)
    model, opt = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-2))
    for param in shampoo.params:
        param.register_hook(partial(shampoo.turn, param))
    with observe(model):
        for batch in regression(24):
            with accelerator.accumulate(model):
                accelerator.backward(square(model, batch))
                opt.step()
                opt.zero_grad()


# ------------------------------------------------------------------------------------------------- faults: consumed


class FlatSgd(torch.optim.Optimizer):
    """Momentum on one flat buffer of which all gradients are views."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        self.all = self.param_groups[0]["params"]
        self.flat = torch.zeros(sum(p.numel() for p in self.all))
        self.speed, at = torch.zeros_like(self.flat), 0
        for param in self.all:
            param.grad = self.flat[at : at + param.numel()].view_as(param)
            at += param.numel()

    def zero_grad(self, set_to_none=False):
        """Clear the buffer."""
        self.flat.zero_()

    @torch.no_grad()
    def step(self, closure=None):
        """Step by the buffer."""
        self.speed.mul_(0.8).add_(self.flat)
        at = 0
        for param in self.all:
            param.sub_(self.param_groups[0]["lr"] * self.speed[at : at + param.numel()].view_as(param))
            at += param.numel()


@fault("gradient_no_longer_a_view", "consumed", "not-consumed")
def _(observe):
    """The optimizer steps by a flat buffer, and the preconditioner puts new tensors in place of its views."""
    model = toy(80)
    kfac, opt = KFac(model), FlatSgd(trainable(model), lr=0.02)
    views = {p: p.grad for p in opt.all}

    def before(_):
        for param in kfac.params:
            param.grad = kfac.turn(param, param.grad.clone())

    with observe(model):
        for number, batch in enumerate(regression(18)):
            for param, view in views.items():
                param.grad = view
            opt.zero_grad()
            square(model, batch).backward()
            before(number)
            opt.step()


class Masters(torch.optim.Optimizer):
    """AdamW on copies in single precision which take the gradients during backward."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        self.pairs = [(p, p.detach().float().clone()) for p in self.param_groups[0]["params"]]
        self.inner = torch.optim.AdamW([m for _, m in self.pairs], lr=lr, weight_decay=0.0)
        masters = {p: m for p, m in self.pairs}
        for param in masters:
            param.register_post_accumulate_grad_hook(
                lambda p: setattr(masters[p], "grad", p.grad.detach().float().clone())
            )

    @torch.no_grad()
    def step(self, closure=None):
        """Step the copies and write them back."""
        self.inner.step()
        for param, master in self.pairs:
            param.copy_(master)


@fault("masters_take_raw_gradients", "consumed", "not-consumed")
def _(observe):
    """The master copies took the gradients during backward, before the preconditioner changed them."""
    model = mlp(81)
    shampoo, opt = Shampoo(model), Masters(trainable(model), lr=1e-2)
    with observe(model):
        loop(model, opt, classes(18), entropy, before=shampoo.step)


@fault("diagonal_before_adam", "consumed", "cancelled-by-optimizer")
def _(observe):
    """A fixed diagonal in front of Adam is divided out again by Adam's second moments."""
    model = toy(82)
    opt = torch.optim.Adam(trainable(model), lr=5e-3, eps=1e-16)
    weights = torch.tensor([0.15, 0.5, 1.0, 3.0])
    sides = factors(model)

    def before(_):
        for param, side in sides:
            param.grad.mul_(weights[:, None] if side == "A" else weights)

    with observe(model):
        loop(model, opt, regression(20), before=before)


class Polar(torch.optim.Optimizer):
    """Steps by the orthogonal factor of each gradient, as Muon without momentum."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        """Step by U V of the singular value decomposition."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    left, _, right = torch.linalg.svd(param.grad, full_matrices=False)
                    param.sub_(group["lr"] * left @ right)


@fault("whitening_before_orthogonal_steps", "consumed", "cancelled-by-optimizer")
def _(observe):
    """Whitening by the gradient's own Gram matrix changes nothing for an optimizer which orthogonalizes."""
    model = mlp(83)
    shampoo, opt = Shampoo(model, decay=0.0, power=-0.4, damping=0.0), Polar(trainable(model), lr=1e-2)
    with observe(model):
        loop(model, opt, classes(18), entropy, before=shampoo.step)


class LossSgd(torch.optim.Optimizer):
    """Differentiates the loss by itself."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, loss):
        """Step by gradients of its own."""
        params = self.param_groups[0]["params"]
        grads = torch.autograd.grad(loss, params)
        with torch.no_grad():
            for param, grad in zip(params, grads, strict=True):
                param.sub_(self.param_groups[0]["lr"] * grad)


@fault("optimizer_differentiates_by_itself", "consumed", "not-consumed")
def _(observe):
    """The optimizer takes the loss and its own gradients and never looks at those which were turned."""
    model = toy(84)
    kfac, opt = KFac(model), LossSgd(trainable(model), lr=0.05)
    with observe(model):
        for batch in regression(16):
            opt.zero_grad()
            loss = square(model, batch)
            loss.backward(retain_graph=True)
            kfac.step()
            opt.step(loss)


# ---------------------------------------------------------------------------------------- faults: moved and kept


@fault("warmup_by_integer_division", "moved", "learning-rate-zero")
def _(observe):
    """The warm-up divides integers, and the learning rate stays zero for the whole run."""
    model = llama(90)
    kfac, opt = KFac(model), torch.optim.AdamW(trainable(model), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: min(1, step // 100))
    trainer = hf(model, tokens(), pre_step(kfac.step), steps=16, optimizers=(opt, schedule))
    with observe(model):
        trainer.train()


@fault("steps_lost_in_bfloat16", "moved", "no-update")
def _(observe):
    """The weights are bfloat16 and the steps too small to change any of them."""
    model = mlp(91).to(torch.bfloat16)
    shampoo, opt = Shampoo(model), torch.optim.SGD(trainable(model), lr=1e-6)
    with torch.no_grad():
        for param, _ in factors(model):
            param.copy_(torch.where(param.abs() < 0.05, torch.full_like(param, 0.05), param))
    batches = ((x.bfloat16(), y) for x, y in classes(16))
    with observe(model):
        loop(model, opt, batches, entropy, before=shampoo.step)


@fault("every_step_rejected", "kept", "update-undone", "not-kept")
def _(observe):
    """A safeguard compares the wrong way round and takes back every step which improves the loss."""
    model = toy(92)
    kfac, opt, saved = KFac(model, warmup=0), torch.optim.SGD(trainable(model), lr=0.01), {}
    with observe(model):
        for batch in regression(16):
            opt.zero_grad()
            loss = square(model, batch)
            loss.backward()
            kfac.step()
            saved = {p: p.detach().clone() for p in kfac.params}
            opt.step()
            with torch.no_grad():
                if square(model, batch) < loss:
                    for param, old in saved.items():
                        param.copy_(old)


class Ema:
    """Exponential average of the trained weights."""

    def __init__(self, model, decay=0.9):
        self.params, self.decay = trainable(model), decay
        self.shadow = [p.detach().clone() for p in self.params]
        self.stored = []

    @torch.no_grad()
    def update(self):
        """Move towards the weights."""
        for shadow, param in zip(self.shadow, self.params, strict=True):
            shadow.lerp_(param, 1 - self.decay)

    @torch.no_grad()
    def put(self, values):
        """Write into the model."""
        for param, value in zip(self.params, values, strict=True):
            param.copy_(value)

    def store(self):
        """Remember the weights."""
        self.stored = [p.detach().clone() for p in self.params]


@fault("average_never_swapped_back", "kept", "not-kept")
def _(observe):
    """Validation every other step runs on the averaged weights and never restores the trained ones."""
    model = toy(93)
    kfac, opt, ema = KFac(model), torch.optim.AdamW(trainable(model), lr=1e-2), Ema(model)
    held_out = next(regression(1, seed=9))

    def after(number):
        ema.update()
        if number % 2:
            ema.store()
            ema.put(ema.shadow)
            with torch.no_grad():
                square(model, held_out)

    with observe(model):
        loop(model, opt, regression(20), before=kfac.step, after=after)


@fault("cached_state_is_only_a_reference", "kept", "not-kept")
def _(observe):
    """The weights kept for restoring are references, so loading the average overwrites them as well."""
    model, held = llama(94), {}
    kfac = KFac(model)

    def after(state, **_):
        current = get_peft_model_state_dict(model)
        average = held.setdefault("average", {k: v.clone() for k, v in current.items()})
        average.update({k: average[k].lerp(v, 0.1) for k, v in current.items()})
        set_peft_model_state_dict(model, average)
        set_peft_model_state_dict(model, current)

    trainer = hf(model, tokens(), pre_step(kfac.step), On(on_step_end=after), steps=16)
    with observe(model):
        trainer.train()


@fault("server_weights_pulled_every_step", "kept", "not-kept")
def _(observe):
    """A federated client loads the server's unchanged adapter from disk before each step."""
    model = llama(95)
    kfac = KFac(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)

        def pull(state, **_):
            model.load_adapter(folder, "default", is_trainable=True)

        trainer = hf(model, tokens(), pre_step(kfac.step), On(on_step_begin=pull), steps=10)
        with observe(model):
            trainer.train()


@fault("best_state_reloaded_after_each_evaluation", "kept", "not-kept")
def _(observe):
    """Early stopping reloads its best state at each evaluation, and its metric never counts as better."""
    model = mlp(96)
    shampoo, opt = Shampoo(model), torch.optim.Adam(trainable(model), lr=1e-2)
    best = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}

    def after(number):
        if number % 3 == 2:
            set_peft_model_state_dict(model, best)

    with observe(model):
        loop(model, opt, classes(24), entropy, before=shampoo.step, after=after)


# ----------------------------------------------------------------------------------------------- faults: throughout


@fault("return_inside_the_loop", "throughout", "only-some-layers")
def _(observe):
    """A misplaced break ends the loop after the first layer."""
    model = toy(100, layers=3, targets=("v",))
    kfac, opt = KFac(model), torch.optim.AdamW(trainable(model), lr=1e-2)

    def before(_):
        for _, layer in lora_layers(model):
            for param in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
                param.grad.copy_(kfac.turn(param, param.grad))
            break

    with observe(model):
        loop(model, opt, regression(18), before=before)


@fault("only_the_attention_is_named", "throughout", "only-some-layers")
def _(observe):
    """The preconditioner picks modules by attention names, the adapter also covers the feed-forward part."""
    model = llama(101, targets=("q_proj", "v_proj", "up_proj", "down_proj"))
    kfac = KFac(model)
    chosen = [p for n, p in model.named_parameters() if p.requires_grad and "self_attn" in n]

    def write():
        for param in chosen:
            param.grad.copy_(kfac.turn(param, param.grad))

    trainer = hf(model, tokens(), pre_step(write), steps=16)
    with observe(model):
        trainer.train()


@fault("misspelled_factor_name", "throughout", "only-one-factor")
def _(observe):
    """The filter looks for lora_a in lower case, and only B is preconditioned."""
    model = llama(102)
    shampoo = Shampoo(model)
    chosen = [p for n, p in model.named_parameters() if "lora_a" in n or "lora_B" in n]

    def write():
        for param in chosen:
            param.grad.copy_(shampoo.turn(param, param.grad))

    trainer = hf(model, tokens(), pre_step(write), steps=16)
    with observe(model):
        trainer.train()


@fault("first_parameter_group_only", "throughout", "only-one-factor")
def _(observe):
    """A and B lie in the groups of LoRA+, and the pre-step hook goes through the first group only."""
    model = toy(103)
    kfac = KFac(model)
    opt = create_loraplus_optimizer(model, torch.optim.AdamW, lr=5e-3, loraplus_lr_ratio=2.0)

    def hook(opt, *_):
        first = next(g for g in opt.param_groups if g["params"])
        for param in first["params"]:
            param.grad.copy_(kfac.turn(param, param.grad))

    opt.register_step_pre_hook(hook)
    with observe(model):
        loop(model, opt, regression(20))


@fault("layerwise_groups_first_only", "throughout", "only-some-layers")
def _(observe):
    """With one group a layer for decaying learning rates, only the first group's tensors are turned."""
    model = toy(104, layers=3)
    shampoo = Shampoo(model)
    groups = [
        {
            "params": [p for n, p in model.named_parameters() if p.requires_grad and f"layers.{i}." in n],
            "lr": 0.01 / (i + 1),
        }
        for i in range(3)
    ]
    opt = torch.optim.AdamW(groups)

    class Wrapped:
        def step(self):
            for param in opt.param_groups[0]["params"]:
                param.grad.copy_(shampoo.turn(param, param.grad))
            opt.step()

        def zero_grad(self):
            opt.zero_grad()

    with observe(model):
        loop(model, Wrapped(), regression(18))


@fault("handles_removed_after_the_first_epoch", "throughout", "stopped")
def _(observe):
    """Tidying up at the end of the first epoch removes the tensor hooks of the preconditioner."""
    model = llama(105)
    shampoo = Shampoo(model)
    handles = [p.register_hook(partial(shampoo.turn, p)) for p in shampoo.params]
    tidy = On(on_epoch_end=lambda state, **_: [h.remove() for h in handles])
    trainer = hf(model, tokens(40), tidy, steps=30)
    with observe(model):
        trainer.train()


@fault("switched_off_by_an_exception", "throughout", "stopped")
def _(observe):
    """A short batch makes the preconditioner fail, and the handler switches it off for good without a word."""
    model = toy(106)
    kfac, opt, enabled = KFac(model), torch.optim.AdamW(trainable(model), lr=1e-2), [True]

    def before(number):
        try:
            if number == 9:
                raise RuntimeError("singular")
            if enabled[0]:
                kfac.step()
        except RuntimeError:
            enabled[0] = False

    with observe(model):
        loop(model, opt, regression(28), before=before)


@fault("global_step_against_accumulation", "throughout", "stopped", "nothing-written")
def _(observe):
    """The test for the end of accumulation uses the global step, so that every second step is left raw."""
    model = llama(107)
    kfac = KFac(model)
    calls = On(on_pre_optimizer_step=lambda state, **_: kfac.step() if state.global_step % 2 == 0 else None)
    trainer = hf(model, tokens(), calls, steps=20, gradient_accumulation_steps=2)
    with observe(model):
        trainer.train()


@fault("schedule_counts_micro_batches", "throughout", "stopped", "learning-rate-zero")
def _(observe):
    """The schedule is stepped at each micro-batch and reaches zero at half of the run."""
    model = toy(108)
    shampoo, opt = Shampoo(model), torch.optim.AdamW(trainable(model), lr=1e-2)
    steps = 20
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: max(0.0, 1 - step / steps))
    with observe(model):
        for number, batch in enumerate(regression(2 * steps)):
            (square(model, batch) / 2).backward()
            if number % 2:
                shampoo.step()
                opt.step()
                opt.zero_grad()
            schedule.step()


@fault("group_of_b_at_rate_zero", "throughout", "only-one-factor", "learning-rate-zero")
def _(observe):
    """An empty group was dropped, the learning rates have shifted and the group of B has none."""
    model = mlp(109)
    kfac = KFac(model)
    sides = factors(model)
    rates = [1e-2, 0.0, 2e-2]
    groups = [[p for p, side in sides if side == "A"], [p for p, side in sides if side == "B"], []]
    filled = [g for g in groups if g]
    opt = torch.optim.AdamW([{"params": g, "lr": lr} for g, lr in zip(filled, rates, strict=False)])
    with observe(model):
        loop(model, opt, classes(18), entropy, before=kfac.step)


@fault("layers_thawed_after_the_optimizer", "throughout", "only-some-layers", "wrong-parameters")
def _(observe):
    """The optimizer took what was trainable at the start, the layers thawed by a callback are not in it."""
    model = llama(110, layers=3)
    later = [p for n, p in model.named_parameters() if "lora_" in n and "layers.0" not in n]
    for param in later:
        param.requires_grad_(False)
    kfac = KFac(model)

    def thaw(state, **_):
        for param in later:
            param.requires_grad_(True)

    trainer = hf(model, tokens(), On(on_step_begin=thaw), pre_step(kfac.step), steps=16)
    with observe(model):
        trainer.train()


@fault("second_train_call_without_hooks", "throughout", "stopped")
def _(observe):
    """The preconditioner takes its hooks away at the end of training, and the second phase runs without."""
    model = llama(111)
    kfac, active = KFac(model), [True]

    def end(state, **_):
        kfac.remove()
        active[0] = False

    calls = On(on_pre_optimizer_step=lambda state, **_: kfac.step() if active[0] else None, on_train_end=end)
    with observe(model):
        hf(model, tokens(), calls, steps=14).train()
        hf(model, tokens(seed=4), calls, steps=16).train()


@fault("factors_frozen_at_half_time", "throughout", "stopped", "no-gradient")
def _(observe):
    """A staged schedule freezes the adapter at half of the run and trains only the head from then on."""
    model = mlp(112)
    head = model.base_model.model.classifier
    head.requires_grad_(True)
    kfac, opt = KFac(model), torch.optim.AdamW(trainable(model), lr=1e-2)
    with observe(model):
        for number, batch in enumerate(classes(28)):
            if number == 14:
                for param in kfac.params:
                    param.requires_grad_(False)
            opt.zero_grad()
            entropy(model, batch).backward()
            kfac.step()
            opt.step()


@fault("merged_for_a_sample_at_half_time", "throughout", "stopped", "not-used")
def _(observe):
    """At half of the run the adapter is merged for a sample and stays merged."""
    model = llama(113)
    model.get_output_embeddings().requires_grad_(True)
    kfac = KFac(model)
    sample = On(on_step_end=lambda state, **_: model.merge_adapter() if state.global_step == 12 else None)
    trainer = hf(model, tokens(), pre_step(kfac.step), sample, steps=24)
    with observe(model):
        trainer.train()


@fault("parameters_made_anew_at_half_time", "throughout", "stopped", "wrong-parameters")
def _(observe):
    """Casting the adapter at half of the run makes new parameters, which nobody turns or steps."""
    model = toy(114)
    shampoo, opt = Shampoo(model), torch.optim.AdamW(trainable(model), lr=1e-2)

    def after(number):
        if number == 11:
            for _, layer in lora_layers(model):
                for part in (layer.lora_A["default"], layer.lora_B["default"]):
                    part.weight = nn.Parameter(part.weight.detach().clone())

    with observe(model):
        loop(model, opt, regression(24), before=shampoo.step, after=after)


@fault("one_layer_against_the_gradient", "throughout", "only-some-layers", "against-the-gradient")
def _(observe):
    """The newest layer was ported with the other sign convention and climbs while the rest descends."""
    model = toy(115, layers=3, targets=("v",))
    kfac, opt = KFac(model, warmup=0), torch.optim.SGD(trainable(model), lr=0.02)
    wrong = {id(p) for p in kfac.params[-2:]}

    def before(_):
        for param in kfac.params:
            param.grad.copy_(kfac.turn(param, param.grad) * (-1 if id(param) in wrong else 1))

    with observe(model):
        loop(model, opt, regression(18), before=before)


# ------------------------------------------------------------------------------------------- sound: plain training


@sound("plain_trainer_cosine", "no-modifier")
def _(observe):
    """A Trainer with a cosine schedule, accumulation and clipping, without any preconditioner."""
    trainer = hf(llama(200), tokens(), steps=14, lr_scheduler_type="cosine", gradient_accumulation_steps=2)
    with observe(trainer.model):
        trainer.train()


@sound("plain_zero_start", "no-modifier")
def _(observe):
    """B starts at zero as usual, so that A has no gradient at the first step only."""
    model = toy(201, warm=False)
    with observe(model):
        loop(model, torch.optim.SGD(trainable(model), lr=0.1, momentum=0.9), regression(16))


@sound("plain_lbfgs_closure", "no-modifier")
def _(observe):
    """LBFGS goes forward and backward several times within each step."""
    model = toy(202)
    opt = torch.optim.LBFGS(trainable(model), lr=0.3, max_iter=4)
    with observe(model):
        for batch in regression(8):

            def closure(batch=batch):
                opt.zero_grad()
                loss = square(model, batch)
                loss.backward()
                return loss

            opt.step(closure)


@sound("plain_sam", "no-modifier")
def _(observe):
    """Sharpness-aware minimization moves the weights between two backward passes and comes back."""
    model = mlp(203)
    sam = Sam(torch.optim.SGD(trainable(model), lr=0.05, momentum=0.9))
    with observe(model):
        for batch in classes(16):
            entropy(model, batch).backward()
            sam.first()
            entropy(model, batch).backward()
            sam.second()


@sound("plain_accelerate_accumulation", "no-modifier")
def _(observe):
    """Accelerate skips steps on micro-batches and clips on the others."""
    model = llama(204)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model, opt = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-2))
    with observe(model):
        for batch in text_batches(36):
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                opt.step()
                opt.zero_grad()


@sound("plain_scaler_with_early_overflows", "no-modifier")
def _(observe):
    """The scaler starts too high, skips the first step and then trains."""
    model = mlp(205)
    opt, scaler = torch.optim.AdamW(trainable(model), lr=1e-2), torch.amp.GradScaler("cpu", init_scale=2.0**127)
    with observe(model):
        for x, y in classes(16):
            opt.zero_grad()
            scaler.scale(4 * F.cross_entropy(model(x), y)).backward()
            scaler.step(opt)
            scaler.update(new_scale=1024.0 if scaler.get_scale() > 1e30 else None)


@sound("plain_bfloat16_autocast", "no-modifier")
def _(observe):
    """The forward pass runs in bfloat16 under autocast over weights in single precision."""
    model = toy(206)
    opt = torch.optim.NAdam(trainable(model), lr=5e-3)
    with observe(model):
        for x, y in regression(16):
            opt.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                out = model(x)
            F.mse_loss(out.float(), y).backward()
            opt.step()


@sound("plain_average_with_restore", "no-modifier")
def _(observe):
    """Validation swaps the averaged weights in and the trained ones back."""
    model = toy(207)
    ema, held_out = Ema(model), next(regression(1, seed=9))

    def after(number):
        ema.update()
        if number % 3 == 0:
            ema.store()
            ema.put(ema.shadow)
            with torch.no_grad():
                square(model, held_out)
            ema.put(ema.stored)

    with observe(model):
        loop(model, torch.optim.RAdam(trainable(model), lr=1e-2), regression(18), after=after)


@sound("plain_swa_copy", "no-modifier")
def _(observe):
    """A separate averaged copy is updated after each step and evaluated at the end."""
    model = mlp(208)
    average = AveragedModel(model)
    with observe(model):
        opt = torch.optim.SGD(trainable(model), lr=0.1)
        loop(model, opt, classes(18), entropy, after=lambda _: average.update_parameters(model))
        average.eval()
        entropy(average, next(classes(1, seed=5)))


@sound("plain_merge_and_unmerge", "no-modifier")
def _(observe):
    """A callback merges the adapter for a sample and unmerges it again."""
    model = llama(209)

    def sample(state, **_):
        model.merge_adapter()
        with torch.no_grad():
            model(**next(text_batches(1, seed=8)))
        model.unmerge_adapter()

    trainer = hf(model, tokens(), On(on_step_end=sample), steps=14)
    with observe(model):
        trainer.train()


@sound("plain_reference_by_disabled_adapter", "no-modifier")
def _(observe):
    """The reference of a divergence penalty is the same model with the adapter disabled."""
    model = llama(210)
    opt = torch.optim.AdamW(trainable(model), lr=1e-2)
    with observe(model):
        for batch in text_batches(14):
            with torch.no_grad(), model.disable_adapter():
                reference = model(**batch).logits.log_softmax(-1)
            out = model(**batch)
            penalty = F.kl_div(reference, out.logits.log_softmax(-1), log_target=True, reduction="batchmean")
            (out.loss + 0.1 * penalty / 10).backward()
            opt.step()
            opt.zero_grad()


@sound("plain_dora_rslora", "no-modifier")
def _(observe):
    """DoRA with rank-stabilized scaling, all of it trained."""
    model = mlp(211, use_dora=True, use_rslora=True)
    with observe(model):
        loop(model, torch.optim.AdamW(trainable(model), lr=1e-2), classes(16), entropy)


@sound("plain_checkpoint_with_input_grads", "no-modifier")
def _(observe):
    """Reentrant checkpointing in the Trainer, which makes the inputs require gradients."""
    model = llama(212)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = hf(model, tokens(), steps=12, **options)
    with observe(model):
        trainer.train()


@sound("plain_resume", "no-modifier")
def _(observe):
    """A second Trainer resumes the model from the checkpoint of the first."""
    model = llama(213)
    with tempfile.TemporaryDirectory() as folder, observe(model):
        hf(model, tokens(), keep=folder, steps=6, save_strategy="steps", save_steps=6).train()
        second = hf(model, tokens(), keep=folder, steps=14)
        second.train(resume_from_checkpoint=os.path.join(folder, "checkpoint-6"))


@sound("plain_loraplus", "no-modifier")
def _(observe):
    """LoRA+ gives B another learning rate than A."""
    model = toy(214)
    opt = create_loraplus_optimizer(model, torch.optim.AdamW, lr=2e-3, loraplus_lr_ratio=8.0)
    with observe(model):
        loop(model, opt, regression(16))


@sound("plain_adafactor_relative", "no-modifier")
def _(observe):
    """Adafactor sets its own step size."""
    model = llama(215)
    opt = Adafactor(trainable(model), scale_parameter=True, relative_step=True, warmup_init=False)
    with observe(model):
        for batch in text_batches(14):
            opt.zero_grad()
            model(**batch).loss.backward()
            opt.step()


def in_backward(params, make, turn=None):
    """One optimizer for each tensor, stepped and cleared in the backward pass."""
    opts = {p: make([p]) for p in params}

    def hook(param):
        if turn:
            param.grad.copy_(turn(param, param.grad))
        opts[param].step()
        opts[param].zero_grad()

    for param in params:
        param.register_post_accumulate_grad_hook(hook)


@sound("plain_optimizer_in_backward", "no-modifier")
def _(observe):
    """Each tensor has an optimizer of its own, stepped as soon as its gradient is there."""
    model = toy(216)
    in_backward(trainable(model), partial(torch.optim.AdamW, lr=1e-2))
    with observe(model):
        for batch in regression(16):
            square(model, batch).backward()


@sound("plain_autograd_grad", "no-modifier")
def _(observe):
    """The gradients come from torch.autograd.grad and are set by hand."""
    model = mlp(217)
    params = trainable(model)
    opt = torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True)
    with observe(model):
        for batch in classes(18):
            for param, grad in zip(params, torch.autograd.grad(entropy(model, batch), params), strict=True):
                param.grad = grad
            opt.step()


@sound("plain_alternating_factors", "no-modifier")
def _(observe):
    """A and B are trained in turn by two optimizers."""
    model = toy(218)
    opts = [torch.optim.Adam([p for p, s in factors(model) if s == side], lr=1e-2) for side in "AB"]
    with observe(model):
        for number, batch in enumerate(regression(24)):
            model.zero_grad()
            square(model, batch).backward()
            opts[number % 2].step()


@sound("plain_layer_drop", "no-modifier")
def _(observe):
    """Layers are skipped at random, and skipped ones have no gradients at that step."""
    draw = torch.Generator().manual_seed(0)
    drop = {i: lambda layer, x: layer(x) if torch.rand((), generator=draw) < 0.7 else x for i in range(3)}
    model = toy(219, layers=3, wrap=drop)
    with observe(model):
        loop(model, torch.optim.SGD(trainable(model), lr=0.1), regression(24))


@sound("plain_two_losses_two_backwards", "no-modifier")
def _(observe):
    """Two losses go backward one after the other into the same gradients."""
    model = llama(220)
    opt = torch.optim.Adamax(trainable(model), lr=1e-2)
    with observe(model):
        for batch in text_batches(14):
            opt.zero_grad(set_to_none=False)
            out = model(**batch)
            out.loss.backward(retain_graph=True)
            (1e-3 * out.logits.pow(2).mean()).backward()
            opt.step()


@sound("plain_saved_modules_and_tokens", "no-modifier")
def _(observe):
    """A full head and some token rows are trained next to the adapter."""
    model = llama(221, modules_to_save=["lm_head"], trainable_token_indices={"embed_tokens": [1, 2, 3]})
    trainer = hf(model, tokens(), steps=12, optim="adafactor")
    with observe(model):
        trainer.train()


@sound("plain_tied_embeddings", "no-modifier")
def _(observe):
    """Input and output embeddings are tied, the adapter sits on the projections."""
    model = llama(222, layers=1, hidden=32, targets=("q_proj", "o_proj", "gate_proj"), tie=True)
    trainer = hf(model, tokens(), steps=12, optim="sgd", lr=0.3)
    with observe(model):
        trainer.train()


@sound("plain_frozen_a", "no-modifier")
def _(observe):
    """As in LoRA-FA, A is frozen on purpose and B learns."""
    model = toy(223)
    for param, side in factors(model):
        param.requires_grad_(side == "B")
    with observe(model):
        loop(model, torch.optim.AdamW(trainable(model), lr=1e-2), regression(16))


@sound("plain_bfloat16_weights", "no-modifier")
def _(observe):
    """The adapter is bfloat16 and the steps are large enough to change it."""
    model = mlp(224).to(torch.bfloat16)
    opt = torch.optim.AdamW(trainable(model), lr=2e-2)
    with observe(model):
        loop(model, opt, ((x.bfloat16(), y) for x, y in classes(16)), entropy)


class Lookahead(torch.optim.SGD):
    """SGD which every fifth step goes half-way back to slow weights."""

    count = 0

    @torch.no_grad()
    def step(self, closure=None):
        """Step, and pull back when it is time."""
        params = [p for group in self.param_groups for p in group["params"]]
        for param in params:
            self.state[param].setdefault("slow", param.detach().clone())
        super().step()
        self.count += 1
        for param in params if self.count % 5 == 0 else ():
            slow = self.state[param]["slow"]
            param.copy_(slow.lerp_(param, 0.5))


@sound("plain_lookahead", "no-modifier")
def _(observe):
    """Every fifth step of Lookahead ends half-way between the slow and the fast weights."""
    model = toy(225)
    with observe(model):
        loop(model, Lookahead(trainable(model), lr=0.05, momentum=0.5), regression(20))


def sft(model, *callbacks, steps=12, **options):
    """A quiet SFTTrainer on tokenized rows."""
    from datasets import Dataset, disable_progress_bars
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    words = {f"w{i}": i for i in range(38)} | {"<pad>": 38, "<eos>": 39}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), pad_token="<pad>", eos_token="<eos>"
    )
    args = SFTConfig(
        output_dir=os.path.join(tempfile.gettempdir(), "blind_unused"),
        max_steps=steps,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        use_cpu=True,
        bf16=False,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        **options,
    )
    rows = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in tokens(48)])
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=rows, processing_class=tokenizer, callbacks=list(callbacks)
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@sound("plain_sft_trainer", "no-modifier")
def _(observe):
    """The trainer of TRL on tokenized data."""
    trainer = sft(llama(226), steps=12)
    with observe(trainer.model):
        trainer.train()


@sound("plain_two_adapters_in_turn", "no-modifier")
def _(observe):
    """Two adapters of one model are trained in turn, each by an optimizer of its own."""
    model = toy(227)
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q", "v"]))
    warm_up(model, "other")
    opts = {}
    for name in ("default", "other"):
        opts[name] = torch.optim.AdamW([p for p, _ in factors(model, name)], lr=1e-2)
    with observe(model):
        for number, batch in enumerate(regression(24)):
            name = ("default", "other")[number % 2]
            model.set_adapter(name)
            opts[name].zero_grad()
            square(model, batch).backward()
            opts[name].step()


# ------------------------------------------------------------------------------------------------ sound: effective


@sound("kfac_in_step_pre_hook", "effective")
def _(observe):
    """The preconditioner sits in the optimizer's pre-step hook, set once."""
    model = toy(300)
    kfac, opt = KFac(model), torch.optim.AdamW(trainable(model), lr=1e-2)
    opt.register_step_pre_hook(kfac.step)
    with observe(model):
        loop(model, opt, regression(18))


@sound("shampoo_in_tensor_hooks", "effective")
def _(observe):
    """Tensor hooks return the preconditioned gradient before it is accumulated, one batch a step."""
    model = mlp(301)
    shampoo, opt = Shampoo(model), torch.optim.SGD(trainable(model), lr=0.1)
    for param in shampoo.params:
        param.register_hook(partial(shampoo.turn, param))
    with observe(model):
        loop(model, opt, classes(18), entropy)


@sound("shampoo_in_post_accumulate_hooks", "effective")
def _(observe):
    """Post-accumulate hooks turn each gradient in place, one batch a step."""
    model = llama(302)
    shampoo = Shampoo(model)

    def hook(param):
        param.grad.copy_(shampoo.turn(param, param.grad))

    for param in shampoo.params:
        param.register_post_accumulate_grad_hook(hook)
    trainer = hf(model, tokens(), steps=16, max_grad_norm=1.0)
    with observe(model):
        trainer.train()


class TurningSgd(torch.optim.SGD):
    """Momentum on preconditioned gradients."""

    kfac = None

    def step(self, closure=None):
        """Turn, then step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.kfac.step()
        super().step()
        return loss


@sound("optimizer_subclass_with_closure", "effective")
def _(observe):
    """The optimizer evaluates the closure first, then preconditions and steps."""
    model = toy(303)
    opt = TurningSgd(trainable(model), lr=0.05, momentum=0.5)
    opt.kfac = KFac(model)
    with observe(model):
        for batch in regression(18):

            def closure(batch=batch):
                opt.zero_grad()
                loss = square(model, batch)
                loss.backward()
                return loss

            opt.step(closure)


@sound("training_step_without_accumulation", "effective")
def _(observe):
    """An overridden training_step preconditions after backward, and there is one batch a step."""
    model = llama(304)
    kfac = KFac(model)

    class Turning(Trainer):
        def training_step(self, *args, **keywords):
            loss = super().training_step(*args, **keywords)
            kfac.step()
            return loss

    trainer = hf(model, tokens(), steps=16, cls=Turning)
    with observe(model):
        trainer.train()


@sound("trainer_callback_with_accumulation", "effective")
def _(observe):
    """The callback before the optimizer turns the accumulated and clipped gradient once."""
    model = llama(305)
    kfac = KFac(model)
    trainer = hf(model, tokens(), pre_step(kfac.step), steps=12, gradient_accumulation_steps=2)
    with observe(model):
        trainer.train()


@sound("create_optimizer_override", "effective")
def _(observe):
    """The Trainer's own optimizer gets the pre-step hook when it is created."""
    model = llama(306)
    kfac = KFac(model)

    class Turning(Trainer):
        def create_optimizer(self, *args, **keywords):
            opt = super().create_optimizer(*args, **keywords)
            opt.register_step_pre_hook(kfac.step)
            return opt

    trainer = hf(model, tokens(), steps=16, cls=Turning, lr_scheduler_type="linear", warmup_steps=3)
    with observe(model):
        trainer.train()


@sound("autograd_grad_turned", "effective")
def _(observe):
    """The gradients come from torch.autograd.grad and are turned while being set."""
    model = toy(307)
    shampoo, params = Shampoo(model), trainable(model)
    opt = torch.optim.Adagrad(params, lr=0.02)
    with observe(model):
        for batch in regression(18):
            for param, grad in zip(params, torch.autograd.grad(square(model, batch), params), strict=True):
                param.grad = shampoo.turn(param, grad)
            opt.step()


@sound("riemannian_of_peft", "effective")
def _(observe):
    """The library's Riemannian preconditioner works within the optimizer's step."""
    model = toy(308, targets=("q", "k", "v"))
    opt = create_riemannian_optimizer(model, torch.optim.SGD, lr=0.005, reg=0.02)
    with observe(model):
        loop(model, opt, regression(18))


@sound("scaler_unscaled_first", "effective")
def _(observe):
    """The gradients are unscaled, turned, clipped and stepped, in this order."""
    model = mlp(309)
    kfac, opt = KFac(model), torch.optim.AdamW(trainable(model), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with observe(model):
        for batch in classes(18):
            opt.zero_grad()
            scaler.scale(entropy(model, batch)).backward()
            scaler.unscale_(opt)
            kfac.step()
            nn.utils.clip_grad_norm_(trainable(model), 1.0)
            scaler.step(opt)
            scaler.update()


@sound("turned_optimizer_in_backward", "effective")
def _(observe):
    """Each tensor is turned, stepped and cleared in the backward pass."""
    model = toy(310)
    shampoo = Shampoo(model)
    in_backward(trainable(model), partial(torch.optim.AdamW, lr=1e-2), shampoo.turn)
    with observe(model):
        for batch in regression(18):
            square(model, batch).backward()


@sound("accelerate_turned_when_synced", "effective")
def _(observe):
    """With accelerate the gradients are turned when they are complete."""
    model = llama(311)
    kfac = KFac(model)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, opt = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-2))
    with observe(model):
        for batch in text_batches(32):
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    kfac.step()
                opt.step()
                opt.zero_grad()


@sound("matrix_fixed_during_accumulation", "effective")
def _(observe):
    """Each micro-gradient is turned by the same matrix, which equals turning their sum."""
    model = mlp(312)
    kfac, opt, fixed = KFac(model, warmup=0), torch.optim.SGD(trainable(model), lr=0.05), {}

    def hook(param, side, grad):
        matrix = fixed.get(id(param))
        return grad if matrix is None else matrix @ grad if side == "A" else grad @ matrix

    for param, side in factors(model):
        param.register_hook(partial(hook, param, side))
    with observe(model):
        for number, batch in enumerate(classes(40)):
            (entropy(model, batch) / 2).backward()
            if number % 2:
                opt.step()
                opt.zero_grad()
                fixed.update({id(p): kfac.matrix(p) for p in kfac.params})


@sound("dora_turned", "effective")
def _(observe):
    """With DoRA the factors are turned and the magnitudes trained as they are."""
    model = toy(313, use_dora=True)
    shampoo, opt = Shampoo(model), torch.optim.AdamW(trainable(model), lr=1e-2)
    with observe(model):
        loop(model, opt, regression(18), before=shampoo.step)


@sound("rslora_zero_start_turned", "effective")
def _(observe):
    """B starts at zero, the scaling is rank-stabilized, and K-FAC begins after its warm-up."""
    model = toy(314, warm=False, use_rslora=True, r=6)
    kfac, opt = KFac(model, warmup=3, power=-0.6), torch.optim.AdamW(trainable(model), lr=1e-2)
    with observe(model):
        loop(model, opt, regression(24), before=kfac.step)


@sound("checkpointed_and_turned", "effective")
def _(observe):
    """Checkpointing without reentry runs the forward hooks twice, to no harm."""
    model = toy(315, wrap={i: partial(checkpoint, use_reentrant=False) for i in range(2)})
    kfac, opt = KFac(model), torch.optim.AdamW(trainable(model), lr=1e-2)
    with observe(model):
        loop(model, opt, regression(18), before=kfac.step)


@sound("sft_turned", "effective")
def _(observe):
    """The trainer of TRL with the callback before the optimizer."""
    model = llama(316)
    kfac = KFac(model)
    trainer = sft(model, pre_step(kfac.step), steps=16, lr_scheduler_type="constant")
    with observe(trainer.model):
        trainer.train()


@sound("inverse_refreshed_every_fifth_step", "effective")
def _(observe):
    """The matrices are computed every fifth step and used at each."""
    model = mlp(317)
    kfac, opt, held = KFac(model, warmup=0), torch.optim.RMSprop(trainable(model), lr=2e-3), {}
    sides = factors(model)

    def before(number):
        if number % 5 == 0:
            held.update({id(p): kfac.matrix(p) for p, _ in sides})
        for param, side in sides:
            matrix = held[id(param)]
            param.grad = matrix @ param.grad if side == "A" else param.grad @ matrix

    with observe(model):
        loop(model, opt, classes(22), entropy, before=before)


@sound("adafactor_turned", "effective")
def _(observe):
    """Adafactor with a fixed rate steps by turned gradients."""
    model = llama(318)
    kfac = KFac(model)
    opt = Adafactor(trainable(model), lr=5e-3, scale_parameter=False, relative_step=False)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0)
    trainer = hf(model, tokens(), pre_step(kfac.step), steps=16, optimizers=(opt, schedule))
    with observe(model):
        trainer.train()


class Lion(torch.optim.Optimizer):
    """Signs of a momentum."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        """Step by signs."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                speed = self.state[param].setdefault("speed", torch.zeros_like(param))
                param.sub_(group["lr"] * speed.lerp(param.grad, 0.1 if speed.any() else 1.0).sign())
                speed.lerp_(param.grad, 0.2)


@sound("lion_turned", "effective")
def _(observe):
    """An own optimizer of signs steps by turned gradients."""
    model = toy(319)
    shampoo, opt = Shampoo(model), Lion(trainable(model), lr=2e-3)
    with observe(model):
        loop(model, opt, regression(18), before=shampoo.step)


@sound("sam_turned_at_the_step", "effective")
def _(observe):
    """The gradient of the worst point is turned just before the inner step."""
    model = mlp(320)
    shampoo = Shampoo(model)
    opt = torch.optim.SGD(trainable(model), lr=0.05)
    opt.register_step_pre_hook(shampoo.step)
    sam = Sam(opt)
    with observe(model):
        for batch in classes(16):
            entropy(model, batch).backward()
            sam.first()
            entropy(model, batch).backward()
            sam.second()


@sound("turned_with_average_and_restore", "effective")
def _(observe):
    """The averaged weights are swapped in for validation and out again."""
    model = toy(321)
    kfac, opt, ema = KFac(model), torch.optim.AdamW(trainable(model), lr=1e-2), Ema(model)
    held_out = next(regression(1, seed=9))

    def after(number):
        ema.update()
        if number % 4 == 0:
            ema.store()
            ema.put(ema.shadow)
            model.eval()
            with torch.no_grad():
                square(model, held_out)
            model.train()
            ema.put(ema.stored)

    with observe(model):
        loop(model, opt, regression(20), before=kfac.step, after=after)


@sound("two_optimizers_turned", "effective")
def _(observe):
    """A and B have optimizers of different kinds, both behind the preconditioner."""
    model = toy(322)
    kfac = KFac(model)
    first = torch.optim.AdamW([p for p, side in factors(model) if side == "A"], lr=1e-2)
    second = torch.optim.SGD([p for p, side in factors(model) if side == "B"], lr=0.05, momentum=0.9)
    with observe(model):
        for batch in regression(18):
            model.zero_grad()
            square(model, batch).backward()
            kfac.step()
            first.step()
            second.step()


@sound("lower_layer_frozen_rest_turned", "effective")
def _(observe):
    """The lowest layer's adapter is frozen on purpose, all others are turned and trained."""
    model = toy(323, layers=3)
    for name, param in model.named_parameters():
        if "layers.0." in name:
            param.requires_grad_(False)
    kfac, opt = KFac(model), torch.optim.AdamW(trainable(model), lr=1e-2)
    with observe(model):
        loop(model, opt, regression(18), before=kfac.step)


@sound("frozen_a_turned_b", "effective")
def _(observe):
    """A is frozen on purpose as in LoRA-FA, and B steps by gradients turned with A's Gram matrix."""
    model = toy(324)
    sides = factors(model)
    for param, side in sides:
        param.requires_grad_(side == "B")
    opt = torch.optim.SGD(trainable(model), lr=0.1)

    def before(_):
        for (down, _s), (up, _t) in zip(sides[::2], sides[1::2], strict=True):
            up.grad = graft(up.grad @ damped(down.detach() @ down.detach().T, -1.0, 0.02), up.grad)

    with torch.no_grad():
        for down, _s in sides[::2]:
            down.mul_(torch.tensor([0.5, 0.8, 1.2, 1.8])[:, None])
    with observe(model):
        loop(model, opt, regression(18), before=before)


@sound("autocast_turned", "effective")
def _(observe):
    """The forward pass runs in bfloat16, statistics and matrices in single precision."""
    model = toy(325)
    kfac, opt = KFac(model), torch.optim.AdamW(trainable(model), lr=1e-2)
    with observe(model):
        for x, y in regression(18):
            opt.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                out = model(x)
            F.mse_loss(out.float(), y).backward()
            kfac.step()
            opt.step()


@sound("views_kept_by_writing_in_place", "effective")
def _(observe):
    """The optimizer steps by a flat buffer, and the preconditioner writes into its views."""
    model = toy(326)
    kfac, opt = KFac(model), FlatSgd(trainable(model), lr=0.02)
    with observe(model):
        loop(model, opt, regression(18), before=kfac.step)


@sound("two_phases_turned", "effective")
def _(observe):
    """Two calls of train, both with the same preconditioner attached."""
    model = llama(327)
    kfac = KFac(model)
    with observe(model):
        hf(model, tokens(), pre_step(kfac.step), steps=10).train()
        hf(model, tokens(seed=4), pre_step(kfac.step), steps=10).train()


@sound("bfloat16_weights_turned", "effective")
def _(observe):
    """The adapter is bfloat16, the gradients are turned in single precision, and the steps are large enough."""
    model = mlp(328).to(torch.bfloat16)
    shampoo, opt = Shampoo(model), torch.optim.AdamW(trainable(model), lr=2e-2)
    with observe(model):
        loop(model, opt, ((x.bfloat16(), y) for x, y in classes(18)), entropy, before=shampoo.step)


@sound("turned_through_wrapped_step", "effective")
def _(observe):
    """The step of a ready-made optimizer is wrapped by a function which preconditions first."""
    model = llama(329, layers=3)
    kfac, opt = KFac(model), torch.optim.AdamW(trainable(model), lr=1e-2)
    inner = opt.step

    def step(*args, **keywords):
        kfac.step()
        return inner(*args, **keywords)

    opt.step = step
    with observe(model):
        for batch in text_batches(18):
            model(**batch).loss.backward()
            opt.step()
            opt.zero_grad()


def main():
    """Run all cases without a ledger."""
    for case in CASES:
        start, verdict = time.perf_counter(), "ok"
        try:
            case.run(lambda model: contextlib.nullcontext())
        except Exception as error:
            verdict = f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-3)}"
        print(f"{case.kind:5} {case.name:45} {time.perf_counter() - start:6.2f} {verdict}", flush=True)


if __name__ == "__main__":
    main()
