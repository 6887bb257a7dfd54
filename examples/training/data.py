"""The data sets, the order in which a run goes through them, and the part that each process reads."""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from timm.data import ImageDataset, create_dataset, create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from timm.utils import random_seed
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from common.interrupts import ignore_interrupts
from common.refusals import refuse
from training.digits import Digits
from training.processes import rank, world_size
from training.shards import ShardReader

SPLITS = {"folder": ["train", "val"], "shards": ["train", "val"], "hfds": ["train", "validation"]}


class Data(NamedTuple):
    train: Dataset
    test: Dataset
    num_classes: int
    in_chans: int


def open_data(args: Namespace) -> Data:
    name, *path = args.data
    if name != "digits" and (args.crop_scale is None or args.crop_pct is None):
        refuse("--recipe", f"{args.recipe} has no augmentation of photographs, which {name} needs")
    if name == "digits":
        return Data(Digits("train", args.img_size), Digits("test", args.img_size), num_classes=10, in_chans=1)
    kind, _, hub_name = name.partition("/")
    root = Path(*path)
    if kind == "cifar100":
        train, test, num_classes = open_cifar100(root)
    elif kind == "folder":
        train, test, num_classes = open_folders(root, args.splits)
    elif kind == "shards":
        train, test, num_classes = open_shards(root, args.splits)
    else:
        train, test, num_classes = open_hugging_face(hub_name, root if path else None, args.splits)
    size = (3, args.img_size, args.img_size)
    train.transform = create_transform(
        size,
        is_training=True,
        scale=(args.crop_scale, 1.0),
        auto_augment=args.auto_augment,
        color_jitter=args.color_jitter,
        re_prob=args.random_erasing,
        re_mode="pixel",
        interpolation="bicubic",
    )
    whole = args.crop_pct == 1.0
    test.transform = create_transform(
        size, crop_pct=args.crop_pct, crop_mode="squash" if whole else "center", interpolation="bicubic"
    )
    return Data(train, test, num_classes, 3)


def open_cifar100(root: Path) -> tuple[Dataset, Dataset, int]:
    try:
        train, test = (create_dataset("torch/cifar100", root, split) for split in ("train", "validation"))
    except RuntimeError as error:
        refuse("--data", f"no CIFAR-100 in {root}, the folder that holds cifar-100-python/ ({error})")
    return train, test, 100


def open_folders(root: Path, splits: list[str]) -> tuple[Dataset, Dataset, int]:
    for split in splits:
        if not (root / split).is_dir():
            refuse("--data", f"no folder {root / split}; its sub-folders must hold the images, one for each class")
    train, test = (create_dataset("", root / split, search_split=False) for split in splits)
    return train, test, common_classes(train, test, splits)


def open_shards(root: Path, splits: list[str]) -> tuple[Dataset, Dataset, int]:
    readers = []
    for split in splits:
        shards = sorted(path for path in root.rglob("*.tar") if split in str(path.relative_to(root)))
        if not shards:
            refuse("--data", f"no .tar file in {root} has {split!r} in its name or in that of its folder")
        try:
            readers.append(ShardReader(shards, quiet=rank() > 0))
        except (ValueError, OSError) as error:
            refuse("--data", str(error))
    train, test = (ImageDataset(root, reader=reader) for reader in readers)
    return train, test, 1 + max(int(reader.rows[:, 3].max()) for reader in readers)


def open_hugging_face(name: str, cache: Path | None, splits: list[str]) -> tuple[Dataset, Dataset, int]:
    try:
        train, test = (create_dataset(f"hfds/{name}", cache and str(cache), split) for split in splits)
    except ImportError:
        refuse("--data", "Hugging Face's data sets need the package datasets: pip install datasets")
    except Exception as error:  # of the hub, of the network, or of the files
        refuse("--data", f"no {' and '.join(splits)} in {name}: {type(error).__name__}: {error}")
    return train, test, common_classes(train, test, splits)


def common_classes(train: ImageDataset, test: ImageDataset, splits: list[str]) -> int:
    classes, others = train.reader.class_to_idx, test.reader.class_to_idx
    if classes != others or not classes:
        names = " and ".join(splits)
        refuse("--data", f"{names} must hold the same classes, they differ in {sorted({*classes} ^ {*others})}")
    return len(classes)


def derived_seed(*position: Any) -> int:
    return Random(str(position)).getrandbits(32)


class Augmented(Dataset):
    """A data set whose random transforms follow from the seed that an image is asked for with."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, int]:
        seed, index = place
        random_seed(seed)
        return self.dataset[index]


class Order:
    """Which images make up each micro-batch of this process, from a step on to the end of the run.

    An epoch is one long list of images that follows from the seed and the number of the epoch. A step takes the next
    ``batch_size`` of them, cut into micro-batches that the processes take in turn. So who computes a micro-batch
    depends on the number of processes, and what is in it does not.
    """

    def __init__(self, args: Namespace, length: int, step: int):
        self.args, self.step = args, step
        self.steps = length // args.batch_size  # of an epoch
        self.sampler = RepeatAugSampler(
            range(length), num_replicas=1, rank=0, num_repeats=args.repeats, selected_round=0
        )

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        args = self.args
        for epoch in range(self.step // self.steps, args.epochs):
            self.sampler.set_epoch(derived_seed(args.seed, "order", epoch))
            images = list(self.sampler)
            for step in range(max(self.step, epoch * self.steps), (epoch + 1) * self.steps):
                start = (step % self.steps) * args.batch_size
                for micro_batch in own_micro_batches(args):
                    first = start + micro_batch * args.micro_batch
                    places = range(first, first + args.micro_batch)
                    yield [(derived_seed(args.seed, "image", epoch, place), images[place]) for place in places]


def own_micro_batches(args: Namespace) -> range:
    """Those of the micro-batches of a step that are this process's."""
    return range(rank(), args.batch_size // args.micro_batch, world_size())


def training_batches(data: Data, args: Namespace, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's micro-batches from a step on to the end of the run."""
    order = Order(args, len(data.train), step)
    return iter(DataLoader(Augmented(data.train), batch_sampler=order, **loading(args)))


def test_batches(data: Data, args: Namespace) -> Iterator[tuple[Tensor, Tensor, int]]:
    """This process's share of the held-out images, each once, and how many images of a batch count.

    Every process gets as many batches as the others, for they must call a sharded model together; the images that fill
    up the last one do not count.
    """
    own = list(range(rank(), len(data.test), world_size()))
    longest = -(-len(data.test) // world_size())
    filled = Subset(data.test, own + [0] * (longest - len(own)))
    left = len(own)
    for images, labels in DataLoader(filled, batch_size=args.micro_batch, **loading(args)):
        yield images, labels, min(left, len(images))
        left -= min(left, len(images))


def loading(args: Namespace) -> dict[str, Any]:
    return {
        "num_workers": args.workers,
        "worker_init_fn": ignore_interrupts,
        "pin_memory": args.device.type == "cuda",
    }
