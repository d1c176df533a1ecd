"""S-IB in Lightning: automatic or manual optimisation, any precision, checkpoints."""

import lightning as L
import torch
from digits import CLASSES, SIZE, arguments, data, loader, shown
from sib_lab.networks.build import build_network
from torch.utils.data import DataLoader

from sib_ext import SIBStep, SpatialIBLoss
from sib_ext.integrations.lightning import SIBModule


class Classifier(SIBModule, L.LightningModule):  # SIBModule: checkpoints hold the step's state, too
    def __init__(self, manual: bool = False):
        super().__init__()
        self.automatic_optimization = not manual
        self.model = build_network("small_cnn", CLASSES, SIZE)
        self.criterion = SpatialIBLoss()
        self.step = SIBStep(self.model, self.criterion)

    def training_step(self, batch, _):
        terms = self.step.terms(*batch)
        self.log("cross_entropy", terms.cross_entropy, prog_bar=True)
        if self.automatic_optimization:
            return terms.loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(terms.loss)
        optimizer.step()

    def validation_step(self, batch, _):  # without gradients: the cross-entropy alone
        x, y, *_ = batch
        self.log("validation_cross_entropy", self.criterion.cross_entropy(self.model(x), y), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main(given=None):
    manual = {"action": "store_true", "help": "optimise by hand"}
    args = arguments(
        __doc__, given, manual=manual, precision={"default": "32-true"}, folder={"default": "runs/lightning"}
    )
    L.seed_everything(0)
    train, test = data(args.images)
    model = Classifier(args.manual)
    trainer = L.Trainer(
        max_epochs=args.epochs,
        precision=args.precision,
        accelerator="auto",
        devices=1,
        default_root_dir=args.folder,
        logger=False,
    )
    trainer.fit(model, loader(train), DataLoader(test, 100))
    return shown(model.model, test)


if __name__ == "__main__":
    main()
