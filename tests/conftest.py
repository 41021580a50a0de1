"""Tests here take their helpers from test_luvc.py, which also decides which luvc.py is tested (LUVC_MODULE)."""

import pytest

pytest.register_assert_rewrite("test_luvc")

from test_luvc import toy  # noqa: E402, F401 (a fixture)
