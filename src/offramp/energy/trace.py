"""What ran how often: the counts from which compute, latency and modelled energy follow.

Standard library only. A call is one invocation (its weights are read once); a position is one
token that passed through. In a ragged batch the padding counts too: it was computed.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Trace:
    """Counts of one run over a tower of `num_layers` layers."""

    num_layers: int
    layer_calls: list[int] = field(default_factory=list)
    layer_positions: list[int] = field(default_factory=list)
    head_calls: int = 0
    head_positions: int = 0

    def __post_init__(self) -> None:
        self.layer_calls = self.layer_calls or [0] * self.num_layers
        self.layer_positions = self.layer_positions or [0] * self.num_layers

    def layers(self, start: int, stop: int, positions: int) -> None:
        for layer in range(start, stop):
            self.layer_calls[layer] += 1
            self.layer_positions[layer] += positions

    def head(self, positions: int) -> None:
        self.head_calls += 1
        self.head_positions += positions
