# SPDX-License-Identifier: MIT
"""TensorBoard: event files, a folder for each trial, written anew by each mirror process."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ablab.track import NOTHING, Mark, Run, Track


class Tensorboard(Track, symbol="TRACK_TENSORBOARD"):
    """Event files.  All rows are rewritten beside the old files, which go once the new ones are complete.

    The file carries no host name, unlike that of TensorBoard's own writer, and the clock of its events is that of the
    trial: equal rows give equal bytes.
    """

    package = "tensorboard"
    rebuilds = True

    def ready(self) -> None:
        self.installed()

    def open(self, run: Run) -> Mark:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._place, self._aside, self._last = run.folder / run.name, run.folder / f".{run.name}", NOTHING
        shutil.rmtree(self._aside, ignore_errors=True)
        self._aside.mkdir(parents=True)
        self._file = open(self._aside / "events.out.tfevents.0", "wb")  # noqa: SIM115
        self._records = RecordWriter(self._file)
        text = "\n".join(f"    {name}: {value}" for name, value in run.config.items())
        kind = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
        config = Summary(value=[Summary.Value(tag="config", tensor=tensor, metadata=kind)])
        for event in (Event(file_version="brain.Event:2"), Event(summary=config)):
            self._records.write(event.SerializeToString())
        return NOTHING

    def row(self, mark: Mark, row: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items() if name != "step"]
        event = Event(wall_time=row["wall_s"], step=int(row["step"]), summary=Summary(value=values))
        self._records.write(event.SerializeToString())
        self._last = mark

    def kept(self) -> Mark:
        self._file.flush()
        if self._aside.exists():
            shutil.rmtree(self._place, ignore_errors=True)
            os.rename(self._aside, self._place)  # the open file goes along
        return self._last

    def close(self, state: str) -> None:
        self._file.close()

    def address(self, run: Run) -> str:
        return str(run.folder / run.name)

    def fetch(self, address: str) -> tuple[Mapping[str, Any], list[dict[str, Any]]]:
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

        paths = sorted(Path(address).glob("events.out.tfevents.*"))
        if not paths:
            raise ValueError(f"tensorboard:{address}: no event files")
        events = [event for path in paths for event in LegacyEventFileLoader(str(path)).Load()]
        texts = [v.tensor.string_val[0] for e in events for v in e.summary.value if v.tag == "config"]
        lines = (line.partition(":") for line in texts[0].decode().splitlines()) if texts else ()
        values = [(event.step, [v for v in event.summary.value if v.HasField("simple_value")]) for event in events]
        config = {name.strip(): value.strip() for name, _, value in lines}
        return config, [{"step": step, **{v.tag: v.simple_value for v in found}} for step, found in values if found]
