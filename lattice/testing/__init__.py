"""The conformance kit: does a recurrence, a backbone or a mask keep what it promises? For `lattice check` and
for pytest.

import pytest
from lattice.testing import BACKBONES, CHECKS, assert_conforms

@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_my_variant(check, backbone):
    assert_conforms({"kind": "my_variant"}, check=check, backbone=backbone)

@pytest.mark.parametrize("check", CHECKS)
def test_my_window(check):
    assert_conforms({"kind": "my_window", "tokens": 3}, check=check, role="mask")
"""

from lattice.testing.kit import CHECKS, CheckResult, assert_conforms, check_component, check_recurrence
from lattice.testing.subject import BACKBONES

__all__ = ["BACKBONES", "CHECKS", "CheckResult", "assert_conforms", "check_component", "check_recurrence"]
