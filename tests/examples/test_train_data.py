"""The training example's data: where it comes from, in which order, and who reads what."""

import pickle
import tarfile
from argparse import Namespace
from io import BytesIO
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

from tests.examples.running import colourful
from tests.examples.training_runs import checkpoint
from training import data
from training.data import Augmented, Data, Order
from training.digits import Digits
from training.shards import ShardReader


def test_held_out_digits_stay_held_out():
    parts = {split: Digits(split, 8) for split in ("train", "test")}
    assert [len(part) for part in parts.values()] == [1437, 360]
    assert sorted(parts["test"].labels).count(3) in (36, 37)  # stratified: 183 of 1797 are threes
    images = {split: {image.numpy().tobytes() for image in part.images} for split, part in parts.items()}
    assert not images["train"] & images["test"]


def test_augmentation_follows_from_the_seed_alone():
    digits = Augmented(Digits("train", 16))
    once = [digits[seed, 5][0] for seed in (1, 2)]
    again = [digits[seed, 5][0] for seed in (2, 1)][::-1]
    assert all(map(torch.equal, once, again))
    assert not torch.equal(*once)


class Processes:
    """What a process of several sees, of those functions that training.data asks."""

    def __init__(self, monkeypatch, number: int, size: int):
        monkeypatch.setattr(data, "rank", lambda: number)
        monkeypatch.setattr(data, "world_size", lambda: size)


def arguments(**kwargs) -> Namespace:
    return Namespace(seed=3, epochs=2, repeats=1, workers=0, device=torch.device("cpu"), **kwargs)


def one_run(monkeypatch, size: int, step: int = 0, **kwargs) -> list[list[tuple[int, int]]]:
    """The micro-batches of a run with so many processes, in the order of a single one."""
    orders = []
    for number in range(size):
        with monkeypatch.context() as patch:
            Processes(patch, number, size)
            orders.append(list(Order(arguments(batch_size=8, micro_batch=2, **kwargs), length=21, step=step)))
    return [micro_batch for turn in zip(*orders, strict=True) for micro_batch in turn]


@pytest.mark.parametrize("size", [2, 4])
def test_the_order_does_not_depend_on_the_number_of_processes(size, monkeypatch):
    assert one_run(monkeypatch, size) == one_run(monkeypatch, 1)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_the_order_goes_on_where_a_run_stopped(step, monkeypatch):
    assert one_run(monkeypatch, 2, step) == one_run(monkeypatch, 2)[4 * step :]


def test_an_epoch_draws_an_image_once(monkeypatch):
    micro_batches = one_run(monkeypatch, 1)
    assert len(micro_batches) == 2 * 2 * 4
    epochs = [
        [place for micro_batch in half for place in micro_batch] for half in (micro_batches[:8], micro_batches[8:])
    ]
    assert [len({index for _, index in epoch}) for epoch in epochs] == [16, 16]
    assert [index for _, index in epochs[0]] != [index for _, index in epochs[1]]
    assert len({seed for epoch in epochs for seed, _ in epoch}) == 32


def test_repeated_augmentation_draws_an_image_again_with_another_seed(monkeypatch):
    args = arguments(batch_size=12, micro_batch=6)
    args.repeats = 3
    places = [place for micro_batch in islice(Order(args, length=24, step=0), 4) for place in micro_batch]
    assert len(places) == len({seed for seed, _ in places}) == 24
    assert len({index for _, index in places}) == 8
    for first in range(0, 24, 3):
        assert len({index for _, index in places[first : first + 3]}) == 1


@pytest.mark.parametrize("length", [1, 3, 20, 21])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_evaluation_counts_every_image_once(length, size, monkeypatch):
    images = TensorDataset(torch.arange(length).float(), torch.zeros(length))
    counted, batches = [], set()
    for number in range(size):
        Processes(monkeypatch, number, size)
        mine = list(data.test_batches(Data(None, images, 1, 1), arguments(micro_batch=4)))
        counted += [int(image) for batch, _, count in mine for image in batch[:count]]
        batches.add(len(mine))
    assert sorted(counted) == list(range(length))
    assert len(batches) == 1  # a sharded model is called by all or none


def write_folder(root, classes: dict[str, list[str]]):
    noise = np.random.default_rng(0)
    for split, names in classes.items():
        for name in names:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.fromarray(noise.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def test_folder_of_images_with_workers_and_a_reference_variant(train, tmp_path):
    write_folder(tmp_path / "data", {"train": ["cat", "dog"], "val": ["cat", "dog"]})
    folder = tmp_path / "run"
    args = ["--model", "transnext_micro", "--img-size", "32", "--epochs", "1", "--batch-size", "4", "--workers", "1"]
    assert train.main(["--data", "folder", str(tmp_path / "data"), *args, "--output", str(folder)]) == 0
    assert checkpoint(folder)["step"] == 2
    assert load_file(folder / "model.safetensors")["head.fc.weight"].shape == (2, 384)
    assert colourful(folder / "receptive_field.png") > 0.1


def test_folder_with_other_classes_is_refused(train, tmp_path, capsys):
    write_folder(tmp_path, {"train": ["cat", "dog"], "val": ["cat", "fox"]})
    with pytest.raises(SystemExit):
        train.main(["--data", "folder", str(tmp_path), "--output", str(tmp_path / "run")])
    assert "train and val must hold the same classes, they differ in ['dog', 'fox']" in capsys.readouterr().err


def test_cifar100(train, tmp_path, monkeypatch):
    """A few images in the layout of the archive, with torchvision's check sums set aside."""
    from torchvision.datasets import CIFAR100

    noise = np.random.default_rng(0)
    (tmp_path / "cifar-100-python").mkdir()
    for name in ("train", "test"):
        images = noise.integers(0, 256, (6, 3072), dtype=np.uint8)
        entry = {"data": images, "fine_labels": list(range(6)), "coarse_labels": [0] * 6}
        (tmp_path / "cifar-100-python" / name).write_bytes(pickle.dumps(entry))
    names = {"fine_label_names": [f"class {i}" for i in range(100)]}
    (tmp_path / "cifar-100-python" / "meta").write_bytes(pickle.dumps(names))
    monkeypatch.setattr(CIFAR100, "train_list", [["train", None]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", None]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": None})

    folder = tmp_path / "run"
    args = ["--model", "test_convnext", "--epochs", "1", "--batch-size", "3", "--workers", "0"]
    assert train.main(["--data", "cifar100", str(tmp_path), *args, "--output", str(folder)]) == 0
    assert checkpoint(folder)["step"] == 2
    assert load_file(folder / "model.safetensors")["head.fc.weight"].shape[0] == 100


def png(noise: np.random.Generator) -> bytes:
    file = BytesIO()
    Image.fromarray(noise.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(file, "png")
    return file.getvalue()


def write_shards(root, labels: bool = True):
    """Four images in two shards for each split, with a file beside each that is none of our business."""
    noise = np.random.default_rng(0)
    root.mkdir()
    images = {}
    for split in ("train", "val"):
        for number in range(2):
            with tarfile.open(root / f"set-{split}-{number:04}.tar", "w") as shard:
                for i in range(2):
                    key = f"photos/{split}.d/{2 * number + i:03}"
                    images[split, 2 * number + i] = png(noise)
                    parts = {"png": images[split, 2 * number + i], "json": b"{}"}
                    for extension, content in {**parts, **({"cls": b"%d" % (2 * i)} if labels else {})}.items():
                        member = tarfile.TarInfo(f"{key}.{extension}")
                        member.size = len(content)
                        shard.addfile(member, BytesIO(content))
    return images


def test_shards(train, tmp_path):
    images = write_shards(tmp_path / "shards")
    reader = ShardReader(sorted((tmp_path / "shards").glob("*train*.tar")))
    assert [(file.read(), label) for file, label in map(reader.__getitem__, range(4))] == [
        (images["train", i], 2 * (i % 2)) for i in range(4)
    ]
    folder = tmp_path / "run"
    args = ["--model", "test_vit", "--img-size", "32", "--epochs", "1", "--batch-size", "2", "--workers", "2"]
    assert train.main(["--data", "shards", str(tmp_path / "shards"), *args, "--output", str(folder)]) == 0
    assert checkpoint(folder)["step"] == 2
    assert load_file(folder / "model.safetensors")["head.weight"].shape[0] == 3


@pytest.mark.parametrize(
    ("labels", "splits", "message"),
    [
        (False, [], "set-train-0000.tar has no class (a .cls file) for photos/train.d/000"),
        (True, ["--splits", "train", "test"], "no .tar file in {root} has 'test' in its name"),
    ],
)
def test_shards_that_do_not_fit_are_refused(labels, splits, message, train, tmp_path, capsys):
    write_shards(tmp_path / "shards", labels)
    with pytest.raises(SystemExit):
        train.main(["--data", "shards", str(tmp_path / "shards"), *splits, "--output", str(tmp_path / "run")])
    assert message.format(root=tmp_path / "shards") in capsys.readouterr().err


def test_hugging_face_data_set(train, tmp_path, monkeypatch, capsys):
    """A local one: Parquet files with images and class labels, as the hub has them."""
    datasets = pytest.importorskip("datasets")
    noise = np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    for split in ("train", "test"):
        rows = {"image": [{"bytes": png(noise), "path": None} for _ in range(4)], "label": [0, 1, 1, 0]}
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "set" / f"{split}-0.parquet")
    folder, cache = tmp_path / "run", tmp_path / "cache"
    args = ["--model", "test_vit", "--img-size", "32", "--epochs", "1", "--batch-size", "4", "--workers", "0"]
    source = ["--data", f"hfds/{tmp_path / 'set'}", str(cache), "--output", str(folder)]
    with pytest.raises(SystemExit):
        train.main([*args, *source])
    assert "argument --data: no train and validation in" in capsys.readouterr().err
    assert train.main([*args, *source, "--splits", "train", "test"]) == 0
    assert load_file(folder / "model.safetensors")["head.weight"].shape[0] == 2
