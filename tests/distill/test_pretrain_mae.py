"""The masked autoencoder: what the encoder may see, what the loss counts, and that it learns."""

import json

import pytest
import torch
from safetensors import safe_open

from distill.pretrain_mae import (
    MASKED,
    PATCH,
    SIZE,
    MaskedAutoencoder,
    main,
    masked_loss,
    patchify,
    random_order,
)

POSITIONS = (SIZE // PATCH) ** 2


@pytest.fixture(scope="module")
def model() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder().eval()


def order_of(batch: int) -> torch.Tensor:
    return random_order(batch, torch.Generator().manual_seed(3))


@torch.no_grad()
def test_with_every_patch_visible_the_encoder_is_timms_vit(model):
    images = torch.randn(2, 3, SIZE, SIZE)
    everything = torch.arange(POSITIONS).expand(2, -1)
    torch.testing.assert_close(
        model.encode(images, everything), model.encoder.forward_features(images)
    )


@torch.no_grad()
def test_hidden_pixels_never_reach_the_prediction(model):
    images, order = torch.randn(2, 3, SIZE, SIZE), order_of(2)
    painted, mask = model(images, order)
    assert mask.sum(1).tolist() == [round(MASKED * POSITIONS)] * 2
    noise = torch.randn(2, 3, SIZE, SIZE)
    hidden = mask.view(2, 1, SIZE // PATCH, SIZE // PATCH)
    hidden = hidden.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3).bool()
    assert torch.equal(model(torch.where(hidden, noise, images), order)[0], painted)
    assert not torch.equal(model(torch.where(hidden, images, noise), order)[0], painted)


def test_the_loss_counts_hidden_patches_only_and_patch_normalised_pixels():
    images = torch.rand(2, 3, SIZE, SIZE)
    mask = torch.zeros(2, POSITIONS).scatter(1, order_of(2)[:, :5], 1)
    target = patchify(images)
    target = (target - target.mean(-1, keepdim=True)) / target.std(-1, keepdim=True)
    assert masked_loss(target, images, mask) < 1e-4
    wrong_where_seen = torch.where(mask[..., None] > 0, target, torch.full_like(target, 9.0))
    assert masked_loss(wrong_where_seen, images, mask) < 1e-4
    # predicting each patch's mean scores one, less the 1/768 between the two kinds of variance
    assert masked_loss(torch.zeros_like(target), images, mask).item() == pytest.approx(
        767 / 768, abs=1e-3
    )
    assert masked_loss(torch.zeros_like(target), 5 * images + 2, mask).item() == pytest.approx(
        767 / 768, abs=1e-3
    )


def test_patches_are_cut_row_by_row():
    rows = torch.arange(SIZE).float().view(1, 1, -1, 1).expand(1, 3, SIZE, SIZE)
    cut = patchify(rows)
    assert cut.shape == (1, POSITIONS, PATCH * PATCH * 3)
    side = SIZE // PATCH
    assert cut[0, :, 0].tolist() == [PATCH * (position // side) for position in range(POSITIONS)]


def test_twenty_steps_lower_the_held_out_loss_and_write_a_small_encoder(tmp_path, capsys):
    file = tmp_path / "mae.safetensors"
    assert main(["--output", str(file), "--steps", "20", "--batch", "16", "--workers", "0"]) == 0
    with safe_open(file, "pt") as opened:
        record = json.loads(opened.metadata()["record"])
        assert {opened.get_tensor(name).dtype for name in opened.keys()} == {torch.float16}
    assert record["val_loss_last"] < record["val_loss_first"] - 0.1
    assert record["train_loss_last"] < record["train_loss_first"] - 0.1
    assert file.stat().st_size <= 3e6
    assert str(file) in capsys.readouterr().out


def test_mistakes_on_the_command_line_end_with_status_two(tmp_path, capsys):
    assert main(["--output", str(tmp_path / "no" / "mae.safetensors")]) == 2
    assert main(["--output", str(tmp_path / "mae.safetensors"), "--steps", "0"]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 2 and all(line.startswith("error: --") for line in errors)
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    example = capsys.readouterr().out
    assert "python -m distill.pretrain_mae --steps 3000" in example
    assert "--output distill/teachers/weights" in example
