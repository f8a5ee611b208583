"""The user's own images: bytes from the browser become pixels as the data set has them, or one clear line."""

import dataclasses
import io

import torch
from torch import Tensor

from augdistill_report.data.folders import read_image

MOST_IMAGES = 20  # that can be shown at once

UPLOAD_BYTES = 8_000_000  # of a file: the page's connection to its kernel takes 10 MB at a time


class File(io.BytesIO):
    """The content of a file, with its name for messages."""

    def __init__(self, name: str, content: bytes):
        super().__init__(content)
        self.name = name

    def __repr__(self):
        return self.name


@dataclasses.dataclass(frozen=True, eq=False)
class Own:
    """Images of the user's: `pixels` `[n, C, size, size]` in [0, 1], and their names."""

    names: list[str]
    pixels: Tensor

    def __add__(self, other: "Own") -> "Own":
        """The images of both, the last `MOST_IMAGES` of them."""
        names, pixels = self.names + other.names, torch.cat([self.pixels, other.pixels])
        return Own(names[-MOST_IMAGES:], pixels[-MOST_IMAGES:])


def read_own(name: str, content: bytes, shape: tuple[int, int, int], size_of_file: int = 0) -> Own:
    """One file as an image of `shape` (C, H, W): resized to a square, its colours turned to grey if C is 1.

    `size_of_file` is what the browser says of a file that it did not send because it is too large.

    A `ValueError` names a file that is too large, or is not a readable image.
    """
    channels, size, _ = shape
    heavy = max(len(content), size_of_file if type(size_of_file) is int else 0)
    if heavy > UPLOAD_BYTES:
        raise ValueError(f"{name}: has {heavy / 1e6:.1f} MB; must have at most {UPLOAD_BYTES / 1e6:g} MB")
    if channels not in (1, 3):
        raise ValueError(f"{name}: the data set's images have {channels} channels; a picture has 1 or 3")
    pixels = read_image(File(name, content), size).float()[None] / 255
    if channels == 1:  # the weights of ITU-R BT.601, as in Pillow
        pixels = (pixels * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    return Own([name], pixels)
