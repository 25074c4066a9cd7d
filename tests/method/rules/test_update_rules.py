"""Oracles of the update rules: what they equal, what they leave alone, what they may not exceed, what they keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from grit_impl.config import GRITConfig
from grit_impl.errors import GRITError
from grit_impl.ledger.recorder import gradient_ledger
from grit_impl.ledger.verdict import judge_ledger
from grit_impl.method.factors import READY
from grit_impl.method.manager import GRITManager
from grit_impl.method.optimizer import GRITOptimizer
from grit_impl.method.rules.eigenbasis import SOLVED_REFRESHES

# Two ways to the same numbers in float64, over twenty steps: measured 1e-13.
SAME = 1e-10
# AdamW under a rotation of the rank space: measured 0.2 to 0.4 of the distance travelled.
TURNED = 0.05
STEPS = 20
FISHER = ["eigenbasis", "trust_region"]  # rules that need the factors; the others take no statistics
RULES = [*FISHER, "gram", "spectral"]
FAST = {"kfac_update_freq": 2, "kfac_min_samples": 1}


def optimizer(model: Any, config: GRITConfig | None, **inner: Any) -> Any:
    """AdamW with two parameter groups (LoRA+'s), inside GRIT where there is a config."""
    a, b = ([p for n, p in model.named_parameters() if p.requires_grad and side in n] for side in ("lora_A", "lora_B"))
    defaults = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-8, **inner}
    adamw = torch.optim.AdamW([{"params": a}, {"params": b, "lr": 4e-2, "weight_decay": 0.02}], **defaults)
    return adamw if config is None else GRITOptimizer(adamw, GRITManager(model, config).attach(), 0.5)


def train(model: Any, batches: list[Any], steps: int, config: GRITConfig | None, **inner: Any) -> Any:
    """Clip to 0.5 and step, with a learning rate that falls; returns the optimizer."""
    optim = optimizer(model, config, **inner)
    schedule = torch.optim.lr_scheduler.LinearLR(optim, 1.0, 0.1, steps)
    for step in range(steps):
        model(**batches[step % len(batches)]).loss.backward()
        if config is None:
            torch.nn.utils.clip_grad_norm_([p for g in optim.param_groups for p in g["params"]], 0.5)
        optim.step()
        optim.zero_grad()
        schedule.step()
    return optim


def products(model: Any) -> Tensor:
    """All B A in one vector."""
    layers = GRITManager(model).layers
    return torch.cat([(layer.b @ layer.a).detach().flatten() for layer in layers])


@pytest.fixture
def batches(sequences: Any, collate: Any) -> list[dict[str, Tensor]]:
    """Four padded batches."""
    return [collate(sequences(3, seed)) for seed in range(4)]


@pytest.fixture
def set_factors(monkeypatch: Any) -> Callable[[Callable[[Tensor], Tensor]], None]:
    """(change) -> every factor is change(factor) instead."""
    covariances = "grit_impl.method.factors.KroneckerFactors.covariances"

    def change(function: Callable[[Tensor], Tensor]) -> None:
        from grit_impl.method.factors import KroneckerFactors

        original = KroneckerFactors.covariances
        monkeypatch.setattr(covariances, lambda self: function(original(self)))

    return change


@pytest.mark.parametrize("factors", ["never ready", "diagonal"])
def test_eigenbasis_of_diagonal_factors_is_adamw(
    factors: str, llama: Any, batches: Any, adapters: Any, relative: Any, set_factors: Any
) -> None:
    """Oracle: torch.optim.AdamW on the same clipped gradients, with bias correction, decay, groups and a schedule."""
    models = [llama(dtype=torch.float64), llama(dtype=torch.float64)]
    train(models[0], batches, STEPS, None)
    samples = 10**9 if factors == "never ready" else 1
    if factors == "diagonal":
        set_factors(lambda s: torch.diag_embed(s.diagonal(dim1=-2, dim2=-1)))
    config = GRITConfig(update_rule="eigenbasis", kfac_update_freq=2, kfac_min_samples=samples)
    optim = train(models[1], batches, STEPS, config)
    assert bool((optim.manager.factors.status == READY).all()) == (factors == "diagonal")
    assert relative(adapters(models[1]), adapters(models[0])) < SAME


def test_eigenbasis_counts_each_parameters_own_steps(
    llama: Any, batches: Any, adapters: Any, relative: Any, set_factors: Any
) -> None:
    """Oracle: torch.optim.AdamW, which knows a parameter from its first gradient on and keeps its moments without one.

    One layer has no gradient in the first six steps and in every third later one; the bases are the identity.
    """
    set_factors(lambda s: torch.diag_embed(s.diagonal(dim1=-2, dim2=-1)))
    models = [llama(dtype=torch.float64), llama(dtype=torch.float64)]
    for model, config in zip(models, (None, GRITConfig(update_rule="eigenbasis", **FAST)), strict=True):
        layer = GRITManager(model).layers[1]
        optim = optimizer(model, config, betas=(0.9, 0.999))
        optim.max_grad_norm = 0.0
        for step in range(STEPS):
            model(**batches[step % 4]).loss.backward()
            if step < 6 or step % 3 == 0:
                layer.a.grad = layer.b.grad = None
            optim.step()
            optim.zero_grad()
    assert relative(adapters(models[1]), adapters(models[0])) < SAME


@pytest.mark.parametrize("rule", FISHER)
def test_a_late_first_gradient_is_a_first_gradient(rule: str, llama: Any, batches: Any, relative: Any) -> None:
    """Oracle: the run whose first step it is. One batch and no movement, so that averages are what they average."""
    directions = []
    for before in (0, 9):
        model = llama(dtype=torch.float64)
        config = GRITConfig(update_rule=rule, kfac_update_freq=1, kfac_min_samples=1)
        optim = optimizer(model, config, lr=0.0, betas=(0.9, 0.999))
        optim.param_groups[1]["lr"] = 0.0
        layer = optim.manager.layers[1]
        for step in range(before + 1):
            optim.zero_grad()
            model(**batches[0]).loss.backward()
            if step < before:
                layer.a.grad = layer.b.grad = None
            optim.step()
        directions.append(torch.cat([p.grad.flatten() for p in (layer.a, layer.b)]))
    assert relative(directions[1], directions[0]) < 1e-6


def test_eigenbasis_differs_from_adamw_otherwise(llama: Any, batches: Any, adapters: Any, relative: Any) -> None:
    """Control: with the factors as they are the same comparison fails."""
    models = [llama(dtype=torch.float64), llama(dtype=torch.float64)]
    train(models[0], batches, STEPS, None)
    train(models[1], batches, STEPS, GRITConfig(update_rule="eigenbasis", **FAST))
    assert relative(adapters(models[1]), adapters(models[0])) > TURNED


def travelled(rule: str | None, rotate: bool, llama: Any, batches: Any) -> Tensor:
    """B A after training minus before, from adapters whose rank space was rotated (B A is the same) or not."""
    model = llama(dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    for layer in GRITManager(model).layers:
        q = torch.linalg.qr(torch.randn(layer.rank, layer.rank, generator=generator, dtype=torch.float64)).Q
        if rotate:
            layer.a.data, layer.b.data = q @ layer.a.data, layer.b.data @ q.T
    start = products(model)
    train(model, batches, 10, None if rule is None else GRITConfig(update_rule=rule, **FAST), eps=1e-12)
    return products(model) - start


@pytest.mark.parametrize("rule", [None, *RULES])
def test_rotating_the_rank_space_changes_nothing(rule: str | None, llama: Any, batches: Any, relative: Any) -> None:
    """Oracle: A -> R A, B -> B R' with orthogonal R is the same model; each rule moves B A alike, AdamW does not."""
    error = relative(travelled(rule, True, llama, batches), travelled(rule, False, llama, batches))
    assert error > TURNED if rule is None else error < 1e-6


def moments(manager: GRITManager) -> list[tuple[Tensor, Tensor]]:
    """(layers, first moments in the parameters' coordinates, rank first) of each stack."""
    rule, found = manager.rule, []
    for stack, m in zip(rule.stacks, rule.exp_avg, strict=True):
        m = m if stack.side == 0 else m.mT
        found.append((stack, rule.basis[stack.side, stack.layers] @ m if hasattr(rule, "basis") else m))
    return found


def test_bases_diagonalise_the_other_sides_factor(llama: Any, batches: Any) -> None:
    """Oracle: A's basis makes S_g diagonal, B's S_a: solved at first, and iterated when the factors have turned."""
    model = llama(dtype=torch.float64)
    optim = optimizer(model, GRITConfig(update_rule="eigenbasis", kfac_update_freq=1, kfac_min_samples=1), lr=0.0)
    optim.param_groups[1]["lr"] = 0.0
    rule, factors = optim.manager.rule, optim.manager.factors

    def off_diagonal() -> float:
        diagonal = rule.basis.mT @ factors.covariances().flip(0) @ rule.basis
        rest = diagonal - torch.diag_embed(diagonal.diagonal(dim1=-2, dim2=-1))
        return float((rest.norm(dim=(-2, -1)) / diagonal.norm(dim=(-2, -1))).max())

    for _ in range(SOLVED_REFRESHES):
        model(**batches[0]).loss.backward()
        optim.step()
        optim.zero_grad()
    assert off_diagonal() < 1e-6
    turn = torch.linalg.qr(torch.randn(factors.numerator.shape, dtype=torch.float64)).Q
    factors.numerator = turn @ factors.numerator @ turn.mT
    assert off_diagonal() > 0.1
    for _ in range(300):  # linear convergence, by the ratio of neighbouring eigenvalues
        rule.refresh()
    assert off_diagonal() < 1e-3


def test_a_refresh_turns_the_moments(llama: Any, batches: Any) -> None:
    """Oracle: the first moment is the same vector in new coordinates; the second mixes by squared cosines."""
    model = llama(dtype=torch.float64)
    config = GRITConfig(update_rule="eigenbasis", kfac_update_freq=10**6, kfac_min_samples=1)
    optim = train(model, batches, 5, config)  # refreshed in steps 1, 2 and 4
    rule, factors = optim.manager.rule, optim.manager.factors
    before, old = moments(optim.manager), rule.basis.clone()
    second = [v.clone() for v in rule.exp_avg_sq]
    turn = torch.linalg.qr(torch.randn(factors.numerator.shape, dtype=torch.float64)).Q
    factors.numerator = turn @ factors.numerator @ turn.mT
    rule.refresh()
    assert not torch.allclose(rule.basis, old, atol=0.1)
    cosines = (old.mT @ rule.basis).square()
    for (stack, was), (_, now), v, new in zip(before, moments(optim.manager), second, rule.exp_avg_sq, strict=True):
        torch.testing.assert_close(now, was, rtol=1e-10, atol=1e-14)
        mixed = "nij,nid->njd" if stack.side == 0 else "nij,ndi->ndj"
        torch.testing.assert_close(new, torch.einsum(mixed, cosines[stack.side, stack.layers], v), rtol=1e-10, atol=0)


@pytest.mark.parametrize("rule", FISHER)
def test_dropped_directions_leave_the_moments(rule: str, llama: Any, batches: Any) -> None:
    """Oracle: the projectors. What a reprojection dropped is in no parameter and in no first moment."""
    config = GRITConfig(update_rule=rule, **FAST, reprojection_freq=4, reprojection_k=2)
    manager = train(llama(), batches, 4, config).manager
    assert manager.reprojection.ranks == [2] * len(manager.layers)
    for stack, m in moments(manager):
        dropped = m - manager.factors.projector[stack.side, stack.layers] @ m
        assert float(dropped.norm() / m.norm()) < 1e-5


@pytest.mark.parametrize("rule", RULES)
def test_memory_is_that_of_its_tensors(rule: str, llama: Any, batches: Any) -> None:
    """Oracle: all tensors of the rule's own state, and the formula of its docstring."""
    model = llama()
    manager = train(model, batches, 1, GRITConfig(update_rule=rule, **FAST)).manager
    tensors = [v for x in manager.rule.state_dict().values() for v in (x if isinstance(x, list) else [x])]
    found = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    formula = {
        "eigenbasis": 8 * trained + 8 * len(manager.layers) * (manager.rank**2 + 1),
        "gram": 8 * trained + 8 * len(manager.layers) * (2 * manager.rank**2 + 1),
        "spectral": 4 * trained + 8 * len(manager.layers),
        "trust_region": 4 * trained + 32 * len(manager.layers),
    }
    assert manager.rule.memory_bytes() == found == formula[rule]


@pytest.mark.parametrize("rule", RULES)
def test_ranks_of_different_size(rule: str, llama: Any, batches: Any, adapters: Any, set_factors: Any) -> None:
    """Layers of rank 2 and 4 side by side, factors of rank one: bases stay orthogonal within, and all moves."""
    set_factors(lambda s: s[..., :1] @ s[..., :1].mT)
    model = llama(rank_pattern={"v_proj": 2})
    start = adapters(model)
    manager = train(model, batches, 12, GRITConfig(update_rule=rule, **FAST)).manager
    assert adapters(model).isfinite().all()
    assert {layer.rank for layer in manager.layers} == {2, 4}
    assert bool((adapters(model) != start).all())
    if rule in ("eigenbasis", "gram"):
        for i, layer in enumerate(manager.layers):
            q = manager.rule.basis[:, i, : layer.rank, : layer.rank]
            torch.testing.assert_close(q.mT @ q, torch.eye(layer.rank).expand_as(q), atol=1e-5, rtol=0)
            assert not torch.equal(q[0], torch.eye(layer.rank))


class Kill(TrainerCallback):
    """Dies in the middle of step 4, after the checkpoint of step 3."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["pure", "hybrid"])
@pytest.mark.parametrize("rule", RULES)
def test_killed_and_resumed_is_bit_identical(
    rule: str, kind: str, llama: Any, training: Any, adapters: Any, tmp_path: Any
) -> None:
    """Oracle: the run that was never killed; with reprojection and rank adaptation on the way."""
    options = {"reprojection_freq": 2, "enable_rank_adaptation": True, "rank_adaptation_threshold": 0.7}
    # So that what differs after step 3 depends on what was saved: an iterated basis, and a scale that is kept.
    frequency = {"trust_region": 3}.get(rule, 1)
    options = options if rule in FISHER else {}
    factors = {"kfac_update_freq": frequency, "kfac_min_samples": 1}
    config = GRITConfig(update_rule=rule, **factors, **options, min_lora_rank=2)
    ends = []
    for name in ("whole", "killed"):
        arguments = {"output_dir": str(tmp_path / name), "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
        optim = {"optim": "sgd" if kind == "hybrid" else "adamw_torch"}
        trainer = training(kind, llama(lora_dropout=0.1), config, **arguments, **optim)
        if name == "killed":
            trainer.add_callback(Kill())
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            other = llama(lora_dropout=0.1)
            for parameter in (p for p in other.parameters() if p.requires_grad):
                torch.nn.init.normal_(parameter)  # adapters that the checkpoint has to replace
            trainer = training(kind, other, config, **arguments, **optim)
        trainer.train(resume_from_checkpoint=name == "killed" or None)
        ends.append(trainer)
    assert torch.equal(adapters(ends[0].model), adapters(ends[1].model))
    manager = getattr(ends[1], "grit_manager", None) or ends[1].grit_callback.manager
    assert min(manager.reprojection.ranks) < 4 or rule not in FISHER


@pytest.mark.parametrize("rule", RULES)
def test_pure_and_hybrid_are_the_same_method(rule: str, llama: Any, training: Any, adapters: Any) -> None:
    """Oracle: two ways into the loop, one mathematics, bit-identical; AdamW's place or SGD's, the same step."""
    models = []
    for kind, optim in (("pure", "adamw_torch"), ("pure", "sgd"), ("hybrid", "sgd"), ("sft-pure", "adamw_torch_fused")):
        models.append(llama())
        config = GRITConfig(update_rule=rule, **FAST, reprojection_freq=3 * (rule in FISHER), reprojection_k=3)
        training(kind, models[-1], config, optim=optim, max_grad_norm=0.1, max_steps=6, weight_decay=0.1).train()
    for model in models[1:3]:
        assert torch.equal(adapters(models[0]), adapters(model))


@pytest.mark.parametrize("rule", RULES)
def test_the_ledger_calls_it_effective(rule: str, llama: Any, training: Any) -> None:
    """No false alarm: the directions are written by GRIT, consumed by SGD, and are not the raw gradients'."""
    model = llama()
    trainer = training("pure", model, GRITConfig(update_rule=rule, **FAST), max_steps=12, learning_rate=1e-3)
    with gradient_ledger(model) as ledger:
        trainer.train()
    verdict = judge_ledger(ledger)
    assert verdict.cause == "effective", verdict
    assert verdict.numbers["replay"] < 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_a_step_that_a_scaler_skips_leaves_no_trace(rule: str, llama: Any, batches: Any, adapters: Any) -> None:
    """Oracle: the same run without the overflowed step."""
    ends = []
    for overflow in (False, True):
        model = llama()
        optim = optimizer(model, GRITConfig(update_rule=rule, **FAST))
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=10**6, backoff_factor=1.0 - 1e-9)
        for step in range(5):
            factor = float("inf") if overflow and step == 2 else 1.0
            if step == 2 and not overflow:
                continue
            scaler.scale(model(**batches[step % 4]).loss * factor).backward()
            scaler.step(optim)
            scaler.update(8.0)
            optim.zero_grad()
        ends.append(adapters(model))
    assert torch.equal(*ends)


@pytest.mark.parametrize("rule", RULES)
def test_what_cannot_be_combined_is_refused(rule: str, llama: Any, training: Any, batches: Any, tmp_path: Any) -> None:
    """One line that names the option, and what to do."""
    config = GRITConfig(update_rule=rule, **FAST)
    with pytest.raises(GRITError, match="exclude each other"):
        GRITConfig(update_rule=rule, pairing="released")
    model = llama()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for inner, name in (
        (torch.optim.SGD(parameters, 0.1, momentum=0.9), "SGD with momentum"),
        (torch.optim.AdamW(parameters, amsgrad=True), "AdamW with amsgrad"),
        (torch.optim.RMSprop(parameters), "RMSprop"),
    ):
        with pytest.raises(GRITError, match=f"{name} would be lost"):
            GRITOptimizer(inner, GRITManager(model, config))
    with pytest.raises(GRITError, match="misses LoRA parameters"):
        GRITOptimizer(torch.optim.AdamW(parameters[1:]), GRITManager(model, config))
    with pytest.raises(GRITError, match="use GRITOptimizer"):
        GRITManager(llama(), config).attach().precondition()
    with pytest.raises(GRITError, match="optim='sgd'"):
        training("hybrid", llama(), config).train()
    with pytest.raises(GRITError, match="on_optimizer_step"):
        training("hybrid", llama(), config, "on_optimizer_step", optim="sgd").train()
    saved = train(model, batches, 2, config).state_dict()
    with pytest.raises(GRITError, match="resume with the same rule"):
        optimizer(llama(), GRITConfig()).load_state_dict(saved)


def test_moments_of_eight_bits_are_not_replaced_in_silence(llama: Any, caplog: Any) -> None:
    """Oracle: the state's own size, in one line; AdamW with 32 bits is replaced without a word."""
    config, model = GRITConfig(update_rule="eigenbasis"), llama()
    for name in ("AdamW8bit", "PagedAdamW8bit", "PagedAdamW32bit", "AdamW"):
        inner = type(name, (torch.optim.AdamW,), {})([p for p in model.parameters() if p.requires_grad])
        rule = GRITOptimizer(inner, GRITManager(model, config)).manager.rule
        size = f"{name} and keeps its own state in float32: {rule.memory_bytes() / 2**20:.1f} MiB"
        assert [size in record.message for record in caplog.records] == ([True] if "8bit" in name else [])
        caplog.clear()


def test_a_rule_for_lora_alone_refuses_the_rest(llama: Any) -> None:
    """Trained parameters besides the adapters: refused by name; others treat them like AdamW."""
    for rule in RULES:
        model = llama()
        model.get_input_embeddings().weight.requires_grad_(True)
        parameters = [p for p in model.parameters() if p.requires_grad]
        inner = torch.optim.AdamW(parameters)
        if rule in ("trust_region", "spectral"):
            with pytest.raises(GRITError, match="LoRA factors only"):
                GRITOptimizer(inner, GRITManager(model, GRITConfig(update_rule=rule)))
        else:
            GRITOptimizer(inner, GRITManager(model, GRITConfig(update_rule=rule)))


class NoReads(TorchDispatchMode):
    """Fails on operators that make the host wait for a GPU, whatever is done with their result."""

    READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::linalg_eigh", "aten::_linalg_eigh")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.name().split(".")[0] not in self.READS, f"a host synchronisation: {func.name()}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", RULES)
def test_a_step_reads_nothing(rule: str, llama: Any, batches: Any) -> None:
    """After the first refreshes the host never waits: clip, refresh, directions, SGD, reprojection's enforcement."""
    model = llama()
    config = GRITConfig(update_rule=rule, kfac_update_freq=1, kfac_min_samples=1)
    optim = train(model, batches, SOLVED_REFRESHES, config)
    model(**batches[0]).loss.backward()
    start = optim.manager.step
    with NoReads():
        optim.step()
    assert optim.manager.step == start + 1
    with pytest.raises(AssertionError, match="host synchronisation"), NoReads():
        torch.linalg.eigh(torch.eye(2))


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
def test_a_step_reads_nothing_on_a_gpu(rule: str, llama: Any, batches: Any) -> None:
    """Oracle: CUDA's own debug mode, which raises on every synchronising call."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU; found none")
    model = llama().cuda()
    batches = [{name: value.cuda() for name, value in batch.items()} for batch in batches]
    config = GRITConfig(update_rule=rule, kfac_update_freq=1, kfac_min_samples=1)
    optim = train(model, batches, SOLVED_REFRESHES, config)
    for batch in batches[:2]:
        model(**batch).loss.backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optim.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        optim.zero_grad()
