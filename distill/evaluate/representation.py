"""What the features themselves look like: clusters, a t-SNE picture, and their spread per
teacher.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from sklearn.manifold import TSNE
from sklearn.metrics import normalized_mutual_info_score, silhouette_score
from sklearn.preprocessing import normalize
from torch import Tensor

from contract.errors import UserError
from distill.figures import save_figure
from distill.methods.deployment import Deployment
from distill.methods.targets import Moments
from distill.methods.umt import SpaceInteraction

SILHOUETTE_SAMPLE = 5000
"""Most pictures whose distances to each other the silhouette looks at."""

LEGEND_CLASSES = 20
"""Most classes that a legend names, and that colours tell apart."""


def cluster_scores(
    features: np.ndarray, labels: np.ndarray, classes: int, seed: int
) -> dict[str, float]:
    """How far features [n, d] fall into the classes of `labels` [n].

    `NMI` in [0, 1]: normalised mutual information of the labels and k-means clusters, as many as
    `classes`, of the L2-normalised features. `silhouette` in [-1, 1]: mean silhouette (Rousseeuw
    1987) of the labels by cosine distance, over at most 5000 pictures drawn with `seed`.

    Raises UserError for labels of one class only, or of no two pictures alike, fewer pictures than
    classes, and features that are not finite.
    """
    check_features(features, labels)
    result = len(np.unique(labels))
    if result < 2:
        raise UserError(
            f"the {len(labels)} pictures looked at are of one class: raise representation.images"
        )
    if len(features) < classes:
        raise UserError(
            f"{len(features)} pictures cannot make {classes} clusters: raise representation.images"
        )
    sample = min(len(features), SILHOUETTE_SAMPLE)
    if result >= sample:
        raise UserError(
            f"{sample} pictures of {result} classes have no silhouette: raise representation.images"
        )
    directions = normalize(features)
    # A batch smaller than the number of clusters would leave most of them untouched by a step.
    means = MiniBatchKMeans(
        n_clusters=classes, batch_size=max(1024, 4 * classes), n_init=3, random_state=seed
    )
    clusters = means.fit_predict(directions)
    silhouette = silhouette_score(
        directions, labels, metric="cosine", sample_size=sample, random_state=seed
    )
    return {
        "NMI": float(normalized_mutual_info_score(labels, clusters)),
        "silhouette": float(silhouette),
    }


def tsne_picture(
    features: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    path: Path,
    perplexity: float,
    seed: int,
) -> Path:
    """Write a t-SNE (van der Maaten & Hinton 2008) of L2-normalised features [n, d], coloured by
    `labels` [n].

    `labels` index `class_names`; up to 20 classes are named in a legend. The perplexity is lowered
    to n / 3 where it is larger: more neighbours than that show no neighbourhoods.

    Raises UserError for fewer than four pictures and features that are not finite or all alike.
    """
    points = tsne_points(features, labels, perplexity, seed)
    figure, axis = plt.subplots(figsize=(8, 6.5), layout="constrained")
    _scatter(axis, points, labels, class_names)
    present = len(np.unique(labels))
    axis.set_title(f"t-SNE of {len(features)} pictures, {present} classes")
    if present <= LEGEND_CLASSES:
        figure.legend(loc="outside right upper", frameon=False, markerscale=2)
    return save_figure(figure, path)


def tsne_figure(
    path: Path,
    networks: Mapping[str, np.ndarray],
    labels: np.ndarray,
    class_names: Sequence[str],
    perplexity: float,
    seed: int,
) -> Path:
    """Write the t-SNE of several networks' features [n, d] of the same pictures side by side
    (SeFA Figure 2).

    A class has one colour in all of them; pictures of a single class are drawn without. Raises
    UserError as `tsne_picture` does.
    """
    points = {
        name: tsne_points(features, labels, perplexity, seed) for name, features in networks.items()
    }
    size = (5 * len(networks) + 1.5, 5)
    figure, axes = plt.subplots(1, len(networks), figsize=size, squeeze=False, layout="constrained")
    for axis, (name, found) in zip(axes[0], points.items(), strict=True):
        _scatter(axis, found, labels, class_names)
        axis.set_title(name, fontsize=10)
    present = len(np.unique(labels))
    about = f"t-SNE of {len(labels)} pictures" + (f", {present} classes" if present > 1 else "")
    figure.suptitle(about, fontsize=11)
    if 1 < present <= LEGEND_CLASSES:
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right upper", frameon=False, markerscale=2)
    return save_figure(figure, path)


def tsne_points(
    features: np.ndarray, labels: np.ndarray, perplexity: float, seed: int
) -> np.ndarray:
    """Places [n, 2] of L2-normalised features [n, d], the same for the same seed; raises UserError
    as `tsne_picture` does.
    """
    check_features(features, labels)
    if len(features) < 4:
        raise UserError(
            f"t-SNE of {len(features)} pictures shows nothing: give it 4 or more (of evaluation: "
            "representation.tsne_images)"
        )
    directions = normalize(features).astype(np.float32)
    start = "pca" if directions.shape[1] > 1 else "random"
    tsne = TSNE(init=start, perplexity=min(perplexity, len(features) / 3), random_state=seed)
    return tsne.fit_transform(directions)


def _scatter(
    axis: plt.Axes, points: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
) -> None:
    """Points [n, 2] in the colours of their labels."""
    present = np.unique(labels)
    named = len(present) <= LEGEND_CLASSES
    colours = plt.get_cmap("tab10" if len(present) <= 10 else "tab20" if named else "gist_rainbow")
    for order, label in enumerate(present):
        colour = colours(order) if named else colours(order / len(present))
        axis.scatter(
            *points[labels == label].T, s=12, color=colour, linewidths=0, label=class_names[label]
        )
    axis.set(xticks=[], yticks=[])


def check_features(features: np.ndarray, labels: np.ndarray) -> None:
    """Raise UserError unless there is a label to each of the features [n, d], which are finite and
    not all alike.
    """
    if features.ndim != 2 or len(labels) != len(features):
        raise UserError(
            f"features {list(features.shape)} do not go with {len(labels)} labels: give a row to "
            "each label"
        )
    if not np.isfinite(features).all():
        raise UserError("the features are not finite: check the network's weights and precision")
    if len(features) and (features == features[0]).all():
        raise UserError(
            f"the features of all {len(features)} pictures are alike: check the network's weights"
        )


def spread(features: np.ndarray | Tensor) -> float:
    """Root mean square over channels of the standard deviations of features [..., d], in the
    features' own units.
    """
    values = (
        features.detach().cpu().numpy() if isinstance(features, Tensor) else np.asarray(features)
    )
    return float(np.sqrt(values.reshape(-1, values.shape[-1]).var(axis=0, dtype=np.float64).mean()))


def teacher_variance(spreads: Mapping[str, Mapping[str, float]]) -> list[dict[str, str | float]]:
    """A row for each space ("teachers, raw", "shared space"): every teacher's `spread` there, and
    the largest over the least.

    KPU reports this ratio falling from 33.4 among the teachers to 4.5 in the shared space. A row is
    {"space": name, teacher: spread, …, "max/min": ratio}.

    Raises UserError for a row without teachers, and a spread that is not above 0.
    """
    rows = []
    for space, values in spreads.items():
        if not values:
            raise UserError(
                f"'{space}' has no teachers whose features could be compared: give at least one"
            )
        for teacher, value in values.items():
            if not (value > 0 and np.isfinite(value)):
                raise UserError(
                    f"'{space}': features of '{teacher}' have spread {value}: check its weights"
                )
        rows.append(
            {"space": space, **values, "max/min": max(values.values()) / min(values.values())}
        )
    return rows


@torch.no_grad()
def shared_spaces(deployment: Deployment, images: Tensor) -> dict[str, Tensor] | None:
    """Each teacher's space behind UMT's interaction, [B, h*w, c], over uint8 images [B, 3, H, W].

    The feature channels of the patches, in front of the read-out's own projections. None for
    methods whose heads share no such spaces.
    """
    if not isinstance(deployment.coupling, SpaceInteraction):
        return None
    features = deployment.student(deployment.preprocess.normalize(images.float().div(255)))
    height, width = features.patches.shape[1:3]
    patches = deployment.coupling(features)[
        :, -height * width :, :, : deployment.coupling.space_dim
    ]  # [B, hw, M, c]
    # A deployment reduced to one head still has all spaces: the read-out knows which is whose.
    return {
        label: patches[:, :, head.read_out.order[label]] for label, head in deployment.heads.items()
    }


class Spread:
    """The `spread` of vectors that come in batches: of all of them together, whatever the
    batches.
    """

    def __init__(self) -> None:
        self.moments: list[Moments] = []

    def add(self, *maps: Tensor) -> None:
        """Take in vectors [..., d] of one map or of several, which may have other widths, always in
        the same order.
        """
        if not self.moments:
            self.moments = [Moments(map_.shape[-1], full=False) for map_ in maps]
        for moments, map_ in zip(self.moments, maps, strict=True):
            moments.add(map_)

    def value(self) -> float:
        """Root mean square over the channels of all maps of the standard deviations."""
        variances = torch.cat([moments.covariance() for moments in self.moments])
        return variances.clamp_min(0).mean().sqrt().item()
