"""Files that one process writes and others read, as network folders show them: maybe a minute
late.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from contract.errors import UserError
from contract.picture_files import size_and_time
from distill.distributed import Ranks

_PATIENCE = 100
"""Seconds until files of other processes must be seen: caches of network folders last a minute."""


def wait_for(paths: Sequence[Path], seen: Callable[[Path], bool] = Path.exists) -> None:
    """Until this process sees files that others have written; raises UserError where it never
    does.
    """
    for _ in range(_PATIENCE):
        if all(seen(path) for path in paths):
            return
        time.sleep(1)
    lacking = next(path for path in paths if not seen(path))
    raise UserError(
        f"{lacking.parent} does not have {lacking.name}, which another process wrote there: choose "
        "an --output on a file system that all machines share"
    )


def first_sees(path: Path, ranks: Ranks) -> bool:
    """Whether the first process sees a file, for all of them, which then see the same one. A
    collective call. Raises UserError as `wait_for` does.
    """
    own = size_and_time(str(path)) if path.is_file() else None
    wanted = ranks.gather(own)[0]
    if wanted is not None:
        wait_for([path], lambda each: size_and_time(str(each)) == wanted)
    return wanted is not None
