"""Command lines whose mistakes are one line and exit status 2 (training's are alike; serving machines have none of its code)."""

import argparse
import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn


class CommandLine(argparse.ArgumentParser):
    """argparse's parser, made with `prog`, `description` and an `epilog` that is printed as it is written."""

    def __init__(self, **options: object) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse a command line; ends the program with status 2 for one that is wrong."""
        found, unknown = self.parse_known_args(args, namespace)
        for word in unknown:
            options = [name for action in self._actions for name in action.option_strings]
            self.error(f"{word}: {closest(word, options) if word.startswith('-') else 'one argument too many'}")
        return found

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line and end the program with status 2."""
        said = " ".join(message.removeprefix("argument ").split())
        self.exit(2, f"error: {said} (see {self.prog} --help)\n")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, f"no such choice '{value}': {closest(str(value), action.choices)}")


def add_tls(parser: argparse.ArgumentParser) -> None:
    """Options of those who connect to a server; `serve.client.tls.asked_tls` reads them."""
    parser.add_argument("--ssl", action="store_true", help="TLS, trusting the system's authorities")
    parser.add_argument("--ssl-root", type=Path, metavar="PEM", help="TLS: who signed the server's certificate")
    parser.add_argument("--ssl-certificate", type=Path, metavar="PEM", help="mTLS: this client's certificate")
    parser.add_argument("--ssl-key", type=Path, metavar="PEM", help="mTLS: its key")


def closest(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for the known word nearest to another, all of them if none is near."""
    listed = sorted(known)
    near = difflib.get_close_matches(word, listed, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(listed)}"
