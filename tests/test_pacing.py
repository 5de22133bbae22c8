import time

from moth_jax.pacing import Pacer


def test_a_checkpoint_is_due_once_in_an_interval(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    pacer = Pacer(30.0)
    due = []
    for seconds in (10, 25, 5, 30, 31):
        now[0] += seconds
        due.append(pacer.due())
    assert due == [False, True, False, True, True]


def test_the_seconds_of_all_processes_are_counted(monkeypatch):
    clock, cpu = [100.0], [7.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(time, "process_time", lambda: cpu[0])
    first = Pacer(30.0)
    clock[0], cpu[0] = 110.0, 12.0
    assert first.spent() == {"seconds": 10.0, "cpu_seconds": 5.0}
    second = Pacer(30.0, first.spent())
    clock[0], cpu[0] = 113.0, 12.5
    assert second.spent() == {"seconds": 13.0, "cpu_seconds": 5.5}
