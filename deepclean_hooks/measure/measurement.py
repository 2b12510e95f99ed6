"""What was measured of a data set: sums over its samples, which samples they were, and how."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from deepclean_hooks.model.wrappers import unwrap
from deepclean_hooks.ranks import fsdp, shards
from deepclean_hooks.stored import tensor_file
from deepclean_hooks.stored.checkpoint import model_digest

M = TypeVar("M", bound="Measurement")

_VERSION = 2  # of the file: 1 has no digest


@dataclass(frozen=True)
class Measurement:
    """Sums over a data set, by name, and how many terms they are of.

    `sums`: name -> tensor, owned by this object; the names are those of parameters unless the
    estimator says otherwise. `count`: what `mean` divides by, the number of samples (of batches for
    an estimator of batch means). `samples`: int64 on the CPU, sorted: one 64-bit fingerprint of
    each sample's content. `settings`: how it was obtained (digest of the model, loss, estimator,
    dtypes, versions), compared by `+` and `-`. `taken_out`: int64, sorted: the fingerprints that
    `-` took out.
    """

    noun: ClassVar[str] = "measurement"
    file_format: ClassVar[str] = "deepclean-hooks measurement"
    squares: ClassVar[bool] = False  # whether no sum can be negative

    sums: dict[str, Tensor]
    count: int
    samples: Tensor
    settings: dict[str, Any] = field(default_factory=dict)
    taken_out: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def mean(self) -> dict[str, Tensor]:
        """The sums divided by the number of their terms, by name."""
        return {name: total / self.count for name, total in self.sums.items()}

    def __add__(self: M, other: M) -> M:
        """The measurement of both sets together, made on the same model; on this one's device."""
        self.require_same_origin(other)
        self._require_same_names(other)
        return dataclasses.replace(
            self,
            sums={n: total + other.sums[n].to(total.device) for n, total in self.sums.items()},
            count=self.count + other.count,
            samples=torch.cat([self.samples, other.samples]).sort().values,
            settings=self._settings_with(other, 1),
            taken_out=_without(
                torch.cat([self.taken_out, other.taken_out]), self.samples, other.samples
            ),
        )

    def __sub__(self: M, other: M) -> M:
        """The measurement of this set without the other's samples, all of which must be in it; on
        this one's device."""
        self.require_same_origin(other)
        self._require_same_names(other)
        left = Counter(self.samples.tolist())
        left.subtract(other.samples.tolist())
        foreign = sum(-n for n in left.values() if n < 0)
        if foreign:
            already = self.already_out(other)
            known = f" ({already} were taken out of it before)" if already else ""
            raise ValueError(
                f"{foreign} of the {other.count} samples to take out are not among the "
                f"{self.count} of this {self.noun}{known}; measure them from the same data set "
                "with the same preprocessing, and take each out once"
            )
        return dataclasses.replace(
            self,
            sums={
                name: self._difference(total, other.sums[name].to(total.device))
                for name, total in self.sums.items()
            },
            count=self.count - other.count,
            samples=torch.tensor(sorted(left.elements()), dtype=torch.int64),
            settings=self._settings_with(other, -1),
            taken_out=_distinct(torch.cat([self.taken_out, other.samples])),
        )

    def _difference(self, one: Tensor, other: Tensor) -> Tensor:
        return one - other

    def _settings_with(self, other: Measurement, sign: int) -> dict[str, Any]:
        """The settings of the sum (sign 1) or the difference (-1)."""
        return self.settings

    def restricted_to(self: M, names: Iterable[str]) -> M:
        """The same measurement for these names only; raises ValueError for one that was not
        measured."""
        missing = sorted(set(names) - self.sums.keys())
        if missing:
            raise ValueError(
                f"the stored {self.noun} lacks {missing[:3]}; measure it without parameters=, "
                "which covers all"
            )
        return dataclasses.replace(self, sums={name: self.sums[name] for name in names})

    def placed_like(self: M, parameters: Mapping[str, Tensor]) -> M:
        """The same measurement where the parameters are: on their device, and of a sharded one only
        this rank's shard. A sum that is no parameter's goes to the device of the first one."""
        first = next(iter(parameters.values()))
        sums = {
            name: shards.cut(total.to(parameters.get(name, first).device), parameters.get(name))
            for name, total in self.sums.items()
        }
        return dataclasses.replace(self, sums=sums)

    def contains(self, other: Measurement) -> int:
        """How many of the other's samples are among this measurement's, by content."""
        return sum((Counter(self.samples.tolist()) & Counter(other.samples.tolist())).values())

    def already_out(self, other: Measurement) -> int:
        """How many of the other's samples `-` took out of this measurement before, none of their
        content being left."""
        gone = set(self.taken_out.tolist()) - set(self.samples.tolist())
        return sum(sample in gone for sample in other.samples.tolist())

    @property
    def earlier_weights(self) -> bool:
        """Whether `of_earlier_weights` was called: another model than the measured one may use
        it."""
        return bool(self.settings.get("of_earlier_weights", False))

    def of_earlier_weights(self: M, *, without: M | None = None) -> M:
        """This measurement for a model that has changed since it was made: your choice, which the
        report's `measurement` records.

        `without`: the forget samples' measurement on those earlier weights, which is taken out; the
        session's own is of the weights as they are now, and takes nothing out of this one.
        """
        rest = self if without is None else self - without
        # What the session's forget samples are not in is here the retain set, whoever took them
        # out.
        return dataclasses.replace(
            rest, settings={**rest.settings, "of_earlier_weights": True}, taken_out=self.taken_out
        )

    def require_same_origin(self, other: Measurement, *, of_model: bool = True) -> None:
        """Raises ValueError if the other is of another model (unless `of_model` is False), loss or
        estimator."""
        origins = {"model": "model weights", "loss": "loss", "estimator": "estimator"}
        for key, what in origins.items():
            if key == "model" and not of_model:
                continue
            if self.settings.get(key) != other.settings.get(key):
                raise ValueError(
                    f"the two {self.noun}s are of different {what} "
                    f"({_short(self.settings.get(key))} and {_short(other.settings.get(key))}); "
                    "measure both on the same model in the same way"
                )

    def _require_same_names(self, other: Measurement) -> None:
        missing = sorted(self.sums.keys() ^ other.sums.keys())
        if missing:
            raise ValueError(
                f"the two {self.noun}s cover different parameters, for instance {missing[:3]}; "
                "measure both with the same parameters="
            )

    def require_model(self, model: nn.Module, digest: str | None = None) -> None:
        """Raises ValueError if this was measured on other weights than the model now has; `digest`
        is the model's, where the caller has it already."""
        found = digest or model_digest(model)
        if self.settings.get("model") != found and not self.earlier_weights:
            raise ValueError(
                f"the stored {self.noun} belongs to the model "
                f"{_short(self.settings.get('model'))}, this model is {_short(found)}: its weights "
                "or buffers differ; measure again, load the weights that the "
                f"{self.noun} was measured on, or choose it as it is with of_earlier_weights()"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all, with a digest of its content; the
        settings are its metadata.

        Raises ValueError for sums that `load` would refuse. Sharded sums are gathered one after
        the other and written by rank 0, so all ranks call this.
        """
        if not any(map(shards.is_shard, self.sums.values())):
            self.require_sane("it was not stored")
        tensors = {f"sums/{name}": total.contiguous() for name, total in self.sums.items()}
        tensors["samples"], tensors["taken_out"] = self.samples, self.taken_out
        metadata = {
            "format": f"{self.file_format} {_VERSION}",
            "count": str(self.count),
            "settings": json.dumps(self.settings),
        }
        tensor_file.write(tensors, Path(path), metadata)

    @classmethod
    def load(
        cls: type[M],
        path: str | os.PathLike[str],
        device: str = "cpu",
        *,
        like: nn.Module | None = None,
    ) -> M:
        """Reads what `save` wrote; raises ValueError for a damaged file and for another one.

        A file of an earlier version has no digest: it is read with a warning, if its numbers can
        be a measurement's. `like`, a model under FSDP2: every rank keeps its shard of each sum,
        where the model has it, and reads the file one tensor after the other.
        """
        where = os.fspath(path)
        parameters = {} if like is None else fsdp.parameters_of(unwrap(like))
        tensors, metadata, vouched = tensor_file.read(
            where,
            device,
            lambda key, whole: shards.cut(whole, parameters.get(key.removeprefix("sums/"))),
        )
        known = (f"{cls.file_format} {_VERSION}", f"{cls.file_format} 1")
        if metadata.get("format") not in known:
            raise ValueError(
                f"{where} is no stored {cls.__name__} (format {metadata.get('format')!r}); write "
                f"it with {cls.__name__}.save"
            )
        if metadata["format"] == known[0] and not vouched:
            raise ValueError(f"{where} is damaged: its digest is missing; measure again and save")
        try:
            samples = tensors.pop("samples").cpu()
            # The first files did not keep what was taken out.
            taken_out = tensors.pop("taken_out", samples[:0]).cpu()
            sums = {key.removeprefix("sums/"): tensor for key, tensor in tensors.items()}
            settings, count = json.loads(metadata["settings"]), int(metadata["count"])
            loaded = cls(sums, count, samples, settings, taken_out)
            loaded.require_sane("the file is damaged; measure again and save")
        except (KeyError, TypeError, ValueError) as reason:
            raise ValueError(f"{where} is no whole {cls.noun}: {reason}") from reason
        if not vouched:
            warnings.warn(
                f"{where} was written by an earlier version without a digest: a flipped bit in it "
                f"would not be noticed; save it again ({cls.__name__}.load(path).save(path)) if "
                "you know that it is whole",
                UserWarning,
                stacklevel=2,
            )
        return loaded

    def require_sane(self, consequence: str) -> None:
        """Raises ValueError for what no measurement holds: NaN, infinity, squares below 0, counts
        that do not fit the samples; `consequence` ends the message."""
        for what, ids in (("samples", self.samples), ("taken_out", self.taken_out)):
            if ids.dtype != torch.int64 or ids.dim() != 1:
                raise ValueError(f"{what} must be fingerprints, int64 of one dimension")
        if not isinstance(self.settings, dict):
            raise ValueError(f"the settings are {type(self.settings).__name__}, not a mapping")
        if not 0 <= self.count <= len(self.samples):
            raise ValueError(
                f"it claims {self.count} terms of {len(self.samples)} samples; {consequence}"
            )
        for name, total in self.sums.items():
            part = shards.local(total)
            if not torch.isfinite(part).all():
                raise ValueError(f"the sum of {name} is NaN or infinite; {consequence}")
            if self.squares and part.numel() and part.min() < 0:
                raise ValueError(
                    f"the sum of {name} is negative, {float(part.min())}, which no sum of squares "
                    f"is; {consequence}"
                )


def _without(fingerprints: Tensor, *present: Tensor) -> Tensor:
    """The fingerprints that are in none of the others, each once, sorted."""
    found = torch.cat(present)
    return _distinct(fingerprints[~torch.isin(fingerprints, found)])


def _distinct(fingerprints: Tensor) -> Tensor:
    """Each fingerprint once, sorted."""
    return torch.tensor(sorted(set(fingerprints.tolist())), dtype=torch.int64)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 20 else f"{text[:12]}..."
