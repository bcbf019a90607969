"""Hugging Face Trainer. ``--model`` is a name on the hub or the folder of a saved model."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

import camkernels as ck
from examples.pictures import Pictures, arguments


def collate(samples: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    images, labels = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv, model="microsoft/resnet-18")
    train, test = (Pictures(args.data, args.side, part) for part in (False, True))
    model = AutoModelForImageClassification.from_pretrained(
        args.model, num_labels=len(train.classes), ignore_mismatched_sizes=True
    )
    criterion = ck.CAMEntropyLoss(model, "resnet.encoder.stages.3", beta=0.1, reduction="sum")

    def loss(outputs, labels, num_items_in_batch):
        return criterion(outputs.logits, labels) / num_items_in_batch

    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir="runs/huggingface",
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch,
            gradient_accumulation_steps=args.accumulate,
            dataloader_drop_last=True,
            optim="sgd",
            learning_rate=args.lr,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,  # gradients are not clipped
            eval_strategy="epoch",
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
        ),
        collate,
        train,
        test,
        compute_loss_func=loss,
    )
    trainer.train()


if __name__ == "__main__":
    main()
