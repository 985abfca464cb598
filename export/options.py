"""What the words of `export.run`'s command line mean, where more than the command needs to know."""

from collections.abc import Sequence

from contract.errors import UserError

PACKAGED = "packaged-photos"
"""In place of a folder: the photographs of packages on PyPI."""


def parse_sizes(texts: Sequence[str] | None, stride: int, own: int) -> list[tuple[int, int]]:
    """(height, width) of every `224` or `448x336`; raises UserError for sides that the stride does
    not divide.
    """
    result = []
    for text in texts or [str(own)]:
        parts = text.lower().split("x")
        if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise UserError(f"--resolutions {text}: write pixels, 224 or 448x336 (height x width)")
        height, width = int(parts[0]), int(parts[-1])
        for side in (height, width):
            if side % stride:
                below = side // stride * stride
                nearest = f"{below} or {below + stride}" if below else str(stride)
                raise UserError(
                    f"--resolutions {text}: {side} is not a multiple of the student's stride "
                    f"{stride}: use {nearest}"
                )
        result.append((height, width))
    return list(dict.fromkeys(result))
