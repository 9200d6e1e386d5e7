from __future__ import annotations

from pathlib import Path

import pytest
import torch

from siftrl import state


def test_stream_passes_through_all_rows_before_any_comes_again() -> None:
    stream = state.PromptStream(10, seed=3)
    drawn = torch.cat([stream.draw(5), stream.draw(5)])
    assert sorted(drawn.tolist()) == list(range(10))
    assert stream.passes == 0


def test_stream_never_repeats_a_row_within_a_draw() -> None:
    stream = state.PromptStream(10, seed=0)
    for _ in range(50):
        rows = stream.draw(7).tolist()  # 7 does not divide 10: every other draw runs over the end of a pass
        assert len(set(rows)) == 7
    assert stream.passes == 34


def test_stream_goes_on_where_it_was() -> None:
    stream = state.PromptStream(11, seed=1)
    for _ in range(4):
        stream.draw(6)
    other = state.PromptStream(11, seed=99)
    other.load_state_dict(stream.state_dict())
    for _ in range(5):
        assert torch.equal(stream.draw(6), other.draw(6))


def test_stream_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="draws 11 candidates a step, but the data set has 10 rows"):
        state.PromptStream(10, seed=0).draw(11)
    with pytest.raises(ValueError, match="data set of 10 rows, this one has 12"):
        state.PromptStream(12, seed=0).load_state_dict(state.PromptStream(10, seed=0).state_dict())


def make_checkpoint(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    state.save_file(checkpoint / "siftrl.pt", {"step": step, "tensor": torch.arange(step)})
    state.seal(checkpoint, step=step)
    return checkpoint


def test_last_checkpoint_is_the_newest_complete_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert state.last_checkpoint(tmp_path) is None
    older, newer = make_checkpoint(tmp_path, 9), make_checkpoint(tmp_path, 100)
    assert state.last_checkpoint(tmp_path) == newer  # 100 > 9 as numbers, not as text
    content = (newer / "siftrl.pt").read_bytes()
    (newer / "siftrl.pt").write_bytes(content[: len(content) // 2])
    assert state.last_checkpoint(tmp_path) == older
    assert "siftrl.pt has" in caplog.text
    (older / state.MANIFEST).unlink()
    assert state.last_checkpoint(tmp_path) is None
    assert "not written to its end" in caplog.text


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, 1)
    (checkpoint / "siftrl.pt").unlink()
    assert state.damage(checkpoint) == "its file siftrl.pt is missing"


def test_checkpoints_after_a_step_are_discarded(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        make_checkpoint(tmp_path, step)
    state.discard_after(tmp_path, 2)
    assert [state.step_of(path) for path in state.checkpoints(tmp_path)] == [1, 2]


def test_files_load_without_running_code(tmp_path: Path) -> None:
    state.save_file(tmp_path / "a.pt", {"x": [1, 2.5, "three", None], "t": torch.ones(2)})
    loaded = state.load_file(tmp_path / "a.pt")
    assert loaded["x"] == [1, 2.5, "three", None]
    torch.save({"x": Path("/")}, tmp_path / "b.pt")  # an object that only code could rebuild
    with pytest.raises(Exception, match="Weights only load failed"):
        state.load_file(tmp_path / "b.pt")
