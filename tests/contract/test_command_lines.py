"""What all commands share: a help that ends well, and one line and status 2 for a word they do not
know.
"""

from importlib import import_module
from pathlib import Path

import pytest

from contract.errors import Failure, UserError, exit_status

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    "distill.run": "run",
    "distill.attach": "attach",
    "distill.visualize": "visualize",
    "distill.similarity": "similarity",
    "distill.scenes": "scenes",
    "distill.pretrain_mae": "pretrain_mae",
    "distill.evaluate.__main__": "evaluate",
    "export.run": "run",
    "export.check": "check",
    "export.sign": "sign",
    "export.hub.__main__": "hub",
    "export.bench.__main__": "bench",
    "export.text.__main__": "text",
    "serve.repository.__main__": "repository",
    "serve.run": "run",
    "serve.client.__main__": "client",
    "serve.embed.__main__": "embed",
    "serve.rollout": "rollout",
    "serve.status": "status",
    "serve.bench": "bench",
    "serve.trial": "trial",
    "serve.demo.__main__": "demo",
    "serve.gateway.__main__": "gateway",
}


def leave(capsys, command: str, *words: str) -> tuple[int, str, str]:
    """Exit status, what is printed, what is complained."""
    with pytest.raises(SystemExit) as stopped:
        import_module(command).main(list(words))
    said = capsys.readouterr()
    return stopped.value.code, said.out, said.err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_word_that_is_no_option_is_one_line(capsys, command):
    status, _, error = leave(capsys, command, "--helf")
    name = f"python -m {command.split('.')[0]}.{COMMANDS[command]}"
    assert status == 2 and error.startswith("error: ") and error.endswith(f"(see {name} --help)\n")
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_command_gives_an_example_and_fits_a_terminal(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    status, said, _ = leave(capsys, command, "--help")
    name = f"python -m {command.split('.')[0]}.{COMMANDS[command]}"
    assert status == 0 and said.count(name) > 1
    assert not [line for line in said.splitlines() if len(line) > 80]


def test_every_command_is_here():
    modules = (p for name in ("distill", "export", "serve") for p in (ROOT / name).rglob("*.py"))
    found = {path for path in modules if "CommandLine(" in path.read_text(encoding="utf-8")}
    assert found == {ROOT / f"{command.replace('.', '/')}.py" for command in COMMANDS}


WORKER = """Caught UserError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "x.py", line 1, in <module>
    raise UserError(message)
contract.errors.UserError: """


@pytest.mark.parametrize("kind", [UserError, Failure])
@pytest.mark.parametrize("before", ["", WORKER])
def test_a_message_is_one_line_whatever_it_quotes(capsys, kind, before):
    def command() -> None:
        raise kind(f"{before if kind is UserError else ''}a  b\nc.jpg: no\u2028such file")

    assert exit_status(command) == (2 if kind is UserError else 1)
    assert capsys.readouterr().err == "error: a  b c.jpg: no such file\n"
