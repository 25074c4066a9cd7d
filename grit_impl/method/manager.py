"""GRITManager: factors -> inverses -> update rule -> reprojection -> rank adaptation, for one model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from grit_impl.config import GRITConfig
from grit_impl.errors import GRITError
from grit_impl.method.capture.completeness import completeness_errors
from grit_impl.method.capture.fused import FusedAdapters, FusedTap
from grit_impl.method.capture.modules import LossTap, ModuleTap
from grit_impl.method.capture.rank_statistics import RankStatistics
from grit_impl.method.capture.sites import loaded_sites
from grit_impl.method.engines import Averaging, is_sharded, require_same_layers, require_whole
from grit_impl.method.factors import READY, STATUS, KroneckerFactors, world_size
from grit_impl.method.layers import find_layers
from grit_impl.method.reprojection import Reprojection
from grit_impl.method.rules import rule_class
from grit_impl.method.rules.base import UpdateRule
from grit_impl.method.spectra import SpectrumHistory, effective_rank, eigvalsh
from grit_impl.method.stacks import A, layer_stacks


class GRITManager:
    """Everything GRIT keeps about a model.

    Attach it, train, and call `before_step` once per optimizer step when the gradients are ready, then `after_step`
    when the parameters have moved. `GRITOptimizer`, `GRITTrainer` and `GRITCallback` do this.

    Args:
        model: A PEFT model with LoRA adapters.
        config: The hyperparameters.
        rule: An update rule instead of the configuration's, which has no name there.

    Attributes:
        layers: The layers, in order; every stacked tensor uses this order.
        checks_completeness: Compare the statistics with the gradients once. Only where `precondition` runs before
            the parameters move: the comparison needs the weights that the gradients belong to.
        step: Optimizer steps preconditioned so far.
        applied: (2, L) optimizer steps in which the gradient of A (0) or B (1) met a ready inverse.
        completeness: (L,) relative errors of the check that every token of every layer was seen; None: not yet done.

    Raises:
        GRITError: the model has no LoRA layer, or one of a kind that GRIT does not support.
    """

    def __init__(
        self, model: nn.Module, config: GRITConfig | None = None, rule: type[UpdateRule] | None = None
    ) -> None:
        self.model, self.config = model, config or GRITConfig()
        self.checks_completeness = True
        self.layers = find_layers(model)
        ranks = [layer.rank for layer in self.layers]
        self.rank = max(ranks)
        device = self.layers[0].a.device
        # float32 whatever the model's precision, unless that is higher.
        dtype = torch.promote_types(torch.float32, self.layers[0].a.dtype)
        self.statistics = RankStatistics(len(ranks), self.rank, device, dtype)
        self.factors = KroneckerFactors(ranks, self.config, device, dtype)
        self._stacks = layer_stacks(self.layers)
        self.reprojection = Reprojection(self.layers, self.config, self.factors)
        self.rule = (rule or rule_class(self.config.update_rule))(self.config, self.layers, self.factors)
        self.step = 0
        # (2, L): optimizer steps in which the gradient of A (0) or B (1) was multiplied by a ready inverse.
        self.applied = torch.zeros(2, len(ranks), device=device)
        self.completeness: Tensor | None = None
        self._spectra = SpectrumHistory(self.config.log_top_eigs)
        self._window_open = False
        # What an engine leaves to us; None: not known before the first forward, when the model is what will be trained.
        self._averaging: Averaging | None = None
        self._engine_known, self._same_layers = False, False
        self._loss_tokens: float | None = None
        self._taps: list[Any] = []
        self._fused: FusedAdapters | None = None

    @property
    def loss_tokens(self) -> float | None:
        """Tokens that the loss is averaged over, for training loops whose model returns no loss; None: found out."""
        return self._loss_tokens

    @loss_tokens.setter
    def loss_tokens(self, value: float | None) -> None:
        self._loss_tokens = value
        for tap in self._taps:
            if isinstance(tap, LossTap):
                tap.loss_tokens = value

    def attach(self) -> GRITManager:
        """Put the hooks in place; a second call does nothing, and another manager of this model is detached."""
        if not self._taps:
            previous = getattr(self.model, "_grit_manager", None)
            if isinstance(previous, GRITManager):
                previous.detach()
            require_whole(self.model, self.layers)
            if not self._same_layers:
                require_same_layers(self.layers)
                self._same_layers = True
            loss = LossTap(self.model, self._before_forward, self._backward_begins)
            loss.loss_tokens = self._loss_tokens
            self._taps = [loss]
            if self.rule.captures:
                modules = [layer.module.lora_A[layer.adapter] for layer in self.layers]
                self._taps += [ModuleTap(modules, self.statistics, loss), *self._fused_taps(loss)]
            # A pointer that observers may read; nothing in training depends on it.
            self.model._grit_manager = self  # type: ignore[assignment]
        return self

    def _fused_taps(self, loss: LossTap) -> list[FusedTap]:
        """Inside the fused functions of libraries that are loaded, which do not call the modules."""
        sites = loaded_sites()
        if not sites:
            return []
        if self._fused is None:
            self._fused = FusedAdapters(self.layers)
        self._fused.refresh()
        return [FusedTap(self._fused, self.statistics, loss, sites)]

    def detach(self) -> None:
        """Remove the hooks; factors and counts stay."""
        for tap in self._taps:
            tap.remove()
        self._taps = []

    def begin_window(self) -> None:
        """A new accumulation window: forget statistics of gradients that nobody stepped on."""
        self.statistics.reset()
        self.statistics.collecting = self.rule.captures and self.step % self.config.grit_cov_update_freq == 0
        self.statistics.check_completeness = self.checks_completeness and self.completeness is None
        self._window_open = True

    def _before_forward(self) -> None:
        """At each forward: gradients that are gone mean that a new window begins (a scaler may have skipped a step)."""
        if not self._engine_known:
            self._averaging = Averaging(self.model) if world_size() > 1 and is_sharded(self.model) else None
            self._engine_known = True
        self.statistics.flush()
        if self._fused is not None:
            self._fused.refresh()  # adapters may have moved, and one to another's old place
        if not self._window_open or self._no_gradients():
            self.begin_window()

    def _backward_begins(self) -> None:
        if self._averaging is not None:
            self._averaging.backward_begins()

    def before_step(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> None:
        """Where an optimizer is about to step: precondition and clip, in the update rule's order.

        Args:
            parameters: Whose gradients' total norm is clipped.
            max_norm: To what; None or 0: no clipping.

        Raises:
            GRITError: no LoRA layer has a gradient, so that GRIT would do nothing; or as `precondition`.
        """
        if self._averaging is not None:
            self._averaging.finish()
        if self._no_gradients():
            require_whole(self.model, self.layers)  # an engine that has taken them says more
            raise GRITError("GRIT found no gradient on any of its LoRA layers: step after backward, before zero_grad")
        if not self.rule.whole_step:
            self.precondition()
        if max_norm:
            torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        if self.rule.whole_step:  # it starts from gradients that are clipped, as AdamW does
            self.precondition()

    @torch.no_grad()
    def precondition(self) -> None:
        """Update the factors and replace the gradients of all layers, in place.

        Once per optimizer step, after the last backward; `before_step` does it. Waits for the device only in the first
        steps, until `completeness` is known.

        Raises:
            GRITError: GRIT is detached, its adapter is not the active one, its update rule has no optimizer, or the
                statistics do not add up to the gradients (a layer was bypassed).
        """
        self._check_active()
        if self._averaging is not None:
            self._averaging.finish()
        if not self.step:  # an engine may have taken the model since `attach`; nothing has moved yet
            require_whole(self.model, self.layers)
        if not self._window_open:  # no forward was seen: the gradients of one that was not must not pass unchecked
            self.begin_window()
        if self.statistics.collecting:
            if self.statistics.check_completeness:
                errors = completeness_errors(self.statistics, self.layers)
                # At a fused function's first call other products count than later: the later ones are to be checked.
                self.completeness = None if self._fused is not None and self._fused.tried else errors
            if self._fused is not None:
                self._fused.tried = False
            self.factors.absorb(self.statistics)
        self.statistics.reset()
        self._window_open = False
        self.step += 1
        # One all-reduce per inversion; a regulariser reads the factors at every step.
        due, captures = self._inversion_due(), self.rule.captures
        if world_size() > 1 and captures and (due or self.config.lambda_kfac):
            self.factors.merge()
        if due and captures:
            self.factors.invert()
            self.factors.inversions += 1
            if self.config.log_fisher_spectrum:
                self._spectra.note(self.step, self.factors.covariances())
        self._regularise()
        warm = self.step > self.config.ng_warmup_steps and (self.factors.inversions > 0 or not captures)
        self.rule.update(warm=warm, refresh=warm and due)
        if (warm or self.rule.whole_step) and not self._no_gradients():
            ready = self.factors.status == READY if captures else torch.ones_like(self.factors.status)
            self.applied += torch.stack([ready[side] for side in self.rule.sides])

    def _inversion_due(self) -> bool:
        # A rule that keeps moments needs its basis before they fill: steps 1, 2, 4, 8, ... until the first regular one.
        early = self.rule.whole_step and self.step & (self.step - 1) == 0 and self.step < self.config.kfac_update_freq
        return early or self.step % self.config.kfac_update_freq == 0

    def _check_active(self) -> None:
        if not self._taps:
            raise GRITError(
                "GRIT is not attached to the model (another GRITManager may have taken over): call attach()"
            )
        for layer in self.layers:
            if layer.adapter not in layer.module.active_adapters:
                raise GRITError(
                    f"GRIT was set up for adapter {layer.adapter!r}, which is no longer active in {layer.path}: switch "
                    "back before the optimizer steps, or build a GRITManager for the adapter that is trained now"
                )
        self.rule.check_ready()

    def _no_gradients(self) -> bool:
        return all(layer.a.grad is None and layer.b.grad is None for layer in self.layers)

    def _regularise(self) -> None:
        """Add the gradient of lambda_kfac [tr(A' S_g A) + tr(B S_a B')] + lambda_reproj [|(I-P)A|^2 + |B(I-P)|^2]."""
        config = self.config
        if not (config.lambda_kfac or config.lambda_reproj):
            return
        warm = min(1.0, self.step / config.regularizer_warmup_steps) if config.regularizer_warmup_steps else 1.0
        kfac, reproj = 2 * warm * config.lambda_kfac, 2 * warm * config.lambda_reproj
        s, p = self.factors.covariances(), self.factors.projector
        # Gradients of both terms are one r x r matrix times A (from the left) or B (from the right).
        matrices = kfac * s.flip(0) + reproj * (self.factors.eye - p)
        for stack in self._stacks:
            stack.add(stack.multiply(stack.values(), stack.of(matrices[stack.side or A])))

    def after_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """After the parameters have moved: reproject when due, and keep dropped directions dropped.

        Args:
            optimizer: The optimizer whose moments are projected with the parameters.
        """
        if self._spectra.full:
            self._spectra.rows()
        if self.reprojection.due(self.step) and self.factors.inversions:
            self.reprojection.reproject(self.step, optimizer)
            self.rule.project()
        else:
            self.reprojection.enforce()

    def factor_report(self) -> dict[str, Any]:
        """The state of every factor, for people and for the ledger; waits for the device.

        Returns:
            `step`, `inversions`, `coverage` (share of A and B gradients per step that a ready inverse changed),
            `statuses` (counts), and `layers`: per layer name, samples (tokens), trace, condition number of the
            damped factor, distance from c x identity (0: no preconditioning), effective rank, rank kept, status. A rule
            that takes no statistics has no layers to report.
        """
        coverage = float(self.applied.sum()) / (max(1, self.step) * 2 * len(self.layers))
        if not self.rule.captures:
            known = {"step": self.step, "inversions": 0, "reprojections": 0, "coverage": coverage}
            return {**known, "completeness_error": None, "statuses": {}, "layers": []}
        s = self.factors.covariances()
        damped = s + self.factors.damping(s)[..., None, None] * self.factors.eye
        # One copy to the host for all layers: each one waits for the device.
        traces = s.diagonal(dim1=-2, dim2=-1).sum(-1).cpu()
        effective = effective_rank(eigvalsh(s))
        damped, inverse, status = damped.cpu().double(), self.factors.inverse.cpu().double(), self.factors.status.cpu()
        counts = torch.stack([self.factors.seen, self.factors.dropped, *self.applied]).T.tolist()
        rows = [
            {
                "name": f"{layer.path}:{layer.adapter}",
                "samples": seen,
                "rank": self.reprojection.ranks[i],
                "dropped_steps": dropped,
                "applied_a": applied_a,
                "applied_b": applied_b,
            }
            for i, (layer, (seen, dropped, applied_a, applied_b)) in enumerate(zip(self.layers, counts, strict=True))
        ]
        for rank in {layer.rank for layer in self.layers}:
            mine = [i for i, layer in enumerate(self.layers) if layer.rank == rank]
            eye = torch.eye(rank, dtype=torch.float64)
            for side, key in ((0, "a"), (1, "g")):
                values = eigvalsh(damped[side, mine, :rank, :rank])
                kept = inverse[side, mine, :rank, :rank]
                mean = kept.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
                distances = torch.linalg.matrix_norm(kept / mean - eye) / eye.norm()
                conditions = torch.where(values[:, 0] > 0, values[:, -1] / values[:, 0], torch.inf)
                for i, condition, distance in zip(mine, conditions.tolist(), distances.tolist(), strict=True):
                    rows[i][f"trace_{key}"] = float(traces[side, i])
                    rows[i][f"condition_{key}"] = condition
                    rows[i][f"identity_distance_{key}"] = distance
                    rows[i][f"effective_rank_{key}"] = float(effective[side, i])
                    rows[i][f"status_{key}"] = STATUS[int(status[side, i])]
        for row in rows:
            both = {row["status_a"], row["status_g"]}
            row["status"] = "ready" if both == {"ready"} else next(x for x in STATUS[1:] if x in both)
        return {
            "step": self.step,
            "inversions": self.factors.inversions,
            "reprojections": self.reprojection.count,
            "coverage": coverage,
            "completeness_error": float(self.completeness.max()) if self.completeness is not None else None,
            "statuses": dict(Counter(row["status"] for row in rows)),
            "layers": rows,
        }

    def spectrum_history(self) -> list[dict[str, Any]]:
        """The factors' spectra, a row per inversion (`SpectrumHistory.rows`); waits for the device."""
        return self._spectra.rows()

    def state_dict(self) -> dict[str, Any]:
        """GRIT's state for a checkpoint: tensors and plain values only."""
        return {
            "layers": [f"{layer.path}:{layer.adapter}" for layer in self.layers],
            "step": self.step,
            "applied": self.applied,
            "factors": self.factors.state_dict(),
            "reprojection": self.reprojection.state_dict(),
            "completeness": self.completeness,
            "spectra": self.spectrum_history(),
            "update_rule": self.config.update_rule,
            "rule": self.rule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a checkpoint.

        Raises:
            GRITError: the checkpoint is of a model with other LoRA layers.
        """
        names = [f"{layer.path}:{layer.adapter}" for layer in self.layers]
        if state["layers"] != names:
            odd = min(set(state["layers"]) ^ set(names), default="their order")
            raise GRITError(f"the GRIT checkpoint does not fit this model: they differ in {odd}")
        if state["update_rule"] != self.config.update_rule:
            raise GRITError(
                f"the GRIT checkpoint was written with update_rule = {state['update_rule']!r}, this run has "
                f"{self.config.update_rule!r}: resume with the same rule"
            )
        self.rule.load_state_dict(state["rule"])
        self.step = state["step"]
        self.applied = state["applied"].to(self.applied.device).clone()
        self.factors.load_state_dict(state["factors"])
        self.reprojection.load_state_dict(state["reprojection"])
        self.completeness = state["completeness"]
        self._spectra = SpectrumHistory(self.config.log_top_eigs, state["spectra"])
