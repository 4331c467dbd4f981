# SPDX-License-Identifier: MIT
"""Image sets: formats, splits, normalisation, and augmentation that depends on seed and sample number alone."""

import gzip
import hashlib
import io
import json
import struct
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from ablab.data import DataError, _idx
from ablab.data._image import draws, held_out, moved
from ablab.data.cifar10 import Cifar10
from ablab.data.cifar100 import Cifar100
from ablab.data.digits import Digits
from ablab.data.fashionmnist import Fashionmnist
from ablab.data.mnist import Mnist
from ablab.data.synthimage import Synthimage, generate
from tests.section import images

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def raw(n, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8)


def synth(folder, samples=300, **section):
    data = Synthimage(Synthimage.Config(samples=samples), images(folder, **section))
    data.prepare()
    return data


def idx_folder(folder, train=90, test=20, zipped=True):
    """Four IDX files, by struct alone."""
    folder.mkdir()
    made = {}
    for stem, n in (("train", train), ("t10k", test)):
        x, y = raw(n, 28, 28, seed=n), np.arange(n, dtype=np.uint8) % 10
        for kind, a, head in (
            ("images-idx3", x, struct.pack(">4I", 0x803, n, 28, 28)),
            ("labels-idx1", y, struct.pack(">2I", 0x801, n)),
        ):
            content = head + a.tobytes()
            name = f"{stem}-{kind}-ubyte" + ".gz" * zipped
            (folder / name).write_bytes(gzip.compress(content) if zipped else content)
        made[stem] = x, y
    return made


def fashion(folder, path):
    return Fashionmnist(Fashionmnist.Config(path=path), images(folder))


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files_are_read_gzipped_or_not(tmp_path, zipped):
    made = idx_folder(tmp_path / "idx", zipped=zipped)
    data = fashion(tmp_path, tmp_path / "idx")
    data.prepare()
    manifest = data.manifest()
    assert {k: s["samples"] for k, s in manifest["splits"].items()} == {"train": 81, "val": 9, "test": 20}
    x, y = data.arrays(manifest, "test")
    assert np.array_equal(x[:, 0, 2:-2, 2:-2], made["t10k"][0]) and np.array_equal(y, made["t10k"][1])
    assert not x[:, :, :2].any() and not x[..., -2:].any()  # 28 x 28 in a border of two
    for name in ("a", "b.gz"):
        _idx.write(tmp_path / name, made["train"][0])
        assert np.array_equal(_idx.read(tmp_path / name), made["train"][0])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not an IDX file"),
        (struct.pack(">2I", 0x801, 3) + b"ab", "shape [3], 2 bytes"),
        (struct.pack(">2I", 0xD01, 1) + b"abcd", "type 13"),
        (b"\x1f\x8b\x08\x00", "not an IDX file"),
    ],
)
def test_what_is_no_idx_file_is_an_error(tmp_path, content, says):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(DataError) as error:
        _idx.read(tmp_path / "f")
    assert says in str(error.value) and str(tmp_path) in str(error.value)


def test_missing_files_say_what_to_do(tmp_path):
    for data, says in (
        (fashion(tmp_path, tmp_path), "apt-get install dataset-fashion-mnist"),
        (Mnist(Mnist.Config(path=Path()), images(tmp_path)), "run 'make data'"),
        (Cifar10(Cifar10.Config(path=tmp_path), images(tmp_path)), "CONFIG_DATA_CIFAR10_PATH"),
    ):
        with pytest.raises(DataError) as error:
            data.source()
        assert says in str(error.value)
        with pytest.raises(DataError, match="run 'make data'"):
            data.manifest()
    assert fashion(tmp_path, tmp_path).offline and not Mnist(Mnist.Config(path=Path()), images(tmp_path)).offline


def test_labels_without_images_are_an_error(tmp_path):
    idx_folder(tmp_path / "idx", zipped=False)
    (tmp_path / "idx/train-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 1) + b"a")
    with pytest.raises(DataError, match="90.* images, .1. labels"):
        fashion(tmp_path, tmp_path / "idx").prepare()
    assert not fashion(tmp_path, tmp_path / "idx").folder.exists()


class Served(Mnist, symbol="DATA_SERVED"):
    """MNIST from a folder of this machine."""


@pytest.fixture
def served(tmp_path):
    yield lambda path: Served(Served.Config(path=path), images(tmp_path / "data"))
    from ablab import plugin

    plugin.forget("DATA_SERVED")


def test_files_are_fetched_once_and_checked(tmp_path, served, monkeypatch):
    idx_folder(tmp_path / "there")
    found = {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in (tmp_path / "there").iterdir()}
    monkeypatch.setattr(Served, "url", (tmp_path / "there").as_uri() + "/")
    monkeypatch.setattr(Served, "md5", {**found, "t10k-labels-idx1-ubyte.gz": "0" * 32})
    data = served(Path())
    assert not data.offline
    with pytest.raises(DataError, match="MD5 .* instead of 0000"):
        data.prepare()
    assert not (data.root / "t10k-labels-idx1-ubyte.gz").exists() and not data.offline
    monkeypatch.setattr(Served, "md5", found)
    data.prepare()
    assert data.offline and data.samples("test", 1) == 20
    for path in (tmp_path / "there").iterdir():
        path.unlink()
    data.prepare()  # nothing is fetched again
    monkeypatch.setattr(Served, "url", "file:///nowhere/")
    with pytest.raises(DataError, match="make data.*DATA_SERVED_PATH"):
        Served(Served.Config(path=tmp_path / "elsewhere"), images(tmp_path / "more")).prepare()


def cifar(kind, folder, archive):
    """A small set in the published layout; returns images and labels by split."""
    labels, made = kind.labels, {}
    folder.mkdir()
    (name,) = kind.md5
    files = {}
    for split, names in kind.names.items():
        x, y = (
            raw(40 * len(names), 3, 32, 32, seed=len(names)),
            np.arange(40 * len(names), dtype=np.uint8) % kind.classes,
        )
        made[split] = x, y
        for i, one in enumerate(names):
            rows = slice(40 * i, 40 * i + 40)
            head = np.full((40, labels - 1), 7, np.uint8)  # the coarse label, which does not count
            records = np.concatenate([head, y[rows, None], x[rows].reshape(40, -1)], 1)
            files[one] = records.tobytes()
    if archive:
        with tarfile.open(folder / name, "w:gz") as tar:
            for one, content in files.items():
                info = tarfile.TarInfo(f"{kind.folder_name}/{one}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    else:
        (folder / kind.folder_name).mkdir()
        for one, content in files.items():
            (folder / kind.folder_name / one).write_bytes(content)
    return made


@pytest.mark.parametrize("kind", [Cifar10, Cifar100])
@pytest.mark.parametrize("archive", [True, False])
def test_the_binary_version_of_cifar_is_read(tmp_path, kind, archive):
    made = cifar(kind, tmp_path / "raw", archive)
    data = kind(kind.Config(path=tmp_path / "raw"), images(tmp_path))
    assert data.offline
    data.prepare()
    manifest = data.manifest()
    x, y = data.arrays(manifest, "test")
    assert np.array_equal(x, made["test"][0]) and np.array_equal(y, made["test"][1])
    parts = [data.arrays(manifest, s)[0].reshape(-1, 3072) for s in ("train", "val")]
    both = np.concatenate(parts)
    assert len(both) == len(made["train"][0]) and {r.tobytes() for r in both} == {r.tobytes() for r in made["train"][0]}
    assert manifest["mean"] == list(kind.mean) and manifest["classes"] == kind.classes


def test_pickles_are_refused_with_what_to_fetch(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    data = Cifar10(Cifar10.Config(path=tmp_path), images(tmp_path))
    with pytest.raises(DataError, match=r"pickles .* not read.*cifar-10-binary\.tar\.gz"):
        data.source()
    assert not data.offline


def test_a_torn_archive_is_an_error(tmp_path):
    cifar(Cifar10, tmp_path / "raw", True)
    path = tmp_path / "raw/cifar-10-binary.tar.gz"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="remove it"):
        Cifar10(Cifar10.Config(path=tmp_path / "raw"), images(tmp_path)).prepare()


def test_digits_are_those_of_scikit_learn(tmp_path):
    sklearn = pytest.importorskip("sklearn.datasets")
    data = Digits(Digits.Config(), images(tmp_path))
    data.prepare()
    manifest = data.manifest()
    assert {k: s["samples"] for k, s in manifest["splits"].items()} == {"train": 1295, "val": 143, "test": 359}
    x, y = data.arrays(manifest, "test")
    theirs, labels = sklearn.load_digits(return_X_y=True)
    assert np.array_equal(y, labels[4::5])
    assert np.array_equal(x[:, 0, ::4, ::4], (theirs[4::5].reshape(-1, 8, 8) * 255 // 16).astype(np.uint8))
    assert np.array_equal(x[:, 0, ::4, ::4], x[:, 0, 3::4, 3::4])  # each pixel is 4 x 4


@pytest.mark.skipif(not DEBIAN.exists(), reason="apt-get install dataset-fashion-mnist")
def test_fashion_mnist_of_debian_has_its_published_sizes(tmp_path):
    data = fashion(tmp_path, DEBIAN)
    data.prepare()
    manifest = data.manifest()
    assert {k: s["samples"] for k, s in manifest["splits"].items()} == {"train": 55_000, "val": 5_000, "test": 10_000}
    _, y = data.arrays(manifest, "val")
    assert np.bincount(y).tolist() == [500] * 10
    # 0.2860 and 0.3530 at 28 x 28; the border adds zeros
    share = (28 / 32) ** 2
    assert manifest["mean"][0] == pytest.approx(0.2860 * share, abs=2e-3)


def test_the_validation_split_is_stratified_and_of_its_own_seed(tmp_path):
    y = np.repeat(np.arange(4), (100, 50, 30, 21)).astype(np.uint8)
    a, b, again = held_out(y, 0), held_out(y, 1), held_out(y, 0)
    assert np.array_equal(a, again) and not np.array_equal(a, b)
    assert np.bincount(y[a]).tolist() == np.bincount(y[b]).tolist() == [10, 5, 3, 2]
    assert held_out(np.arange(60_000) % 10, 0).sum() == 5000
    one, two = synth(tmp_path), synth(tmp_path, split_seed=1)
    assert one.folder != two.folder
    entries = [d.manifest()["splits"] for d in (one, two)]
    assert entries[0]["test"] == entries[1]["test"] and entries[0]["val"] != entries[1]["val"]


def test_splits_share_no_image_and_the_contract_sees_one_that_does(tmp_path):
    data = synth(tmp_path)
    manifest = data.manifest()
    rows = {s: {r.tobytes() for r in data.arrays(manifest, s)[0]} for s in ("train", "val", "test")}
    assert not rows["train"] & rows["val"] and not rows["train"] & rows["test"] and not rows["val"] & rows["test"]
    clauses = {c.name: c for c in data.contracts()}
    assert all(c.judge(None)["ok"] for c in clauses.values())
    path = data.folder / "test-images.bin"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    assert not clauses["data/files"].judge(None)["ok"]
    with pytest.raises(DataError, match="content differs"):
        data.prepare()


def test_a_label_out_of_range_leaves_no_set(tmp_path, monkeypatch):
    monkeypatch.setattr(Synthimage, "classes", 9)
    data = Synthimage(Synthimage.Config(samples=300), images(tmp_path))
    monkeypatch.setattr("ablab.data.synthimage.generate", lambda n, k, s: generate(n, 10, s))
    with pytest.raises(DataError, match="class 9, there are 9"):
        data.prepare()
    assert not data.folder.exists()


def test_training_images_have_mean_0_and_variance_1(tmp_path):
    data = synth(tmp_path, 600)
    x = next(data.batches("train", 1, 0, 450, 1)).x.double()
    assert abs(x.mean().item()) < 1e-5 and x.var(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert x.shape == (450, 1, 32, 32) and len(torch.unique(x, dim=0)) == 450  # an epoch is each image once


def test_a_batch_depends_on_seed_and_position_alone(tmp_path):
    data = synth(tmp_path, crop=4, flip=True)
    stream = list(islice(data.batches("train", 1, 0, 16, 1), 40))
    whole = torch.cat([b.x for b in stream]), torch.cat([b.y for b in stream])
    for position, size in ((0, 64), (48, 8), (500, 5)):
        part = next(data.batches("train", 1, position, size, 1))
        assert torch.equal(part.x, whole[0][position : position + size])
        assert torch.equal(part.y, whole[1][position : position + size])
    other = next(data.batches("train", 2, 0, 16, 1))
    assert not torch.equal(other.x, stream[0].x)


def test_only_training_is_augmented(tmp_path):
    plain, augmented = synth(tmp_path), synth(tmp_path, crop=4, flip=True)
    for split in ("val", "test"):
        a, b = (next(d.batches(split, 1, 0, 8, 1)) for d in (plain, augmented))
        assert torch.equal(a.x, b.x)
    assert not torch.equal(*(next(d.batches("train", 1, 0, 8, 1)).x for d in (plain, augmented)))
    e = augmented.evaluation(0, 1)
    assert e.tokens == 25 and [len(b.y) for b in e.batches(10)] == [10, 10, 5] and e.bytes is None
    assert e.sha256 == plain.evaluation(0, 1).sha256 != plain.evaluation(0, 1, "test").sha256


def test_moved_images_are_windows_of_the_bordered_one():
    x, drawn = torch.from_numpy(raw(200, 2, 6, 6)), draws(3, np.arange(200))
    got = moved(x, drawn, 2, True)
    seen = set()
    for image, out, bits in zip(x, got, drawn.tolist(), strict=True):
        wide = torch.nn.functional.pad(image, (2, 2, 2, 2))
        down, right = (bits >> 1) % 5, (bits >> 1) // 5 % 5
        window = wide[:, down : down + 6, right : right + 6]
        assert torch.equal(out, window.flip(2) if bits & 1 else window)
        seen.add((down, right, bits & 1))
    assert len(seen) > 45  # of 50
    assert torch.equal(moved(x, drawn, 0, False), x)


def test_draws_are_independent_of_the_batch_and_even():
    numbers = np.arange(20_000)
    whole = draws(1, numbers)
    assert np.array_equal(whole[500:600], draws(1, numbers[500:600])) and not (whole == draws(2, numbers)).any()
    assert abs((whole & np.uint64(1)).mean() - 0.5) < 0.02
    counts = np.bincount(((whole >> np.uint64(1)) % np.uint64(9)).astype(int))
    assert counts.min() > 0.9 * 20_000 / 9


def test_images_are_enlarged_and_never_made_smaller(tmp_path):
    data = synth(tmp_path, resize=64)
    batch = next(data.batches("val", 1, 0, 4, 1))
    small = next(synth(tmp_path).batches("val", 1, 0, 4, 1))
    assert batch.x.shape == (4, 1, 64, 64) and data.extent(1) == 64
    assert torch.equal(batch.x[..., 0, 0], small.x[..., 0, 0])  # between the pixels, never beyond them
    assert batch.x.amax() <= small.x.amax() and batch.x.amin() >= small.x.amin()
    assert data.noise(2, 1, 10).x.shape == (2, 1, 64, 64)
    with pytest.raises(ValueError, match="CONFIG_DATA_AUGMENT_RESIZE = 16"):
        images(tmp_path, resize=16)


def test_inspection_sees_a_batch_that_is_wrong(tmp_path):
    data = synth(tmp_path)
    good = next(data.batches("train", 1, 0, 4, 1))
    data.inspect("train", good, 4, 1)
    bad = [
        type(good)(good.x[:, :, :8], good.y),
        type(good)(good.x, good.y + 10),
        type(good)(good.x * torch.inf, good.y),
    ]
    for batch in bad:
        with pytest.raises(DataError, match="^train: "):
            data.inspect("train", batch, 4, 1)


def test_synthetic_images_are_the_same_everywhere_and_a_nearest_mean_tells_them_apart():
    x, y = generate(1200, 10, 1)
    assert hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest()[:8] == "a7cb293f"
    flat = x.reshape(len(x), -1).astype(float)
    means = np.stack([flat[:600][y[:600] == k].mean(0) for k in range(10)])
    guess = ((flat[600:, None] - means) ** 2).sum(2).argmin(1)
    assert (guess == y[600:]).mean() > 0.7


def test_the_manifest_names_no_path_of_the_machine(tmp_path):
    idx_folder(tmp_path / "idx")
    data = fashion(tmp_path, tmp_path / "idx")
    data.prepare()
    assert str(tmp_path) not in json.dumps(data.manifest())
