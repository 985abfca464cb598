"""The protocol of every evaluation task: `quick` (the defaults, for small data and short runs) or
`paper` (the values of `distill.evaluate.papers`). A key that is given wins over either.
"""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from contract.views import EVALUATED
from distill.evaluate.config import EvaluationConfig
from distill.evaluate.papers import PAPERS, Value
from distill.recipe_files import show


class _Difference(NamedTuple):
    """A setting that is not a paper's: the value used, and why."""

    key: str
    used: Any
    paper: Any
    reason: str


SECTIONS = {
    "knn": "knn",
    "linear": "probe",
    "finetune": "finetune",
    "transfer": "probe",
    "zero-shot": "zero_shot",
    "segmentation": "segmentation",
    "depth": "depth",
    "detection": "detection",
    "retrieval": "retrieval",
    "video": "video",
    "robustness": "robustness",
    "clusters": "representation",
}
"""The section with the protocol of each task."""


_VIEW = "extract.view"

_TAKEN = {"dense.size": "size", "dense.test": "test"}
"""Settings that a network may not take, and the detail of an outcome that says what it took."""


@dataclass(frozen=True)
class Applied:
    """What a task's numbers are made with: the protocol's name, the settings, the paper's values
    among them, and where they are not the paper's.
    """

    task: str
    name: str
    config: EvaluationConfig
    values: tuple[Value, ...] = ()
    differences: tuple[_Difference, ...] = ()
    limits: tuple[str, ...] = field(default=())

    def about(self, details: Mapping[str, Any]) -> dict[str, Any]:
        """For evaluation.json, with what the `details` of an outcome say that a network did not
        take: a size that is no multiple of its stride, whole pictures.
        """
        differs = {
            key: {"used": used, "paper": paper, "reason": reason}
            for key, used, paper, reason in self.differences
        }
        papers = {value.key: value.paper for value in self.values}
        for key, detail in _TAKEN.items():
            if key in papers and details[detail] != _get(self.config, key):
                values = {"used": details[detail], "paper": papers[key]}
                differs[key] = values | {"reason": "what the network takes"}
        return {
            "name": self.name,
            "paper": {
                value.key: {"value": value.paper, "source": value.source} for value in self.values
            },
            "differs": differs,
            "otherwise": list(self.limits),
        }

    def lines(self, whole: bool = True) -> list[str]:
        """For a terminal of 80 columns: the name, every value with the paper's where it differs,
        and what is done otherwise; without `whole` what differs, and of `paper` what is done
        otherwise.
        """
        other = {difference.key: difference for difference in self.differences}
        texts = []
        for value in self.values:
            if value.key in other:
                used, paper = _show(other[value.key].used), _show(value.paper)
                reason = "given; " if other[value.key].reason == "given" else ""
                texts.append(f"{value.key}={used} ({reason}paper: {paper})")
            elif whole:
                texts.append(f"{value.key}={_show(value.paper)}")
        title = f"{self.task}: {self.name}"
        if not self.differences:
            title += ", the values of the papers"
        elif not whole:
            title += ", not as in the papers"
        text = ": ".join(filter(None, (title, ", ".join(texts))))
        lines = _wrap(text, "protocol  ")
        for limit in self.limits if whole or self.name == "paper" else ():
            lines += _wrap(f"otherwise than the papers: {limit}", "")
        return lines


def apply_protocol(config: EvaluationConfig, task: str, view: str | None = None) -> Applied:
    """The settings of a task under its protocol: `paper` sets every key that is not given. `view`
    is the network's own, for `extract.view`.
    """
    name = getattr(config, SECTIONS[task]).protocol or config.protocol
    used = _set(config, _VIEW, view) if view and not config.extract.view else config
    values: dict[str, Value] = {}
    limits: list[str] = []
    for paper in PAPERS[task]:
        if paper.when and _get(used, paper.when[0]) != paper.when[1]:
            continue
        for value in paper.values:
            if name == "paper" and not _is_given(config, value.key):
                used = _set(used, value.key, value.paper)
        values |= {value.key: value for value in paper.values}
        limits += paper.limits
    differences = tuple(
        _Difference(
            value.key,
            _get(used, value.key),
            value.paper,
            "given" if _is_given(config, value.key) else name,
        )
        for value in values.values()
        if _get(used, value.key) != value.paper
    )
    return Applied(task, name, used, tuple(values.values()), differences, tuple(limits))


def describe_protocols() -> str:
    """Every paper's value by source, with the quick one where it differs, for a terminal of 80
    columns.
    """
    lines = []
    for task, papers in PAPERS.items():
        lines.append(f"  {task}  ({SECTIONS[task]}.protocol)")
        for paper in papers:
            if paper.when:
                lines.append(f"    with {paper.when[0]}={paper.when[1]}")
            by_source: dict[str, list[str]] = {}
            for value in paper.values:
                by_source.setdefault(value.source, []).append(_with_quick(value))
            for source, texts in by_source.items():
                lines += _wrap(f"{source}: {', '.join(texts)}", "    ", 6)
            for limit in paper.limits:
                lines += _wrap(f"otherwise: {limit}", "    ", 6)
    return "\n".join(lines)


def _with_quick(value: Value) -> str:
    quick, text = _get(EvaluationConfig(), value.key), f"{value.key}={_show(value.paper)}"
    # unset, the epochs are those of finetune.init
    same = quick == value.paper or value.key == "finetune.epochs"
    return text if same else f"{text} (quick: {_show(quick)})"


def _show(value: Any) -> str:
    return value if isinstance(value, str) else show(value)


def _parts(key: str) -> tuple[str, str]:
    section, _, name = key.partition(".")
    return section, name


def _get(config: EvaluationConfig, key: str) -> Any:
    if key == "finetune.epochs":  # unset, they depend on finetune.init
        return config.finetune.passes
    section, name = _parts(key)
    value = getattr(getattr(config, section), name)
    return str(EVALUATED) if key == _VIEW and value is None else value


def _is_given(config: EvaluationConfig, key: str) -> bool:
    section, name = _parts(key)
    return name in getattr(config, section).model_fields_set


def _set(config: EvaluationConfig, key: str, value: Any) -> EvaluationConfig:
    section, name = _parts(key)
    changed = getattr(config, section).model_copy(update={name: value})
    return config.model_copy(update={section: changed})


def _wrap(text: str, first: str, indent: int = 10) -> list[str]:
    return textwrap.wrap(
        text,
        80,
        initial_indent=first or " " * indent,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
