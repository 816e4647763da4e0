"""Image sets as people keep them: a folder a class, folders of those a domain, or .npz arrays.

None of these has an official test part, so each is split here: within every class of every domain, a
seeded ``test_fraction`` of the samples is held out.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from baffle.data.dataset import Dataset, normalisation
from baffle.data.files import children, why
from baffle.errors import BaffleError, ConfigError, DataError, MissingExtraError

if TYPE_CHECKING:
    import zipfile

    from PIL.Image import Image

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
_FORMATS = ("JPEG", "PNG", "WEBP")  # whatever the suffix says, Pillow tries no other decoder
_MOST_PIXELS = 2**26  # an image of a few kilobytes can claim to unpack to gigabytes
_ARRAY_LIMIT = 2**32  # bytes of one array in an .npz
_MOST_CLASSES = 2**16  # of an .npz, which names none: a single label must not ask for 2^63 names


def image_folder(
    folder: str | os.PathLike[str], size: int, test_fraction: float = 0.2, seed: int = 0
) -> tuple[Dataset, Dataset]:
    """``folder/<class>/<image>``, jpg, png or webp: train and test sets of (3, size, size) images.

    An image is scaled to cover the square, and its centre kept. Normalised to [-1, 1].

    Raises DataError for an empty folder or an image that cannot be read, ConfigError for a size or
    fraction that cannot be, MissingExtraError without Pillow.
    """
    root = Path(folder)
    groups = class_folders(root)
    paths = [path for group in groups.values() for path in group]
    targets = np.repeat(np.arange(len(groups)), [len(group) for group in groups.values()])
    pixels = read_images(paths, size)
    whole = _centred(pixels, targets, tuple(groups), root.name)
    return split(whole, test_fraction, seed)


def domain_folder(
    folder: str | os.PathLike[str], size: int, test_fraction: float = 0.2, seed: int = 0
) -> tuple[Dataset, Dataset]:
    """``folder/<domain>/<class>/<image>``, the layout of PACS and Office-Home, as `image_folder`.

    The classes are those of all domains together.
    """
    root = Path(folder)
    by_domain = {path.name: class_folders(path) for path in children(root) if os.path.isdir(path)}
    if not by_domain:
        raise DataError(f"{root}: holds no folders; expected <domain>/<class>/<image> under it")
    classes = sorted({name for groups in by_domain.values() for name in groups})
    paths, targets, domains = [], [], []
    for domain, groups in enumerate(by_domain.values()):
        for name, group in groups.items():
            paths += group
            targets += [classes.index(name)] * len(group)
            domains += [domain] * len(group)
    pixels = read_images(paths, size)
    whole = _centred(
        pixels, np.array(targets), tuple(classes), root.name, np.array(domains), tuple(by_domain)
    )
    return split(whole, test_fraction, seed)


def domains_npz(
    path: str | os.PathLike[str], test_fraction: float = 0.2, seed: int = 0
) -> tuple[Dataset, Dataset]:
    """A folder of ``<domain>.npz``, or one .npz, with images ``x`` and labels ``y``.

    ``x`` (N, C, H, W), (N, H, W, C) with C = 1 or 3, or (N, H, W), uint8 or a float type; ``y`` (N,)
    integers; one file may add ``domain`` (N,), integers or text, and is one domain without it.
    uint8 is normalised to [-1, 1], floats are taken as they are. Never unpickles.

    Raises DataError for files or arrays of another shape, type or length, ConfigError for a fraction
    that cannot be.
    """
    root = Path(path)
    files = [root] if root.suffix == ".npz" else [p for p in children(root) if p.suffix == ".npz"]
    if not files:
        raise DataError(f"{root}: holds no .npz files; expected one a domain, with arrays x and y")
    images, labels, domains, names = [], [], [], []
    for file in files:
        arrays = read_npz(file, ("x", "y", "domain"))
        if "x" not in arrays or "y" not in arrays:
            raise DataError(f"{file}: has no arrays x and y; save it with numpy.savez(x=..., y=...)")
        x, y = channels_first(file, arrays["x"]), arrays["y"]
        if y.dtype.kind not in "iu" or y.shape != (len(x),):
            raise DataError(f"{file}: {len(x)} images need as many integers y, not {y.shape}")
        if len(files) == 1 and "domain" in arrays:
            if arrays["domain"].shape != (len(x),):
                raise DataError(f"{file}: domain must have {len(x)} entries")
            values, domain = np.unique(arrays["domain"], return_inverse=True)
            names = [str(value) for value in values]
        else:
            domain = np.full(len(x), len(names))
            names.append(file.stem)
        images.append(x)
        labels.append(y.astype(np.int64))
        domains.append(domain)
    if len({(x.shape[1:], x.dtype) for x in images}) > 1:
        raise DataError(f"{root}: the files hold images of different shapes or types; make them one")
    targets = np.concatenate(labels)
    if targets.max(initial=0) >= _MOST_CLASSES:
        raise DataError(f"{root}: y runs to {targets.max()}; number the classes 0, 1, 2, ...")
    classes = tuple(str(i) for i in range(targets.max(initial=0) + 1))
    whole = _centred(
        np.concatenate(images), targets, classes, root.stem, np.concatenate(domains), tuple(names)
    )
    return split(whole, test_fraction, seed)


def split(whole: Dataset, test_fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Train and test parts of a set: ``test_fraction`` of each class of each domain, rounded.

    A group of two samples or more gives at least one to each part. Raises ConfigError for a fraction
    outside (0, 1) or a negative seed, DataError where a part would be empty.
    """
    if not 0 < test_fraction < 1:
        raise ConfigError(f"test_fraction must lie between 0 and 1, not {test_fraction}")
    if seed < 0:
        raise ConfigError(f"seed must be an integer >= 0, not {seed}")
    domains = np.zeros_like(whole.targets) if whole.domains is None else whole.domains
    groups = domains * len(whole.classes) + whole.targets
    generator = np.random.Generator(np.random.PCG64(seed))
    held_out = np.zeros(len(whole), bool)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        count = min(max(round(test_fraction * len(members)), 1), len(members) - 1)
        held_out[generator.permutation(members)[:count]] = True
    if not held_out.any():
        raise DataError(f"{whole.name}: too few samples for a test part; every class has only one")
    return whole.subset(np.flatnonzero(~held_out)), whole.subset(np.flatnonzero(held_out))


def fitted(image: Image, size: int, mode: str = "RGB") -> NDArray[np.uint8]:
    """An image's pixels (C, size, size): scaled to cover the square, its centre kept."""
    from PIL import Image as PillowImage
    from PIL import ImageOps

    square = ImageOps.fit(image.convert(mode), (size, size), PillowImage.Resampling.BILINEAR)
    pixels = np.asarray(square)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def class_folders(root: Path) -> dict[str, list[Path]]:
    """Class name → its images, both sorted by name."""
    groups = {}
    for folder in children(root):
        if os.path.isdir(folder):
            images = [path for path in children(folder) if path.suffix.lower() in _SUFFIXES]
            if not images:
                raise DataError(f"{folder}: holds no jpg, png or webp; one folder a class is expected")
            groups[folder.name] = images
    if not groups:
        raise DataError(f"{root}: holds no folders; one folder of images a class is expected")
    return groups


def read_images(paths: Sequence[Path], size: int, mode: str = "RGB") -> NDArray[np.uint8]:
    """Images (N, C, size, size), `fitted`; ``mode`` "RGB" or "L". Raises what `image_folder` raises."""
    if size < 1:
        raise ConfigError(f"size must be at least 1, not {size}")
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "images", "reading image folders") from error
    pixels = np.empty((len(paths), 1 if mode == "L" else 3, size, size), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for i, path in enumerate(paths):
            try:
                with Image.open(path, formats=_FORMATS) as image:
                    if math.prod(image.size) > _MOST_PIXELS:
                        raise DataError(f"{path}: claims {image.size} pixels; remove it")
                    pixels[i] = fitted(image, size, mode)
            except BaffleError:
                raise
            except Exception as error:  # Pillow's decoders raise whatever they stumble over
                raise DataError(f"{path}: no readable image: {why(error)}; remove it") from error
    return pixels


def _centred(
    pixels: NDArray[np.generic],
    targets: NDArray[np.int64],
    classes: tuple[str, ...],
    name: str,
    domains: NDArray[np.int64] | None = None,
    domain_names: Iterable[str] = (),
) -> Dataset:
    channels = pixels.shape[1]
    mean, peak = (0.5, 255.0) if pixels.dtype == np.uint8 else (0.0, 1.0)
    scale, shift = normalisation([mean] * channels, [mean or 1.0] * channels, peak)
    return Dataset(pixels, targets, classes, name, scale, shift, domains, tuple(domain_names))


def channels_first(path: Path, x: NDArray[np.generic]) -> NDArray[np.generic]:
    """Images of an .npz as (N, C, H, W), floats as float32. Raises DataError for other shapes."""
    if x.dtype.kind == "f":
        with np.errstate(over="ignore"):  # the data set refuses the infinities
            x = x.astype(np.float32)
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4 and x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        return x.transpose(0, 3, 1, 2)
    if x.ndim != 4:
        raise DataError(f"{path}: x must be (N, C, H, W), (N, H, W, C) or (N, H, W), not {x.shape}")
    return x


def read_npz(path: Path, wanted: Sequence[str]) -> dict[str, NDArray[np.generic]]:
    """The wanted arrays that an .npz holds, none of them larger than its file says and than 4 GiB."""
    import zipfile  # with what it imports 1 MB of a device whose data are other files

    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in wanted:
                if f"{name}.npy" in archive.namelist():
                    arrays[name] = _read_member(archive, f"{name}.npy")
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except Exception as error:  # zipfile and NumPy's header parser raise whatever they stumble over
        raise DataError(f"{path}: no readable .npz: {why(error)}; save it again") from error
    return arrays


def _read_member(archive: zipfile.ZipFile, name: str) -> NDArray[np.generic]:
    size = archive.getinfo(name).file_size
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, kind = read_header(file)
        if kind.hasobject or kind.kind not in "biufU":
            raise DataError(f"{name} holds {kind}, not numbers; save it as a plain array")
        # held against the file before anything is allocated: a header may claim any shape
        needed = math.prod(shape) * kind.itemsize
        if needed != size - file.tell() or size > _ARRAY_LIMIT:
            raise DataError(f"{name} has a header that claims {needed} bytes; save it again")
        flat = np.frombuffer(file.read(), kind)
        return flat.reshape(shape, order="F" if fortran else "C")
