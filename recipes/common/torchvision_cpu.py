"""Import torchvision next to a CPU build of torch.

The package index serves torchvision as a build that links CUDA. Beside a CPU build of torch its
compiled operators cannot be loaded, nobody declares ``torchvision::nms``, and the import fails on
the first shape rule it attaches to that operator::

    RuntimeError: operator torchvision::nms does not exist

The models, datasets and transforms that the recipes use are plain Python and need none of these
operators, so declaring their schemas is enough. Nothing is declared where torchvision imports as
it is. Import torchvision through here, never directly::

    from common.torchvision_cpu import torchvision
"""

import importlib
import sys
from types import ModuleType

import torch

__all__ = ["torchvision"]

# The two schemas torchvision 0.28 expects its compiled library to have declared.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_SYMPTOM = "operator torchvision::nms does not exist"
# A library's declarations last as long as the object does.
_declarations: list[torch.library.Library] = []


def _import_torchvision() -> ModuleType:
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if _SYMPTOM not in str(error):
            raise
    # The failed import leaves submodules behind that believe themselves complete.
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        library.define(schema)  # type: ignore[no-untyped-call]
    _declarations.append(library)
    return importlib.import_module("torchvision")


torchvision = _import_torchvision()
