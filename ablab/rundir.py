# SPDX-License-Identifier: MIT
# Size: names, schemas and writers of all result files stay in one file, so that no second one knows a name.
"""The files of results/: the only place that knows their names and schemas, and how they are written.

    results/.lock                         held while a campaign is looked for and created
    results/imported/<name>/              Imported: origin.json and metrics.jsonl of a run of another program
    results/.forecast.json                what earlier forecasts said, for `make plan`
    results/.measured.json                what a GPU has decided, for `make plan` and a second start
    results/.index/<campaign>/            derived by report/index.py, which alone reads it
    results/<campaign>/                   Campaign
      campaign.json auto.json amend-001.json status.json journal.jsonl journal.lock forecast.jsonl reserve.bin
      control/{stop sampler.log sampler-<boot>.lock}  report/
      mirror/<tracker>{.json,.cursor,.log,.lock,/}  what one tracker was sent (Mirror)
      trials/<id>-<hash8>/                TrialDir; its name is the key of the trial in journal and rows
        config lease.json manifest.json built.json status.json summary.json DONE
        checkpoints/step-00001000-a1/     Checkpoint: {model,optim,state,rank-<r>}.safetensors state.json
                                          manifest.json
        attempts/<n>/                     AttemptDir: manifest.json exit.json log.txt code.patch stacks.txt
                                          {metrics,telemetry,contracts}.jsonl, superseded files of the trial

JSON files are replaced atomically and checked against SCHEMAS when written and when read; unknown keys are
kept.  A `write` argument takes the place of os.write, so that a test can fill the disk.
"""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache, cached_property
from pathlib import Path
from typing import Any, BinaryIO

from ablab import metrics

Write = Callable[[int, bytes], int]
Guard = Callable[[], None]
RESERVE_BYTES = 4 << 20
SYNC_S = 10.0  # rows are made durable at checkpoints and this often
PATIENCE_S = 600.0  # how long a full disk is waited for
RETRY_S = 5.0
PARTS = ("control", "mirror", "report", "trials")  # folders of a campaign

# A name alone is a text, :i int, :f finite number, :b bool, :h SHA-256, :a any; ? may be null or absent.
# [] is a list and {} a map of texts, [:f] {:f} of numbers, [{..}] of objects, {*{..}} a map of objects,
# {name ..} an object.  Both kinds of status.json have a name of their own.
_CODE = "code{commit? dirty:b patch:h? tree:h}"
_TRIAL = (
    "trials[{id hash:h group:h step? title axes{:a} seed:i overrides[] superseded[]"
    " resources{gpus:i cpus:i mem_gib:f} forecast?{mem_gib[:f] hours?[:f]}}]"
)
SCHEMAS = {
    "campaign": "name created kind plan:h study?{name text sha256:h} base{layers[{origin sha256:h}] config}"
    " make_vars{} " + _TRIAL + " skipped[{axes{} reason}] contrasts[[]] registration{:a} auto{:a}"
    " policy{keep_going:b retries{:i} grace_s:i hang_s:i} " + _CODE + " data{name sha256:h tokens:i?}"
    " check{verdict sha256:h?} executor",
    "amend": "created reason " + _TRIAL,
    "campaign-status": "counts{:i} running[] eta_s:f? exit:i? result?",
    "lease": "lease:i attempt:i first:i fresh:b host pid:i proc_start:i boot_id executor job?",
    "manifest": "campaign trial{id hash:h group:h} attempt:i lease:i created config{*{value:a text origin}}"
    " resolved{compile amp tf32:a cudnn_benchmark:a attention_kernel lse_kernel? attend_chunk:i? step_kernel? threads:i"
    " workers:i}"
    " batch{micro:i accum:i world:i effective:i seq_len:i tokens_per_step:i} budget{kind limit:f}"
    " seeds{train:i data:i eval:i} data{name sha256:h tokenizer:h? split:h order_seed:i} " + _CODE + " software{python"
    " torch cuda? hip? driver? kernel} devices[{kind name uuid memory_bytes:i power_cap_w:f?}] cpu{model"
    " cores[:i]} env{} neighbours[] resume?{step:i checkpoint sha256:h drift[]}",
    "status": "state phase attempt:i lease:i pid:i proc_start:i boot_id host beat:i progress:i step:i"
    " tokens:i train_s:f eta_s:f? loss:f? devices[]",
    "summary": "trial attempt:i attempts:i stop primary{key value:f direction step:i} final{:f}"
    " best{*{value:f step:i}} used{steps:i tokens:i train_s:f startup_s:f compile_s:f warmup_s:f eval_s:f"
    " checkpoint_s:f data_s:f other_s:f total_s:f} perf{tok_per_s:f step_ms_p50:f step_ms_p95:f mfu:f?"
    " peak_mem_bytes:i epoch_s_mean:f?} model{params:i trainable:i fingerprint:h}"
    " contracts[{name ok:b expected:a measured:a}] forecast?{mem_gib[:f] hours?[:f] actual[:f]}",
    "exit": "state class? code:i message traceback? step:i",
    "done": "trial:h attempt:i lease:i campaign:h files{*{sha256:h bytes:i}}",
    "checkpoint": "step:i attempt:i files{*{sha256:h bytes:i}}",
    "metrics": "trial attempt:i resumed_at_step:i",
    "contracts": "trial attempt:i",
    "telemetry": "trial attempt:i period_ms:i",
    "forecasts": "tree:h machine made{*{mem_gib[:f] hours?[:f] items{:i} steps:i?}}",
    "mirror": "tracker state sent:i left:i recomputed:i error?",
    "cursor": "tracker",
    "origin": "address imported rows:i sha256:h gaps[] config{:a}",
    "measured": "tree:h machine made{:a}",
    "auto": "machine{cpu cores:i memory_bytes:i devices[]} chosen[{asked symbol value why}] measured:a?",
    **dict.fromkeys(("built", "state", "forecast", "journal"), ""),
}
_PLAIN: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "s": ("a text", lambda v: isinstance(v, str)),
    "i": ("an int", lambda v: type(v) is int),
    "f": ("a finite number", lambda v: type(v) in (int, float) and math.isfinite(v)),
    "b": ("true or false", lambda v: isinstance(v, bool)),
    "h": ("a SHA-256", lambda v: isinstance(v, str) and bool(re.fullmatch("[0-9a-f]{64}", v))),
    "a": ("anything", lambda v: True),
}
_line = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class RunError(ValueError):
    """A damaged, foreign or missing result file, or a name that may not be one; the text says what to do."""


class SupersededError(RunError):
    """A newer lease owns the trial: the process that gets this stops and publishes nothing."""


class DiskFullError(RunError):
    """No space within the patience of `patiently`; the trial stops, resumable (exit 75)."""


@cache
def _schema(kind: str) -> Any:
    tokens = re.findall(r":\w|\w+|[\[\]{}*?]", "{" + SCHEMAS[kind] + "}")
    return _node(tokens[::-1])[0] if SCHEMAS[kind] else {}


def _node(left: list[str]) -> tuple[Any, bool]:
    """(node, nullable) from reversed tokens: a letter of _PLAIN, [item], {"*": item} or {name: item}."""
    node: Any = "s"
    null = left[-1:] == ["?"] and bool(left.pop())
    token = left[-1] if left else ""
    if token == "{":
        left.pop()
        node = {"*": _node(left)} if left[-1] == "}" or left[-1][0] == ":" else {}
        while left[-1] != "}":
            name = left.pop()
            node[name] = _node(left)
        left.pop()
    elif token == "[":
        left.pop()
        node = [_node(left)]
        left.pop()
    elif token.startswith(":"):
        node = left.pop()[1]
    return node, (left[-1:] == ["?"] and bool(left.pop())) or null or node == "a"


def _flaw(value: Any, node: Any, null: bool) -> str | None:
    """Where in a value something is wrong and what, or None."""
    if value is None:
        return None if null else " is missing"
    if isinstance(node, str):
        wanted, fits = _PLAIN[node]
        return None if fits(value) else f" is {value!r:.60}, not {wanted}"
    parts: Iterable[tuple[Any, Any, Any]]
    if isinstance(node, list):
        if not isinstance(value, list | tuple):
            return f" is {value!r:.60}, not a list"
        parts = ((f"[{i}]", v, node[0]) for i, v in enumerate(value))
    elif not isinstance(value, Mapping):
        return f" is {value!r:.60}, not an object"
    elif "*" in node:
        parts = ((k, v, node["*"]) for k, v in value.items())
    else:
        parts = ((k, value.get(k), item) for k, item in node.items())
    for k, v, item in parts:
        if flaw := _flaw(v, *item):
            return f"{k}{flaw}" if isinstance(node, list) else f".{k}{flaw}"
    return None


def check(kind: str, payload: Any, place: Path) -> None:
    """Raises RunError when a payload lacks the keys and types of its kind."""
    if flaw := _flaw(payload, _schema(kind), False):
        raise RunError(f"{place}: {kind}{flaw}; the file was edited, damaged or written by another program")


def write_bytes(path: Path, data: bytes, *, guard: Guard | None = None, write: Write = os.write) -> None:
    """Replace a file atomically and durably.

    `guard` is called right before the new file takes the name.  When it raises, or anything else fails, the
    old file stays and the temporary one goes.
    """
    temporary = _temporary(path)
    try:
        with open(temporary, "xb", buffering=0) as file:
            _write_all(file.fileno(), data, write)
            os.fsync(file.fileno())
        if guard:
            guard()
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, kind: str, payload: Mapping[str, Any], **options: Any) -> None:
    """Replace a JSON file as write_bytes does (`guard`, `write`), checked against the schema of its kind.

    Raises RunError for a payload that does not fit, NaN included: write null.
    """
    check(kind, payload, path)
    try:
        text = json.dumps({"schema": f"ablab.{kind}/1", **payload}, indent=1, allow_nan=False)
    except ValueError as error:
        raise RunError(f"{path}: {error}; null stands for a value that is not finite") from error
    write_bytes(path, (text + "\n").encode(), **options)


def read_json(path: Path, kind: str) -> dict[str, Any]:
    """The content of a JSON file.

    Raises FileNotFoundError, or RunError for one that is damaged, a link, of another kind or major version.
    """
    with plain(path) as file:
        return _decode(file.read(), kind, path)


def _decode(data: bytes, kind: str, place: Path) -> dict[str, Any]:
    try:
        body = json.loads(data)
        tag = body["schema"]
    except (ValueError, TypeError, KeyError):
        raise RunError(f"{place}: damaged, or not of ablab; restore it or run the trial again") from None
    if tag != f"ablab.{kind}/1":
        raise RunError(f"{place}: schema {tag!r:.60}: this ablab reads 'ablab.{kind}/1'; use the other version")
    check(kind, body, place)
    return body


def plain(path: Path) -> BinaryIO:
    """The file opened for reading; RunError if it is a link."""
    return open(path, "rb", opener=no_link)


def no_link(path: str, flags: int) -> int:
    """An `opener` that refuses links."""
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise RunError(f"{path}: is a link; links below the results folder are not followed") from None
        raise


def stamp(path: Path) -> dict[str, Any]:
    """Hash and size of a file, as DONE and the manifests of checkpoints hold them."""
    with plain(path) as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": file.tell()}


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")


def _write_all(descriptor: int, data: bytes, write: Write) -> None:
    while data:
        data = data[write(descriptor, data) :]


def checked(name: str) -> str:
    """The name itself if a campaign or trial may have it.  Raises RunError."""
    if re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,99}", name) and ".." not in name:
        return name
    raise RunError(
        f"{name!r:.120}: not a name: lower-case letters, digits and . _ - are allowed, at most 100, a letter"
        " or digit first, no '..'; choose another one"
    )


def below(folder: Path, name: str) -> Path:
    """folder/name, which need not exist.  Raises RunError if `name` is none or the path is a link."""
    path = folder / name if name == "DONE" else folder / checked(name)
    if path.is_symlink():
        raise RunError(f"{path}: is a link; links below the results folder are not followed")
    return path


def _changed(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The first of `files` (relative path -> stamp) that is not what its stamp says, or None."""
    for name, record in files.items():
        path = folder
        for part in name.split("/"):
            path = below(path, part)
        if not path.is_file() or stamp(path) != record:
            return f"{path}: is not what was vouched for; run the trial again"
    return None


def patiently(
    campaign: "Campaign",
    action: Callable[[], Any],
    *,
    wait: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Any:
    """The result of `action`, repeated while the disk is full: once the reserve is freed, then every RETRY_S.

    `wait` may raise to end it early.  Raises DiskFullError after PATIENCE_S.
    """
    start = clock()
    while True:
        try:
            return action()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            if campaign.reserve.exists():
                campaign.reserve.unlink(missing_ok=True)
                continue
            if clock() - start >= PATIENCE_S:
                raise DiskFullError(f"{campaign.path}: the disk is full; free space, then make continue") from error
            wait(RETRY_S)


class _Folder:
    """A folder of JSON files, each with a kind."""

    FILES: Mapping[str, str] = {}

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    def file(self, kind: str) -> Path:
        """Path of the file of a kind."""
        return self.path / self.FILES[kind]

    def read(self, kind: str) -> dict[str, Any] | None:
        """Content of the file of a kind, None if there is none.  Raises RunError."""
        try:
            return read_json(self.file(kind), kind)
        except FileNotFoundError:
            return None

    def write(self, kind: str, payload: Mapping[str, Any], **options: Any) -> None:
        """Replace the file of a kind; options are `guard` and `write`."""
        write_json(self.file(kind), kind, payload, **options)


class Campaign(_Folder):
    """One started execution of a plan."""

    FILES = {"campaign": "campaign.json", "auto": "auto.json", "campaign-status": "status.json"}

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.journal = path / "journal.jsonl"
        self.lock = path / "journal.lock"
        self.forecast = path / "forecast.jsonl"
        self.reserve = path / "reserve.bin"
        self.stop_file = path / "control" / "stop"
        self.sampler_log = path / "control" / "sampler.log"
        self.mirror = path / "mirror"
        self.report = path / "report"
        self.certificate = self.report / "certificate.json"
        self.index = path.parent / ".index" / path.name

    def sampler_lock(self, boot_id: str) -> Path:
        """What the one sampler of a host, told by its boot, holds."""
        return self.path / "control" / f"sampler-{hashlib.sha256(boot_id.encode()).hexdigest()[:12]}.lock"

    @classmethod
    def create(
        cls,
        results: Path,
        name: str,
        content: Mapping[str, Any],
        configs: Mapping[str, str] | None = None,
        numbered: bool = False,
        auto: Mapping[str, Any] | None = None,
    ) -> "Campaign":
        """Make the folder and freeze the plan in it; campaign.json comes last and makes it a campaign.

        `configs` maps every trial folder to its resolved `.config`, `auto` is what auto.json holds.  A name that is
        taken is a RunError, or gets .2, .3, .. if `numbered`.  Nothing is created when name or content do not fit.
        """
        check("campaign", {**content, "name": checked(name)}, results / name)
        folders = [folder_of(t) for t in content["trials"]]
        results.mkdir(parents=True, exist_ok=True)
        path = below(results.resolve(), name)
        for number in range(2, 1000 if numbered else 2):
            if not path.exists():
                break
            path = path.with_name(f"{name}.{number}")
        try:
            path.mkdir()
        except FileExistsError:
            raise RunError(f"{path}: exists; choose another NAME=, or make continue CAMPAIGN={name}") from None
        campaign = cls(path)
        for part in PARTS:
            (path / part).mkdir()
        campaign.reserve.write_bytes(bytes(RESERVE_BYTES))
        campaign._add(dict.fromkeys(folders, "") if configs is None else configs, folders)
        if auto is not None:
            campaign.write("auto", auto)
        campaign.write("campaign", {**content, "name": path.name})
        return campaign

    @classmethod
    def open(cls, path: Path) -> "Campaign":
        """The campaign in a folder.  Raises RunError when there is none or its plan is damaged."""
        campaign = cls(below(path.parent.resolve(), path.name))
        for part in PARTS:
            below(campaign.path, part)
        assert campaign.content
        return campaign

    @property
    def content(self) -> dict[str, Any]:
        """The frozen plan, campaign.json."""
        return self._frozen[0]

    @property
    def hash(self) -> str:
        """SHA-256 of campaign.json as it was when it was read; it never changes."""
        return self._frozen[1]

    @cached_property
    def _frozen(self) -> tuple[dict[str, Any], str]:
        path = self.file("campaign")
        try:
            with plain(path) as file:
                data = file.read()
        except (FileNotFoundError, NotADirectoryError):
            raise RunError(f"{self.path}: no campaign.json, so it is no campaign; make ls lists those") from None
        body = _decode(data, "campaign", path)
        for trial in body["trials"]:
            folder_of(trial)
        return body, hashlib.sha256(data).hexdigest()

    def status(self) -> dict[str, Any] | None:
        """How far it is: the content of status.json."""
        return self.read("campaign-status")

    def write_status(self, payload: Mapping[str, Any]) -> None:
        """Replace status.json."""
        self.write("campaign-status", payload)

    def mirrors(self) -> list["Mirror"]:
        """The trackers that this campaign was mirrored to."""
        return [Mirror(self, p.stem) for p in sorted(self.mirror.glob("*.json"))]

    def amend(self, payload: Mapping[str, Any], configs: Mapping[str, str]) -> Path:
        """Add trials, under the journal's lock.  Returns the path of the new amendment."""
        path = self.path / f"amend-{len(self._amendments()) + 1:03}.json"
        check("amend", payload, path)
        self._add(configs, [folder_of(t) for t in payload["trials"]])
        write_json(path, "amend", payload)
        return path

    def records(self) -> dict[str, dict[str, Any]]:
        """Trial folder -> its record in the plan, amendments included, in plan order."""
        paths = self._amendments()
        if len(paths) not in self._known:
            parts = (self.content, *(read_json(p, "amend") for p in paths))
            self._known[len(paths)] = {folder_of(t): t for part in parts for t in part["trials"]}
        return self._known[len(paths)]

    def trials(self) -> list["TrialDir"]:
        """All trials of the plan, in plan order."""
        return [TrialDir(self, folder, record) for folder, record in self.records().items()]

    def trial(self, folder: str) -> "TrialDir":
        """The trial of a folder.  Raises RunError when the plan has none of that name."""
        records = self.records()
        if checked(folder) not in records:
            raise RunError(f"{self.path}: the plan has no trial {folder}; trials: {_list(folder, list(records))}")
        return TrialDir(self, folder, records[folder])

    @cached_property
    def _known(self) -> dict[int, dict[str, dict[str, Any]]]:
        return {}

    def _amendments(self) -> list[Path]:
        return sorted(self.path.glob("amend-[0-9][0-9][0-9].json"))

    def _add(self, configs: Mapping[str, str], folders: list[str]) -> None:
        assert sorted(configs) == sorted(folders), "a configuration for each trial"
        made = [below(self.path / "trials", folder) for folder in configs]
        for path in made:
            for part in (path, path / "attempts", path / "checkpoints"):
                part.mkdir()
            (path / "config").write_text(configs[path.name], encoding="utf-8")
        # all files first: then the first sync takes the others along, 5,000 trials in seconds
        for path in made:
            sync(path / "config")
            sync(path)
        sync(self.path / "trials")


class Mirror(_Folder):
    """What one tracker was sent: a state for people, a cursor for the next mirror process, its log."""

    def __init__(self, campaign: Campaign, name: str) -> None:
        super().__init__(campaign.mirror)
        self.name = checked(name)
        self.campaign = campaign
        self.FILES = {"mirror": f"{name}.json"}
        self.cursor = below(self.path, f"{name}.cursor")
        self.log = below(self.path, f"{name}.log")
        self.lock = below(self.path, f"{name}.lock")
        self.data = below(self.path, name)
        """Folder for the files of a tracker that writes some."""

    def state(self) -> dict[str, Any] | None:
        """How far it is: {tracker state sent left recomputed error}."""
        return self.read("mirror")


class Imported(_Folder):
    """A run of another program, as a tracker had it: read-only, and never comparable."""

    FILES = {"origin": "origin.json"}

    def __init__(self, results: Path, name: str) -> None:
        super().__init__(below(results / "imported", name))
        self.metrics = self.path / "metrics.jsonl"

    def origin(self) -> dict[str, Any]:
        """Where it came from: {address imported rows sha256 gaps config}.  Raises RunError where there is none."""
        if (found := self.read("origin")) is None:
            raise RunError(f"{self.path}: nothing is imported under this name; ablab tracker import brings a run")
        return found

    def rows(self) -> Iterator[dict[str, Any]]:
        """Its rows, as `rows` gives those of a trial; names are those of the other program."""
        return itertools.islice(lines(self.metrics, "metrics"), 1, None)

    def seal(self, address: str, config: Mapping[str, Any], gaps: list[str], count: int) -> None:
        """Write origin.json last, and let nobody write any more."""
        made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        facts = {"address": address, "imported": made, "rows": count, "sha256": stamp(self.metrics)["sha256"]}
        self.write("origin", {**facts, "gaps": gaps, "config": config})
        for path in (self.metrics, self.file("origin")):
            path.chmod(0o444)


def imported(results: Path) -> list[Imported]:
    """What was imported below a results folder."""
    names = sorted(p.parent.name for p in (results / "imported").glob("*/origin.json"))
    return [Imported(results, name) for name in names]


def forecasts(results: Path) -> Path:
    """Where forecasts are kept from one plan to the next."""
    return results / ".forecast.json"


def measured(results: Path) -> Path:
    """Where that is kept which a device has decided."""
    return results / ".measured.json"


def scores(results: Path) -> Iterator[dict[str, Any]]:
    """Forecast and actual of every trial that finished below a results folder; damaged lines are left out."""
    for path in sorted(results.glob("*/forecast.jsonl")):
        with contextlib.suppress(RunError):
            yield from (row for row in lines(path, "forecast") if "actual" in row)


def folder_of(record: Mapping[str, Any]) -> str:
    """Folder name of a trial record, <id>-<hash8>.  Raises RunError for an id that may not be a name."""
    return checked(f"{record['id']}-{record['hash'][:8]}")


def campaigns(results: Path, damage: list[str] | None = None) -> list[Campaign]:
    """The campaigns below a results folder, oldest first; links and other folders are left out, and those reported in
    `damage` whose plan is damaged."""
    found = []
    for path in results.resolve().glob(f"*/{Campaign.FILES['campaign']}"):
        try:
            found.append(Campaign.open(path.parent))
        except RunError as error:
            if damage is not None:
                damage.append(str(error))
    return sorted(found, key=lambda c: (c.content["created"], c.name))


@contextlib.contextmanager
def alone(results: Path) -> Iterator[None]:
    """Hold the lock of a results folder: looking for a campaign and creating it must be one step."""
    # POSIX locks work over NFS, and the kernel drops them with their process
    with open(results / ".lock", "ab", opener=no_link) as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        yield


def find(results: Path, selector: str) -> Campaign:
    """The campaign of a name, the start of one, a path, or `latest`.  Raises RunError, naming what exists."""
    if "/" in selector:
        return Campaign.open(Path(selector))
    if (results / checked(selector)).is_dir():
        return Campaign.open(results / selector)
    known = campaigns(results)
    hits = known[-1:] if selector == "latest" else [c for c in known if c.name.startswith(selector)]
    if len(hits) == 1:
        return hits[0]
    what = "several campaigns" if hits else "no such campaign"
    raise RunError(f"{results}: {selector}: {what}; known: {_list(selector, [c.name for c in hits or known])}")


def _list(wanted: str, names: list[str]) -> str:
    near = get_close_matches(wanted, names, 3)
    return " ".join([*near, *(n for n in names if n not in near)][:8]) or "none"


class TrialDir(_Folder):
    """One trial of a campaign: what its newest attempt says, its attempts and its checkpoints."""

    FILES = {
        "done": "DONE",
        **{kind: f"{kind}.json" for kind in ("summary", "status", "built", "manifest", "lease")},
    }

    def __init__(self, campaign: Campaign, folder: str, record: Mapping[str, Any] | None = None) -> None:
        super().__init__(below(campaign.path / "trials", folder))
        self.campaign = campaign
        self.record = record or campaign.records()[folder]
        """Its record in the plan: id hash group step title axes seed overrides .."""
        self.config = self.path / "config"
        self.checkpoints = self.path / "checkpoints"

    def lease(self) -> dict[str, Any] | None:
        """Who may write here: the content of lease.json."""
        return self.read("lease")

    def manifest(self) -> dict[str, Any] | None:
        """What ran: the content of manifest.json."""
        return self.read("manifest")

    def built(self) -> dict[str, Any] | None:
        """What was built: the content of built.json."""
        return self.read("built")

    def status(self) -> dict[str, Any] | None:
        """Where it is: the content of status.json."""
        return self.read("status")

    def summary(self) -> dict[str, Any] | None:
        """What came out: the content of summary.json."""
        return self.read("summary")

    def guard(self, lease: int) -> Guard:
        """For the `guard` of a writer: raises SupersededError unless `lease` is the newest."""

        def owns() -> None:
            newest = self.lease()
            if newest is None or newest["lease"] != lease:
                raise SupersededError(f"{self.path}: lease {lease} was taken over; this attempt publishes nothing")

        return owns

    def attempt(self, number: int) -> "AttemptDir":
        """The attempt of a number, which need not exist."""
        return AttemptDir(self, number)

    def attempts(self) -> list["AttemptDir"]:
        """Existing attempts, oldest first."""
        names = (p.name for p in (self.path / "attempts").iterdir())
        return [AttemptDir(self, n) for n in sorted(int(n) for n in names if n.isdecimal())]

    def new_attempt(self, number: int) -> "AttemptDir":
        """Make the folder of an attempt."""
        attempt = AttemptDir(self, number)
        attempt.path.mkdir()
        sync(attempt.path.parent)
        return attempt

    def checkpoint(self, step: int, attempt: int) -> "Checkpoint":
        """The checkpoint of a step and attempt, which need not exist."""
        return Checkpoint(below(self.checkpoints, f"step-{step:08}-a{attempt}"), step, attempt)

    def saved(self, first: int = 1) -> list["Checkpoint"]:
        """Checkpoints of attempt `first` (of lease.json) or later, the one to resume from first."""
        names = [re.fullmatch(r"step-(\d{8,})-a(\d+)", p.name) for p in self.checkpoints.iterdir()]
        found = [self.checkpoint(int(m[1]), int(m[2])) for m in names if m]
        return sorted((c for c in found if c.attempt >= first), key=lambda c: (-c.step, -c.attempt))

    def supersede(self, lease: int) -> None:
        """The first act of the child of a new lease.

        DONE goes, then the other files of the earlier attempt, into its folder; left-over temporary files are
        removed.  Raises SupersededError.
        """
        self.guard(lease)()
        before = max((a.number for a in self.attempts()[:-1]), default=1)
        for path in (self.file(kind) for kind in self.FILES if kind != "lease"):
            if path.exists():
                number = re.search(rb'"attempt": (\d+)', path.read_bytes())
                owner = self.attempt(int(number[1]) if number else before)
                os.replace(path, (owner if owner.path.is_dir() else self.attempt(before)).path / path.name)
        for path in [*self.path.glob("*.tmp-*"), *self.checkpoints.glob("*.tmp-*")]:
            if path.name.startswith(self.FILES["lease"]):
                continue  # the runner's, which writes our pid into it just now
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        sync(self.path)

    def flaw(self) -> str | None:
        """Why this trial is not done, or None: DONE exists and all it vouches for is unchanged."""
        try:
            done, lease = self.read("done"), self.lease()
            if done is None:
                return f"{self.path}: not finished"
            if lease is None or done["lease"] != lease["lease"] or done["trial"] != self.record["hash"]:
                return f"{self.file('done')}: not of the newest lease of this trial; run it again"
            if done["campaign"] != self.campaign.hash:
                return f"{self.campaign.file('campaign')}: is not what DONE of {self.name} vouches for"
            if missing := set(self._required(done["attempt"])) - set(done["files"]):
                return f"{self.file('done')}: does not vouch for {min(missing)}; run the trial again"
            return _changed(self.path, done["files"])
        except RunError as error:
            return str(error)

    def done(self) -> bool:
        """True if DONE exists and all its hashes verify; nothing else makes a trial done."""
        return self.flaw() is None

    def _required(self, attempt: int) -> list[str]:
        rows = self.attempt(attempt).metrics.relative_to(self.path)
        return ["config", *(self.FILES[k] for k in ("manifest", "built", "summary")), str(rows)]


class AttemptDir(_Folder):
    """One process execution of a trial."""

    FILES = {"manifest": "manifest.json", "exit": "exit.json", "summary": "summary.json"}

    def __init__(self, trial: TrialDir, number: int) -> None:
        super().__init__(below(below(trial.path, "attempts"), str(number)))
        self.trial = trial
        self.number = number
        self.manifest = self.file("manifest")
        self.exit = self.file("exit")
        self.log = self.path / "log.txt"
        self.patch = self.path / "code.patch"
        self.stacks = self.path / "stacks.txt"
        self.metrics = self.path / "metrics.jsonl"
        self.telemetry = self.path / "telemetry.jsonl"
        self.contracts = self.path / "contracts.jsonl"

    def replaced(self) -> dict[str, Any] | None:
        """The summary that it had left of its trial, once a later start has moved that here."""
        return self.read("summary")

    @classmethod
    def open(cls, path: Path) -> "AttemptDir":
        """The attempt in a folder: what a child gets.  Raises RunError."""
        trial = path.absolute().parent.parent
        return Campaign.open(trial.parent.parent).trial(trial.name).attempt(int(path.name))


class Checkpoint(_Folder):
    """One checkpoint.  Its files are written into `begin()`, then `seal()` and `commit()` publish them."""

    FILES = {"state": "state.json", "checkpoint": "manifest.json"}

    def __init__(self, path: Path, step: int, attempt: int) -> None:
        super().__init__(path)
        self.step = step
        self.attempt = attempt
        self.model = path / "model.safetensors"
        self.optim = path / "optim.safetensors"
        self.state = path / "state.safetensors"

    def rank(self, rank: int) -> Path:
        """Random state of a rank."""
        return self.path / f"rank-{rank}.safetensors"

    def begin(self) -> "Checkpoint":
        """A temporary folder beside it, with the same file names."""
        path = _temporary(self.path)
        path.mkdir()
        return Checkpoint(path, self.step, self.attempt)

    def seal(self) -> None:
        """Make all files durable and write manifest.json: size and hash of each."""
        paths = sorted(self.path.iterdir())
        for path in paths:
            sync(path)
        files = {p.name: stamp(p) for p in paths}
        self.write("checkpoint", {"step": self.step, "attempt": self.attempt, "files": files})

    def commit(self, temporary: "Checkpoint", guard: Guard | None = None) -> None:
        """Give a sealed temporary folder the name; an older folder of that name goes."""
        if guard:
            guard()
        if self.path.exists():
            os.rename(self.path, _temporary(self.path))
        os.rename(temporary.path, self.path)
        sync(self.path.parent)

    def flaw(self) -> str | None:
        """Why it cannot be used, or None: every file is what manifest.json says."""
        try:
            manifest = self.read("checkpoint")
            return _changed(self.path, manifest["files"]) if manifest else f"{self.path}: has no manifest"
        except RunError as error:
            return str(error)

    def reject(self) -> Path:
        """Rename a bad folder, so that it is not used again.  Returns the new path."""
        return self.path.rename(self.path.with_name(f"bad-{self.name}-{secrets.token_hex(2)}"))


def publish(
    trial: TrialDir, attempt: int, lease: int, files: Iterable[str] | None = None, write: Write = os.write
) -> None:
    """Write DONE, the last act of a trial that ended well.

    `files`, relative to the trial, are by default what must be vouched for: config, manifest, built, summary,
    all metrics and contracts, the manifest of each checkpoint.  Raises RunError when one is missing,
    SupersededError when the lease is not the newest.
    """
    if files is None:
        kinds = ("attempts/*/metrics.jsonl", "attempts/*/contracts.jsonl", "checkpoints/step-*/manifest.json")
        found = [str(p.relative_to(trial.path)) for kind in kinds for p in sorted(trial.path.glob(kind))]
        files = [*trial._required(attempt), *(f for f in found if ".tmp-" not in f)]
    try:
        stamps = {name: stamp(trial.path / name) for name in files}
    except FileNotFoundError as error:
        raise RunError(f"{error.filename}: missing; without it the trial cannot be done") from error
    record = {
        "trial": trial.record["hash"],
        "attempt": attempt,
        "lease": lease,
        "campaign": trial.campaign.hash,
    }
    trial.write("done", {**record, "files": stamps}, guard=trial.guard(lease), write=write)


class Rows:
    """Appender of a JSONL file: a header, then whole lines, each in one append.

    A line that the disk has no room for leaves nothing behind and can be written again.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        header: Mapping[str, Any],
        *,
        write: Write = os.write,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check(kind, header, path)
        self._write = write
        self._clock = clock
        self._q = 0
        self._fd = no_link(str(path), os.O_CREAT | os.O_RDWR | os.O_APPEND)
        self._size = os.fstat(self._fd).st_size
        self._synced = clock()
        if not self._size:
            self.line({"schema": f"ablab.{kind}/1", **header})
        elif os.pread(self._fd, 1, self._size - 1) != b"\n":
            self._append(b"\n")

    def row(self, step: int, m: Mapping[str, float], **axes: float) -> None:
        """Append a row of metrics; `axes` are tokens, train_s, wall_s and flops.

        A value that is not finite becomes null and is named in `bad`.  No sync, except once in SYNC_S.
        Raises MetricError for a name that is not registered.
        """
        for name in m:
            metrics.get(name)
        bad = [name for name, value in m.items() if not math.isfinite(value)]
        values = {**m, **dict.fromkeys(bad)} if bad else m
        self.line({"q": self._q, "t": self._clock(), "step": step, **axes, "m": values, "bad": bad})
        self._q += 1

    def line(self, payload: Mapping[str, Any]) -> None:
        """Append any row."""
        self._append(_line(payload).encode() + b"\n")
        if self._clock() - self._synced >= SYNC_S:
            self.sync()

    def sync(self) -> None:
        """Make all rows durable; called at checkpoints."""
        os.fsync(self._fd)
        self._synced = self._clock()

    def close(self) -> None:
        """Sync and close."""
        try:
            self.sync()
        finally:
            os.close(self._fd)

    def _append(self, data: bytes) -> None:
        try:
            _write_all(self._fd, data, self._write)
        except OSError:
            os.ftruncate(self._fd, self._size)
            raise
        self._size += len(data)


def lines(path: Path, kind: str, damage: list[str] | None = None, wanted: str = "") -> Iterator[dict[str, Any]]:
    """Header and rows of a JSONL file; nothing if there is none.

    A torn last line is dropped, other bad lines are skipped and reported in `damage`.  Only the header and
    lines that match the regular expression `wanted` are decoded.  Raises RunError for a foreign header.
    """
    match = re.compile(wanted.encode()).search
    try:
        file = plain(path)
    except FileNotFoundError:
        return
    with file:
        first = file.readline()
        if first.endswith(b"\n"):
            yield _decode(first, kind, path)
        for number, line in enumerate(file, 2):
            if not match(line) or not line.endswith(b"\n"):
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                yield row
            elif damage is not None:
                damage.append(f"{path}:{number}: not a row; skipped")


class Tail:
    """Rows of a JSONL file that grows."""

    def __init__(self, path: Path) -> None:
        self._file = plain(path)
        self._file.readline()  # the header

    def read(self, limit: int) -> list[dict[str, Any]]:
        """At most `limit` rows that are whole and new; a damaged one is skipped, as `lines` does."""
        found: list[dict[str, Any]] = []
        while len(found) < limit:
            at = self._file.tell()
            line = self._file.readline()
            if not line.endswith(b"\n"):
                self._file.seek(at)
                break
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get("m"), dict):
                    found.append(row)
        return found

    def unread(self) -> int:
        """Number of lines that `read` has not given yet."""
        at = self._file.tell()
        count = sum(block.count(b"\n") for block in iter(lambda: self._file.read(1 << 20), b""))
        self._file.seek(at)
        return count

    def close(self) -> None:
        self._file.close()


def settled_from(targets: Sequence[tuple[float, float | None]]) -> float:
    """Step from which on a trial is as sparse as it ends, by its (step, sparsity/target), 0 for a dense one.  Before
    it, values are of other models, so no extreme is looked for there."""
    return next((step for step, target in targets if target == targets[-1][1]), 0)


def rows(
    trial: TrialDir, names: Iterable[str] | None = None, damage: list[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of a trial over its attempts in order: {q t step tokens train_s wall_s flops m bad attempt}.

    Each attempt counts up to the step where the next one resumed, so that (step, name) is unique; one that
    began at step 0 voids the earlier ones.  `names` keeps these metrics only and does not decode rows without
    one.  Bad lines are skipped and reported in `damage`.
    """
    chosen = None if names is None else tuple(dict.fromkeys(names))
    wanted = "" if chosen is None else '"(?:' + "|".join(map(re.escape, chosen)) + ')"'
    readers = [(a.number, lines(a.metrics, "metrics", damage, wanted)) for a in trial.attempts()]
    parts = [(n, header["resumed_at_step"], reader) for n, reader in readers if (header := next(reader, None))]
    starts = {start for _, start, _ in parts}
    seen: set[tuple[int, str]] = set()  # at a step where one resumed both attempts may have written
    for i, (number, _, reader) in enumerate(parts):
        last = min((start or -1 for _, start, _ in parts[i + 1 :]), default=math.inf)
        for row in reader:
            step, m = row.get("step"), row.get("m")
            if not isinstance(step, int) or not isinstance(m, dict):
                if damage is not None:
                    damage.append(f"{trial.attempt(number).metrics}: a row without step and m; skipped")
                continue
            if step > last:
                continue
            if chosen is not None:
                m = {n: m[n] for n in chosen if n in m}
            if step in starts:
                m = {n: v for n, v in m.items() if (step, n) not in seen}
                seen.update((step, n) for n in m)
            if m:
                row["m"], row["attempt"] = m, number
                yield row
