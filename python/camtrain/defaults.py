"""What each recipe and data set has as defaults, and which keys a recipe reads."""

from __future__ import annotations

from typing import Any

# The consistency paper: SGD, trained networks to begin with, 60 epochs on CUB-200 and 20 on
# Caltech-101 at 224 x 224. It does not state its batch size. A damaged picture of these small sets
# is an error: there are none to expect.
SGD: dict[str, Any] = {
    "optimizer": "sgd",
    "lr": 1e-3,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "lr_step": 30,
}
FINE_TUNED: dict[str, Any] = {
    **SGD,
    "image_size": 224,
    "arch": "resnet50",
    "batch_size": 32,
    "workers": 2,
    "damaged": "error",
}
# No paper states how it trains on CIFAR.
CIFAR: dict[str, Any] = {"image_size": 32, "batch_size": 128, "channels_last": True}
# The Stanford Dogs paper: a trained ResNet-50 at 224 x 224 with a linear layer, SGD at 0.01,
# batches of 16, 2 epochs, no augmentation. Its SGD is that of Keras, which has neither momentum nor
# weight decay unless told.
DOGS = "stanford-dogs"
DOGS_PAPER: dict[str, Any] = {
    "image_size": 224,
    "arch": "resnet50",
    "head_units": 0,
    "augment": False,
    "epochs": 2,
    "batch_size": 16,
    "optimizer": "sgd",
    "lr": 0.01,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "lr_step": 0,
    "warmup_epochs": 0,
}
# Of the recipe of that name, which compares maps with true boxes.
BOXED = ("digits", "voc", "cub", "caltech101", DOGS)
# The CAM entropy paper: ResNet-50, 300 units, boxes at 192 x 192, Adam at 0.001, batches of 20,
# 30 epochs.
DATA: dict[str, dict[str, Any]] = {
    "voc": {
        "image_size": 192,
        "arch": "resnet50",
        "head_units": 300,
        "epochs": 30,
        "batch_size": 20,
        "lr": 1e-3,
        "workers": 2,
    },
    "cub": {**FINE_TUNED, "epochs": 60},
    "caltech101": {**FINE_TUNED, "epochs": 20},
    "stanford-dogs": {**DOGS_PAPER, "workers": 2},
    "cifar10": CIFAR,
    "cifar100": CIFAR,
    "folder": {"image_size": 224, "arch": "resnet50", "batch_size": 32, "workers": 2},
    # NHWC halves the time of a small network on a CPU. A network that has learnt nothing yet puts
    # out its maps to lower their entropy (99 % dead after two epochs), so the classes come first;
    # the paper begins with a network trained on ImageNet.
    "digits": {"channels_last": True, "warmup_epochs": 3},
}
# What lies in the folder that --root names, for each data set that is on disk.
HOLDS = {
    "voc": "VOCdevkit",
    "cub": "CUB_200_2011",
    "caltech101": "101_ObjectCategories",
    "stanford-dogs": "Images, Annotation, train_list.mat and test_list.mat",
    "cifar10": "cifar-10-batches-py, or train/<class>/ and test/<class>/",
    "cifar100": "cifar-100-python, or train/<class>/ and test/<class>/",
    "folder": "train/<class>/ and test/<class>/ or val/<class>/, or a folder for each class",
}
BETA = {"voc": 100.0, "digits": 0.1}
CONSISTENCY: dict[str, Any] = {
    **SGD,
    "alpha": 0.1,
    "beta": 1e-6,
    "target": "predicted",
    "warmup_epochs": 0,
}

# The interpretable-gradients paper states no lambda: "as high as possible" without harm.
INTERPRETABLE: dict[str, Any] = {"gradient_weight": 1e-2, "warmup_epochs": 0}

# Recipes with a regulariser, whose weights may rise by a schedule or be balanced.
REGULARIZED = ("entropy", "consistency", "interpretable", "combined")
# What a recipe reads and others would ignore without a word: refused there.
READ_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("alpha", "norm", "map_relu", "view_scale", "window", "window_size", "sigma", "padding"),
        ("consistency", "combined"),
    ),
    **dict.fromkeys(("distance", "temperature", "views"), ("consistency", "combined")),
    **dict.fromkeys(("insertion_steps", "insertion_limit", "compare"), ("consistency",)),
    **dict.fromkeys(
        ("regularizer", "other_classes", "normalize", "head_path"),
        ("entropy", "combined", "baseline"),
    ),
    **dict.fromkeys(("error", "gradient_weight", "every"), ("interpretable", "combined")),
    # not of stanford-dogs, which afterwards looks into layers that the engine does not stop at
    "engine": (*REGULARIZED, "baseline"),
    **dict.fromkeys(("ramp_epochs", "ramp", "balance", "balance_every"), REGULARIZED),
    "label_smoothing": (*REGULARIZED, "baseline"),
    "beta": ("entropy", "consistency", "combined"),
    "norm_weight": ("combined",),
}
