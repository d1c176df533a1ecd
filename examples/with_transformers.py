"""S-IB in the Trainer of transformers: accumulated gradients, gradient checkpointing, a head of your own size."""

import torch
from digits import CLASSES, arguments, data, shown
from transformers import AutoConfig, AutoModelForImageClassification, Trainer, TrainingArguments

from sib_ext import SpatialIBLoss
from sib_ext.integrations.transformers import SIBTrainerMixin

SMALL = {"embedding_size": 32, "hidden_sizes": [48, 96], "depths": [1, 1], "layer_type": "basic"}


class SIBTrainer(SIBTrainerMixin, Trainer):
    """Your own Trainer's name stands in the place of Trainer."""


def batch_of(items):
    x, y, mask, *_ = torch.utils.data.default_collate(items)
    return {"pixel_values": x, "labels": y, "mask": mask}


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def network(name):
    if name:  # of the hub, or a folder: its head is replaced by one of CLASSES classes
        return AutoModelForImageClassification.from_pretrained(name, num_labels=CLASSES, ignore_mismatched_sizes=True)
    model = AutoModelForImageClassification.from_config(AutoConfig.for_model("resnet", num_labels=CLASSES, **SMALL))
    model.resnet.pooler = torch.nn.AdaptiveMaxPool2d(1)  # the objects are small: what stands anywhere decides
    return model


def main(given=None):
    own = {"model": {"help": 'such as "microsoft/resnet-18", or a folder; else a small ResNet with random weights'}}
    args = arguments(__doc__, given, **own, folder={"default": "runs/transformers"})
    torch.manual_seed(0)
    train, test = data(args.images, size=80)
    model = network(args.model)
    trainer = SIBTrainer(
        criterion=SpatialIBLoss("fine_tuning" if args.model else "balanced"),
        model=model,
        args=TrainingArguments(
            args.folder,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=2,
            learning_rate=2e-3,
            eval_strategy="epoch",
            report_to="none",
        ),
        train_dataset=train,
        eval_dataset=test,
        data_collator=batch_of,
        compute_metrics=accuracy,
    )
    trainer.train()
    return shown(Logits(model), test)


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).logits


if __name__ == "__main__":
    main()
