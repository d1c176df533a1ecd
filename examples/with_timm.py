"""S-IB in a loop of timm's parts: its networks, loader, Mixup and CutMix, schedulers and moving averages."""

import timm
import timm.data
import torch
from digits import CLASSES, arguments, data, shown
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torchvision.transforms.functional import to_pil_image

from sib_ext import SIBStep, SpatialIBLoss
from sib_ext.functional import mixed

SIZE = 80
SMALL = {"channels": (24, 32, 48, 64), "output_stride": 8, "global_pool": "max"}  # for small objects on small images
OWN = {
    "mixup": {"action": "store_true", "help": "mix images, and their masks with them"},
    "loader": {"action": "store_true", "help": "timm's loader and augmentation, which know no masks: train without"},
}


class Pictures(torch.utils.data.Dataset):
    """(picture, label), as timm's loader wants them: it sets ``transform``."""

    def __init__(self, items):
        self.items, self.transform = items, None

    def __len__(self):
        return len(self.items)

    def __getitem__(self, row):
        item = self.items[row]
        return self.transform(to_pil_image(item.image * 0.5 + 0.5)), item.label


def batches(items, by_timm):
    """(x, y, mask or None, annotated or None); of an even size, as Mixup wants it."""
    if by_timm:
        normal = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "scale": (0.6, 1.0), "hflip": 0.0}
        options = {"batch_size": 32, "is_training": True, "num_workers": 0, "use_prefetcher": False}
        for x, y in timm.data.create_loader(Pictures(items), (3, SIZE, SIZE), **options, **normal):
            yield x, y, None, None
    else:
        for x, y, mask, annotated, _ in torch.utils.data.DataLoader(items, 32, shuffle=True, drop_last=True):
            yield x, y, mask, annotated


def main(given=None):
    args = arguments(__doc__, given, **OWN)
    torch.manual_seed(0)
    train, test = data(args.images, SIZE)
    model = timm.create_model("resnet10t", num_classes=CLASSES, **SMALL)
    average = ModelEmaV3(model, decay=0.99, use_warmup=True)
    optimizer = create_optimizer_v2(model, "adamw", lr=2e-3)
    scheduler, epochs = create_scheduler_v2(optimizer, "cosine", args.epochs, warmup_epochs=1, warmup_lr=1e-4)
    mix = timm.data.Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, num_classes=CLASSES) if args.mixup else None
    step = SIBStep(model, SpatialIBLoss())
    for epoch in range(epochs):
        model.train()
        for batch in batches(train, args.loader):
            terms = step.terms(*(mixed(mix, *batch) if mix else batch))  # the masks as the images
            optimizer.zero_grad()
            terms.loss.backward()
            optimizer.step()
            average.update(model)
        scheduler.step(epoch + 1)
        print(f"epoch {epoch + 1}: cross-entropy of the last batch {terms.cross_entropy.item():.3f}")
    return shown(average.module, test)


if __name__ == "__main__":
    main()
