"""Verbs about Offramp itself: demo, info."""

from __future__ import annotations


def demo() -> None:
    """The main jobs on real input, with the models that ship."""
    from offramp.demo import run

    run()


def info() -> None:
    """Versions, devices and shipped models."""
    import torch

    from offramp import __version__, terminal
    from offramp.models.hub import shipped

    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    rows = [
        ["offramp", __version__],
        ["torch", torch.__version__],
        ["CPU threads", str(torch.get_num_threads())],
        ["CUDA device", cuda],
        ["engine", "eager (PyTorch)"],
        ["shipped models", ", ".join(shipped())],
    ]
    terminal.table("", ("", ""), rows)
