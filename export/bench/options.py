"""Options of a benchmark."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from contract.errors import UserError
from export.options import Options, spelled

Device = Literal["cpu", "cuda"]


class BenchOptions(Options):
    """What to time; raises UserError, in one line, for values that cannot be."""

    bundles: tuple[Path, ...] = Field(min_length=1)
    """One or more precisions of one student."""
    run: Path | None = None
    """The student's run folder, for torch and the cosines to it."""
    trust_code: bool = False
    """Whether to import and call the python: code of a decoder among the run's heads."""
    graphs: tuple[str, ...] = ()
    """Empty: backbone, interaction, every teacher's head, fused."""
    batches: tuple[int, ...] = Field((1, 8, 32), min_length=1)
    rounds: int = 10
    """Timed calls of each graph in each runtime."""
    devices: tuple[Device, ...] = ()
    """Empty: cpu and, where there is a GPU, cuda."""
    threads: int | None = None
    """CPU threads of every runtime; None: the fastest of a few, by measurement."""
    compile: bool = True
    """Whether torch.compile is timed; it takes minutes to start."""
    output: Path | None = None
    """Folder for bench.json and bench.png; None: the first bundle's parent."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        threads = () if self.threads is None else (self.threads,)
        counts = {"batches": self.batches, "rounds": (self.rounds,), "threads": threads}
        for name, values in counts.items():
            if values and min(values) < 1:
                raise UserError(f"{spelled(name)} {min(values)}: give 1 or more")
        return self
