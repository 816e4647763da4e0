"""The data sets that are known by name. A loader returns ``(train, test)``.

Nothing is downloaded: a loader reads files that are already there, and where they are not, its one
line says which it looked for and where they are to be had. Every loader raises DataError for files
that are missing, truncated, malformed or malicious, and ConfigError for a size that cannot be.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from baffle.data.dataset import Dataset, normalisation
from baffle.data.files import find, read_bytes
from baffle.data.folders import domain_folder, domains_npz, image_folder
from baffle.data.hub import hugging_face
from baffle.data.pickles import load_pickle
from baffle.errors import ConfigError, DataError

Folder: TypeAlias = str | os.PathLike[str]
Pair: TypeAlias = tuple[Dataset, Dataset]

_TEN_DIGITS = tuple("0123456789")
_CLOTHES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def load(name: str, folder: Folder | None = None, **options: object) -> Pair:
    """``(train, test)`` of the set called ``name``; ``options`` go to its loader.

    ``name``: digits (needs no folder), mnist, fashion-mnist, cifar10, cifar100, images, domains
    (class folders in domain folders, or .npz files), or hf:<id> for the Hugging Face hub.

    Raises ConfigError for an unknown name or option, DataError where the set is not there.
    """
    loader, arguments = _chosen(name, folder)
    signature = inspect.signature(loader)
    try:
        signature.bind(*arguments, **options)
    except TypeError as error:
        takes = ", ".join(list(signature.parameters)[len(arguments) :]) or "none"
        raise ConfigError(f"{name}: {error}; its options: {takes}") from error
    return loader(*arguments, **options)


def _chosen(name: str, folder: Folder | None) -> tuple[Callable[..., Pair], tuple[object, ...]]:
    if name == "digits":
        return digits, ()
    if name.startswith("hf:"):
        return hugging_face, (name.removeprefix("hf:"),)
    if name not in _LOADERS:
        known = ", ".join(["digits", *_LOADERS, "hf:<id>"])
        raise ConfigError(f"unknown data set {name!r}; choose one of {known}")
    if folder is None:
        raise DataError(f"{name}: is read from files: name the folder that holds them")
    return _LOADERS[name], (folder,)


def digits(size: int = 8) -> Pair:
    """1,797 handwritten digits, 8×8, grey levels 0 to 16, packaged with baffle: 1,437 and 360.

    Every fifth sample (0, 5, 10, ...) is a test sample. ``size`` other than 8 resizes the images.
    Normalised by the training set's mean and standard deviation.

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine
    Learning Repository, 1998 (CC BY 4.0): its test part, as scikit-learn's ``load_digits`` has it.
    """
    from importlib import resources

    with resources.files("baffle.data").joinpath("digits.npz").open("rb") as file:
        stored = np.load(file, allow_pickle=False)
        images, targets = stored["images"][:, None], stored["targets"].astype(np.int64)
    scale_shift = normalisation([0.30521], [0.37632], peak=16.0)
    whole = Dataset(images, targets, _TEN_DIGITS, "digits", *scale_shift)
    if size != 8:
        whole = whole.resized(size)
    is_test = np.arange(len(whole)) % 5 == 0
    return whole.subset(np.flatnonzero(~is_test)), whole.subset(np.flatnonzero(is_test))


def mnist(folder: Folder, size: int = 32, stretch: bool = False) -> Pair:
    """MNIST, 60,000 and 10,000 digits of 28×28, brought to ``size``: padded with black, or stretched.

    Reads the four idx files, raw or .gz, in ``folder``/MNIST/raw, ``folder``/raw or ``folder``.

    Source: LeCun, Bottou, Bengio and Haffner, Proc. IEEE 86(11), 1998.
    """
    return _idx_set("MNIST", folder, size, stretch, _TEN_DIGITS, mean=0.1307, std=0.3081)


def fashion_mnist(folder: Folder, size: int = 32, stretch: bool = False) -> Pair:
    """Fashion-MNIST, 60,000 and 10,000 images of 28×28, brought to ``size`` as `mnist` brings them.

    Reads the four idx files, raw or .gz, in ``folder``/FashionMNIST/raw, ``folder``/raw or
    ``folder``.

    Source: Xiao, Rasul and Vollgraf, arXiv:1708.07747.
    """
    return _idx_set("FashionMNIST", folder, size, stretch, _CLOTHES, mean=0.2860, std=0.3530)


def _idx_set(
    name: str, folder: Folder, size: int, stretch: bool, classes: tuple[str, ...], mean: float, std: float
) -> Pair:
    places = (f"{name}/raw", "raw", "")
    scale_shift = normalisation([mean], [std])
    halves = []
    for half, prefix in (("train", "train"), ("test", "t10k")):
        arrays = []
        for part, dimensions in (("images", 3), ("labels", 1)):
            file = f"{prefix}-{part}-idx{dimensions}-ubyte"
            try:
                path = find(folder, places, (file, f"{file}.gz"))
            except FileNotFoundError:
                raise DataError(
                    f"{name}: {file} (or .gz) is not in {folder}, nor in its {places[0]} or raw; "
                    f"put the four idx files there (torchvision.datasets.{name} downloads them)"
                ) from None
            arrays.append(read_idx(path, dimensions))
        images, labels = arrays
        if len(images) != len(labels):
            raise DataError(
                f"{path.parent}: {len(images)} {half} images but {len(labels)} labels; the files "
                f"belong to different sets, fetch them again"
            )
        targets = labels.astype(np.int64)
        dataset = Dataset(images[:, None], targets, classes, f"{name} {half}", *scale_shift)
        halves.append(dataset.resized(size) if stretch else dataset.padded(size))
    return halves[0], halves[1]


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The array in an idx file: bytes 0, 0, 8 (uint8), d, then d sizes as 32-bit big-endian."""
    content = read_bytes(path)
    magic, header = bytes([0, 0, 8, dimensions]), 4 + 4 * dimensions
    if content[:4] != magic:
        raise DataError(
            f"{path}: starts with {content[:4].hex() or 'nothing'}, an idx file of {dimensions}-d "
            f"uint8 with {magic.hex()}; fetch the file again"
        )
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4))
    claimed = header + math.prod(shape)
    if len(content) != claimed:
        raise DataError(
            f"{path}: its header claims {claimed} bytes in all, it holds {len(content)}; fetch the file again"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


class _Cifar(NamedTuple):
    """Where one of the two CIFAR sets keeps what, in its binary and in its Python version."""

    name: str
    classes: int
    label_bytes: int  # before the pixels of a binary row; the last of them is the class
    binary: str
    binary_parts: tuple[tuple[str, ...], tuple[str, ...]]
    binary_names: str
    pickled: str
    pickled_parts: tuple[tuple[str, ...], tuple[str, ...]]
    pickled_names: str
    label_key: str
    names_key: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_CIFAR10 = _Cifar(
    name="CIFAR-10",
    classes=10,
    label_bytes=1,
    binary="cifar-10-batches-bin",
    binary_parts=(tuple(f"{batch}.bin" for batch in _BATCHES), ("test_batch.bin",)),
    binary_names="batches.meta.txt",
    pickled="cifar-10-batches-py",
    pickled_parts=(_BATCHES, ("test_batch",)),
    pickled_names="batches.meta",
    label_key="labels",
    names_key="label_names",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)
_CIFAR100 = _Cifar(
    name="CIFAR-100",
    classes=100,
    label_bytes=2,
    binary="cifar-100-binary",
    binary_parts=(("train.bin",), ("test.bin",)),
    binary_names="fine_label_names.txt",
    pickled="cifar-100-python",
    pickled_parts=(("train",), ("test",)),
    pickled_names="meta",
    label_key="fine_labels",
    names_key="fine_label_names",
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)


def cifar10(folder: Folder) -> Pair:
    """CIFAR-10, 50,000 and 10,000 images (3, 32, 32) of 10 classes.

    Reads the binary version (cifar-10-batches-bin) or the Python version (cifar-10-batches-py, with
    a reader that executes nothing), in ``folder`` or under it.

    Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """
    return _cifar(_CIFAR10, Path(folder))


def cifar100(folder: Folder) -> Pair:
    """CIFAR-100 with its 100 fine labels, 50,000 and 10,000 images (3, 32, 32).

    Reads cifar-100-binary or cifar-100-python, as `cifar10` does.

    Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """
    return _cifar(_CIFAR100, Path(folder))


def _cifar(kind: _Cifar, folder: Path) -> Pair:
    versions = (
        (kind.binary, kind.binary_parts, _binary_part, _binary_names),
        (kind.pickled, kind.pickled_parts, _pickled_part, _pickled_names),
    )
    for place, parts, read_part, read_names in versions:
        try:
            home = find(folder, (place, ""), parts[0][:1]).parent
        except FileNotFoundError:
            continue
        names = read_names(home, kind)
        if len(names) != kind.classes:
            raise DataError(f"{home}: names {len(names)} classes, {kind.name} has {kind.classes}")
        halves = []
        for half, files in zip(("train", "test"), parts, strict=True):
            read = [read_part(home / file, kind) for file in files]
            pixels = np.concatenate([pixels for pixels, _ in read]).reshape(-1, 3, 32, 32)
            targets = np.concatenate([labels for _, labels in read])
            scale_shift = normalisation(kind.mean, kind.std)
            halves.append(Dataset(pixels, targets, names, f"{kind.name} {half}", *scale_shift))
        return halves[0], halves[1]
    raise DataError(
        f"{kind.name}: neither {kind.binary}/{kind.binary_parts[0][0]} nor "
        f"{kind.pickled}/{kind.pickled_parts[0][0]} is in {folder}; unpack the binary or the Python "
        f"version of www.cs.toronto.edu/~kriz/cifar.html there"
    )


def _binary_part(path: Path, kind: _Cifar) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    content = read_bytes(path)
    row = kind.label_bytes + 3072
    if not content or len(content) % row:
        raise DataError(f"{path}: {len(content)} bytes are no whole number of rows of {row}; fetch it again")
    rows = np.frombuffer(content, np.uint8).reshape(-1, row)
    return rows[:, kind.label_bytes :], rows[:, kind.label_bytes - 1].astype(np.int64)


def _binary_names(home: Path, kind: _Cifar) -> tuple[str, ...]:
    return tuple(read_bytes(home / kind.binary_names).decode("utf-8", "replace").split())


def _pickled_part(path: Path, kind: _Cifar) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    table = load_pickle(path)
    pixels, labels = table.get("data"), table.get(kind.label_key)
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (3072,):
        raise DataError(f"{path}: 'data' is no (N, 3072) array of uint8; fetch the set again")
    if not isinstance(labels, list) or not all(
        type(label) is int and 0 <= label < kind.classes for label in labels
    ):
        raise DataError(f"{path}: {kind.label_key!r} is no list of classes; fetch the set again")
    if len(labels) != len(pixels):
        raise DataError(f"{path}: {len(pixels)} images but {len(labels)} labels; fetch it again")
    return pixels, np.array(labels, dtype=np.int64)


def _pickled_names(home: Path, kind: _Cifar) -> tuple[str, ...]:
    path = home / kind.pickled_names
    names = load_pickle(path).get(kind.names_key)
    if not isinstance(names, list) or not all(isinstance(name, bytes | str) for name in names):
        raise DataError(f"{path}: {kind.names_key!r} is no list of names; fetch the set again")
    return tuple(n.decode("utf-8", "replace") if isinstance(n, bytes) else n for n in names)


def domains(folder: Folder, size: int | None = None, test_fraction: float = 0.2, seed: int = 0) -> Pair:
    """`domains_npz` where ``folder`` is or holds .npz files, `domain_folder` (needs a size) else."""
    path = Path(folder)
    if path.suffix == ".npz" or (os.path.isdir(path) and any(path.glob("*.npz"))):
        whole = domains_npz(path, test_fraction=test_fraction, seed=seed)
        return whole if size is None else (whole[0].resized(size), whole[1].resized(size))
    if size is None:
        raise ConfigError("domains: images need a size, such as size=32")
    return domain_folder(path, size, test_fraction=test_fraction, seed=seed)


_LOADERS: dict[str, Callable[..., Pair]] = {
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "images": image_folder,
    "domains": domains,
}
