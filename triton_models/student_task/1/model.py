"""Pictures in, maps of their size out: calls `features` for a task head's output and makes the map
by a function of dense.py, which is contract/dense.py.
"""

import json
from pathlib import Path

import dense
import numpy as np
from calling_model import LATEST, ConcurrentModel


class TritonPythonModel(ConcurrentModel):
    """See calling_model.py; dense.py is copied next to this file too."""

    def initialize(self, args: dict) -> None:
        """Read what the task's output means in this bundle."""
        super().initialize(args)
        folder = Path(args["model_repository"]) / args["model_version"]
        self.about = json.loads((folder / "model.json").read_text())
        self.map = json.loads(args["model_config"])["output"][0]["name"]
        self.make = getattr(dense, self.about["function"])
        # `features` answers in the version that serves; if its head's classes or unit are others
        # than those that this model's configuration tells clients, it refuses
        self.parameters = {name: self.about[name] for name in ("bundle", "task", "facts")}

    async def compute(self, request) -> dict[str, np.ndarray]:
        """The map of one request; raises Refused."""
        image = self.read_image(request)
        (values,) = await self.call(
            "features", LATEST, [image], [self.about["output"]], request, self.parameters
        )
        height, width = image.shape()[1:3]
        return {
            self.map: np.ascontiguousarray(self.make(values, height, width, self.about["cell"]))
        }
