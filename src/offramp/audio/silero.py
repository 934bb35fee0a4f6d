"""Speech probabilities by Silero VAD, whose model comes inside the `silero-vad` wheel (MIT).

Only the weights are taken from the wheel. The network is written out here so that many windows go
through it in one call: about ten times faster than the package's own window-by-window model, to
which a test holds it equal. Importing the package would also set torch to one thread.
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from offramp.errors import InputError

WINDOW = 512  # samples at 16 kHz, 32 ms
_CONTEXT = 64  # samples of the window before that each window sees
_HIDDEN = 128
_FFT, _HOP = 256, 128
_STRIDES = (1, 2, 2, 1)  # of the convolutions over the spectra of one window


class Silero:
    """Probabilities of speech, window by window; what came before is remembered between calls."""

    def __init__(self, model_path: Path) -> None:
        self._weights = _load(model_path)
        self._context = torch.zeros(_CONTEXT)
        self._state = (torch.zeros(1, 1, _HIDDEN), torch.zeros(1, 1, _HIDDEN))

    @torch.inference_mode()
    def push(self, windows: Tensor) -> Tensor:
        """windows [n, 512], n > 0, consecutive, at 16 kHz -> probabilities of speech [n]."""
        w, samples = self._weights, torch.cat([self._context, windows.flatten()])
        self._context = samples[-_CONTEXT:].clone()
        seen = samples.unfold(0, _CONTEXT + WINDOW, WINDOW)[:, None]  # [n, 1, 576]
        seen = F.pad(seen, (0, _FFT // 4), mode="reflect")
        spectra = F.conv1d(seen, w["stft.forward_basis_buffer"], stride=_HOP)
        real, imaginary = spectra.chunk(2, dim=1)
        h = (real.square() + imaginary.square()).sqrt()  # [n, 129, 4]
        for layer, stride in enumerate(_STRIDES):
            name = f"encoder.{layer}.reparam_conv"
            h = F.conv1d(h, w[f"{name}.weight"], w[f"{name}.bias"], stride, padding=1).relu()
        rnn = [w[f"decoder.rnn.{name}_{of}"] for name in ("weight", "bias") for of in ("ih", "hh")]
        steps = h.squeeze(2)[:, None]  # [n, 1, 128]: the windows are the steps of one sequence
        out, *state = torch.lstm(steps, self._state, rnn, True, 1, 0.0, False, False, False)
        self._state = (state[0], state[1])
        logits = F.linear(out.relu(), w["decoder.decoder.2.weight"].squeeze(2))
        return (logits + w["decoder.decoder.2.bias"]).sigmoid().flatten()

    def finish(self) -> Tensor:
        """Nothing was held back."""
        return torch.zeros(0)


@cache
def _load(model_path: Path) -> dict[str, Tensor]:
    """The weights for 16 kHz."""
    with warnings.catch_warnings():
        # The wheel keeps its current weights as TorchScript, which torch 2.13 calls deprecated.
        warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", DeprecationWarning)
        module = torch.jit.load(str(model_path), map_location="cpu")  # type: ignore[no-untyped-call]
    return {name: weight.detach() for name, weight in module._model.state_dict().items()}


def silero_path() -> Path | None:
    """Where the installed `silero-vad` keeps its model; None where it is not installed."""
    spec = importlib.util.find_spec("silero_vad")  # finds it without importing it
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / "data" / "silero_vad.jit"
    if not path.is_file():
        raise InputError(
            f"the installed silero-vad has no {path}; install silero-vad 6: "
            "pip install 'offramp[vad]'"
        )
    return path
