"""Meters: a live sensor counts, wraps included; any other gives None and says why, never 0."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace

import pytest

from offramp.energy import meter
from offramp.energy.meter import Measured, Meter, cpu_meter, gpu_meter

RANGE_UJ = 262_143_328_850


class FakeRapl:
    """A powercap folder whose counters move when told to."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def zone(self, name: str, label: str, energy_uj: int = 10**9) -> None:
        folder = self.root / name
        folder.mkdir(parents=True)
        (folder / "name").write_text(label + "\n")
        (folder / "energy_uj").write_text(f"{energy_uj}\n")
        (folder / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")

    def spend(self, joules: float, name: str = "intel-rapl:0") -> None:
        path = self.root / name / "energy_uj"
        path.write_text(f"{(int(path.read_text()) + int(joules * 1e6)) % RANGE_UJ}\n")


@pytest.fixture
def rapl(tmp_path: Path) -> FakeRapl:
    return FakeRapl(tmp_path / "powercap")


def measured(meter: Meter, work: Callable[[], None]) -> Measured | None:
    with meter.measure() as reading:
        assert reading.measured is None  # not before the end
        work()
    assert (reading.measured is None) == (reading.reason is not None)
    return reading.measured


def test_a_live_counter_measures(rapl: FakeRapl) -> None:
    rapl.zone("intel-rapl:0", "package-0")
    made = cpu_meter(rapl.root, load=lambda: rapl.spend(20))
    assert made.is_live and made.reason is None
    found = measured(made, lambda: rapl.spend(3.25))
    assert found is not None
    assert found.joules == pytest.approx(3.25)
    assert found.sources == ("rapl package-0",)
    assert found.label == "measured, rapl package-0, the rest of the machine included"
    assert found.seconds > 0
    with pytest.raises(FrozenInstanceError):
        found.joules = 1.0  # type: ignore[misc]


def test_the_load_runs_once_and_before_the_block(rapl: FakeRapl) -> None:
    rapl.zone("intel-rapl:0", "package-0")
    loads: list[None] = []

    def load() -> None:
        loads.append(None)
        rapl.spend(20)

    made = cpu_meter(rapl.root, load)
    for _ in range(2):
        found = measured(made, lambda: rapl.spend(1))
        assert found is not None and found.joules == pytest.approx(1)
    assert len(loads) == 1


@pytest.mark.parametrize("under_load", [0.0, 0.5])
def test_a_counter_that_hardly_moves_is_no_meter(rapl: FakeRapl, under_load: float) -> None:
    rapl.zone("intel-rapl:0", "package-0")
    made = cpu_meter(rapl.root, load=lambda: rapl.spend(under_load))
    assert not made.is_live
    assert measured(made, lambda: rapl.spend(50)) is None
    assert made.reason == (
        f"rapl package-0 counted {under_load:.2f} J under load, at most 0.5: not alive"
    )


def test_wraps_are_counted_in_load_and_run(rapl: FakeRapl) -> None:
    rapl.zone("intel-rapl:0", "package-0", energy_uj=RANGE_UJ - 10**6)
    found = measured(cpu_meter(rapl.root, load=lambda: rapl.spend(4)), lambda: rapl.spend(7))
    assert found is not None and found.joules == pytest.approx(7)

    def nearly_round() -> None:
        rapl.spend(RANGE_UJ / 1e6 - 5)

    found = measured(cpu_meter(rapl.root, load=lambda: rapl.spend(4)), nearly_round)
    assert found is not None and found.joules == pytest.approx(RANGE_UJ / 1e6 - 5)


def test_long_runs_are_looked_at_between_wraps(
    rapl: FakeRapl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meter, "_LOOK_S", 0.001)
    rapl.zone("intel-rapl:0", "package-0")
    reads: list[float] = []
    read = meter.RaplCounter.read

    def counted(self: meter.RaplCounter) -> float:
        joules = read(self)
        reads.append(joules)
        return joules

    monkeypatch.setattr(meter.RaplCounter, "read", counted)
    most = RANGE_UJ / 1e6

    def three_rounds() -> None:
        path = rapl.root / "intel-rapl:0" / "energy_uj"
        for _ in range(6):
            value = (int(path.read_text()) + RANGE_UJ // 2) % RANGE_UJ
            path.with_name("next").write_text(f"{value}\n")
            path.with_name("next").replace(path)  # never empty under a reader
            seen, end = len(reads), time.monotonic() + 10
            while len(reads) < seen + 2 and time.monotonic() < end:
                time.sleep(0.001)

    found = measured(cpu_meter(rapl.root, load=lambda: rapl.spend(4)), three_rounds)
    assert found is not None and found.joules == pytest.approx(3 * most)


def test_packages_and_their_dram_count_once(rapl: FakeRapl) -> None:
    zones = {
        "intel-rapl:0": "package-0",
        "intel-rapl:0:0": "core",
        "intel-rapl:0:1": "dram",
        "intel-rapl:1": "package-1",
        "intel-rapl:1:0": "dram",
        "intel-rapl:2": "psys",
        "intel-rapl-mmio:0": "package-0",
    }
    for name, label in zones.items():
        rapl.zone(name, label)

    def spend() -> None:
        for name in zones:
            if name != "intel-rapl:1:0":  # which is dead
                rapl.spend(2, name)

    found = measured(cpu_meter(rapl.root, load=spend), spend)
    assert found is not None
    assert found.sources == ("rapl package-0", "rapl dram", "rapl package-1")
    assert found.joules == pytest.approx(6)


def test_without_permission_there_is_no_meter(
    rapl: FakeRapl, monkeypatch: pytest.MonkeyPatch
) -> None:
    rapl.zone("intel-rapl:0", "package-0")
    read_text = Path.read_text

    def refuse(self: Path, *args: str, **options: str) -> str:
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(self))
        return read_text(self, *args, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    made = cpu_meter(rapl.root, load=lambda: None)
    assert measured(made, lambda: None) is None
    assert made.reason is not None and "Permission denied" in made.reason
    assert "rights that this process lacks" in made.reason


def test_a_machine_without_counters_has_no_meter(tmp_path: Path) -> None:
    made = cpu_meter(tmp_path / "powercap", load=lambda: pytest.fail("nothing to watch"))
    assert measured(made, lambda: None) is None
    assert made.reason == f"{tmp_path / 'powercap'} has no RAPL package"


def test_a_counter_that_fails_or_stands_still_in_the_run_gives_none(rapl: FakeRapl) -> None:
    rapl.zone("intel-rapl:0", "package-0")
    made = cpu_meter(rapl.root, load=lambda: rapl.spend(9))
    with made.measure() as reading:
        pass
    assert reading.measured is None
    assert reading.reason == ("the run was too short: no counter moved; repeat it within the block")
    energy = rapl.root / "intel-rapl:0" / "energy_uj"
    assert measured(made, lambda: energy.write_text("gone") and None) is None
    energy.write_text("10\n")
    (rapl.root / "intel-rapl:0" / "max_energy_range_uj").unlink()
    reset = cpu_meter(rapl.root, load=lambda: rapl.spend(9))
    with reset.measure() as reading:
        energy.write_text("5\n")  # it cannot be a wrap: nobody says where it would
    assert reading.measured is None
    assert reading.reason is not None and "went back from" in reading.reason


def test_an_error_in_the_block_is_passed_on(rapl: FakeRapl) -> None:
    rapl.zone("intel-rapl:0", "package-0")
    made = cpu_meter(rapl.root, load=lambda: rapl.spend(9))
    with pytest.raises(KeyError), made.measure() as reading:
        rapl.spend(9)
        raise KeyError
    assert reading.measured is None
    assert measured(made, lambda: rapl.spend(2)) is not None


class FakeNvml(SimpleNamespace):
    """NVML with one GPU, of this energy in mJ; None: a GPU without the counter."""

    class NVMLError(Exception):
        pass

    energy: int | None = 5_000_000

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if index:
            raise self.NVMLError("Invalid Argument")
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
        if self.energy is None:
            raise self.NVMLError("Not Supported")
        return self.energy

    def spend(self, joules: float) -> None:
        assert self.energy is not None
        self.energy += int(joules * 1000)


def test_a_gpu_is_measured_through_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    found = measured(gpu_meter(load=lambda: nvml.spend(70)), lambda: nvml.spend(12.5))
    assert found is not None
    assert (found.joules, found.sources) == (12.5, ("nvml gpu 0",))
    assert gpu_meter(1).reason == "NVML finds no GPU 1: Invalid Argument"
    nvml.energy = None
    old = gpu_meter(load=lambda: None)
    assert measured(old, lambda: None) is None
    assert old.reason is not None and "nvml gpu 0: Not Supported" in old.reason


def test_without_the_binding_there_is_no_gpu_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_meter().reason == (
        "reading a GPU's energy needs nvidia-ml-py; install offramp[nvml]"
    )


def test_this_machine_measures_something_or_nothing() -> None:
    """With the real load: more than nothing where there is a sensor, else None."""
    made = cpu_meter()
    with made.measure() as reading:
        meter._spin()
    if made.is_live:
        assert reading.measured is not None and reading.measured.joules > meter.LEAST_J
    else:
        assert reading.measured is None and reading.reason == made.reason is not None
