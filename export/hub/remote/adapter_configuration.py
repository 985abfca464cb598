"""The configuration of a student that is more than a network of timm's."""

from transformers import PreTrainedConfig


class VFMDistillConfig(PreTrainedConfig):
    """`architecture` and `model_args` of the network inside the student, and `vfm_distill`, which
    describes the student and its teachers' heads.
    """

    model_type = "vfm_distill"
