"""Lightning."""

from __future__ import annotations

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import camkernels as ck
from examples.pictures import Pictures, arguments, make_model


class Classifier(lightning.LightningModule):
    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.model = ck.swap_in(model)
        self.criterion = ck.InterpretableGradientLoss(self.model, error="cosine", weight=0.01)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, targets = batch
        loss: Tensor = self.criterion(self.model(images), targets)
        self.log("loss", loss, prog_bar=True)
        self.log_dict(self.criterion.terms)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, targets = batch
        self.log("test_loss", self.criterion(self.model(images), targets))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), self.lr, momentum=0.9)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    lightning.seed_everything(0)
    train, test = (Pictures(args.data, args.side, part) for part in (False, True))
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        accumulate_grad_batches=args.accumulate,
        default_root_dir="runs",
        log_every_n_steps=1,
    )
    trainer.fit(
        Classifier(make_model(args.model, len(train.classes)), args.lr),
        DataLoader(train, args.batch, shuffle=True, drop_last=True),
        DataLoader(test, args.batch),
    )


if __name__ == "__main__":
    main()
