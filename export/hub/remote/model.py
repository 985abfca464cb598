"""The model of a model repository: a student and its teachers' heads behind transformers'
interface.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperPreTrainedModel
from transformers.utils import cached_file

from distill.methods.losses import Prediction
from export.hub.remote.bare import PREFIX, build_student
from export.hub.remote.configuration import VFMDistillConfig
from export.hub.remote.none import build_heads

HEADS = "teacher_heads.safetensors"
_OF_THE_HUB = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


@dataclass
class VFMDistillOutput(ModelOutput):
    """`last_hidden_state` [B, h * w, d] and `pooler_output` [B, d] are the student's patches and
    summary; `patches` [B, h, w, d] are the former on their grid. `second` [B, d] is the second
    class token of a student that has one, `maps` are further maps [B, h_l, w_l, d_l], finest first.
    `teachers` are, by label, predictions in the teachers' units: `.token` [B, D] (None for a
    teacher without summary), `.patches` [B, h', w', D'], `.maps`.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    patches: Tensor | None = None
    second: Tensor | None = None
    maps: tuple[Tensor, ...] | None = None
    teachers: dict[str, Prediction] | None = None


class VFMDistillModel(TimmWrapperPreTrainedModel):
    """A student with its teachers' heads. Sides of pictures must be multiples of
    `model.student.stride`; use the folder's image processor.
    """

    config_class = VFMDistillConfig
    _keys_to_ignore_on_load_missing = (r"^heads\.",)  # they have a file of their own

    def __init__(self, config: VFMDistillConfig) -> None:
        super().__init__(config)
        network = {"architecture": config.architecture, "model_args": config.model_args}
        about = SimpleNamespace(**network | config.vfm_distill)
        self.student = build_student(about)
        self.heads = build_heads(about, self.student)
        self.post_init()

    @property
    def timm_model(self) -> nn.Module:
        """The timm network inside."""
        return self.student.net

    def forward(
        self,
        pixel_values: Tensor,
        teachers: Sequence[str] | None = None,
        return_dict: bool | None = None,
        **kwargs: object,
    ) -> VFMDistillOutput | tuple:
        """Encode normalised images [B, 3, H, W]; `teachers` are the labels to predict (default:
        all of `heads.teachers`, `[]`: none).
        """
        features = self.student(pixel_values.to(self.device, self.dtype))
        labels = list(self.heads.teachers) if teachers is None else teachers
        output = VFMDistillOutput(
            last_hidden_state=features.patches.flatten(1, 2),
            pooler_output=features.summary,
            patches=features.patches,
            second=features.second,
            maps=features.maps or None,
            teachers=self.heads(features, labels),
        )
        return output if return_dict in (None, True) else output.to_tuple()

    @classmethod
    def from_pretrained(cls, name: str, *arguments: object, **options: object):
        """Load the student, and the heads from their own file; as of any model of transformers."""
        with_info = options.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            name, *arguments, key_mapping={"^": PREFIX}, output_loading_info=True, **options
        )
        about = {key: options[key] for key in _OF_THE_HUB if key in options}
        if list(model.heads.parameters()):
            load_model(model.heads, cached_file(name, HEADS, **about))
        return (model, info) if with_info else model

    def save_pretrained(self, folder: str | Path, **options: object) -> None:
        """Write the student and the heads as two files, as they were; further `options` are those
        of transformers.
        """
        state = options.pop("state_dict", None) or self.state_dict()
        own = {
            name.removeprefix(PREFIX): value
            for name, value in state.items()
            if name.startswith(PREFIX)
        }
        super().save_pretrained(folder, state_dict=own, **options)
        if list(self.heads.parameters()):
            save_model(self.heads, str(Path(folder) / HEADS))
