"""Tests here take their helpers from test_luvc.py, which also decides which luvc.py is tested (LUVC_MODULE)."""

import pytest

pytest.register_assert_rewrite("test_luvc")

import test_luvc  # noqa: E402, F401
