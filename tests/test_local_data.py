"""A device's own data: against the named sets' loaders and plain NumPy, and what is refused in one line."""

import gzip

import numpy as np
import pytest
from PIL import Image

from baffle.data import load_local
from baffle.data.dataset import Dataset
from baffle.errors import DataError

TEN = tuple("0123456789")
SCALE, SHIFT = np.array([0.01], np.float32), np.array([-0.5], np.float32)
RGB = np.full(3, 0.01, np.float32), np.zeros(3, np.float32)


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.astype(np.uint8).tobytes()


def digits(count=7, side=6, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, side, side), np.uint8), rng.integers(0, 10, count, np.uint8)


def write_pair(folder, stem, count=7, side=6, zipped=False, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = digits(count, side, seed)
    for name, array in ((f"{stem}-images-idx3-ubyte", images), (f"{stem}-labels-idx1-ubyte", labels)):
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))
    return images, labels


def mine(path, shape=(1, 8, 8), classes=TEN, scale=SCALE, shift=SHIFT):
    return load_local(path, shape, classes, scale, shift)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("place", ["", "raw"])
def test_an_idx_pair_is_one_set_padded_as_the_named_ones_are(tmp_path, zipped, place):
    images, labels = write_pair(tmp_path / place, "train", zipped=zipped)
    write_pair(tmp_path / place, "t10k", seed=1)
    found = mine(tmp_path)
    assert len(found) == 7
    assert found.inputs.dtype == np.uint8
    assert np.array_equal(found.inputs, np.pad(images[:, None], ((0, 0), (0, 0), (1, 1), (1, 1))))
    assert np.array_equal(found.targets, labels)
    assert found.targets.dtype == np.int64


def test_any_single_pair_will_do_and_larger_images_shrink(tmp_path):
    images, labels = write_pair(tmp_path, "mine", side=16)
    found = mine(tmp_path)
    twin = Dataset(images[:, None], labels.astype(np.int64), TEN, "twin", SCALE, SHIFT).resized(8)
    assert np.array_equal(found.inputs, twin.inputs)


def test_batches_are_as_stored(tmp_path):
    images, labels = write_pair(tmp_path, "train", side=8)
    batch = mine(tmp_path).batch(np.array([3, 1]))
    assert batch.inputs.dtype == np.uint8
    assert np.array_equal(batch.inputs, images[[3, 1], None])
    assert np.array_equal(batch.targets, labels[[3, 1]])


@pytest.mark.parametrize("kind", [np.uint8, np.float32, np.float64])
def test_npz_files_are_joined_in_the_order_of_their_names(tmp_path, kind):
    images, labels = digits(6, 8)
    np.savez(tmp_path / "b.npz", x=images[2:].astype(kind), y=labels[2:])
    np.savez(tmp_path / "a.npz", x=images[:2].astype(kind), y=labels[:2])
    found = mine(tmp_path)
    assert found.inputs.dtype == (np.uint8 if kind is np.uint8 else np.float32)
    assert np.array_equal(found.inputs, images[:, None])
    assert np.array_equal(found.targets, labels)
    assert len(mine(tmp_path / "a.npz")) == 2


def test_npz_images_are_stretched(tmp_path):
    images, labels = digits(4, 5)
    np.savez(tmp_path / "a.npz", x=images, y=labels)
    twin = Dataset(images[:, None], labels.astype(np.int64), TEN, "twin", SCALE, SHIFT).resized(8)
    assert np.array_equal(mine(tmp_path / "a.npz").inputs, twin.inputs)


def test_channels_may_come_last(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "a.npz", x=x, y=np.zeros(4, int))
    found = mine(tmp_path / "a.npz", (3, 8, 8), TEN, *RGB)
    assert np.array_equal(found.inputs, x.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("channels", [1, 3])
def test_folders_of_images_have_the_networks_classes_whichever_are_there(tmp_path, channels):
    rng = np.random.default_rng(0)
    for name, count in (("zebra", 2), ("cat", 3)):
        (tmp_path / name).mkdir()
        for i in range(count):
            pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    classes = ("ant", "cat", "dog", "zebra")
    scale, shift = (SCALE, SHIFT) if channels == 1 else RGB
    found = mine(tmp_path, (channels, 8, 8), classes, scale, shift)
    assert found.targets.tolist() == [1, 1, 1, 3, 3]
    with Image.open(tmp_path / "zebra" / "1.png") as last:
        expected = np.asarray(last.convert("L" if channels == 1 else "RGB")).reshape(8, 8, channels)
    assert np.array_equal(found.inputs[4], expected.transpose(2, 0, 1))


def broken(tmp_path):
    """Name → (path, shape, words of the message)."""
    images, labels = digits(4, 8)
    np.savez(tmp_path / "high.npz", x=images, y=np.array([0, 1, 2, 10]))
    np.savez(tmp_path / "negative.npz", x=images, y=np.array([0, -1, 2, 3]))
    np.savez(tmp_path / "wide.npz", x=images, y=np.full(4, 2**64 - 1, np.uint64))
    np.savez(tmp_path / "short.npz", x=images, y=labels[:3])
    np.savez(tmp_path / "none.npz", x=images[:0], y=labels[:0])
    np.savez(tmp_path / "nan.npz", x=np.full((2, 8, 8), np.nan), y=labels[:2])
    np.savez(tmp_path / "x.npz", x=images)
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "text.txt").write_text("no data")
    (tmp_path / "empty").mkdir()
    (tmp_path / "strange" / "unicorn").mkdir(parents=True)
    Image.fromarray(images[0]).save(tmp_path / "strange" / "unicorn" / "1.png")
    (tmp_path / "torn" / "0").mkdir(parents=True)
    (tmp_path / "torn" / "0" / "1.png").write_bytes(b"\x89PNG half")
    write_pair(tmp_path / "two", "a")
    write_pair(tmp_path / "two", "b")
    write_pair(tmp_path / "alone", "a")
    (tmp_path / "alone" / "a-labels-idx1-ubyte").unlink()
    write_pair(tmp_path / "uneven", "a")
    (tmp_path / "uneven" / "a-labels-idx1-ubyte").write_bytes(idx(labels))
    write_pair(tmp_path / "cut", "a")
    cut = tmp_path / "cut" / "a-images-idx3-ubyte"
    cut.write_bytes(cut.read_bytes()[:-1])
    grey = (1, 8, 8)
    return {
        "high.npz": (grey, "labels run from 0 to 10"),
        "negative.npz": (grey, "labels run from -1 to 3"),
        "wide.npz": (grey, "labels run from -1 to -1"),
        "short.npz": (grey, "4 images need as many integers"),
        "none.npz": (grey, "holds no samples"),
        "nan.npz": (grey, "NaN"),
        "x.npz": (grey, "no arrays x and y"),
        "text.npz": (grey, "no readable .npz"),
        "text.txt": (grey, "no .npz and no folder"),
        "nowhere": (grey, "is not there"),
        "empty": (grey, "holds no folders"),
        "strange": (grey, "no class 'unicorn'; its classes: 0, 1, 2"),
        "torn": (grey, "no readable image"),
        "two": (grey, "holds 2 sets of idx files"),
        "alone": (grey, "has no a-labels-idx1-ubyte"),
        "uneven": (grey, "7 images but 4 labels"),
        "cut": (grey, "its header claims"),
        "short.npz ": ((3, 8, 8), "is not there"),
        "nan.npz/": ((5,), "takes (5,)"),
    }


def test_what_cannot_be_is_refused_in_one_line(tmp_path):
    for name, (shape, words) in broken(tmp_path).items():
        with pytest.raises(DataError) as refused:
            mine(tmp_path / name, shape)
        assert words in str(refused.value), name
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("shape", "words"), [((3, 8, 8), "1 channels"), ((1, 8, 4), "takes (8, 4)")])
def test_images_that_do_not_fit_the_network(tmp_path, shape, words):
    images, labels = digits(4, 8)
    np.savez(tmp_path / "a.npz", x=images, y=labels)
    scale, shift = (SCALE, SHIFT) if shape[0] == 1 else RGB
    with pytest.raises(DataError) as refused:
        mine(tmp_path / "a.npz", shape, TEN, scale, shift)
    assert words in str(refused.value)


def test_equal_to_the_named_set_it_is_a_part_of(unpacked):
    from baffle.data import mnist

    train, _ = mnist(unpacked)
    found = load_local(unpacked / "MNIST" / "raw", train.shape, train.classes, train.scale, train.shift)
    assert np.array_equal(found.inputs, train.inputs)
    assert np.array_equal(found.targets, train.targets)
