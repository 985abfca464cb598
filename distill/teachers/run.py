"""A teacher that is an earlier run of this project."""

from torch import Tensor, nn

from distill.features import Features


class StudentNet(nn.Module):
    """The backbone of an earlier run in a teacher's place."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        # distill.runs imports the methods, which only a run as a teacher needs
        from distill.runs import load_run

        run = load_run(folder)
        self.student, self.recipe = run.method.student, run.recipe
        self.student.second_token = False  # teachers have one summary

    def forward(self, pixels: Tensor) -> Features:
        """Features of normalised images [B, 3, H, W]."""
        return self.student(pixels)
