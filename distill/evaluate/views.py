"""What each task shows of a picture: the view policy, or what a protocol of the papers fixes."""

from distill.evaluate.config import EvaluationConfig
from distill.evaluate.encoder import Encoder
from distill.evaluate.outcome import Outcome

_FIXED = {
    "detection": "whole pictures, the shorter side detection.size (the detector's own)",
    "retrieval": "by retrieval.size and retrieval.shape (its authors' protocol)",
    "video": "whole frames, the shorter side video.size (DAVIS's protocol)",
}
_WINDOWS = {
    "windows": "square windows over the whole picture, overlaps averaged (the papers' test)",
    "whole": "whole pictures, the shorter side dense.size (the papers' test)",
}


def view_of(encoder: Encoder, task: str, config: EvaluationConfig, outcome: Outcome) -> str:
    """One line on what a task showed `encoder` of a picture."""
    if task in _FIXED:
        return _FIXED[task]
    if task in ("segmentation", "depth") and outcome.details["test"] != "view":
        return _WINDOWS[outcome.details["test"]]
    view = str(encoder.view_of(config.extract))
    if task == "robustness":
        view += "; ImageNet-C and -9, which are published cropped, centre-crop:1"
    return view
