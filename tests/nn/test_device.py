"""Devices are chosen by name, and what is not there is refused in one line."""

from __future__ import annotations

import pytest
import torch

from offramp.errors import InputError
from offramp.nn.device import choose_device


def test_a_device_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda") == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.parametrize(
    ("name", "count", "says"),
    [
        ("nonsense", 2, "device is 'nonsense'; give cpu, cuda or cuda:0"),
        ("", 2, "device is ''; give cpu"),
        ("meta", 2, "device is 'meta'; give cpu, cuda or cuda:0"),
        ("cuda", 0, "device is 'cuda', and torch sees no CUDA device; use cpu"),
        ("cuda:2", 2, "device is 'cuda:2', and torch sees 2 CUDA devices; use cuda:0 to cuda:1"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    name: str, count: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(InputError, match=says) as error:
        choose_device(name)
    assert "\n" not in str(error.value)
