"""`python -m distill.pretrain_mae`: train the small masked-autoencoder teacher of the quickstart
from real photographs.

MAE (He et al., 2022): three quarters of the patches are hidden, the encoder sees the rest, a light
decoder predicts the hidden ones, and the loss is the squared error of their normalised pixels. The
decoder is discarded.
"""

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
from PIL import Image
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from contract.command_line import CommandLine, whole_number
from contract.errors import UserError, exit_status
from distill.config import DataConfig
from distill.data.batches import StreamBatches, batch_bytes, collate, make_loader
from distill.data.crops import IMAGE, MAIN, CropDataset, View, centre_crop
from distill.data.pictures import Pictures, open_pictures
from distill.data.pixels import Decoded
from distill.models.preprocess import Preprocess
from distill.models.student import create_timm
from distill.models.weights import save_tensors

_ENCODER = "vit_tiny_patch16_224"
_KWARGS = {"embed_dim": 128, "depth": 6, "num_heads": 4}
SIZE, PATCH, MASKED = 112, 16, 0.75
_SCALE = (0.15, 1.0)
_VIEW = View(IMAGE, SIZE, scale=_SCALE)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

EPILOG = """\
example (the shipped file; about fifteen minutes on one core):
  OMP_NUM_THREADS=1 python -m distill.pretrain_mae --steps 3000 \\
      --output distill/teachers/weights/photo_mae.safetensors
"""


class _TrainingHalf:
    """The left 70 % of every photograph, or (`held_out`) the right 30 %: no pixel is in both."""

    def __init__(self, pictures: Pictures, held_out: bool) -> None:
        self.pictures, self.held_out = pictures, held_out

    def __len__(self) -> int:
        return len(self.pictures)

    def name(self, number: int) -> str:
        return self.pictures.name(number)

    def load(self, number: int) -> Image.Image:
        image = self.pictures.load(number)
        edge = round(0.7 * image.width)
        return image.crop(
            (edge, 0, image.width, image.height) if self.held_out else (0, 0, edge, image.height)
        )

    def open(self, number: int) -> Decoded:
        return Decoded(self.load(number))

    def fingerprint(self) -> str:
        return f"{self.pictures.fingerprint()}-{self.held_out}"


class MaskedAutoencoder(nn.Module):
    """A timm ViT encoder that skips hidden patches, and a two-block decoder that predicts them."""

    def __init__(self, width: int = 96, depth: int = 2, heads: int = 3) -> None:
        super().__init__()
        self.encoder = create_timm(_ENCODER, num_classes=0, img_size=SIZE, **_KWARGS)
        patches = (SIZE // PATCH) ** 2
        self.embed = nn.Linear(self.encoder.embed_dim, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))
        self.position = nn.Parameter(torch.empty(1, patches, width).normal_(std=0.02))
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, PATCH * PATCH * 3)

    def encode(self, images: Tensor, visible: Tensor) -> Tensor:
        """Class token and visible tokens [B, 1 + V, d] of normalised images, for patch indices
        `visible` [B, V].
        """
        encoder = self.encoder
        tokens = encoder.patch_embed(images) + encoder.pos_embed[:, 1:]
        tokens = tokens.gather(1, visible.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        first = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(images), -1, -1)
        return encoder.norm(encoder.blocks(torch.cat((first, tokens), dim=1)))

    def forward(self, images: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """Predict normalised pixels [B, L, 768] of every patch; `order` [B, L] lists the visible
        patches first.

        Returns the prediction and the mask [B, L], 1 where a patch was hidden.
        """
        keep = round(order.shape[1] * (1 - MASKED))
        tokens = self.embed(self.encode(images, order[:, :keep])[:, 1:])
        hidden = self.mask_token.expand(len(images), order.shape[1] - keep, -1)
        shuffled = torch.cat((tokens, hidden), dim=1)
        back = order.argsort(dim=1).unsqueeze(-1).expand_as(shuffled)
        painted = self.head(self.norm(self.blocks(shuffled.gather(1, back) + self.position)))
        mask = torch.ones(order.shape, device=images.device).scatter(1, order[:, :keep], 0)
        return painted, mask


def patchify(images: Tensor) -> Tensor:
    """Cut images [B, 3, S, S] into patches [B, L, 16 * 16 * 3]."""
    cut = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # [B, 3, h, w, 16, 16]
    return cut.permute(0, 2, 3, 4, 5, 1).flatten(1, 2).flatten(2)


def masked_loss(painted: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over hidden patches whose pixels are normalised patch by patch (MAE's
    better target).
    """
    target = patchify(images)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return (((painted - target) ** 2).mean(-1) * mask).sum() / mask.sum()


def random_order(batch: int, generator: torch.Generator) -> Tensor:
    """A random permutation of the patches for every image [B, L]."""
    return torch.rand(batch, (SIZE // PATCH) ** 2, generator=generator).argsort(dim=1)


@torch.no_grad()
def _validate(model: MaskedAutoencoder, pictures: Pictures, data: DataConfig, seed: int) -> float:
    """Loss on fixed crops of the held-out right edges of the photographs."""
    dataset = CropDataset(_TrainingHalf(pictures, held_out=True), data, [_VIEW], seed + 1)
    batch = collate(
        [dataset[MAIN, picture, view] for picture in range(len(pictures)) for view in range(8)]
    )
    images = Preprocess(SIZE, _MEAN, _STD)(batch.views[IMAGE])
    painted, mask = model.eval()(
        images, random_order(len(images), torch.Generator().manual_seed(seed))
    )
    model.train()
    return masked_loss(painted, images, mask).item()


def _pretrain(
    output: Path, steps: int, batch: int, lr: float, workers: int, seed: int, picture: Path | None
) -> None:
    """Train for a number of steps, report, and write the encoder to a safetensors file."""
    if steps < 1:
        raise UserError(f"--steps {steps} is too small: use 1 or more")
    if not output.parent.is_dir():
        raise UserError(
            f"--output {output}: folder {output.parent} does not exist (create it first)"
        )
    torch.manual_seed(seed)
    data = DataConfig(kind="packaged-photos", crop_scale=_SCALE, repeats=batch)
    pictures = open_pictures(data)
    model, prepare = MaskedAutoencoder(), Preprocess(SIZE, _MEAN, _STD)
    dataset = CropDataset(_TrainingHalf(pictures, held_out=False), data, [_VIEW], seed)
    order = StreamBatches(len(pictures), data.repeats, {MAIN: batch}, steps, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    generator = torch.Generator().manual_seed(seed)
    record: dict = {"val_loss_first": _validate(model, pictures, data, seed)}
    warmup, losses, began = max(1, steps // 20), [], time.perf_counter()
    loader = make_loader(dataset, order, workers, False, batch_bytes([_VIEW], {MAIN: batch}))
    for step, sample in enumerate(loader):
        rate = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        images = prepare(sample.views[IMAGE])
        painted, mask = model(images, random_order(len(images), generator))
        loss = masked_loss(painted, images, mask)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % max(1, steps // 40) == 0:
            recent = losses[-max(1, steps // 40) :]
            left = (time.perf_counter() - began) / (step + 1) * (steps - step - 1)
            print(
                f"step {step + 1}/{steps}  loss {sum(recent) / len(recent):.4f}  {left:.0f} s left",
                flush=True,
            )
    tail = losses[-max(1, steps // 40) :]
    record |= {
        "train_loss_first": losses[0],
        "train_loss_last": sum(tail) / len(tail),
        "val_loss_last": _validate(model, pictures, data, seed),
        "steps": steps,
        "batch": batch,
        "lr": lr,
        "seed": seed,
        "photographs": len(pictures),
        "seconds": round(time.perf_counter() - began),
        "encoder": {"name": _ENCODER, "kwargs": _KWARGS, "image_size": SIZE},
    }
    weights = {
        name: tensor.detach().half().contiguous()
        for name, tensor in model.encoder.state_dict().items()
    }
    save_tensors(output, weights, {"record": json.dumps(record), "licence": "Apache-2.0"})
    if picture:
        _draw_reconstructions(model, pictures, picture)
    print(json.dumps(record, indent=2))
    print(f"weights   {output} ({output.stat().st_size / 1e6:.2f} MB)")
    print("next      python -m distill.run quickstart --output runs/with-new-mae")


@torch.no_grad()
def _draw_reconstructions(model: MaskedAutoencoder, pictures: Pictures, path: Path) -> None:
    """Write held-out crops, their visible patches and their reconstructions as one PNG."""
    held_out = _TrainingHalf(pictures, held_out=True)
    crops = torch.stack([centre_crop(held_out.load(i), SIZE) for i in range(min(6, len(held_out)))])
    images = Preprocess(SIZE, _MEAN, _STD)(crops)
    order = random_order(len(images), torch.Generator().manual_seed(0))
    painted, mask = model.eval()(images, order)
    pixels = patchify(crops.float() / 255)
    mean, deviation = pixels.mean(-1, keepdim=True), pixels.std(-1, keepdim=True)
    shown = torch.where(mask[..., None] > 0, 0.5 * torch.ones_like(pixels), pixels)
    # The target is normalised per patch: the prediction is shown with the patch's own mean and
    # deviation.
    filled = torch.where(mask[..., None] > 0, painted * deviation + mean, pixels)
    figure, axes = plt.subplots(3, len(crops), figsize=(2 * len(crops), 6.4), layout="constrained")
    side = SIZE // PATCH
    for row, (title, batch) in enumerate(
        (("photograph", pixels), ("seen", shown), ("painted", filled))
    ):
        for column, patches in enumerate(batch):
            image = (
                patches.view(side, side, PATCH, PATCH, 3)
                .permute(0, 2, 1, 3, 4)
                .reshape(SIZE, SIZE, 3)
            )
            axes[row, column].imshow(image.clamp(0, 1).numpy())
            axes[row, column].set_axis_off()
        axes[row, 0].set_title(title)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandLine(
        prog="python -m distill.pretrain_mae",
        description="Pretrain the quickstart's small masked autoencoder on packaged photographs.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="safetensors file to write"
    )
    parser.add_argument(
        "--picture", type=Path, metavar="PNG", help="also draw reconstructions of held-out crops"
    )
    parser.add_argument(
        "--steps", type=int, default=3000, metavar="N", help="training steps (default: 3000)"
    )
    parser.add_argument(
        "--batch", type=int, default=64, metavar="N", help="crops per step (default: 64)"
    )
    parser.add_argument(
        "--lr",
        type=float,
        default=1.5e-3,
        metavar="RATE",
        help="peak learning rate (default: 1.5e-3)",
    )
    parser.add_argument(
        "--workers",
        type=whole_number(0),
        default=1,
        metavar="N",
        help="decoding processes (default: 1)",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0, 2**63 - 1),
        default=0,
        metavar="N",
        help="seed of weights, crops and masks (default: 0)",
    )
    args = parser.parse_args(arguments)
    return exit_status(lambda: _pretrain(**vars(args)))


if __name__ == "__main__":
    sys.exit(main())
