"""What a student inherits of the weights that it learnt from: their licences, as its run and its
bundle record them.
"""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from contract.engine_record import Record
from contract.names import Sha256, Text

LICENCE = r"^[a-z0-9][a-z0-9.+_-]*$"

LicenceId = Annotated[str, StringConstraints(pattern=LICENCE, max_length=100)]
"""SPDX's, or the publisher's own, in lower case: apache-2.0, dinov3-license."""

Flag = Literal["non-commercial", "custom", "unknown"]

_LABEL = r"^[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)*$"


class LicenceRecord(Record):
    """One origin of a student: a teacher, its own starting weights (`student`), or what an earlier
    run in either's place had learnt from (`big.clip`).
    """

    label: Annotated[str, StringConstraints(pattern=_LABEL, max_length=400)]
    name: Text
    """The network's, as the recipe has it."""
    source: Text
    """Where its weights came from: a hub's repository, file, package or code."""
    sha256: Sha256 | None
    """Of that file, where it was at hand (of own code: of its source)."""
    licence: LicenceId | None
    """None where it is unknown, and of random weights, which have none."""
    flags: Annotated[tuple[Flag, ...], Field(max_length=3)] = ()

    @property
    def words(self) -> str:
        """Whose it is, licence, flags and source, for a line."""
        licence = self.licence or ("unknown" if "unknown" in self.flags else "no licence")
        flags = [flag for flag in self.flags if flag != "unknown"]
        noted = f" ({', '.join(flags)})" if flags else ""
        return f"{self.label}: {licence}{noted}, {self.source}"
