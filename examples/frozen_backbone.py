"""A new head on a frozen backbone: S-IB chooses what the head listens to, at the price of a plain step."""

import torch
from digits import CLASSES, SIZE, arguments, data, loader, shown
from sib_lab.networks.build import build_network

from sib_ext import SIBStep, SpatialIBLoss


def fit(loss_of, parameters, train, epochs):
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    for _ in range(epochs):
        for x, y, mask in loader(train):
            loss = loss_of(x, y, mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def main(given=None):
    args = arguments(__doc__, given, weights={"help": "a file with the backbone's; else it is trained here first"})
    torch.manual_seed(0)
    train, test = data(args.images)
    model = build_network("small_cnn", CLASSES, SIZE, args.weights)
    criterion = SpatialIBLoss(input_background=0)  # the terms of the feature map, which is all that a head moves
    if args.weights is None:
        fit(lambda x, y, mask: criterion.cross_entropy(model(x), y), model.parameters(), train, args.epochs)

    model.requires_grad_(False)
    model.eval()  # BatchNorms of the backbone keep their statistics
    for name, loss_of in {
        "cross-entropy": lambda x, y, mask: criterion.cross_entropy(model(x), y),
        "S-IB": SIBStep(model, criterion),
    }.items():
        model.head = torch.nn.Linear(model.head.in_features, CLASSES)
        fit(loss_of, model.head.parameters(), train, args.epochs)
        print(f"a new head with {name}: ", end="")
        found = shown(model, test)
    return found


if __name__ == "__main__":
    main()
