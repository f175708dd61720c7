"""One file with what predicts, written as a whole or not at all, and read without running anything from it."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from clipless_dp.checkpoint import load_checkpoint
from clipless_dp.errors import CheckpointError, ConfigurationError
from clipless_dp.model import lineage
from clipless_dp.prediction.links import Link
from clipless_dp.prediction.predictor import Predictor, Promise, runs_of
from clipless_dp.statement import PrivacyStatement

_KIND = "clipless_dp.result"
RESULT_FORMAT = 1
_NEEDED = {"made_by", "state", "settings", "probe", "link", "outputs", "classes", "threshold", "statement"}

ODD = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, ConfigurationError)
"""What reading a file trips over that was altered: whatever is where something else should be."""

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
        except ODD as error:
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
        made_by: what made the result: ``"fit"``, ``"preset"``, ``"table"`` or ``"one class"``.
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
        if type(values.get("result")) is not str or values["result"] != _KIND:
            raise CheckpointError(
                f"{name} is a checkpoint that training goes on from, by fit(..., checkpoint={name!r}): what predicts "
                "is written by result.save(path)"
            )
        told = values.get("result_format")
        if type(told) is not int or told != RESULT_FORMAT:
            raise CheckpointError(f"{name} has format {told!r:.99} of results, this version reads {RESULT_FORMAT}")
        if lacking := _NEEDED - values.keys():
            raise CheckpointError(f"{name} lacks {sorted(lacking)}")
        for part in ("state", "settings"):
            if not isinstance(values[part], Mapping):
                raise CheckpointError(f"{name} is altered: its {part} is {type(values[part]).__name__}, no mapping")
        if not all(type(key) is str and isinstance(value, Tensor) for key, value in values["state"].items()):
            raise CheckpointError(f"{name} is altered: its state holds something else than tensors by name")
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
        runs = runs_of(statement) or {_name_of(statement): 1}
        probe = Probe(values["probe"]["inputs"], values["probe"]["scores"])
        promise = Promise(*_bound_of(values["epsilon"], values["delta"], statement.facts), statement, runs)
        predictor = Predictor(
            net,
            Link.read(values["link"]),
            _outputs_of(values["outputs"], probe),
            promise,
            classes=values["classes"],
            threshold=values["threshold"],
            target_range=_range_of(values["target_range"]),
            **more,
        )
    except ODD as error:
        raise CheckpointError(f"{content.name} is incomplete or altered: {error!r}") from error
    with _undone(holder):
        try:
            with torch.no_grad():
                holder.load_state_dict(dict(content.state))
        except ODD as error:
            raise CheckpointError(f"the weights of {content.name} do not fit this network: {error}") from error
        probe.require(predictor, content.name)
    # Training that goes on from here is another run: its ledger lacks these.
    lineage.of(holder).add_runs(runs)
    for part in (holder, net):
        lineage.of(part).leave()
    # Weights that were there before are gone, and the runs on them are none of these weights.
    return replace(predictor, promise=replace(promise, runs=lineage.of(net).runs))


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


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"its {name} is of type {type(value).__name__}, no number")
    return float(value)


def _outputs_of(outputs: Any, probe: Probe) -> int:
    """Scores of one sample, once they are as many as those of the made-up rows."""
    if type(outputs) is not int or outputs < 1:
        raise ValueError(f"{outputs!r:.99} scores of a sample")
    if not (isinstance(probe.inputs, Tensor) and isinstance(probe.scores, Tensor)):
        raise ValueError("its made-up rows are no tensors")
    if probe.scores.dim() and len(probe.scores) and outputs != probe.scores[0].numel():
        raise ValueError(f"{outputs} scores of a sample, {probe.scores[0].numel()} of a made-up row")
    return outputs


def _range_of(found: Any) -> tuple[float, float] | None:
    if found is None:
        return None
    low, high = (_number("target_range", end) for end in found)
    if not low < high:
        raise ValueError(f"a range of targets from {low} to {high}")
    return low, high


def _bound_of(epsilon: Any, delta: Any, facts: Mapping[str, Any]) -> tuple[float, float]:
    """ε and δ, once they are those of the statement beside them."""
    promised = _number("epsilon", epsilon), _number("delta", delta)
    if not (promised[0] >= 0.0 and 0.0 < promised[1] < 1.0):
        raise ValueError(f"ε = {epsilon!r} at δ = {delta!r} is no promise")
    told = facts["epsilon"]["epsilon"], facts["epsilon"]["delta"]
    stated = math.inf if told[0] is None else _number("stated epsilon", told[0]), _number("stated delta", told[1])
    if stated != promised:
        raise ValueError(
            f"ε = {promised[0]:g} at δ = {promised[1]:g} beside a statement of ε = {stated[0]:g} at δ = {stated[1]:g}"
        )
    return promised


def _name_of(statement: PrivacyStatement) -> str:
    """Of the run that the weights of a file come from, whose ledger names none."""
    told = hashlib.sha256(json.dumps(statement.facts, sort_keys=True).encode()).hexdigest()[:32]
    return f"file {told}"
