"""The timeline: its figure, and a picture that shows what it was given."""

import numpy as np
import pytest
from PIL import Image

from cryosiam_dask.stages.predict import BlockTimes
from cryosiam_dask.stages.timeline import _marks, busy_share, write_timeline


def block(worker, start, seconds=1.0):
    return BlockTimes(worker, (start - 0.5, start), (start, start + seconds), (start + seconds, start + seconds + 0.5))


def test_busy_is_the_share_of_all_workers_time():
    one, two = "tls://10.0.0.1:40001", "tls://10.0.0.2:40001"
    assert busy_share([block(one, 10), block(one, 11)]) == pytest.approx(1)
    assert busy_share([block(one, 10), block(one, 13)]) == pytest.approx(0.5)
    assert busy_share([block(one, 10), block(two, 10), block(two, 11)]) == pytest.approx(3 / 4)
    assert busy_share([block(one, 10, 0.0)]) == 0


def test_the_picture_has_a_bar_for_every_step_of_every_block(tmp_path):
    blocks = [block(worker, start) for worker, start in (("a:7", 10), ("a:7", 12), ("b:7", 10.5))]
    write_timeline(tmp_path / "t.png", blocks, "tomogram")
    pixels = np.asarray(Image.open(tmp_path / "t.png")).astype(int)
    for colour in ((86, 180, 233), (213, 94, 0), (0, 158, 115)):
        rows = np.flatnonzero((pixels == colour).all(-1).any(1))
        lanes = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
        assert len(lanes) == 2  # one for each worker
        bars = [int((np.diff((pixels[lane[0]] == colour).all(-1).astype(int)) == 1).sum()) for lane in lanes]
        assert bars == [2, 1]


@pytest.mark.parametrize(("seconds", "step"), [(0.07, 0.005), (0.6, 0.05), (1, 0.1), (3.1, 0.5), (15, 1), (99, 10)])
def test_the_times_below_the_picture_are_round_and_evenly_apart(seconds, step):
    marks = _marks(seconds)
    assert marks == pytest.approx([step * n for n in range(len(marks))])
    assert seconds - step < marks[-1] <= seconds
