"""A session walks a model through measure -> select -> reset -> guard -> finish, in that order,
each once."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from deepclean_hooks import ranks
from deepclean_hooks.data import losses
from deepclean_hooks.data.samples import Data, Samples, refuse_shared_indices, samples_of
from deepclean_hooks.guard.guard import Guard, NormStatistics, require_holdable
from deepclean_hooks.guard.norm_statistics import by_share, require_choice
from deepclean_hooks.measure import dead
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.measure.request import Measured, measured, require_of_use
from deepclean_hooks.measure.usable import require_usable
from deepclean_hooks.methods.method import Mask, Method
from deepclean_hooks.metrics.evaluate import several
from deepclean_hooks.metrics.evaluation import Evaluation
from deepclean_hooks.metrics.forgetting import Forgetting, forgetting
from deepclean_hooks.metrics.scoring import require_comparable, scored
from deepclean_hooks.model import no_trace
from deepclean_hooks.model.wrappers import require_trainable, unwrap
from deepclean_hooks.options import Options, require_known
from deepclean_hooks.ranks import fsdp, shards
from deepclean_hooks.report import forgotten as identifiers
from deepclean_hooks.report.layers import layers_of
from deepclean_hooks.report.report import Report
from deepclean_hooks.run import entry, findings, terms
from deepclean_hooks.run.phases import (
    Failed,
    Finished,
    Guarded,
    New,
    WasMeasured,
    WasReset,
    WasSelected,
)
from deepclean_hooks.run.restored import restored
from deepclean_hooks.run.resuming import method_of, unpacked
from deepclean_hooks.run.standing import Standing
from deepclean_hooks.run.writing import put_back_on_error
from deepclean_hooks.stored import bits, checkpoint, masks
from deepclean_hooks.stored.originals import Originals
from deepclean_hooks.tuning import gamma_auto
from deepclean_hooks.tuning.gamma_sweep import grid


class Session(Standing):
    """One unlearning run of one model by one method; `report` can be read at any time.

    `deepclean_hooks.options.Options` says what each option is.
    """

    def __init__(self, model: nn.Module, method: Method, **options: Unpack[Options]) -> None:
        """Raises TypeError or ValueError for bad settings, RuntimeError for a model that another
        session holds."""
        require_known(options, "Session")
        if not isinstance(method, Method):
            raise TypeError(f"method must be a method such as DeepClean(gamma=2.0), got {method!r}")
        wanted = options.get("norm_statistics")
        norm_statistics: NormStatistics = "update" if wanted is None else wanted
        require_choice(norm_statistics)
        self._by_share = wanted is None
        inner = unwrap(model)
        fsdp.reshard(inner)
        require_trainable(inner)
        bits.require_comparable(dict(inner.named_parameters()))
        require_holdable(inner)
        self.loss_fn: losses.LossFn = options.get("loss_fn") or losses.cross_entropy
        self.gold, self.progress = options.get("gold"), options.get("progress", True)
        several(self.gold)
        self.scores, self.dead_count = options.get("scores", True), options.get("dead_count", True)
        self._reading: dict[str, Any] = {
            "batch_size": options.get("batch_size"),
            "collate_fn": options.get("collate_fn"),
        }
        self._sets: dict[str, Samples] = {}
        tests = {"test": options.get("test"), "forget_test": options.get("forget_test")}
        for name, data in tests.items():
            if data is not None:
                self._sets[name] = samples_of(data, name=name, **self._reading)
        super().__init__(model, method, norm_statistics)

    # ------------------------------------------------------------------ the phases

    def measure(self, forget: Data, retain: Data | Measurement) -> Session:
        """Measures D_f and D_r; changes nothing.

        `retain` may be a stored measurement of this very model, such as a FisherDiagonal: of D_r,
        or of the whole training set, from which the forget samples are then subtracted, so that
        only D_f is walked. One of other weights is taken only if `of_earlier_weights` says so.
        """
        self._expect(New, "measure")
        self._require_same_settings("measure()")
        ranks.refuse_lossy_reduction(self.model)
        entry.require_shardable(self.model, self.method)
        before = checkpoint.digests_of(self.model)
        digest = ranks.gather(bits.combined(before))[0]  # rank 0's buffers serve all
        if isinstance(retain, Measurement):
            require_of_use(self.method, retain, self.model, digest)
        else:
            self._name_sets(retain=retain)
        self._name_sets(forget=forget)
        entry.require_same_samples(self._sets)
        with self._account.timed("choose gamma" if self.method.is_open else "fisher"):
            trials = gamma_auto.trials_of(self.method, self.model, self._sets, **self._reading)
        if self.scores:
            self._score_before()
        with self._account.timed("fisher"):
            both = measured(
                self.method,
                self.model,
                self._sets["forget"],
                retain if isinstance(retain, Measurement) else self._sets["retain"],
                loss_fn=self.loss_fn,
                progress=self.progress,
                model_digest=digest,
            )
        self._account.report = replace(
            self.report,
            model_before=bits.combined(before),
            checkpoint_before=before,
            tied=checkpoint.tied(self.model),
            forgotten=identifiers.salted(both.forget.samples.tolist()),
            forget_samples=len(both.forget.samples),
            retain_samples=both.retain_samples,
            overlapping_samples=both.shared,
            measurement={"forget": both.forget.settings, "retain": both.retain.settings},
        )
        self._account.warn(findings.of_duplicates(both))
        self._account.note(findings.of_repeats(both))
        self._account.note(findings.of_changing_samples(both))  # warned of while measuring
        self._enter(WasMeasured(both, trials))
        return self

    def select(self) -> Report:
        """Picks W_f; the report is now a preview, and the model is still untouched."""
        at = self._expect(WasMeasured, "select")
        if at.trials is not None:
            self._choose(at.trials, at.measured)
        with self._account.timed("select"):
            selection = self.method.select(at.measured.forget, at.measured.retain)
            free = self.method.free(selection)
        ranks.require_agreement("the selection", bits.digest(masks.pack(selection.masks)))
        layers = layers_of(self._trainable(), selection.masks, free, selection.held_back_by_layer)
        total = sum(layer.selected for layer in layers)
        may_change = sum(layer.may_change for layer in layers)
        trainable = sum(p.numel() for p in self._trainable().values())
        if self._by_share:
            self.norm_statistics = by_share(may_change / trainable)
        self._account.report = replace(
            self.report,
            norm_statistics=self.norm_statistics,
            layers=layers,
            criterion=selection.criterion,
            effect=self.method.effect,
            may_change_entries=may_change,
            candidate_entries=selection.candidates,
            selected_entries=total,
            selected_fraction=total / trainable,
            held_back_entries=selection.held_back,
        )
        # What a number asked for is written in the report; that nothing happens is warned of.
        tell = self._account.note if total else self._account.warn
        tell(selection.advice)
        if self.method.knob and not selection.advice and total in (0, selection.candidates):
            self._account.warn(
                f"{'no' if not total else 'every'} candidate entry was selected; "
                f"{'lower' if not total else 'raise'} {self.method.knob}"
            )
        self._enter(WasSelected(at.measured, selection, free))
        return self.report

    def reset(self) -> Session:
        """Writes the selected entries' new values; no other bit of the model changes.

        The new values are tried on a batch. After any error the old ones are back, and `reset` can
        be called again. Raises RuntimeError if the model changed since it was measured, ValueError
        if it computes NaN with its new values.
        """
        at = self._expect(WasSelected, "reset")
        entry.require_unchanged(self.model, self.report.checkpoint_before)
        model, forget = unwrap(self.model), self._sets["forget"]
        with self._account.timed("reset"):
            term = terms.prepared(
                self.method, self.model, forget, at.measured, at.selection, self.progress
            )
        with self._account.timed("reset"), torch.no_grad():
            values = self.method.values(model, at.selection, at.measured.forget, at.measured.retain)
        with put_back_on_error(model, self.method, at.selection) as old:
            with self._account.timed("reset"):
                self.method.write(model, at.selection, values)
                no_trace.drop_caches(model)
                now = self._parameters()
                before = self.report.checkpoint_before
                unwritten = {n: d for n, d in before.items() if n not in at.selection.masks}
                frozen = masks.frozen_digest(now, at.free, unwritten)
                originals = Originals(old, now)
                changed = shards.counted(originals.counts(), now)
            if self.report.selected_entries:
                data = self._sets.get("retain", forget)
                require_usable(self.model, data, self.loss_fn)
            dead_ones = self._count_dead(at.selection.masks)
        self._enter(WasReset(at.free, frozen, changed, at.selection, originals, term))
        self._account.warn(dead_ones)
        return self

    def guard(self, *optimizers: Optimizer) -> Session:
        """Holds every entry but the free ones, whichever optimizer steps the model from now on.

        Pass an optimizer that was stepped before the reset (or build it afterwards): its state for
        this model is cleared, because momentum from before moves weights towards what was
        forgotten. After a resume nothing is.
        """
        at = self._expect(WasReset, "guard")
        ranks.refuse_lossy_reduction(self.model)
        if not self.trains:
            # A loop that is entered all the same then leaves every bit as it is.
            self.norm_statistics = "freeze"
            self._account.report = replace(self.report, norm_statistics="freeze")
        if self.norm_statistics == "freeze":
            # DistributedDataParallel would do so at the next forward, which then looked like drift.
            ranks.share_buffers(unwrap(self.model))
        adding = None
        if self.trains:
            forget = self._sets.get("forget")
            adding = terms.adding(at, self.method, self.model, forget, self.loss_fn)
        guard = Guard(
            unwrap(self.model),
            at.free,
            norm_statistics=self.norm_statistics,
            clear_optimizer_state=not at.resumed,
            optimizers=optimizers,
            before_step=adding,
        )
        self._enter(Guarded(at, guard, adding, time.perf_counter()))
        if at.selection is not None:  # in a resumed run averages go on too
            for remark in guard.watch_averages(at.selection.masks):
                self._account.warn(remark)
        return self

    def forgotten(self, held_out: Data) -> Forgetting:
        """How the model meets the forget set beside unseen data of the same kind, asked at any time
        from `measure` on, in your loop too; all ranks call this."""
        return forgetting(self.model, self._sets["forget"], held_out, progress=self.progress)

    def finish(self) -> Report:
        """Counts what moved and what came back, lets go of the model and scores it; the report is
        complete.

        Raises GuardError if a frozen entry moved, if nearly all of W_f holds its old values again,
        or if the optimizer could not be watched; the hooks are off by then. Scores that cannot be
        computed are reported as such.
        """
        at = self._expect(Guarded, "finish")
        now, seconds = at.so_far(), self._seconds()
        try:
            parameters = self._parameters()
            moved = shards.counted(at.guard.moved(), parameters)  # puts unseen writes back first
            after = checkpoint.digests_of(self.model)
            back = restored(at.reset, parameters, self.report.checkpoint_before, after)
            self._account.report = replace(
                self.report,
                seconds=seconds,
                optimizer_steps=now.steps,
                frozen_entries_moved=sum(moved.values()),
                restored_entries=back.entries,
                model_after=bits.combined(after),
                checkpoint_after=after,
            )
            with ranks.fail_together():  # a rank on which something moved would raise alone
                at.guard.check()
                back.require_few()
            chosen = {layer.name: layer.selected for layer in self.report.layers}
            remarks = at.guard.remarks(chosen, steps=now.steps) if self.trains else []
        except BaseException:
            at.guard.release()
            self._at = Failed()
            raise
        at.guard.release()
        self._enter(Finished(now))
        for remark in (*remarks, back.warning):
            self._account.warn(remark)
        self._account.warn(findings.of_ranks(now.steps, parameters, after))
        if self.scores and self._sets:
            self._score("after", gold=self.gold, whatever=True)
        return self.report

    # ------------------------------------------------------------------ resuming

    def load_state_dict(self, state: Mapping[str, Any]) -> Session:
        """Takes up a stored run: nothing is measured or reset again; `guard` is next.

        Load the model's weights first: raises ValueError if a bit of them differs from the model
        that was stored with the run, which happens when a checkpoint was not read or only in part,
        or if the method is another one. What becomes of running statistics is the stored run's
        choice.
        """
        self._expect(New, "load_state_dict")
        self._require_same_settings("load_state_dict()")
        with ranks.fail_together():
            method = method_of(state, self.method)
        now = checkpoint.digests_of(self.model)
        at = unpacked(state, method, self._parameters(), now)
        self.method, self.norm_statistics = method, state["report"]["norm_statistics"]
        self._account.report = Report.of_plain({**state["report"], "seconds": state["seconds"]})
        no_trace.drop_caches(unwrap(self.model))
        self._enter(at)
        return self

    def watch(self, **sets: Data) -> Session:
        """Names the sets (`forget=`, `retain=`) that a resumed run is scored on at the end."""
        self._name_sets(**sets)
        return self

    # ------------------------------------------------------------------ inside

    def _require_same_settings(self, call: str) -> None:
        ranks.require_same(
            {
                "the way into the run": call,
                "the method": f"{self.method.name} {self.method.settings()}",
                "the loss": entry.identity(self.loss_fn),
                "norm_statistics": self.norm_statistics,
                "scores": str(self.scores),
                "dead_count": str(self.dead_count),
                "the sets that are scored": str(sorted(self._sets)),
            }
        )

    def _name_sets(self, **sets: Data) -> None:
        with ranks.fail_together():
            for name, data in sets.items():
                self._sets[name] = samples_of(data, name=name, **self._reading)
            refuse_shared_indices(self._sets)

    def _choose(self, trials: gamma_auto.Trials, measured: Measured) -> None:
        with self._account.timed("choose gamma"):
            choice = trials.choose(
                self.model,
                grid(self.method),
                measured,
                loss_fn=self.loss_fn,
                norm_statistics=self.norm_statistics,
            )
        self.method = choice.method
        self._account.report = replace(
            self.report, settings=self.method.settings(), gamma_choice=choice.to_dict()
        )
        self._account.warn("" if choice.met else choice.reason)

    def _count_dead(self, chosen: Mask) -> str:
        """Counts them into the report; returns what to warn of."""
        retain = self._sets.get("retain")
        total = self.report.selected_entries
        if not self.dead_count or retain is None or not total or not self.trains:
            return ""
        with self._account.timed("dead"):
            counts = dead.dead_entries(
                self.model,
                chosen,
                retain,
                self.loss_fn,
                batch_statistics=self.norm_statistics == "update",
            )
        layers = tuple(replace(x, dead=counts.get(x.name, x.dead)) for x in self.report.layers)
        fraction = sum(counts.values()) / total
        self._account.report = replace(self.report, layers=layers, dead_fraction=fraction)
        return findings.of_dead(fraction, layers, self._parameters(), self.method)

    def _score(self, when: str, **options: Any) -> Evaluation | str:
        words = "the original model" if when == "before" else "the unlearned model"
        options["progress"] = words if self.progress else False
        with self._account.timed("evaluate"):
            scores = scored(self.model, self._sets, self.loss_fn, **options)
        written = scores if isinstance(scores, str) else scores.to_dict()
        self._account.report = replace(self.report, scores={**self.report.scores, when: written})
        return scores

    def _score_before(self) -> None:
        scores = self._score("before")
        self._account.warn(findings.of_labels(scores))
        if isinstance(scores, Evaluation):
            require_comparable(self.gold, self._sets, scores)
