"""Event files are read as far as they are intact."""

from __future__ import annotations

import struct
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto

from lightning_gradguard.report.readers.runs import read_run
from lightning_gradguard.report.render.html import to_html
from tests.report.runs import report_of, write_events


def test_scalars_stored_as_tensors_are_read() -> None:
    """As TensorFlow 2 and `tensorboard.summary` write them."""
    tensors = [
        TensorProto(dtype=1, float_val=[3.0]),
        TensorProto(dtype=2, tensor_content=struct.pack("<d", 4.0)),
        TensorProto(dtype=1, float_val=[1.0, 2.0]),
    ]
    Path("run").mkdir()
    with Path("run/events.out.tfevents.1").open("wb") as file:
        for step, tensor in enumerate(tensors):
            value = Summary.Value(tag="grad_norm", tensor=tensor)
            record = Event(step=step, summary=Summary(value=[value])).SerializeToString()
            file.write(struct.pack("<QI", len(record), 0) + record + bytes(4))
    assert read_run("run", Path("run")).log.gradients[0].total.values == [3.0, 4.0]


def test_empty_event_file() -> None:
    Path("run").mkdir()
    Path("run/events.out.tfevents.1").touch()
    found = report_of("run")
    assert found.verdict.status == "unknown"
    assert any("is empty" in note for note in found.notes)
    assert any("neither a loss nor a gradient norm" in note for note in found.notes)
    to_html([found])


def test_truncated_file_is_read_up_to_its_end() -> None:
    path = write_events("run", {"train_loss": [2.0 * 0.9**i for i in range(50)]})
    (file,) = path.iterdir()
    file.write_bytes(file.read_bytes()[:-20])
    found = report_of(path)
    assert len(found.run.log.loss) == 49
    assert any("cut off or damaged after 50 records" in note for note in found.notes)


def test_files_of_another_format_are_reported() -> None:
    Path("run").mkdir()
    Path("run/events.out.tfevents.1").write_bytes(struct.pack("<QI", 8, 0) + b"\xff" * 12)
    Path("run/events.out.tfevents.2").write_text("this is no event file, it only has the name of one")
    notes = report_of("run").notes
    assert any("tfevents.1 is damaged after 0 records" in note for note in notes)
    assert any("tfevents.2 is cut off or damaged after 0 records" in note for note in notes)
