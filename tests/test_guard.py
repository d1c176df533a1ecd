"""The guard against S-IB terms that take over: it speaks when they do, once, and is silent otherwise."""

import math
import warnings

import pytest
import torch
from torch import nn

from sib_ext import CollapseWarning, SIBStep, SpatialIBLoss
from sib_ext.guard import LOOK, PATIENCE, CollapseGuard
from sib_ext.information import Information

from .compare import assert_near

GUESSING = math.log(8)


def found(of_input=None, of_features=None, empty=0, samples=4):
    """What a step's terms were."""
    return Information(
        of_input, of_features, {}, {}, {"input": torch.tensor(empty)}, torch.ones(samples, 1, 2, 2), None
    )


def watched(cross_entropies, terms):
    """The warnings of a training with these losses."""
    guard = CollapseGuard()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for cross_entropy, term in zip(cross_entropies, terms, strict=True):
            guard.watch(torch.tensor(cross_entropy), found(torch.tensor(term)), lambda: GUESSING)
    return [str(w.message) for w in caught if w.category is CollapseWarning]


def falling(start, stop, steps):
    return [start + (stop - start) * i / steps for i in range(steps)]


STEPS = 3 * PATIENCE


def test_a_network_that_does_not_learn_while_the_terms_fall_is_named_once():
    (message,) = watched([0.97 * GUESSING] * STEPS, falling(1.6, 0.5, STEPS))
    assert (
        "taking over" in message
        and "is still 2.02 (guessing: 2.08)" in message
        and "lower the weights of the terms" in message
    )


def test_a_network_that_forgets_while_the_terms_fall_is_named():
    learns, forgets = falling(2.0, 0.3, STEPS), falling(0.3, 1.6, STEPS)
    (message,) = watched(learns + forgets, [1.6] * STEPS + falling(1.6, 0.5, STEPS))
    assert "has risen from" in message


@pytest.mark.parametrize(
    "cross_entropies, terms",
    [
        (falling(2.0, 0.2, STEPS), falling(1.6, 0.4, STEPS)),  # both are learned
        ([2.05] * STEPS, [1.6] * STEPS),  # neither is: not the terms' doing
        (falling(2.0, 0.3, STEPS) + falling(0.3, 1.6, STEPS), [1.6] * (2 * STEPS)),  # forgotten for another reason
        ([2.05] * (PATIENCE - LOOK), falling(1.6, 0.5, PATIENCE - LOOK)),  # too early to tell
    ],
    ids=["learning", "stuck alone", "forgetting alone", "early"],
)
def test_it_is_silent_otherwise(cross_entropies, terms):
    assert watched(cross_entropies, terms) == []


def warnings_of(guard, steps):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for cross_entropy, terms in steps:
            guard.watch(torch.tensor(cross_entropy), terms, lambda: GUESSING)
    return [str(w.message) for w in caught if w.category is CollapseWarning]


def test_terms_of_the_input_in_some_steps_alone_are_watched_beside_those_of_features_in_all():
    """The sum of both counts, however rarely one of them is there."""
    values = falling(2.0, 0.6, STEPS)
    steps = [
        (0.97 * GUESSING, found(torch.tensor(v) if i % 4 == 0 else None, torch.tensor(0.5)))
        for i, v in enumerate(values)
    ]
    (message,) = warnings_of(CollapseGuard(), steps)
    assert "taking over" in message
    guard = CollapseGuard()
    assert (
        warnings_of(
            guard,
            [
                (0.97 * GUESSING, found(torch.tensor(1.0) if i % 4 == 0 else None, torch.tensor(0.5)))
                for i in range(STEPS)
            ],
        )
        == []
    )
    assert_near(guard.means[1:3], torch.tensor([1.0, 0.5]), 1e-5)


def test_maps_that_are_switched_off_are_named_once():
    steps = [(1.0, found(None, torch.tensor(1.0), empty=1, samples=4)) for _ in range(STEPS)]
    (message,) = warnings_of(CollapseGuard(), steps)
    assert "25 % of the samples" in message and "raise feature_foreground" in message
    rare = [(1.0, found(None, torch.tensor(1.0), empty=int(i % 50 == 0), samples=4)) for i in range(STEPS)]
    assert warnings_of(CollapseGuard(), rare) == []


def test_a_training_whose_terms_take_over_says_so():
    """A weight of a thousand: the network gives up its labels for maps on the mask."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8)
    )
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8)
    mask = torch.zeros(8, 1, 8, 8)
    mask[:, :, 2:6, 2:6] = 1
    step = SIBStep(model, SpatialIBLoss(input_background=1000.0))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with pytest.warns(CollapseWarning, match="taking over") as caught:
        for _ in range(STEPS):
            optimizer.zero_grad()
            step(x, y, mask).backward()
            optimizer.step()
    assert [w.filename for w in caught if "taking over" in str(w.message)] == [
        __file__
    ]  # the line of the training loop


def test_a_warning_names_the_line_that_calls_the_criterion():
    criterion, x = SpatialIBLoss(), torch.randn(4, 3, 8, 8, requires_grad=True)
    logits = 0 * x.flatten(1) @ torch.randn(192, 8)
    with pytest.warns(CollapseWarning, match="switched off") as caught:
        for _ in range(LOOK):
            criterion(logits, torch.arange(4), x)
    assert [w.filename for w in caught] == [__file__]


def test_it_watches_training_only():
    criterion = SpatialIBLoss().eval()
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    logits = x.flatten(1) @ torch.randn(192, 8)
    criterion(logits, torch.arange(4), x)
    assert criterion.guard.steps == 0
    criterion.train()(logits, torch.arange(4), x)
    assert criterion.guard.steps == 1
