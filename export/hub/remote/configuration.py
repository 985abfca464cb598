"""The configuration of a student that timm builds."""

from transformers.models.timm_wrapper.configuration_timm_wrapper import TimmWrapperConfig


class VFMDistillConfig(TimmWrapperConfig):
    """timm's `config.json`, whose further entry `vfm_distill` describes the student and its
    teachers' heads.
    """
