"""Many pictures of a command line: folders become their pictures, and one that cannot be read, or a
server that breaks off, costs the others nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from contract.errors import UserError
from contract.picture_files import picture_files
from serve.errors import BadPicture, ClientError, NotFinite, ServerFailed

Result = TypeVar("Result")


def expand(paths: Sequence[Path]) -> list[Path]:
    """Files as they are named, and in place of a folder the pictures in and below it; raises
    UserError for a folder without any, or that cannot be read.
    """
    result: list[Path] = []
    for path in paths:
        inside = list(map(Path, picture_files(path))) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"{path} has no pictures in it: name files, or another folder")
        result += inside
    return result


class Pictures:
    """Pictures that are asked about in groups; `bad` and `failure` say what came of the rest."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.bad: dict[int, ClientError] = {}
        """Why pictures were not answered, by their places in `paths`."""
        self.failure: ClientError | KeyboardInterrupt | None = None
        """What ended it before all pictures were answered."""

    def ask(
        self, most: int, ask: Callable[[list[Path], str], Result]
    ) -> Iterator[tuple[list[int], Result]]:
        """Answers about at most `most` pictures at a time, and the pictures' places. `ask` takes
        them and a number for the request's id, "" where one request is all.
        """
        places = range(len(self.paths))
        groups = [list(places[start : start + most]) for start in places[::most]]
        single, number = len(groups) == 1, 0
        while groups:
            group = groups.pop(0)
            try:
                result = ask([self.paths[place] for place in group], "" if single else f"{number}")
            except BadPicture as error:
                lost = [n for n in group if str(self.paths[n]) == error.picture]
                if not lost:
                    self.failure = error
                    return
                self.bad |= dict.fromkeys(lost, error)
                left = [n for n in group if n not in lost]
                groups[:0] = [left] if left else []
            except (ClientError, KeyboardInterrupt) as error:
                if not _may_be_a_picture(error):
                    self.failure = error
                    return
                if len(group) == 1:
                    self.bad[group[0]] = error
                else:  # which one is it?
                    half = len(group) // 2
                    groups[:0] = [group[:half], group[half:]]
            else:
                yield group, result
            number += 1

    def check(self) -> None:
        """Raise the reason where no picture was answered: of a single picture, what is wrong with
        it.
        """
        reasons = list(self.bad.values())
        if self.failure is not None and (not reasons or isinstance(self.failure, UserError)):
            raise self.failure
        if len(reasons) == 1 == len(self.paths) or not isinstance(reasons[0], UserError):
            raise reasons[0]
        raise UserError(f"none of the {len(self.paths)} pictures can be read: see above")


def _may_be_a_picture(error: BaseException) -> bool:
    """Whether it may have been one picture that a model failed on."""
    return isinstance(error, NotFinite) or (
        isinstance(error, ServerFailed) and "holds NaN" in error.message
    )
