# SPDX-License-Identifier: MIT
"""Weights & Biases, online or to files that `wandb sync` uploads."""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ablab.track import NOTHING, ConflictError, Mark, Run, Track

OFFLINE = "offline-run-"  # how W&B begins the name of a folder
SEND_S = 4.0  # between two parcels to the service; W&B's own pace is 15
BLOCK, HEAD = 32768, 7  # of the log format of LevelDB, in which W&B keeps a run


class Mode(Enum):
    """Where rows go."""

    ONLINE = "online"
    OFFLINE = "offline"


class Wandb(Track, symbol="TRACK_WANDB"):
    """The row number is W&B's step, since a lower one is ignored; what counts as done is what the service, or the
    file, has."""

    package = "wandb"
    environment = ("WANDB_API_KEY", "WANDB_BASE_URL", "NETRC")

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """TRACK_WANDB_*."""

        entity: str
        """Owner of the project; empty is the default of the account."""
        mode: Mode

    @property
    def _is_offline(self) -> bool:
        return self.config.mode is Mode.OFFLINE

    def ready(self) -> None:
        self.installed()
        if not self._is_offline:
            import wandb

            try:
                wandb.Api(timeout=8)
            except wandb.errors.UsageError as error:
                text = "nobody is logged in: run wandb login, set WANDB_API_KEY, or choose TRACKER=wandb:offline"
                raise ValueError(text) from error

    def open(self, run: Run) -> Mark:
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # a crash report would name this host
        import wandb

        files = run.folder / "wandb"
        run.folder.mkdir(exist_ok=True)
        last = NOTHING
        if self._is_offline:
            for path in sorted(files.glob(f"{OFFLINE}*-{run.id}/run-{run.id}.wandb")):
                last = max([last, *(_mark(row) for _, row in history(path))])
        settings = wandb.Settings(
            console="off",
            silent=True,
            save_code=False,
            disable_git=True,
            init_timeout=9,
            x_disable_meta=True,
            disable_job_creation=True,
            x_disable_machine_info=not run.gpus,  # it would silence what x_disable_stats lets through
            x_disable_stats=not run.gpus,
            x_save_requirements=False,
            x_stats_gpu_device_ids=run.gpus,
            x_stats_disk_paths=(),
            x_transaction_log_flush_interval=0.5,
            x_file_stream_transmit_interval=SEND_S,
            host="",
            program="ablab",  # else the path of what runs
        )
        resume = None if self._is_offline else {"new": "never", "opening": "allow", "open": "must"}[run.state]
        try:
            self._wandb = wandb.init(
                project=self.section.project,
                entity=self.config.entity or None,
                id=run.id,
                name=run.name,
                group=run.group,
                job_type=run.job,
                config={**run.config},
                mode=self.config.mode.value,
                dir=str(run.folder),
                resume=resume,
                reinit="create_new",
                settings=settings,
            )
        except wandb.errors.UsageError as error:
            raise ConflictError(f"W&B: {error}") from error
        self._file = Path(self._wandb.settings.sync_file)
        self._read, self._ask = HEAD, 0.0
        self._sent: dict[int, Mark] = {}
        self._kept = last
        if not self._is_offline:
            self._kept = last = self._resumed(run)
        self._wandb.define_metric("*", step_metric="step")
        return last

    def row(self, mark: Mark, row: Mapping[str, float]) -> None:
        self._wandb.log(dict(row), step=mark.n, commit=True)  # else it waits for the next row
        self._sent[mark.n] = mark

    def kept(self) -> Mark:
        if self._is_offline:
            for end, row in history(self._file, self._read):
                self._read, self._kept = end, _mark(row)
        elif time.monotonic() >= self._ask:
            self._ask = time.monotonic() + SEND_S / 2
            self._kept = self._sent.get(self._remote().lastHistoryStep, self._kept)
            self._sent = {n: mark for n, mark in self._sent.items() if n >= self._kept.n}
        return self._kept

    def close(self, state: str) -> None:
        self._wandb.finish(exit_code=0 if state == "done" else 1)

    def address(self, run: Run) -> str:
        if self._is_offline:
            return str(run.folder / "wandb" / f"{OFFLINE}*-{run.id}")
        return "/".join(filter(None, [self.config.entity, self.section.project, run.id]))

    def fetch(self, address: str) -> tuple[Mapping[str, Any], list[dict[str, Any]]]:
        if OFFLINE in address:
            folder = Path(address)
            paths = sorted(p for f in folder.parent.glob(folder.name) for p in f.glob("run-*.wandb"))
            if not paths:
                raise ValueError(f"wandb:{address}: no such folder, or no run in it")
            return _config(paths[0]), [row for path in paths for _, row in history(path)]
        import wandb

        try:
            there = wandb.Api(timeout=8).run(address)
            return dict(there.config), list(there.scan_history())
        except (wandb.errors.CommError, wandb.errors.UsageError, ValueError) as error:
            text = f"wandb:{address}: {error}; write wandb:ENTITY/PROJECT/RUN, or a folder {OFFLINE}.."
            raise ValueError(text) from error

    def _remote(self) -> Any:
        import wandb

        return wandb.Api(timeout=8).run(self._wandb.path)

    def _resumed(self, run: Run) -> Mark:
        """The last row that the service has.  Raises ConflictError for a run of another trial."""
        step = self._wandb.step - 1
        if step < 0:
            return NOTHING
        there = self._remote()
        if there.config.get("trial") != run.config["trial"]:
            self._wandb.finish(exit_code=1)
            raise ConflictError(f"W&B has a run {run.id} of another trial")
        return Mark(int(there.summary["attempt"]), int(there.summary["q"]), step)


def _mark(row: Mapping[str, Any]) -> Mark:
    return Mark(int(row["attempt"]), int(row["q"]), int(row["_step"]))


def history(path: Path, start: int = HEAD) -> Iterator[tuple[int, dict[str, Any]]]:
    """(end, row) of a run's file from a place on, up to the first damage: before it, what a killed writer left is
    whole."""
    from wandb.proto.wandb_internal_pb2 import Record

    for end, data in _records(path, start):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            yield end, {name: math.nan if value == "NaN" else value for name, value in row.items()}


def _config(path: Path) -> dict[str, Any]:
    """Configuration in a run's file."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = (Record.FromString(data) for _, data in _records(path, HEAD))
    first = next((r.run.config.update for r in records if r.WhichOneof("record_type") == "run"), ())
    return {item.key: json.loads(item.value_json) for item in first}


def _records(path: Path, at: int) -> Iterator[tuple[int, bytes]]:
    """(end, record) of a log of LevelDB: blocks of chunks, each with checksum, length, and whether it is a whole
    record (1), its first (2), a middle (3) or the last (4) part.  The file begins with HEAD bytes of its own."""
    parts = b""
    with open(path, "rb") as file:
        while True:
            at += BLOCK - at % BLOCK if BLOCK - at % BLOCK < HEAD else 0
            file.seek(at)
            head = file.read(HEAD)
            size, kind = int.from_bytes(head[4:6], "little"), head[6:]
            chunk = file.read(size)
            if len(chunk) < size or kind not in (b"\1", b"\2", b"\3", b"\4"):
                return
            at, parts = at + HEAD + size, parts + chunk
            if kind in (b"\1", b"\4"):
                yield at, parts
                parts = b""
