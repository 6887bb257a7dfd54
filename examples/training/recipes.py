"""What to train with: every value is the default of the option of the same name.

``imagenet`` is table 4 of the paper, ``imagenet-384`` its fine-tuning. The batch is that of a step, over all processes.
"""

from typing import Any

PHOTOS: dict[str, Any] = {
    "img_size": 224,
    "pretrain_size": None,  # the image size
    "epochs": 15,
    "batch_size": 64,
    "lr": 2e-3,
    "schedule": "cosine",
    "min_lr": 2e-5,
    "warmup_epochs": 1.5,
    "warmup_lr": 2e-6,
    "weight_decay": 0.05,
    "layer_decay": None,
    "clip_norm": 1.0,
    "drop_path": 0.1,
    "label_smoothing": 0.1,
    "mixup": 0.0,
    "cutmix": 0.0,
    "auto_augment": None,
    "color_jitter": 0.4,
    "random_erasing": 0.0,
    "crop_scale": 0.08,
    "crop_pct": 0.875,
    "repeats": 1,
}

IMAGENET = {
    **PHOTOS,
    "epochs": 300,
    "batch_size": 1024,
    "lr": 1e-3,
    "min_lr": 1e-5,
    "warmup_epochs": 5,
    "warmup_lr": 1e-6,
    "drop_path": {"transnext_micro": 0.15, "transnext_tiny": 0.25, "transnext_small": 0.45, "transnext_base": 0.6},
    "mixup": 0.8,
    "cutmix": 1.0,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "random_erasing": 0.25,
    "repeats": 3,
}

RECIPES: dict[str, dict[str, Any]] = {
    "digits": {**PHOTOS, "img_size": 32, "color_jitter": None, "crop_scale": None, "crop_pct": None},
    "cifar100": {**PHOTOS, "img_size": 32, "crop_scale": 0.4, "crop_pct": 1.0},
    "photos": PHOTOS,
    "imagenet": IMAGENET,
    "imagenet-384": {
        **IMAGENET,
        "img_size": 384,
        "pretrain_size": 224,
        "epochs": 5,
        "lr": 1e-5,
        "schedule": "constant",
        "warmup_epochs": 0,
        "drop_path": {"transnext_small": 0.7, "transnext_base": 0.8},
        "cutmix": 0.0,
        "crop_pct": 1.0,
    },
}
