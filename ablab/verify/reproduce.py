# SPDX-License-Identifier: MIT
"""Runs a trial of a certificate again, from a fresh clone of the public repository, and compares."""

import os
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ablab import machine, provenance, rundir
from ablab.kconf import lex
from ablab.report import certificate, load
from ablab.report.certificate import CertificateError
from ablab.verify import _public

NOT_REPRODUCED, DIFFERS = 1, 3
GPU_TOLERANCE = 1e-3
"""Share by which a value may be off on a GPU, where sums have no fixed order."""
ASIDE = ("STUDY", "STUDY_STEPS")


class Original:
    """One trial of a certificate, with what was recorded of it; every file is held against its hash first."""

    def __init__(self, path: Path, body: Mapping[str, Any], trial: str | None) -> None:
        known = list(dict.fromkeys(i for claim in body["claims"] for i in claim["trials"]))
        self.id = trial or known[0]
        if self.id not in known:
            raise CertificateError(f"TRIAL={trial}: not in the certificate; trials: {' '.join(known)}")
        folder, pattern = path.absolute().parent.parent, rf"trials/{re.escape(self.id)}-[0-9a-f]{{8}}/config"
        place = next(Path(i["path"]).parent for i in body["inputs"] if re.fullmatch(pattern, i["path"]))
        if gone := [p for p in certificate.stale(body, folder) if Path(p).parent == place or p == "campaign.json"]:
            text = f"{folder / gone[0]}: is not there as the certificate vouches for it"
            raise CertificateError(f"{text}; give the whole bundle: CERT=CAMPAIGN.tar, or CERT= in its campaign")
        for part in rundir.PARTS:  # a bundle has no empty folders
            (folder / part).mkdir(exist_ok=True)
        self.body, self.c = body, load.read(folder, rehash=True)
        self.trial = next(t for t in self.c.trials if t.id == self.id)
        self.manifest = self.trial.dir.manifest() or {}
        self.commit, self.remote = self.manifest["code"]["commit"], self.manifest["code"].get("remote") or ""

    @property
    def config(self) -> str:
        """Its configuration, as one that runs alone and sends nothing."""
        requests = lex(self.trial.dir.config).requests
        return "".join(f'CONFIG_{r.name}=""\n' if r.name in ASIDE else f"{_line(r.name, r.text)}\n" for r in requests)

    def recorded(self, group: str, name: str) -> Any:
        """What the certificate says of a field for this trial."""
        values = next(f for f in self.body["groups"][group] if f["name"] == name)["values"]
        arm = next(a.label for a in self.c.arms.values() if self.trial in a.trials)
        value = values[arm]
        return value[str(self.trial.seed)] if isinstance(value, Mapping) and str(self.trial.seed) in value else value


def _line(name: str, text: str) -> str:
    return f"# CONFIG_{name} is not set" if text == "n" else f"CONFIG_{name}={text}"


def reproduce(cert: Path, trial: str | None, yes: bool, schemes: Collection[str] = ("https",)) -> int:
    """Print what is done and the verdict; the exit code: 0 reproduced or inside the interval, 1 not reproduced, 3 the
    environment or the data differ.  Raises CertificateError or PublicError when nothing can be run."""
    with ExitStack() as stack:
        if cert.name.endswith(".tar"):
            cert = _unpacked(cert, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ablab-"))))
        body = certificate.read(cert)
        if body["verdict"] != "issued":
            raise CertificateError(f"{cert}: was refused; only an issued certificate can be reproduced")
        o = Original(cert, body, trial)
        words = ["run", "NEW=1", "YES=1", "CHECK=0", "JOBS=1", "NAME=again", "O=results"]
        words += ["TRACKER=none"] if any(n.startswith("TRACK_") for n in o.trial.values) else []
        print(f"certificate {body['id'][:12]}, trial {o.id}, commit {o.commit}", flush=True)
        print(f"  git clone {o.remote}; git checkout {o.commit}\n  ablab {shlex.join(words)}", flush=True)
        if differing := list(environment(o.manifest)):
            print(*(f"environment differs: {line}" for line in differing), sep="\n")
            return _result(DIFFERS)
        _ask(yes)
        clone = stack.enter_context(_public.cloned(o.remote, schemes, "--no-checkout"))
        _public.git(clone, schemes, "checkout", "--quiet", "--detach", o.commit)
        (clone / ".config").write_text(o.config)
        code = _run(clone, words)
        again = load.read(clone / "results/again").trials[0] if (clone / "results/again").is_dir() else None
        if code or again is None or not again.is_done:
            print(f"not reproduced: the trial ended with exit {code}")
            return _result(NOT_REPRODUCED)
        return _result(compare(o, again))


def _result(code: int) -> int:
    print(f"RESULT: exit={code}")
    return code


def _unpacked(path: Path, folder: Path) -> Path:
    try:
        with tarfile.open(path) as tar:
            tar.extractall(folder, filter="data")
        return next(folder.glob("*/report/certificate.json"))
    except (OSError, tarfile.TarError, StopIteration) as error:
        raise CertificateError(f"{path}: cannot be read as a bundle; ablab bundle writes one") from error


def environment(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What decides bits and is not here as it was recorded."""
    here, now, was = machine.inventory(), provenance.software(), manifest["software"]
    names = [d["name"] for d in manifest["devices"]]
    pairs = {name: (was.get(name), now[name]) for name in ("python", "torch", "cuda", "hip", "driver")}
    packages = {n: v for n, v in was.get("packages", {}).items() if n not in pairs}
    pairs |= {name: (v, now["packages"].get(name)) for name, v in packages.items()}
    pairs["cpu"] = manifest["cpu"]["model"], here.cpu
    if names:
        pairs["device"] = names, [d.name for d in here.devices][: len(names)]
    yield from (f"{name}: {a} recorded, {b} here" for name, (a, b) in pairs.items() if a != b)


def _ask(yes: bool) -> None:
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise CertificateError("this runs code of the repository above; YES=1 says yes without a terminal")
    if input("clone and run it? [y/N] ").strip().lower() not in ("y", "yes"):
        raise CertificateError("nothing was run")


def _run(clone: Path, words: list[str]) -> int:
    """Run a verb of the cloned project, printing as it goes."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("ABLAB_", "CONFIG_", "MAKE", "MFLAGS"))}
    command = [sys.executable, "-m", "ablab", *words]
    env |= {"PYTHONPATH": str(clone)}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=clone, env=env, **pipe) as child:
        for line in child.stdout or ():
            print(f"  | {line}", end="", flush=True)
    return child.returncode


def compare(o: Original, again: load.Trial) -> int:
    """Print how the new trial compares; the exit code."""
    manifest = again.dir.manifest() or {}
    keys = ("name", "sha256", "tokenizer", "split", "preprocessing")
    odd = [k for k in keys if manifest["data"].get(k) != o.manifest["data"].get(k)]
    if odd or again.record["hash"] != o.trial.record["hash"]:
        print(f"environment differs: {'data ' + ' '.join(odd) if odd else 'the configuration is another trial'}")
        return DIFFERS
    weights = again.dir.saved()[0].read("checkpoint")["files"]["model.safetensors"]["sha256"]
    old, new = o.recorded("statistics", "value"), again.value(o.c.key, o.c.mode)
    print(f"{o.c.key}: {old} certified, {new} now")
    if weights == o.recorded("model", "weights"):
        print("reproduced: the final weights are equal, bit for bit")
        return 0
    if o.manifest["devices"] and new is not None and abs(new - old) <= GPU_TOLERANCE * abs(old):
        print(f"reproduced: within {GPU_TOLERANCE:g} of the value, the tolerance on a GPU")
        return 0
    for claim in o.body["claims"]:
        if o.id in claim["trials"] and claim["interval"] and new is not None:
            effect = claim["effect"] + (new - old) / claim["n"] * (1 if _is_left(o, claim) else -1)
            if claim["interval"][0] <= effect <= claim["interval"][1]:
                print(f"inside interval: with it the effect of {claim['contrast']} is {effect:+.4g}")
                return 0
    print("not reproduced")
    return NOT_REPRODUCED


def _is_left(o: Original, claim: Mapping[str, Any]) -> bool:
    pairs = {f"{a.label} - {b.label}": a for a, b, _ in o.c.pairs()}
    return claim["contrast"] not in pairs or o.trial in pairs[claim["contrast"]].trials
