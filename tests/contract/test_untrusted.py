"""JSON that may come from anybody."""

import pytest

from contract.untrusted import parse_json


def test_a_key_that_comes_again_after_many_others_is_found_at_once():
    # found by counting every name, it would take hours
    many = ",".join(f'"{number}":0' for number in range(200_000))
    with pytest.raises(ValueError, match="key '0' twice"):
        parse_json(f'{{{many},"0":0}}')
