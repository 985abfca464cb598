"""Pictures inside WebDataset tar files (`contract/tars.py`), read by number like those of a
folder.
"""

import os

from PIL import Image

from contract.errors import UserError, first_line, raise_trouble
from contract.images import TRUSTED, decode
from contract.tars import TarIndex
from distill.data.open_files import Pool
from distill.data.pixels import Opened, open_picture


class WebDatasetPictures(TarIndex):
    """One picture of each sample, whose tar files stay open in a bounded pool."""

    def __init__(self, patterns: str | list[str]) -> None:
        super().__init__(patterns)
        self._files: Pool[int] = Pool()

    def open(self, number: int) -> Opened:
        return open_picture(self._encoded(number), self.name(number))

    def _encoded(self, number: int) -> bytes:
        """The bytes of picture `number`."""
        path, offset, size = self.place(number)
        try:
            file = self._files.get(path, lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            # pread: a place of its own, so that forked workers may share what the parent has open
            return os.pread(file, size, offset)
        except OSError as error:
            raise_trouble(self.name(number), error)
            raise UserError(
                f"data.path: cannot read {self.name(number)}: {first_line(error)}"
            ) from error

    def load(self, number: int) -> Image.Image:
        return decode(self._encoded(number), TRUSTED, name=self.name(number))
