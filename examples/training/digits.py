"""Handwritten digits, a data set that comes with scikit-learn."""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import Compose, InterpolationMode, Normalize, RandomAffine


class Digits(Dataset):
    """The 1797 handwritten digits of scikit-learn, 8 x 8 pixels, a fifth of them (stratified, fixed) held out."""

    def __init__(self, split: str, img_size: int):
        images, labels = load_digits(return_X_y=True)
        parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
        images, labels = parts[0::2] if split == "train" else parts[1::2]
        small = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        self.images = nn.functional.interpolate(small, size=(img_size, img_size), mode="bilinear")
        self.labels = labels.tolist()
        normalize = Normalize(mean=0.305, std=0.376)
        jitter = RandomAffine(10, translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=InterpolationMode.BILINEAR)
        self.transform = Compose([jitter, normalize]) if split == "train" else normalize

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]
