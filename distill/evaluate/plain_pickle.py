"""Pickles of plain data, as authors publish with their data sets, read without running any code in
them.
"""

import io
import pickle
import re
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from contract.errors import UserError, raise_trouble


def read_pickle(path: Path, arrays: bool = False) -> Any:
    """Load a pickle of plain containers and numpy arrays; no code in the file is run.

    Arrays become nested lists, or with `arrays` those that are values of the outermost dict become
    numpy arrays, which cannot be written to. Raises UserError for a damaged file, and for one that
    needs any other global.
    """
    try:
        # Python 2's strings, which also carry arrays' bytes, are read as latin-1
        reader = _ArrayUnpickler if arrays else _PlainUnpickler
        result = reader(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except UserError as error:
        raise UserError(f"{path} {error}") from error
    # A damaged pickle fails in any way its opcodes can
    except Exception as error:
        raise_trouble(path, error)
        raise UserError(
            f"{path} is not a readable pickle ({type(error).__name__}): download it again"
        ) from error
    if arrays and isinstance(result, dict):
        return {
            key: value.array if isinstance(value, _Held) else value for key, value in result.items()
        }
    return result


class _DType:
    """Stands in for numpy.dtype: a simple type's code, with the byte order that its pickled state
    adds.
    """

    def __init__(self, code: str, *_: Any) -> None:
        if not re.fullmatch(r"[<>|=]?([biufSU]\d{1,6}|O\d?)", code):
            raise ValueError(f"dtype {code!r}")
        self.order, self.kind = "=", code.lstrip("<>|=")

    def __setstate__(self, state: tuple) -> None:
        self.order = {"<": "<", ">": ">"}.get(state[1], "=")

    def array(self, raw: bytes | str, shape: tuple[int, ...], order: str = "C") -> np.ndarray:
        """The numbers or strings in an array's pickled bytes."""
        data = raw.encode("latin1") if isinstance(raw, str) else raw
        if prod(shape) == 0:
            return np.zeros(0)
        return np.frombuffer(data, np.dtype(self.order + self.kind)).reshape(shape, order=order)

    def values(self, raw: bytes | str | list, shape: tuple[int, ...], order: str = "C") -> Any:
        """The same as nested lists; `raw` is a list for an array of objects."""
        if self.kind.startswith("O"):
            if len(shape) != 1 or not isinstance(raw, list):
                raise ValueError("array of objects")
            return raw
        return self.array(raw, shape, order).tolist()


class _Array(list):
    """Stands in for numpy.ndarray: a list that its pickled state fills."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, raw = state
        self[:] = dtype.values(raw, shape, "F" if fortran else "C")


class _Held:
    """Stands in for numpy.ndarray: holds the array that its pickled state makes."""

    array: np.ndarray

    def __init__(self, array: np.ndarray | None = None) -> None:
        if array is not None:
            self.array = array

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, raw = state
        self.array = dtype.array(raw, shape, "F" if fortran else "C")


def _encode(text: str, encoding: str) -> bytes:
    """Stands in for _codecs.encode, by which old protocols write bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"encoding {encoding!r}")
    return text.encode("latin1")


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler whose globals are all stand-ins of this file: numpy's own would trust shapes and
    flags in the file.
    """

    known = {
        "builtins.set": set,
        "builtins.frozenset": frozenset,
        "builtins.bytes": lambda: b"",
        "_codecs.encode": _encode,
        "numpy.dtype": _DType,
        "numpy.ndarray": _Array,
        "numpy._core.multiarray._reconstruct": lambda *_: _Array(),
        "numpy._core.multiarray.scalar": lambda dtype, raw: dtype.values(raw, (1,))[0],
        "numpy._core.numeric._frombuffer": lambda raw, dtype, shape, order, *_: dtype.values(
            raw, shape, order
        ),
    }

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a permitted global; raises UserError naming any other."""
        # Python 2 and numpy 1 have other names for the same modules
        modern = {"__builtin__": "builtins"}.get(
            module, re.sub(r"^numpy\.core\.", "numpy._core.", module)
        )
        result = self.known.get(f"{modern}.{name}")
        if result is None:
            raise UserError(
                f"refers to {module}.{name}, which plain data do not need: use the official file"
            )
        return result


class _ArrayUnpickler(_PlainUnpickler):
    """The same, with arrays held as arrays: of millions of pixels, lists would take gigabytes."""

    known = _PlainUnpickler.known | {
        "numpy.ndarray": _Held,
        "numpy._core.multiarray._reconstruct": lambda *_: _Held(),
        "numpy._core.numeric._frombuffer": lambda raw, dtype, shape, order, *_: _Held(
            dtype.array(raw, shape, order)
        ),
    }
