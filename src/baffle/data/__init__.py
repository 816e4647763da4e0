"""Data sets, how they are read, and how they are split over clients.

    train, test = load("mnist", "data")
    parts = dirichlet(train.targets, clients=10, seed=0, alpha=0.3)
    batch = train.batch(parts[0][:32])

Files are not trusted: what is malformed or malicious leaves as a DataError, and nothing in a file is
ever executed.
"""

from baffle.data.dataset import Dataset, normalisation
from baffle.data.folders import domain_folder, domains_npz, image_folder
from baffle.data.hub import hugging_face
from baffle.data.local import load_local
from baffle.data.partition import Share, by_domain, describe, dirichlet, iid
from baffle.data.picture import plot
from baffle.data.sources import cifar10, cifar100, digits, fashion_mnist, load, mnist

__all__ = [
    "Dataset",
    "Share",
    "by_domain",
    "cifar10",
    "cifar100",
    "describe",
    "digits",
    "dirichlet",
    "domain_folder",
    "domains_npz",
    "fashion_mnist",
    "hugging_face",
    "iid",
    "image_folder",
    "load",
    "load_local",
    "mnist",
    "normalisation",
    "plot",
]
