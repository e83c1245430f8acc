"""The gentle mode against a fake machine and a fake clock."""

import pytest

from mlxlora.training.pace import Host, Pace


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Fake(Host):
    def __init__(self, clock: Clock, battery_until: float = 0, hot_until: float = 0) -> None:
        self.clock, self.battery_until, self.hot_until = clock, battery_until, hot_until

    def on_battery(self) -> bool:
        return self.clock() < self.battery_until

    def hot(self) -> bool:
        return self.clock() < self.hot_until


@pytest.mark.parametrize("duty", [0.25, 0.5, 1.0])
def test_the_duty_cycle_is_kept(duty: float) -> None:
    clock = Clock()
    pace = Pace(duty, None, clock.sleep, clock)
    for _ in range(10):
        clock.now += 2.0
        list(pace.rest(lambda: False))
    assert clock.now == pytest.approx(20 / duty)


def test_what_came_before_the_first_step_is_no_reason_to_rest() -> None:
    clock = Clock()
    pace = Pace(0.5, None, clock.sleep, clock)
    clock.now += 300  # reading the model, trying small steps, validating
    pace.begin()
    clock.now += 2
    list(pace.rest(lambda: False))
    assert clock.now == pytest.approx(304)


def test_battery_and_heat_pause_and_it_goes_on_by_itself() -> None:
    clock = Clock()
    pace = Pace(1.0, Fake(clock, battery_until=100, hot_until=150), clock.sleep, clock)
    messages = list(pace.rest(lambda: False))
    assert "battery" in messages[0] and messages[-1] == "training goes on"
    assert 150 <= clock.now <= 165
    assert list(pace.rest(lambda: False)) == []


def test_a_stop_ends_every_pause() -> None:
    clock = Clock()
    pace = Pace(0.01, Fake(clock, battery_until=1e9), clock.sleep, clock)
    clock.now += 100
    list(pace.rest(lambda: clock.now > 105))
    assert clock.now < 120


def test_the_real_host_answers_everywhere() -> None:
    host = Host()
    assert host.on_battery() in (True, False) and host.hot() in (True, False)
    with host.awake():
        pass


@pytest.mark.parametrize(
    ("said", "battery", "hot"),
    [
        ("Now drawing from 'Battery Power'\n -InternalBattery-0 80%; discharging", True, False),
        ("Now drawing from 'AC Power'\n -InternalBattery-0 80%; charged", False, False),
        ("CPU_Scheduler_Limit = 100\nCPU_Available_CPUs = 8\nCPU_Speed_Limit = 70", False, True),
        ("Note: No thermal warning level has been recorded", False, False),
    ],
)
def test_what_macos_says_is_understood(monkeypatch: pytest.MonkeyPatch, said: str, battery: bool, hot: bool) -> None:
    host = Host()
    monkeypatch.setattr(host, "_ask", lambda *words: said)
    assert (host.on_battery(), host.hot()) == (battery, hot)
