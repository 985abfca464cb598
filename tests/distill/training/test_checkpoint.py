"""Checkpoints that are written while training goes on."""

import hashlib
import json

import pytest
import torch

from contract.errors import UserError
from distill.training.checkpoint import CheckpointWriter, load_checkpoint


def test_a_checkpoint_is_the_state_when_it_was_asked_for_and_hashed_as_it_is_written(tmp_path):
    weight = torch.zeros(1000, 100)
    with CheckpointWriter(tmp_path, keep=2) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"model": {"weight": weight}, "rng": [weight[0]], "lr": (0.1, 0.2)})
            weight += 1  # as the next step does at once
    assert [path.name for path in sorted(tmp_path.glob("*.pt"))] == [
        "step_00000002.pt",
        "step_00000003.pt",
    ]
    saved = load_checkpoint(tmp_path)
    assert saved["step"] == 3 and saved["lr"] == (0.1, 0.2)
    assert torch.equal(saved["model"]["weight"], torch.full((1000, 100), 2.0))
    recorded = json.loads((tmp_path / "step_00000003.json").read_text())["sha256"]
    assert recorded == hashlib.sha256((tmp_path / "step_00000003.pt").read_bytes()).hexdigest()
    assert load_checkpoint(tmp_path, 2)["step"] == 2 and load_checkpoint(tmp_path, 1) is None


def test_a_checkpoint_that_cannot_be_written_is_an_error_before_the_next_one(tmp_path):
    (tmp_path / "step_00000001.pt").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*step_00000001.pt") as raised:
        with CheckpointWriter(tmp_path, keep=2) as writer:
            writer.write(1, {"model": {}})
            writer.write(2, {"model": {}})
            raise AssertionError("the first one's error is due by now")
    assert "previous file is untouched" in str(raised.value)
    with pytest.raises(UserError), CheckpointWriter(tmp_path, keep=2) as writer:
        writer.write(1, {"model": {}})
    # an error of the body goes first
    with pytest.raises(ZeroDivisionError), CheckpointWriter(tmp_path, keep=2) as writer:
        writer.write(1, {"model": {}})
        raise ZeroDivisionError
