"""Data sets against known facts of the real files, and every loader against damaged ones."""

import gzip
import importlib.util
import pickle
import shutil
import struct
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from baffle.data import (
    Dataset,
    cifar10,
    cifar100,
    digits,
    domain_folder,
    domains_npz,
    fashion_mnist,
    hugging_face,
    image_folder,
    load,
    mnist,
    normalisation,
)
from baffle.errors import ConfigError, DataError, MissingExtraError

CLASSES_OF_CIFAR10 = [
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
]


def small(n=6, channels=1, size=4, dtype=np.uint8, **changes):
    pixels = np.random.default_rng(0).integers(0, 256, (n, channels, size, size)).astype(dtype)
    scale, shift = normalisation([0.5] * channels, [0.25] * channels)
    fields = {
        "inputs": pixels,
        "targets": np.arange(n) % 2,
        "classes": ("no", "yes"),
        "name": "small",
        "scale": scale,
        "shift": shift,
    }
    return Dataset(**(fields | changes))


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


# The data set itself


def test_batch_is_normalised_as_x_over_255_less_mean_over_std():
    dataset = small(channels=3)
    batch = dataset.batch([5, 0, 5])
    expected = (dataset.inputs[[5, 0, 5]] / 255 - 0.5) / 0.25
    assert batch.inputs.dtype == np.float32
    assert batch.targets.dtype == np.int64
    # two float32 roundings of values up to 4
    np.testing.assert_allclose(batch.inputs, expected, rtol=0, atol=4 * 2**-22)
    assert batch.targets.tolist() == [1, 0, 1]
    np.testing.assert_array_equal(dataset.batch(slice(2)).inputs, dataset.batch([0, 1]).inputs)


def test_subset_keeps_samples_labels_and_domains_together():
    dataset = small(domains=np.array([0, 0, 0, 1, 1, 1]), domain_names=("a", "b"))
    part = dataset.subset([4, 1])
    np.testing.assert_array_equal(part.inputs, dataset.inputs[[4, 1]])
    assert (part.targets.tolist(), part.domains.tolist()) == ([0, 1], [1, 0])
    assert len(part) == 2
    assert part.shape == (1, 4, 4)


def test_padded_centres_on_black():
    dataset = small()
    padded = dataset.padded(7)
    assert padded.shape == (1, 7, 7)
    np.testing.assert_array_equal(padded.inputs[:, :, 1:5, 1:5], dataset.inputs)
    assert padded.inputs.sum(dtype=int) == dataset.inputs.sum(dtype=int)
    with pytest.raises(ConfigError, match="cannot be padded"):
        dataset.padded(3)


@pytest.mark.parametrize("size", [1, 3, 5, 8, 9, 32])
def test_resized_agrees_with_pillow(size):
    dataset = small(size=8)
    mine = dataset.resized(size).inputs[:, 0].astype(int)
    bilinear = Image.Resampling.BILINEAR
    theirs = [Image.fromarray(x[0]).resize((size, size), bilinear) for x in dataset.inputs]
    assert np.abs(mine - np.stack(theirs)).max() <= 1  # Pillow rounds after each of two passes
    with pytest.raises(ConfigError, match="at least 1"):
        dataset.resized(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": np.arange(5) % 2}, "6 images need as many"),
        ({"targets": np.arange(6) % 3}, "run from 0 to 2"),
        ({"targets": np.arange(6) % 2 - 1}, "run from -1"),
        ({"targets": np.zeros(6, np.int32)}, "int32"),
        ({"inputs": np.zeros((6, 4, 4), np.uint8)}, "must be"),
        ({"inputs": np.zeros((6, 1, 4, 4))}, "float64"),
        ({"inputs": np.zeros((0, 1, 4, 4), np.uint8)}, "no samples"),
        ({"inputs": np.full((6, 1, 4, 4), np.nan, np.float32)}, "NaN"),
        ({"scale": np.ones(2, np.float32)}, "scale must be"),
        ({"shift": np.array([np.inf], np.float32)}, "shift is not finite"),
        ({"domains": np.zeros(6, np.int64)}, "domains run from"),
    ],
)
def test_inconsistent_data_sets_are_refused(changes, message):
    with pytest.raises(DataError, match=message) as error:
        small(**changes)
    one_line(error)


# Digits


def test_digits_are_those_of_scikit_learn():
    train, test = digits()
    assert (len(train), len(test)) == (1437, 360)
    theirs = load_digits()
    is_test = np.arange(1797) % 5 == 0
    for part, chosen in ((train, ~is_test), (test, is_test)):
        np.testing.assert_array_equal(part.inputs[:, 0], theirs.images[chosen])
        np.testing.assert_array_equal(part.targets, theirs.target[chosen])


def test_digits_are_normalised_by_their_own_statistics():
    batch = digits()[0].batch(slice(None)).inputs
    assert abs(batch.mean()) < 1e-4
    assert abs(batch.std() - 1) < 1e-4
    assert digits(size=32)[1].shape == (1, 32, 32)


# MNIST


def test_mnist_has_its_known_counts_and_statistics(shared_data):
    train, test = mnist(shared_data, size=28)
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(train.targets).tolist() == counts
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(test.targets).tolist() == counts
    batch = train.batch(slice(None)).inputs
    assert abs(batch.mean()) < 5e-4  # the published mean and std have four digits
    assert abs(batch.std() - 1) < 5e-4
    padded = load("mnist", shared_data / "MNIST")[1]
    assert padded.shape == (1, 32, 32)
    np.testing.assert_array_equal(padded.inputs[:, :, 2:30, 2:30], test.inputs)
    stretched = load("mnist", shared_data / "MNIST", stretch=True)[1]
    assert stretched.shape == (1, 32, 32)
    chosen = slice(0, 64)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(test.inputs[chosen].astype(np.float32)), size=(32, 32), mode="bilinear"
    )
    np.testing.assert_allclose(
        stretched.inputs[chosen], expected.numpy(), atol=0.501
    )  # rounded to grey levels
    assert stretched.inputs.mean() == pytest.approx(test.inputs.mean(), rel=0.01)
    assert padded.inputs.mean() == pytest.approx(test.inputs.mean() * (28 / 32) ** 2, rel=1e-6)


def idx(array):
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def write_idx(folder, packed=False):
    generator = np.random.default_rng(1)
    for prefix, n in (("train", 20), ("t10k", 10)):
        images, labels = generator.integers(0, 256, (n, 28, 28)), np.arange(n) % 10
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            path = folder / f"{prefix}-{name}-ubyte"
            if packed:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(idx(array)))
            else:
                path.write_bytes(idx(array))
    return folder


@pytest.mark.parametrize("place", ["", "raw", "FashionMNIST/raw"])
@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_are_found_raw_and_packed(tmp_path, place, packed):
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    write_idx(tmp_path / place, packed)
    train, test = fashion_mnist(tmp_path)
    assert (len(train), len(test), train.shape) == (20, 10, (1, 32, 32))
    assert train.classes[9] == "Ankle boot"


def test_the_named_folder_goes_before_the_general_one(tmp_path):
    """A folder with both sets must not give MNIST for Fashion-MNIST."""
    for name in ("MNIST", "FashionMNIST"):
        (tmp_path / name / "raw").mkdir(parents=True)
        write_idx(tmp_path / name / "raw")
    other = np.zeros((10, 28, 28))
    (tmp_path / "FashionMNIST/raw/t10k-images-idx3-ubyte").write_bytes(idx(other))
    assert not fashion_mnist(tmp_path)[1].inputs.any()
    assert mnist(tmp_path)[1].inputs.any()


@pytest.mark.parametrize("keep", [0, 3, 4, 7, 12, 16, 17, 1000])
@pytest.mark.parametrize("packed", [False, True])
def test_truncated_idx_files_are_refused(tmp_path, keep, packed):
    write_idx(tmp_path, packed)
    path = tmp_path / f"train-images-idx3-ubyte{'.gz' if packed else ''}"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="train-images") as error:
        mnist(tmp_path)
    one_line(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx(np.zeros((20, 28, 28)))[1:], "starts with"),
        (bytes([0, 0, 9, 3]) + idx(np.zeros((20, 28, 28)))[4:], "starts with 00000903"),
        (idx(np.zeros(20)), "starts with 00000801"),
        (idx(np.zeros((20, 28, 28))) + b"\0", "its header claims"),
        (idx(np.zeros((19, 28, 28))), "19 train images but 20 labels"),
        (bytes([0, 0, 8, 3]) + b"\xff" * 12, "its header claims"),
        (bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**31, 2**31, 4), "its header claims"),
    ],
)
def test_malformed_idx_files_are_refused(tmp_path, content, message):
    write_idx(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        mnist(tmp_path)
    one_line(error)


def test_empty_idx_sets_and_wrong_labels_are_refused(tmp_path):
    write_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.arange(10) + 1))
    with pytest.raises(DataError, match="run from 1 to 10"):
        mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(0)))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((0, 28, 28))))
    with pytest.raises(DataError, match="no samples"):
        mnist(tmp_path)


@pytest.mark.parametrize("position", [0, 2, 40, -6, -2])
def test_a_damaged_gzip_is_refused(tmp_path, position):
    write_idx(tmp_path, packed=True)
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match="train-labels") as error:
        mnist(tmp_path)
    one_line(error)


# CIFAR


@pytest.fixture(scope="module")
def real_cifar(shared_data, tmp_path_factory):
    """Both sets as the data folder's unpack.py writes them, but CIFAR-100's test set twice."""
    spec = importlib.util.spec_from_file_location("unpack", shared_data / "unpack.py")
    unpack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unpack)
    folder = tmp_path_factory.mktemp("cifar")
    ten, hundred = folder / "cifar-10-batches-bin", folder / "cifar-100-binary"
    with zipfile.ZipFile(shared_data / "cifar" / "cifar10_div3.zip") as archive:
        ten.mkdir()
        (ten / "batches.meta.txt").write_bytes(archive.read("classes.txt"))
        images, labels = unpack.cifar(archive, "train", 3)
        for i in range(5):
            part = slice(10_000 * i, 10_000 * (i + 1))
            rows = unpack.rows(images[part], labels["labels"][part])
            rows.tofile(ten / f"data_batch_{i + 1}.bin")
        images, labels = unpack.cifar(archive, "test", 3)
        unpack.rows(images, labels["labels"]).tofile(ten / "test_batch.bin")
    with zipfile.ZipFile(shared_data / "cifar" / "cifar100_div6.zip") as archive:
        hundred.mkdir()
        (hundred / "fine_label_names.txt").write_bytes(archive.read("fine_classes.txt"))
        images, labels = unpack.cifar(archive, "test", 6)
        rows = unpack.rows(images, labels["coarse_labels"], labels["fine_labels"])
        for name in ("train", "test"):
            rows.tofile(hundred / f"{name}.bin")
    yield folder
    shutil.rmtree(folder)


def test_real_cifar10_has_its_known_counts_and_statistics(real_cifar):
    train, test = cifar10(real_cifar)
    assert list(train.classes) == CLASSES_OF_CIFAR10
    assert np.bincount(train.targets).tolist() == [5000] * 10
    assert np.bincount(test.targets).tolist() == [1000] * 10
    # the labels of the published first batch
    first = [1005, 974, 1032, 1016, 999, 937, 1030, 1001, 1025, 981]
    assert np.bincount(train.targets[:10_000]).tolist() == first
    batch = train.batch(slice(0, 50_000, 5)).inputs
    assert np.abs(batch.mean(axis=(0, 2, 3))).max() < 0.02
    assert np.abs(batch.std(axis=(0, 2, 3)) - 1).max() < 0.02


def test_real_cifar100_has_its_known_counts(real_cifar):
    _, test = cifar100(real_cifar / "cifar-100-binary")
    assert np.bincount(test.targets).tolist() == [100] * 100
    assert (test.classes[0], test.classes[99]) == ("apple", "worm")


def python2_pickle(pixels, labels, key=b"labels"):
    """The bytes that Python 2's cPickle wrote for {key: list, 'data': array}, as CIFAR's files are."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    numbers = b"".join(b"K" + bytes([label]) for label in labels)
    content = pixels.astype(np.uint8).tobytes()
    return b"".join(
        [
            b"\x80\x02}q\x01(",
            text(key) + b"q\x02](" + numbers + b"e",
            text(b"data") + b"cnumpy.core.multiarray\n_reconstruct\nq\x03",
            b"cnumpy\nndarray\nq\x04K\x00\x85" + text(b"b") + b"\x87Rq\x05(K\x01",
            b"M" + struct.pack("<H", len(pixels)) + b"M\x00\x0c\x86",
            b"cnumpy\ndtype\nq\x06" + text(b"u1") + b"K\x00K\x01\x87Rq\x07",
            b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89",
            b"T" + struct.pack("<i", len(content)) + content + b"tb",
            b"u.",
        ]
    )


# Protocol 0, as the batches.meta of CIFAR-10 is written
NAMES_OF_CIFAR10 = (
    b"(dp1\nS'num_cases_per_batch'\np2\nI10000\nsS'label_names'\np3\n(lp4\n"
    + b"".join(f"S'{name}'\np{i}\na".encode() for i, name in enumerate(CLASSES_OF_CIFAR10, start=5))
    + b"sS'num_vis'\np15\nI3072\ns."
)


def write_cifar10(folder, version):
    """Six small batches in one of three versions; returns the pixels and labels of the tests."""
    generator = np.random.default_rng(2)
    home = folder / ("cifar-10-batches-bin" if version == "binary" else "cifar-10-batches-py")
    home.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        pixels = generator.integers(0, 256, (20, 3072)).astype(np.uint8)
        labels = generator.integers(0, 10, 20)
        if version == "binary":
            rows = np.concatenate([labels[:, None].astype(np.uint8), pixels], axis=1)
            (home / f"{name}.bin").write_bytes(rows.tobytes())
        elif version == "python2":
            (home / name).write_bytes(python2_pickle(pixels, labels.tolist()))
        else:
            table = {"data": pixels, "labels": labels.tolist(), "batch_label": name}
            (home / name).write_bytes(pickle.dumps(table, protocol=int(version[-1])))
    if version == "binary":
        (home / "batches.meta.txt").write_text("\n".join(CLASSES_OF_CIFAR10) + "\n\n")
    elif version == "python2":
        (home / "batches.meta").write_bytes(NAMES_OF_CIFAR10)
    else:
        (home / "batches.meta").write_bytes(pickle.dumps({"label_names": CLASSES_OF_CIFAR10}))
    return home, pixels, labels


@pytest.mark.parametrize("version", ["binary", "python2", "protocol2", "protocol3", "protocol4"])
def test_cifar10_reads_every_version(tmp_path, version):
    home, pixels, labels = write_cifar10(tmp_path, version)
    for folder in (tmp_path, home):
        train, test = cifar10(folder)
        assert (len(train), len(test)) == (100, 20)
        assert list(train.classes) == CLASSES_OF_CIFAR10
        np.testing.assert_array_equal(test.inputs.reshape(20, 3072), pixels)
        np.testing.assert_array_equal(test.targets, labels)


def test_the_python2_bytes_are_those_that_pickle_itself_reads():
    """Holds the hand-made file format of these tests against CPython's own reader."""
    pixels = np.arange(2 * 3072).reshape(2, 3072).astype(np.uint8)
    table = pickle.loads(python2_pickle(pixels, [3, 4]), encoding="bytes")
    np.testing.assert_array_equal(table[b"data"], pixels)
    assert table[b"labels"] == [3, 4]
    assert pickle.loads(NAMES_OF_CIFAR10)["label_names"] == CLASSES_OF_CIFAR10


def test_cifar100_reads_the_fine_labels_of_both_versions(tmp_path):
    pixels = np.random.default_rng(3).integers(0, 256, (30, 3072)).astype(np.uint8)
    coarse, fine = np.arange(30) % 20, np.arange(30) * 3
    names = [f"class_{i}" for i in range(100)]
    binary, pickled = tmp_path / "a/cifar-100-binary", tmp_path / "b/cifar-100-python"
    for home in (binary, pickled):
        home.mkdir(parents=True)
    rows = np.concatenate([coarse[:, None], fine[:, None], pixels], axis=1).astype(np.uint8)
    for name in ("train", "test"):
        (binary / f"{name}.bin").write_bytes(rows.tobytes())
        (pickled / name).write_bytes(python2_pickle(pixels, fine.tolist(), b"fine_labels"))
    (binary / "fine_label_names.txt").write_text("\n".join(names))
    (pickled / "meta").write_bytes(pickle.dumps({"fine_label_names": names}, protocol=2))
    for folder in (tmp_path / "a", tmp_path / "b"):
        _, test = load("cifar100", folder)
        np.testing.assert_array_equal(test.targets, fine)
        np.testing.assert_array_equal(test.inputs.reshape(30, 3072), pixels)
        assert test.classes == tuple(names)


@pytest.mark.parametrize("version", ["binary", "python2"])
@pytest.mark.parametrize("keep", [0, 1, 100, 3072, -1])
def test_truncated_cifar_files_are_refused(tmp_path, version, keep):
    home, _, _ = write_cifar10(tmp_path, version)
    path = home / ("data_batch_3.bin" if version == "binary" else "data_batch_3")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="data_batch_3") as error:
        cifar10(tmp_path)
    one_line(error)


def test_cifar_with_a_missing_or_wrong_part_is_refused(tmp_path):
    home, _, _ = write_cifar10(tmp_path, "binary")
    (home / "data_batch_4.bin").write_bytes(bytes([10]) + bytes(3072))
    with pytest.raises(DataError, match="run from 0 to 10"):
        cifar10(tmp_path)
    (home / "data_batch_4.bin").unlink()
    with pytest.raises(DataError, match=r"data_batch_4.bin: cannot be read: No such file"):
        cifar10(tmp_path)
    (home / "batches.meta.txt").write_text("cat dog")
    with pytest.raises(DataError, match="names 2 classes"):
        cifar10(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [1, 2]}, "3 images but 2 labels"),
        ({"labels": [1, 2, 10]}, "no list of classes"),
        ({"labels": [1, 2, "3"]}, "no list of classes"),
        ({"labels": [1, 2, [3]]}, "no list of classes"),
        ({"labels": None}, "no list of classes"),
        ({"data": np.zeros((3, 3071), np.uint8)}, "'data' is no"),
        ({"data": np.zeros((3, 3072), np.int16)}, "'data' is no"),
        ({"data": b"0" * 3072}, "'data' is no"),
    ],
)
def test_cifar_pickles_of_another_content_are_refused(tmp_path, change, message):
    home, _, _ = write_cifar10(tmp_path, "protocol4")
    table = {"data": np.zeros((3, 3072), np.uint8), "labels": [1, 2, 3]} | change
    (home / "data_batch_2").write_bytes(pickle.dumps(table, protocol=4))
    with pytest.raises(DataError, match=message) as error:
        cifar10(tmp_path)
    assert "data_batch_2" in one_line(error)


# Folders


def write_images(folder, count=5, suffix="png", size=(9, 6)):
    """count images in each of the classes cat (red) and dog (green)."""
    for name, colour in (("cat", (255, 0, 0)), ("dog", (0, 255, 0))):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", size, colour).save(folder / name / f"{i}.{suffix}")
    return folder


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_image_folder_reads_and_splits_every_class(tmp_path, suffix):
    write_images(tmp_path, suffix=suffix)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden").mkdir()
    train, test = load("images", tmp_path, size=4, test_fraction=0.4)
    assert train.classes == ("cat", "dog")
    assert np.bincount(train.targets).tolist() == [3, 3]
    assert np.bincount(test.targets).tolist() == [2, 2]
    reds = train.inputs[:, 0].mean(axis=(1, 2))
    assert ((reds > 200) == (train.targets == 0)).all()
    assert np.abs(train.batch(slice(None)).inputs).max() <= 1.0


def test_image_folder_split_is_a_function_of_the_seed(tmp_path):
    for i in range(40):
        (tmp_path / "one").mkdir(exist_ok=True)
        Image.new("L", (2, 2), i).save(tmp_path / "one" / f"{i:02}.png")
    parts = [image_folder(tmp_path, 2, seed=seed) for seed in (0, 0, 1)]
    held_out = [test.inputs[:, 0, 0, 0].tolist() for _, test in parts]
    assert held_out[0] == held_out[1] != held_out[2]
    together = np.concatenate([part.inputs[:, 0, 0, 0] for part in parts[0]])
    assert sorted(together.tolist()) == list(range(40))


def test_pacs_has_its_known_counts(unpacked):
    train, test = load("domains", unpacked / "PACS128", size=8)
    assert train.domain_names == ("art_painting", "cartoon", "photo", "sketch")
    assert train.classes == ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
    whole = np.concatenate([train.domains, test.domains])
    assert np.bincount(whole).tolist() == [2048, 2344, 1670, 3929]
    cells = [np.bincount(part.domains * 7 + part.targets, minlength=28) for part in (train, test)]
    assert np.abs(cells[1] - 0.2 * (cells[0] + cells[1])).max() <= 0.5  # each of 4 × 7 rounded
    # sketches are black lines on white: the images belong to the names
    brightness = [train.inputs[train.domains == d].mean() for d in range(4)]
    assert np.argmax(brightness) == 3


@pytest.mark.parametrize("damage", ["empty", "half", "text", "folder", "gif"])
def test_an_unreadable_image_is_named(tmp_path, damage):
    write_images(tmp_path, size=(40, 40))
    path = tmp_path / "dog" / "3.png"
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "gif":
        Image.new("L", (3, 3)).save(path, format="GIF")
    else:
        path.write_bytes({"empty": b"", "half": content[:-40], "text": b"hello"}[damage])
    with pytest.raises(DataError, match=r"3\.png: no readable image") as error:
        image_folder(tmp_path, 8)
    one_line(error)


def test_folders_of_another_layout_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds no folders"):
        image_folder(tmp_path, 8)
    with pytest.raises(DataError, match="holds no folders"):
        domain_folder(tmp_path, 8)
    with pytest.raises(DataError, match="cannot be listed"):
        image_folder(tmp_path / "absent", 8)
    write_images(tmp_path / "photo", count=1)
    with pytest.raises(DataError, match="holds no jpg"):
        image_folder(tmp_path, 8)
    with pytest.raises(DataError, match="too few samples"):
        domain_folder(tmp_path, 8)
    for wrong in ({"size": 0}, {"size": 8, "test_fraction": 1.0}, {"size": 8, "seed": -1}):
        with pytest.raises(ConfigError):
            image_folder(tmp_path / "photo", **wrong)


def test_image_folders_say_that_pillow_is_missing(tmp_path, monkeypatch):
    write_images(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'baffle-fl\[images\]'"):
        image_folder(tmp_path, 8)


# Arrays


def test_domains_from_a_folder_of_npz_and_from_one_file(tmp_path):
    pixels = np.random.default_rng(4).integers(0, 256, (20, 5, 5, 3)).astype(np.uint8)
    labels = np.arange(20) % 2
    folder = tmp_path / "several"
    folder.mkdir()
    np.savez(folder / "clipart.npz", x=pixels[:10], y=labels[:10])
    np.savez_compressed(folder / "art.npz", x=pixels[10:], y=labels[10:])
    names = np.array(["clipart"] * 10 + ["art"] * 10)
    np.savez(tmp_path / "one.npz", x=pixels.transpose(0, 3, 1, 2), y=labels, domain=names)
    for source in (folder, tmp_path / "one.npz"):
        train, test = load("domains", source)
        assert train.domain_names == ("art", "clipart")
        assert (len(train), len(test), train.shape) == (16, 4, (3, 5, 5))
        both = [np.concatenate(x) for x in zip(fields(train), fields(test), strict=True)]
        for image, label, domain in zip(*both, strict=True):
            (place,) = np.flatnonzero((pixels.transpose(0, 3, 1, 2) == image).all(axis=(1, 2, 3)))
            assert (label, train.domain_names[domain]) == (labels[place], names[place])


def fields(dataset):
    return dataset.inputs, dataset.targets, dataset.domains


def test_npz_floats_are_taken_as_they_are_and_fortran_order_is_kept(tmp_path):
    values = np.asfortranarray(np.random.default_rng(5).normal(size=(10, 4, 6)))
    np.savez(tmp_path / "d.npz", x=values, y=np.zeros(10, np.uint8))
    train, test = domains_npz(tmp_path / "d.npz", test_fraction=0.5)
    seen = np.concatenate([part.batch(slice(None)).inputs for part in (train, test)])
    assert {x.tobytes() for x in seen[:, 0]} == {x.astype("f4").tobytes() for x in values}
    assert train.domain_names == ("d",)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((4, 2, 2), np.uint8)}, "no arrays x and y"),
        ({"x": np.zeros((4, 2, 2), np.uint8), "y": np.zeros(3, int)}, "4 images need as many"),
        ({"x": np.zeros((4, 2, 2), np.uint8), "y": np.zeros(4)}, "4 images need as many"),
        ({"x": np.zeros((4, 2), np.uint8), "y": np.zeros(4, int)}, "x must be"),
        ({"x": np.full((4, 2, 2), np.nan), "y": np.zeros(4, int)}, "NaN"),
        ({"x": np.full((4, 2, 2), 1e300), "y": np.zeros(4, int)}, "infinite"),
        ({"x": np.zeros((4, 2, 2), int), "y": np.zeros(4, int)}, "int64"),
        ({"x": np.zeros((4, 2, 2), np.uint8), "y": np.full(4, -1)}, "run from -1"),
        ({"x": np.zeros((4, 2, 2), np.uint8), "y": np.full(4, 2**62)}, "number the classes"),
        ({"x": np.zeros((0, 2, 2), np.uint8), "y": np.zeros(0, int)}, "no samples"),
        (
            {"x": np.zeros((4, 2, 2), np.uint8), "y": np.zeros(4, int), "domain": np.zeros(3, int)},
            "4 entries",
        ),
    ],
)
def test_npz_of_another_content_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=message) as error:
        domains_npz(tmp_path)
    one_line(error)


@pytest.mark.parametrize("keep", [0, 10, 200, -30, -1])
def test_truncated_npz_is_refused(tmp_path, keep):
    np.savez(tmp_path / "d.npz", x=np.zeros((9, 8, 8), np.uint8), y=np.zeros(9, int))
    content = (tmp_path / "d.npz").read_bytes()
    (tmp_path / "d.npz").write_bytes(content[:keep])
    with pytest.raises(DataError, match="no readable") as error:
        domains_npz(tmp_path)
    one_line(error)


def test_npz_of_different_shapes_are_refused(tmp_path):
    for size in (4, 5):
        np.savez(tmp_path / f"{size}.npz", x=np.zeros((4, size, size), "u1"), y=np.zeros(4, int))
    with pytest.raises(DataError, match="different shapes"):
        domains_npz(tmp_path)


# The hub


@pytest.mark.skipif(not importlib.util.find_spec("datasets"), reason="datasets is not installed")
@pytest.mark.filterwarnings("default")  # the package is not ours to hold to warnings as errors
def test_hugging_face_reads_a_local_set(tmp_path):
    write_images(tmp_path / "train")
    train, test = hugging_face(str(tmp_path), size=4)
    assert train.classes == ("cat", "dog")
    assert (len(train), len(test), train.shape) == (8, 2, (3, 4, 4))
    assert ((train.inputs[:, 0].mean(axis=(1, 2)) > 200) == (train.targets == 0)).all()
    write_images(tmp_path / "test", count=3)
    train, test = load(f"hf:{tmp_path}", size=4)
    assert (len(train), len(test)) == (10, 6)
    with pytest.raises(DataError, match="cannot be loaded"):
        hugging_face(str(tmp_path / "absent"))


def test_hugging_face_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        load("hf:mnist")


# By name


@pytest.mark.parametrize(
    ("name", "looked_for"),
    [
        ("mnist", "train-images-idx3-ubyte"),
        ("fashion-mnist", "train-images-idx3-ubyte"),
        ("cifar10", "cifar-10-batches-bin/data_batch_1.bin"),
        ("cifar100", "cifar-100-python/train"),
    ],
)
def test_a_missing_set_says_what_was_looked_for_and_where(tmp_path, name, looked_for):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError) as error:
            load(name, folder)
        text = one_line(error)
        assert looked_for in text
        assert str(folder) in text
    with pytest.raises(DataError, match="name the folder"):
        load(name)


def test_load_refuses_unknown_names_and_options(tmp_path):
    with pytest.raises(ConfigError, match="choose one of digits, mnist"):
        load("imagenet")
    with pytest.raises(ConfigError, match="its options: size"):
        load("digits", colour=True)
    with pytest.raises(ConfigError, match="missing a required argument: 'size'"):
        load("images", tmp_path)
    with pytest.raises(ConfigError, match="need a size"):
        load("domains", tmp_path)
    assert load("digits", tmp_path, size=16)[0].shape == (1, 16, 16)
