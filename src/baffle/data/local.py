"""A device's own data: one set of images, fitted to what a network takes. No test part, no test split."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from baffle.data.dataset import Dataset
from baffle.data.files import children
from baffle.data.folders import channels_first, class_folders, read_images, read_npz
from baffle.data.sources import read_idx
from baffle.errors import DataError
from baffle.runtimes import Batch

_IMAGES, _LABELS = "-images-idx3-ubyte", "-labels-idx1-ubyte"


class RawDataset(Dataset):
    """A Dataset whose batches are as stored: whoever runs the network normalises uint8 as they pass."""

    def batch(self, indices: NDArray[np.int64] | slice) -> Batch:  # type: ignore[override]
        return Batch(self.inputs[indices], self.targets[indices])


def load_local(
    path: str | os.PathLike[str],
    input_shape: Sequence[int],
    classes: Sequence[str],
    scale: NDArray[np.float32],
    shift: NDArray[np.float32],
) -> RawDataset:
    """All that is at ``path`` as one set of ``input_shape`` (C, H, W), in the type that it is stored in.

    - ``.npz``, or a folder of them: images ``x`` and labels ``y``, as `domains_npz`; stretched to fit;
    - a folder with a pair of idx files, raw or .gz, in it or in its ``raw``: ``train-…`` if that is there,
      else the only pair; padded with black to fit, shrunk where it is larger;
    - a folder of folders of images, named like the network's ``classes``: scaled to cover, centre kept.

    uint8 is what the network sees as ``inputs * scale + shift``; floats are taken as they are.

    Raises DataError for what is missing, malformed, empty, or does not fit; MissingExtraError without Pillow
    for folders of images. Memory: the set, and once more while it is fitted.
    """
    root = Path(path)
    if len(input_shape) != 3:
        raise DataError(f"{root}: a network that takes {tuple(input_shape)} is not one for images (C, H, W)")
    channels, height, width = input_shape
    if not os.path.lexists(root):
        raise DataError(f"{root}: is not there; name an .npz, or a folder of idx files or of class folders")
    pads = False
    if npz := _npz_files(root):
        pixels, targets = _from_npz(root, npz)
    elif (pair := _idx_pair(root)) is not None:
        pixels, targets = _from_idx(*pair)
        pads = True
    else:
        pixels, targets = _from_folders(root, channels, height, width, classes)
    if pixels.shape[1] != channels:
        raise DataError(
            f"{root}: images of {pixels.shape[1]} channels, the network takes {channels}; convert them"
        )
    if targets.size and not 0 <= targets.min() <= targets.max() < len(classes):
        raise DataError(
            f"{root}: labels run from {targets.min()} to {targets.max()}, the network has {len(classes)} "
            "classes"
        )
    whole = RawDataset(pixels, targets, tuple(classes), root.name, scale, shift)
    fits: Dataset = whole
    if whole.shape[1:] != (height, width):
        if height != width:
            raise DataError(f"{root}: images of {whole.shape[1:]}, the network takes {(height, width)}")
        fits = whole.padded(height) if pads and max(whole.shape[1:]) <= height else whole.resized(height)
    assert isinstance(fits, RawDataset)
    return fits


def _npz_files(root: Path) -> list[Path]:
    if root.suffix == ".npz":
        return [root]
    return [path for path in children(root) if path.suffix == ".npz"] if os.path.isdir(root) else []


def _from_npz(root: Path, files: list[Path]) -> tuple[NDArray[np.generic], NDArray[np.int64]]:
    images, labels = [], []
    for file in files:
        arrays = read_npz(file, ("x", "y"))
        if "x" not in arrays or "y" not in arrays:
            raise DataError(f"{file}: has no arrays x and y; save it with numpy.savez(x=..., y=...)")
        x, y = channels_first(file, arrays["x"]), arrays["y"]
        if y.dtype.kind not in "iu" or y.shape != (len(x),):
            raise DataError(f"{file}: {len(x)} images need as many integers y, not {y.shape} {y.dtype}")
        images.append(x)
        labels.append(y.astype(np.int64))
    if len({(x.shape[1:], x.dtype) for x in images}) > 1:
        raise DataError(f"{root}: the files hold images of different shapes or types; make them one")
    return (images[0] if len(images) == 1 else np.concatenate(images)), np.concatenate(labels)


def _idx_pair(root: Path) -> tuple[Path, Path] | None:
    for place in (root, root / "raw"):
        found = children(place) if os.path.isdir(place) else []
        by_name = {path.name.removesuffix(".gz"): path for path in found}
        stems = [name.removesuffix(_IMAGES) for name in by_name if name.endswith(_IMAGES)]
        if not stems:
            continue
        if "train" not in stems and len(stems) > 1:
            raise DataError(f"{place}: holds {len(stems)} sets of idx files; keep one, or name one 'train'")
        stem = "train" if "train" in stems else stems[0]
        if stem + _LABELS not in by_name:
            raise DataError(
                f"{place}: {by_name[stem + _IMAGES].name} has no {stem}{_LABELS} (or .gz) beside it"
            )
        return by_name[stem + _IMAGES], by_name[stem + _LABELS]
    return None


def _from_idx(images: Path, labels: Path) -> tuple[NDArray[np.generic], NDArray[np.int64]]:
    x, y = read_idx(images, 3), read_idx(labels, 1)
    if len(x) != len(y):
        raise DataError(f"{images}: {len(x)} images but {len(y)} labels; the files belong to different sets")
    return x[:, None], y.astype(np.int64)


def _from_folders(
    root: Path, channels: int, height: int, width: int, classes: Sequence[str]
) -> tuple[NDArray[np.generic], NDArray[np.int64]]:
    if not os.path.isdir(root):
        raise DataError(f"{root}: is no .npz and no folder; name one")
    groups = class_folders(root)
    number = {name: place for place, name in enumerate(classes)}
    if strangers := sorted(groups.keys() - number.keys()):
        raise DataError(f"{root}: the network has no class {strangers[0]!r}; its classes: {_few(classes)}")
    if height != width or channels not in (1, 3):
        raise DataError(
            f"{root}: images for a network that takes {(channels, height, width)}: save them as .npz"
        )
    paths = [path for group in groups.values() for path in group]
    pixels = read_images(paths, height, "L" if channels == 1 else "RGB")
    labels = [number[name] for name, group in groups.items() for _ in group]
    return pixels, np.array(labels, np.int64)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (" …" if len(names) > 10 else "")
