"""A Trainer with SIBTrainerMixin trains as the plain loop does."""

import pytest
import torch

from sib_ext import SIBStep, SpatialIBLoss

from .problem import CLASSES, EVERY, assert_alike, criterion, images, plain, sgd

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from sib_ext.integrations.transformers import SIBTrainerMixin  # noqa: E402

STEP = {"every": EVERY, "jitter": 0}


class SIBTrainer(SIBTrainerMixin, transformers.Trainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def resnet(**options):
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=CLASSES, **options
    )
    return transformers.AutoModelForImageClassification.from_config(config)


def vit():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=32, patch_size=8,
        hidden_dropout_prob=0.0, num_labels=CLASSES,
    )  # fmt: skip
    return transformers.AutoModelForImageClassification.from_config(config)


def collated(items):
    x, y, mask = torch.utils.data.default_collate(items)
    return {"pixel_values": x, "labels": y, "mask": mask}


def trainer_of(model, folder, options=None, **arguments):
    chosen = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "max_grad_norm": 0, "save_strategy": "no"}
    chosen |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "lr_scheduler_type": "constant"} | arguments
    return SIBTrainer(
        **{
            "criterion": criterion(),
            "step_options": STEP,
            "model": model,
            "args": transformers.TrainingArguments(folder, **chosen),
            "train_dataset": images(),
            "eval_dataset": images(6),
            "data_collator": collated,
            "optimizers": (sgd(model), None),
            **(options or {}),
        }
    )


def trained(model, folder, **arguments):
    trainer_of(model, folder, **arguments).train()
    return model.parameters()


def test_it_trains_as_the_plain_loop_does(tmp_path):
    assert_alike(trained(resnet(), tmp_path), plain(resnet()))


def test_accumulated_batches_count_alike(tmp_path):
    found = trained(resnet(), tmp_path, gradient_accumulation_steps=2)
    assert_alike(found, plain(resnet(), accumulate=2))


def test_bfloat16_is_the_autocast_of_the_plain_loop(tmp_path):
    assert_alike(trained(resnet(), tmp_path, bf16=True), plain(resnet(), bfloat16=True))


def test_gradient_checkpointing_changes_nothing(tmp_path):
    assert_alike(trained(vit(), tmp_path, gradient_checkpointing=True), plain(vit()))


def test_checkpoints_that_cannot_be_differentiated_twice_are_an_error(tmp_path):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        trained(vit(), tmp_path, **options)


def test_a_resumed_training_goes_on_within_the_cycle_of_the_steps(tmp_path):
    whole = resnet()
    trainer_of(whole, tmp_path, save_strategy="steps", save_steps=4).train()
    again = resnet()
    trainer = trainer_of(again, tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert 4 % EVERY != 0
    assert_alike(again.parameters(), whole.parameters(), rtol=1e-6)


def test_a_second_training_begins_anew(tmp_path):
    model = resnet()
    trainer = trainer_of(model, tmp_path)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.train()
    first = [p.detach().clone() for p in model.parameters()]
    model.load_state_dict(state)
    trainer.optimizer = None
    trainer.optimizer = sgd(model)
    trainer.train()
    assert_alike(model.parameters(), first, rtol=1e-6)


def test_a_new_head_in_place_of_another_number_of_classes(tmp_path):
    transformers.AutoModelForImageClassification.from_config(resnet().config).save_pretrained(tmp_path / "model")
    model = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "model", num_labels=5, ignore_mismatched_sizes=True
    )
    trainer = trainer_of(model, tmp_path)
    trainer.train()
    assert len(trainer.predict(images(6)).predictions[0]) == 5


def test_evaluation_is_cross_entropy_and_prediction_needs_no_labels(tmp_path):
    model = resnet().eval()
    trainer = trainer_of(model, tmp_path)
    batch = collated(images(6))
    with torch.no_grad():
        logits = model(batch["pixel_values"]).logits
        expected = torch.nn.functional.cross_entropy(logits, batch["labels"])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    trainer.data_collator = lambda items: {n: t for n, t in collated(items).items() if n != "labels"}
    torch.testing.assert_close(torch.tensor(trainer.predict(images(6)).predictions), logits)


def test_terms_of_features_are_found_in_a_model_of_the_library(tmp_path):
    trainer = trainer_of(resnet(), tmp_path)
    trainer.train()
    step = trainer.sib_step
    assert isinstance(step, SIBStep) and step.steps == 8 and step.layers


@pytest.mark.parametrize(
    "options, arguments, message",
    [
        ({"criterion": torch.nn.CrossEntropyLoss()}, {}, "must be a sib_ext.SpatialIBLoss, got CrossEntropyLoss"),
        ({"compute_loss_func": lambda *a, **k: None}, {}, "base="),
        ({}, {"label_smoothing_factor": 0.1}, "label_smoothing="),
    ],
)
def test_another_loss_beside_it_is_refused(options, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of(resnet(), tmp_path, options, **arguments)


@pytest.mark.parametrize(
    "changed, message",
    [
        (lambda batch: batch | {"bool_masked_pos": None}, "bool_masked_pos, too"),
        (lambda batch: {n: t for n, t in batch.items() if n != "labels"}, "must hold labels"),
    ],
)
def test_a_batch_that_a_step_would_not_use_whole_is_refused(changed, message, tmp_path):
    trainer = trainer_of(resnet(), tmp_path, {"data_collator": lambda items: changed(collated(items))})
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_columns_of_masks_are_kept(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"pixel_values": x.tolist(), "labels": y.item(), "mask": m.tolist(), "other": 1} for x, y, m in images(4)]
    trainer = trainer_of(resnet(), tmp_path)
    kept = trainer._remove_unused_columns(datasets.Dataset.from_list(rows))
    assert set(kept.column_names) == {"pixel_values", "labels", "mask"}
    assert isinstance(trainer.criterion, SpatialIBLoss)
