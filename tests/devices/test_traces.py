"""Traces: a small file by hand, a slow second derivation, and what is refused."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

from fedlabel.devices.clock import Devices, Work
from fedlabel.devices.traces import COLUMNS, CONFIGS, Trace, TracedMachines, find_trace, read_trace
from tests.devices.populations import devices

HEADER = ",".join(COLUMNS)
FILE = f"""{HEADER}
a,10,20,4,1,10
a,20,30,8,2,20
a,90,100,4,1,10
b,0,10,100,5,5
b,50,100,100,5,5
c,0,40,10,2,2
c,40,100,20,1,4
"""
"""a: 20 seconds at two speeds, and 10 at the end. b: a stretch from 50 to 110. c: always available."""
A, B, C = 0, 1, 2


def write(folder: Path, text: str) -> Path:
    path = folder / "trace.csv"
    path.write_text(text)
    return path


@pytest.fixture
def abc(tmp_path: Path) -> Devices:
    """The three devices of `FILE`, in its order."""
    machines = TracedMachines(read_trace(write(tmp_path, FILE)), np.arange(3))
    return Devices(machines, 3, (0, 0, 0), 0)


def test_who_is_available(abc: Devices) -> None:
    """Also in the second and the 1001st cycle of 100 seconds."""
    hand = {0.0: "bc", 9.9: "bc", 10.0: "ac", 29.5: "ac", 30.0: "c", 50.0: "bc", 89.9: "bc", 90.0: "abc", 99.9: "abc"}
    for cycle in (0, 1, 1000):
        for time, names in hand.items():
            found = abc.is_available(np.arange(3), 100.0 * cycle + time)
            assert "".join(name for name, there in zip("abc", found, strict=True) if there) == names, (cycle, time)


def test_how_long_they_stay(abc: Devices) -> None:
    assert [abc.stays(A, time) for time in (5.0, 10.0, 19.5, 20.0, 30.0, 95.0)] == [0, 20, 10.5, 10, 0, 5]
    assert [abc.stays(B, time) for time in (0.0, 10.0, 50.0, 99.0, 199.0)] == [10, 0, 60, 11, 11]
    assert abc.stays(C, 40.0) == abc.stays(C, 99.0) == math.inf


def test_who_comes_next(abc: Devices) -> None:
    each = [[abc.next_available(np.array([c]), time) for time in (5.0, 12.0, 35.0, 95.0, 100.0)] for c in (A, B, C)]
    assert each == [[10, 12, 90, 95, 110], [5, 50, 50, 95, 100], [5, 12, 35, 95, 100]]
    assert abc.next_available(np.array([A, B]), 35.0) == 50


def test_work_within_a_row(abc: Devices) -> None:
    """20 bytes at 10 per second, 4 forward and 2 backward passes at 4 and 2 per second, 3 bytes at 1 per second."""
    work = Work(4, 2, 20, 3)
    assert abc.seconds(A, work, 10.0) == (2, 2, 3)
    assert abc.finish(A, 10.0, work) == 17
    assert abc.finish(A, 310.0, work) == 317
    assert abc.finish(A, 9.0, work) == math.inf
    assert abc.seconds(A, work, 9.0) == (math.inf,) * 3


def test_work_goes_on_at_another_speed(abc: Devices) -> None:
    """From 16: 20 bytes until 18; 8 samples until 20, the other 8 until 21; 4 bytes, at 2 per second, until 23."""
    assert abc.finish(A, 16.0, Work(16, 0, 20, 4)) == 23
    assert abc.seconds(A, Work(16, 0, 20, 4), 16.0) == (2, 3, 2)
    assert abc.finish(A, 16.0, Work(8, 4, 20, 4)) == 23  # a backward pass is worth two forward ones
    assert abc.least(A, 16.0, 20, 4) == 21  # 2 bytes until 20, 2 until 21


def test_work_that_fills_the_stretch_or_is_too_much(abc: Devices) -> None:
    """From 16 on a has 4 * 4 + 10 * 8 = 96 samples, until 30."""
    assert abc.finish(A, 16.0, Work(96, 0, 0, 0)) == 30
    assert abc.finish(A, 16.0, Work(97, 0, 0, 0)) == math.inf
    assert abc.finish(A, 16.0, Work(96, 0, 0, 1)) == math.inf
    assert abc.seconds(A, Work(96, 0, 0, 1), 16.0) == (0, 14, math.inf)


def test_work_over_the_end_of_the_trace(abc: Devices) -> None:
    """b: 1100 samples from 98 take 11 seconds, until 109; 1300 would take until 111, and it leaves at 110."""
    assert abc.finish(B, 98.0, Work(1100, 0, 0, 0)) == 109
    assert abc.finish(B, 298.0, Work(1100, 0, 0, 0)) == 309
    assert abc.finish(B, 98.0, Work(1300, 0, 0, 0)) == math.inf
    assert abc.finish(B, 198.0, Work(1200, 0, 0, 0)) == 210


def test_work_over_many_cycles(abc: Devices) -> None:
    """c does 40 * 10 + 60 * 20 = 1600 samples in a cycle; from 90 on 200 until 100, 400 until 140, 20 until 141."""
    assert abc.finish(C, 90.0, Work(620, 0, 0, 0)) == 141
    assert abc.finish(C, 90.0, Work(620 + 1000 * 1600, 0, 0, 0)) == 100_141
    assert abc.finish(C, 90.0, Work(200 + 3 * 1600, 0, 0, 0)) == 400


def test_averages(abc: Devices) -> None:
    """a: 40 + 80 + 40 samples, 10 + 20 + 10 bytes up and 100 + 200 + 100 down in 30 of 100 seconds."""
    assert abc.profile(A)[:4] == pytest.approx((160 / 30, 80 / 30, 400 / 30, 40 / 30))
    assert abc.profile(A)[4:] == (math.inf, 0.3)
    assert abc.speed(np.array([C, A])).tolist() == [16, 160 / 30]
    assert abc.seconds(C, Work(16, 8, 0, 0)).total == 2
    assert abc.fits(np.arange(3), 1e30).all()
    summary = abc.summary()["trace"]
    assert (summary["devices"], summary["rows"], summary["seconds"]) == (3, 7, 100)


def random_trace(seed: int) -> Trace:
    """Returns rows of five devices that touch or not, with speeds that are no whole numbers."""
    rng, rows = np.random.default_rng(seed), []
    for device in range(5):
        at = int(rng.integers(0, 2) * rng.integers(0, 20))
        while at < 90:
            end = min(100, at + int(rng.integers(1, 30)))
            rows.append((device, at, end, *rng.uniform(0.1, 30, 3)))
            at = end + int(rng.integers(0, 2) * rng.integers(1, 20))
    device, start, end, speed, up, down = map(np.array, zip(*rows, strict=True))
    return Trace(tuple("abcde"), device, start, end, speed, up, down, "")


def slow_finish(trace: Trace, device: int, start: float, work: Work) -> float:
    """Returns `finish`, second by second and part by part."""
    cycle, now = int(trace.end.max()), start
    for amount, rate in (
        (work.bytes_down, trace.down),
        (work.forward + 2 * work.backward, trace.speed),
        (work.bytes_up, trace.up),
    ):
        while amount > 1e-9:
            begun = now // cycle * cycle
            mine = trace.device == device
            row = np.flatnonzero(mine & (trace.start <= now - begun + 1e-9) & (now - begun + 1e-9 < trace.end))
            if not len(row):
                return math.inf
            step = min(begun + float(trace.end[row[0]]) - now, amount / float(rate[row[0]]))
            now, amount = now + step, amount - step * float(rate[row[0]])
    return now


@pytest.mark.parametrize("seed", range(4))
def test_against_a_slow_derivation_and_never_below_the_bound(seed: int) -> None:
    trace, rng = random_trace(seed), np.random.default_rng(seed)
    found, finite = Devices(TracedMachines(trace, np.arange(5)), 5, (0, 0, 0), 0), 0
    for _ in range(300):
        client, start = int(rng.integers(5)), float(rng.uniform(0, 400))
        work = Work(*rng.uniform(0, [60, 30, 60, 60]).tolist())
        finish = found.finish(client, start, work)
        if math.isfinite(finish):
            assert finish == pytest.approx(slow_finish(trace, client, start, work), abs=1e-6)
            assert finish - start <= found.stays(client, start)
        else:
            assert slow_finish(trace, client, start, work) == math.inf
        assert finish >= found.least(client, start, work.bytes_down, work.bytes_up) >= start  # to the last bit
        finite += math.isfinite(finish)
        then = found.next_available(np.array([client]), start)
        assert found.is_available(np.array([client]), then)[0]
        between = [start + share * (then - start) for share in (0.01, 0.5, 0.99)]
        assert then == start or not any(found.is_available(np.array([client]), time)[0] for time in between)
        assert then >= start
        assert (then == start) == (found.stays(client, start) > 0)
    assert 30 < finite < 270


def test_rounding_makes_nothing_earlier_than_its_start_or_later_than_its_row(tmp_path: Path) -> None:
    rng, filled, last = np.random.default_rng(0), 0, 13
    for _ in range(300):
        first, second, start = (rng.random(3) * 10).tolist()
        rows = f"a,0,10,{first!r},1,1\na,10,{last},{second!r},1,1\na,20,30,1,1,1\n"
        machines = TracedMachines(read_trace(write(tmp_path, f"{HEADER}\n{rows}")), np.zeros(1, dtype=np.int64))
        found = Devices(machines, 1, (0, 0, 0), 0)
        assert found.finish(0, start, Work(1e-15, 0, 0, 0)) >= start
        finish = found.finish(0, start, Work((10 - start) * first + (last - 10) * second, 0, 0, 0))
        assert finish <= last or finish == math.inf
        assert found.finish(0, 0.0, Work(10 * first + (last - 10) * second, 0, 0, 0)) <= last
        filled += finish <= last
    assert filled > 100


def test_clients_get_the_devices_of_the_trace(tmp_path: Path) -> None:
    path, speeds = str(write(tmp_path, FILE)), [160 / 30, 100, 16]
    eight = devices(8, kind="trace", trace=path).speed(np.arange(8)).tolist()
    assert sorted(eight.count(speed) for speed in speeds) == [2, 3, 3]
    assert devices(8, kind="trace", trace=path).speed(np.arange(8)).tolist() == eight
    two = {tuple(devices(2, seed, kind="trace", trace=path).speed(np.arange(2)).tolist()) for seed in range(30)}
    assert len(two) == 6  # each pair of different devices in each order
    rarity = np.array([0.2, 0.0, 0.4])
    found = devices(3, rarity=rarity, kind="trace", trace=path, correlation=1.0)
    assert found.speed(np.arange(3)).tolist() == [16, 100, 160 / 30]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("a,5,15,1,1,1", r"data row 8: the times of client a, 5 to 15, overlap those of data row 1, 10 to 20"),
        ("d,5,5,1,1,1", r"data row 8: end \(=5\) must be greater than start \(=5\)"),
        ("d,-1,5,1,1,1", r"data row 8, column start \(=-1\): it must be a whole number of seconds"),
        ("d,0,5.5,1,1,1", r"data row 8, column end \(=5.5\): it must be a whole number of seconds"),
        ("d,0,1700000000,1,1,1", r"column end \(=1700000000\): .* from times of a calendar subtract the first"),
        ("d,0,5,0,1,1", r"data row 8, column speed \(=0\): it must be a positive number of samples per second"),
        ("d,0,5,1,-2,1", r"data row 8, column up \(=-2\): it must be a positive number of bytes per second"),
        ("d,0,5,1,1,fast", r"data row 8, column down: fast is not a number"),
        ("d,0,5,1,1,nan", r"data row 8, column down: nan is not a number"),
        ("d,0,5,1,1,", r"data row 8, column down: it is not a number"),
        (",0,5,1,1,1", r"data row 8, column client: it is empty"),
        ("d,0,5,1,1", r"line 9: there are 5 cells for 6 columns"),
    ],
)
def test_a_wrong_row_is_refused(row: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"`devices.trace` \(=trace.csv\).*{words}"):
        read_trace(write(tmp_path, f"{FILE}{row}\n"))


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("client,start,stop,speed,up,down", "has no column `end`: it needs client, start, end, speed, up, down"),
        ("client,start,end,speeds,up,down", r"has no column `speed`: .* Is it speeds\?"),
        (f"{HEADER},battery", "has columns that mean nothing here, battery: delete them"),
    ],
)
def test_wrong_columns_are_refused(header: str, words: str, tmp_path: Path) -> None:
    row = ",".join("1" for _ in header.split(","))
    with pytest.raises(ValueError, match=words):
        read_trace(write(tmp_path, f"{header}\n{row}\n"))


def test_a_missing_file_is_looked_for_below_the_configurations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_trace("devices/two_days.csv") == CONFIGS / "devices" / "two_days.csv"
    write(tmp_path, FILE)
    assert find_trace("trace.csv").resolve() == tmp_path / "trace.csv"
    with pytest.raises(ValueError, match=r"`devices.trace` \(=none.csv\) is no file: looked at .*/none.csv, .*configs"):
        find_trace("none.csv")


def test_the_shipped_trace_is_what_its_script_makes() -> None:
    path = CONFIGS / "devices" / "two_days.csv"
    spec = importlib.util.spec_from_file_location("make_trace", CONFIGS.parent / "scripts" / "make_trace.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert path.read_text() == script.trace()
    assert path.stat().st_size < 100_000


def test_at_night_more_phones_of_the_shipped_trace_are_there() -> None:
    found = devices(50, kind="trace", trace="devices/two_days.csv")
    share = [found.is_available(np.arange(50), 3600.0 * hour).mean() for hour in (2, 14, 26, 38)]
    assert min(share[::2]) > 0.7
    assert max(share[1::2]) < 0.1
    assert found.summary()["trace"]["devices"] == 50
