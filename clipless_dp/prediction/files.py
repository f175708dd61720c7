"""One file with what predicts, written as a whole or not at all, and read without running anything from it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from accounting import Ledger
from accounting.errors import LedgerFormatError
from clipless_dp.checkpoint import load_checkpoint
from clipless_dp.errors import CheckpointError, ConfigurationError
from clipless_dp.model import lineage
from clipless_dp.prediction.links import Link
from clipless_dp.prediction.predictor import Predictor, Promise
from clipless_dp.statement import PrivacyStatement

_KIND = "clipless_dp.result"
RESULT_FORMAT = 1
_NEEDED = {"made_by", "state", "settings", "probe", "link", "outputs", "classes", "threshold", "statement"}

_TOLERANCE = 1e-3
"""Of the largest score: other kernels, threads and versions round otherwise, by some 1e-5 in float32; another network,
or one without its gates, is off by far more."""


@dataclass(frozen=True)
class Probe:
    """Made-up rows, and what the network says of them: whether a network that was built anew is the same shows there.

    Attributes:
        inputs: of no data.
        scores: a function of the weights, which are released.
    """

    inputs: Tensor
    scores: Tensor

    @classmethod
    def of(cls, predictor: Predictor, inputs: Tensor) -> Probe:
        """The probe of a network, on the CPU."""
        return cls(inputs.detach().cpu(), replace(predictor, encode=None).scores(inputs))

    def require(self, predictor: Predictor, name: str) -> None:
        """Refuses a network that says something else.

        Raises:
            CheckpointError: it does.
        """
        try:
            scores = replace(predictor, encode=None).scores(self.inputs)
        except (RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"the network does not run on what {name} holds: {error}") from error
        if scores.dtype != self.scores.dtype:
            raise CheckpointError(
                f"{name} holds the weights of a network of {self.scores.dtype}, this one is of {scores.dtype}, which "
                "rounds them: build it as it was for training"
            )
        largest = float(self.scores.nan_to_num(0.0).abs().max())
        if scores.shape != self.scores.shape or not torch.allclose(
            scores, self.scores, rtol=0.0, atol=_TOLERANCE * max(largest, 1e-6), equal_nan=True
        ):
            raise CheckpointError(
                f"{name} holds the weights of a network that computes something else than this one: build it as it was "
                "for training, with the same gates, activations and shape, wrapped by DPLipModel where samples are "
                "projected"
            )


@dataclass(frozen=True)
class Content:
    """What a file of a result holds.

    Attributes:
        name: of the file, for messages.
        made_by: what made the result: ``"fit"``, ``"preset"`` or ``"table"``.
        state: weights and buffers, by name.
        settings: what the network is built from.
        values: the rest.
    """

    name: str
    made_by: str
    state: Mapping[str, Tensor]
    settings: Mapping[str, Any]
    values: Mapping[str, Any]

    @classmethod
    def of(cls, values: Mapping[str, Any], name: str) -> Content:
        """What :func:`content_of` returned, read back.

        Raises:
            CheckpointError: it is something else.
        """
        if values.get("result") != _KIND:
            raise CheckpointError(
                f"{name} is a checkpoint that training goes on from, by fit(..., checkpoint={name!r}): what predicts "
                "is written by result.save(path)"
            )
        if values.get("result_format") != RESULT_FORMAT:
            raise CheckpointError(
                f"{name} has format {values.get('result_format')!r} of results, this version reads {RESULT_FORMAT}"
            )
        if lacking := _NEEDED - values.keys():
            raise CheckpointError(f"{name} lacks {sorted(lacking)}")
        for part in ("state", "settings"):
            if not isinstance(values[part], Mapping):
                raise CheckpointError(f"{name} is altered: its {part} is {type(values[part]).__name__}, no mapping")
        return cls(name, str(values["made_by"]), values["state"], values["settings"], values)


def content_of(
    predictor: Predictor, made_by: str, state: Mapping[str, Tensor], settings: Mapping[str, Any], probe: Probe
) -> dict[str, Any]:
    """What a file holds: tensors and plain values.

    Args:
        predictor: what predicts.
        made_by: see :class:`Content`.
        state: see :class:`Content`.
        settings: plain values.
        probe: of the same predictor.

    Raises:
        ConfigurationError: a label is neither text nor a number.
    """
    # Exact types: of others, a subclass of str too, a file would name code to be run.
    if not all(type(label) in (str, int, float, bool) for label in predictor.classes or ()):
        raise ConfigurationError(
            f"a file holds labels that are plain text or numbers (str, int, float, bool), got {predictor.classes!r:.99}"
        )
    promised = predictor.promised
    return {
        "result": _KIND,
        "result_format": RESULT_FORMAT,
        "made_by": made_by,
        "state": {name: value.detach().cpu() for name, value in state.items()},
        "settings": dict(settings),
        "probe": {"inputs": probe.inputs, "scores": probe.scores},
        "link": list(predictor.link),
        "outputs": predictor.outputs,
        "classes": None if predictor.classes is None else list(predictor.classes),
        "threshold": predictor.threshold,
        "target_range": None if predictor.target_range is None else list(predictor.target_range),
        "statement": promised.statement.to_json(),
        "epsilon": promised.epsilon,
        "delta": promised.delta,
    }


def read_result(path: str | os.PathLike[str]) -> Content:
    """What a file holds, to the CPU, with ``weights_only=True``.

    Raises:
        CheckpointError: the file is damaged, foreign or newer, or a checkpoint of training.
        FileNotFoundError: there is none.
    """
    return Content.of(load_checkpoint(path), os.fspath(path))


def rebuilt(content: Content, net: nn.Module, holder: nn.Module | None = None, **more: Any) -> Predictor:
    """What predicts, of a network that was built anew and is given the weights of a file.

    Args:
        content: of the file.
        net: takes samples as they are.
        holder: the part of it that holds the state; by default all of it.
        more: attributes of :class:`Predictor` that are no plain values.

    Raises:
        CheckpointError: the weights do not fit the network, or it computes something else: it is as it was before.
    """
    holder = net if holder is None else holder
    values = content.values
    try:
        statement = PrivacyStatement(json.loads(values["statement"]))
        runs = _runs_of(statement.facts)
        predictor = Predictor(
            net,
            Link.read(values["link"]),
            int(values["outputs"]),
            Promise(*_bound_of(values["epsilon"], values["delta"]), statement),
            classes=values["classes"],
            threshold=values["threshold"],
            target_range=None if values["target_range"] is None else tuple(values["target_range"]),
            **more,
        )
        probe = Probe(values["probe"]["inputs"], values["probe"]["scores"])
    except (AttributeError, KeyError, TypeError, ValueError, ConfigurationError) as error:
        raise CheckpointError(f"{content.name} is incomplete or altered: {error!r}") from error
    with _undone(holder):
        try:
            with torch.no_grad():
                holder.load_state_dict(dict(content.state))
        except (RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"the weights of {content.name} do not fit this network: {error}") from error
        probe.require(predictor, content.name)
    known = lineage.of(holder)
    # Training that goes on from here is another run: its ledger lacks these.
    known.add_runs(runs)
    known.settle(dict(holder.named_parameters()))
    # Made anew, since it counts the runs that are known then.
    return replace(predictor)


@contextmanager
def _undone(net: nn.Module) -> Iterator[None]:
    """Gives a network its parameters and buffers back where what is within raises."""
    before = {name: value.detach().clone() for name, value in net.state_dict().items() if isinstance(value, Tensor)}
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for name, value in net.state_dict().items():
                if name in before and value.shape == before[name].shape:
                    value.copy_(before[name])
        raise


def _bound_of(epsilon: Any, delta: Any) -> tuple[float, float]:
    if not (float(epsilon) >= 0.0 and 0.0 < float(delta) < 1.0):
        raise ValueError(f"ε = {epsilon!r} at δ = {delta!r} is no promise")
    return float(epsilon), float(delta)


def _runs_of(facts: Mapping[str, Any]) -> dict[str, int]:
    """The runs that the ledger of a statement knows, which weights come from; one of its own where it names none."""
    state = facts["ledger"]
    try:
        runs = Ledger.from_state_dict(state.get("ledger", state)).runs
    except LedgerFormatError:
        # That of an accountant of a user's own.
        runs = {}
    told = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    return runs or {f"file {told}": 1}
