"""Reads files that torch.save wrote, by anybody: their pickle may hold tensors, numbers, texts and the
argparse.Namespace that training scripts save beside the weights, and names no other code."""

import argparse
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from mf_dist.runtime.errors import UserError


def load_torch_file(path: Path) -> Any:
    """The object in the file, its tensors on the CPU. Raises UserError if the file cannot be read, is damaged, or names
    code, which is not run."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the errors below are one line
            return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except pickle.UnpicklingError:  # whose text advises to run the code
        raise UserError(f"cannot read {path}: it is damaged, or its pickle names code, which is not run") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # of whatever kind damaged bytes cause
        reason = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
        raise UserError(f"cannot read {path}: it is damaged, or no file of torch.save ({reason})") from None
