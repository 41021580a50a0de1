"""What luvc.py says to a transformers that it does not know: a warning if newer, an error if a name is missing."""

import importlib.util
import sys
import warnings

import pytest
import transformers
from transformers import modeling_utils, vision_utils

from test_luvc import MODULE


@pytest.fixture
def load(monkeypatch):
    """A function that loads a copy of luvc.py under a name of its own."""
    spec = importlib.util.spec_from_file_location("luvc_once_more", MODULE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    # The copy registers its attention function as well; tests that come later get back the one they know.
    before = modeling_utils.ALL_ATTENTION_FUNCTIONS["luvc"]
    yield lambda: spec.loader.exec_module(module)
    modeling_utils.ALL_ATTENTION_FUNCTIONS.register("luvc", before)


@pytest.mark.parametrize(
    "version, warned", [("5.17.0", False), ("5.24.3", False), ("5.25.0", True), ("6.0", True)]
)
def test_a_newer_version_is_warned_about(version, warned, load, monkeypatch):
    """Catches: an upper bound that only pip knows; a warning at a version that was tested."""
    monkeypatch.setattr(transformers, "__version__", version)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        load()
    told = [str(w.message) for w in told if "tested up to transformers" in str(w.message)]
    assert len(told) == warned, f"transformers {version}: warnings {told}"


def test_a_missing_name_is_named(load, monkeypatch):
    """Catches: an error from deep inside when a release has moved what luvc.py relies on."""
    monkeypatch.delattr(vision_utils, "get_vision_window_index")
    with pytest.raises(ImportError, match=r"lacks what luvc.py relies on.*get_vision_window_index.*5\.17"):
        load()
