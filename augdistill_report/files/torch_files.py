"""Opens files of `torch.save` that others made: only tensors are taken from them, and no code in them runs."""

import pickle
import warnings
import zipfile
from pathlib import Path

import torch


def read_torch(path: Path, what: str):
    """The content of a file of `torch.save`: tensors, in lists and dictionaries; they may stay on disk until used.

    A `ValueError` names a file that is missing (`what` it must be), damaged, or that holds more than tensors.
    """
    try:
        archive = zipfile.is_zipfile(path)  # the format since torch 1.6: tensors can stay on disk
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of the pickle's protocol: the error below says enough
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=archive or None)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; must be {what}") from None
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path}: holds more than tensors, or is cut off: not opened, since it may hold code"
        ) from None
    except Exception as error:  # torch's reader raises many types of errors on damaged files
        raise ValueError(f"{path}: is damaged, or was not written by torch.save ({type(error).__name__})") from None
