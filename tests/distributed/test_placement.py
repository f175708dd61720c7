"""One object tells where a model is; in one process every answer is trivial."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from clipless_dp import ConfigurationError, PrivacyError, ReproducibleNoise
from clipless_dp.distributed import OneProcess, Placement, Replicated, Sharded, World, placement
from clipless_dp.distributed.placement import Change
from tests.ranks import Failure, sgd
from tests.support import gated_model

fsdp = pytest.importorskip("torch.distributed.fsdp")


def questions() -> list[str]:
    return [name for name, value in vars(Placement).items() if inspect.isfunction(value) and name[0] != "_"]


def test_a_placement_is_asked_fewer_than_sixteen_questions() -> None:
    assert 0 < len(questions()) < 16


@pytest.mark.parametrize("kind", [OneProcess, Replicated, Sharded])
def test_all_placements_answer_the_same_questions(kind: type) -> None:
    for name in questions():
        asked, answered = inspect.signature(getattr(Placement, name)), inspect.signature(getattr(kind, name))
        assert list(asked.parameters.values()) == list(answered.parameters.values()), name


def test_in_one_process_all_weights_are_here_and_nothing_is_communicated() -> None:
    model = gated_model()
    here = model.place()
    assert type(here) is OneProcess
    assert model.placement is here
    assert here.world == World(0, 1)
    parameter = next(model.net.parameters())
    assert here.held(parameter) is here.whole(parameter) is parameter
    assert [*here.on_any_part([True, False])] == [True, False]
    assert here.opened(nn.Module()) is None  # type: ignore[arg-type]
    with here.passing(3) as count:
        assert count == 3
    state = {"some": parameter}
    assert here.collected(lambda: state) is here.from_first(lambda: state) is state


def test_in_one_process_a_weight_is_noted_before_another_is_touched() -> None:
    first, second = torch.zeros(1), torch.zeros(1)
    noted: list[tuple[str, float]] = []
    changes = [Change("first", first.fill_, (torch.ones(()),)), Change("second", second.fill_, (torch.ones(()),))]
    OneProcess().change_(changes, lambda name: noted.append((name, float(second))))
    assert noted == [("first", 0.0), ("second", 1.0)]


def test_a_step_is_refused_where_processes_came_after_the_optimizer(monkeypatch) -> None:
    here = gated_model().place()
    here.require_ready()
    monkeypatch.setattr(placement, "world", lambda: World(1, 2))
    with pytest.raises(PrivacyError, match="make it afterwards"):
        here.require_ready()


def stated() -> dict[str, object]:
    model = gated_model()
    before = type(model.placement).__name__
    here = model.place()
    return {
        "before": before,
        "after": type(here).__name__,
        "world": tuple(here.world),
        "collected": here.collected(lambda: here.world.rank),
        "any": here.on_any(here.world.rank == 1),
        "total": float(here.total(torch.tensor(1.0 + here.world.rank))),
        # Of whole weights each process knows by itself whether they have changed.
        "parts": [*here.on_any_part([here.world.rank == 1])],
    }


def test_an_optimizer_finds_the_processes_that_came_after_wrapping(ranks) -> None:
    first, second = ranks.run(stated)
    assert (first["before"], first["after"]) == (second["before"], second["after"]) == ("OneProcess", "Replicated")
    assert (first["world"], second["world"]) == ((0, 2), (1, 2))
    assert (first["collected"], second["collected"]) == (0, None)
    assert first["any"] is second["any"] is True
    assert first["total"] == second["total"] == 3.0
    assert (first["parts"], second["parts"]) == ([False], [True])


def released(differing: bool):
    """Sums of two ranks, released in two steps; in the second one the ranks may differ."""
    model = gated_model()
    here = model.place()
    source = ReproducibleNoise(7)
    found = []
    for step in (1, 2):
        for parameter in model.net.parameters():
            parameter.grad = torch.full_like(parameter, 1.0 + here.world.rank)
        gradients = [parameter.grad for parameter in model.net.parameters()]
        source.begin_step(step)
        here.require_ready()
        weights = here.world.rank if differing and step == 2 else 0
        here.release_(
            gradients,
            [1e-6] * len(gradients),
            source,
            0.5,
            step=step,
            ledger=lambda: ("a line",),
            weights=lambda weights=weights: weights,
        )
        found.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return found


def test_a_release_is_the_noisy_sum_times_the_factor_and_the_same_bits_in_each_process(ranks) -> None:
    first, second = ranks.run(released, False)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
        # Six standard deviations of the noise, and more.
        torch.testing.assert_close(one, torch.full_like(one, 1.5), rtol=0.0, atol=1e-5)


def of_ones():
    """A model, where it is, and gradients of ones, which are its own."""
    model = gated_model()
    here = model.place()
    for parameter in model.net.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model, here, [parameter.grad for parameter in model.net.parameters()]


def stopped_after_a_difference():
    model, here, gradients = of_ones()
    said = []
    for attempt in (
        lambda: here.release_(
            gradients,
            [1.0] * len(gradients),
            ReproducibleNoise(7),
            1.0,
            step=1,
            ledger=tuple,
            weights=lambda: here.world.rank,
        ),
        here.require_ready,
    ):
        try:
            attempt()
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said, all(parameter.grad is None for parameter in model.net.parameters())


def test_where_processes_differ_nothing_is_released_gradients_are_dropped_and_there_is_no_further_step(ranks) -> None:
    for result in ranks.run(stopped_after_a_difference):
        assert not isinstance(result, Failure), result.message
        (differ, stopped), dropped = result
        assert "RankError" in differ
        assert "weights" in differ
        assert "RankError" in stopped
        assert "start all ranks again" in stopped
        assert dropped


def another_ledger_in_place_of_the_compared_one():
    _, here, gradients = of_ones()
    old = "other" if here.world.rank else "first"
    ledgers = [["first", "second"], ["first", "second", "third"], [old, "second", "third"]]
    for step, lines in enumerate(ledgers):
        here.release_(
            gradients,
            [1.0] * len(gradients),
            ReproducibleNoise(7),
            1.0,
            step=step,
            ledger=lambda lines=lines: lines,
            weights=lambda: 0,
        )


def test_all_lines_of_a_ledger_are_compared_once_it_is_another_one(ranks) -> None:
    for failure in ranks.run(another_ledger_in_place_of_the_compared_one):
        assert failure.kind == "RankError"
        assert "differ in ledger" in failure.message


def stepped(parts: bool):
    """The runs in the ledger behind a step, and whether a state tells the bits of the weights."""
    model = gated_model()
    if parts:
        fsdp.fully_shard(model, mesh=init_device_mesh("cpu", (placement.world().size,)))
    optimizer = sgd(model, sampling="poisson")
    optimizer.step()
    return optimizer.accountant.ledger.runs, optimizer.state_dict()["clipless_dp"]["weights"] is not None


def test_a_step_of_all_ranks_is_of_one_run(ranks) -> None:
    (first, _), (second, _) = ranks.run(stepped, False)
    assert first == second
    assert [*first.values()] == [1]


@pytest.mark.skipif(
    not hasattr(getattr(fsdp, "FSDPModule", None), "set_force_sum_reduction_for_comms"),
    reason="this torch cannot sum sharded gradients",
)
def test_a_state_tells_the_bits_of_whole_weights_only(ranks) -> None:
    assert [told for _, told in ranks.run(stepped, False)] == [True, True]
    # A rank knows those of its own part, and a state is one of whole weights.
    assert [told for _, told in ranks.run(stepped, True)] == [False, False]


def test_a_process_group_that_torchrun_promises_is_waited_for(monkeypatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = gated_model()
    assert model.placement.is_whole, "a model may be wrapped before"
    with pytest.raises(ConfigurationError, match="init_process_group"):
        model.place()
