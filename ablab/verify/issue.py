# SPDX-License-Identifier: MIT
"""Publication checks: a certificate, or every reason why there is none.  A pure function of directories and git."""

import re
import tarfile
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ablab import rundir
from ablab.report import certificate, load, page
from ablab.report.certificate import CertificateError
from ablab.report.load import Arm, Loaded
from ablab.report.stats import Verdict
from ablab.rundir import Campaign, RunError
from ablab.verify import _page, _public
from ablab.verify._fields import GROUPS
from ablab.verify._judge import Judge

KINDS = ("quality", "speed", "memory")
CERTIFICATE = "report/certificate.json"
REFUSED = 3
HTTPS = ("https",)


def certify(
    campaign: Campaign | Path,
    claim: Sequence[str] = (),
    kind: str = "quality",
    key: Path | None = None,
    schemes: Collection[str] = HTTPS,
) -> dict[str, Any]:
    """Judge the claims of a campaign and write certificate.json and certificate.html; returns the certificate.

    `claim` names arms whose registered contrasts are claimed, all by default; `key` signs.  `schemes` are those that
    the public repository may have.  Raises RunError for a claim that does not exist.
    """
    c = load.read(campaign, rehash=True)
    body = judged(c, claim, kind)
    _publish(body, c, schemes)
    return _write(c.dir, body, key)


def judged(c: Loaded, claim: Sequence[str], kind: str, weights: bool = True) -> dict[str, Any]:
    """The certificate of a campaign, but for the question whether its commits are public.  `weights`: they are there,
    and are hashed again too; a bundle has none."""
    c = _sound(c)
    claims = _claims(c, claim)
    judge = Judge(c, claims, kind, weights)
    judge.judge()
    for t in c.trials:
        if t.state == load.DAMAGED and (gone := re.search(r": (\S+) is missing", t.reason)):
            judge.lacks(t, re.sub(r"\[\d+\]", "", gone[1]))
    try:
        files = certificate.inputs(c.dir)
    except (OSError, RunError) as error:
        why = f"{error}: DONE vouches for what is not there"
        judge.refuse("integrity.inputs", "C", {}, why, "restore the file, or make rerun")
        files = [{"path": "campaign.json", "sha256": c.dir.hash}]
    return {
        "schema": "ablab.certificate/1",
        "issued": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "kind": kind,
        "verdict": "refused" if judge.findings else "issued",
        "campaign": c.name,
        "claims": [_claim(c, *claimed) for claimed in claims],
        "groups": judge.groups,
        "published": _published(judge, files),
        "inputs": files,
        "findings": judge.findings,
    }


def _sound(c: Loaded) -> Loaded:
    """The campaign with trials counted as damaged whose files lack a key, though DONE vouches for them."""
    trials = {}
    for t in c.trials:
        try:
            assert not t.is_done or (t.summary and t.dir.manifest() and t.dir.built() is not None)
            trials[t.dir.name] = t
        except RunError as error:
            trials[t.dir.name] = replace(t, fate=(load.DAMAGED, str(error)))
    arms = {k: replace(a, trials=tuple(trials[t.dir.name] for t in a.trials)) for k, a in c.arms.items()}
    return replace(c, trials=tuple(trials.values()), arms=arms)


def _claims(c: Loaded, wanted: Sequence[str]) -> list[tuple[Arm, Arm, Verdict]]:
    found = [(a, b, v) for (a, b, registered), v in zip(c.pairs(), page.judge(c), strict=True) if registered or wanted]
    labels = dict.fromkeys(name for a, _, v in found for name in (a.text, v.contrast.label))
    if unknown := [w for w in wanted if w not in labels]:
        raise RunError(f"CLAIM={unknown[0]}: no such contrast in {c.name}; arms that are compared: {', '.join(labels)}")
    found = [(a, b, v) for a, b, v in found if not wanted or {a.text, v.contrast.label} & set(wanted)]
    if not found:
        raise RunError(f"{c.name}: compares nothing, so there is nothing to certify; register a contrast in a study")
    return found


def _claim(c: Loaded, left: Arm, right: Arm, v: Verdict) -> dict[str, Any]:
    low, high, level = v.interval or (None, None, None)
    return {
        "contrast": v.contrast.label,
        "metric": f"{c.key} {c.mode}",
        "unit": c.metric.unit,
        "effect": v.effect,
        "interval": None if v.interval is None else [low, high],
        "level": level,
        "n": v.n,
        "p": v.p,
        "p_family": v.p_family,
        "word": v.word,
        "trials": [t.id for arm in (left, right) for t in arm.trials if t.is_done],
    }


def _published(judge: Judge, files: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """The seven fields; None where a trial has no record."""
    values = {f"{group}.{f['name']}": f["values"] for group, fields in judge.groups.items() for f in fields}
    absent = {f["field"] for f in judge.findings if "no record" in f["why"]}

    def pick(*names: str) -> dict[str, Any] | None:
        return None if absent & set(names) else {n.partition(".")[2]: _one(values[n]) for n in names}

    seconds = {arm: [t.summary["used"]["train_s"] for t in trials] for arm, trials in judge.arms.items()}
    product = [values[f"batch.{n}"] for n in ("micro", "accumulation", "world", "effective", "sequence")]
    text = "{} micro x {} accumulation x {} ranks = {} sequences of {}"
    return {
        "commit": (pick("code.commit") or {}).get("commit"),
        "tracker": {**pick("mirror.project", "mirror.runs"), **_bundle(judge.c.name, files)},
        "hardware": pick("hardware.model", "hardware.count", "hardware.memory"),
        "time_per_method": {a: {"train_s": s, "mean_s": sum(s) / len(s)} for a, s in seconds.items() if s} or None,
        "effective_batch": pick("batch.effective")
        and _one({arm: text.format(*(part.get(arm) for part in product)) for arm in judge.arms}),
        "compile": (pick("execution.compile") or {}).get("compile"),
        "data": pick("data.id", "data.files", "data.tokenizer", "data.preprocessing"),
    }


def _one(values: Mapping[str, Any]) -> Any:
    """The value that all arms share, else that of each."""
    first, *others = values.values()
    return first if all(v == first for v in others) else dict(values)


def _bundle(name: str, files: Sequence[Mapping[str, str]]) -> dict[str, str]:
    return {"bundle": certificate.bundle_hash(files), "address": f"{name}.tar"}


def _publish(body: dict[str, Any], c: Loaded, schemes: Collection[str]) -> None:
    """Add whether the commits are public, and from where."""
    claimed = {i for claim in body["claims"] for i in claim["trials"]}
    codes = [(t.dir.manifest() or {}).get("code") or {} for t in c.trials if t.id in claimed]
    places: dict[tuple[str, str], dict[str, str]] = {}
    for code in codes:
        place = code.get("remote") or "", code.get("commit") or "none"
        places.setdefault(place, {}).update(code.get("modules") or {})
    if study := c.content["study"]:  # registered where everybody can read it
        place = next(iter(places))[0], c.content["code"]["commit"] or "none"
        places.setdefault(place, {})[f"studies/{study['name']}.study"] = study["sha256"]
    why: dict[str, str] = {}
    for remote in {place for place, _ in places}:
        ran = {commit: modules for (place, commit), modules in places.items() if place == remote}
        why |= _public.unreachable(remote, ran, schemes)
    body["groups"]["code"] = [f for f in body["groups"]["code"] if f["name"] != "public"]
    body["findings"] = [f for f in body["findings"] if f["field"] != "code.public"]
    values = {commit: remote for remote, commit in sorted(places)}
    entry = {"name": "public", "rule": "C", "values": values, "status": "refused" if why else "passed"}
    body["groups"]["code"].append(entry)
    if why:
        text = "; ".join(dict.fromkeys(why.values()))
        fix = "push the commit to a branch of the public repository, then make verify COMMIT_ONLY=1"
        body["findings"].append({"field": "code.public", "rule": "C", "values": values, "why": text, "fix": fix})
    body["verdict"] = "refused" if body["findings"] else "issued"


def _write(campaign: Campaign, body: dict[str, Any], key: Path | None) -> dict[str, Any]:
    campaign.report.mkdir(exist_ok=True)
    body = certificate.write(campaign.certificate, body, key)
    rundir.write_bytes(campaign.certificate.with_suffix(".html"), _page.html(body).encode())
    return body


def commit_only(campaign: Campaign, key: Path | None = None, schemes: Collection[str] = HTTPS) -> dict[str, Any]:
    """Complete a certificate that was refused for nothing but its commit, which could not be looked up then.

    Raises CertificateError when there is none, or its inputs have changed.
    """
    body = certificate.read(campaign.certificate)
    if gone := certificate.stale(body, campaign.path):
        raise CertificateError(f"{campaign.certificate}: stale: {gone[0]} has changed since; make verify judges anew")
    # judged again all the same: whoever can edit a certificate can give it the identity of what it says then
    c = load.read(campaign, rehash=True)
    body = judged(c, [claim["contrast"] for claim in body["claims"]], body["kind"])
    _publish(body, c, schemes)
    return _write(campaign, body, key)


def bundle(campaign: Campaign, out: Path) -> Path:
    """Write a tar of the certificate and all that it vouches for; RECHECK= works on a copy of it anywhere.

    Raises CertificateError when no certificate holds.
    """
    if certificate.valid(campaign) is None:
        raise CertificateError(
            f"{campaign.certificate}: no certificate holds; make verify CAMPAIGN={campaign.name} first"
        )
    paths = [*(entry["path"] for entry in certificate.inputs(campaign)), CERTIFICATE]
    with tarfile.open(out, "w") as tar:
        for name in sorted(paths):
            data = (campaign.path / name).read_bytes()
            with tempfile.SpooledTemporaryFile() as file:
                info = tarfile.TarInfo(f"{campaign.name}/{name}")  # no owner, no time: same content, same bytes
                info.size = file.write(data)
                file.seek(0)
                tar.addfile(info, file)
    return out


def recheck(path: Path) -> tuple[dict[str, Any], list[str]]:
    """(certificate, what no longer holds) of a certificate in its campaign, or of a bundle (.tar): form, identity,
    signature, the hash of every input, and the judgement itself, made again from the files."""
    if not path.name.endswith(".tar"):
        return _rechecked(path, path.absolute().parent.parent, True)
    with tempfile.TemporaryDirectory(prefix="ablab-") as folder:
        try:
            with tarfile.open(path) as tar:
                tar.extractall(folder, filter="data")
        except (OSError, tarfile.TarError) as error:
            raise CertificateError(f"{path}: cannot be read as a bundle: {error}") from error
        found = list(Path(folder).glob(f"*/{CERTIFICATE}"))
        if len(found) != 1:
            raise CertificateError(f"{path}: holds {len(found)} certificates, not one; ablab bundle writes it")
        return _rechecked(found[0], found[0].parent.parent, False)


def _rechecked(path: Path, folder: Path, weights: bool) -> tuple[dict[str, Any], list[str]]:
    body = certificate.read(path)
    wrong = [f"{name}: is not what the certificate vouches for" for name in certificate.stale(body, folder)]
    if wrong:
        return body, wrong
    for part in rundir.PARTS:  # a bundle has no empty folders
        (folder / part).mkdir(exist_ok=True)
    c = load.read(folder, rehash=True)
    again = judged(c, [claim["contrast"] for claim in body["claims"]], body["kind"], weights)
    wrong += [f"{f['field']}: {f['why']}" for f in again["findings"]]
    if not weights:  # a bundle has no tracker beside it: what one held is taken from the certificate
        again["groups"]["mirror"] = body["groups"]["mirror"]
        again["published"]["tracker"] = body["published"]["tracker"]
    for part in ("claims", "inputs", "published"):
        wrong += [] if again[part] == body[part] else [f"{part}: the files give another one"]
    for name in GROUPS:
        mine = [f for f in body["groups"][name] if f"{name}.{f['name']}" != "code.public"]
        wrong += [] if again["groups"][name] == mine else [f"{name}: the files give other values"]
    return body, wrong


def listing(body: Mapping[str, Any], fallen: bool = False) -> str:
    """A certificate as text: claims, then either the seven published fields or every finding; `fallen`: it does not
    hold any more."""
    lines = [f"{body['campaign']}: {body['verdict']}, {body['kind']}, {body['id'][:12]}"]
    for c in body["claims"]:
        if c["effect"] is not None:
            span = "{:+.4g} .. {:+.4g} ({:.1%})".format(*c["interval"], c["level"]) if c["interval"] else "-"
            p = "no test" if c["p"] is None else f"p {c['p']:.3g}"
            lines.append(f"  {c['contrast']}: {c['effect']:+.4g} {c['unit']}, {span}, n={c['n']}, {p}, {c['word']}")
    for f in body["findings"]:
        values = ", ".join(f"{arm}: {str(v)[:80]}" for arm, v in f["values"].items())
        lines += [f"REFUSED {f['field']} ({f['rule']}): {f['why']}", f"    {values}", f"    fix: {f['fix']}"]
    if not body["findings"]:
        lines += [f"  {name}: {_brief(value)}" for name, value in body["published"].items()]
    said = "does not hold" if fallen else body["verdict"]
    lines.append(f"RESULT: exit={REFUSED if fallen or body['findings'] else 0} {said} {body['campaign']}")
    return "\n".join(lines)


def _brief(value: Any) -> str:
    """For people; certificate.json has all of it."""
    if isinstance(value, Mapping):
        long = lambda v: isinstance(v, list | Mapping) and len(v) > 4
        return ", ".join(f"{len(v)} {k}" if long(v) else f"{k} {_brief(v)}" for k, v in value.items())
    if isinstance(value, list):
        return " ".join(map(_brief, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
