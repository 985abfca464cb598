"""From labels to embeddings: text files of labels and templates, the CLIP text tower, and the
prompt ensemble.

torch and open_clip are imported by the functions that need them: the command's --help answers
without them.
"""

import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from contract.errors import UserError, suggest
from contract.names import MOST_TEMPLATES, is_text

if TYPE_CHECKING:
    from torch import Tensor, nn

_PLACE = "{}"
"""Where the label goes in a template."""

DEFAULT_TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a close-up photo of a {}.",
    "a photo of a small {}.",
    "a photo of a large {}.",
    "a dark photo of a {}.",
    "a bright photo of a {}.",
    "a picture with a {} in it.",
)
"""General sentences that fit most photographs; special subjects (satellite images, food) need their
own.
"""


_OTHER_PARTS = ("visual.", "text_decoder.", "logit_bias")
"""Parts of a CLIP or CoCa that the text embedding does not need."""


@dataclass(frozen=True)
class Label:
    """A class: its name in data and answers, the words for it in a prompt, and its line."""

    name: str
    words: str
    line: int


def _read_lines(path: Path, option: str, holds: str) -> list[tuple[int, str]]:
    """Read the lines of a UTF-8 file that are not blank, with their numbers; raises UserError where
    there are none.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{option} {path}: no such file (it must hold {holds} per line)") from error
    except IsADirectoryError as error:
        raise UserError(
            f"{option} {path} is a folder: give a text file with {holds} per line"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{option} {path} is not UTF-8 text (byte {error.start}): save it as UTF-8"
        ) from error
    # not splitlines(), which also breaks at form feeds and line separators inside a label
    lines = [
        (number, line.strip(" \r"))
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]
    if not lines:
        raise UserError(f"{option} {path} is empty: write {holds} per line into it")
    return lines


def _check_text(path: Path, number: int, text: str) -> None:
    """Raise UserError for what a server would refuse to state."""
    if not is_text(text):
        raise UserError(
            f"{path}:{number}: a text with control characters, or of more than 2,000 characters: "
            "write plain, shorter text"
        )


def read_labels(path: Path) -> list[Label]:
    """Read a class per line: its name, or `NAME<tab>WORDS` where the words of the prompt differ.

    Raises UserError for a missing or empty file, half a pair, and a duplicate name.
    """
    labels: dict[str, Label] = {}
    for number, line in _read_lines(path, "--labels", "a label"):
        name, _, words = (part.strip() for part in line.partition("\t"))
        if "\t" in line and not (name and words):
            raise UserError(
                f"{path}:{number}: '{name}{words}' has a tab with nothing on one side: "
                "NAME<tab>WORDS, or NAME"
            )
        _check_text(path, number, name)
        if name in labels:
            raise UserError(
                f"{path}:{number}: label '{name}' is a duplicate of line {labels[name].line}: give "
                "each class one line"
            )
        labels[name] = Label(name, words or name, number)
    return list(labels.values())


def read_templates(path: Path | None) -> list[str]:
    """Read a template per line, or return the default ones; raises UserError for a line without
    `{}`.
    """
    if path is None:
        return list(DEFAULT_TEMPLATES)
    lines = _read_lines(path, "--templates", f"a sentence with {_PLACE} for the label")
    if len(lines) > MOST_TEMPLATES:
        raise UserError(f"{path} has {len(lines)} templates: give at most {MOST_TEMPLATES}")
    for number, line in lines:
        _check_text(path, number, line)
        if _PLACE not in line:
            raise UserError(
                f"{path}:{number}: template '{line}' has no {_PLACE} for the label: write for "
                f"example 'a photo of a {_PLACE}.'"
            )
    return [line for _, line in lines]


def _fill(template: str, label: Label) -> str:
    # not str.format: a sentence may hold other braces
    return template.replace(_PLACE, label.words)


@dataclass(frozen=True)
class TextTower:
    """A CLIP without its image tower, in eval mode: `model.encode_text(tokens [B, context]) -> [B,
    d]`.
    """

    model: "nn.Module"
    tokenizer: object
    context: int
    about: dict[str, str | bool | float]
    """Recorded in both files: model, pretrained, quick_gelu, logit_scale, text_weights_sha256,
    open_clip.
    """


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the logging and warnings of open_clip and the exporter."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def open_tower(model: str, pretrained: str) -> TextTower:
    """Build open_clip's `model`, load its weights from a tag, a local file or at `random` (seed 0),
    and keep the text part.

    Raises UserError for unknown names, weights that cannot be fetched or do not fit, and tokenizers
    other than CLIP's.
    """
    try:
        import open_clip
    except ImportError as error:
        raise UserError(
            f"export.text needs open_clip ({error}): pip install 'vfm-distill[text]'"
        ) from error
    import torch
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    from distill.models.weights import tensors_sha256

    name = _add_configuration(Path(model)) if model.endswith(".json") else model.replace("/", "-")
    config = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if config is None:
        raise UserError(
            f"--model {model}: open_clip has no such model: "
            f"{suggest(name, open_clip.list_models())}"
        )
    if {"hf_tokenizer_name", "hf_model_name"} & config[
        "text_cfg"
    ].keys() or "siglip" in name.lower():
        raise UserError(
            f"--model {name}: its tokenizer is one of the Hugging Face hub's, and only CLIP's own "
            "is supported so far: choose a model such as ViT-B-16 or ViT-L-14"
        )
    tag = get_pretrained_cfg(name, pretrained)
    file = Path(pretrained) if not tag and pretrained != "random" else None
    if file and not file.is_file():
        known = [*list_pretrained_tags_by_model(name), "random"]
        raise UserError(
            f"--pretrained {pretrained}: no such file, and no tag of {name}: "
            f"{suggest(pretrained, known)}"
        )
    # a tag knows what its weights were trained with; open_clip itself only warns, and computes
    # something else
    quick_gelu = bool(config.get("quick_gelu") or (tag or {}).get("quick_gelu"))
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            built = open_clip.create_model(
                name, pretrained if tag else None, force_quick_gelu=quick_gelu
            ).eval()
            tokenizer = open_clip.get_tokenizer(name)
    # errors of the hub, urllib or torch: the remedy is the same for all
    except Exception as error:
        reason = (
            (str(error).strip().splitlines() or [type(error).__name__])[-1]
            .rpartition("Last error: ")[2][:120]
            .strip(" .")
        )
        if not tag:
            raise UserError(
                f"--model {model}: open_clip cannot build it ({reason}): correct its configuration"
            ) from error
        source = (
            tag.get("url")
            if not tag.get("hf_hub")
            else "huggingface.co/" + tag["hf_hub"].rstrip("/")
        )
        variant = (
            f" and --model {name}-quickgelu" if quick_gelu and not config.get("quick_gelu") else ""
        )
        raise UserError(
            f"--pretrained {pretrained}: its weights cannot be downloaded ({reason}): get them "
            f"from {source} on another machine and give --pretrained FILE{variant}"
        ) from error
    if file:
        _load_text_weights(built, file)
    del built.visual  # the larger half, which no text needs
    weights = {
        key: value for key, value in built.state_dict().items() if not key.startswith(_OTHER_PARTS)
    }
    about = {
        "model": name,
        "pretrained": file.name if file else pretrained,
        "quick_gelu": quick_gelu,
        "logit_scale": round(built.logit_scale.exp().item(), 4),
        "text_weights_sha256": tensors_sha256(weights),
        "open_clip": open_clip.__version__,
    }
    print(
        f"model     {name}, "
        f"{'RANDOM weights (seed 0)' if pretrained == 'random' else f'weights from {pretrained}'}"
    )
    if pretrained == "random":
        print(
            "note      random weights are for trials: these embeddings do not represent the labels"
        )
    if file and not quick_gelu and f"{name}-quickgelu" in open_clip.list_models():
        print(
            f"note      {name} computes GELU: weights of OpenAI, DFN or MetaCLIP need --model "
            f"{name}-quickgelu"
        )
    return TextTower(built, tokenizer, tokenizer.context_length, about)


def _add_configuration(path: Path) -> str:
    """Register a model described in a .json file with open_clip; returns its name, the file's
    stem.
    """
    import open_clip

    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is not JSON: {error}"
        raise UserError(
            f"--model {path}: {reason} (give open_clip's name or a .json configuration)"
        ) from error
    if not isinstance(config, dict) or not all(
        isinstance(config.get(k), dict) for k in ("vision_cfg", "text_cfg")
    ):
        raise UserError(
            f"--model {path} is not a configuration of open_clip (it needs embed_dim, vision_cfg "
            "and text_cfg)"
        )
    open_clip.add_model_config(path)
    return path.stem


def _load_text_weights(model: "nn.Module", path: Path) -> None:
    """Load a file's text tower strictly, without running code from it.

    Shapes of image weights are compared too, because they identify the model. Raises UserError for
    a file that is damaged, holds code, or belongs to another architecture.
    """
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    from distill.models.copies import best_prefix, select
    from distill.models.weight_files import read_state_dict

    state = read_state_dict(path)
    # open_clip has two layouts, with the text tower at the top or in `text.`
    names = set(model.state_dict())
    names |= {name.removeprefix("text.") for name in names}

    def convert(part: dict) -> dict:
        return {name: tensor for name, tensor in part.items() if name in names}

    prefix = best_prefix(state, convert, dict.fromkeys(names), str(path))
    state = convert_state_dict(model, select(state, prefix))
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    expected = model.state_dict()
    if "logit_scale" in state:
        state["logit_scale"] = state["logit_scale"].reshape(expected["logit_scale"].shape)
    unfit = f"--pretrained {path} does not fit this --model"
    for name, tensor in expected.items():
        # image sizes of one model differ in the grid of positions only
        if (
            name in state
            and state[name].shape != tensor.shape
            and not (name.startswith("visual.") and "pos" in name)
        ):
            raise UserError(
                f"{unfit}: its '{name}' is {list(state[name].shape)}, the model's "
                f"{list(tensor.shape)}"
            )
    text = [name for name in expected if not name.startswith(_OTHER_PARTS)]
    missing = [name for name in text if name not in state]
    # names without a dot are accompanying numbers, such as OpenAI's context_length
    extra = [n for n in state if "." in n and n not in expected and not n.startswith(_OTHER_PARTS)]
    if missing or extra:
        wrong = f"'{missing[0]}' is missing" if missing else f"'{extra[0]}' is not in the model"
        raise UserError(
            f"{unfit}: {wrong} ({len(missing or extra)} such tensors): name the model it was saved "
            "from"
        )
    model.load_state_dict({name: state[name] for name in text}, strict=False)


def tokenize(
    tokenizer: Callable, context: int, labels: Sequence[Label], templates: Sequence[str], path: Path
) -> "Tensor":
    """Token ids [C * T, context], int64, label by label, of every label in every template.

    Raises UserError for a prompt longer than `context`, which the tokenizer would truncate
    silently.
    """
    prompts = []
    for label in labels:
        for template in templates:
            prompt = _fill(template, label)
            length = len(tokenizer.encode(prompt)) + 2  # the start and end tokens
            if length > context:
                raise UserError(
                    f"{path}:{label.line}: label '{_shorten(label.words)}' is too long: "
                    f"'{_shorten(template)}' makes it {length} tokens and the model reads "
                    f"{context}: use fewer words"
                )
            prompts.append(prompt)
    return tokenizer(prompts, context_length=context)


def _shorten(text: str, most: int = 40) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def class_embeddings(
    encode: Callable[["Tensor"], "Tensor"],
    tokens: "Tensor",
    labels: Sequence[Label],
    batch_size: int,
) -> "Tensor":
    """Embeddings [C, d], float32 on the CPU, of tokens [C * T, context], by CLIP's prompt
    ensembling.

    Every prompt's embedding `encode(tokens [B, context]) -> [B, d]` is normalized, and so is their
    mean over the T templates. Raises UserError where the model gives NaN or infinity.
    """
    import torch
    import torch.nn.functional as F
    from rich.progress import track

    batches = tokens.split(batch_size)
    prompts = []
    with torch.inference_mode():
        for batch in track(batches, "prompts   ", disable=not sys.stdout.isatty()):
            prompts.append(F.normalize(encode(batch).float(), dim=-1).cpu())
        embeddings = F.normalize(
            torch.cat(prompts).view(len(labels), -1, prompts[0].shape[1]).mean(dim=1), dim=-1
        )
    wrong = (~torch.isfinite(embeddings).all(dim=1)).nonzero()
    if len(wrong):
        name = labels[int(wrong[0])].name
        raise UserError(
            f"the model returns NaN or infinity for label '{name}': its weights are damaged, "
            "download them again"
        )
    return embeddings.clone()  # tensors of inference mode cannot be changed outside it
