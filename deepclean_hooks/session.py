"""A session walks a model through measure -> select -> reset -> guard -> finish, in that order,
each once."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from deepclean_hooks import ranks
from deepclean_hooks.data import losses
from deepclean_hooks.data.losses import LossFn
from deepclean_hooks.data.samples import (
    Data,
    Samples,
    changes_from_pass_to_pass,
    refuse_shared_indices,
    require_same_on_ranks,
    samples_of,
)
from deepclean_hooks.guard.guard import Guard, NormStatistics, require_holdable
from deepclean_hooks.guard.norm_statistics import require_choice
from deepclean_hooks.measure import dead
from deepclean_hooks.measure.fisher import PerSampleFisher
from deepclean_hooks.measure.measurement import Measurement
from deepclean_hooks.measure.request import measured, require_of_use
from deepclean_hooks.methods.adding import Adding
from deepclean_hooks.methods.method import Mask, Method, Selection
from deepclean_hooks.methods.term import Original, Term
from deepclean_hooks.metrics.evaluate import Gold, evaluate
from deepclean_hooks.model import no_trace
from deepclean_hooks.model.wrappers import require_trainable, unwrap
from deepclean_hooks.options import Options, require_known
from deepclean_hooks.ranks import fsdp, shards
from deepclean_hooks.report import forgotten as identifiers
from deepclean_hooks.report.report import Layer, Report
from deepclean_hooks.stored import bits, checkpoint, masks
from deepclean_hooks.tuning import gamma_auto
from deepclean_hooks.tuning.gamma_sweep import grid


class Session:
    """One unlearning run of one model by one method; `report` can be read at any time.

    `deepclean_hooks.options.Options` says what each option is.
    """

    def __init__(self, model: nn.Module, method: Method, **options: Unpack[Options]) -> None:
        """Raises TypeError or ValueError for bad settings, RuntimeError for a model that another
        session holds."""
        require_known(options, "Session")
        if not isinstance(method, Method):
            raise TypeError(f"method must be a method such as DeepClean(gamma=2.0), got {method!r}")
        norm_statistics: NormStatistics = options.get("norm_statistics") or "update"
        require_choice(norm_statistics)
        fsdp.reshard(unwrap(model))
        require_trainable(unwrap(model))
        require_holdable(unwrap(model))
        self.model, self.method = model, method
        self.loss_fn: LossFn = options.get("loss_fn") or losses.cross_entropy
        self.norm_statistics = norm_statistics
        self.gold, self.progress = options.get("gold"), options.get("progress", True)
        self.scores, self.dead_count = options.get("scores", True), options.get("dead_count", True)
        self._reading: dict[str, Any] = {
            "batch_size": options.get("batch_size"),
            "collate_fn": options.get("collate_fn"),
        }
        self._sets: dict[str, Samples] = {}
        scored = {"test": options.get("test"), "forget_test": options.get("forget_test")}
        for name, data in scored.items():
            if data is not None:
                self._sets[name] = samples_of(data, name=name, **self._reading)
        self._phase = "new"
        self._forget: Measurement | None = None
        self._retain: Measurement | None = None
        self._selection: Selection | None = None
        self._free: Mask = {}
        self._guard: Guard | None = None
        self._trials: gamma_auto.Trials | None = None
        self._term: Term | None = None
        self._adding: Adding | None = None
        self._added_before = 0  # steps of the run that this one goes on from, as `_steps_before`
        self._resumed = False
        self._steps_before = 0  # of the run that this one goes on from
        self._facts: dict[str, Any] = {
            "trainable_entries": sum(p.numel() for p in self._trainable().values()),
            "norm_statistics": norm_statistics,
        }
        self._layers: dict[str, dict[str, Any]] = {}
        self._seconds: dict[str, float] = {}
        self._scores: dict[str, Any] = {}
        self._warnings: list[str] = []

    # ------------------------------------------------------------------ the phases

    def measure(self, forget: Data, retain: Data | Measurement) -> Session:
        """Measures D_f and D_r; changes nothing.

        `retain` may be a stored measurement of this very model, such as a FisherDiagonal: of D_r,
        or of the whole training set, from which the forget samples are then subtracted, so that
        only D_f is walked. One of other weights is taken only if `of_earlier_weights` says so.
        """
        self._expect("new", "measure")
        self._require_shardable()
        method = f"{self.method.name} {self.method.settings()}"
        ranks.require_agreement("the method", method)
        before = checkpoint.digests_of(self.model)
        self._facts.update(model_before=bits.combined(before), checkpoint_before=before)
        self._facts["tied"] = checkpoint.tied(self.model)
        if isinstance(retain, Measurement):
            require_of_use(self.method, retain, self.model, bits.combined(before))
        else:
            self._name_sets(retain=retain)
        self._name_sets(forget=forget)
        self._require_same_sets()
        self._prepare_trials()
        if self.scores:
            self._evaluate("before", gold=None)
        with self._timed("fisher"):
            found = measured(
                self.method,
                self.model,
                self._sets["forget"],
                retain if isinstance(retain, Measurement) else self._sets["retain"],
                loss_fn=self.loss_fn,
                progress=self.progress,
            )
        self._forget, self._retain = found.forget, found.retain
        forgotten, shared = len(found.forget.samples), found.shared
        if shared:
            self._warn(
                f"{shared} of the {forgotten} forget samples stand in the retain set with "
                "the same content (duplicates in the data): what they taught will not be forgotten"
            )
        self._facts.update(
            forgotten=identifiers.salted(self._forget.samples.tolist()),
            forget_samples=forgotten,
            retain_samples=found.retain_samples,
            overlapping_samples=shared,
            measurement={"forget": self._forget.settings, "retain": self._retain.settings},
        )
        self._phase = "measured"
        return self

    def select(self) -> Report:
        """Picks W_f; the report is now a preview, and the model is still untouched."""
        self._expect("measured", "select")
        assert self._forget is not None
        assert self._retain is not None
        self._choose_gamma()
        with self._timed("select"):
            self._selection = self.method.select(self._forget, self._retain)
            self._free = self.method.free(self._selection)
        ranks.require_agreement("the selection", bits.digest(masks.pack(self._selection.masks)))
        chosen = {name: shards.total(mask) for name, mask in self._selection.masks.items()}
        for name, p in self._trainable().items():
            self._layers[name] = {
                "entries": p.numel(),
                "selected": chosen.get(name, 0),
                "held_back": self._selection.held_back_by_layer.get(name, 0),
                "may_change": self._may_change(name, chosen.get(name, 0)),
            }
        total = sum(chosen.values())
        self._facts.update(
            criterion=self._selection.criterion,
            effect=self.method.effect,
            may_change_entries=sum(layer["may_change"] for layer in self._layers.values()),
            candidate_entries=self._selection.candidates,
            selected_entries=total,
            selected_fraction=total / self._facts["trainable_entries"],
            held_back_entries=self._selection.held_back,
        )
        if self.method.knob and total in (0, self._selection.candidates):
            self._warn(
                f"{'no' if not total else 'every'} candidate entry was selected; "
                f"{'lower' if not total else 'raise'} {self.method.knob}"
            )
        self._phase = "selected"
        return self.report

    def reset(self) -> Session:
        """Writes the selected entries' new values; no other bit of the model changes."""
        self._expect("selected", "reset")
        assert self._selection is not None
        assert self._forget is not None
        assert self._retain is not None
        self._term = self._prepared_term()
        weights = self._parameters()
        with self._timed("reset"), torch.no_grad():
            values = self.method.values(
                unwrap(self.model), self._selection, self._forget, self._retain
            )
            for name, mask in self._selection.masks.items():
                # where copies bits, so the entries that stay keep theirs, NaN and -0.0 too
                here, new = shards.local(weights[name]), shards.local(values[name])
                here.copy_(torch.where(shards.local(mask), new, here))
            if self.method.resets_buffers:
                for name, buffer in unwrap(self.model).named_buffers():
                    buffer.copy_(values.get(name, buffer))
            no_trace.drop_caches(unwrap(self.model))
            self._facts["frozen_digest"] = masks.frozen_digest(weights, self._free)
        self._count_dead()
        self._forget = self._retain = None  # 2 x 8 bytes an entry that nothing needs any more
        self._phase = "reset"
        return self

    def guard(self, *optimizers: Optimizer) -> Session:
        """Holds every entry but the free ones, whichever optimizer steps the model from now on.

        Pass an optimizer that was stepped before the reset (or build it afterwards): its state for
        this model is cleared, because momentum from before moves weights towards what was
        forgotten. After a resume nothing is.
        """
        self._expect("reset", "guard")
        ranks.refuse_lossy_reduction(self.model)
        if not self.trains:
            # A loop that is entered all the same then leaves every bit as it is.
            self.norm_statistics = self._facts["norm_statistics"] = "freeze"
        if self.norm_statistics == "freeze":
            # DistributedDataParallel would do so at the next forward, which then looked like drift.
            ranks.share_buffers(unwrap(self.model))
        self._adding = self._added_to_steps()
        self._guard = Guard(
            unwrap(self.model),
            self._free,
            norm_statistics=self.norm_statistics,
            clear_optimizer_state=not self._resumed,
            optimizers=optimizers,
            before_step=self._adding,
        )
        self._started = time.perf_counter()
        self._phase = "guarded"
        return self

    def compact(self) -> dict[str, nn.Parameter]:
        """The free entries as small tensors by parameter name, to build an optimizer of your own
        on.

        What it remembers then has the size of W_f. `Guard.compact` says what it serves.
        """
        self._expect("guarded", "compact")
        assert self._guard is not None
        return self._guard.compact()

    def hold(self) -> Session:
        """Puts every frozen entry back to its bits now; call it after an average of the weights
        (EMA, SWA) was written into the model, for averaging rounds entries that are equal."""
        self._expect("guarded", "hold")
        assert self._guard is not None
        self._guard.hold()
        return self

    def finish(self) -> Report:
        """Counts what moved, lets go of the model and scores it; the report is complete.

        Raises GuardError if a frozen entry moved or the optimizer could not be watched; the hooks
        are off by then.
        """
        self._expect("guarded", "finish")
        assert self._guard is not None
        guard, progress = self._guard, self.so_far()
        self._seconds = progress["seconds"]
        try:
            moved = self._moved(guard)
            self._facts.update(frozen_entries_moved=moved, optimizer_steps=progress["steps"])
            with ranks.fail_together():  # a rank on which something moved would raise alone
                guard.check()
            reset = {name: layer["selected"] for name, layer in self._layers.items()}
            remarks = guard.remarks(reset, steps=progress["steps"]) if self.trains else []
        finally:
            self.close()
        after = checkpoint.digests_of(self.model)
        self._facts.update(model_after=bits.combined(after), checkpoint_after=after)
        self._phase = "finished"
        for remark in remarks:
            self._warn(remark)
        if self.scores and self._sets:
            self._evaluate("after", self.gold)
        return self.report

    @property
    def selection(self) -> Selection:
        """What the method picked; raises RuntimeError before `select`, and in a resumed run."""
        if self._selection is None:
            raise RuntimeError("there is no selection before select(), and none in a resumed run")
        return self._selection

    @property
    def trains(self) -> bool:
        """Whether any entry may train after the reset."""
        return any([shards.any_true(mask) for mask in self._free.values()])

    def close(self) -> None:
        """Takes every hook off the model and the optimizers; safe at any time, and twice."""
        if self._guard is not None:
            self._guard.release()
            self._guard = self._adding = None

    # ------------------------------------------------------------------ report and resuming

    @property
    def report(self) -> Report:
        """The account so far; fields of phases that have not happened are None."""
        facts = {k: v for k, v in self._facts.items() if k != "frozen_digest"}
        return Report(
            method=self.method.name,
            settings=self.method.settings(),
            phase=self._phase,
            layers=tuple(Layer(name, **values) for name, values in self._layers.items()),
            seconds=dict(self._seconds),
            scores=dict(self._scores),
            warnings=tuple(self._warnings),
            **facts,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on after the reset, beside the model's and the optimizer's own
        state.

        Tensors, numbers and strings only, so that torch.load(weights_only=True) reads it back. The
        masks are whole, at one bit an entry, also of a sharded model, where all ranks call this.
        """
        if self._phase not in ("reset", "guarded"):
            raise RuntimeError(
                f"a session can be stored between reset and finish, this one is {self._phase!r}; "
                "before the reset nothing has happened that could not be done again"
            )
        return {
            "method": {"name": self.method.name, "settings": repr(self.method.settings())},
            "free": masks.pack(self._free),
            "facts": dict(self._facts),
            "layers": {name: dict(values) for name, values in self._layers.items()},
            "scores": dict(self._scores),
            "warnings": list(self._warnings),
            "term": {} if self._term is None else self._term.state_dict(),
            **self.so_far(),
        }

    def so_far(self) -> dict[str, Any]:
        """`steps` (of optimizers), `added` (those to which the method's term was added) and
        `seconds` (by phase) so far, those before a resume included: what of `state_dict()` changes
        while your loop runs."""
        steps, seconds = self._steps_before, dict(self._seconds)
        if self._guard is not None:
            steps += self._guard.steps
            spent = time.perf_counter() - self._started
            seconds["fine-tune"] = seconds.get("fine-tune", 0.0) + spent
        added = self._added_before if self._adding is None else self._adding.done
        return {"steps": steps, "added": added, "seconds": seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> Session:
        """Takes up a stored run: nothing is measured or reset again; `guard` is next.

        Load the model's weights first: raises ValueError if a frozen entry differs from the stored
        run's, which happens when a checkpoint was read only in part, or if the method is another
        one. What becomes of running statistics is the stored run's choice.
        """
        self._expect("new", "load_state_dict")
        self.method = gamma_auto.as_chosen(self.method, state["facts"].get("gamma_choice"))
        own = {"name": self.method.name, "settings": repr(self.method.settings())}
        if state["method"] != own:
            raise ValueError(f"the stored run used {state['method']}, this session has {own}")
        free = masks.unpack(state["free"], self._parameters())
        found = masks.frozen_digest(self._parameters(), free)
        if found != state["facts"]["frozen_digest"]:
            raise ValueError(
                "the model's frozen weights are not those of the stored run; load the "
                "checkpoint's weights with strict=True before load_state_dict, and check that "
                "every name was found"
            )
        self._free, self._facts = free, dict(state["facts"])
        self._layers = {name: dict(values) for name, values in state["layers"].items()}
        self._seconds, self._scores = dict(state["seconds"]), dict(state["scores"])
        self._warnings = list(state["warnings"])
        self.norm_statistics = self._facts["norm_statistics"]
        self._steps_before, self._added_before = state.get("steps", 0), state.get("added", 0)
        self._term = self.method.term()
        if self._term is not None:
            self._term.load_state_dict(state.get("term", {}))
        self._resumed = True
        self._phase = "reset"
        return self

    def watch(self, **sets: Data) -> Session:
        """Names the sets (`forget=`, `retain=`) that a resumed run is scored on at the end."""
        self._name_sets(**sets)
        return self

    # ------------------------------------------------------------------ inside

    def _may_change(self, name: str, selected: int) -> int:
        """How many entries of a parameter are selected, which many are, or free to train."""
        free = self._free.get(name)
        mask = self.selection.masks.get(name)
        if free is None or free is mask:
            return selected
        return shards.total(free if mask is None else free | mask)

    def _prepare_trials(self) -> None:
        if gamma_auto.is_open(self.method):
            gamma_auto.require_whole(self.model)
            with self._timed("choose gamma"):
                self._trials = gamma_auto.trials(self.method, self._sets, **self._reading)

    def _choose_gamma(self) -> None:
        if self._trials is None:
            return
        assert gamma_auto.is_open(self.method)
        assert self._forget is not None
        assert self._retain is not None
        with self._timed("choose gamma"):
            choice = self._trials.choose(
                self.model,
                grid(self.method),
                self._forget,
                self._retain,
                loss_fn=self.loss_fn,
                norm_statistics=self.norm_statistics,
            )
        self._trials, self.method = None, choice.method
        self._facts["gamma_choice"] = choice.to_dict()
        if not choice.met:
            self._warn(choice.reason)

    @property
    def _sharded(self) -> bool:
        return fsdp.is_sharded(unwrap(self.model))

    def _require_shardable(self) -> None:
        if not self._sharded:
            return
        estimators = (self.method.measured_by, self.method.retain_measured_by)
        if not self.method.sharded or not all(isinstance(e, PerSampleFisher) for e in estimators):
            fsdp.refuse_sharded(unwrap(self.model), f"the method {self.method.name}")
        if gamma_auto.is_open(self.method):
            fsdp.refuse_sharded(unwrap(self.model), 'gamma="auto"')
        fsdp.require_measurable(unwrap(self.model), ranks.world()[1])

    def _moved(self, guard: Guard) -> int:
        """Frozen entries that moved, of all shards together."""
        counts = guard.moved()
        if not self._sharded:
            return sum(counts.values())
        parameters, everyone = self._parameters(), ranks.gather(counts)
        # What is not sharded is the same on every rank.
        moved = [
            (sum if name in parameters and shards.is_shard(parameters[name]) else max)(
                one.get(name, 0) for one in everyone
            )
            for name in sorted({name for one in everyone for name in one})
        ]
        return sum(moved)

    def _require_same_sets(self) -> None:
        if ranks.world()[1] > 1:
            for name, source in self._sets.items():
                with ranks.fail_together():
                    changing = changes_from_pass_to_pass(source)
                require_same_on_ranks(source, name, changing)

    def _name_sets(self, **sets: Data) -> None:
        with ranks.fail_together():
            for name, data in sets.items():
                self._sets[name] = samples_of(data, name=name, **self._reading)
            refuse_shared_indices(self._sets)

    def _expect(self, phase: str, call: str) -> None:
        if self._phase != phase:
            raise RuntimeError(
                f"{call}() needs a session that is {phase!r}, this one is {self._phase!r}; the "
                "order is measure -> select -> reset -> guard -> your loop -> finish, each once"
            )

    def _parameters(self) -> dict[str, Tensor]:
        return dict(fsdp.parameters_of(unwrap(self.model)))

    def _trainable(self) -> dict[str, Tensor]:
        return {name: p for name, p in self._parameters().items() if p.requires_grad}

    def _prepared_term(self) -> Term | None:
        assert self._selection is not None and self._forget is not None and self._retain is not None
        term = self.method.term()
        if term is not None:
            with self._timed("term"):
                term.prepare(
                    Original(
                        model=self.model,
                        forget=self._sets["forget"],
                        selection=self._selection,
                        forget_count=self._facts["forget_samples"],
                        retain_count=self._facts["retain_samples"],
                        seen=torch.cat([self._forget.samples, self._retain.samples]),
                        progress=self.progress,
                    )
                )
        return term

    def _added_to_steps(self) -> Adding | None:
        if self._term is None or not self.trains:
            return None
        if "forget" not in self._sets:
            raise ValueError(
                f"{self.method.name} draws forget batches at every step, also in a resumed run; "
                "name the forget set, by watch(forget=...) in a session"
            )
        forget, done = self._sets["forget"], self._added_before
        return Adding(self._term, self.model, forget, self.loss_fn, done=done)

    def _count_dead(self) -> None:
        assert self._selection is not None
        retain = self._sets.get("retain")
        total = self._facts["selected_entries"]
        if not self.dead_count or retain is None or not total or not self.trains:
            return
        with self._timed("dead"):
            counts = dead.dead_entries(
                self.model,
                self._selection.masks,
                retain,
                self.loss_fn,
                batch_statistics=self.norm_statistics == "update",
            )
        for name, count in counts.items():
            self._layers[name]["dead"] = count
        fraction = sum(counts.values()) / total
        self._facts["dead_fraction"] = fraction
        if fraction > dead.WARN_ABOVE:
            self._warn(
                f"{fraction:.1%} of the reset entries are dead: their gradient on the retain set "
                f"is exactly 0, so no training brings them back; {self._way_out_of_dead()}"
            )

    def _way_out_of_dead(self) -> str:
        parameters = self._parameters()
        flat = any(
            layer["selected"] and parameters[name].dim() <= 1
            for name, layer in self._layers.items()
        )
        knob = f"raise {self.method.knob}" if self.method.knob else "select fewer"
        return f"leave one-dimensional parameters out, or {knob}" if flat else knob

    def _evaluate(self, when: str, gold: Gold | None) -> None:
        words = "the original model" if when == "before" else "the unlearned model"
        with self._timed("evaluate"):
            try:
                self._scores[when] = evaluate(
                    self.model,
                    gold=gold,
                    progress=words if self.progress else False,
                    **self._evaluated(),
                ).to_dict()
            except losses.not_for_scores(self.loss_fn) as reason:
                self._scores[when] = f"not computed: {reason}"

    def _evaluated(self) -> dict[str, Any]:
        return {
            name: self._sets[name]
            for name in ("forget", "retain", "test", "forget_test")
            if name in self._sets
        }

    def _warn(self, text: str) -> None:
        self._warnings.append(text)
        if ranks.is_first():
            warnings.warn(text, UserWarning, stacklevel=3)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start
