"""Makes the pieces of an augdistill bundle ready to run: no network, no pip, nothing but Python, numpy and Pillow.

    python3 join.py

The pieces may arrive one at a time: as long as some are missing, this says which (exit code 1). When all are here it
checks them, unpacks code/, site/ (the packages that a machine with torch lacks) and data/ (CIFAR-10) beside itself, and
prints the commands to run. Run again, it only prints them.
"""

import hashlib
import io
import json
import lzma
import os
import shutil
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent

SHEET = 25, 40  # rows and columns of the CIFAR images in one picture

READY = ".ready"  # the file that says which bundle is unpacked here


def sheets_of(images: bytes) -> list[bytes]:
    """The images of a CIFAR file, n x 3 x 32 x 32 bytes, as lossless WebP pictures of 1,000 images each."""
    import numpy as np
    from PIL import Image

    rows, columns = SHEET
    found = []
    for sheet in np.frombuffer(images, np.uint8).reshape(-1, rows, columns, 3, 32, 32):
        pixels = sheet.transpose(0, 3, 1, 4, 2).reshape(32 * rows, 32 * columns, 3)
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "WEBP", lossless=True, quality=50, method=4)
        found.append(buffer.getvalue())
    return found


def images_of(sheet: bytes) -> bytes:
    """The inverse of `sheets_of`, for one picture."""
    import numpy as np
    from PIL import Image

    rows, columns = SHEET
    pixels = np.asarray(Image.open(io.BytesIO(sheet)).convert("RGB")).reshape(rows, 32, columns, 32, 3)
    return pixels.transpose(0, 2, 4, 1, 3).tobytes()


def wrong_pieces(manifest: dict) -> list[str]:
    """The names of pieces that are missing or damaged, with what is wrong."""
    found = []
    for name, digest in manifest["pieces"].items():
        path = HERE / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            found.append(f"{name} is damaged, or not whole yet")
    return found


def unpack(manifest: dict, folder: Path) -> None:
    """Write code/, site/ and data/ in `folder`; a `ValueError` if a file of CIFAR-10 is not what it was."""
    with tempfile.TemporaryFile(dir=HERE) as whole:
        for name in manifest["pieces"]:
            with open(HERE / name, "rb") as piece:
                shutil.copyfileobj(piece, whole)
        whole.seek(0)
        with tarfile.open(fileobj=whole) as tar:
            tar.extractall(folder, filter="data")
    for wheel in sorted((folder / "wheels").glob("*.whl")):
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(folder / "site")
    for name, about in manifest["cifar"].items():
        packed = folder / "cifar" / name
        content = lzma.decompress((packed / "rest.xz").read_bytes())
        pictures = sorted(packed.glob("*.webp"))
        images = b"".join(images_of(picture.read_bytes()) for picture in pictures)
        content = content[: about["start"]] + images + content[about["start"] :]
        if hashlib.sha256(content).hexdigest() != about["sha256"]:
            raise ValueError(f"{name}: was not restored (this Pillow may read WebP differently)")
        target = folder / "data" / about["folder"] / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    shutil.rmtree(folder / "cifar")
    shutil.rmtree(folder / "wheels")


def main() -> int:
    text = (HERE / "manifest.json").read_text()
    manifest, ready = json.loads(text), HERE / READY
    if not ready.is_file() or ready.read_text() != text:
        if manifest["python"] != (here := f"{sys.version_info.major}.{sys.version_info.minor}"):
            print(f"this bundle is for Python {manifest['python']}, this is {here}: GPU_PYTHON={here} make gpu-bundle")
            return 2
        if wrong := wrong_pieces(manifest):
            count = len(manifest["pieces"])
            print(f"{count - len(wrong)} of {count} pieces are here; {'; '.join(wrong)}")
            return 1
        with tempfile.TemporaryDirectory(dir=HERE) as temporary:
            try:
                unpack(manifest, Path(temporary))
            except ValueError as error:
                print(error)
                return 1
            for part in ("code", "site", "data"):
                shutil.rmtree(HERE / part, ignore_errors=True)
                os.replace(Path(temporary) / part, HERE / part)
        ready.write_text(text)
    print(f"ready: commit {manifest['commit'][:12]}, CIFAR-10, and the packages that torch does not bring. To run:")
    start = f"AUGDISTILL_DATA={HERE / 'data'} PYTHONPATH={HERE / 'code'}:{HERE / 'site'} {sys.executable}"
    print(f"  {start} {HERE / 'code/benchmarks/gpu.py'} --minutes 7 --out {HERE / 'results'}")
    print(f"  {start} -m augdistill_report campaign cifar10-gpu --minutes 7 --out {HERE / 'results/campaign'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
