"""Grids of images: labelled rows, as one picture or as the frames of an animation.

Pillow draws them 10 times as fast as matplotlib: fast enough to redraw 20 images while a slider moves.
"""

import io
import itertools
import re
import unicodedata
import zlib
from functools import lru_cache
from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CELL = 84  # most pixels of an image's width: it is enlarged by an integer factor, or a larger one is made smaller

GAP, LINE = 6, 18  # pixels between images, and height of a text line in pixels

COLUMNS, NAMES = 10, 190  # most images in a row that one can still see on a page, and most pixels of a row's name

SIZES = (13, 11, 9)  # of letters: a name that does not fit is wrapped, then gets smaller letters

INK, PAPER = "#111111", "#ffffff"


@lru_cache(maxsize=4)
def font(size: int) -> ImageFont.FreeTypeFont:
    """The typeface of matplotlib's pictures, which is part of matplotlib."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def printable(text: str) -> str:
    """A text on one line: control characters, line breaks and invalid Unicode as escapes, which Pillow can draw."""
    bad = ("Cc", "Cs", "Zl", "Zp")  # their Unicode categories
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in bad else c for c in text)


def fitted(text: str, width: int, lines: int) -> tuple[str, int]:
    """`text` as at most `lines` lines of `width` pixels, and its font size, one of `SIZES`.

    It is broken behind spaces and signs, then in smaller letters, then inside words, and only at last cut.
    """
    words = re.findall(r"[^\s_/,-]*[\s_/,-]*", text)
    for pieces, size in [*((words, size) for size in SIZES), (list(text), SIZES[-1])]:
        rows, wide = [""], font(size).getlength
        for piece in pieces:
            if rows[-1] and wide((rows[-1] + piece).rstrip()) > width:
                rows.append("")
            rows[-1] += piece
        if len(rows) <= lines and all(wide(row.rstrip()) <= width for row in rows):
            break
    else:
        rows = rows[:lines]
        while rows[-1] and wide(rows[-1] + "…") > width:
            rows[-1] = rows[-1][:-1]
        rows[-1] += "…"
    return "\n".join(row.rstrip() for row in rows), size


def readable_choice(labels: Tensor, each: int = 2) -> tuple[Tensor, str]:
    """Positions `[k]` in `labels` `[n]` of the images that a grid shows, and a note on what it leaves out ("" = none).

    At most `COLUMNS` classes, evenly spread over all that there are, and at most `each` images of a class: fewer, if
    that would be more than `COLUMNS` images.
    """
    known, sizes = (found.tolist() for found in labels.cpu().unique(return_counts=True))
    count = min(len(known), COLUMNS)
    each = max(1, min(each, COLUMNS // count))
    kept = [known[round(place * (len(known) - 1) / max(count - 1, 1))] for place in range(count)]
    index = torch.cat([(labels == c).nonzero().flatten()[:each] for c in kept])
    parts = [f"{count} of {len(known)} classes"] if count < len(known) else []
    if max(sizes) > each:
        most = f"{min(sizes)} to {max(sizes)}" if min(sizes) < max(sizes) else f"{max(sizes)}"
        parts.append(f"{each} of {most} images a class")
    return index, ", ".join(parts) and f"shown: {', '.join(parts)}"


def difference_image(change: Tensor) -> Tensor:
    """A difference of pixels, in [-1, 1], as an image in [0, 1]: grey = no change, lighter = larger values."""
    return (change / 2 + 0.5).clamp(0, 1)


def image_grid(rows: dict[str, Tensor], columns: list[str], cell: int = CELL, title: str = "") -> Image.Image:
    """Rows of images `[k, C, H, W]` in [0, 1], with row names at the left and column names on top.

    Grey (C = 1) and RGB rows can be mixed, and rows may have different lengths. Names may be any text.
    """
    rows = {printable(name): images for name, images in rows.items()}
    title, (height, width) = printable(title), next(iter(rows.values())).shape[-2:]
    scale = cell // width or cell / width
    size = round(width * scale), max(1, round(height * scale))
    filter = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
    high, wide = size[1] + GAP, max(size[0], min(cell, 60)) + GAP  # room for a class name above small images
    heads = [fitted(printable(name), wide - 2, 4) for name in columns]
    names = {name: fitted(name, NAMES, max(1, high // LINE)) for name in rows}
    top = max([0, *(len(text.split("\n")) * (size + 5) for text, size in heads if text)])
    top += LINE * bool(title) + GAP
    left = max(int(font(size).getlength(line)) for text, size in names.values() for line in text.split("\n")) + 2 * GAP
    whole = max(left + wide * len(columns), GAP + int(font(13).getlength(title)) + GAP if title else 0)
    sheet = Image.new("RGB", (whole, top + high * len(rows)), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        start = left if left + font(13).getlength(title) < whole else GAP
        draw.text((start, GAP // 2), title, fill=INK, font=font(13))
    for place, (text, letters) in enumerate(heads):
        middle = left + wide * place + (wide - GAP) // 2, top - 1
        draw.text(middle, text, fill=INK, font=font(letters), anchor="md", align="center", spacing=1)
    for line, (name, images) in enumerate(rows.items()):
        text, letters = names[name]
        middle = left - GAP, top + high * line + (high - GAP) // 2
        draw.text(middle, text, fill=INK, font=font(letters), anchor="rm", align="right", spacing=1)
        if not len(images):
            continue
        bytes_ = (images.detach().clamp(0, 1).nan_to_num() * 255).round().to("cpu", torch.uint8)
        bytes_ = bytes_.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
        for place, pixels in zip(range(len(columns)), bytes_, strict=False):
            image = Image.fromarray(pixels.contiguous().numpy()).resize(size, filter)
            sheet.paste(image, (left + wide * place + (wide - GAP - size[0]) // 2, top + high * line))
    return sheet


def png(sheet: Image.Image, effort: int = 6) -> bytes:
    """A picture as PNG, always with the same bytes; a smaller `effort` (1 to 9) is faster, but the file is larger."""
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", compress_level=effort)
    return buffer.getvalue()


def is_whole_png(path: Path) -> bool:
    """Whether a file is an intact PNG: every chunk has the right checksum, and the last chunk is there."""
    content, place = path.read_bytes(), 8
    if content[:8] != b"\x89PNG\r\n\x1a\n":
        return False
    while place + 12 <= len(content):  # a chunk: length, name, data, CRC-32 of name and data
        end = place + 8 + int.from_bytes(content[place : place + 4])
        if zlib.crc32(content[place + 4 : end]) != int.from_bytes(content[end : end + 4]):
            return False
        if content[place + 4 : place + 8] == b"IEND":
            return end + 4 == len(content)
        place = end + 4
    return False


def film(frames: list[Image.Image], seconds: float = 0.4) -> bytes:
    """Pictures of one size as an endless GIF, each shown for `seconds`, the last for 6 times as long."""
    if not frames or any(frame.size != frames[0].size for frame in frames):
        raise ValueError(f"film: needs frames, all of one size; has {sorted({frame.size for frame in frames})}")
    # one colour table for all frames, otherwise colours flicker
    strip = Image.new("RGB", (frames[0].width, sum(frame.height for frame in frames)))
    for frame, y in zip(frames, itertools.count(0, frames[0].height), strict=False):
        strip.paste(frame, (0, y))
    table = strip.quantize(128)
    first, *others = (frame.quantize(palette=table, dither=Image.Dither.NONE) for frame in frames)
    times = [round(1000 * seconds)] * len(others) + [round(6000 * seconds)]
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=times, loop=0, optimize=True)
    return buffer.getvalue()
