"""Tar shards in WebDataset's layout, read at random: any image at any time, so that a run can be resumed exactly."""

import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader import Reader
from tqdm import tqdm


class ShardReader(Reader):
    """The images of uncompressed tar files, where KEY.jpg (or .png, ...) has its class number in KEY.cls.

    The headers of all shards are read once, here; afterwards an image is one seek. A timm reader, for ImageDataset.
    """

    def __init__(self, shards: list[Path], quiet: bool = False):
        super().__init__()
        self.shards = shards
        rows = [
            (number, *row) for number, path in enumerate(tqdm(shards, "index", disable=quiet)) for row in index(path)
        ]
        self.rows = np.array(rows, dtype=np.int64).reshape(-1, 4)  # shard, offset, size, class

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[BytesIO, int]:
        shard, offset, size, label = self.rows[i].tolist()
        with self.shards[shard].open("rb") as file:
            file.seek(offset)
            return BytesIO(file.read(size)), label

    def _filename(self, i: int, basename: bool = False, absolute: bool = False) -> str:
        shard, offset, *_ = self.rows[i].tolist()
        return f"{self.shards[shard].name}:{offset}"


def index(path: Path) -> list[tuple[int, int, int]]:
    """Offset, size and class of each image of a shard."""
    extensions = get_img_extensions(as_set=True)
    images, labels = {}, {}
    with tarfile.open(path, "r:") as shard:
        for member in shard:
            folder, _, name = member.name.rpartition("/")
            key, _, extension = name.partition(".")
            if f".{extension}".lower() in extensions:
                images[folder, key] = (member.offset_data, member.size)
            elif extension == "cls":
                labels[folder, key] = int(shard.extractfile(member).read())
    if lonely := images.keys() - labels.keys():
        raise ValueError(f"{path} has no class (a .cls file) for {'/'.join(min(lonely))}")
    return [(*place, labels[key]) for key, place in images.items()]
