"""The privacy statement: what was promised about whom, on which grounds, and what the promise leaves out.

It answers the questions that Ponomareva et al. 2023, "How to DP-fy ML", section 5.3, want answered next to every ε:
setting, unit of privacy, neighbouring relation, data accesses covered, what is released, sampling, accounting, and how
a reader can check all that.
"""

from __future__ import annotations

import dataclasses
import html
import json
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from pathlib import Path
from typing import Any

import torch

from clipless_dp.checkpoint import check_writable
from clipless_dp.errors import ConfigurationError
from clipless_dp.noise import ReproducibleNoise, SecureNoise, SystemNoise, source_name
from clipless_dp.optim import CliplessDPOptimizer

STATEMENT_FORMAT = 2
SUFFIXES = (".md", ".json", ".html")
_STEPS = ("gaussian_step", "gaussian_vector_step")
_SHOWN_RUNS = 20
"""Lines of a noise schedule in the readable forms; the JSON holds all of them."""

_RELATIONS = {
    "add_or_remove_one": "adding or removing one unit",
    "replace_one": "replacing one unit by another",
}
_NOISE = {
    source_name(SystemNoise): "a generator whose whole state comes from the operating system; seeds set by user code "
    "do not reach it. It is statistically sound, not cryptographic",
    source_name(SecureNoise): "a cryptographic generator keyed by the operating system at every step, and sums rounded "
    "to a public grid, so that floating point tells nothing about what the noise hides",
    source_name(ReproducibleNoise): "REPRODUCIBLE: whoever knows the seed can remove the noise",
}
_DRAWN = {
    "seeded": "Poisson, from a seed: secret only as long as the seed is",
    "unknown": "Poisson, as was recorded by hand or by an earlier version, not checked",
    "vouched": "Poisson, by a sampler of the user's, not checked",
    "announced": "Poisson: each sample joins each batch by a coin flip of its own; checked where it was charged",
    "none": "none claimed: charged as if every step read all the data",
}
"""How batches were drawn, the least trustworthy first."""

_UNCOVERED = (
    "Choices made by looking at results on this data: hyper-parameters, architecture, which run to keep. Each run that "
    "looked at the data adds to ε, and only the runs in the ledger are counted.",
    "Other uses of the same data: other models, statistics (means, vocabularies, normalisation constants) computed "
    "from it outside this training, features or initial weights that were trained on it.",
    "Data sets on which features or initial weights were trained before: their subjects get no promise from this one.",
    "Training losses, training accuracies, batch sizes and counts of rejected samples: shown to whoever ran the "
    "training, not protected, not to be published.",
    "The size of the data set, which is treated as public.",
    "Inference: what users send to the finished model.",
    "Whoever holds the data or watches the training machine: memory, gradients and batches are in the clear there.",
)


@dataclass(frozen=True)
class Section:
    """One part of a readable statement.

    Attributes:
        title: its heading.
        text: paragraphs.
        items: a list below them.
        header: column titles of a table; empty where it is of names and values.
        rows: of the table.
        figure: whether the curve stands here.
        printed: what other parts of the library print as tables, kept as it is.
    """

    title: str
    text: tuple[str, ...] = ()
    items: tuple[str, ...] = ()
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    figure: bool = False
    printed: tuple[str, ...] = ()


@dataclass(frozen=True)
class PrivacyStatement:
    """What :func:`report` found, in three forms.

    Attributes:
        facts: plain values, as in the JSON.
        files: what was written.
    """

    facts: Mapping[str, Any]
    files: tuple[Path, ...] = ()

    @property
    def findings(self) -> list[str]:
        """What weakens the promise, or should be looked at before relying on it."""
        return list(self.facts["findings"])

    def to_json(self) -> str:
        """The facts, the whole ledger included."""
        return json.dumps(self.facts, indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    def to_markdown(self) -> str:
        """The readable statement; the curve is a table there."""
        lines = [f"# {self.facts['title']}", ""]
        for section in _sections(self.facts):
            lines += [f"## {section.title}", ""]
            lines += [line for paragraph in section.text for line in (paragraph, "")]
            lines += [f"* {item}" for item in section.items] + [""] * bool(section.items)
            if section.rows:
                header = section.header or ("", "")
                lines += [_row(header), _row(("---",) * len(header)), *map(_row, section.rows), ""]
            lines += [line for table in section.printed for line in ("```", table, "```", "")]
        return "\n".join(lines)

    def to_html(self) -> str:
        """One page that loads nothing else, with the curve as a picture."""
        body = [f"<h1>{html.escape(self.facts['title'])}</h1>"]
        for section in _sections(self.facts):
            body.append(f"<section><h2>{html.escape(section.title)}</h2>")
            body += [f"<p>{html.escape(paragraph)}</p>" for paragraph in section.text]
            if section.items:
                body.append("<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in section.items) + "</ul>")
            if section.rows:
                body.append(_table(section))
            body += [f"<pre>{html.escape(table)}</pre>" for table in section.printed]
            if section.figure:
                body.append(f"<figure>{_curve(self.facts['epsilon']['curve'])}</figure>")
            body.append("</section>")
        return _PAGE.format(title=html.escape(self.facts["title"]), body="\n".join(body))

    def save(self, path: str | os.PathLike[str]) -> PrivacyStatement:
        """Writes ``path.md``, ``path.json`` and ``path.html``; one of these endings in ``path`` is left out first.

        Raises:
            CheckpointError: the folder is not writable.
        """
        files = statement_files(path)
        contents = (self.to_markdown(), self.to_json(), self.to_html())
        for file, content in zip(files, contents, strict=True):
            check_writable(file)
            file.write_text(content, encoding="utf-8")
        return dataclasses.replace(self, files=files)

    def __str__(self) -> str:
        return self.to_markdown()


def statement_files(path: str | os.PathLike[str]) -> tuple[Path, ...]:
    """The three files that :meth:`PrivacyStatement.save` writes."""
    base = Path(path)
    base = base.with_suffix("") if base.suffix in SUFFIXES else base
    return tuple(base.with_name(base.name + suffix) for suffix in SUFFIXES)


def report(
    optimizer: CliplessDPOptimizer,
    path: str | os.PathLike[str] | None = None,
    *,
    delta: float | None = None,
    unit: str = "one sample: one row of the training data, its target included",
    title: str = "Privacy statement",
    notes: Sequence[str] = (),
    audit: object = None,
) -> PrivacyStatement:
    """States what the steps taken so far guarantee, and writes it as Markdown, JSON and one HTML page.

    It reads the ledger, the current bounds and public settings: nothing of the training data, so that it may be
    published with the weights.

    Args:
        optimizer: that trained; of :func:`clipless_dp.fit` it is ``result.optimizer``.
        path: where to write, without or with one of the endings ``.md``, ``.json``, ``.html``; ``None`` writes nothing.
        delta: the δ in (0, 1) of the summary; by default that of the optimizer's budget (:func:`fit` sets one), or else
            the largest power of ten of at most one over the data set's size.
        unit: whom or what one row stands for. Where a person may have contributed several rows, say so here.
        title: heading.
        notes: what else a reader must know, in your words.
        audit: what an audit returned (or several, in a list): printed as it prints itself; one whose ``passed`` is
            false is a finding.

    Raises:
        ConfigurationError: δ lies outside (0, 1).
        CheckpointError: the folder is not writable.

    Source:
        Ponomareva et al. 2023, "How to DP-fy ML", sections 5.2 (which ε are meaningful) and 5.3 (what to report).
    """
    if delta is not None and not (isinstance(delta, float) and 0.0 < delta < 1.0):
        raise ConfigurationError(f"delta must be a number in (0, 1), got {delta!r}")
    facts = _facts(optimizer, delta, unit, title, notes, audit)
    facts["findings"] = list(_findings(optimizer, facts))
    statement = PrivacyStatement(facts)
    return statement if path is None else statement.save(path)


def _facts(
    optimizer: CliplessDPOptimizer,
    delta: float | None,
    unit: str,
    title: str,
    notes: Sequence[str],
    audit: object,
) -> dict[str, Any]:
    size = optimizer.dataset_size
    if delta is None:
        delta = 10.0 ** min(-1, math.floor(-math.log10(size))) if optimizer.budget is None else optimizer.budget[1]
    deltas = [delta * 10.0**-index for index in range(7)]
    curve = []
    for value in deltas:
        # Read before the conversion to a plain float: accountants of this package also say how tight they are.
        bound = optimizer.accountant.get_epsilon(value)
        lower = getattr(bound, "lower", None)
        curve.append(
            {
                "delta": value,
                "epsilon": _number(float(bound)),
                "lower": None if lower is None else _number(float(lower)),
                "engine": getattr(bound, "engine", None),
            }
        )
    from clipless_dp import __version__

    sensitivity = optimizer.model.sensitivity()
    entries = [
        {
            "event": line.event.kind,
            "noise_multiplier": getattr(line.event, "noise_multiplier", None),
            "sample_rate": (rate := getattr(getattr(line.event, "sampling", None), "sample_rate", 1.0)),
            "count": line.count,
            # Whoever claims nothing need not be believed.
            "drawn": "none" if line.event.kind in _STEPS and rate == 1.0 else line.provenance.sampling or "unknown",
            "seeded_masks": line.provenance.seeded_masks,
            "noise": line.provenance.noise or None,
            "run": line.provenance.run or None,
        }
        for line in optimizer.accountant.ledger.lines
    ]
    accountant = type(optimizer.accountant)
    audits = [] if audit is None else list(audit) if isinstance(audit, (list, tuple)) else [audit]
    return {
        "format": "clipless_dp.privacy_statement",
        "version": STATEMENT_FORMAT,
        "title": title,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "unit": unit,
        "relation": str(getattr(optimizer.accountant, "relation", "add_or_remove_one")),
        "epsilon": {**curve[0], "curve": curve},
        "dataset_size": size,
        "sampling": {
            "declared": optimizer.sampling,
            "sample_rate": optimizer.sample_rate,
            "expected_batch_size": optimizer.expected_batch_size,
            "drawn": {kind: count for kind in _DRAWN if (count := _steps_of(entries, "drawn", kind))},
        },
        "steps": {
            "recorded": sum(entry["count"] for entry in entries if entry["event"] in _STEPS),
            "taken": optimizer.steps_taken,
            "entries": entries,
        },
        "learning_rates": [
            {"rates": [None if rate is None else _number(rate) for rate in rates], "count": count}
            for rates, count in optimizer.learning_rates
        ],
        "noise": {
            "allocation": optimizer.allocation,
            "sources": list(optimizer.noise_sources),
            "deviations": optimizer.noise_deviations(),
        },
        "weights": {
            "as_counted": optimizer.weights_are_counted(),
            "uncounted_changes": optimizer.uncounted_changes,
            "changed_settings": optimizer.changed_settings(),
        },
        "bounds": {
            "relation": sensitivity.relation,
            "total": sensitivity.total,
            "per_parameter": dict(sensitivity.per_parameter),
            "layers": [
                {name: _number(value) if isinstance(value, float) else value for name, value in vars(layer).items()}
                for layer in sensitivity.layers
            ],
        },
        "accountant": {"class": f"{accountant.__module__}.{accountant.__qualname__}", "engine": curve[0]["engine"]},
        "versions": {
            "clipless_dp": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "ledger": optimizer.accountant.state_dict(),
        "not_covered": list(_UNCOVERED),
        "notes": [str(note) for note in notes],
        "audits": [
            {"kind": type(one).__name__, "passed": getattr(one, "passed", None), "text": str(one)} for one in audits
        ],
    }


def _steps_of(entries: Sequence[Mapping[str, Any]], name: str, value: object) -> int:
    """How many steps have this property."""
    return sum(entry["count"] for entry in entries if entry["event"] in _STEPS and entry[name] == value)


def _number(value: float) -> float | None:
    """JSON knows no infinity: ``None`` is no bound."""
    return value if math.isfinite(value) else None


def _findings(optimizer: CliplessDPOptimizer, facts: Mapping[str, Any]) -> Iterator[str]:
    summary, steps, size = facts["epsilon"], facts["steps"], facts["dataset_size"]
    if steps["recorded"] == 0:
        yield "No step is recorded: nothing was trained, or another optimizer holds the ledger."
    if summary["epsilon"] is None:
        yield "No finite ε is certified at this δ: there is no promise."
    elif summary["epsilon"] > 10.0:
        yield (
            f"ε = {_shown(summary['epsilon'])} is above 10, where the number alone promises little: what protection "
            "there is must be argued otherwise, for instance by audits."
        )
    if summary["delta"] > 1.0 / size:
        yield f"δ = {summary['delta']:g} exceeds 1/{size}: publishing one whole record at random would satisfy it."
    for name in facts["noise"]["sources"]:
        if name == source_name(ReproducibleNoise):
            yield (
                "The noise was reproducible: it is a function of a seed. Whoever learns the seed can subtract the "
                "noise, and the promise is void for them. Such a run is for experiments."
            )
        elif name not in _NOISE:
            yield f"The noise came from {name}, which is not a source of this package and was not checked."
    entries = steps["entries"]
    unnamed = sum(entry["count"] for entry in entries if entry["noise"] is None)
    if unnamed:
        yield (
            f"The records of {unnamed} of {sum(entry['count'] for entry in entries)} entries do not say where their "
            "noise came from: they were made by hand or by an earlier version, and were not checked."
        )
    unsampled = sum(entry["count"] for entry in entries if entry["event"] in _STEPS and entry["sample_rate"] == 1.0)
    if unsampled and optimizer.sample_rate < 1.0:
        yield (
            f"{unsampled} of {steps['recorded']} steps were charged without amplification by sampling (q = 1), since "
            "no Poisson draw was announced for them: the ε shown holds, and is larger than it need be."
        )
    drawn = facts["sampling"]["drawn"]
    if "seeded" in drawn:
        yield (
            f"The batches of {drawn['seeded']} of {steps['recorded']} steps are a function of a seed: whoever learns "
            "the seed knows who was in which batch, and sampling amplifies nothing for them. Such a run is for "
            "experiments."
        )
    if "vouched" in drawn:
        yield (
            "Whoever ran the training vouches for Poisson sampling by a sampler of their own in "
            f"{drawn['vouched']} of {steps['recorded']} steps; it was not checked."
        )
    if "unknown" in drawn:
        yield (
            f"The records of {drawn['unknown']} of {steps['recorded']} steps do not say how batches were drawn: they "
            "were made by hand or by an earlier version, and were not checked."
        )
    if masks := _steps_of(entries, "seeded_masks", True):
        yield (
            f"Dropout masks and random views of {masks} of {steps['recorded']} steps, if there were any, are a "
            "function of a seed: for whoever learns it they depend on who else is in a batch, and a sample may change "
            "those of all others. Such a run is for experiments."
        )
    weights = facts["weights"]
    if not weights["as_counted"]:
        yield (
            "The model's weights are not those that the last recorded step left: something else has set or trained "
            "them since. Unless that read none of the data, the ε shown is not that of these weights."
        )
    if weights["uncounted_changes"]:
        yield (
            f"Before {weights['uncounted_changes']} of the steps the weights were not those that a step had left: "
            "something else had set or trained them. Unless that read none of the data, the ε shown is too small."
        )
    if weights["changed_settings"]:
        yield (
            "Earlier steps were taken under other settings of the model ("
            + "; ".join(weights["changed_settings"])
            + "): "
            "each was charged by its own bounds, and the bounds shown here are the latest."
        )
    if optimizer.ledger_is_incomplete():
        yield (
            "Another optimizer took private steps on this model that this ledger does not hold: the ε shown is too "
            "small. Compose the two ledgers."
        )
    if optimizer.skipped_draws:
        yield (
            f"{optimizer.skipped_draws} draws were skipped by hand (skip_draw): the promise holds if what was in them "
            "did not decide that."
        )
    for one in facts["audits"]:
        if one["passed"] is False:
            yield f"An audit failed ({one['kind']}): do not rely on the promise until it is explained."


def _sections(facts: Mapping[str, Any]) -> Iterator[Section]:
    summary, steps, sampling, bounds = facts["epsilon"], facts["steps"], facts["sampling"], facts["bounds"]
    relation = _RELATIONS.get(facts["relation"], facts["relation"])
    yield Section("What is promised", tuple(_promise(facts)))
    yield Section(
        "Findings",
        () if facts["findings"] else ("None: nothing in the records weakens the promise above.",),
        tuple(facts["findings"]),
    )
    yield Section(
        "Terms",
        rows=(
            ("Setting", "central: whoever trains sees the data, whoever gets the weights does not"),
            ("Unit of privacy", facts["unit"]),
            ("Neighbouring data sets", f"differ by {relation}"),
            ("Size of the data set", f"{facts['dataset_size']}, taken to be public"),
            ("What is released", "the weights after every step, and whatever is computed from them alone"),
            (
                "Uses of the data covered",
                f"the gradients of the {steps['recorded']} steps in the ledger, and its other entries",
            ),
        ),
    )
    q = sampling["sample_rate"]
    declared = {"poisson": "vouched"}.get(sampling["declared"], sampling["declared"])
    drawn = "; ".join(
        f"{_DRAWN[kind]} ({count} of {steps['recorded']} steps)" for kind, count in sampling["drawn"].items()
    )
    yield Section(
        "How the noise was added",
        (
            "Before each update, Gaussian noise was added to the sum of the samples' gradients. Its strength is the "
            "noise multiplier: standard deviation over the most that one sample can change the sum.",
        ),
        rows=(
            ("Sampling", drawn or _DRAWN[declared]),
            ("Sample rate q", f"{q:.6g}"),
            ("Expected batch size", f"{sampling['expected_batch_size']:.6g}; the sum is divided by this public number"),
            ("Steps", str(steps["recorded"])),
            ("Noise shared by", f"the {facts['noise']['allocation']!r} allocation"),
            *(("Source of the noise", f"{name}: {_noise(name)}") for name in facts["noise"]["sources"]),
        ),
    )
    runs = [
        (
            entry["event"].replace("_", " "),
            "–" if entry["noise_multiplier"] is None else f"{entry['noise_multiplier']:.6g}",
            f"{entry['sample_rate']:.6g}",
            str(entry["count"]),
            entry["drawn"],
            (entry["noise"] or "unknown").rpartition(".")[2],
            (entry["run"] or "–")[:8],
        )
        for entry in steps["entries"]
    ]
    more = len(runs) - _SHOWN_RUNS
    yield Section(
        "Ledger",
        (f"{more} further lines are in the JSON file.",) if more > 0 else (),
        header=("event", "noise multiplier", "q charged", "count", "batches", "source of the noise", "run"),
        rows=tuple(runs[:_SHOWN_RUNS]),
    )
    yield Section(
        "Learning rate",
        ("Of each step, as it was taken; the JSON file has all of them. A schedule must not look at the data.",),
        rows=tuple(_rates(facts["learning_rates"], steps["taken"])),
    )
    yield Section(
        "Bounds by layer",
        (
            "The most that one sample can change each layer's summed gradient, whatever the sample is: certified from "
            f"the network, not measured. All layers together: {_shown(bounds['total'])} ({bounds['relation']}). Where "
            "bounds follow from the weights they change from step to step; these are the latest, and each step was "
            "charged by its own."
            + " Replacing one unit changes it twice as much at most: the ledger's noise multipliers are relative to "
            "the bounds shown, and ε counts the factor." * (facts["relation"] == "replace_one"),
        ),
        header=("layer", "type", "input at most", "cotangent at most", "gradient at most"),
        rows=tuple(
            (
                layer["path"] or "(network)",
                layer["kind"],
                _shown(layer["input_norm"]),
                _shown(layer["cotangent_norm"]),
                _shown(layer["sensitivity"]),
            )
            for layer in bounds["layers"]
        ),
    )
    yield Section(
        "Noise by parameter",
        header=("parameter", "one sample changes at most", "standard deviation of the noise"),
        rows=tuple(
            (name, _shown(bounds["per_parameter"][name]), f"{deviation:.6g}")
            for name, deviation in facts["noise"]["deviations"].items()
        ),
    )
    yield Section(
        "ε at several δ",
        (
            "The same training, read at other δ. A smaller δ asks for a promise with fewer exceptions, and ε grows. "
            f"Computed by {facts['accountant']['class']} of clipless_dp {facts['versions']['clipless_dp']}; the tight "
            "value lies between the last two columns, where both are given.",
        ),
        header=("δ", "engine", "ε at least", "ε at most (the promise)"),
        rows=tuple(
            (
                f"{point['delta']:.3g}",
                point["engine"] or "–",
                _shown(point["lower"], ROUND_FLOOR),
                _shown(point["epsilon"]),
            )
            for point in summary["curve"]
        ),
        figure=True,
    )
    yield Section("What is not covered", items=(*facts["not_covered"], *facts["notes"]))
    audits = facts["audits"]
    yield Section(
        "Audit",
        ("No audit was handed to this statement: the promise rests on the proofs and on the code.",) * (not audits),
        printed=tuple(f"{one['kind']}\n\n{one['text']}" for one in audits),
    )
    yield Section(
        "How to check this",
        (
            "The JSON file holds the ledger: anyone can compute ε from it again, with the `accounting` package that "
            "comes with clipless_dp or with another accountant. That the steps were what the ledger says is shown by "
            "the code of the training, which is open, and by audits.",
        ),
        rows=(*((name, version) for name, version in facts["versions"].items()), ("written", facts["created"])),
    )


def _rates(runs: Sequence[Mapping[str, Any]], taken: int) -> Iterator[tuple[str, str]]:
    recorded = sum(run["count"] for run in runs)
    yield "Steps whose rate is recorded", f"{recorded} of {taken}"
    for name, choose in (("First", lambda rates: rates[0]), ("Largest", max), ("Last", lambda rates: rates[-1])):
        # Of each group of parameters by itself.
        groups = zip(*([-1.0 if rate is None else rate for rate in run["rates"]] for run in runs), strict=False)
        shown = [choose(list(rates)) for rates in groups]
        if shown:
            yield name, ", ".join("–" if rate < 0.0 else f"{rate:.6g}" for rate in shown)


def _promise(facts: Mapping[str, Any]) -> Iterator[str]:
    summary = facts["epsilon"]
    epsilon, delta = summary["epsilon"], summary["delta"]
    relation = _RELATIONS.get(facts["relation"], facts["relation"])
    if epsilon is None:
        yield f"No finite ε is certified at δ = {delta:g}."
        return
    yield (
        f"The training is (ε, δ)-differentially private with ε = {_shown(epsilon)} at δ = {delta:g}, with respect to "
        f"{relation}. The unit of privacy is {facts['unit']}."
    )
    best = (1.0 + delta * math.exp(-epsilon)) / (1.0 + math.exp(-epsilon))
    yield (
        "In words: take any one unit, and someone who knows all other data and the training method, and who sees the "
        "weights of every step. Asked whether that unit was in the data, with even odds beforehand, they are right "
        f"with probability at most {_percent(best)} (guessing: 50 %). This holds for every unit, however unusual, and "
        "whatever else is known or becomes known. It does not hide what is learned about everybody from everybody "
        "else's data."
    )
    tier = (
        "a strong formal guarantee"
        if epsilon <= 1.0
        else "a reasonable guarantee"
        if epsilon <= 10.0
        else "weak as a formal guarantee"
    )
    yield f"By the scale of Ponomareva et al. 2023 (ε ≤ 1 strong, ε ≤ 10 reasonable) this is {tier}."


def _noise(name: str) -> str:
    return _NOISE.get(name, "not a source of this package, not checked")


def _percent(share: float) -> str:
    """Rounded up, as every bound is: 99.99 % stays below certainty as long as it can."""
    return f"{min(100.0, math.ceil(1e4 * share) / 100):.2f} %"


def _shown(value: float | None, rounding: str = ROUND_CEILING) -> str:
    """Four digits, rounded so that a rounded bound is still one: upper bounds up."""
    if value is None:
        return "–"
    return f"{float(Context(prec=4, rounding=rounding).create_decimal(repr(value))):.4g}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _table(section: Section) -> str:
    rows = []
    if section.header:
        rows.append("<tr>" + "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in section.header) + "</tr>")
    for first, *others in section.rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in others)
        rows.append(f'<tr><th scope="row">{html.escape(first)}</th>{cells}</tr>')
    return f"<table>{''.join(rows)}</table>"


def _curve(points: Sequence[Mapping[str, Any]]) -> str:
    """ε over δ as SVG: δ on a logarithmic axis, ε from 0."""
    known = [(math.log10(point["delta"]), point["epsilon"]) for point in points if point["epsilon"] is not None]
    if not known:
        return ""
    width, height, left, bottom = 560.0, 300.0, 56.0, 46.0
    first, last = min(x for x, _ in known), max(x for x, _ in known)
    top = _ceiling(max(y for _, y in known))

    def place(x: float, y: float) -> tuple[float, float]:
        share = (x - first) / (last - first) if last > first else 0.5
        return left + share * (width - left - 28.0), (height - bottom) - (y / top) * (height - bottom - 16.0)

    parts = []
    for index in range(5):
        value = top * index / 4
        _, y = place(first, value)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 28}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for point in points:
        x, _ = place(math.log10(point["delta"]), 0.0)
        parts.append(f'<text x="{x:.1f}" y="{height - bottom + 20}" text-anchor="middle">{point["delta"]:.2g}</text>')
    line = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in known)
    parts.append(f'<polyline points="{line}"/>')
    parts += ['<circle cx="{:.1f}" cy="{:.1f}" r="3"/>'.format(*place(x, y)) for x, y in known]
    parts.append(f'<text x="{(left + width) / 2}" y="{height - 6}" text-anchor="middle">δ</text>')
    parts.append('<text x="14" y="20">ε</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="ε at δ from {10**first:.2g} to {10**last:.2g}">{"".join(parts)}</svg>'
    )


def _ceiling(value: float) -> float:
    """The next 1, 2, 2.5 or 5 times a power of ten: a round end of an axis."""
    if value <= 0.0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return power * next(step for step in (1.0, 2.0, 2.5, 5.0, 10.0) if value <= step * power * (1 + 1e-9))


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8886; --accent: #1a66b8; }}
@media (prefers-color-scheme: dark) {{ :root {{ --accent: #7db4f0; }} }}
body {{ font: 16px/1.55 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }}
h1, h2 {{ line-height: 1.2; }}
h2 {{ margin-top: 2.2rem; font-size: 1.2rem; }}
table {{ border-collapse: collapse; width: 100%; font-size: 0.92rem; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: 0.35rem 0.6rem; border-bottom: 1px solid var(--line); vertical-align: top; }}
th {{ font-weight: 600; }}
td {{ overflow-wrap: anywhere; }}
pre {{ overflow-x: auto; font-size: 0.85rem; line-height: 1.35; }}
li {{ margin: 0.35rem 0; white-space: pre-line; }}
figure {{ margin: 1.2rem 0; }}
svg {{ width: 100%; height: auto; font: 12px system-ui, sans-serif; fill: currentColor; }}
svg .grid {{ stroke: var(--line); }}
svg polyline {{ fill: none; stroke: var(--accent); stroke-width: 2; }}
svg circle {{ fill: var(--accent); }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
