"""Accelerate."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

import camkernels as ck
from examples.pictures import Pictures, arguments, make_model


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    accelerator = Accelerator(gradient_accumulation_steps=args.accumulate)
    set_seed(0)
    train, test = (Pictures(args.data, args.side, part) for part in (False, True))
    model = make_model(args.model, len(train.classes))
    model, optimizer, training, testing = accelerator.prepare(
        model,
        torch.optim.SGD(model.parameters(), args.lr, momentum=0.9),
        DataLoader(train, args.batch, shuffle=True, drop_last=True),
        DataLoader(test, args.batch),
    )
    criterion = ck.CAMConsistencyLoss(model, layer="layer4", alpha=0.1, beta=1e-6)

    for epoch in range(args.epochs):
        model.train()
        for images, targets in training:
            with accelerator.accumulate(model):
                loss = criterion(model(images), targets)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch}: training {loss:.4f}", criterion.terms)

        model.eval()
        with torch.no_grad():
            for images, targets in testing:
                accelerator.print(f"  test {criterion(model(images), targets):.4f}")


if __name__ == "__main__":
    main()
