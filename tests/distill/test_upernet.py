"""UPerNet against torch's pooling and, weight for weight, transformers' head."""

import pytest
import torch
import torch.nn.functional as F

from distill.upernet import SupervisedUPerNet, UPerNet, adaptive_mean


@pytest.mark.parametrize("grid", [(7, 16), (2, 3), (1, 6)])
def test_pooling_by_matrices_is_torchs_for_any_grid(grid):
    map_ = torch.randn(2, 3, *grid)
    for bins in (1, 2, 3, 6):
        torch.testing.assert_close(adaptive_mean(map_, bins), F.adaptive_avg_pool2d(map_, bins))


@pytest.mark.slow
def test_logits_are_those_of_transformers_head_with_the_same_weights():
    transformers = pytest.importorskip("transformers")
    from transformers.models.upernet.modeling_upernet import UperNetHead

    widths, config = (8, 12, 16, 20), transformers.UperNetConfig(hidden_size=24, num_labels=5)
    theirs, ours = UperNetHead(config, list(widths)).eval(), UPerNet(widths, 24, 5).eval()
    blocks = {
        "laterals": theirs.lateral_convs,
        "pools": [block.layers[1] for block in theirs.psp_modules.blocks],
        "bottleneck": [theirs.bottleneck],
        "smooth": theirs.fpn_convs,
        "fuse": [theirs.fpn_bottleneck],
    }
    for name, modules in blocks.items():
        own = getattr(ours, name)
        for mine, other in zip([own] if len(modules) == 1 else own, modules, strict=True):
            for part in (other.batch_norm.running_mean, other.batch_norm.bias):
                torch.nn.init.normal_(part)
            mine[0].load_state_dict(other.conv.state_dict())
            mine[1].load_state_dict(other.batch_norm.state_dict())
    ours.classify.load_state_dict(theirs.classifier.state_dict())
    # odd grids: no level is half of another
    grids = ((13, 21), (7, 11), (4, 6), (2, 3))
    maps = [torch.randn(2, *grid, dim) for grid, dim in zip(grids, widths, strict=True)]
    with torch.no_grad():
        logits = ours(maps)
        torch.testing.assert_close(logits, theirs([m.permute(0, 3, 1, 2) for m in maps]))
    assert logits.shape == (2, 5, 13, 21)


def test_the_auxiliary_head_reads_s16_and_does_not_ship():
    head = UPerNet((4, 4, 6, 8), 8, 3)
    learner = SupervisedUPerNet(head)
    maps = [torch.randn(2, side, side, dim) for side, dim in ((16, 4), (8, 4), (4, 6), (2, 8))]
    main, auxiliary = learner(maps)
    assert main.shape == (2, 3, 16, 16) and auxiliary.shape == (2, 3, 4, 4)
    (main.mean() + auxiliary.mean()).backward()
    assert all(p.grad is not None for p in learner.parameters())
    assert not any("auxiliary" in name for name in head.state_dict())
