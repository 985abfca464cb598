"""What the header of a picture's file says, before anything is decoded."""

from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

from contract.images import Limits, opened, orientation


def check_header(data: bytes, limits: Limits = Limits(), name: str = "") -> None:
    """Raise UnreadableImage for bytes that `decode` would refuse by their header alone: empty, of
    another format, beyond the limits (ImageTooLarge). Nothing is decoded.
    """
    with opened(data, limits, name):
        pass


def own_size(data: bytes, limits: Limits = Limits(), name: str = "") -> tuple[int, int]:
    """Height and width of a picture as it is held, by its header (of a PNG, the tag may come last,
    and Pillow decodes it on the way); raises UnreadableImage as `check_header` does.
    """
    with opened(data, limits, name) as (picture, _):
        width, height = picture.size
        if isinstance(picture, TiffImageFile):  # some versions of Pillow turn the size, too
            width, height = picture.tag_v2[IMAGEWIDTH], picture.tag_v2[IMAGELENGTH]
        return (width, height) if orientation(picture) >= 5 else (height, width)
