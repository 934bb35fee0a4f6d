"""Marks for tests that need an optional package."""

import pytest

try:
    import flashlight.lib.text.decoder.kenlm  # noqa: F401
except ImportError:
    HAS_KENLM = False
else:
    HAS_KENLM = True
needs_kenlm = pytest.mark.skipif(not HAS_KENLM, reason="flashlight-text is not installed")
