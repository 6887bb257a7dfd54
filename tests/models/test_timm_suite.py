"""timm's own test-suite over foveal's models, in a process of its own (tests/timm_suite)."""

import pytest

from tests.timm_suite import run

SMALL = "transnext_pico or transnext_micro or vit_tiny"  # and transnext_micro_aaaa
ENTRIES = "default_cfgs"


@pytest.mark.timeout(0)
def test_small_models_and_every_entry():
    """The four small models in everything, the others in what their entries promise."""
    selection = f"{run.SELECTION} and ({SMALL} or {ENTRIES})"
    run.run(selection=selection, expected=3 * run.TESTS_PER_MODEL + run.TESTS_PER_HYBRID + run.ENTRIES)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_large_models():
    selection = f"{run.SELECTION} and not ({SMALL}) and not {ENTRIES}"
    run.run(selection=selection, expected=3 * run.TESTS_PER_MODEL + run.TESTS_PER_HYBRID)
