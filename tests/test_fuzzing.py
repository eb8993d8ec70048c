"""Every parser of foreign input, with the same spoiled documents each time. More of them: make drill."""

import pytest
from fuzzing import TARGETS, tried
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_spoiled_document_is_read_or_refused_in_a_sentence(name: str, data: st.DataObject) -> None:
    tried(TARGETS[name], data)
