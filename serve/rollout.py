"""`python -m serve.rollout`: switch a running server to a new bundle, or refuse the bundle before
switching.

The new version is first loaded under names that no client uses, and its answers for the bundle's
golden photographs must match those recorded at export. Only then is it loaded next to the old one
and the models that clients use are switched, each in one step. The old version stays on the disk
until `--finish`. The models of an ensemble stay loaded, too, so that `--back` takes a moment;
`features` as one model is loaded again, for it would hold the memory of two.
"""

import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from contract.command_line import CommandLine
from contract.errors import UserError, exit_status, printable
from contract.signing import PublicKey, add_trust
from serve.errors import ServerError

EPILOG = """\
examples:
  python -m serve.run bundles/first --repository repository
  python -m serve.rollout repository --bundle bundles/second
  python -m serve.rollout repository --back
  python -m serve.rollout repository --finish

--bundle loads the new version next to the old one, compares its answers with
those recorded at export, and switches. --back returns to the previous
version; --finish deletes the versions that do not serve.

A repository that was rendered with --trust takes signed bundles only.

The new bundle must have the same models, inputs, outputs and largest batch,
because clients rely on them; a bundle that differs needs its own server.
Versions are numbered 1, 2, …; `features` answers with the number of the
version that serves.

Exit status: 0 success, 1 the new version was rejected and the old one still
serves, 2 usage error.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandLine(
        prog="python -m serve.rollout",
        description="Switch a running server to a new bundle, or back.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "repository", type=Path, metavar="REPOSITORY", help="folder of serve.run --repository"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--bundle", type=Path, metavar="BUNDLE", help="bundle of the new version")
    what.add_argument(
        "--back",
        action="store_true",
        help="return to the previous version and delete the current one",
    )
    what.add_argument(
        "--finish", action="store_true", help="unload and delete the versions that do not serve"
    )
    add_trust(parser)
    parser.add_argument(
        "--golden",
        default="refuse",
        choices=("refuse", "warn"),
        help="what becomes of a new version that answers golden pictures otherwise than at export "
        "(default: refuse)",
    )
    args = parser.parse_args(arguments)
    return exit_status(
        lambda: _run(
            args.repository, args.bundle, args.trust, args.back, args.finish, args.golden == "warn"
        )
    )


def _run(
    folder: Path,
    bundle: Path | None,
    trust: Sequence[Path],
    go_back: bool,
    only_finish: bool,
    lenient: bool,
) -> int:
    from serve.repository.contents import rollout_lock
    from serve.repository.versions import Repository
    from serve.server.admin import Admin

    keys = [PublicKey(path) for path in trust]
    if keys and not bundle:
        raise UserError("--trust is for --bundle: add it, or leave --trust out")
    _check_folder(folder)
    with rollout_lock(folder), Admin(folder) as admin:
        repository = Repository(folder)
        for model in repository.settle():
            admin.load(model)
        if only_finish:
            return finish(repository, admin)
        if go_back:
            older = [version for version in repository.versions if version < repository.serving]
            if not older:
                raise UserError(
                    f"{folder} has no version before {repository.serving}: nothing to go back to"
                )
            newer = repository.serving
            switch(repository, admin, older[-1])
            # requests to its models by name must not reach it either
            for model in repository.forget(newer):
                admin.load(model)
            print(
                f"serving   version {repository.serving} again (the newer one is deleted: --bundle "
                "loads it again)"
            )
            return 0
        if repository.made_with.signed_by and not keys:
            raise UserError(
                f"{folder} was rendered from a signed bundle: add --trust KEY, so that this one is "
                "checked too"
            )
        return _roll_out(repository, admin, bundle, keys, lenient)


def _roll_out(repository, admin, path: Path, trust: Sequence[PublicKey], lenient: bool) -> int:
    """Try a bundle under other names, then switch to it; `lenient`: also where it answers otherwise
    than at export.
    """
    from contract.golden import measure
    from serve.bundle import read_bundle
    from serve.repository.contents import STAGED
    from serve.repository.golden import golden_of
    from serve.server.golden import DOORS, ask

    begun = time.perf_counter()
    bundle = read_bundle(path, trust)
    if repository.made_with.signed_by not in ("", bundle.signed_by):
        raise UserError(
            f"{path} is signed by another key than the bundle that {repository.path} was rendered "
            "from: render a repository with that key (python -m serve.repository --trust)"
        )
    golden = golden_of(bundle)
    version = repository.versions[-1] + 1
    models = repository.render(bundle, version)
    repository.check_interface(models)
    staged = repository.stage(models)
    try:
        print(f"trying    version {version} ({path}) under other names", flush=True)
        for name in staged:
            admin.load(name)
        doors = [door for door in DOORS if STAGED + door in staged]
        deviations = [
            one
            for door in doors
            for one in measure(golden, ask(admin.client, STAGED + door, version, golden))
        ]
        for note in dict.fromkeys(one.note for one in deviations if one.note):
            print(f"warning   {printable(note)}", flush=True)
        wrong = [one.problem for one in deviations if one.problem]
        if wrong:
            message = "; ".join(dict.fromkeys(wrong))
            message = f"{path} answers differently here than at its export: {message}"
            if not lenient:
                raise ServerError(f"{message} (--golden warn switches all the same)")
            print(f"warning   {printable(message)}", flush=True)
    except ServerError as error:
        raise ServerError(f"{error} (version {repository.serving} still serves)") from error
    finally:
        for name in reversed(staged):
            admin.unload(name)
        repository.unstage()
    loaded = []
    try:
        for model in repository.add(models, version):
            loaded.append(model)
            admin.load(model)
        switch(repository, admin, version)
    except BaseException as error:  # Ctrl-C, a full disk, a bundle that was changed meanwhile
        with contextlib.suppress(ServerError):  # the server is gone: its next start finds it undone
            for model in repository.settle():
                admin.load(model)
        if not isinstance(error, ServerError):
            raise
        raise ServerError(f"{error} (version {repository.serving} still serves)") from error
    print(f"serving   version {version} ({path}), {time.perf_counter() - begun:.0f} s")
    print("next      go back, or free the old version:")
    print(f"  python -m serve.rollout {repository.path} --back")
    print(f"  python -m serve.rollout {repository.path} --finish")
    return 0


def switch(repository, admin, version: int) -> None:
    """Point the models that serve one version at another; those that cannot be loaded in it stay as
    they were, and so do the others.
    """
    before = repository.serving
    try:
        for name in repository.point(version):
            admin.load(name)
    except BaseException:
        for name in repository.point(before):
            with contextlib.suppress(ServerError):
                admin.load(name)
        raise


def finish(repository, admin) -> int:
    """Drop every version but the one that serves."""
    idle = [version for version in repository.versions if version != repository.serving]
    for version in idle:
        for model in repository.forget(version):
            admin.load(model)
    print(f"serving   version {repository.serving}; dropped {', '.join(map(str, idle)) or 'none'}")
    return 0


def _check_folder(folder: Path) -> None:
    """Raise UserError for a folder that is not a repository."""
    if not (folder / "features" / "config.pbtxt").is_file():
        raise UserError(
            f"{folder} is not a repository of serve.run (start one: python -m serve.run BUNDLE "
            f"--repository {folder})"
        )


if __name__ == "__main__":
    sys.exit(main())
