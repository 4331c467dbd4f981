# SPDX-License-Identifier: MIT
"""Prepared sets: what is written is what is read, at any position, and any change is noticed."""

import json
import multiprocessing
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from ablab.data import DataError, Tokenizer
from ablab.data._shard import Stream, Tokens, permute, sample_starts
from ablab.data.synth import Synth
from tests.section import text as text_section

KEYS = list(np.random.PCG64(1).random_raw(4))


def made(folder, tokens=6000, val_fraction=0.2):
    section = text_section(folder, Tokenizer.BYTE, val_fraction)
    data = Synth(Synth.Config(tokens=tokens), section)
    data.prepare()
    return data


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def read(data, split):
    shards = data.manifest()["splits"][split]["shards"]
    return np.concatenate([np.fromfile(data.folder / s["file"], "<u2") for s in shards])


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 1000, 4097])
def test_permute_is_a_bijection(n):
    assert sorted(permute(np.arange(n), n, KEYS)) == list(range(n))


def test_permute_depends_on_every_key_and_looks_random():
    n = 5000
    orders = [permute(np.arange(n), n, KEYS[:i] + [np.uint64(7)] + KEYS[i + 1 :]) for i in range(4)]
    orders.append(permute(np.arange(n), n, KEYS))
    for i, order in enumerate(orders):
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.06  # 4 standard errors of a random order
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.06
        assert all((order != other).mean() > 0.99 for other in orders[:i])


def test_every_epoch_visits_every_window_once_in_a_new_order():
    n, length = 37, 8
    epochs = sample_starts(n, length, seed=5, position=0, count=4 * n).reshape(4, n)
    assert all(len(set(e // length)) == n and len(set(e % length)) == 1 for e in epochs)
    assert len({tuple(e) for e in epochs}) == 4 and len({e[0] % length for e in epochs}) > 1


def test_starts_depend_on_the_seed():
    a, b = (sample_starts(100, 8, seed, 0, 100) for seed in (1, 2))
    assert (a != b).mean() > 0.9


@pytest.mark.parametrize("size", [1, 3, 12])
def test_batch_k_is_the_same_whatever_was_read_before(tmp_path, size):
    data = made(tmp_path)
    whole = list(islice(data.batches("train", 7, 0, size, 16), 900))
    assert 900 * size > data.samples("train", 16)  # wraps into later epochs
    for k in (1, 17, 450, 899):
        other = next(data.batches("train", 7, k * size, size, 16))
        assert torch.equal(other.x, whole[k].x) and torch.equal(other.y, whole[k].y)


def test_batches_hold_text_of_their_split_and_targets_are_the_next_tokens(tmp_path):
    data = made(tmp_path)
    for split in ("train", "val"):
        tokens = read(data, split)
        windows = {tuple(tokens[i : i + 17].tolist()) for i in range(len(tokens) - 16)}
        for batch in islice(data.batches(split, 1, 0, 5, 16), 30):
            assert batch.x.dtype == torch.int64 and batch.x.shape == batch.y.shape == (5, 16)
            assert batch.x.is_contiguous() and batch.y.is_contiguous()
            rows = torch.cat([batch.x, batch.y[:, -1:]], 1).tolist()
            assert all(tuple(r) in windows for r in rows) and torch.equal(batch.x[:, 1:], batch.y[:, :-1])


def test_an_epoch_covers_nearly_all_of_the_split(tmp_path):
    data = made(tmp_path)
    n = data.samples("train", 16)
    seen = Counter((sample_starts(n, 16, 3, 0, n)[:, None] + np.arange(16)).ravel().tolist())
    total = data.manifest()["splits"]["train"]["tokens"]
    assert max(seen.values()) == 1 and len(seen) > total - 2 * 16


def test_windows_across_shards_equal_one_shard():
    whole = np.arange(1000, dtype=np.uint16)
    cut = Stream([whole[:300], whole[300:311], whole[311:]])
    starts = np.array([0, 295, 299, 300, 305, 980])
    assert np.array_equal(cut.windows(starts, 20), Stream([whole]).windows(starts, 20))
    assert cut.size == 1000 and np.array_equal(np.concatenate(cut.parts(290, 320)), whole[290:320])


def test_evaluation_is_fixed_and_counts_its_bytes(tmp_path):
    data = made(tmp_path)
    a, b = data.evaluation(512, 16), made(tmp_path / "again").evaluation(512, 16)
    assert a.sha256 == b.sha256 and np.array_equal(a.ids, b.ids)
    assert (a.tokens, a.bytes, a.ids.shape) == (512, 512, (32, 17))
    assert torch.equal(torch.cat([batch.y for batch in a.batches(5)]), torch.from_numpy(a.ids[:, 1:].astype(int)))
    assert data.evaluation(256, 16).sha256 != a.sha256


def test_evaluation_of_the_whole_split_is_every_window_once(tmp_path):
    data = made(tmp_path)
    tokens = read(data, "val")
    ids = data.evaluation(0, 16).ids
    n = (len(tokens) - 1) // 16
    assert np.array_equal(ids[:, :-1].ravel(), tokens[: n * 16]) and np.array_equal(
        ids[-1, 1:], tokens[n * 16 - 15 : n * 16 + 1]
    )


def test_bytes_of_a_token_range_leave_out_document_ends(tmp_path):
    from ablab.data.text import Text

    (tmp_path / "a.txt").write_text("Hello world\n" * 40)
    (tmp_path / "b.txt").write_text("the second text\n" * 8)
    section = text_section(tmp_path / "out", Tokenizer.GPT2, 0.2)
    data = Text(Text.Config(path=tmp_path), section)
    data.prepare()
    train = data.manifest()["splits"]["train"]
    assert data.text_bytes("train", 0, 2) == len("Hello world")
    assert data.text_bytes("train", 0, train["tokens"]) == train["bytes"] == 40 * len("Hello world\n")


def test_prepare_twice_changes_no_file(tmp_path):
    data = made(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in data.folder.iterdir()}
    assert data.prepare() == data.folder
    assert before == {p: p.stat().st_mtime_ns for p in data.folder.iterdir()}


def _prepare(folder, barrier):
    barrier.wait()
    made(folder)


def test_two_processes_prepare_one_set(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    both = [context.Process(target=_prepare, args=(tmp_path / "two", barrier)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    one = made(tmp_path / "one")
    assert [process.exitcode for process in both] == [0, 0]
    assert files(tmp_path / "two" / one.folder.name) == files(one.folder)
    assert not list((tmp_path / "two").glob("*.part"))


def test_missing_set_says_to_run_make_data(tmp_path):
    section = text_section(tmp_path, Tokenizer.BYTE, 0.1)
    with pytest.raises(DataError, match=r"no prepared set of DATA_SYNTH; run 'make data'"):
        next(Synth(Synth.Config(tokens=5000), section).batches("train", 1, 0, 2, 8))


def test_missing_shard_is_an_error(tmp_path):
    data = made(tmp_path)
    (data.folder / "val-00000.bin").unlink()
    with pytest.raises(DataError, match=r"val-00000.bin: incomplete set of DATA_SYNTH; delete the folder"):
        data.manifest()


def test_shorter_shard_is_an_error(tmp_path):
    data = made(tmp_path)
    path = data.folder / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"train-00000.bin: 9598 bytes instead of 9600; delete"):
        next(data.batches("train", 1, 0, 2, 8))


def test_changed_byte_is_found_by_prepare_and_by_the_contract(tmp_path):
    data = made(tmp_path)
    clauses = {c.name: c for c in data.contracts()}
    assert all(c.judge(None)["ok"] for c in clauses.values())
    path = data.folder / "train-00000.bin"
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)
    assert not clauses["data/files"].judge(None)["ok"]
    with pytest.raises(DataError, match=r"train-00000.bin: content differs from its hash"):
        data.prepare()


def test_training_shard_used_for_validation_breaks_the_contract(tmp_path):
    data = made(tmp_path)

    class Leaky(Synth):
        def manifest(self):
            found = super().manifest()
            found["splits"]["val"]["shards"] += found["splits"]["train"]["shards"]
            return found

    leaky = Leaky(data.config, data.section)
    broken = [c.name for c in leaky.contracts() if not c.judge(None)["ok"]]
    assert broken == ["data/disjoint"]


@pytest.mark.parametrize("edit", ["number", "key", "torn"])
def test_edited_manifest_is_an_error(tmp_path, edit):
    data = made(tmp_path)
    path = data.folder / "manifest.json"
    content = json.loads(path.read_text())
    content["splits"]["val"]["bytes"] += 1
    if edit == "key":
        del content["sha256"]
    path.write_text(json.dumps(content)[: 40 if edit == "torn" else None])
    with pytest.raises(DataError, match=r"manifest.json: .*delete the folder"):
        data.manifest()


def test_too_long_sequences_are_an_error(tmp_path):
    data = made(tmp_path)
    with pytest.raises(DataError, match="hold no sequence of 3000; lower MODEL_GPT_BLOCK"):
        next(data.batches("train", 1, 0, 2, 3000))
    with pytest.raises(DataError, match="hold no sequence of 1500"):
        data.evaluation(0, 1500)
    with pytest.raises(DataError, match="EVAL_TOKENS = 8 hold no sequence of 16"):
        data.evaluation(8, 16)


def test_recipe_decides_the_folder(tmp_path):
    names = {made(tmp_path, tokens, share).folder.name for tokens in (5000, 6000) for share in (0.1, 0.2)}
    assert len(names) == 4 and all(name.startswith("synth-byte-") for name in names)


class Docs(Tokens):
    """Numbered documents; stops as a crash would after `crash` of them."""

    slug, symbol, licence, resumable, shard_tokens = "docs", "DATA_DOCS", "none", True, 100
    crash = None

    def recipe(self):
        return {}

    def source(self):
        return {}

    def write(self, out):
        self.first = out.documents
        for i in range(out.documents, 60):
            if i == self.crash:
                raise KeyboardInterrupt
            out.text("train" if i < 50 else "val", f"document {i}\n")


def test_stopped_prepare_goes_on_and_gives_the_same_set(tmp_path):
    def docs(name):
        section = text_section(tmp_path / name, Tokenizer.BYTE, 0.1)
        return Docs(Docs.Config(), section)

    whole, torn = docs("whole"), docs("torn")
    whole.prepare()
    for crash in (5, 33, 55):
        torn.crash = crash
        with pytest.raises(KeyboardInterrupt):
            torn.prepare()
        with pytest.raises(DataError, match="no prepared set"):
            torn.manifest()
    torn.crash = None
    torn.prepare()
    assert torn.first > 40 and files(torn.folder) == files(whole.folder)
    assert len(whole.manifest()["splits"]["train"]["shards"]) > 3


def test_unwritable_folder_says_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot prepare DATA_SYNTH: .*CONFIG_DATA_DIR"):
        made(tmp_path / "file")
