"""Where the energy of a stream goes: what each component of a transducer runs, moves and takes.

A recording is streamed and everything counted; energy follows from the counts under published
tables of constants (energy/modelled.py), for several devices. If this machine has a live sensor,
what it says of the run stands beside that, and is never added to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from offramp.audio.io import Source
from offramp.audio.live import open_source
from offramp.compress.components import as_run
from offramp.decoding.stream_plan import StreamOptions, StreamPlan
from offramp.energy.meter import Measured, cpu_meter, gpu_meter
from offramp.energy.modelled import ModelledEnergy
from offramp.energy.profiles import SHIPPED, Profile, load_profile
from offramp.energy.trace import StreamTrace
from offramp.errors import InputError
from offramp.results import ratio
from offramp.stream_events import Event, Latency
from offramp.streaming import StreamingRecognizer


@dataclass(frozen=True)
class StreamProfile:
    """What streaming a recording took. energies: one per hardware profile, in their order.

    measured: None where no sensor is alive, for the reason `not_measured`. seconds: processing.
    """

    model: str
    source: str
    chunk_ms: float
    seconds: float
    latency: Latency
    trace: StreamTrace
    energies: tuple[ModelledEnergy, ...]
    measured: Measured | None
    not_measured: str | None

    @property
    def rtf(self) -> float | None:
        return ratio(self.seconds, self.trace.audio_s)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: modelled and measured energy each under a name of its own."""
        measured = None
        if self.measured is not None:
            per_s = {"joules_per_audio_s": self.measured.joules / self.trace.audio_s}
            measured = self.measured.to_dict() | per_s
        return {
            "model": self.model,
            "source": self.source,
            "chunk_ms": self.chunk_ms,
            "audio_s": self.trace.audio_s,
            "seconds": self.seconds,
            "rtf": self.rtf,
            "latency_ms": asdict(self.latency),
            "trace": asdict(self.trace),
            "per_audio_s": self.trace.per_s(),
            "modelled": {e.profile.name: e.to_dict() for e in self.energies},
            "measured": measured,
            "not_measured": self.not_measured,
        }


@dataclass(frozen=True)
class ProfileOptions:
    """hardware: names of shipped profiles, or paths of .toml files."""

    hardware: tuple[str, ...] = SHIPPED
    stream: StreamOptions = field(default_factory=StreamOptions)

    def __post_init__(self) -> None:
        if not self.hardware:
            raise InputError(f"no hardware is named; give some of {', '.join(SHIPPED)}")

    def profiles(self) -> tuple[Profile, ...]:
        """ConfigError: no such profile, one that is malformed, or two of one name."""
        found = {name: load_profile(name) for name in self.hardware}
        if len({profile.name for profile in found.values()}) < len(self.hardware):
            raise InputError(
                f"hardware names a profile twice: {', '.join(self.hardware)}; name each once"
            )
        return tuple(found.values())


def run(
    model: str,
    source: Source,
    options: ProfileOptions,
    device: str = "cpu",
    tell: Callable[[float], None] = lambda done_s: None,
) -> StreamProfile:
    """Stream `source`. tell: is called with the seconds of audio that were heard."""
    profiles = options.profiles()
    recognizer = StreamingRecognizer.load(model, device=device)
    plan = StreamPlan(recognizer.model, recognizer.pieces, options.stream)
    stream, events = recognizer.open(options.stream), list[Event]()
    blocks, _ = open_source(source)
    meter = cpu_meter() if recognizer.model.device.type == "cpu" else gpu_meter()
    with meter.measure() as reading:
        for block in blocks:
            events += stream.push(block)
            tell(stream.audio_s)
        events += stream.finish()
    return StreamProfile(
        model=model,
        source=str(source),
        chunk_ms=1000 * plan.chunking.chunk * plan.frame_s,
        seconds=stream.seconds,
        latency=Latency.of(events),
        trace=stream.trace,
        energies=energies(plan, stream.trace, profiles),
        measured=reading.measured,
        not_measured=reading.reason,
    )


def energies(
    plan: StreamPlan, trace: StreamTrace, profiles: Sequence[Profile]
) -> tuple[ModelledEnergy, ...]:
    """Modelled energy of what `trace` counted of streams with `plan`, on each of `profiles`."""
    ran = as_run(plan.model, trace, plan.chunking)
    return tuple(ran.energy(profile) for profile in profiles)
