"""Command lines whose mistakes are one line and exit status 2, as those found later are, with the
nearest right word.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import NoReturn

from contract.errors import UserError, suggest


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argument's `type`: a whole number within bounds."""

    def read(text: str) -> int:
        if not text.removeprefix("-").isdecimal():
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number")
        value = int(text)
        if value < least or (most is not None and value > most):
            bounds = f"{least} or more" if most is None else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"{value} is out of range: use {bounds}")
        return value

    return read


def read_size(text: str | None, option: str = "--size") -> tuple[int, int] | None:
    """Height and width of `HxW`, None for None; raises UserError."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise UserError(f"{option} {text}: write pixels, height x width: 448x336")
    return int(sides[0]), int(sides[1])


class CommandLine(argparse.ArgumentParser):
    """argparse's parser, made with `prog`, `description` and an `epilog` that is printed as it is
    written.
    """

    def __init__(self, **options: object) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse a command line; ends the program with status 2 for one that is wrong."""
        return self._whole(*self.parse_known_args(args, namespace))

    def parse_intermixed_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """The same where options may stand between the words of a list."""
        return self._whole(*self.parse_known_intermixed_args(args, namespace))

    def _whole(self, result: argparse.Namespace, unknown: Sequence[str]) -> argparse.Namespace:
        if unknown:
            options = [name for action in self._actions for name in action.option_strings]
            wrong = unknown[0]
            self.error(
                f"{wrong}: "
                + (suggest(wrong, options) if wrong.startswith("-") else "one argument too many")
            )
        return result

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line and end the program with status 2."""
        text = " ".join(message.removeprefix("argument ").split())
        self.exit(2, f"error: {text} (see {self.prog} --help)\n")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(
                action, f"no such choice '{value}': {suggest(str(value), action.choices)}"
            )
