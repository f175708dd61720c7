"""``python -m clipless_dp certify`` and ``explain``: what a checkpoint withstands beside (ε, δ), and what it reads."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from clipless_dp.arguments import whole
from clipless_dp.checkpoint import check_writable, load_checkpoint, replacing, write_text
from clipless_dp.datasets import Split
from clipless_dp.errors import CheckpointError, ConfigurationError, InputError
from clipless_dp.model import DPLipModel
from clipless_dp.model.description import differences, settings_of, without_untold
from clipless_dp.robustness import attacks
from clipless_dp.robustness.counterfactuals import Form, counterfactual
from clipless_dp.robustness.curves import RADII, Curve, curve, new_figure
from clipless_dp.robustness.draws import SmoothedCertificate
from clipless_dp.robustness.explanations import prepared
from clipless_dp.robustness.quality import picture, quality

ATTACKS: dict[str, tuple[attacks.Attack, ...]] = {
    "none": (),
    "quick": (attacks.PGD(steps=20, restarts=1), attacks.DeepFool()),
    "all": attacks.DEFAULT,
}


def radius(text: str) -> float:
    """A radius, as a number or a fraction such as ``36/255``."""
    try:
        found = float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        found = math.nan
    if not 0.0 <= found < math.inf:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no radius: give a number of at least 0, or a fraction like 36/255"
        )
    return found


def add_options(certify: argparse.ArgumentParser) -> None:
    """What the command takes besides the options that name data and network."""
    certify.add_argument("checkpoint", type=Path, help="file that train --out or --checkpoint wrote")
    certify.add_argument(
        "--radii",
        type=radius,
        nargs="+",
        metavar="R",
        help="Euclidean radii, numbers or fractions (default: 36/255 72/255 108/255 1)",
    )
    certify.add_argument("--attacks", choices=tuple(ATTACKS), default="quick", help="what is tried against it")
    certify.add_argument("--samples", type=int, help="certify so many held-out samples, the first ones (default: all)")
    certify.add_argument("--attacked-samples", type=int, default=500, help="attack so many of them")
    certify.add_argument("--box", type=float, nargs=2, metavar=("LOW", "HIGH"), help="limits of inputs, for attacks")
    certify.add_argument("--level", type=float, default=0.95, help="confidence of the intervals")
    certify.add_argument("--out", type=Path, metavar="FILE.json", help="write what was found")
    certify.add_argument("--plot", type=Path, metavar="FILE", help="draw the curve; needs matplotlib")


def add_explain_options(explain: argparse.ArgumentParser) -> None:
    """What ``explain`` takes besides the options that name data and network."""
    explain.add_argument("checkpoint", type=Path, help="file that train --out or --checkpoint wrote")
    explain.add_argument(
        "--samples",
        type=int,
        default=5,
        help="explain so many held-out samples, the first ones that are not predicted as --target",
    )
    explain.add_argument("--measured", type=int, default=100, help="measure the maps of so many of them; 0: of none")
    explain.add_argument("--target", type=int, metavar="CLASS", help="class to become (default: the nearest)")
    explain.add_argument("--form", choices=get_args(Form), default="newton", help="step of the counterfactual")
    explain.add_argument("--t", type=float, default=1.0, help="length of the step, relative to the formula")
    explain.add_argument("--box", type=float, nargs=2, metavar=("LOW", "HIGH"), help="limits of inputs")
    explain.add_argument("--out", type=Path, metavar="FILE.json", help="write what was found")
    explain.add_argument("--plot", type=Path, metavar="FILE", help="draw the images; needs matplotlib")


def check_files(out: Path | None, plot: Path | None) -> None:
    """Refuses files that cannot be written, before anything is computed.

    Raises:
        CheckpointError: a folder is missing, or not writable.
        ConfigurationError: matplotlib is missing, or does not know a picture's ending.
    """
    for file in filter(None, (out, plot)):
        check_writable(file)
    if plot is not None:
        known = new_figure().canvas.get_supported_filetypes()
        if plot.suffix and plot.suffix[1:].lower() not in known:
            raise ConfigurationError(f"--plot {plot}: pictures end in one of {', '.join(sorted(known))}")


def load_weights(model: DPLipModel, path: Path) -> dict[str, Any]:
    """Puts the weights of a checkpoint into a model, and returns what the checkpoint says of its run.

    Raises:
        CheckpointError: it is unreadable, or of another network or input norm: the certificate would be of another.
        FileNotFoundError: there is none.
    """
    content = load_checkpoint(path)
    run = content.get("settings")
    run = run if isinstance(run, dict) else {}
    known = run.get("model")
    here = settings_of(model)
    # Loss and constraints decide how weights were found, and not what they compute.
    parts = ("input_norm", "layers")
    theirs = {name: known.get(name) for name in parts} if isinstance(known, dict) else None
    differing = [] if theirs is None else without_untold(differences(theirs, {name: here[name] for name in parts}))
    if differing:
        raise CheckpointError(
            f"{path} belongs to another network ({', '.join(differing[:4])}): give the options that it was trained with"
        )
    try:
        model.net.load_state_dict(content["model"])
    except (KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} does not fit this network: give the options that it was trained with ({error})"
        ) from error
    return run


def certify_checkpoint(model: DPLipModel, data: Split, options: argparse.Namespace) -> None:
    """Prints what is certified of a checkpoint on held-out samples, and what attacks leave, beside its ε.

    Raises:
        CheckpointError: as :func:`load_weights`; or a file cannot be written.
        ConfigurationError: an option is out of range.
    """
    check_files(options.out, options.plot)
    run = load_weights(model, options.checkpoint)
    certify_model(model, data.test, f"held-out samples of {options.dataset}", run, options)


def certify_model(
    model: DPLipModel, data: tuple[Tensor, Tensor], told: str, run: Mapping[str, Any], options: argparse.Namespace
) -> None:
    """Prints what is certified of a model on samples, and what attacks leave, beside its ε.

    Args:
        model: with its weights.
        data: samples and labels.
        told: what they are.
        run: ``epsilon``, ``delta`` and ``relation`` that it was trained for, as far as they are known.
        options: of the command.

    Raises:
        ConfigurationError: an option is out of range.
    """
    inputs, targets = data
    count = len(inputs) if options.samples is None else whole("--samples", options.samples)
    found = curve(
        model,
        (inputs[:count].to(options.device), targets[:count]),
        RADII if options.radii is None else (0.0, *options.radii),
        ATTACKS[options.attacks],
        box=None if options.box is None else (options.box[0], options.box[1]),
        attacked_samples=min(whole("--attacked-samples", options.attacked_samples), len(inputs[:count])),
        level=options.level,
    )
    show_curve(found, told, run, options)


def show_curve(found: Curve, told: str, run: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Prints and writes a curve; arguments as :func:`certify_model`."""
    print(found)
    certificate = found.certificate
    if isinstance(certificate, SmoothedCertificate):
        print(f"smoothing      σ = {certificate.sigma:g}, {certificate.n} draws; a radius is wrong with α = ", end="")
        print(f"{certificate.alpha:g} at most")
    else:
        print(f"Lipschitz      {certificate.lipschitz:.6g} ({certificate.method})")
    epsilon, delta = run.get("epsilon"), run.get("delta")
    if isinstance(epsilon, float) and isinstance(delta, float):
        print(f"privacy        at most ε = {epsilon:g} at δ = {delta:g}, {run.get('relation')}: the run's target")
    if options.out is not None:
        described = found.described(f"the first {len(found.certificate)} {told}")
        facts = {**described, "privacy": {name: run.get(name) for name in ("epsilon", "delta", "relation")}}
        write_text(options.out, json.dumps(facts, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
        print(f"certificate    {options.out}")
    if options.plot is not None:
        with replacing(options.plot) as beside:
            found.plot(beside)
        print(f"plot           {options.plot}")


def explain_checkpoint(model: DPLipModel, data: Split, options: argparse.Namespace) -> None:
    """Prints how far the predictions of held-out samples are from changing, and how good the maps are; draws both.

    Raises:
        CheckpointError: as :func:`load_weights`; or a file cannot be written.
        ConfigurationError: an option is out of range, or matplotlib is missing.
        InputError: what is to be drawn are no images, or a target is no class, or what all are predicted as.
    """
    check_files(options.out, options.plot)
    load_weights(model, options.checkpoint)
    explain_model(model, data.test[0], f"held-out samples of {options.dataset}", options)


def explain_model(model: DPLipModel, samples: Tensor, told: str, options: argparse.Namespace) -> None:
    """As :func:`explain_checkpoint`, of a model with its weights.

    Args:
        model: see above.
        samples: ``(N, ...)``.
        told: what they are.
        options: of the command.

    Raises:
        ConfigurationError: as there.
        InputError: as there.
    """
    count, measured = whole("--samples", options.samples), whole("--measured", options.measured, 0)
    inputs = samples.to(options.device)
    box = None if options.box is None else (options.box[0], options.box[1])
    walk: dict[str, Any] = {"form": options.form, "t": options.t, "box": box}
    rows = _explained(model, inputs, count, options.target)
    found = counterfactual(model, inputs[rows], options.target, **walk)
    print(found)
    left_out = int(rows[-1]) + 1 - len(rows)
    if left_out:
        print(
            f"{left_out} samples before the last of these are left out: they are predicted as {options.target} already"
        )
    known = quality(model, inputs[:measured], box=box or (0.0, 1.0)) if measured else None
    if known is not None:
        print(f"\n{known}\nof the first {len(inputs[:measured])} {told}")
    if options.out is not None:
        numbers = {
            name: [round(value, 9) if math.isfinite(value) else None for value in getattr(found, name).tolist()]
            for name in ("predictions", "found", "scores", "slopes", "radii", "distances", "tightness")
        }
        means = {} if known is None else known.means()
        facts = {
            "data": f"the first {told}",
            "rows": rows.tolist(),
            "counterfactuals": numbers,
            "quality": {name: mean if math.isfinite(mean) else None for name, mean in means.items()},
        }
        write_text(options.out, json.dumps(facts, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
        print(f"explanations   {options.out}")
    if options.plot is not None:
        with replacing(options.plot) as beside:
            picture(model, inputs[rows], beside, options.target, **walk)
        print(f"plot           {options.plot}")


def _explained(model: DPLipModel, inputs: Tensor, count: int, target: int | None) -> Tensor:
    """Places of the first samples, so many of them, that can become a class: those that are not predicted as it."""
    if target is None:
        return torch.arange(min(count, len(inputs)))
    found = torch.empty(0, dtype=torch.long)
    for start in range(0, len(inputs), 1024):
        _, _, own = prepared(model, inputs[start : start + 1024], None)
        found = torch.cat((found, start + (own.cpu() != target).nonzero().flatten()))
        if len(found) >= count:
            break
    if not len(found):
        raise InputError(f"every held-out sample is predicted as {target} already: name another --target")
    return found[:count]


def refuse_front(preset: Any) -> None:
    """Refuses presets whose networks read what a front-end made of samples: the checkpoint does not hold it.

    Raises:
        ConfigurationError: it is one of these.
    """
    if preset.front is not None or preset.statistics is not None:
        raise ConfigurationError(
            f"preset {preset.name!r} reads features, whose statistics a checkpoint does not hold: use "
            "clipless_dp.robustness.certify(model, data, front=...), which certifies through features of a known "
            "constant"
        )
