# SPDX-License-Identifier: MIT
"""Checkpoints: everything that decides the rest of a trial, saved whole or not at all, verified when read.

Weights, optimizer state, buffers and random state are safetensors, counters are JSON; `rundir.Checkpoint` knows
the names and how a folder appears at once.
"""

import json
import os
import random
import shutil
from collections.abc import Collection, Iterable, Mapping
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ablab import rundir
from ablab.rundir import Checkpoint, Guard, RunError, TrialDir, Write

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
SPARSE = ("#bits", "#kept", "#shape")
"""Parts that stand for a tensor with many zeros: which elements are not +0, their values, its shape."""
State = dict[str, Any]


def save(
    place: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: State,
    guard: Guard | None = None,
    write: Write = os.write,
    more: Mapping[str, Tensor] = MappingProxyType({}),
    sparse: bool = False,
) -> None:
    """Write all of it beside `place`, then give it the name.

    `state` is the loop's, JSON; random state is added here.  `more` are tensors that are no buffers of the model.
    `sparse`: where that is smaller, bits and values stand for a tensor.  `guard` is called right before the name
    changes.  Whatever fails, an OSError for a full disk or what `guard`
    raises, leaves no trace.
    """
    temporary = place.begin()
    numbers, tensors = random_state()
    try:
        for path, content in _files(temporary, model, optimizer, more):
            store(path, thinned(content) if sparse else content, write)
        store(temporary.rank(0), tensors, write)
        temporary.write("state", {**state, "random": numbers}, write=write)
        temporary.seal()
        place.commit(temporary, guard)
    except BaseException:
        shutil.rmtree(temporary.path, ignore_errors=True)
        raise


def load(
    place: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    more: Mapping[str, Tensor] = MappingProxyType({}),
) -> State:
    """Put a verified checkpoint into model, optimizer, `more` and random generators; returns the loop's state.

    Raises RunError when it does not fit the model.
    """
    for path, wanted in _files(place, model, optimizer, more):
        _fill(path, wanted)
    state = place.read("state") or {}
    set_random_state(state["random"], load_file(place.rank(0)))
    return state


def prove(
    place: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    more: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Read back what `save` has just written: hashes verify and every tensor has the bits that it has in memory.

    Raises RunError after renaming the folder bad-.., so that no attempt goes on from it.
    """
    flaw = place.flaw()
    for path, wanted in () if flaw else _files(place, model, optimizer, more):
        found = read(path)
        odd = [n for n in sorted(found.keys() | wanted.keys()) if not _equal(found.get(n), wanted.get(n))]
        flaw = flaw or (f"{path}: {odd[0]} is not what memory holds" if odd else None)
    if flaw:
        place.reject()
        raise RunError(f"{flaw}; the disk does not keep what is written")


def load_model(place: Checkpoint, model: nn.Module) -> None:
    """Put the weights and all buffers of a checkpoint into a model.  Raises RunError when they do not fit it."""
    _fill(place.model, model.state_dict())
    _fill(place.state, _rest(model), others=True)


def newest(trial: TrialDir, first: int) -> Checkpoint | None:
    """The checkpoint to resume from: the furthest of attempt `first` or later that verifies and that no two
    attempts died loading.  Others are renamed bad-.. and reported."""
    for place in trial.saved(first):
        flaw = place.flaw()
        if flaw is None and (deaths := _deaths_loading(trial, place)) > 1:
            flaw = f"{place.path}: {deaths} attempts ended while they loaded it"
        if flaw is None:
            return place
        print(f"{flaw}; renamed to {place.reject().name}, an older one is used")
    return None


def sweep(trial: TrialDir, first: int, keep: int, every: int, chosen: Collection[int]) -> list[Checkpoint]:
    """Remove checkpoints without a role, once the newest has been read back; returns those that went.

    Roles: the `keep` newest; steps that are a multiple of `every` (0: none); the steps `chosen`.
    """
    saved = trial.saved(first)
    gone = [c for c in saved[keep:] if c.step not in chosen and not (every and c.step and c.step % every == 0)]
    if gone and (flaw := saved[0].flaw()):
        raise RunError(f"{flaw}; the disk does not keep what is written")
    for place in gone:
        doomed = place.path.with_name(f"{place.path.name}.tmp-gone")  # a name that is no checkpoint if we die now
        os.rename(place.path, doomed)
        shutil.rmtree(doomed)
    return gone


def store(path: Path, tensors: Mapping[str, Tensor], write: Write = os.write) -> None:
    """Write a safetensors file, tensor by tensor without a second copy; same tensors, same bytes.

    NOTE the library's own writer hides a full disk in an error of its own and copies everything first.
    """
    header: dict[str, Any] = {}
    end = 0
    for name in sorted(tensors):
        t = tensors[name]
        header[name] = {
            "dtype": NAMES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [end, end + t.nbytes],
        }
        end += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb", buffering=0) as file:
        pieces = (_bytes(tensors[name]) for name in sorted(tensors))
        for piece in chain([len(text).to_bytes(8, "little") + text], pieces):
            left = memoryview(piece)
            while left:
                left = left[write(file.fileno(), left) :]


def thinned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, with SPARSE parts for each tensor of real numbers that takes more; -0 and nan are kept as they are."""
    found = {}
    for name, t in tensors.items():
        if t.is_floating_point() and t.numel():
            flat = t.detach().contiguous().reshape(-1)
            stays = flat.view(WORDS[t.element_size()]) != 0
            kept = flat[stays]
            bits = torch.from_numpy(np.packbits(stays.cpu().numpy(), bitorder="little"))
            parts = (bits, kept, torch.tensor(t.shape))
            if sum(p.nbytes for p in parts) < t.nbytes:
                found |= {f"{name}{part}": p for part, p in zip(SPARSE, parts, strict=True)}
                continue
        found[name] = t
    return found


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, those of SPARSE parts whole again."""
    found = load_file(path)
    for name in [n.removesuffix(SPARSE[0]) for n in found if n.endswith(SPARSE[0])]:
        bits, kept, shape = (found.pop(f"{name}{part}") for part in SPARSE)
        whole = torch.zeros(shape.tolist(), dtype=kept.dtype)
        stays = np.unpackbits(bits.numpy(), count=whole.numel(), bitorder="little").astype(bool)
        whole.view(-1)[torch.from_numpy(stays)] = kept
        found[name] = whole
    return found


def _bytes(t: Tensor) -> Any:
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() if t.numel() else b""


def _fill(path: Path, wanted: Mapping[str, Tensor], others: bool = False) -> None:
    """Copy a file's tensors into those of the same names; both sides must have the same, or the file `others` too."""
    found = read(path)
    if others:
        found = {name: tensor for name, tensor in found.items() if name in wanted}
    if {n: t.shape for n, t in found.items()} != {n: t.shape for n, t in wanted.items()}:
        odd = sorted(n for n in found.keys() | wanted.keys() if _shape(found, n) != _shape(wanted, n))[0]
        text = f"{path}: {odd}: {_shape(found, odd)} in the file, {_shape(wanted, odd)} in the model"
        raise RunError(f"{text}; it is of another configuration")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(found[name])


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    return str(list(tensors[name].shape)) if name in tensors else "absent"


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Same shape, dtype and bits; nan equals itself."""
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return np.array_equal(_bytes(a), _bytes(b))


def _files(
    place: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, more: Mapping[str, Tensor]
) -> tuple[tuple[Path, dict[str, Tensor]], ...]:
    """(file, its tensors in memory) for all but the random state."""
    state = dict(_optimizer_state(model, optimizer))
    return (place.model, model.state_dict()), (place.optim, state), (place.state, _rest(model) | dict(more))


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterable[tuple[str, Tensor]]:
    """Every state tensor under `<parameter>/<state>`."""
    for name, p in model.named_parameters():
        for key, tensor in optimizer.state[p].items():
            yield f"{name}/{key}", tensor


def _rest(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that do not count as weights."""
    persistent = model.state_dict()
    return {n: b for n, b in model.named_buffers() if n not in persistent}


def random_state() -> tuple[State, dict[str, Tensor]]:
    """(numbers, tensors) of the generators of Python, numpy, torch and all devices."""
    version, words, gauss = random.getstate()
    _, keys, *rest = np.random.get_state()
    tensors = {"torch": torch.get_rng_state(), "python": torch.tensor(words), "numpy": torch.from_numpy(keys)}
    if torch.cuda.is_initialized():
        tensors |= {f"cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return {"python": [version, gauss], "numpy": rest}, tensors


def set_random_state(numbers: State, tensors: Mapping[str, Tensor]) -> None:
    version, gauss = numbers["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    np.random.set_state(("MT19937", tensors["numpy"].numpy(), *numbers["numpy"]))
    torch.set_rng_state(tensors["torch"])
    if torch.cuda.is_initialized():
        torch.cuda.set_rng_state_all([tensors[f"cuda{i}"] for i in range(torch.cuda.device_count())])


def _deaths_loading(trial: TrialDir, place: Checkpoint) -> int:
    """Attempts whose last word is that they load this checkpoint."""
    count = 0
    for attempt in trial.attempts():
        path = attempt.path / trial.file("status").name  # where `supersede` puts it
        manifest = attempt.read("manifest")
        if path.exists() and not attempt.exit.exists() and manifest:
            resume = manifest["resume"]
            same = resume is not None and resume["checkpoint"] == place.name
            count += same and rundir.read_json(path, "status")["phase"] == "load"
    return count
