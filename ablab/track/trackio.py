# SPDX-License-Identifier: MIT
"""Trackio: its files on this machine, or a Space."""

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ablab.track import NOTHING, ConflictError, Mark, Run, Track


class Trackio(Track, symbol="TRACK_TRACKIO"):
    """A run is found by its name alone, and a row that is sent twice is stored twice: so the name ends in our id, and
    after every batch we look at what is there."""

    package = "trackio"
    environment = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "TRACKIO_DIR")

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """TRACK_TRACKIO_*."""

        space: str
        """Empty keeps the rows on this machine."""

    def ready(self) -> None:
        self.installed()
        self._stay()
        if self.config.space:
            import huggingface_hub

            if huggingface_hub.get_token() is None:
                raise ValueError("a Space needs a login: run hf auth login, or set HF_TOKEN")

    def open(self, run: Run) -> Mark:
        self._stay()
        self._run, self._name = run, f"{run.name}-{run.id}"
        self._rows: list[tuple[Mark, Mapping[str, float]]] = []
        rows = self._stored()
        if run.state == "new" and rows:
            raise ConflictError(f"Trackio has a run {self._name} that this campaign did not make")
        if run.state == "open" and not rows:
            raise ConflictError(f"Trackio has lost the run {self._name}; ablab tracker sync FRESH=1 makes another")
        self._count, self._last = self._number() if rows else 0, NOTHING
        if rows:
            self._last = Mark(int(rows[-1]["attempt"]), int(rows[-1]["q"]), self._count - 1)
        return self._last

    def _stay(self) -> None:
        """Without a Space, keep it from asking the hub who the user is."""
        if not self.config.space:
            os.environ["HF_HUB_OFFLINE"] = "1"

    def row(self, mark: Mark, row: Mapping[str, float]) -> None:
        self._rows.append((mark, row))

    def kept(self) -> Mark:
        """Store what was sent in one go; a run is opened for that alone, since Trackio has one at a time."""
        if self._rows:
            import trackio

            with warnings.catch_warnings():
                warnings.simplefilter("error")  # Trackio warns where it drops rows
                run = trackio.init(
                    project=self.section.project,
                    name=self._name,
                    group=self._run.group,
                    config={**self._run.config, "job_type": self._run.job},
                    resume="must" if self._count else "never",
                    space_id=self.config.space or None,
                    auto_log_gpu=False,
                    auto_log_cpu=False,
                    embed=False,
                )
            for _, row in self._rows:
                run.log({n: v for n, v in row.items() if n != "step"}, step=int(row["step"]))
            run.finish()
            wanted, found = self._count + len(self._rows), self._number()
            if found != wanted:
                raise RuntimeError(f"Trackio has {found} rows of {self._name}, {wanted} were sent")
            self._count, self._last, self._rows = wanted, self._rows[-1][0], []
        return self._last

    def close(self, state: str) -> None:
        pass

    def address(self, run: Run) -> str:
        return f"{self.section.project}/{run.name}-{run.id}"

    def fetch(self, address: str) -> tuple[Mapping[str, Any], list[dict[str, Any]]]:
        from trackio.sqlite_storage import SQLiteStorage

        project, _, name = address.partition("/")
        if self.config.space:
            self._name = name
            return self._ask("/get_run_summary")["config"] or {}, self._ask("/get_logs")
        rows = SQLiteStorage.get_logs(project, name) if name else []
        if not rows:
            known = " ".join(SQLiteStorage.get_runs(project)[:8] if project else SQLiteStorage.get_projects())
            raise ValueError(f"trackio:{address}: no such run; write trackio:PROJECT/RUN; known: {known or 'none'}")
        return SQLiteStorage.get_run_config(project, name) or {}, rows

    def _stored(self) -> list[dict[str, Any]]:
        """All rows that are there, in order."""
        if self.config.space:
            return self._ask("/get_logs")
        from trackio.sqlite_storage import SQLiteStorage

        return SQLiteStorage.get_logs(self.section.project, self._name)

    def _number(self) -> int:
        """How many rows are there."""
        if self.config.space:
            return self._ask("/get_run_summary")["num_logs"]
        from trackio.sqlite_storage import SQLiteStorage

        return SQLiteStorage.get_log_count(self.section.project, self._name)

    def _ask(self, what: str) -> Any:
        import huggingface_hub
        from trackio.remote_client import RemoteClient

        client = RemoteClient(self.config.space, hf_token=huggingface_hub.get_token(), verbose=False)
        return client.predict(project=self.section.project, run=self._name, api_name=what)
