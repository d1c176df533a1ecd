"""S-IB in a training loop of plain PyTorch, with masks."""

import torch
from digits import CLASSES, SIZE, arguments, data, loader, shown
from sib_lab.networks.build import build_network

from sib_ext import SIBStep, SpatialIBLoss


def main(given=None):
    args = arguments(__doc__, given)
    torch.manual_seed(0)
    train, test = data(args.images)
    model = build_network("small_cnn", CLASSES, SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    step = SIBStep(model, SpatialIBLoss())
    for epoch in range(args.epochs):
        for x, y, mask in loader(train):
            terms = step.terms(x, y, mask)  # or, where the loss is all you need, loss = step(x, y, mask)
            optimizer.zero_grad()
            terms.loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: cross-entropy of the last batch {terms.cross_entropy.item():.3f}")
    return shown(model, test)


if __name__ == "__main__":
    main()
