"""A plain PyTorch loop."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader

from examples.pictures import Pictures, arguments, make_model


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    torch.manual_seed(0)
    train, test = (Pictures(args.data, args.side, part) for part in (False, True))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(args.model, len(train.classes)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9)
    criterion = nn.CrossEntropyLoss()

    for epoch in range(args.epochs):
        model.train()
        for step, (x, y) in enumerate(DataLoader(train, args.batch, shuffle=True, drop_last=True)):
            loss = criterion(model(x.to(device)), y.to(device))
            (loss / args.accumulate).backward()
            if (step + 1) % args.accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
        print(f"epoch {epoch}: training {loss:.4f}")

        model.eval()
        with torch.no_grad():
            for x, y in DataLoader(test, args.batch):
                print(f"  test {criterion(model(x.to(device)), y.to(device)):.4f}")


if __name__ == "__main__":
    main()
