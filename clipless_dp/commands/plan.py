"""``plan``: which settings train would take, and why.

Prints settings and their reasons from public numbers: how many rows, of which shape, ε and δ. Of a file it reads
header, shapes and the number of rows; no value decides anything.
"""

from __future__ import annotations

import argparse
import math
import shlex
from pathlib import Path

from accounting import calibrate_noise_multiplier
from clipless_dp import presets
from clipless_dp.arguments import positive, share, whole
from clipless_dp.commands import columns, images, sources
from clipless_dp.commands import options as shared
from clipless_dp.commands.choosing import TABLES, choose
from clipless_dp.commands.networks import model_of
from clipless_dp.commands.train import given_of_networks
from clipless_dp.display import Table
from clipless_dp.errors import ConfigurationError
from clipless_dp.tables.settings import LABELS_SHARE, STATISTICS_SHARE, learning
from clipless_dp.training import suggest_settings

_HELD_OUT = 5
"""Of so many rows of a file about one is held out."""


def add(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    shared.add_data(parser, required=False)
    parser.add_argument("--rows", type=int, help="public number of training rows (default: four fifths of the file's)")
    parser.add_argument("--shape", type=int, nargs="+", metavar="SIZE", help="of a sample: columns, or channels H W")
    parser.add_argument("--epsilon", type=float, required=True, help="target ε")
    parser.add_argument("--delta", type=float, help="target δ (default: the power of ten below one over the rows)")
    parser.add_argument("--minutes", type=float, help="time of the run, of a network: measured here and now")
    parser.add_argument("--preset", choices=(*presets.PRESETS, TABLES), help="(default: by the kind of data)")
    shared.add_network(parser)
    parser.set_defaults(parser=parser)


def run(options: argparse.Namespace, only: argparse.Namespace) -> None:
    """Prints a table of settings.

    Raises:
        ConfigurationError: what is needed is not said, or out of range.
    """
    rows, shape, of_columns = _public(options)
    epsilon = positive("--epsilon", options.epsilon)
    delta = 10.0 ** min(-1, math.floor(-math.log10(rows + 1))) if options.delta is None else options.delta
    delta = share("--delta", delta, "(0, 1)")
    built = given_of_networks(only)
    if options.preset is not None and built:
        raise ConfigurationError(f"--preset {options.preset} decides what {', '.join(built)} would: leave out one")
    network = bool(built) or options.minutes is not None
    if options.minutes is not None and options.preset is not None:
        raise ConfigurationError(
            "--minutes chooses epochs of a network of options; a preset has its own: leave out one"
        )
    choice = choose(shape, columns=of_columns, preset=options.preset, network=network)
    print(f"{rows} rows of shape {shape}, ε = {epsilon:g} at δ = {delta:g}", *choice.told, sep="\n", end="\n\n")
    if choice.name is None:
        model = model_of(options, shape, _classes(options))
        print(suggest_settings(model, rows, epsilon, delta, minutes=options.minutes))
    elif choice.name == TABLES:
        print(_of_tables(rows, epsilon, delta).text())
    else:
        print(_of_preset(presets.get(choice.name), rows, epsilon, delta).text())
    if delta >= 1.0 / rows:
        print(f"note: δ = {delta:g} is not below one over the {rows} rows: a release of one row as it is would meet it")
    if options.dataset is not None and options.minutes is None:
        print(f"\npython -m clipless_dp train {shlex.join(_said(only, delta))} --out model.pt")


def _said(only: argparse.Namespace, delta: float) -> list[str]:
    """What was given, as train takes it."""
    left_out = ("run", "parser", "command", "rows", "shape", "minutes", "delta", "dataset")
    found = ["--data", str(only.dataset)]
    for name, value in vars(only).items():
        if name in left_out or value is None or value is False or value == []:
            continue
        flag = f"--{name.replace('_', '-')}"
        if value is True or name == "columns":
            found += [flag] if value is True else [flag, ",".join(value)]
            continue
        listed = value if isinstance(value, (list, tuple)) else [value]
        found += [part for one in listed for part in (flag, one)] if name == "categories" else [flag, *map(str, listed)]
    return [*found, "--delta", f"{delta:g}"]


def _classes(options: argparse.Namespace) -> int:
    return len(options.labels) if options.labels is not None else options.classes or 2


def _public(options: argparse.Namespace) -> tuple[int, tuple[int, ...], bool]:
    """Rows, shape, and whether it is of columns."""
    if options.dataset is None:
        if options.rows is None or options.shape is None:
            raise ConfigurationError("say --data FILE, or --rows N and --shape SIZE ...: columns, or channels H W")
        return whole("--rows", options.rows), tuple(whole("--shape", size) for size in options.shape), False
    if options.shape is not None:
        raise ConfigurationError(f"{options.dataset} has a shape: leave --shape out")
    name = str(options.dataset)
    kind = sources.kind_of(name)
    if kind == "columns":
        table = columns.read_table(name, options)
        encoding = columns.encoding_of(table, columns.label_of(table, options), None, options)
        count = table.rows - table.rows // _HELD_OUT
        shape: tuple[int, ...] = (encoding.width,)
    elif kind == "folder":
        count, shape = _of_folder(Path(name), options)
    else:
        count, shape = sources.size_of(options, kind)
        count -= 0 if kind == "named" else count // _HELD_OUT
    return (count if options.rows is None else whole("--rows", options.rows)), shape, kind == "columns"


def _of_folder(folder: Path, options: argparse.Namespace) -> tuple[int, tuple[int, ...]]:
    train, test = images.parts_of(folder)
    files, _ = images.labelled_files(train, images.class_names(train))
    pixels = images.read_images(files[:1], options)
    shape = (1 if pixels.ndim == 3 else 3, *pixels.shape[1:3])
    return len(files) if test is not None else len(files) - len(files) // _HELD_OUT, shape


def _sigma(epsilon: float, delta: float, batch: int, rows: int, epochs: float) -> tuple[float, int]:
    steps = max(1, round(epochs * rows / batch))
    rate = min(1.0, batch / rows)
    found = calibrate_noise_multiplier(
        target_epsilon=epsilon, delta=delta, sample_rate=rate, steps=steps, accountant="rdp"
    )
    return float(found), steps


def _of_tables(rows: int, epsilon: float, delta: float) -> Table:
    settings = learning(rows, epsilon, 1.0, 60.0)
    sigma, steps = _sigma(epsilon, delta, settings["batch_size"], rows, settings["epochs"])
    charged = 100 * (STATISTICS_SHARE + LABELS_SHARE)
    lines = [
        ("statistics", f"{charged:.0f} % of the budget", "scales of the columns and shares of the classes, charged"),
        ("steps", str(steps), "100, up to 300 where ε·N is large"),
        ("batch_size", str(settings["batch_size"]), "all rows, at most 4096"),
        ("lr", f"{settings['lr']:.4g}", "ε·N/1000, at most 60 (of more than two classes 30, of numbers 8)"),
        ("momentum", f"{settings['momentum']:g}", "at every size"),
    ]
    return Table(("setting", "value", "why"), lines, ("left",) * 3, [_noise(sigma, steps)])


def _of_preset(preset: presets.Preset, rows: int, epsilon: float, delta: float) -> Table:
    settings = preset.arguments(rows)
    batch = min(rows, settings["batch_size"])
    sigma, steps = _sigma(epsilon, delta, batch, rows, settings["epochs"])
    whole = "; all rows at most" if batch < settings["batch_size"] else ""
    lines = [
        (name, f"{batch if name == 'batch_size' else value}", "of the preset" + whole * (name == "batch_size"))
        for name, value in settings.items()
    ]
    return Table(("setting", "value", "why"), lines, ("left",) * 3, [_noise(sigma, steps)])


def _noise(sigma: float, steps: int) -> str:
    return f"{steps} steps at σ of about {sigma:.3g}, before what statistics cost"
