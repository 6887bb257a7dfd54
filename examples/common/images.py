"""Images of a file or a folder."""

from pathlib import Path

from PIL import Image, UnidentifiedImageError
from timm.data.readers.img_extensions import get_img_extensions

from common.refusals import refuse


def find_images(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        refuse("images", f"no file or folder {path}")
    extensions = get_img_extensions(as_set=True)
    images = sorted(file for file in path.rglob("*") if file.suffix.lower() in extensions)
    if not images:
        refuse("images", f"no image in the folder {path}")
    return images


def read_image(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        refuse("images", f"cannot read {path}: {error}")
