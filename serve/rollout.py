"""`python -m serve.rollout`: a new bundle takes over from the old one in a running server, or is
refused before it does.

The new version is first loaded under names that no client knows, and must say of the bundle's
golden photographs what was recorded at its export. Only then is it loaded beside the old one and
the ensembles are switched, each in one step. The old version stays loaded, so that `--back` is as
quick, until `--finish`.
"""

import contextlib
import fcntl
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from contract.command_line import CommandLine
from contract.errors import UserError, exit_status
from serve.errors import ServerError

EPILOG = """\
examples:
  python -m serve.run bundles/first --repository repository
  python -m serve.rollout repository --bundle bundles/second      load it beside, compare, switch
  python -m serve.rollout repository --back                       the version before again
  python -m serve.rollout repository --finish                     free the version that no longer serves

The new bundle must have the same models, inputs, outputs and largest batch: clients rely on them (one that differs gets a
server of its own). Versions are numbered 1, 2, …; `features` answers with the number of the version that serves.
Exit status: 0 done, 2 a mistake in what was asked, 1 the new version is not fit to serve (the old one goes on serving).
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
    what.add_argument("--bundle", type=Path, metavar="BUNDLE", help="the new version")
    what.add_argument(
        "--back",
        action="store_true",
        help="switch to the version before, and drop the one that served",
    )
    what.add_argument(
        "--finish", action="store_true", help="unload and delete the versions that do not serve"
    )
    args = parser.parse_args(arguments)
    return exit_status(lambda: _run(args.repository, args.bundle, args.back, args.finish))


def _run(folder: Path, bundle: Path | None, go_back: bool, only_finish: bool) -> int:
    from serve.repository.versions import Repository
    from serve.server.admin import Admin

    with _locked(folder), Admin(folder) as admin:
        repository = Repository(folder)
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
                f"serving   version {repository.serving} again (the other is gone: --bundle brings "
                "one back)"
            )
            return 0
        return _roll_out(repository, admin, bundle)


def _roll_out(repository, admin, path: Path) -> int:
    """Try a bundle under other names, then switch to it."""
    from contract.golden import GOLDEN, read_golden
    from serve.bundle import read_bundle
    from serve.repository.versions import STAGED

    begun = time.perf_counter()
    bundle = read_bundle(path)
    golden = read_golden(bundle.file(GOLDEN))
    version = repository.versions[-1] + 1
    models = repository.render(bundle, version)
    repository.check_interface(models)
    staged = repository.stage(models, STAGED)
    try:
        print(f"trying    version {version} ({path}) under other names", flush=True)
        for name in staged:
            admin.load(name)
        wrong = admin.compare(f"{STAGED}features", golden)
        if wrong:
            raise ServerError(
                f"{path} does not say here what it said when exported: {'; '.join(wrong)}"
            )
    except ServerError as error:
        raise ServerError(f"{error} (version {repository.serving} goes on serving)") from error
    finally:
        for name in reversed(staged):
            admin.unload(name)
        repository.unstage(STAGED)
    loaded = []
    try:
        for model in repository.add(models, version):
            loaded.append(model)
            admin.load(model)
        switch(repository, admin, version)
    except ServerError as error:
        switch(repository, admin, repository.serving)
        for model in repository.forget(version):
            admin.load(model)
        raise ServerError(f"{error} (version {repository.serving} goes on serving)") from error
    print(f"serving   version {version} ({path}), {time.perf_counter() - begun:.0f} s")
    print("next      go back, or free the old version:")
    print(f"  python -m serve.rollout {repository.path} --back")
    print(f"  python -m serve.rollout {repository.path} --finish")
    return 0


def switch(repository, admin, version: int) -> None:
    """Point the ensembles at a version, those that clients use most last."""
    for name in repository.point(version):
        admin.load(name)


def finish(repository, admin) -> int:
    """Drop every version but the one that serves."""
    idle = [version for version in repository.versions if version != repository.serving]
    for version in idle:
        for model in repository.forget(version):
            admin.load(model)
    print(f"serving   version {repository.serving}; dropped {', '.join(map(str, idle)) or 'none'}")
    return 0


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One rollout at a time; raises UserError for a folder that is no repository or is being
    changed.
    """
    if not (folder / "features" / "config.pbtxt").is_file():
        raise UserError(
            f"{folder} is no repository of serve.run (start one: python -m serve.run BUNDLE "
            f"--repository {folder})"
        )
    with open(folder / ".rollout.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another rollout is under way: wait for it") from error
        yield


if __name__ == "__main__":
    sys.exit(main())
