"""Statistics from fused LoRA functions, on stand-ins of Unsloth's (`fused_functions`)."""

from __future__ import annotations

import copy
import gc
import sys
import types
import weakref

import fused_functions
import pytest
import torch
from fused_functions import FUNCTIONS, MODULE, WIDTH, Decoder
from peft import LoraConfig, get_peft_model

from grit_impl.config import GRITConfig
from grit_impl.cost.bench import forget_grit
from grit_impl.errors import GRITError
from grit_impl.method.capture.fused import FusedAdapters, FusedTap
from grit_impl.method.capture.products import Products
from grit_impl.method.manager import GRITManager
from grit_impl.recipes.sabotage import ModulesOnly

RANK = 3
# Both paths run in float64 and add in other orders.
SAME = 1e-12


@pytest.fixture
def fast_lora(monkeypatch):
    """A stand-in for Unsloth's module, loaded as Unsloth's would be."""
    module = types.ModuleType(MODULE)
    for name in FUNCTIONS:
        setattr(module, name, getattr(fused_functions, name))
    monkeypatch.setitem(sys.modules, MODULE, module)
    return module


def _model(layers=1):
    torch.manual_seed(0)
    model = get_peft_model(Decoder(layers).double(), LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=".*_proj"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float64) * 0.3
    return model


def _loss(model, fused, generator, padding=2):
    model.base_model.model.fused = fused
    ids = torch.randint(1, 30, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 7 - padding :] = 0
    return model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))["loss"]


def _backward(model, fused, micro_batches=2, factor=1):
    generator = torch.Generator().manual_seed(1)
    for _ in range(micro_batches):
        (_loss(model, fused, generator) * factor / micro_batches).backward()


def _sums(fused, fast_lora):
    model = _model()
    manager = GRITManager(model, GRITConfig(kfac_min_samples=1)).attach()
    _backward(model, fused)
    statistics = manager.statistics
    found = [x.clone() for x in (statistics.sum_a, statistics.sum_g, statistics.tokens)]
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    manager.precondition()
    assert manager.completeness is None or not fused  # the first calls took their products twice
    model.zero_grad()
    _backward(model, fused)
    manager.precondition()
    manager.detach()
    return found, gradients, manager


@pytest.mark.parametrize("noted", [True, False], ids=["products noted", "products taken again"])
def test_fused_statistics_equal_the_modules(fast_lora, monkeypatch, noted):
    """Oracle: the same weights and batches through peft's modules; all seven projections, padding left out.

    Whether the functions multiply as GRIT can note it, or in a way that makes it multiply for itself.
    """
    if not noted:
        monkeypatch.setattr(fused_functions, "gradients", fused_functions.gradients_otherwise)
    fused, fused_gradients, manager = _sums(True, fast_lora)
    modules, module_gradients, _ = _sums(False, fast_lora)
    for ours, truth in zip((*fused, *fused_gradients), (*modules, *module_gradients), strict=True):
        assert (ours - truth).norm() <= SAME * truth.norm()
    assert float(manager.completeness.max()) < 1e-6
    assert {prepared.products.complete for prepared in manager._fused._prepared.values()} == {noted}


@pytest.mark.parametrize("order", ["each in turn", "first, second", "second, first", "sum"])
def test_two_forwards_before_a_backward(fast_lora, order):
    """Oracle: peft's modules, a batch at a time. Each pass has a padding of its own."""
    found = []
    for fused in (False, True):
        model, generator = _model(), torch.Generator().manual_seed(1)
        manager = GRITManager(model, GRITConfig()).attach()
        losses = []
        for padding in (2, 4):
            losses.append(_loss(model, fused, generator, padding))
            if not fused or order == "each in turn":
                losses[-1].backward()
        if fused and order == "sum":
            sum(losses).backward()
        elif fused and order != "each in turn":
            for loss in losses if order == "first, second" else losses[::-1]:
                loss.backward()
        found.append((manager.statistics.sums.clone(), manager.statistics.tokens.clone()))
        manager.detach()
    for truth, ours in zip(*found, strict=True):
        assert (ours - truth).norm() <= SAME * truth.norm()


def test_products_are_taken_once(fast_lora, monkeypatch):
    """Oracle: a counter. In its first call each function shows what it multiplies; from then on nothing is repeated."""
    model, taken = _model(), []
    original = FusedTap._take
    monkeypatch.setattr(FusedTap, "_take", lambda self, *rest: (taken.append(1), original(self, *rest)))
    manager = GRITManager(model, GRITConfig()).attach()
    _backward(model, fused=True, micro_batches=3)
    assert len(taken) == len(FUNCTIONS)
    manager.detach()


def test_gradients_keep_every_bit(fast_lora):
    """Oracle: the functions without GRIT: the operands change no gradient, in the first call or later ones."""
    found = []
    for attached in (False, True):
        model = _model()
        if attached:
            GRITManager(model, GRITConfig()).attach()
        _backward(model, fused=True, micro_batches=3)
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for without, ours in zip(*found, strict=True):
        assert torch.equal(without, ours)
        assert type(ours) is torch.Tensor  # no operand escapes


def test_noted_products_are_checked(fast_lora, monkeypatch):
    """Oracle: noise. First calls are counted by other products; what is noted afterwards meets the gradients too."""
    model = _model()
    manager = GRITManager(model, GRITConfig(kfac_min_samples=1)).attach()
    end = Products.end
    monkeypatch.setattr(Products, "end", lambda self: [x if x is None else torch.randn_like(x) for x in end(self)])
    _backward(model, fused=True, micro_batches=1)
    manager.precondition()
    model.zero_grad()
    _backward(model, fused=True, micro_batches=1)
    with pytest.raises(GRITError, match="do not add up"):
        manager.precondition()
    manager.detach()


def test_a_copy_after_fused_training(fast_lora):
    """Oracle: the original: a copy of the model trains on, with operands of its own, to the same statistics."""
    model = _model()
    manager = GRITManager(model, GRITConfig()).attach()
    _backward(model, fused=True)
    manager.detach()
    twin = copy.deepcopy(model)
    sums = []
    for each in (model, twin):
        each.zero_grad()
        manager = GRITManager(each, GRITConfig()).attach()
        _backward(each, fused=True)
        sums.append(manager.statistics.sums.clone())
        manager.detach()
    assert torch.equal(*sums)


def test_the_next_call_after_an_error_is_right(fast_lora, monkeypatch):
    """Oracle: sums without the error: what a call left behind that did not finish is not taken for the next one's."""
    truth, *_ = _sums(True, fast_lora)
    model = _model()
    manager = GRITManager(model, GRITConfig(kfac_min_samples=1)).attach()
    _backward(model, fused=True)

    def failing(*_):
        raise ValueError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(fused_functions, "_swiglu_backward", failing)
        with pytest.raises(ValueError, match="out of memory"):
            _backward(model, fused=True, factor=3)
    model.zero_grad()
    manager.begin_window()
    _backward(model, fused=True)
    for ours, expected in zip((manager.statistics.sum_a, manager.statistics.sum_g), truth, strict=False):
        assert (ours - expected).norm() <= SAME * expected.norm()
    manager.detach()


def test_gradients_in_another_layout_are_noted(fast_lora, monkeypatch):
    """Oracle: peft's modules. Where a function would copy its dL/dy, GRIT copies it first."""
    monkeypatch.setattr(Decoder, "forward", _transposing(Decoder.forward))
    fused, _, manager = _sums(True, fast_lora)
    modules, *_ = _sums(False, fast_lora)
    for ours, truth in zip(fused, modules, strict=True):
        assert (ours - truth).norm() <= SAME * truth.norm()
    assert all(prepared.products.complete for prepared in manager._fused._prepared.values())


def _transposing(forward):
    """The gradient at the functions' outputs comes from a transposed tensor."""

    class Turn(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy.transpose(0, 1).contiguous().transpose(0, 1)

    def turned(self, **inputs):
        module = sys.modules[MODULE]
        applies = {name: getattr(module, name).apply for name in FUNCTIONS}
        with pytest.MonkeyPatch.context() as patch:
            for name, apply in applies.items():

                def turning(*arguments, apply=apply):
                    out = apply(*arguments)
                    return tuple(map(Turn.apply, out)) if isinstance(out, tuple) else Turn.apply(out)

                patch.setattr(getattr(module, name), "apply", turning)
            return forward(self, **inputs)

    return turned


def test_a_function_that_changes_its_mind(fast_lora, monkeypatch):
    """Oracle: x is overwritten by then, so that products which are missing cannot be made up for: an error."""
    model = _model()
    manager = GRITManager(model, GRITConfig()).attach()
    _backward(model, fused=True, micro_batches=1)
    monkeypatch.setattr(fused_functions, "gradients", fused_functions.gradients_otherwise)
    with pytest.raises(GRITError, match="took other products"):
        _backward(model, fused=True, micro_batches=1)
    manager.detach()


def test_module_hooks_alone_starve(fast_lora):
    """Oracle: the seed experiment: fused functions never call the modules, and the completeness check says so."""
    model = _model()
    blind = ModulesOnly(model, GRITConfig()).attach()
    _backward(model, fused=True)
    assert float(blind.statistics.tokens.sum()) == 0
    blind.detach()
    checking = GRITManager(model, GRITConfig()).attach()
    for name in FUNCTIONS:  # as a version of Unsloth would that imports them elsewhere
        setattr(fast_lora, name, getattr(fused_functions, name))
    model.zero_grad()
    _backward(model, fused=True)
    with pytest.raises(GRITError, match="do not add up"):
        checking.precondition()
    checking.detach()


def test_adapters_that_changed_places_while_detached(fast_lora):
    """Oracle: peft's modules, after the weights of two layers have swapped their places in memory."""
    found = {}
    for fused in (True, False):
        model = _model()
        manager = GRITManager(model, GRITConfig(kfac_min_samples=1)).attach()
        _backward(model, fused)
        manager.detach()
        q, o = (layer.a for layer in manager.layers if layer.path.endswith(("q_proj", "o_proj")))
        q.data, o.data = o.data, q.data
        manager.attach().begin_window()
        _backward(model, fused)
        found[fused] = manager.statistics.sums.clone()
        manager.detach()
    assert (found[True] - found[False]).norm() <= SAME * found[False].norm()


def test_each_set_of_adapters_is_prepared_apart():
    """Oracle: the layers that were given. The same q with k, then with v: nobody may take the second for the first."""
    layers = GRITManager(_model(), GRITConfig()).layers[:3]
    adapters, none = FusedAdapters(layers), (None, None)
    q, k, v = ((layer.a, layer.b) for layer in layers)
    for given, expected in (((*q, *k, *none), [0, 1]), ((*q, *none, *v), [0, 2]), ((*q, *k, *v), [0, 1, 2])):
        with torch.no_grad():
            prepared = adapters.cast(given, torch.float64)
        assert [layer for _, layer in prepared.layers] == expected
        assert [copy is None for copy in prepared.cast] == [w is None for w in given]
    assert len(adapters.cast((None,) * 6, torch.float64).cast) == 6
    assert len(adapters.cast((None,) * 2, torch.float64).cast) == 2


def test_functions_are_put_back(fast_lora):
    """Oracle: identity of the module's attributes before and after."""
    manager = GRITManager(_model(), GRITConfig()).attach()
    originals = [getattr(fused_functions, name) for name in FUNCTIONS]
    assert fast_lora.LoRA_W not in originals
    manager.detach()
    assert [getattr(fast_lora, name) for name in FUNCTIONS] == originals


def test_unknown_unsloth_is_refused_at_the_start(fast_lora):
    """Oracle: a module without one of the functions cannot be instrumented, and never gets the identity instead."""
    del fast_lora.LoRA_QKV
    with pytest.raises(GRITError, match="cannot take statistics from unsloth"):
        GRITManager(_model(), GRITConfig()).attach()


def test_activations_are_freed_without_the_garbage_collector(fast_lora):
    """Oracle: with the collector off, as many tensors are alive after a backward with statistics as before it."""
    model = _model()
    manager = GRITManager(model, GRITConfig()).attach()

    def alive():
        return sum(isinstance(o, torch.Tensor) and o.shape[-1:] == (WIDTH,) and o.dim() > 1 for o in gc.get_objects())

    _backward(model, fused=True)  # the gradients exist from here on
    gc.collect()
    gc.disable()
    try:
        before = alive()
        _backward(model, fused=True)
        assert alive() == before
    finally:
        gc.enable()
        manager.detach()


def test_layers_with_inputs_of_their_own(fast_lora, monkeypatch):
    """Oracle: where dropout gives every layer another x, products are taken one by one, and the sums are the same."""
    monkeypatch.setattr(fused_functions, "gradients", fused_functions.gradients_otherwise)
    together, *_ = _sums(True, fast_lora)
    monkeypatch.setattr("grit_impl.method.capture.fused.dropped", lambda dropout, ctx, x, masks, i: x.clone())
    apart, *_ = _sums(True, fast_lora)
    for ours, truth in zip(apart, together, strict=True):
        assert (ours - truth).norm() <= SAME * truth.norm()


def test_a_forgotten_manager_holds_no_memory(fast_lora):
    """Oracle: weak references. What stands for the adapters in the functions is made of cycles, and holds copies."""
    model = _model()
    manager = GRITManager(model, GRITConfig(kfac_min_samples=1)).attach()
    _backward(model, fused=True)
    manager.precondition()
    left = [weakref.ref(manager.statistics), weakref.ref(next(iter(manager._fused._prepared.values())).products)]
    gc.disable()
    try:
        del manager
        forget_grit(model)
        assert [each() for each in left] == [None, None]
    finally:
        gc.enable()
    forget_grit(model)
    forget_grit(None)
