"""What is known of the steps behind a model: whose they are, what their charge rests on, what a statement tells."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from accounting import Accountant, Ledger, Provenance, new_run
from accounting.errors import warn_caller
from clipless_dp.bounds.sensitivity import Sensitivity
from clipless_dp.errors import ConfigurationError, PrivacyWarning
from clipless_dp.model import DPLipModel, lineage
from clipless_dp.model.bounds_taken import different
from clipless_dp.model.description import differences, settings_of, without_counts
from clipless_dp.noise import NoiseSource, source_name
from clipless_dp.optim.charging import Witness
from clipless_dp.sampling.people import Unit

Rates = tuple[float | None, ...]
"""Learning rate of each parameter group; ``None`` where the base optimizer has none."""

STATE_FORMAT = 2
_READ_FORMATS = (1, STATE_FORMAT)


class Run:
    """What one optimizer does in one process, by a name that all records of it share.

    Attributes:
        name: its name.
        taken: how many steps it took.
    """

    def __init__(self) -> None:
        self.name, self.taken, self._process = new_run(), 0, os.getpid()

    def follow(self, ledger: Ledger) -> str:
        """The name of the run that the step to come is of: a new one where this one's past is not in the ledger."""
        if self._process != os.getpid():
            # The other side of the fork goes on too.
            self.name, self.taken, self._process = new_run(), 0, os.getpid()
        elif ledger.count(self.name) != self.taken:
            # Another ledger was put in place of the one that holds this run. All ranks derive the same.
            self.name = hashlib.sha256(f"{self.name} {self.taken}".encode()).hexdigest()[:32]
            self.taken = 0
        return self.name


@dataclass(frozen=True)
class SavedBooks:
    """What an optimizer's state says of its steps; lists and names as :class:`Books` has them.

    Attributes:
        steps_taken: by the optimizer that was saved.
        ledger: all that was recorded.
        noise: names of sources.
        randomness: names of sources.
        learning_rates: rates, and for how many steps in a row.
        skipped: draws that were not trained on, by run.
        weights: sums of the bits that the last step left, by parameter; ``None`` if it does not tell.
        uncounted_changes: before how many steps the weights were not those that the step before had left.
        settings: of the model; ``None`` if it does not tell.
        changed_settings: which were others in earlier steps.
        bounds_taken: by which the steps were charged; empty if it does not tell.
        bounds: of each parameter, at the weights of ``weights``; ``None`` if it does not tell.
    """

    steps_taken: int
    ledger: Ledger
    noise: set[str]
    randomness: set[str]
    learning_rates: list[tuple[Rates, int]]
    skipped: dict[str, int]
    weights: lineage.Bits | None
    uncounted_changes: int
    settings: dict[str, Any] | None
    changed_settings: list[str]
    bounds_taken: dict[str, Any]
    bounds: dict[str, float] | None

    @classmethod
    def read(cls, own: object, accountant: Accountant) -> SavedBooks:
        """What :meth:`Books.state` wrote, in this version or an earlier one; the accountant stays as it is.

        Raises:
            ConfigurationError: the state is of an unknown format, incomplete or altered.
        """
        if not isinstance(own, dict) or own.get("format") not in _READ_FORMATS:
            raise ConfigurationError(
                "this is not the state of a clipless_dp optimizer of format "
                f"{STATE_FORMAT}: its privacy ledger is missing or newer than this version"
            )
        try:
            steps_taken, ledger = int(own["steps_taken"]), accountant.ledger_of(own["accountant"])
            noise = {str(name) for name in own["noise"]}
            weights, settings, bounds = own.get("weights"), own.get("settings"), own.get("bounds")
            taken = own.get("bounds_taken", {})
            saved = cls(
                steps_taken=steps_taken,
                ledger=_attributed(ledger, own["counted"], noise) if own["format"] == 1 else ledger,
                noise=noise,
                # States of before they were recorded have none.
                randomness={str(name) for name in own.get("randomness", ["unrecorded"])},
                learning_rates=[
                    (tuple(None if rate is None else float(rate) for rate in some), int(count))
                    for some, count in own.get("learning_rates", [])
                ],
                skipped={str(run): int(count) for run, count in own.get("skipped", {}).items()},
                weights=None if weights is None else {str(name): int(value) for name, value in weights.items()},
                uncounted_changes=int(own.get("uncounted_changes", 0)),
                settings=settings if isinstance(settings, dict) else None,
                changed_settings=list(map(str, own.get("changed_settings", ()))),
                bounds_taken={
                    "largest": {str(name): float(bound) for name, bound in taken.get("largest", {}).items()},
                    "changes": list(map(str, taken.get("changes", ()))),
                },
                bounds=None if bounds is None else {str(name): float(bound) for name, bound in bounds.items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ConfigurationError(f"the privacy ledger of this state is incomplete: {error!r}") from error
        if not 0 <= steps_taken <= len(saved.ledger):
            raise ConfigurationError(
                f"this state says that {steps_taken} steps were taken, its ledger holds {len(saved.ledger)}: it was "
                "altered"
            )
        return saved


def _attributed(ledger: Ledger, counted: Mapping[object, Any], noise: set[str]) -> Ledger:
    """A ledger of format 1, which knows no runs, as one run that the very same state is known by."""
    known = sorted((str(run), int(count)) for run, count in counted.items())
    digest = hashlib.sha256(f"{ledger.to_json()}{known}".encode()).hexdigest()[:32]
    # Where there were several sources, nothing tells which noise was whose.
    return ledger.attributed(Provenance(f"state {digest}", noise=min(noise) if len(noise) == 1 else ""))


class Books:
    """What one optimizer notes beside its ledger.

    Args:
        model: the wrapped model.

    Attributes:
        run: whose steps the next ones are.
        seeded_masks: whether dropout masks and views of the steps to come are declared to come from a seed.
        learning_rates: rates, and for how many steps in a row.
    """

    def __init__(self, model: DPLipModel) -> None:
        self._model = model
        self.run = Run()
        self.seeded_masks = False
        self.learning_rates: list[tuple[Rates, int]] = []
        self._noise: set[str] = set()
        self._randomness: set[str] = set()
        self._drawn_before = model.randomness.draws.copy()
        self._drew_from_a_seed = False
        self._inherited: dict[str, int] = {}
        self._missing: set[str] = set()
        self._settings: dict[str, Any] = {}
        self._other_settings: list[str] = []
        self._bounds_there: tuple[lineage.Bits, dict[str, float]] | None = None
        self._bounds_loaded: tuple[lineage.Bits, dict[str, float]] | None = None
        self._name = new_run()
        self.skipped: dict[str, int] = {}

    def note_skipped(self, count: int) -> None:
        """Notes draws that are not trained on."""
        if count:
            self.skipped[self._name] = self.skipped.get(self._name, 0) + count

    @property
    def _lineage(self) -> lineage.Lineage:
        return lineage.of(self._model)

    def open(self, named: Mapping[str, nn.Parameter]) -> None:
        """The model is as the first step will find it."""
        self._settings = settings_of(self._model)
        self._lineage.start(named)

    def noise_sources(self, ledger: Ledger) -> tuple[str, ...]:
        """The sources that the noise of all entries of a ledger came from, as far as they are known."""
        recorded = {line.provenance.noise for line in ledger.lines if line.provenance.noise}
        return tuple(sorted(recorded | self._noise))

    def randomness_sources(self) -> tuple[str, ...]:
        """Where masks of dropout and random views of all steps came from."""
        return tuple(sorted(self._randomness))

    def missing_runs(self, ledger: Ledger) -> set[str]:
        """The runs whose steps the weights come from, and that a ledger lacks some of."""
        return {run for run, count in self._lineage.runs.items() if ledger.count(run) < count}

    def warn_of_missing_runs(self, ledger: Ledger) -> None:
        """Warns if another optimizer's steps on this model are missing from a ledger, once of each.

        Before the step is charged: where warnings are errors, the next one goes through.
        """
        missing = self.missing_runs(ledger)
        new, self._missing = not missing <= self._missing, self._missing | missing
        if new:
            warn_caller(
                "another optimizer has already taken private steps on this model, which this one's ε does not "
                "include: pass it accountant=other.accountant (both on one data set compose), or load its state_dict",
                PrivacyWarning,
            )

    def note_randomness(self) -> None:
        """Notes where the masks and views of the step to come were drawn from."""
        source, before = self._model.randomness, self._drawn_before
        self._drawn_before = source.draws.copy()
        drawn = source.draws - before
        self._randomness.update(drawn)
        self._drew_from_a_seed = "reproducible" in drawn
        source.forget()

    def provenance(self, ledger: Ledger, noise: NoiseSource, witness: Witness, unit: Unit = "row") -> Provenance:
        """Of the step to come: whose it is, and what its charge rests on."""
        return Provenance(
            self.run.follow(ledger),
            sampling=witness,
            noise=source_name(type(noise)),
            seeded_masks=self.seeded_masks or self._drew_from_a_seed,
            unit="" if unit == "row" else unit,
        )

    def note_step(
        self, named: Mapping[str, nn.Parameter], groups: Sequence[Mapping[str, Any]], sensitivity: Sensitivity
    ) -> None:
        """A step was recorded in the ledger, with these weights before it, these bounds, and rates of these groups."""
        self.run.taken += 1
        self._hold_against_loaded(sensitivity)
        self._bounds_there = self._bounds_loaded = None
        self._lineage.bounds.note(sensitivity)
        known = self._lineage
        if self._inherited:
            self.join_weights()
        known.add_runs({self.run.name: self.run.taken}, frozen=False, parameters=named.values())
        self._inherited = {}
        if not known.unchanged(named, quick=True):
            known.changed += 1
        rates = tuple(None if (rate := group.get("lr")) is None else float(rate) for group in groups)
        before = self.learning_rates.pop() if self.learning_rates else (rates, 0)
        self.learning_rates += [(rates, before[1] + 1)] if before[0] == rates else [before, (rates, 1)]

    def join_weights(self) -> None:
        """The weights come from the runs of the state that was loaded, too."""
        self._lineage.add_runs(self._inherited)

    def uncounted_changes(self) -> int:
        """Before how many steps the weights were not those that the step before had left."""
        return self._lineage.changed

    def changed_settings(self) -> list[str]:
        """Which settings of the model differ between earlier steps and now, in words."""
        found = [*self._other_settings, *differences(self._settings, settings_of(self._model))]
        return without_counts(found, self._model.counted)

    def changed_bounds(self) -> list[str]:
        """Where the bounds are below those of earlier steps by more than weights explain, or of other parameters."""
        here = self._model.sensitivity()
        self._hold_against_loaded(here)
        taken = self._lineage.bounds
        return [*taken.changes, *(line for line in taken.below(here) if line not in taken.changes)]

    def _hold_against_loaded(self, here: Sensitivity) -> None:
        """Compares bounds with those that a loaded state had of the same weights, once these are here."""
        if self._bounds_there is None or not self._lineage.are(self._bounds_there[0]):
            return
        _, there = self._bounds_there
        self._bounds_there = None
        changes = self._lineage.bounds.changes
        if different(there, here.per_parameter):
            # Weights that were loaded are known by their norms, those that a step has projected by the limits.
            here = self._model.sensitivity_at_limits()
        changes += [line for line in different(there, here.per_parameter) if line not in changes]

    def state(self, accountant: Accountant, steps_taken: int, *, bits: bool) -> dict[str, Any]:
        """The part of an optimizer's state that :meth:`SavedBooks.read` reads.

        Args:
            accountant: that is saved with it.
            steps_taken: by the optimizer.
            bits: whether sums of the weights' bits are told, and bounds at them.
        """
        known = self._lineage.bits() if bits else None
        # First what they are held against: a state that was loaded is saved again with what that showed.
        changed = self.changed_bounds() if known is not None else []
        bounds = None if known is None else dict(self._model.sensitivity().per_parameter)
        if bounds is not None and self._bounds_loaded is not None and self._lineage.are(self._bounds_loaded[0]):
            # Until a step: those of weights that were loaded are by their norms, and may be below what steps are held
            # against.
            bounds |= self._bounds_loaded[1]
        taken = self._lineage.bounds.record()
        return {
            "bounds": bounds,
            "bounds_taken": {**taken, "changes": list(dict.fromkeys([*taken["changes"], *changed]))},
            "format": STATE_FORMAT,
            "steps_taken": steps_taken,
            "accountant": accountant.state_dict(),
            "noise": list(self.noise_sources(accountant.ledger)),
            "randomness": list(self.randomness_sources()),
            "learning_rates": [[list(rates), count] for rates, count in self.learning_rates],
            "weights": known,
            "uncounted_changes": self.uncounted_changes(),
            "skipped": dict(self.skipped),
            "settings": settings_of(self._model),
            "changed_settings": self.changed_settings(),
        }

    def take(self, saved: SavedBooks) -> None:
        """Goes on from a loaded state; what is known here is not forgotten, but for learning rates."""
        self._inherited = saved.ledger.runs
        self._noise |= saved.noise
        self._randomness |= saved.randomness
        self.learning_rates = saved.learning_rates
        for name, count in saved.skipped.items():
            self.skipped[name] = max(count, self.skipped.get(name, 0))
        known = self._lineage
        known.expect(saved.weights, saved.ledger.runs)
        known.changed = max(known.changed, saved.uncounted_changes)
        known.bounds.take(saved.bounds_taken)
        if saved.weights is not None and saved.bounds is not None:
            self._bounds_there = self._bounds_loaded = saved.weights, saved.bounds
        changed = list(saved.changed_settings)
        if saved.settings is not None:
            changed += differences(saved.settings, self._settings)
        self._other_settings += [line for line in changed if line not in self._other_settings]
