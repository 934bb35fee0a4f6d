"""Measured energy where this machine has a sensor that is alive, else None: no 0 and no guess.

RAPL (CPU packages and their DRAM) is read from Linux' powercap files; NVML (a whole GPU) through
NVIDIA's own binding, which depends on nothing (extra `nvml`), where the broader zeus would bring
ten packages for one reading and takes a counter that exists for one that counts. Many counters
exist and stand still, in virtual machines above all, so each is first watched under load.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")
LEAST_J = 0.5  # in the second under load; a machine at work takes more
_LOOK_S = 30.0  # RAPL wraps after 65 kJ at the soonest: no machine draws 2 kW per package


class Counter(Protocol):
    """A sensor's sum of joules since some time. range_j: where it starts again; None: nowhere."""

    @property
    def name(self) -> str: ...

    @property
    def range_j(self) -> float | None: ...

    def read(self) -> float:
        """Joules. OSError: it cannot be read."""
        ...


@dataclass(frozen=True)
class Measured:
    """What a sensor says that a run took, all else on the machine included.

    sources: the counters that are in the sum.
    """

    joules: float
    seconds: float
    sources: tuple[str, ...]

    @property
    def label(self) -> str:
        """Belongs beside every figure taken from here."""
        return f"measured, {', '.join(self.sources)}, the rest of the machine included"

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "measured", "label": self.label} | asdict(self)


@dataclass
class Reading:
    """Filled when its `measure` block ends. measured None: no live sensor, for this reason."""

    measured: Measured | None = None
    reason: str | None = None


class Meter:
    """Counters behind one face. The first use watches them under load, which takes a second.

    why: what to say where there are no counters. load: what runs while they are watched.
    """

    def __init__(
        self,
        counters: Sequence[Counter],
        why: str = "no energy counter was found",
        load: Callable[[], None] | None = None,
    ) -> None:
        self._counters, self._why = tuple(counters), why
        self._load = load or _spin
        self._live: tuple[Counter, ...] | None = None

    @property
    def is_live(self) -> bool:
        """Whether a counter moves under load."""
        return bool(self._find_live())

    @property
    def reason(self) -> str | None:
        """Why nothing can be measured here; None if it can."""
        return None if self.is_live else self._why

    @contextmanager
    def measure(self) -> Iterator[Reading]:
        """What the block takes; work that it left to a GPU must have ended before it does."""
        reading = Reading()
        live = self._find_live()
        if not live:
            reading.reason = self._why
            yield reading
            return
        tally = _Tally(live)
        with tally.watched():
            start = time.perf_counter()
            yield reading
            seconds = time.perf_counter() - start
        if tally.failure is not None:
            reading.reason = f"the counter failed during the run: {tally.failure}"
        elif not tally.joules:
            reading.reason = "the run was too short: no counter moved; repeat it within the block"
        else:
            reading.measured = Measured(tally.joules, seconds, tuple(c.name for c in live))

    def _find_live(self) -> tuple[Counter, ...]:
        if self._live is None:
            self._live = self._watch()
        return self._live

    def _watch(self) -> tuple[Counter, ...]:
        """The counters that moved, if all together took what a machine at work must."""
        if not self._counters:
            return ()
        tallies = [_Tally((counter,)) for counter in self._counters]
        self._load()
        for tally in tallies:
            tally.look()
        if failure := next((t.failure for t in tallies if t.failure is not None), None):
            self._why = f"{failure}; it needs rights that this process lacks, or another driver"
            return ()
        total = sum(tally.joules for tally in tallies)
        if total <= LEAST_J:
            names = ", ".join(counter.name for counter in self._counters)
            self._why = f"{names} counted {total:.2f} J under load, at most {LEAST_J}: not alive"
            return ()
        return tuple(c for c, t in zip(self._counters, tallies, strict=True) if t.joules)


def cpu_meter(root: Path = POWERCAP, load: Callable[[], None] | None = None) -> Meter:
    """RAPL: all CPU packages and, where counted apart, their DRAM."""
    zones = sorted(root.glob("intel-rapl:*"))  # AMD's have the same name
    counters = [RaplCounter(zone) for zone in zones]
    # A package contains its cores; psys contains the packages; none of them may count twice.
    counters = [c for c in counters if c.name.startswith(("rapl package", "rapl dram"))]
    return Meter(counters, f"{root} has no RAPL package", load)


def gpu_meter(index: int = 0, load: Callable[[], None] | None = None) -> Meter:
    """NVML's counter of one whole NVIDIA GPU, by NVML's own numbering. An idle GPU counts too."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return Meter((), "reading a GPU's energy needs nvidia-ml-py; install offramp[nvml]")
    try:
        nvml.nvmlInit()
        counter = NvmlCounter(nvml, index)
    except nvml.NVMLError as error:
        return Meter((), f"NVML finds no GPU {index}: {error}")
    return Meter((counter,), load=load)


class RaplCounter:
    """One powercap zone, such as /sys/class/powercap/intel-rapl:0."""

    def __init__(self, zone: Path) -> None:
        self._energy = zone / "energy_uj"
        self.name = f"rapl {_text(zone / 'name') or 'unnamed'}"
        top = _text(zone / "max_energy_range_uj")
        self.range_j = int(top) / 1e6 if top and top.isdecimal() else None

    def read(self) -> float:
        try:
            return int(self._energy.read_text()) / 1e6
        except ValueError as error:
            raise OSError(f"{self._energy} holds no number") from error


class NvmlCounter:
    """Millijoules since the driver was loaded, in 64 bits; Volta or newer. nvml: the module."""

    def __init__(self, nvml: Any, index: int) -> None:
        self._nvml, self._handle = nvml, nvml.nvmlDeviceGetHandleByIndex(index)
        self.name = f"nvml gpu {index}"
        self.range_j = None

    def read(self) -> float:
        try:
            millijoules: int = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except self._nvml.NVMLError as error:
            raise OSError(f"{self.name}: {error}") from error
        return millijoules / 1e3


class _Tally:
    """Joules of all counters since the start. Looks must be more frequent than wraps."""

    def __init__(self, counters: Sequence[Counter]) -> None:
        self._counters = counters
        self._last: list[float] = []
        self._lock = threading.Lock()
        self.joules = 0.0
        self.failure: OSError | None = None
        self.look()

    def look(self) -> None:
        with self._lock:
            try:
                now = [counter.read() for counter in self._counters]
                if self._last:
                    self.joules += sum(map(_step, self._counters, self._last, now))
                self._last = now
            except OSError as error:
                self.failure = self.failure or error

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Looks now and then by itself, and once at the end."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(_LOOK_S):
                self.look()

        thread = threading.Thread(target=watch, name="offramp-meter", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.look()
            done.set()
            thread.join()


def _step(counter: Counter, before: float, now: float) -> float:
    if now >= before:
        return now - before
    if counter.range_j is None:
        raise OSError(f"{counter.name} went back from {before} to {now} J")
    return now - before + counter.range_j


def _spin() -> None:
    end = time.perf_counter() + 1.0
    while time.perf_counter() < end:
        sum(range(10_000))


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
