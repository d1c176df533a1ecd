import signal
from dataclasses import replace

import pytest
import torch
from sib_lab.data.digits_on_textures import build
from sib_lab.train import CheckpointError, deferred_interrupt, fit, load_checkpoint, make_learners, save_checkpoint


@pytest.fixture(scope="module")
def splits(tiny):
    return build(tiny.seed, tiny.train_digits, tiny.validation_digits, tiny.test_digits, tiny.copies)


@pytest.fixture(scope="module")
def uninterrupted(tiny, splits):
    torch.set_num_threads(1)
    learners = make_learners(tiny)
    train(learners, splits)
    return learners


def same_weights(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True)
    )


def train(learners, splits, save=lambda: None):
    fit(list(learners.values()), splits, save, lambda learner: None)


def test_both_networks_start_alike_and_see_the_same_batches(tiny):
    cross_entropy, spatial_ib = make_learners(tiny).values()
    assert same_weights(cross_entropy, spatial_ib)
    for step in range(cross_entropy.steps):
        cross_entropy.steps_done = spatial_ib.steps_done = step
        assert torch.equal(cross_entropy.batch(), spatial_ib.batch())


def test_an_epoch_shows_every_image_once_and_the_next_in_another_order(tiny):
    learner = make_learners(tiny)["cross_entropy"]
    orders = []
    for epoch in range(2):
        rows = []
        for step in range(learner.steps_per_epoch):
            learner.steps_done = epoch * learner.steps_per_epoch + step
            rows += learner.batch().tolist()
        assert sorted(rows) == list(range(24))
        orders.append(rows)
    assert orders[0] != orders[1]


def test_the_learning_rate_rises_to_its_highest_and_falls_to_nothing(tiny):
    learner = make_learners(replace(tiny, epochs=10))["cross_entropy"]
    rates = []
    for step in range(learner.steps):
        learner.steps_done = step
        rates.append(learner.learning_rate())
    assert rates.index(max(rates)) == 2 and max(rates) == pytest.approx(tiny.learning_rate)
    assert rates[2:] == sorted(rates[2:], reverse=True) and rates[-1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("mask", ["given", "density"])
@pytest.mark.parametrize("preset", ["balanced", "paper"])
def test_every_preset_trains_with_every_mask(tiny, splits, preset, mask):
    learner = make_learners(replace(tiny, preset=preset, mask=mask))["spatial_ib"]
    learner.step(splits["train"])
    assert learner.steps_done == 1 and torch.isfinite(torch.tensor(learner.history["loss"])).all()


@pytest.mark.parametrize("step", [1, 3, 8])
def test_interrupted_and_resumed_training_equals_an_uninterrupted_one(
    uninterrupted, tiny, splits, tmp_path, press_ctrl_c, step
):
    path = tmp_path / "checkpoint.pt"
    first = make_learners(tiny)
    press_ctrl_c(step)
    with pytest.raises(KeyboardInterrupt):
        train(first, splits, lambda: save_checkpoint(path, tiny, first))
    assert sum(learner.steps_done for learner in first.values()) == step

    second = make_learners(tiny)
    load_checkpoint(path, tiny, second)
    train(second, splits)
    for name, whole in uninterrupted.items():
        assert same_weights(whole, second[name])
        for curve in set(whole.history) - {"seconds"}:
            assert whole.history[curve] == second[name].history[curve]


def test_the_first_ctrl_c_waits_and_the_second_does_not():
    with deferred_interrupt() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_crash_while_saving_leaves_the_last_checkpoint_whole(tiny, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, tiny, make_learners(tiny))
    before = path.read_bytes()

    def crash(state, to):
        to.write_bytes(b"half a checkpoint")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError):
        save_checkpoint(path, tiny, make_learners(tiny))
    assert path.read_bytes() == before


def test_no_checkpoint_is_said_in_one_sentence(tiny, tmp_path):
    with pytest.raises(CheckpointError, match=r"^There is no checkpoint at .*: start without --resume\.$"):
        load_checkpoint(tmp_path / "checkpoint.pt", tiny, make_learners(tiny))


def test_other_options_are_said_in_one_sentence(tiny, tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, tiny, make_learners(tiny))
    with pytest.raises(CheckpointError, match=r"was made with seed = 0, mask = given: resume with the same options"):
        load_checkpoint(path, replace(tiny, seed=3, mask="density"), make_learners(tiny))


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "other"])
def test_a_broken_checkpoint_is_said_in_one_sentence(tiny, tmp_path, damage):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, tiny, make_learners(tiny))
    if damage == "other":
        torch.save({"config": vars(tiny), "learners": {"cross_entropy": {}}}, path)
    else:
        path.write_bytes({"cut": path.read_bytes()[:5000], "text": b"not a checkpoint", "empty": b""}[damage])
    with pytest.raises(CheckpointError, match=r"cannot be read: start anew without --resume\.$"):
        load_checkpoint(path, tiny, make_learners(tiny))
