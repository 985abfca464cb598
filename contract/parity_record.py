"""What a manifest says of one comparison with the torch student. No torch: serving reads it."""

from contract.engine_record import Record


class ParityRecord(Record):
    """Agreement of one output with the torch student, each figure the worst over the pictures."""

    graph: str
    output: str
    runtime: str
    batch: int
    height: int
    width: int
    pictures: int
    """How many different ones were compared."""
    cosine: float
    max_abs: float
    relative: float
    """Length of the difference over that of the student's output."""
    centred: float | None
    """Cosine without the mean over pictures, which are alike in it; None for one picture."""
    deviation: float
    """Largest distance of a picture's output from that mean, over its length: what `centred` is
    about.
    """
    position_cosine: float | None
    """Least cosine of one position, None for what is not a map."""
    position_error: float | None = None
    """Largest error of one position over its length (contract/positions.py), None for what is not a
    map, and in bundles of earlier versions, as all of the following.
    """
    positions_beyond: int | None = None
    """Most positions of one picture that are beyond the tighter of the bounds they were judged by.
    """
    positions: int | None = None
    """How many a picture has."""
    nearest: float | None = None
    """Of what stands for a whole picture: share of the pictures and crops whose nearest neighbour
    is the one by the student's own output."""
    ranked: float | None = None
    """Share of the five nearest neighbours that are the same, on average."""
    neighbours_of: int | None = None
    """How many pictures and crops."""
    worst_image: str
    passed: bool
    problem: str
