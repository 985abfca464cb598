"""Zero-shot classification's last step: image embeddings and class embeddings become probabilities.
numpy only.

Used by clients and, copied, by the server's `zero_shot`, so it must not import anything of this
package.
"""

from typing import NamedTuple

import numpy as np


class ClassVectors(NamedTuple):
    """What classes are compared by: unit vectors [C, d] and, for the rows of a linear classifier,
    their lengths and biases.

    `scale` multiplies cosines (CLIP's learned temperature); a classifier's rows have none: their
    scores are its logits.
    """

    embeddings: np.ndarray
    scale: float = 100.0
    norms: np.ndarray | None = None
    bias: np.ndarray | None = None


def logits(tokens: np.ndarray, classes: ClassVectors) -> np.ndarray:
    """Scores float32 [B, C] of image embeddings [B, d].

    CLIP's: `scale` times the cosine. A classifier's: exactly its logits, `tokens @ W.T + b`;
    cosines with its rows rank worse, since their lengths and the length of the image's vector say
    how sure it is.
    """
    tokens = tokens.astype(np.float32)
    if classes.norms is not None:
        return (tokens @ classes.embeddings.T) * classes.norms + classes.bias
    # a vector of zeros has no direction: every class is as near
    lengths = np.maximum(np.linalg.norm(tokens, axis=1, keepdims=True), 1e-12)
    return classes.scale * (tokens / lengths) @ classes.embeddings.T


def probabilities(tokens: np.ndarray, classes: ClassVectors) -> np.ndarray:
    """Softmax over the classes, float32 [B, C]."""
    scores = logits(tokens, classes)
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
