"""Events, ledgers, and what is refused."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import accounting.ledger as ledger_code
import accounting.lines as lines_code
from accounting import (
    ADD_OR_REMOVE_ONE,
    REPLACE_ONE,
    AccountingError,
    FixedSizeSampling,
    GaussianRelease,
    GaussianStep,
    GaussianVectorStep,
    InvalidParameterError,
    LaplaceRelease,
    LargeDeltaWarning,
    Ledger,
    LedgerFormatError,
    Line,
    NoSampling,
    PoissonSampling,
    PrivacyBound,
    PrivateSelection,
    Provenance,
    PRVAccountant,
    RDPAccountant,
    ShuffledEpoch,
    UnsupportedEventError,
    create_accountant,
    repeat,
)
from accounting import ledger as ledger_module

STEP = GaussianStep(1.0, PoissonSampling(0.01))
EVERYTHING = [
    STEP,
    GaussianStep(2.0, NoSampling()),
    GaussianStep(2.0, FixedSizeSampling(10, 1000)),
    GaussianVectorStep((2.0, 3.0), PoissonSampling(0.1)),
    GaussianRelease(5.0),
    LaplaceRelease(10.0),
    ShuffledEpoch(4.0),
    PrivateSelection(((STEP, 100),), 5.0, 1.0),
    PrivateSelection(((STEP, 100),), 5.0, "poisson"),
]


def test_a_million_equal_steps_are_one_line():
    ledger = Ledger()
    for _ in range(1000):
        ledger.append(STEP, 1000)
    assert ledger.entries == [(STEP, 1_000_000)]
    assert len(ledger) == 1_000_000


def test_repeat_is_the_event_many_times_over():
    ledger = Ledger()
    ledger.append(repeat(repeat(STEP, 3), 4), 5)
    assert ledger.entries == [(STEP, 60)]


@pytest.mark.parametrize("relation", [ADD_OR_REMOVE_ONE, REPLACE_ONE])
def test_json_keeps_every_kind_of_event(relation):
    ledger = Ledger(relation)
    for count, event in enumerate(EVERYTHING, start=1):
        ledger.append(event, count)
    again = Ledger.from_json(ledger.to_json())
    assert again == ledger
    assert again.relation == relation
    assert all(type(value) in (str, int, list) for value in json.loads(ledger.to_json()).values())


def test_a_saved_ledger_is_read_back_and_leaves_no_other_file(tmp_path):
    ledger = Ledger()
    ledger.append(STEP, 7)
    ledger.save(tmp_path / "ledger.json")
    assert Ledger.load(tmp_path / "ledger.json") == ledger
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.json"]


def test_a_truncated_ledger_is_refused():
    ledger = Ledger()
    ledger.append(STEP)
    text = ledger.to_json()
    with pytest.raises(LedgerFormatError, match="truncated"):
        Ledger.from_json(text[: len(text) // 2])


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.update(version=99),
        lambda state: state.update(format="something else"),
        lambda state: state.pop("entries"),
        lambda state: state.pop("relation"),
        lambda state: state["entries"][0].pop("count"),
        lambda state: state["entries"][0]["event"].update(kind="unheard of"),
        lambda state: state["entries"][0]["event"].pop("noise_multiplier"),
        lambda state: state["entries"][0]["event"].update(extra=1),
    ],
)
def test_a_damaged_ledger_is_refused(damage):
    ledger = Ledger()
    ledger.append(STEP)
    state = ledger.state_dict()
    damage(state)
    with pytest.raises(LedgerFormatError):
        Ledger.from_state_dict(state)


def test_a_ledger_starts_with_what_it_once_was_and_with_nothing_else():
    step, other = GaussianStep(1.0), GaussianStep(2.0)
    ledger, start = Ledger(), Ledger()
    assert ledger.starts_with(start)
    for event, count in ((step, 3), (LaplaceRelease(4.0), 1), (other, 2)):
        start.append(event, count)
        assert not ledger.starts_with(start)
        ledger.append(event, count)
        assert ledger.starts_with(start)
    ledger.append(other)
    assert ledger.starts_with(start)
    assert not start.starts_with(ledger)
    shorter = Ledger()
    shorter.append(step, 2)
    assert ledger.starts_with(shorter)
    shorter.append(LaplaceRelease(4.0))
    assert not ledger.starts_with(shorter)
    assert not Ledger("replace_one").starts_with(Ledger())


def test_merging_is_sequential_composition():
    first, second = Ledger(), Ledger()
    first.append(STEP, 3)
    second.append(STEP, 4)
    second.append(LaplaceRelease(1.0))
    assert first.merge(second).entries == [(STEP, 7), (LaplaceRelease(1.0), 1)]
    assert first.entries == [(STEP, 3)]
    with pytest.raises(InvalidParameterError, match="merged"):
        first.merge(Ledger(REPLACE_ONE))


ONE, TWO = Provenance("one", "announced", "some.Noise"), Provenance("two", "vouched", "other.Noise")


def ledger_of(*lines):
    ledger = Ledger()
    for line in lines:
        ledger.append(*line)
    return ledger


def test_of_a_run_in_both_ledgers_the_longer_record_is_taken_and_all_else_added():
    release = GaussianRelease(5.0, identity="a")
    early = ledger_of((STEP, 3, ONE), (release, 1), (LaplaceRelease(1.0), 1))
    late = ledger_of((STEP, 3, ONE), (STEP, 2, TWO), (STEP, 4, ONE), (release, 1, TWO), (LaplaceRelease(1.0), 1))
    for merged in (early.merge(late), late.merge(early)):
        assert merged.runs == {"one": 7, "two": 2, "release a": 1}
        assert len(merged) == 7 + 2 + 1 + 2
        assert merged.starts_with(early) == (merged == early.merge(late))
        assert len(merged.merge(early)) == len(merged) + 1, "what has no identity is added again"


def test_equal_events_of_different_runs_are_kept_apart_and_counted_together():
    ledger = ledger_of((STEP, 3, ONE), (STEP, 2, TWO), (STEP, 1, TWO), (STEP, 1))
    assert ledger.lines == [Line(STEP, 3, ONE), Line(STEP, 3, TWO), Line(STEP, 1)]
    assert ledger.entries == [(STEP, 7)]
    assert ledger.history() == [(1.0, 0.01, 7)]
    assert [ledger.count(run) for run in ("one", "two", "", "three")] == [3, 3, 0, 0]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([(STEP, 3, ONE), (LaplaceRelease(1.0), 1, ONE)], [(STEP, 3, ONE), (LaplaceRelease(2.0), 1, ONE)]),
        ([(STEP, 3, ONE), (LaplaceRelease(1.0), 1, ONE)], [(STEP, 4, ONE)]),
        ([(GaussianRelease(1.0, "a"), 1)], [(GaussianRelease(2.0, "a"), 1)]),
        ([(STEP, 3, ONE)], [(STEP, 3, Provenance("one", "vouched"))]),
    ],
    ids=["other events", "neither is longer", "a release of two kinds", "another provenance"],
)
def test_records_of_one_run_of_which_neither_begins_the_other_are_both_counted(first, second):
    one, two = ledger_of(*first), ledger_of(*second)
    for merged in (one.merge(two), two.merge(one)):
        assert len(merged) == len(one) + len(two)


def test_a_plan_that_is_made_from_a_ledger_is_no_part_of_it():
    ledger = ledger_of((STEP, 3, ONE))
    assert len(ledger.merge(ledger)) == 3
    assert len(ledger.merge(ledger.scaled(1.0))) == 6


def test_provenance_is_stored_and_what_is_none_is_refused():
    ledger = ledger_of((STEP, 3, ONE), (STEP, 1), (LaplaceRelease(2.0), 1, Provenance("x", "none", "y", True)))
    for again in (Ledger.from_json(ledger.to_json()), pickle.loads(pickle.dumps(ledger)), copy.deepcopy(ledger)):
        assert again == ledger
        assert again.runs == ledger.runs
        assert len(again) == 5
    for wrong in (1, {"run": 3}, {"sampling": "guessed"}, {"unknown": ""}, {"seeded_masks": "no"}):
        state = ledger.state_dict()
        state["entries"][0]["provenance"] = wrong
        with pytest.raises(LedgerFormatError):
            Ledger.from_state_dict(state)
    former = Ledger.__new__(Ledger)
    former.__setstate__({"relation": ADD_OR_REMOVE_ONE, "_entries": [(STEP, 3)]})
    assert former.entries == [(STEP, 3)]


def test_what_an_accountant_records_by_itself_is_known_again_and_a_copy_goes_on_under_its_own_name():
    accountant = PRVAccountant(dataset_size=10)
    accountant.step(noise_multiplier=1.0, sample_rate=0.01, steps=3)
    before = copy.deepcopy(accountant.ledger)
    accountant.step(noise_multiplier=1.0, sample_rate=0.01)
    assert len(accountant.ledger.merge(before)) == 4
    for other in (copy.copy(accountant), copy.deepcopy(accountant), pickle.loads(pickle.dumps(accountant))):
        other.ledger = other.ledger.copy()
        other.step(noise_multiplier=1.0, sample_rate=0.01)
        assert other.dataset_size == 10
        accountant.step(noise_multiplier=1.0, sample_rate=0.01)
        # Four and one here, what was taken meanwhile there.
        assert len(accountant.ledger.merge(other.ledger)) == len(accountant) + 1
    accountant.load_state_dict({"format": "accounting.ledger", **before.state_dict()})
    accountant.step(noise_multiplier=1.0, sample_rate=0.01)
    assert len(accountant.ledger.runs) == 2


def test_pickles_of_accountants_of_before_they_had_an_identity_load():
    ledger = ledger_of((STEP, 3))
    former = PRVAccountant.__new__(PRVAccountant)
    former.__setstate__({"ledger": ledger, "dataset_size": 7})
    former.step(noise_multiplier=1.0, sample_rate=0.01)
    assert (len(former), former.dataset_size, former.relation) == (4, 7, ADD_OR_REMOVE_ONE)


def test_the_table_names_runs_and_sources_where_they_are_known():
    assert "drawn" not in ledger_of((STEP, 1)).table()
    *_, last = ledger_of((STEP, 1, ONE), (STEP, 1, TWO)).table().splitlines()
    assert last.split() == ["1", "gaussian_step", "1", "poisson", "q=0.01", "vouched", "Noise", "two"]


def test_the_table_names_every_line():
    ledger = Ledger()
    for event in EVERYTHING:
        ledger.append(event)
    table = ledger.table()
    assert all(event.kind in table for event in EVERYTHING)
    assert "fixed size 10 of 1000" in table


def test_accountant_states_are_plain_and_come_back():
    accountant = PRVAccountant()
    accountant.step(noise_multiplier=1.0, sample_rate=0.01, steps=10)
    accountant.step(noise_multiplier=1.0, sample_rate=0.01, steps=5)
    accountant.step(noise_multiplier=2.0, sample_rate=1.0)
    state = json.loads(json.dumps(accountant.state_dict()))
    again = PRVAccountant()
    again.load_state_dict(state)
    assert again.history == accountant.history == [(1.0, 0.01, 15), (2.0, 1.0, 1)]
    assert len(again) == 16
    assert float(again.get_epsilon(1e-5)) == float(accountant.get_epsilon(1e-5))


def test_opacus_histories_load_and_save():
    state = {"history": [(1.0, 0.01, 10), (2.0, 0.02, 5)], "mechanism": "rdp"}
    accountant = RDPAccountant()
    accountant.load_state_dict(state)
    assert accountant.to_opacus() == state


@pytest.mark.parametrize(
    "state",
    [
        None,
        {},
        {"format": "other", "history": []},
        {"format": "accounting.state", "version": 2, "ledger": {}},
        {"format": "accounting.state", "version": 1},
        {"history": [(1.0, 0.1)]},
    ],
)
def test_a_state_that_is_none_is_refused(state):
    with pytest.raises(LedgerFormatError):
        PRVAccountant().load_state_dict(state)


def test_a_state_about_another_relation_is_refused():
    with pytest.raises(LedgerFormatError, match="replace_one"):
        PRVAccountant().load_state_dict(PRVAccountant(relation=REPLACE_ONE).state_dict())


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf, "1", None, True])
def test_noise_that_is_not_positive_and_finite_is_refused(sigma):
    with pytest.raises(InvalidParameterError, match="noise_multiplier"):
        PRVAccountant().step(noise_multiplier=sigma, sample_rate=0.1)


@pytest.mark.parametrize("q", [-0.1, 1.1, math.nan, math.inf])
def test_a_sample_rate_outside_the_unit_interval_is_refused(q):
    with pytest.raises(InvalidParameterError, match="sample_rate"):
        PRVAccountant().step(noise_multiplier=1.0, sample_rate=q)


@pytest.mark.parametrize("steps", [-1, 1.5, math.nan, "3", True, 2.0**63])
def test_negative_fractional_and_uncountable_steps_are_refused(steps):
    with pytest.raises(InvalidParameterError, match="steps"):
        PRVAccountant().step(noise_multiplier=1.0, sample_rate=0.1, steps=steps)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 2.0, math.nan])
@pytest.mark.parametrize("kind", ["prv", "rdp", "auto"])
def test_a_delta_outside_the_open_unit_interval_is_refused(kind, delta):
    with pytest.raises(InvalidParameterError, match="delta"):
        create_accountant(kind).get_epsilon(delta)


@pytest.mark.parametrize("epsilon", [-1.0, math.nan])
def test_a_negative_epsilon_is_refused(epsilon):
    with pytest.raises(InvalidParameterError, match="epsilon"):
        PRVAccountant().get_delta(epsilon)


@pytest.mark.parametrize("kind", ["prv", "rdp", "auto"])
def test_an_empty_ledger_costs_nothing(kind):
    accountant = create_accountant(kind)
    accountant.step(noise_multiplier=1.0, sample_rate=0.0, steps=100)
    accountant.step(noise_multiplier=1.0, sample_rate=0.5, steps=0)
    assert accountant.get_epsilon(1e-9) == 0.0
    assert accountant.get_delta(0.0) == 0.0


def test_a_delta_above_one_over_the_dataset_size_is_warned_about():
    accountant = create_accountant("rdp", dataset_size=1000)
    with pytest.warns(LargeDeltaWarning, match="1/1000"):
        accountant.get_epsilon(0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accountant.get_epsilon(1e-4)


def test_unknown_engines_relations_and_events_are_refused_by_name():
    with pytest.raises(InvalidParameterError, match="gdp"):
        create_accountant("gdp")
    with pytest.raises(InvalidParameterError, match="bounded"):
        Ledger("bounded")
    with pytest.raises(UnsupportedEventError, match="object"):
        PRVAccountant().record(object())


def test_fixed_size_batches_are_refused_where_the_size_is_public_and_by_renyi_accounting():
    fixed = GaussianStep(1.0, FixedSizeSampling(10, 100))
    with pytest.raises(UnsupportedEventError, match="fixed batch size"):
        PRVAccountant().record(fixed)
    rdp = RDPAccountant(relation=REPLACE_ONE)
    rdp.record(fixed)
    with pytest.raises(UnsupportedEventError, match="FixedSizeSampling"):
        rdp.get_epsilon(1e-5)


def test_private_selection_is_refused_by_numerical_composition_and_answered_by_auto():
    search = PrivateSelection(((STEP, 100),), 5.0, 1.0)
    prv, auto, single = PRVAccountant(), create_accountant("auto"), create_accountant("rdp")
    prv.record(search)
    auto.record(search)
    single.record(STEP, 100)
    with pytest.raises(UnsupportedEventError, match="PrivateSelection"):
        prv.get_epsilon(1e-5)
    once, five = float(single.get_epsilon(1e-5)), float(auto.get_epsilon(1e-5))
    # Dearer than one run, cheaper than releasing five and more.
    assert once < five < 5.0 * once


@pytest.mark.parametrize("shape", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("mean", [1.5, 10.0, 1000.0])
def test_the_number_of_trials_has_the_mean_that_was_asked(mean, shape):
    gamma = PrivateSelection(((STEP, 1),), mean, shape).gamma
    if shape == 1.0:
        assert gamma == pytest.approx(1.0 / mean, rel=1e-9)
    k = range(1, 200_000)
    if shape == 0.0:
        weights = [math.exp(i * math.log1p(-gamma)) / i for i in k]
    else:
        weights = [
            math.exp(i * math.log1p(-gamma) + math.lgamma(i + shape) - math.lgamma(shape) - math.lgamma(i + 1))
            for i in k
        ]
    average = sum(i * w for i, w in zip(k, weights, strict=True)) / sum(weights)
    assert average == pytest.approx(mean, rel=1e-3)  # the sum is cut at 200 000 trials


def test_shuffled_passes_are_charged_without_amplification():
    # σ = 0.5 and 10⁴ batches: at least 10.995 when shuffled, 1.95 when Poisson-sampled.
    shuffled, sampled = PRVAccountant(), PRVAccountant()
    shuffled.record(ShuffledEpoch(0.5))
    sampled.step(noise_multiplier=0.5, sample_rate=1e-4, steps=10_000)
    assert shuffled.get_epsilon(1e-6) >= 10.995
    assert sampled.get_epsilon(1e-6) == pytest.approx(1.95, abs=0.01)  # the figure has two decimals
    shuffled.record(ShuffledEpoch(0.5), 3)
    gaussian = PRVAccountant()
    gaussian.record(GaussianRelease(0.5 / math.sqrt(4.0)))
    assert float(shuffled.get_epsilon(1e-6)) == pytest.approx(float(gaussian.get_epsilon(1e-6)), rel=1e-9)


def test_replacing_is_neither_one_nor_two_times_adding_or_removing():
    one, two = PRVAccountant(), PRVAccountant(relation=REPLACE_ONE)
    for accountant in (one, two):
        accountant.record(STEP, 1000)
    assert one.get_epsilon(1e-5) == pytest.approx(1.828, abs=2e-3)  # three decimals and the grid's error
    assert two.get_epsilon(1e-5) == pytest.approx(2.843, abs=2e-3)


def test_bounds_are_floats_with_their_provenance():
    accountant = PRVAccountant()
    accountant.record(STEP, 100)
    bound = accountant.get_epsilon(1e-5)
    assert isinstance(bound, PrivacyBound)
    assert float(bound) == bound.upper
    assert bound.lower < bound.upper
    assert (bound.delta, bound.relation, bound.sampling) == (1e-5, ADD_OR_REMOVE_ONE, "poisson")
    assert bound.engine in repr(bound)
    assert f"{bound:.2f}" == f"{bound.upper:.2f}"
    assert json.loads(json.dumps(bound)) == bound.upper


def test_events_are_frozen():
    with pytest.raises(AttributeError):
        STEP.noise_multiplier = 0.1


def test_the_epsilon_curve_answers_each_delta():
    accountant = RDPAccountant()
    accountant.record(STEP, 100)
    assert accountant.epsilon_curve([1e-5, 1e-6]) == [accountant.get_epsilon(1e-5), accountant.get_epsilon(1e-6)]


def test_threads_that_share_a_ledger_lose_no_line_and_no_reader_finds_less_than_before(monkeypatch):
    ledger, honest = Ledger(), ledger_module.Line

    def slow(*given):
        time.sleep(1e-4)
        return honest(*given)

    monkeypatch.setattr(ledger_module, "Line", slow)

    def record(_):
        seen = []
        for step in range(25):
            ledger.append(GaussianStep(1.0 + step % 5, PoissonSampling(0.1)), 1)
            seen.append(sum(line.count for line in ledger.lines))
        return seen

    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(record, range(8)))
    assert sum(line.count for line in ledger.lines) == len(ledger) == 8 * 25
    assert all(some == sorted(some) for some in seen)


@pytest.mark.parametrize("entries", [{}, {"0": 1}, "", "steps", None, 0])
def test_a_ledger_whose_entries_are_no_list_is_refused(entries):
    state = {**Ledger().state_dict(), "entries": entries}
    with pytest.raises(LedgerFormatError, match="entries"):
        Ledger.from_state_dict(state)
    with pytest.raises(LedgerFormatError, match="entries"):
        Ledger.from_json(json.dumps(state))


@pytest.mark.parametrize("where", ["count", "noise_multiplier"])
def test_numbers_beyond_floats_in_a_stored_ledger_are_refused(where):
    ledger = Ledger()
    ledger.append(GaussianStep(1.0, PoissonSampling(0.1)), 3)
    state = ledger.state_dict()
    (line,) = state["entries"]
    (line if where == "count" else line["event"])[where] = 10**400
    with pytest.raises(AccountingError, match=where):
        Ledger.from_json(json.dumps(state))


def test_numbers_beyond_floats_are_refused_as_arguments():
    accountant = create_accountant("rdp")
    for given in ({"noise_multiplier": 10**400}, {"sample_rate": 10**400}, {"steps": 10**400}):
        with pytest.raises(InvalidParameterError, match=next(iter(given))):
            accountant.step(**{"noise_multiplier": 1.0, "sample_rate": 0.1, **given})
    assert len(accountant) == 0


def interrupted_at(operation: int, call: Callable[[], object]) -> bool:
    """Whether `call` had so many operations in the ledger's own code that it was interrupted before this one."""
    left = operation

    def tracer(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in (ledger_code.__file__, lines_code.__file__):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return tracer

    before = sys.gettrace()
    # Python 3.12.1 looks whether any frame asks for opcodes when tracing begins, and not later.
    sys._getframe().f_trace_opcodes = True
    try:
        sys.settrace(tracer)
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("loose", [0, 64])
def test_an_interruption_anywhere_in_recording_or_reading_loses_no_event(
    loose: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_code, "_LOOSE", loose)
    own = Provenance("run")
    for count in itertools.count():
        ledger = Ledger()
        ledger.append(GaussianStep(2.0), 5, own)
        ledger.append(GaussianStep(1.0), 1000, own)
        len(ledger)
        ledger.append(GaussianStep(1.0), 1, own)

        def call(ledger: Ledger = ledger) -> None:
            ledger.append(GaussianStep(1.0), 1, own)
            ledger.append(GaussianStep(3.0), 1, own)
            ledger.count("run")

        interrupted = interrupted_at(count, call)
        assert sum(n for _, n in ledger.entries) == len(ledger) == ledger.count("run") == ledger.runs["run"]
        assert len(ledger) >= 1006
        before = len(ledger)
        ledger.append(GaussianStep(3.0), 1, own)
        assert len(ledger) == before + 1
        assert [event.noise_multiplier for event, _ in ledger.entries] == [2.0, 1.0, 3.0]
        assert len(pickle.loads(pickle.dumps(ledger))) == len(ledger.copy()) == len(ledger)
        if not interrupted:
            assert len(ledger) == 1009
            break
    assert count > 50


def test_what_is_recorded_while_lines_are_put_together_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, honest, nested = Ledger(), ledger_code.together, []

    def interrupted(lines: Iterable[Line]) -> list[Line]:
        together = honest(lines)
        if not nested:
            # As a signal handler or another thread does, which reads too.
            nested.append(1)
            ledger.append(GaussianStep(1.0), 7)
            nested.append(len(ledger))
        return together

    ledger.append(GaussianStep(1.0), 2)
    ledger.append(GaussianStep(1.0), 3)
    monkeypatch.setattr(ledger_code, "together", interrupted)
    len(ledger)
    assert nested[1] == len(ledger) == sum(count for _, count in ledger.entries) == 12


def test_threads_that_share_an_accountant_lose_no_step() -> None:
    accountant = create_accountant("rdp")
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:

        def work(multiplier: float) -> None:
            for step in range(2000):
                accountant.step(noise_multiplier=multiplier + step % 3, sample_rate=0.1)
                if step % 50 == 0:
                    assert len(accountant) > step

        threads = [threading.Thread(target=work, args=(multiplier,)) for multiplier in (1.0, 1.0, 2.0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert sum(count for _, count in accountant.ledger.entries) == len(accountant) == 6000
    assert sum(accountant.ledger.runs.values()) == 6000


def test_a_ledger_that_cannot_be_written_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.json"
    Ledger().save(path)
    written = Path.write_text

    def full(self: Path, text: str, **arguments: Any) -> int:
        written(self, text[:10], **arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        Ledger().save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["ledger.json"]
    assert len(Ledger.load(path)) == 0


@pytest.mark.parametrize("at", ["or_next", "together", "and_then"])
def test_an_exception_at_any_place_leaves_a_ledger_that_puts_lines_together(at, monkeypatch):
    owner = {"or_next": lines_code.Turn, "together": ledger_code, "and_then": lines_code.Closed}[at]
    real, ledger, kept = getattr(owner, at), Ledger(), []

    def interrupted(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    for _ in range(3):
        ledger.append(STEP)
        with monkeypatch.context() as patch:
            patch.setattr(owner, at, interrupted)
            try:
                len(ledger)
            except KeyboardInterrupt as error:
                # Its traceback lives on, and what is in its frames.
                kept.append(error)
    ledger.append(STEP)
    assert kept
    assert len(ledger) == 4
    assert len(ledger._record) == 1


def test_lines_are_put_together_by_one_at_a_time():
    ledger = Ledger()
    taker = lines_code.Taker()
    ledger._turn, taken = ledger._turn.or_next(taker)
    assert taken
    for _ in range(3):
        ledger.append(STEP)
    assert len(ledger) == len(ledger._record) == 3
    # A process that was forked meanwhile does not wait for a thread that it has not got.
    taker.process += 1
    assert len(ledger) == 3
    assert len(ledger._record) == 1


@pytest.mark.parametrize("change", [{"relation": "none"}, {"count": -1}, {"count": 1.5}, {"noise_multiplier": -1.0}])
def test_a_state_with_values_that_no_ledger_has_is_of_a_wrong_format(change):
    ledger = Ledger()
    ledger.append(STEP)
    state = ledger.state_dict()
    (entry,) = state["entries"]
    for place in (state, entry, entry["event"]):
        place.update({name: value for name, value in change.items() if name in place})
    with pytest.raises(LedgerFormatError):
        Ledger.from_state_dict(state)
